"""Pipelines from plain options: what is legal, what is refused, and what ends up in a run's key."""

from dataclasses import FrozenInstanceError, dataclass, fields
from itertools import permutations
from typing import ClassVar

import pytest

from qbench.calibration.statistics import AbsMean, Hessian
from qbench.errors import SpecError
from qbench.formats import uniform
from qbench.spec import ModelSpec, RunSpec
from qbench.stages.base import Kind, Need, Outcome, Stage
from qbench.stages.pipeline import Pipeline, build_pipeline, stage_types

SCALE, CLIP, RTN, GPTQ = ({"stage": name} for name in ("awq_scale", "awq_clip", "rtn", "gptq"))
GROUPED = frozenset({uniform(bits=4, group_size=8, symmetric=False)})
PER_CHANNEL = frozenset({uniform(bits=4, group_size=-1, symmetric=False)})
STAGES = (
    "adadim, autoround, awq_clip, awq_scale, dgq, duquant, gptaq, gptq, hqq, magr, mse_clip, normtweaking, omniquant, "
    "osplus, percentile_clip, percentile_smooth, quarot, quip, rtn, smoothquant, spinquant, tesseraq"
)


def _key(nodes):
    model = ModelSpec(name="m", fingerprint="0", dtype="float32")
    return RunSpec(algo="x", model=model, pipeline=build_pipeline(nodes).specs()).key()


def test_every_stage_is_found_and_is_a_frozen_value_with_defaults():
    types = stage_types()
    assert {"rtn", "gptq", "awq_scale", "awq_clip"} <= types.keys()
    for name, kind in types.items():
        stage = kind()
        assert stage.name == name
        assert stage.version >= 1
        assert kind.options() == {f.name: getattr(stage, f.name) for f in fields(stage)}
        if name not in ("hqq", "quip", "dgq"):  # made for other formats
            for formats in (GROUPED, PER_CHANNEL):
                stage.check(formats)
        assert stage == kind()
        assert hash(stage) == hash(kind())
        for option in kind.options():
            with pytest.raises(FrozenInstanceError):
                setattr(stage, option, None)


@pytest.mark.parametrize("nodes", list(permutations([SCALE, CLIP, RTN])))
def test_stages_come_in_the_order_of_their_kinds(nodes):
    if list(nodes) == [SCALE, CLIP, RTN]:
        kinds = [stage.kind for stage in build_pipeline(nodes).stages]
        assert kinds == [Kind.TRANSFORM, Kind.RANGE, Kind.ROUND]
    else:
        with pytest.raises(SpecError, match="TRANSFORM < PROTECT < SPARSIFY < RANGE < ROUND"):
            build_pipeline(nodes)


@pytest.mark.parametrize("nodes", [[SCALE], [CLIP], [SCALE, CLIP], [RTN, GPTQ], [RTN, RTN]])
def test_exactly_one_stage_rounds(nodes):
    with pytest.raises(SpecError, match="exactly one stage that rounds"):
        build_pipeline(nodes)


def test_the_quantized_stream_goes_through_a_block_once():
    """A second stage that needs it would push it on a second time."""

    @dataclass(frozen=True, kw_only=True)
    class Protecting(Stage):
        name: ClassVar[str] = "protecting"
        kind: ClassVar[Kind] = Kind.PROTECT
        version: ClassVar[int] = 1
        needs: ClassVar[frozenset[Need]] = frozenset({Need(Hessian, "quantized")})

        def apply(self, view):
            return Outcome()

    Pipeline((Protecting(), *build_pipeline([RTN]).stages))
    with pytest.raises(SpecError, match=r"algo.pipeline=protecting\+gptq: one stage at most behind quantized"):
        Pipeline((Protecting(), *build_pipeline([GPTQ]).stages))


def test_the_empty_pipeline_is_the_baseline():
    empty = build_pipeline([])
    assert empty == Pipeline(())
    assert not empty.needs_data
    assert not empty.uses_random
    assert empty.scope_tokens == 0


def test_needs_are_those_of_the_stages():
    wanted = {
        (RTN["stage"],): (set(), set(), False),
        ("gptq",): (set(), {Hessian}, True),
        ("awq_scale", "awq_clip", "rtn"): ({AbsMean, Hessian}, set(), True),
        ("awq_clip", "gptq"): ({Hessian}, {Hessian}, True),
    }
    for names, (full, quantized, data) in wanted.items():
        pipeline = build_pipeline([{"stage": name} for name in names])
        assert pipeline.needs("full") == full
        assert pipeline.needs("quantized") == quantized
        assert pipeline.needs_data is data
    assert build_pipeline([SCALE | {"search_tokens": 77}, RTN]).scope_tokens == 77


def test_disabled_stages_are_left_out():
    assert build_pipeline([SCALE | {"enabled": False}, CLIP | {"enabled": True}, RTN]) == build_pipeline([CLIP, RTN])


REFUSED = [
    ({"stage": "smooth"}, STAGES),
    ({}, STAGES),
    ({"stage": "gptq", "dampp": 0.1}, "options of gptq: act_order, block_size, damp"),
    ({"stage": "gptq", "block_size": 1.5}, "must be an integer"),
    ({"stage": "gptq", "block_size": True}, "must be an integer"),
    ({"stage": "gptq", "block_size": "128"}, "must be an integer"),
    ({"stage": "gptq", "damp": "much"}, "must be a number"),
    ({"stage": "gptq", "damp": True}, "must be a number"),
    ({"stage": "gptq", "act_order": 1}, "must be true or false"),
    ({"stage": "gptq", "act_order": None}, "must be true or false"),
    ({"stage": "gptq", "scale_source": "fresh"}, "one of compensated, stale, original"),
    ({"stage": "awq_clip", "clip_range": True}, "one of symmetric, asymmetric"),
    ({"stage": "rtn", "enabled": "yes"}, "true or false"),
]


@pytest.mark.parametrize(("node", "accepted"), REFUSED)
def test_bad_options_are_refused_in_one_line_that_says_what_is_accepted(node, accepted):
    with pytest.raises(SpecError) as refused:
        build_pipeline([node])
    assert accepted in str(refused.value)
    assert "\n" not in str(refused.value)


VALUES = [
    ({"stage": "gptq", "damp": -0.1}, GROUPED),
    ({"stage": "gptq", "damp": float("nan")}, GROUPED),
    ({"stage": "gptq", "block_size": 0}, GROUPED),
    ({"stage": "gptq", "static_groups": True, "scale_source": "stale"}, GROUPED),
    ({"stage": "gptq", "static_groups": True}, PER_CHANNEL),
    ({"stage": "awq_scale", "n_grid": 0}, GROUPED),
    ({"stage": "awq_scale", "search_tokens": 0}, GROUPED),
    ({"stage": "awq_clip", "n_grid": 1}, GROUPED),
    ({"stage": "awq_clip", "max_shrink": 0.0}, GROUPED),
    ({"stage": "awq_clip", "max_shrink": 1.0}, GROUPED),
    ({"stage": "awq_clip", "max_shrink": 0.05}, GROUPED),
]


@pytest.mark.parametrize(("node", "formats"), VALUES)
def test_values_that_make_no_sense_are_refused_before_anything_heavy(node, formats):
    nodes = [node] if node["stage"] == "gptq" else [node, RTN]
    pipeline = build_pipeline(nodes)
    with pytest.raises(SpecError, match=r"^algo\.\w+="):
        pipeline.check(formats)


def test_a_whole_number_is_the_float_it_means_and_has_its_key():
    assert build_pipeline([GPTQ | {"damp": 1}]) == build_pipeline([GPTQ | {"damp": 1.0}])
    assert _key([GPTQ | {"damp": 1}]) == _key([GPTQ | {"damp": 1.0}])


def test_the_key_holds_every_option_whether_written_or_default():
    assert _key([GPTQ]) == _key([GPTQ | {"act_order": False, "damp": 0.01}])
    assert _key([{"damp": 0.01, "act_order": False, "stage": "gptq"}]) == _key([GPTQ])
    keys = {_key([GPTQ])}
    for option in ({"damp": 0.02}, {"act_order": True}, {"block_size": 64}, {"scale_source": "original"}):
        keys.add(_key([GPTQ | option]))
    assert len(keys) == 5
    for stage in build_pipeline([SCALE, CLIP, GPTQ]).specs():
        assert {name for name, _ in stage.options} == set(stage_types()[stage.name].options())


def test_a_stage_without_work_says_so():
    with pytest.raises(TypeError, match="apply"):
        Stage()
