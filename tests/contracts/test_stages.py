"""What holds for every stage, found by being there: a new one is tested here without being mentioned, as long as its
defaults work on integers in groups."""

import copy
import math
from collections.abc import Mapping
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from qbench.engine.loop import Recipe, Streams, quantize_block
from qbench.engine.passes import StructureCache, embed
from qbench.engine.source import MemorySource
from qbench.errors import NumericsError, QbenchError
from qbench.formats import SCALES, Block, QTensor, uniform
from qbench.formats.scheme import InputFormat, Scheme
from qbench.stages.base import Kind, Stage
from qbench.stages.pipeline import Pipeline, build_pipeline, stage_types
from qbench.structure.blocks import capture_calls
from tests.architectures import tiny_model, tokens

STAGES = {name: kind for name, kind in stage_types().items() if kind.kind != Kind.ROTATE}
ROUNDING = sorted(name for name, kind in STAGES.items() if kind.kind == Kind.ROUND)

#: Options that make a stage quick enough for a test.
QUICK: dict[str, dict[str, object]] = {
    "awq_scale": {"search_tokens": 32, "n_grid": 4},
    "magr": {"iterations": 5},
    "omniquant": {"epochs": 2},
    "autoround": {"iters": 4},
    "tesseraq": {"iterations": 3},
    "normtweaking": {"epochs": 1},
    "duquant": {"block_size": 8, "max_rotation_step": 4},
    "osplus": {"search_tokens": 32},
    "spinquant": {"steps": 4},
}
GROUPS = uniform(bits=3, group_size=8, symmetric=False)
INPUTS = InputFormat(format=uniform(bits=8, group_size=-1, symmetric=True))

#: Schemes of the stages that are made for another one than 3-bit integers in groups.
SCHEMES = {
    "hqq": Scheme(weight=replace(GROUPS, zero="float")),
    "quip": Scheme(weight=replace(GROUPS, zero="float", block=Block(0, 0))),
    "dgq": Scheme(weight=replace(uniform(4, 8, False), scale=SCALES["int8"]), input=INPUTS),
    "osplus": Scheme(weight=GROUPS, input=INPUTS),
    "omniquant": Scheme(weight=GROUPS, input=INPUTS),
}


def _pipeline(name: str) -> Pipeline:
    nodes = [{"stage": name, **QUICK.get(name, {})}]
    if STAGES[name].kind < Kind.ROUND:
        nodes.append({"stage": "rtn"})
    elif STAGES[name].kind > Kind.ROUND:
        nodes.insert(0, {"stage": "rtn"})
    return build_pipeline(nodes)


def _stage(name: str) -> Stage:
    return STAGES[name](**QUICK.get(name, {}))


class _Read(Mapping):
    """A mapping that says what was looked up."""

    def __init__(self, inner: Mapping, seen: set) -> None:
        self.inner, self.seen = inner, seen

    def __getitem__(self, key: object) -> object:
        found = self.inner[key]
        if isinstance(key, type):
            self.seen.add(key)
        return _Read(found, self.seen) if isinstance(found, Mapping) else found

    def __iter__(self):
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


def _same(a: object, b: object) -> bool:
    """Equal in every bit, through mappings, tuples, tensors and records."""
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, QTensor):
        return a.sha256() == b.sha256()
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b


def _outputs(view) -> dict[tuple[int, str], Tensor]:
    return {(index, call.module): call.output.clone() for index, calls in view.scopes.items() for call in calls}


class _Watched:
    """Runs a stage twice on copies of the generator wherever the engine applies it, and checks the contract."""

    def __init__(self, apply, name):
        self.original, self.name = apply, name
        self.used, self.calls = set(), 0

    def __call__(self, stage, view):
        self.calls += 1
        if stage.name != self.name:
            return self.original(stage, view)
        before = {path: p.detach().clone() for path, p in view.block.named_parameters()}
        statistics = {
            index: {kind: s.value().clone() for kind, s in found.items() if isinstance(s.value(), Tensor)}
            for index, found in view.statistics.items()
        }
        chunks = [c.clone() for c in (*view.data.inputs, *view.data.targets)] if view.data is not None else []
        outputs = _outputs(view)
        state = view.generator.get_state()
        watched = replace(view, statistics=_Read(view.statistics, self.used))
        first = self.original(stage, watched)
        view.generator.set_state(state)
        second = self.original(stage, watched)
        assert _same(first.codes, second.codes), "the same seed gave other codes"
        assert _same(first.parameters, second.parameters), "the same seed gave other parameters"
        assert _same(first.ranges, second.ranges), "the same seed gave other ranges"
        assert _same(first.input_scales, second.input_scales), "the same seed gave other scales"
        assert first.metrics == second.metrics, "the same seed gave other metrics"
        assert first.codes or first.ranges or first.parameters, "it did nothing"
        assert all(isinstance(value, float) and math.isfinite(value) for _, _, value in first.metrics)
        assert _same(outputs, _outputs(view)), "it changed a captured output"
        assert _same(before, {path: p.detach() for path, p in view.block.named_parameters()}), "it changed the block"
        assert all(
            torch.equal(value, view.statistics[index][kind].value())
            for index, found in statistics.items()
            for kind, value in found.items()
        ), "it changed a statistic"
        if view.data is not None:
            now = (*view.data.inputs, *view.data.targets)
            assert all(map(torch.equal, chunks, now)), "it changed the calibration data"
        if not stage.uses_random:
            assert torch.equal(state, view.generator.get_state()), "it drew random numbers without saying so"
        assert all(torch.isfinite(value).all() for value in first.parameters.values())
        assert all(torch.isfinite(codes.dequantize()).all() for codes in first.codes.values())
        return second


def _model(variant: str):
    overrides = {"intermediate_size": 8} if variant != "one row" else {"intermediate_size": 1}
    model, config = tiny_model("llama", **overrides)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path:
                parameter[3::7] *= 8
            if variant == "zero rows" and path.endswith("proj.weight"):
                parameter[::2] = 0
            if variant == "dead channels" and "layernorm" in path:
                parameter[::4] = 0
    return (model.bfloat16() if variant == "bfloat16" else model), config


@torch.no_grad()
def _run(name: str, variant: str, monkeypatch: pytest.MonkeyPatch):
    model, config = _model(variant)
    source, calibration = MemorySource(model), tokens(config, batch=6, length=16, seed=1)
    scheme = SCHEMES.get(name, Scheme(weight=GROUPS))
    if variant in ("one group", "one row") and scheme.weight.block.columns:
        scheme = replace(scheme, weight=replace(scheme.weight, block=Block(1, 0)))
    pipeline = _pipeline(name)
    pipeline.check(scheme.weights, scheme)
    recipe = Recipe(pipeline, scheme)
    hidden, calls = capture_calls(model, calibration[:2])
    structure = StructureCache().structure(source.block(0), calls[0], hidden, folds=pipeline.transforms)
    stream = embed(source, model, calibration, range(1, 7))  # whatever minibatches there are
    streams = Streams(
        full=stream.copy() if recipe.needs_full else None, quantized=stream.copy() if recipe.needs_quantized else None
    )
    watched = _Watched(STAGES[name].apply, name)
    monkeypatch.setattr(STAGES[name], "apply", lambda stage, view: watched(stage, view))
    finished = quantize_block(source.block(0), structure, 0, 1, recipe, streams)
    return finished, watched


VARIANTS = ("plain", "one group", "one row", "zero rows", "dead channels", "bfloat16")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_stage_keeps_the_contract(name, variant, monkeypatch):
    """It changes nothing that it was shown, repeats itself, needs what it uses, and copes with degenerate layers or
    says in one line why not."""
    if (name, variant) in REFUSED:
        with pytest.raises(QbenchError, match=REFUSED[name, variant]) as refusal:
            _run(name, variant, monkeypatch)
        assert len(str(refusal.value).splitlines()) == 1
        return
    finished, watched = _run(name, variant, monkeypatch)
    assert watched.calls
    assert all(torch.isfinite(codes.dequantize()).all() for codes in finished.codes.values())
    assert {need.statistic for need in _stage(name).needs} == watched.used
    for group in finished.structure.groups:
        for ref in group.weights:
            assert torch.isfinite(ref.read(finished.block)).all()


#: (stage, variant) -> what the refusal says.
REFUSED = {
    ("duquant", "one row"): "algo.block_size=8: a divisor of the 1 inputs",
}


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_stage_is_a_frozen_value_that_says_what_it_is(name):
    kind = STAGES[name]
    stage = _stage(name)
    assert stage == copy.deepcopy(stage)
    assert hash(stage) == hash(copy.deepcopy(stage))
    assert kind.__doc__
    assert kind.version >= 1
    assert kind.__module__.rpartition(".")[2].startswith(kind.kind.name.lower())


@pytest.mark.parametrize("name", sorted(name for name in STAGES if _stage(name).needs))
def test_inputs_that_are_not_finite_are_an_error_that_names_their_place(name, monkeypatch):
    for need in _stage(name).needs:
        value = need.statistic.value
        monkeypatch.setattr(need.statistic, "value", lambda self, value=value: value(self) * math.nan)
    with pytest.raises(NumericsError, match=r"^block 0, \S+\.weight: input of the layer is not finite$"):
        _run(name, "plain", monkeypatch)
