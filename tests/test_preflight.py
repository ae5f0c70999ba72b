"""What a model's shape does not allow is refused from its configuration, with what would fit."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qbench.errors import SpecError
from qbench.formats import Block, Int, TensorFormat, uniform
from qbench.formats.named import COMPOSITE
from qbench.formats.scheme import CacheFormat, InputFormat, Override, Scheme
from qbench.models.load import meta_model
from qbench.preflight import check_point, check_rotation, linear_shapes
from qbench.stages.pipeline import build_pipeline
from qbench.stages.rotate_quarot import QuaRot
from qbench.structure.blocks import find_blocks
from tests.architectures import BLOCKS, HIDDEN, VOCABULARY, tiny_model

CONTEXT = 64
INT4 = uniform(bits=4, group_size=8, symmetric=False)
SKIP = {"roles": ("weight", "input")}


def _check(scheme, name="llama", *, lengths=(8,), calibration=None, **options):
    model, _ = tiny_model(name, **options)
    _check_model(model, scheme, lengths, calibration)


RTN = [{"stage": "rtn"}]


def _check_model(model, scheme, lengths=(8,), calibration=None, pipeline=RTN):
    spec = SimpleNamespace(calibration=calibration and SimpleNamespace(length=calibration), scheme=scheme)
    evaluations = tuple(
        SimpleNamespace(spec=SimpleNamespace(length=length), length_option="eval.length") for length in lengths
    )
    point = SimpleNamespace(
        scheme=scheme,
        evaluations=evaluations,
        model=SimpleNamespace(name="tiny"),
        spec=spec,
        pipeline=build_pipeline(pipeline),
    )
    check_point(point, model)


def _group(size):
    return TensorFormat(element=Int(8, signed=True), block=Block(1, size))


def _cache(size):
    return CacheFormat(key=_group(size), value=_group(size))


FITS = {
    "full precision": None,
    "groups": Scheme(weight=INT4, input=InputFormat(format=_group(16)), cache=_cache(4)),
    "a rest where it is allowed": Scheme(weight=uniform(bits=4, group_size=20, symmetric=False, partial=True)),
    "inputs that are not quantized": Scheme(
        weight=INT4,
        input=InputFormat(format=_group(32)),
        overrides=(Override(modules="down_proj", **SKIP),),
    ),
    "first and last block": Scheme(weight=INT4, overrides=(Override(blocks=(-BLOCKS, BLOCKS - 1), **SKIP),)),
    "the head": Scheme(weight=INT4, overrides=(Override(modules="lm_head", roles=("weight",), weight=INT4),)),
}


@pytest.mark.parametrize("scheme", FITS.values(), ids=FITS)
def test_what_fits_is_let_through(scheme):
    _check(scheme, lengths=(8, CONTEXT), calibration=CONTEXT)


def test_the_sizes_that_fit_go_up_to_the_narrowest_layer():
    with pytest.raises(SpecError, match="every layer: 8, 16, 32, -1"):
        _check(Scheme(weight=_group(5)), intermediate_size=64)


def _override(**options):
    return Scheme(weight=INT4, overrides=(Override(**SKIP, **options),))


REFUSED = {
    "a group": (Scheme(weight=_group(32)), "group_size=32", "in_features 48 of model.layers.0.mlp.down_proj.weight"),
    "what would fit": (Scheme(weight=_group(5)), "group_size=5", "fit every layer: 8, 16, -1"),
    "rows of a tile": (
        Scheme(weight=TensorFormat(element=Int(8, signed=True), block=Block(5, 8))),
        "group_size=8",
        "q_proj",
    ),
    "a format by name": (Scheme(weight=COMPOSITE["mxfp4"]), "format=mxfp4", "blocks of 32 do not divide"),
    "inputs": (
        Scheme(weight=INT4, input=InputFormat(format=_group(32))),
        "act.group_size=32",
        "down_proj.weight; sizes that fit every layer: 8, 16",
    ),
    "inputs by name": (
        Scheme(weight=INT4, input=InputFormat(format=COMPOSITE["mxfp4"])),
        "act.format=mxfp4",
        "groups of 32",
    ),
    "the head's group": (
        Scheme(weight=INT4, overrides=(Override(modules="lm_head", roles=("weight",), weight=_group(5)),)),
        "group_size=5",
        "lm_head.weight",
    ),
    "a group of an override": (
        Scheme(weight=INT4, overrides=(Override(modules="up_proj", roles=("weight",), weight=_group(5)),)),
        "group_size=5",
        "up_proj",
    ),
    "a block too far": (_override(blocks=(BLOCKS,)), f"overrides.blocks={BLOCKS}", "-2 to 1"),
    "a block too far from the end": (_override(blocks=(-BLOCKS - 1,)), f"overrides.blocks={-BLOCKS - 1}", "-2 to 1"),
    "a pattern that matches nothing": (
        _override(modules="dwn_proj"),
        "overrides.modules=dwn_proj",
        "mlp.down_proj, lm_head",
    ),
    "the second of two patterns": (
        Scheme(weight=INT4, overrides=(Override(modules="up_proj", **SKIP), Override(modules="foo", **SKIP))),
        "overrides.modules=foo",
        "up_proj",
    ),
    "an entry like the scheme": (
        Scheme(weight=INT4, overrides=(Override(blocks=(0,), roles=("weight",), weight=INT4),)),
        "overrides=[0] (modules: all, blocks: [0])",
        "changes a format",
    ),
    "an entry that a later one undoes": (
        Scheme(
            weight=INT4,
            overrides=(
                Override(blocks=(0,), modules="up_proj", roles=("weight",), weight=_group(8)),
                Override(modules="mlp.*", roles=("weight",), weight=_group(16)),
            ),
        ),
        "overrides=[0] (modules: up_proj, blocks: [0])",
        "changes a format",
    ),
    "a head that is in full precision anyway": (
        _override(modules="lm_head"),
        "overrides=[0] (modules: lm_head, blocks: all)",
        "changes a format",
    ),
    "a residual that nothing leaves": (
        Scheme(weight=INT4, cache=replace(_cache(4), residual=8)),
        "kv.residual=8",
        "eval.length=8",
    ),
    "the head in a block": (_override(modules="lm_head", blocks=(0,)), "overrides.modules=lm_head", "nothing"),
    "heads of the cache": (Scheme(cache=_cache(5)), "kv.group_size=5", "head_dim=8"),
    "the cache of one block": (
        Scheme(weight=INT4, overrides=(Override(blocks=(-1,), roles=("cache",), cache=_cache(16)),)),
        "kv.group_size=16",
        "head_dim=8",
    ),
}


@pytest.mark.parametrize(("scheme", "given", "accepted"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(scheme, given, accepted):
    with pytest.raises(SpecError) as caught:
        _check(scheme)
    message = str(caught.value)
    assert message.startswith(f"{given}:")
    assert accepted in message
    assert "\n" not in message


@pytest.mark.parametrize("scheme", [None, Scheme(weight=INT4)])
def test_windows_are_at_most_the_context(scheme):
    with pytest.raises(SpecError, match=f"eval.length={CONTEXT + 1}: at most {CONTEXT}"):
        _check(scheme, lengths=(8, CONTEXT + 1))
    with pytest.raises(SpecError, match=f"calib.length={CONTEXT + 1}: at most {CONTEXT}"):
        _check(scheme, calibration=CONTEXT + 1)
    _check(scheme, "bloom", lengths=(4 * CONTEXT,), calibration=4 * CONTEXT)  # ALiBi


def test_a_head_s_width_is_the_configuration_s_own_where_it_has_one():
    _check(Scheme(cache=_cache(16)), "qwen3", head_dim=16)
    with pytest.raises(SpecError, match="head_dim=8"):
        _check(Scheme(cache=_cache(16)), "qwen3")


def test_a_pattern_that_matches_only_routers_matches_nothing():
    model, _ = tiny_model("mixtral")
    for modules in ("gate", "mlp.gate"):
        with pytest.raises(SpecError, match=r"overrides\.modules=.*matches nothing"):
            _check_model(model, _override(modules=modules))
    _check_model(model, _override(modules="experts.gate_up_proj"))


def test_a_cache_that_cannot_be_reached_is_refused():
    model, _ = tiny_model("llama")
    model.config._attn_implementation = "eager"
    _check_model(model, Scheme(weight=INT4))
    cache = Override(blocks=(0,), roles=("cache",), cache=_cache(4))
    for scheme in (Scheme(cache=_cache(4)), Scheme(weight=INT4, overrides=(cache,))):
        with pytest.raises(SpecError, match=r"kv_bits=.*scaled-dot-product"):
            _check_model(model, scheme)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "opt"])
def test_shapes_are_those_of_the_layers(name):
    """Against the layers themselves: every linear module, transposed or not, and stacked experts."""
    model, _ = tiny_model(name)
    found, blocks = linear_shapes(model)
    assert blocks == BLOCKS
    sizes = {shape.name: (shape.out_features, shape.in_features) for shape in found}
    assert len(sizes) == len(found)
    prefix, layers = find_blocks(model)
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                assert sizes[f"{prefix}.{index}.{path}.weight"] == (module.out_features, module.in_features)
            elif type(module).__name__ == "Conv1D":
                assert sizes[f"{prefix}.{index}.{path}.weight"] == (module.nf, module.nx)
    assert sizes["lm_head.weight"] == (VOCABULARY, HIDDEN)
    assert {shape.path for shape in found if shape.experts} == (
        {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} if name == "mixtral" else set()
    )
    if name == "mixtral":
        assert sizes[f"{prefix}.0.mlp.experts.gate_up_proj"] == (2 * 48, HIDDEN)
        assert sizes[f"{prefix}.0.mlp.experts.down_proj"] == (HIDDEN, 48)
    assert all(shape.block == int(shape.name.removeprefix(prefix + ".").split(".")[0]) for shape in found[:-1])
    assert found[-1].block is None


def test_an_override_of_experts_matches_them_by_name():
    with torch.device("meta"):
        _check(_override(modules="experts.down_proj"), "mixtral")
    with pytest.raises(SpecError, match=r"mlp\.experts"):
        _check(_override(modules="down_projection"), "mixtral")


def test_a_stage_that_cannot_serve_a_weight_is_refused():
    model, _ = tiny_model("llama")
    duquant = [{"stage": "duquant"}, *RTN]
    refusal = r"algo.block_size=128: a divisor of the 32 inputs of .*every layer: 2, 4, 8, 16$"
    with pytest.raises(SpecError, match=refusal):
        _check_model(model, Scheme(weight=_group(8)), pipeline=duquant)
    _check_model(model, Scheme(weight=_group(8)), pipeline=[{"stage": "duquant", "block_size": 16}, *RTN])
    adadim = [{"stage": "adadim"}]
    _check_model(model, Scheme(weight=_group(16)), pipeline=adadim)
    other, _ = tiny_model("llama", hidden_size=48)  # two key heads of 12 channels
    with pytest.raises(SpecError, match=r"group_size=16: with algo=adadim a divisor of the 24 outputs"):
        _check_model(other, Scheme(weight=_group(16)), pipeline=adadim)


def test_gptaq_of_experts_is_refused_before_anything_loads():
    model, _ = tiny_model("mixtral")
    refusal = r"^algo=gptaq: model\.layers\.0\.mlp\.experts\.gate_up_proj: gptaq compares both streams .* algo=gptq, or"
    with pytest.raises(SpecError, match=refusal) as refused:
        _check_model(model, Scheme(weight=_group(8)), pipeline=[{"stage": "gptaq"}])
    assert len(str(refused.value).splitlines()) == 1
    _check_model(model, _override(modules="experts"), pipeline=[{"stage": "gptaq"}])
    _check_model(model, Scheme(weight=_group(8)), pipeline=[{"stage": "gptq"}])


def test_options_of_a_composed_algorithm_go_by_their_part():
    model, _ = tiny_model("llama")
    pipeline = [{"stage": "duquant", "part": "duquant"}, {"stage": "rtn", "part": "rtn"}]
    with pytest.raises(SpecError, match=r"^algo\.duquant\.block_size=128: a divisor"):
        _check_model(model, Scheme(weight=_group(8)), pipeline=pipeline)


ROTATABLE = ["llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "gpt2", "gpt_neox", "phi", "falcon", "stablelm"]


@pytest.mark.parametrize("name", [*ROTATABLE, "starcoder2", "mixtral"])
def test_a_model_that_can_be_rotated_passes(name):
    _, config = tiny_model(name)
    check_rotation("quarot", QuaRot().rotation(0, cache=False), meta_model(config), name)


@pytest.mark.parametrize("name", ["bloom", "gemma2", "gemma3_text", "olmo2"])
def test_a_model_that_cannot_be_rotated_is_refused_before_it_loads(name):
    _, config = tiny_model(name)
    with pytest.raises(SpecError, match=f"^algo=quarot: a model that can be rotated; {name}: ") as refusal:
        check_rotation("quarot", QuaRot().rotation(0, cache=False), meta_model(config), name)
    assert len(str(refusal.value).splitlines()) == 1
    if name != "bloom":
        check_rotation("quarot", QuaRot(residual=False).rotation(0, cache=False), meta_model(config), name)
