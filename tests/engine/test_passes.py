"""The pass over a model: against naive whole-model implementations, on every architecture."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch

import qbench.engine.passes
from qbench.calibration.statistics import AbsMean, Hessian
from qbench.engine.loop import FUNCTION_TOLERANCE, Recipe
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource
from qbench.engine.streams import chunked
from qbench.formats import quantize, uniform
from qbench.formats.scheme import Scheme
from qbench.stages.base import Need
from qbench.stages.gptq_core import gptq
from qbench.stages.pipeline import Pipeline
from qbench.stages.round_rtn import Rtn
from qbench.structure.blocks import capture_calls, find_blocks
from tests.architectures import ARCHITECTURES, tiny_model, tokens
from tests.engine.helpers import ALGORITHMS, InputsOf, comparable, decoded, recipe, structure_of


def _model(name, batch=6, length=12, **options):
    model, config = tiny_model(name, **options)
    return model, tokens(config, batch=batch, length=length, seed=1)


def _run(model, wanted, calibration, **options):
    return run_pass(MemorySource(model), wanted, calibration, **options)


@pytest.fixture
def chunks(monkeypatch):
    """Sets how many tokens a chunk has."""
    return lambda n: monkeypatch.setattr(qbench.engine.passes, "chunked", partial(chunked, tokens=n))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rounding_to_nearest_rounds_every_linear_weight_and_nothing_else(name):
    model, _ = _model(name)
    before = copy.deepcopy(model.state_dict())
    result = _run(model, recipe("rtn", group_size=8), None)
    prefix, blocks = find_blocks(model)
    expected, count = dict(before), 0
    for index, block in enumerate(blocks):
        structure = structure_of(model, torch.arange(8)[None], index)
        for ref in (ref for group in structure.groups for ref in group.weights):
            name_in_model = f"{prefix}.{index}.{ref.parameter}"
            fmt = uniform(bits=3, group_size=8, symmetric=False)
            if expected[name_in_model] is before[name_in_model]:
                expected[name_in_model] = before[name_in_model].clone()
            rounded = quantize(ref.read(block).contiguous(), fmt).dequantize()
            ref.of(expected[name_in_model]).copy_(rounded)
            count += rounded.numel()
    for path, value in decoded(model, result.weights).items():
        assert torch.equal(value, expected[path]), path
    assert all(torch.equal(value, before[path]) for path, value in model.state_dict().items())
    assert result.ledger.weight_count == count
    assert result.ledger.weight_bits == count * 3 + count // 8 * (16 + 3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "falcon", "gemma2", "mixtral"])
@pytest.mark.parametrize("group_size", [8, 0])
@torch.no_grad()
def test_gptq_is_true_sequential_over_groups_and_blocks(name, group_size, chunks):
    """Every weight is GPTQ of its input in a whole forward behind everything that was quantized before it."""
    model, calibration = _model(name, batch=10)
    chunks(36)
    found = _run(model, recipe("gptq", group_size=group_size), calibration).weights.tensors
    fmt = uniform(bits=3, group_size=group_size, symmetric=False)
    naive = copy.deepcopy(model)
    capture_calls(naive, calibration[:1])  # experts one by one, as the engine has them
    prefix, blocks = find_blocks(naive)
    for index, block in enumerate(blocks):
        for group in structure_of(naive, calibration[:1], index).groups:
            with InputsOf(block, group.weights[0]) as taken:
                naive(calibration)
            x = torch.cat([*taken.seen, torch.zeros(0, group.in_features)]).double()
            hessian = (x.t() @ x / max(len(x), 1)).float()
            for ref in group.weights:
                expected = gptq(ref.read(block), hessian, fmt).weight.dequantize()
                own = ref.of(found[f"{prefix}.{index}.{ref.parameter}"])
                same = torch.isclose(own, expected, rtol=1e-4, atol=1e-6)
                assert same.float().mean() > 0.95, ref.name  # a tie decided by the order of a sum spoils its row
                ref.write(block, own)  # and must not spoil what comes later


@dataclass(frozen=True, kw_only=True)
class _Full(Rtn):
    """Rounds to nearest and keeps what it was shown of the untouched model's stream."""

    needs: ClassVar = frozenset({Need(Hessian, "full"), Need(AbsMean, "full")})
    seen: list

    def apply(self, view):
        for group in view.groups:
            self.seen.append({kind: s.value() for kind, s in view.statistics[group.index].items()})
        return super().apply(view)


@dataclass(frozen=True, kw_only=True)
class _Quantized(_Full):
    """The same behind the already quantized blocks and groups."""

    needs: ClassVar = frozenset({Need(Hessian, "quantized"), Need(AbsMean, "quantized")})


def _statistics(kind, model, calibration):
    stage = kind(seen=[])
    fmt = uniform(bits=3, group_size=8, symmetric=False)
    result = _run(model, Recipe(Pipeline((stage,)), Scheme(weight=fmt)), calibration)
    return stage.seen, result


@torch.no_grad()
def _inputs_in(model, calibration, shown):
    """Inputs of every group of every block in one whole forward, where `shown(model, block, group)` prepared it."""
    inputs = []
    for index, block in enumerate(find_blocks(model)[1]):
        for group in structure_of(model, calibration[:1], index).groups:
            with InputsOf(block, group.weights[0]) as taken:
                model(calibration)
            inputs.append(torch.cat(taken.seen))
            shown(block, group)
    return inputs


def _close(found, expected):
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("size", [12, 30, 10_000])
def test_statistics_are_those_of_whole_forwards_in_every_chunking(name, size, chunks):
    model, calibration = _model(name, batch=5)
    chunks(size)
    fmt = uniform(bits=3, group_size=8, symmetric=False)

    def leave(block, group):
        pass

    def rounded(block, group):
        for ref in group.weights:
            ref.write(block, quantize(ref.read(block), fmt).dequantize())

    for kind, shown in ((_Full, leave), (_Quantized, rounded)):
        seen, _ = _statistics(kind, model, calibration)
        inputs = _inputs_in(copy.deepcopy(model), calibration, shown)
        assert len(seen) == len(inputs)
        for statistics, x in zip(seen, inputs, strict=True):
            assert _close(statistics[Hessian], x.t() @ x / len(x))
            assert _close(statistics[AbsMean], x.abs().mean(0))


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_chunking_changes_codes_by_ties_only(algorithm, chunks):
    """Ties spoil what comes after them, so the first group is compared by values and the rest by its errors."""
    model, calibration = _model("llama", batch=8)
    results = []
    for size in (12, 50, 10_000):
        chunks(size)
        results.append(_run(model, recipe(algorithm), calibration))
    first = "model.layers.0.self_attn.q_proj.weight"
    errors = [{m[:3]: m[3] for m in result.ledger.metrics if m[2] == "weight_error"} for result in results]
    for other, of_other in zip(results[1:], errors[1:], strict=True):
        same = torch.isclose(other.weights.tensors[first], results[0].weights.tensors[first], rtol=1e-4, atol=1e-6)
        assert same.float().mean() > 0.97
        assert of_other == pytest.approx(errors[0], rel=0.2)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_runs_on_every_architecture(name, algorithm):
    model, calibration = _model(name, batch=8, length=16)
    result = _run(model, recipe(algorithm, bits=4), calibration)
    _, blocks = find_blocks(model)
    for index in range(len(blocks)):
        structure = structure_of(model, calibration[:1], index)
        named = {ref.name for group in structure.groups for ref in group.weights}
        assert {digest.split()[1] for digest in result.ledger.digests if digest.split()[0] == str(index)} == named
    guarded = [value for _, _, metric, value in result.ledger.metrics if metric == "awq_scale_function_error"]
    assert len(guarded) == (len(blocks) if "awq_scale" in ALGORITHMS[algorithm] else 0)
    assert all(value <= FUNCTION_TOLERANCE[torch.float32] for value in guarded)
    with torch.no_grad(), result.weights.inside(model):
        logits = model(calibration).logits
    assert torch.isfinite(logits).all()
    with torch.no_grad():
        full = model(calibration).logits
    assert 0 < (logits - full).abs().max() < full.abs().max()


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_same_run_twice_is_the_same_to_the_last_bit(algorithm, name):
    first, second = (
        _run(*(model, recipe(algorithm), calibration)) for model, calibration in (_model(name), _model(name))
    )
    assert comparable(first.ledger) == comparable(second.ledger)
    for path, value in first.weights.tensors.items():
        assert torch.equal(value, second.weights.tensors[path])


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
def test_a_pass_without_a_recipe_is_the_loaded_model(name):
    model, windows = _model(name)
    before = copy.deepcopy(model.state_dict())
    result = _run(model, None, None, evaluations=(windows,))
    assert result.weights.tensors == {}
    assert result.ledger.digests == result.ledger.metrics == []
    assert all(torch.equal(value, before[path]) for path, value in model.state_dict().items())
    captured = []
    last = find_blocks(model)[1][-1]
    handle = last.register_forward_hook(lambda *call: captured.append(call[2]))
    with torch.no_grad():
        model(windows)
    handle.remove()
    expected = captured[0][0] if isinstance(captured[0], tuple) else captured[0]
    assert torch.equal(torch.cat(result.evaluations[0].chunks), expected)


def test_evaluation_streams_follow_behind_the_quantized_blocks():
    model, calibration = _model("llama")
    _, windows = _model("llama", batch=3, length=10)
    result = _run(model, recipe("gptq"), calibration, evaluations=(windows, calibration))
    with result.weights.inside(model):
        expected = _run(model, None, None, evaluations=(windows, calibration))
    for found, wanted in zip(result.evaluations, expected.evaluations, strict=True):
        assert torch.allclose(torch.cat(found.chunks), torch.cat(wanted.chunks), atol=1e-5)


def test_progress_and_receivers_see_every_block_in_order_and_weights_are_kept_on_request():
    model, calibration = _model("llama")
    steps, received = [], []
    result = _run(
        model,
        recipe("rtn"),
        calibration,
        keep_weights=False,
        receive=lambda finished: received.append((finished.index, sorted(finished.codes))),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(1, 2), (2, 2)]
    assert [index for index, _ in received] == [0, 1]
    assert all(len(codes) == 7 for _, codes in received)
    assert result.weights.tensors == {}
    assert len(result.ledger.digests) == 14


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_weights_before_rounding_are_kept_when_asked_and_change_nothing(name):
    model, windows = _model(name)
    plain = _run(model, recipe("awq"), windows)
    kept = _run(model, recipe("awq"), windows, keep_unrounded=True)
    assert plain.unrounded is None
    assert comparable(kept.ledger) == comparable(plain.ledger)
    expected = model(windows).logits
    with kept.unrounded.inside(model):  # transformed: other weights, the same function
        assert torch.allclose(model(windows).logits, expected, rtol=1e-3, atol=1e-4)
    with kept.weights.inside(model):
        assert not torch.allclose(model(windows).logits, expected, rtol=1e-2, atol=1e-2)
    untouched = _run(model, recipe("rtn"), None, keep_unrounded=True).unrounded
    assert untouched.tensors.keys() == kept.weights.tensors.keys()
    assert all(torch.equal(value, model.get_parameter(path)) for path, value in untouched.tensors.items())
