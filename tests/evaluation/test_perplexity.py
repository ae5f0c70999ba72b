"""Perplexity under `window-<length>` against a plain loop over a transformers forward."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qbench.engine.passes import embed
from qbench.engine.source import MemorySource
from qbench.errors import EvaluationError
from qbench.evaluation.perplexity import VERSION, perplexity, stream_nll, window_nll
from qbench.models.load import load_model
from qbench.spec import EvaluationSpec
from tests.architectures import tiny_model, tokens
from tests.engine.helpers import tiny_asset, tiny_windows


def _spec(length=64, n=None):
    return EvaluationSpec(
        evaluator="perplexity", version=VERSION, task="text", fingerprint="0" * 64, length=length, n=n
    )


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_asset(), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def windows():
    return tiny_windows(7, 100)


@torch.no_grad()
def _plain(model, windows):
    """Mean loss per window, as transformers itself computes it for labels."""
    return [model(input_ids=w[None], labels=w[None]).loss.double().item() for w in windows]


def test_is_the_plain_loop_over_the_library(windows, model):
    plain = AutoModelForCausalLM.from_pretrained(tiny_asset().path, dtype=torch.float32)
    expected = _plain(plain, windows)
    found = window_nll(model, windows)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    measured = perplexity(found, _spec(100))
    assert measured.value == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-6)
    assert 2 < measured.value < 200  # it is a language model


@pytest.mark.parametrize("batch", [1, 2, 5, 7, 100])
def test_batches_do_not_matter(batch, model, windows):
    assert torch.allclose(window_nll(model, windows, batch), window_nll(model, windows), rtol=1e-6)


def test_streams_give_the_numbers_of_whole_forwards(model, windows):
    source = MemorySource(model)
    with torch.no_grad():
        stream = embed(source, model, windows)
        for index in range(source.count):
            stream.advance(source.block(index), index)
    steps = []
    found = stream_nll(source, stream, windows, lambda done, total: steps.append((done, total)))
    assert torch.allclose(found, window_nll(model, windows), rtol=1e-6)
    assert steps == [(k + 1, 7) for k in range(7)]


def test_logits_are_reduced_in_float32():
    """A bfloat16 softmax would be off by parts in a thousand."""
    model, config = tiny_model("llama", dtype=torch.bfloat16)
    ids = tokens(config, batch=2, length=20)
    with torch.no_grad():
        logp = model(ids).logits[:, :-1].double().log_softmax(-1)
    expected = -logp.gather(2, ids[:, 1:, None]).squeeze(2).mean(1)
    assert torch.allclose(window_nll(model, ids, 2), expected, rtol=1e-6)


def test_progress_counts_windows(model, windows):
    steps = []
    window_nll(model, windows, 3, lambda done, total: steps.append((done, total)))
    assert steps == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize("n", [2, 3, 50])
def test_value_and_standard_error_by_hand(n):
    nll = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) + 2
    measured = perplexity(nll, _spec())
    mean = sum(nll.tolist()) / n
    variance = sum((x - mean) ** 2 for x in nll.tolist()) / (n - 1)
    assert measured.value == pytest.approx(math.exp(mean), rel=1e-12)
    assert measured.stderr == pytest.approx(math.exp(mean) * math.sqrt(variance / n), rel=1e-12)
    assert measured.n == n
    assert measured.samples.dtype == np.float64
    assert measured.samples.tolist() == nll.tolist()
    assert (measured.evaluator, measured.protocol, measured.task, measured.name) == (
        "perplexity",
        "window-64",
        "text",
        "ppl",
    )
    assert measured.spec_key == _spec().key()


def test_the_standard_error_is_the_spread_of_repeated_measurements():
    """The delta method against the spread over fresh samples of windows."""
    generator = torch.Generator().manual_seed(0)
    draws = 3 + 0.5 * torch.randn(400, 100, generator=generator, dtype=torch.float64)
    measured = [perplexity(nll, _spec()) for nll in draws]
    spread = np.std([m.value for m in measured], ddof=1)
    assert np.mean([m.stderr for m in measured]) == pytest.approx(spread, rel=0.1)


def test_one_window_has_no_standard_error():
    assert perplexity(torch.tensor([2.0], dtype=torch.float64), _spec()).stderr is None


@pytest.mark.parametrize("value", [math.nan, math.inf, 1200.0])
def test_what_is_not_finite_is_an_error_that_says_where(value):
    nll = torch.tensor([2.0, value, value], dtype=torch.float64)
    with pytest.raises(EvaluationError, match=r"text \(window-64\)") as refused:
        perplexity(nll, _spec())
    assert "\n" not in str(refused.value)
    if not math.isfinite(value):
        assert f"window 1 is {value}" in str(refused.value)


def test_a_model_that_computes_nan_gives_no_number():
    model, config = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(EvaluationError, match="the loss of window 0 is nan"):
        perplexity(window_nll(model, tokens(config)), _spec())
