"""The key of a run: equal meanings have equal keys, everything that can change a number changes it, labels do not."""

import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.formats import uniform
from qbench.formats.scheme import CacheFormat, InputFormat, Override, Scheme
from qbench.spec import (
    CalibrationSpec,
    EvaluationSpec,
    ModelSpec,
    RunSpec,
    StageSpec,
    difference,
    digest,
)

INT4 = uniform(bits=4, group_size=64, symmetric=False)
SCHEME = Scheme(
    weight=INT4,
    input=InputFormat(format=uniform(bits=8, group_size=-1, symmetric=True)),
    cache=CacheFormat(key=INT4, value=INT4, residual=128),
)
CALIBRATION = CalibrationSpec(corpus="c4", fingerprint="f" * 64, sampler="random", n=32, length=512, seed=0)
AWQ = StageSpec(name="awq_scale", version=1, options=(("n_grid", 20), ("duo", False)))
GPTQ = StageSpec(name="gptq", version=1, options=(("damp", 0.01), ("act_order", False), ("source", "original")))
RUN = RunSpec(
    algo="awq_gptq",
    model=ModelSpec(name="tiny", fingerprint="a" * 64, dtype="float32"),
    pipeline=(AWQ, GPTQ),
    scheme=SCHEME,
    calibration=CALIBRATION,
    seed=3,
)
EVALUATION = EvaluationSpec(
    evaluator="perplexity", version=1, task="c4", fingerprint="b" * 64, length=512, n=None
)

# Names of assets and of pipelines; what they stand for is in the key by its content.
LABELS = {
    *((), ("algo",), ("model", "name"), ("calibration", "corpus"), ("scheme", "cache", "layout")),
    *(
        ("scheme", *role, label)  # `partial` says what is allowed, not what is computed
        for role in [("weight",), ("input", "format"), ("cache", "key"), ("cache", "value")]
        for label in ("name", "partial")
    ),
}


def _changed(value):
    """Other values of the same field, of the same type and of neighbouring ones."""
    if value is None:
        return [0, 1]
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int):
        return [value + 1, float(value)]
    if isinstance(value, float):
        return [math.nextafter(value, math.inf), 0]
    return [value + "x", ""]


def _leaves(spec, path=()):
    """(path, value) of every field of a spec that is not a spec itself."""
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, (*path, field.name))
        elif field.name not in ("pipeline", "options", "overrides"):
            yield (*path, field.name), value


def _with(spec, path, value):
    name, *rest = path
    return dataclasses.replace(spec, **{name: _with(getattr(spec, name), rest, value) if rest else value})


@pytest.mark.parametrize("path", [path for path, _ in _leaves(RUN)], ids=".".join)
def test_the_key_changes_with_every_field_but_the_labels(path):
    value = dict(_leaves(RUN))[path]
    for other in _changed(value):
        same = _with(RUN, path, other).key() == RUN.key()
        assert same == (path in LABELS), (path, other)


@pytest.mark.parametrize("path", [path for path, _ in _leaves(EVALUATION)], ids=".".join)
def test_the_key_of_an_evaluation_changes_with_every_field_but_the_task(path):
    for other in _changed(dict(_leaves(EVALUATION))[path]):
        assert (_with(EVALUATION, path, other).key() == EVALUATION.key()) == (path == ("task",))


@pytest.mark.parametrize("name", ["pipeline", "scheme", "calibration", "seed"])
def test_leaving_a_part_out_changes_the_key(name):
    empty = () if name == "pipeline" else None
    assert dataclasses.replace(RUN, **{name: empty}).key() != RUN.key()


def test_the_key_changes_with_overrides_and_their_order():
    first = Override(modules="down_proj", roles=("weight",), weight=uniform(bits=8, group_size=64, symmetric=False))
    second = Override(blocks=(0, -1), roles=("weight", "input"))
    schemes = [(), (first,), (second,), (first, second), (second, first), (dataclasses.replace(first, roles=()),)]
    schemes += [(dataclasses.replace(second, blocks=(0,)),), (dataclasses.replace(first, modules="up_proj"),)]
    keys = [dataclasses.replace(RUN, scheme=dataclasses.replace(SCHEME, overrides=o)).key() for o in schemes]
    assert len(set(keys)) == len(keys)


def test_the_key_changes_with_stages_their_order_versions_and_options():
    pipelines = [
        (AWQ, GPTQ),
        (GPTQ, AWQ),
        (GPTQ,),
        (AWQ,),
        (AWQ, AWQ, GPTQ),
        (dataclasses.replace(AWQ, name="other"), GPTQ),
        (dataclasses.replace(AWQ, version=2), GPTQ),
        (AWQ, dataclasses.replace(GPTQ, options=GPTQ.options[:2])),
        (AWQ, dataclasses.replace(GPTQ, options=(*GPTQ.options, ("damp2", 0.01)))),
    ]
    for option, value in GPTQ.options:
        for other in _changed(value):
            options = tuple((name, other if name == option else own) for name, own in GPTQ.options)
            pipelines.append((AWQ, dataclasses.replace(GPTQ, options=options)))
    keys = [dataclasses.replace(RUN, pipeline=pipeline).key() for pipeline in pipelines]
    assert len(set(keys)) == len(keys)


def test_values_of_different_types_are_different_options():
    values = [1, 1.0, True, "1", None, "None", "1.0", "true", 0, 0.0, False, ""]
    keys = []
    for value in values:
        stage = dataclasses.replace(GPTQ, options=(("x", value),))
        keys.append(dataclasses.replace(RUN, pipeline=(stage,)).key())
    assert len(set(keys)) == len(values)


def test_specs_of_different_kinds_with_equal_fields_are_told_apart():
    """A type tag on every record: without it two records with the same field names would be one."""
    tags = {node["type"] for node in _nodes(RUN.canonical()) if "type" in node}
    assert tags == {
        *("RunSpec", "ModelSpec", "StageSpec", "CalibrationSpec", "Scheme", "InputFormat", "CacheFormat"),
        *("TensorFormat", "Int", "Block", "FloatScale", "RangeFit"),
    }


def _nodes(value):
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _nodes(item)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
stages = st.builds(
    StageSpec,
    name=st.sampled_from(["rtn", "gptq", "awq_scale"]),
    version=st.integers(1, 3),
    options=st.lists(st.tuples(st.sampled_from("abc"), scalars), max_size=2).map(tuple),
)
pipelines = st.lists(stages, max_size=3).map(tuple)


def _typed(value):
    """A value with the types of all its scalars, in which 1, 1.0 and True differ and 0.0 and -0.0 do not."""
    if isinstance(value, dict):
        return {name: _typed(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_typed(item) for item in value]
    return type(value).__name__, value


@settings(max_examples=300, deadline=None)
@given(pipelines, pipelines)
def test_equal_pipelines_have_equal_keys_and_others_do_not(left, right):
    one, other = (dataclasses.replace(RUN, pipeline=pipeline) for pipeline in (left, right))
    same = _typed(dataclasses.asdict(one)) == _typed(dataclasses.asdict(other))
    assert (one.key() == other.key()) == same
    copied = tuple(dataclasses.replace(stage) for stage in left)
    assert dataclasses.replace(RUN, pipeline=copied).key() == one.key()


def test_zero_has_one_key():
    both = [dataclasses.replace(GPTQ, options=(("damp", zero),)) for zero in (0.0, -0.0)]
    assert both[0] == both[1]  # equal values …
    assert len({dataclasses.replace(RUN, pipeline=(stage,)).key() for stage in both}) == 1  # … are one run


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=4), scalars.filter(lambda x: x not in (math.inf, -math.inf)), min_size=2))
def test_a_digest_ignores_the_order_of_a_mapping(mapping):
    backwards = dict(reversed(list(mapping.items())))
    assert digest(mapping) == digest(backwards)


def test_a_digest_refuses_nan():
    with pytest.raises(ValueError, match="Out of range float"):
        digest({"x": math.nan})


def test_the_key_is_a_sha256_and_the_description_is_plain_json():
    assert len(bytes.fromhex(RUN.key())) == 32
    described = json.loads(json.dumps(RUN.describe()))
    assert described["algo"] == "awq_gptq"
    assert described["model"]["name"] == "tiny"
    assert described["calibration"]["corpus"] == "c4"
    assert described["pipeline"][1]["options"] == {"damp": 0.01, "act_order": False, "source": "original"}


def test_keys_of_runs_from_before_an_option_stay_as_they_were():
    """Pinned: rows of existing databases are found by these. What is off by default is neither in keys nor in rows."""
    assert RUN.key() == "73d012cc203bd08f0162707bbe23d44ada0ac7f8986122e2244c7c19f39b223d"
    assert RUN.family() == "12f4499e8db985d6047d136084876593289a57b8ef6e6a15f303d471f02a0950"
    assert RUN.describe()["calibration"].keys() == {"corpus", "fingerprint", "sampler", "n", "length", "seed"}
    shuffled = dataclasses.replace(RUN, calibration=dataclasses.replace(CALIBRATION, shuffle="words"))
    assert shuffled.describe()["calibration"]["shuffle"] == "words"
    assert shuffled.calibration.label == "c4, words shuffled"
    assert CALIBRATION.label == "c4"


def test_labels_name_the_weight_format_and_the_protocol():
    expected = {(64, False): "int4_g64_asym", (-1, True): "int4_channel_sym", (0, False): "int4_tensor_asym"}
    for (group_size, symmetric), label in expected.items():
        assert uniform(bits=4, group_size=group_size, symmetric=symmetric).label == label
    assert SCHEME.label == "int4_g64_asym+act-int8_token+kv-int4_token_g64_r128"
    assert Scheme(overrides=(Override(blocks=(0,)),)).label == "float+mixed"
    assert EVALUATION.protocol == "window-512"


def test_the_difference_of_two_runs_is_the_changed_paths():
    three = dataclasses.replace(SCHEME, weight=uniform(bits=3, group_size=64, symmetric=False))
    other = dataclasses.replace(RUN, algo="gptq", scheme=three, calibration=None)
    found = {path: (left, right) for path, left, right in difference(RUN.describe(), other.describe())}
    assert found.keys() == {"algo", "scheme.weight.element.bits", "calibration"}
    assert found["scheme.weight.element.bits"] == (4, 3)
    assert list(difference(RUN.describe(), RUN.describe())) == []
    for one, two in itertools.permutations([RUN.describe(), other.describe()]):
        assert len(list(difference(one, two))) == 3
