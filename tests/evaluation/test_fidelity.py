"""Divergences against float64 definitions; exact zeros for full precision against itself; order by bits."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from analysis.stats import estimates
from qbench.calibration.corpora import resolve_corpus
from qbench.errors import AssetError, EvaluationError, SpecError
from qbench.evaluation.fidelity import (
    TokenFidelity,
    WindowFidelity,
    build,
    compare_logits,
    fidelity,
    last_hidden,
    window_fidelity,
)
from qbench.evaluation.logit_cache import TensorCache
from qbench.evaluation.perplexity import window_nll
from qbench.models.load import load_model
from qbench.spec import EvaluationSpec
from qbench.structure.blocks import finish
from tests.architectures import ARCHITECTURES, tiny_model, tokens
from tests.engine.caches import cache_format
from tests.engine.helpers import tiny_asset, tiny_windows
from tests.evaluation.subjects import full_precision, quantized

SPEC = EvaluationSpec(evaluator="fidelity", version=1, task="text", fingerprint="0" * 64, length=48, n=None, mode="kl")
OPTIONS = {
    "corpora": ["pydoc-heldout"],
    "path": None,
    "length": 48,
    "n": 4,
    "batch": None,
    "cache_gb": 1,
    "greedy": None,
}


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_asset(), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def windows():
    return tiny_windows(6, 48)


def _logits(rows=70, vocabulary=500, scale=4.0, seed=0):
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_divergence_is_that_of_float64(distance):
    """Also where the models are nearly the same, whose divergence is below the rounding of a float32 sum."""
    full = _logits()
    other = full + distance * torch.randn(full.shape, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(70) % 500
    found = compare_logits(full, other, targets)
    p, q = full.double().softmax(-1).numpy(), other.double().softmax(-1).numpy()
    expected = entropy(p, q, axis=1)
    assert found.kl.dtype == torch.float64
    assert found.kl.numpy() == pytest.approx(expected, rel=5e-3 if distance < 1e-3 else 3e-4)
    assert found.kl.mean().item() == pytest.approx(expected.mean(), rel=2e-4)
    at = np.arange(70), targets.numpy()
    assert found.dp.numpy() == pytest.approx(q[at] - p[at], abs=1e-6)
    assert found.dnll.numpy() == pytest.approx(np.log(p[at] / q[at]), abs=1e-5)
    assert found.agrees.tolist() == (p.argmax(1) == q.argmax(1)).astype(float).tolist()


def test_the_order_of_the_divergence():
    """KL(full ‖ quantized), which is unbounded where the quantized model rules out what full precision expects."""
    sharp, flat = torch.tensor([[20.0, 0.0, 0.0]]), torch.zeros(1, 3)
    assert compare_logits(sharp, flat, torch.tensor([0])).kl.item() == pytest.approx(math.log(3), rel=1e-5)
    assert compare_logits(flat, sharp, torch.tensor([0])).kl.item() == pytest.approx(40 / 3 - math.log(3), rel=1e-5)


def test_probabilities_that_vanish():
    """What full precision gives no chance costs as much as it takes from the rest; the reverse is infinite."""
    full, other = torch.tensor([[0.0, -200.0, -math.inf]]), torch.tensor([[0.0, 0.0, -math.inf]])
    assert compare_logits(full, other, torch.tensor([0])).kl.item() == pytest.approx(math.log(2), rel=1e-6)
    reverse = compare_logits(other, full, torch.tensor([0]))
    assert reverse.kl.item() == pytest.approx(0.5 * 200 - math.log(2), rel=1e-5)
    never = compare_logits(torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]]), torch.tensor([0]))
    assert never.kl.item() == math.inf
    with pytest.raises(EvaluationError, match="kl at token 0 of window 0 is inf"):
        fidelity(TokenFidelity(*(getattr(never, name)[None] for name in ("kl", "agrees", "dp", "dnll"))), SPEC)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_kept_hidden_states_give_the_models_own_logits_bit_by_bit(name):
    model, config = tiny_model(name)
    ids = tokens(config, batch=2, length=13)
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(finish(model, last_hidden(model, ids).clone(), ids), expected)


@pytest.mark.parametrize("batch", [None, 1, 4])
def test_full_precision_against_itself_is_exact(batch, windows, tmp_path, model):
    subject = full_precision(tmp_path, model)
    exact = {"top1_agreement": 1.0}
    for _ in range(2):  # computed, then from the cache
        found = window_fidelity(subject, windows, TensorCache(tmp_path), batch)
        for measured in fidelity(found, SPEC):
            assert measured.value == exact.get(measured.name, 0.0), measured.name
            assert measured.stderr in (None, 0.0)


def test_more_bits_are_closer_in_every_measure(windows, tmp_path, model):
    cache = TensorCache(tmp_path)
    found = []
    for bits in (8, 4, 3, 2):
        measured = fidelity(window_fidelity(quantized(tmp_path, bits, model=model), windows, cache), SPEC)
        found.append({m.name: m.value for m in measured})
    for name in ("kl_mean", "kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max", "rms_dp", "nll_difference"):
        values = [row[name] for row in found]
        assert values == sorted(values), name
        assert 0 < abs(values[0]) < values[3], name
    agreement = [row["top1_agreement"] for row in found]
    assert 1 >= agreement[0] > agreement[1] > agreement[2] > agreement[3] > 0
    assert found[3]["mean_dp"] < 0


def test_against_two_models_in_float64(windows, tmp_path, model):
    """A quantized cache and quantized weights, the plain way: two models side by side."""
    subject = quantized(tmp_path, 3, cache=cache_format("kivi", 2, 16), model=model)
    found = window_fidelity(subject, windows, TensorCache(tmp_path))
    with torch.no_grad():
        p = model(windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        with subject.quantized():
            q = model(windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        with subject.quantized():
            losses = window_nll(model, windows)
    expected = (p.exp() * (p - q)).sum(-1)
    assert torch.allclose(found.kl, expected, rtol=1e-3, atol=1e-9)
    assert torch.allclose(found.dnll.mean(1), losses - window_nll(model, windows), atol=1e-6)
    true = windows[:, 1:, None]
    dp = (q.gather(2, true).exp() - p.gather(2, true).exp())[..., 0]
    by_name = {m.name: m for m in fidelity(found, SPEC)}
    assert by_name["rms_dp"].value == pytest.approx(100 * dp.square().mean().sqrt().item(), rel=1e-4)
    assert by_name["mean_dp"].value == pytest.approx(100 * dp.mean().item(), rel=1e-4)
    assert by_name["kl_mean"].samples == pytest.approx(expected.mean(1).numpy(), rel=1e-3)
    assert by_name["kl_max"].value == pytest.approx(expected.max().item(), rel=1e-3)
    for name, share in {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999}.items():
        assert by_name[name].value == pytest.approx(np.quantile(expected.numpy(), share), rel=1e-3)
    assert by_name["rms_dp"].value == pytest.approx(math.sqrt(by_name["rms_dp"].samples.mean()))


def test_standard_errors_of_root_mean_square_and_quantiles():
    """Against the spread over many drawings of windows whose tokens share a window's own level."""
    generator = np.random.default_rng(0)

    def draw(windows):
        level = generator.gamma(2, 1, (windows, 1))
        return level * generator.exponential(1, (windows, 50))

    def measured(values):
        kl = torch.tensor(values)
        return {m.name: m for m in fidelity(TokenFidelity(kl, (kl > 1).double(), kl / 100, kl), SPEC)}

    rows = [measured(draw(60)) for _ in range(300)]
    for name, tolerance in {"kl_mean": 0.15, "kl_median": 0.2, "kl_p90": 0.2, "rms_dp": 0.2}.items():
        spread = np.std([row[name].value for row in rows], ddof=1)
        told = np.mean([row[name].stderr for row in rows])
        assert told == pytest.approx(spread, rel=tolerance), name
    single = measured(draw(1))
    assert {m.stderr for m in single.values()} == {None}


def test_full_precision_is_computed_once(windows, tmp_path, model, monkeypatch):
    calls = []
    monkeypatch.setattr("qbench.evaluation.fidelity.last_hidden", lambda *args: calls.append(1) or last_hidden(*args))
    cache, four, three = TensorCache(tmp_path), quantized(tmp_path, 4, model=model), quantized(tmp_path, 3, model=model)
    first = window_fidelity(four, windows[:4], cache, 2)
    assert len(calls) == 2
    window_fidelity(three, windows, TensorCache(tmp_path), 2)
    assert len(calls) == 3  # the third pair is new
    again = window_fidelity(four, windows[:4], cache, 2)
    assert len(calls) == 3
    assert torch.equal(first.kl, again.kl)
    window_fidelity(four, windows[:4], cache, 4)  # other shapes may round otherwise
    assert len(calls) == 4
    window_fidelity(four, windows, TensorCache(tmp_path / "none", 0), 2)
    assert len(calls) == 7


def test_the_evaluation_from_its_options(tmp_path, model):
    (only,) = build(OPTIONS, "memory")
    assert isinstance(only, WindowFidelity)
    assert only.spec.protocol == "kl-48"
    subject = quantized(tmp_path, 3, model=model)
    only.preflight(subject.context)
    steps = []
    found = only.measure(subject, lambda done, total: steps.append((done, total)))
    assert steps[-1] == (4, 4)
    assert {m.spec_key for m in found} == {only.spec.key()}
    assert {m.n for m in found} == {4}
    names = [m.name for m in found]
    assert len(names) == len(set(names)) == 10
    same = build({**OPTIONS, "batch": 3, "cache_gb": 0}, "memory")[0]
    assert same.spec.key() == only.spec.key()
    other = [build({**OPTIONS, key: value}, "memory")[0] for key, value in {"n": 3, "length": 40}.items()]
    assert len({only.spec.key(), *(each.spec.key() for each in other)}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 1}, "eval.length=1"),
        ({"n": 0}, "eval.n=0"),
        ({"cache_gb": -1}, "eval.cache_gb=-1"),
        ({"cache_gb": True}, "eval.cache_gb="),
        ({"path": "missing.txt"}, "eval.path=missing.txt: no such file"),
        ({"corpora": []}, "eval.corpora"),
        ({"greedy": {"n": 1, "prompt": 49, "tokens": 8}}, "eval.greedy.prompt=49"),
        ({"greedy": {"n": 1, "prompt": 8, "tokens": 3}}, "eval.greedy.tokens=3"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(change, message):
    with pytest.raises((SpecError, AssetError)) as error:
        build({**OPTIONS, **change}, "memory")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_more_windows_than_the_text_has(tmp_path):
    (only,) = build({**OPTIONS, "n": 10**6}, "memory")
    with pytest.raises(SpecError, match=r"eval\.n=1000000"):
        only.preflight(full_precision(tmp_path).context)
    assert resolve_corpus("pydoc-heldout").name == only.spec.task


def test_windows_of_a_document_count_as_one(tmp_path, model):
    """Rows of a file are documents; a window belongs to that in which it begins."""
    text = resolve_corpus("pydoc-heldout").text()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text[at : at + 700]}) + "\n" for at in range(0, 2800, 700)))
    only, greedy = build({**OPTIONS, "path": str(path), "n": 8, "greedy": {"n": 8, "prompt": 8, "tokens": 4}}, "memory")
    subject = quantized(tmp_path, 3, model=model)
    by_name = {m.name: m for m in only.measure(subject, lambda done, total: None)}
    kl = by_name["kl_mean"]
    assert kl.clusters.tolist() == sorted(kl.clusters.tolist())
    assert 1 < len(set(kl.clusters.tolist())) < 8
    expected = estimates.mean(kl.samples, kl.clusters)
    assert (kl.value, kl.stderr) == pytest.approx((expected.value, expected.stderr))
    assert kl.stderr != pytest.approx(estimates.mean(kl.samples).stderr, rel=1e-3)
    for measured in (*by_name.values(), *greedy.measure(subject, lambda done, total: None)):
        assert (measured.clusters is None) == (measured.samples is None)
    offsets = subject.tokenizer(resolve_corpus(str(path)).text(), return_offsets_mapping=True)
    firsts = [offsets["offset_mapping"][48 * place][0] for place in range(8)]
    assert kl.clusters.tolist() == [first // 702 for first in firsts]
