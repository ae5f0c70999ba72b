"""Continuations against transformers' own `generate`; measures against counting by hand."""

from collections import Counter

import pytest
import torch
from transformers import DynamicCache

from qbench.evaluation.fidelity import build
from qbench.evaluation.greedy import Continuations, continue_greedily, degeneration, first_divergence, repetition
from qbench.models.load import load_model
from qbench.spec import EvaluationSpec
from tests.architectures import ARCHITECTURES, tiny_model, tokens
from tests.engine.caches import cache_format
from tests.engine.helpers import tiny_asset, tiny_windows
from tests.evaluation.subjects import full_precision, quantized
from tests.evaluation.test_fidelity import OPTIONS

SPEC = EvaluationSpec(evaluator="fidelity", version=1, task="text", fingerprint="0" * 64, length=40, n=3, mode="greedy")
GREEDY = {"n": 3, "prompt": 12, "tokens": 20}


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_asset(), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "bloom", "opt", "mistral"])
def test_is_what_the_library_generates(name):
    assert name in ARCHITECTURES
    model, config = tiny_model(name)
    prompts = tokens(config, batch=3, length=9)
    expected = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=15, do_sample=False, eos_token_id=None
    )[:, 9:]
    found = continue_greedily(model, prompts, 15, DynamicCache(config=config))
    assert torch.equal(found, expected)


def test_the_cache_quantizes_what_it_holds(model, tmp_path):
    """A prompt is read before it is quantized: the first token is that of full precision, later ones need not be."""
    prompts = tiny_windows(8, 40)
    subject = quantized(tmp_path, 8, cache=cache_format("kivi", 2, 16), model=model)
    with subject.decoding() as (inside, new_cache):
        found = continue_greedily(inside, prompts, 24, new_cache())
    plain = continue_greedily(model, prompts, 24, DynamicCache(config=model.config))
    assert not torch.equal(found, plain)
    assert (found == plain).double().mean() > 0.1


def test_divergence_and_repetition_by_hand():
    one = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [5, 2, 3, 4]])
    other = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 4], [1, 2, 3, 4]])
    assert first_divergence(one, other).tolist() == [4, 2, 0]
    loop = torch.tensor([[7, 8] * 6, [1] * 12, list(range(12))])
    assert repetition(loop).tolist() == pytest.approx([7 / 9, 8 / 9, 0])
    random = torch.randint(4, (20, 50), generator=torch.Generator().manual_seed(0))
    for row, found in zip(random.tolist(), repetition(random).tolist(), strict=True):
        grams = Counter(tuple(row[place : place + 4]) for place in range(47))
        assert found == pytest.approx(sum(count - 1 for count in grams.values()) / 47)
    by_name = {m.name: m for m in degeneration(one, other, SPEC)}
    assert by_name["greedy_divergence"].value == 2
    assert by_name["greedy_divergence"].samples.tolist() == [4, 2, 0]
    assert by_name["greedy_divergence_median"].value == 2
    assert by_name["greedy_agreement"].value == pytest.approx((4 + 3 + 3) / 12)
    assert by_name["greedy_distinct"].value == 1
    assert by_name["greedy_repetition"].value == 0


def test_full_precision_never_diverges_from_itself(tmp_path, model):
    _, only = build({**OPTIONS, "greedy": GREEDY}, "memory")
    assert isinstance(only, Continuations)
    assert only.spec.protocol == "greedy-32"
    subject = full_precision(tmp_path, model)
    only.preflight(subject.context)
    for _ in range(2):
        steps = []
        by_name = {
            m.name: m for m in only.measure(subject, lambda done, total, steps=steps: steps.append((done, total)))
        }
        assert by_name["greedy_divergence"].value == by_name["greedy_divergence_median"].value == 20
        assert by_name["greedy_agreement"].value == 1
        assert by_name["greedy_divergence"].stderr == 0
        assert steps[-1] == (120, 120)
        assert steps == sorted(steps)
    assert len(steps) == 20  # full precision came from the cache


def test_continuations_of_other_lengths_are_not_taken_from_the_cache(tmp_path, model):
    for count in (8, 11):
        _, only = build({**OPTIONS, "greedy": {**GREEDY, "tokens": count}}, "memory")
        assert only.measure(full_precision(tmp_path, model), lambda done, total: None)[0].value == count


def test_fewer_bits_leave_the_path_earlier(tmp_path, model):
    _, only = build({**OPTIONS, "n": 12, "length": 64, "greedy": {"n": 12, "prompt": 40, "tokens": 24}}, "memory")
    found = []
    for bits in (8, 4, 2):
        measured = only.measure(quantized(tmp_path, bits, model=model), lambda done, total: None)
        found.append({m.name: m.value for m in measured})
    for name in ("greedy_divergence", "greedy_agreement"):
        values = [row[name] for row in found]
        assert values[0] > values[1] > values[2], name


def test_options_are_part_of_the_key():
    def key(**change):
        return build({**OPTIONS, "greedy": {**GREEDY, **change}}, "memory")[1].spec.key()

    changed = [key(n=2), key(prompt=11), key(tokens=21), key(prompt=13, tokens=19)]
    assert len({key(), *changed}) == 5
    assert build({**OPTIONS, "length": 50, "greedy": GREEDY}, "memory")[1].spec.key() != key()
