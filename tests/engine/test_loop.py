"""One block under one recipe: the guard of transforms, refused weights, and what the metrics mean."""

import copy
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

from qbench.calibration.statistics import AbsMean, Hessian
from qbench.engine.loop import FUNCTION_TOLERANCE, Recipe, Streams, quantize_block
from qbench.engine.passes import StructureCache, embed, run_pass
from qbench.engine.probe import Probe, evenly_spaced
from qbench.engine.source import MemorySource
from qbench.errors import NumericsError
from qbench.formats import uniform
from qbench.formats.scheme import InputFormat
from qbench.stages.pipeline import Pipeline, build_pipeline
from qbench.stages.range_awq_clip import AwqClip
from qbench.stages.round_rtn import Rtn
from qbench.stages.transform_awq import AwqScale
from qbench.stages.transform_osplus import OsPlus
from qbench.structure.blocks import capture_calls, find_blocks
from tests.architectures import tiny_model, tokens
from tests.engine.helpers import InputsOf, recipe, structure_of


def _prepared(name="llama", dtype=torch.float32):
    """A source, its first block's structure with folds, and calibration streams."""
    model, config = tiny_model(name, dtype=dtype)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path or "ln_" in path:
                parameter[3::7] *= 8  # large channels: the search finds something to scale
    source, calibration = MemorySource(model), tokens(config, batch=6, length=16, seed=1)
    with torch.no_grad():
        hidden, calls = capture_calls(model, calibration[:2])
        structure = StructureCache().structure(source.block(0), calls[0], hidden, folds=True)
        stream = embed(source, model, calibration, {1, 2})
    return source, structure, stream, calibration


@torch.no_grad()
def _quantize(source, structure, stream, wanted):
    """The first block under a recipe whose search looks at two sequences."""
    streams = Streams(full=stream.copy(), quantized=stream.copy() if wanted.pipeline.needs("quantized") else None)
    block = source.block(0)
    return quantize_block(block, structure, 0, 1, wanted, streams), streams


AWQ = recipe("awq_scale", awq_scale={"search_tokens": 32})


def _without_consumer(fold):
    return replace(fold, consumers=fold.consumers[:-1])


def _without_producer(fold):
    return replace(fold, producer=())


def _shifted_channels(fold):
    return replace(fold, channels=fold.channels.roll(1))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("broken", [_without_consumer, _without_producer, _shifted_channels])
def test_the_guard_fires_for_every_way_to_break_a_fold(name, broken):
    source, structure, stream, _ = _prepared(name)
    _quantize(source, structure, stream, AWQ)  # whole folds pass
    for position, fold in enumerate(structure.folds):
        if len(fold.consumers) == 1 and broken is _without_consumer:
            continue
        if fold.grouped:
            continue  # not searched by default
        folds = (*structure.folds[:position], broken(fold), *structure.folds[position + 1 :])
        with pytest.raises(NumericsError, match=r"block 0: awq_scale changed the full-precision output by"):
            _quantize(source, replace(structure, folds=folds), stream, AWQ)


def test_the_recorded_function_error_is_measured_and_small():
    for dtype in (torch.float32, torch.bfloat16):
        source, structure, stream, _ = _prepared("llama", dtype)
        metrics = _quantize(source, structure, stream, AWQ)[0].metrics
        errors = [value for module, name, value in metrics if name == "awq_scale_function_error"]
        assert len(errors) == 1
        assert 0 < errors[0] <= FUNCTION_TOLERANCE[dtype]


@dataclass(frozen=True, kw_only=True)
class _Keeping(Rtn):
    """Rounds to nearest and keeps the block as the stages before left it, and the statistics that go with it."""

    kept: dict

    def apply(self, view):
        self.kept.setdefault("block", copy.deepcopy(view.block))
        for group in view.groups:
            self.kept[group.index] = {kind: s.value() for kind, s in view.statistics[group.index].items()}
        return super().apply(view)


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
@torch.no_grad()
def test_statistics_go_through_a_transform_with_the_weights(name):
    """After folding, they are what the transformed block's layers see."""
    source, structure, stream, _ = _prepared(name)
    (scale,) = (stage for stage in AWQ.pipeline.stages if stage.name == "awq_scale")
    kept = {}
    _quantize(source, structure, stream, Recipe(Pipeline((scale, _Keeping(kept=kept))), AWQ.scheme))
    block, scaled = kept["block"], 0
    for group in structure.groups:
        transformed, untouched = (_inputs(each, group, stream) for each in (block, source.block(0)))
        if len(transformed):
            hessian, mean = transformed.t() @ transformed / len(transformed), transformed.abs().mean(0)
            assert torch.allclose(kept[group.index][AbsMean], mean, rtol=1e-3, atol=1e-5 * mean.max().item())
            assert torch.allclose(kept[group.index][Hessian], hessian, rtol=1e-3, atol=1e-4 * hessian.max().item())
            scaled += not torch.allclose(transformed, untouched, rtol=1e-2)
    assert scaled > 1


def _inputs(block, group, stream):
    with InputsOf(block, group.weights[0]) as taken:
        for chunk in stream.chunks:
            stream.call(0, chunk)(block, chunk)
    return torch.cat([*taken.seen, torch.zeros(0, group.in_features)])


@torch.no_grad()
def test_function_error_is_the_largest_change_relative_to_the_largest_output():
    source, _, stream, _ = _prepared()
    block = source.block(0)
    probe = Probe.observe(block, 0, stream, [0, 5])
    assert probe.function_error(block) == 0
    block.mlp.down_proj.weight.mul_(1.5)
    whole = torch.cat([stream.call(0, chunk)(block, chunk) for chunk in stream.chunks])[[0, 5]]
    before = source.block(0)
    original = torch.cat([stream.call(0, chunk)(before, chunk) for chunk in stream.chunks])[[0, 5]]
    expected = ((whole - original).abs().max() / original.abs().max()).item()
    assert probe.function_error(block) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_scopes_are_the_calls_of_the_modules_around_the_weights():
    source, structure, stream, _ = _prepared()
    block = source.block(0)
    probe = Probe.observe(block, 0, stream, [1, 4])
    scopes = probe.scopes(block, structure)
    for group in structure.groups:
        assert tuple(call.module for call in scopes[group.index]) == group.scopes
        for call in scopes[group.index]:
            again = block.get_submodule(call.module)(*call.args, **call.kwargs)
            assert torch.equal(again[0] if isinstance(again, tuple) else again, call.output)
    assert all(not module._forward_hooks for module in block.modules())


@pytest.mark.parametrize(("count", "total"), [(1, 1), (1, 7), (3, 7), (7, 7), (9, 7), (0, 5), (2, 128)])
def test_evenly_spaced_indices(count, total):
    found = evenly_spaced(count, total)
    assert len(found) == max(1, min(count, total))
    assert len(set(found)) == len(found)
    assert found == sorted(found)
    assert set(found) <= set(range(total))
    gaps = [right - left for left, right in pairwise(found)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert abs(found[0] - (total - 1 - found[-1])) <= 1  # as far from the start as from the end


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq"])
def test_weights_that_are_not_finite_are_refused_by_name(value, algorithm):
    source, structure, stream, _ = _prepared()
    find_blocks(source.model)[1][0].mlp.up_proj.weight.data[3, 5] = value
    message = r"block 0, mlp\.up_proj\.weight: weights contain NaN or infinity"
    with pytest.raises(NumericsError, match=message) as refused:
        _quantize(source, structure, stream, recipe(algorithm))
    assert "\n" not in str(refused.value)


def test_inputs_that_are_not_finite_are_refused_by_gptq():
    source, structure, stream, _ = _prepared()
    stream.chunks[0] = stream.chunks[0].clone()
    stream.chunks[0][0, 0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"block 0, self_attn\.q_proj\.weight: input of the layer is not finite"):
        _quantize(source, structure, stream, recipe("gptq"))


def test_a_singular_hessian_names_block_weight_tokens_and_remedy():
    source, structure, stream, calibration = _prepared()
    stream.chunks = [stream.chunks[0][:1]]
    with torch.no_grad():
        stream.calls[1, 16] = capture_calls(source.model, calibration[:1])[1]
    message = r"block 0, self_attn\.q_proj\.weight \(16 tokens\): singular Hessian .* damp"
    with pytest.raises(NumericsError, match=message):
        _quantize(source, structure, stream, recipe("gptq", gptq={"damp": 0.0}))


@torch.no_grad()
def test_metrics_are_relative_errors_of_weights_and_of_outputs():
    """E‖Δx‖² / E‖Wx‖² over the inputs that the settled group saw, from a plain forward."""
    source, structure, stream, _ = _prepared()
    finished, _ = _quantize(source, structure, stream, recipe("gptq"))
    metrics = {(module, name): value for module, name, value in finished.metrics}
    group = structure.groups[0]  # nothing before it is quantized
    block = source.block(0)
    x = _inputs(block, group, stream)
    for ref in group.weights:
        weight, changed = ref.read(block), finished.codes[ref.name].dequantize()
        output = (x @ (changed - weight).t()).square().sum() / (x @ weight.t()).square().sum()
        assert metrics[ref.name, "output_error"] == pytest.approx(output.item(), rel=1e-3)
        error = (changed - weight).square().sum() / weight.square().sum()
        assert metrics[ref.name, "weight_error"] == pytest.approx(error.item(), rel=1e-3)
        assert torch.equal(ref.read(finished.block), changed)
    named = {ref.name for group in structure.groups for ref in group.weights}
    for name in ("weight_error", "output_error", "damp"):
        assert {module for module, metric in metrics if metric == name} == named


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq", "awq_gptq"])
@torch.no_grad()
def test_streams_leave_the_block_that_they_belong_to(algorithm):
    """The full-precision stream through the block as it was, the quantized one through the block as it is."""
    source, structure, stream, _ = _prepared()
    wanted = recipe(algorithm, awq_scale={"search_tokens": 32})
    original = copy.deepcopy(source.block(0).state_dict())
    finished, streams = _quantize(source, structure, stream, wanted)
    untouched = source.block(0)
    for chunk, full in zip(stream.chunks, streams.full.chunks, strict=True):
        assert torch.equal(full, stream.call(0, chunk)(untouched, chunk))
    if streams.quantized is not None:
        for chunk, quantized in zip(stream.chunks, streams.quantized.chunks, strict=True):
            assert torch.allclose(quantized, stream.call(0, chunk)(finished.block, chunk), atol=1e-6)
    assert all(torch.equal(value, original[path]) for path, value in untouched.state_dict().items())


def test_structures_are_discovered_once_per_shape():
    model, config = tiny_model("llama")
    other, wider = tiny_model("llama", seed=1), tiny_model("llama", intermediate_size=64)
    cache = StructureCache()
    with torch.no_grad():
        hidden, calls = capture_calls(model, tokens(config))
        first = cache.structure(find_blocks(model)[1][0], calls[0], hidden, folds=False)
        assert cache.structure(find_blocks(model)[1][1], calls[1], hidden, folds=False) is first
        assert cache.structure(find_blocks(other[0])[1][0], calls[0], hidden, folds=False) is first
        assert cache.structure(find_blocks(model)[1][0], calls[0], hidden, folds=True).folds
        assert cache.structure(find_blocks(wider[0])[1][0], calls[0], hidden, folds=False) is not first
    assert first.groups == structure_of(model, tokens(config)).groups


def _view_of(monkeypatch, stage_type):
    """What the engine shows the stage, and the block as it was then."""
    seen = []
    original = stage_type.apply

    def apply(stage, view):
        seen.append((replace(view, statistics=dict(view.statistics)), copy.deepcopy(view.block)))
        return original(stage, view)

    monkeypatch.setattr(stage_type, "apply", apply)
    return seen


def test_a_search_behind_a_transform_sees_modules_as_they_are_called_now(monkeypatch):
    source, structure, stream, _ = _prepared()
    seen = _view_of(monkeypatch, AwqScale)
    nodes = [{"stage": "smoothquant"}, {"stage": "awq_scale", "search_tokens": 32}, {"stage": "rtn"}]
    wanted = replace(recipe("rtn"), pipeline=build_pipeline(nodes))
    _quantize(source, structure, stream, wanted)
    ((view, block),) = seen
    before = source.block(0)
    for calls in view.scopes.values():
        for call in calls:
            module = block.get_submodule(call.module)
            with torch.no_grad():
                outputs = [m(*call.args, **call.kwargs) for m in (module, before.get_submodule(call.module))]
            now, then = (output[0] if isinstance(output, tuple) else output for output in outputs)
            assert torch.allclose(now, call.output, atol=1e-5)
            if call.module == "mlp":
                assert not torch.allclose(then, call.output, atol=1e-2)


def test_every_search_looks_at_as_many_tokens_as_it_asks_for(monkeypatch):
    source, _, _, calibration = _prepared()
    views = _view_of(monkeypatch, AwqScale), _view_of(monkeypatch, OsPlus), _view_of(monkeypatch, AwqClip)
    nodes = [{"stage": "awq_scale", "search_tokens": 96}, {"stage": "osplus", "search_tokens": 32, "n_grid": 2}]
    wanted = replace(recipe("rtn"), pipeline=build_pipeline([*nodes, {"stage": "awq_clip"}, {"stage": "rtn"}]))
    run_pass(source, wanted, calibration)
    searching, behind, clipping = (seen[0][0] for seen in views)
    for view, sequences in ((searching, 6), (behind, 2)):
        assert {call.output.shape[:-1].numel() for calls in view.scopes.values() for call in calls} == {sequences * 16}
    assert not clipping.scopes


def test_statistics_follow_a_shift(monkeypatch):
    """No statistic of x gives that of x - z: they are collected again."""
    source, structure, stream, _ = _prepared("opt")
    seen = _view_of(monkeypatch, AwqClip)
    nodes = [{"stage": "osplus", "search_tokens": 32}, {"stage": "awq_clip"}, {"stage": "rtn"}]
    wanted = replace(recipe("rtn"), pipeline=build_pipeline(nodes))
    _quantize(source, structure, stream, wanted)
    ((view, block),) = seen
    for group in structure.groups:
        with torch.no_grad():
            now, then = (_hessian(b, structure, stream, group) for b in (block, source.block(0)))
        found = view.statistics[group.index][Hessian].value()
        assert torch.allclose(found, now, rtol=1e-4, atol=1e-5 * now.abs().max())
        if group.index == 0:
            assert not torch.allclose(found, then, rtol=0.1)


def test_a_transform_is_proved_against_the_block_as_an_earlier_stage_meant_it():
    """MagR changes the function; that is not the fault of what comes after."""
    source, structure, stream, _ = _prepared()
    nodes = [{"stage": "magr", "alpha_group": 0.01}, {"stage": "omniquant", "epochs": 1}, {"stage": "rtn"}]
    inputs = InputFormat(format=uniform(bits=8, group_size=-1, symmetric=True))
    wanted = replace(recipe("rtn"), pipeline=build_pipeline(nodes))
    wanted = replace(wanted, scheme=replace(wanted.scheme, input=inputs))
    streams = Streams(full=stream.copy(), quantized=stream.copy())
    finished = quantize_block(source.block(0), structure, 0, 1, wanted, streams)
    (error,) = (value for _, name, value in finished.metrics if name == "omniquant_function_error")
    assert error <= FUNCTION_TOLERANCE[torch.float32]


def _hessian(block, structure, stream, group):
    inputs = InputsOf(block, group.weights[0])
    for chunk in stream.chunks:
        with inputs:
            stream.call(0, chunk)(block, chunk)
    x = torch.cat(inputs.seen)
    return x.T @ x / len(x)
