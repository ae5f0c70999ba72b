"""Every option of formats and schemes changes something or is refused, in one line that names it."""

import copy
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from qbench.errors import SpecError
from qbench.formats import Block, quantize
from qbench.scheme import build_scheme
from qbench.scheme_weights import nominal_bits

CONF = Path(__file__).parents[1] / "conf"
DEFAULTS = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
SCHEMES = sorted(path.stem for path in (CONF / "scheme").glob("*.yaml"))
PROMISED = (
    "w4a16_g128 w4a16_g64 w3a16_g64 w2a16_g64 w8a8 w8a8_static w6a6 w4a4 w4a8 fp8 mxfp8 mxfp4 nvfp4 nf4 kv8 kv4 kv2"
)


def _values(*overrides, scheme="default"):
    """The configuration with a scheme file and dotted overrides, as Hydra composes them."""
    values = OmegaConf.merge(DEFAULTS, OmegaConf.load(CONF / "scheme" / f"{scheme}.yaml"))
    values = OmegaConf.merge(values, OmegaConf.from_dotlist([option.replace(":", ": ") for option in overrides]))
    return OmegaConf.to_container(values)


def _build(*overrides, scheme="default"):
    return build_scheme(_values(*overrides, scheme=scheme))


def test_every_promised_scheme_exists_and_builds():
    assert set(PROMISED.split()) <= set(SCHEMES)
    labels = {name: _build(scheme=name).label for name in SCHEMES}
    assert labels["default"] == labels["w4a16_g64"] == "int4_g64_asym"
    assert labels["w8a8_static"] == "int8_channel_sym+act-int8_tensor_static"
    assert labels["w4a8"] == "int4_g64_asym_int8+act-int8_token"
    assert labels["fp8"] == "e4m3_channel+act-e4m3_token"
    assert labels["nvfp4"] == "nvfp4+act-nvfp4"
    assert labels["kv2"] == "float+kv-int2_kivi_g32_r128"
    del labels["default"]
    assert len(set(labels.values())) == len(labels)


def test_schemes_are_what_their_names_say():
    for name in SCHEMES:
        scheme = _build(scheme=name)
        if name.startswith("kv"):
            assert (scheme.weight, scheme.input) == (None, None)
            assert scheme.cache.bits == int(name[2:])
            assert (scheme.cache.key.block.columns, scheme.cache.value.block.rows) == (1, 1)
            assert scheme.cache.residual % scheme.cache.key.block.rows == 0
        else:
            assert scheme.cache is None
        weight_only = name == "default" or "a16" in name or name == "nf4" or name.startswith("kv")
        assert (scheme.input is None) == weight_only
        assert scheme.needs_data == (name in ("w8a8_static", "nvfp4"))


def _sample(rows=48, columns=128):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 30  # an outlier channel
    x[5] += 4
    return x


def _effects(scheme):
    """What a scheme does, as numbers: decoded weights and bits, the formats of inputs and cache."""
    weight = None
    if scheme.weight is not None:
        found = quantize(_sample(), scheme.weight)
        weight = (found.dequantize().sum(dtype=torch.float64).item(), found.storage_bits())
    return weight, scheme.input, scheme.cache, scheme.overrides


# A setting and options on top of it, each of which must change what the scheme does.
KNOBS = [
    ([], ["bits=3", "bits=1.58", "group_size=32", "symmetric=true", "zero_point=float", "scale_dtype=bfloat16"]),
    ([], ["scale_dtype=float32", "scale_dtype=e8m0", "scale_dtype=e8m0ceil", "scale_dtype=e4m3", "scale_dtype=int8"]),
    ([], ["scale_dtype=dq8", "tile=[16,16]", "range.method=mse", "range.method=percentile", "format=nf4", "format=fp"]),
    ([], ["format=e3m0", "format=none", "act_bits=8", "kv_bits=4", "act.format=e4m3", "kv.format=e4m3"]),
    (["symmetric=true"], ["reach=narrow", "reach=full"]),
    (["range.method=mse", "bits=2"], ["range.norm=1", "range.grid=7", "range.max_shrink=0.3"]),
    (["range.method=percentile"], ["range.percentile=90"]),
    (["bits=1.58"], ["range.method=minmax", "range.method=mse", "group_size=32"]),
    (["format=nvfp4"], ["range.method=mse"]),
    (["act_bits=8"], ["act_bits=6", "act.symmetric=false", "act.mode=static", "act.clip=0.9", "act.granularity=group"]),
    (["act_bits=8"], ["act.format=e5m2"]),
    (["act_bits=8", "act.granularity=group"], ["act.group_size=32"]),
    (["act_bits=8", "act.mode=static"], ["act.granularity=channel", "act.calibration=moving"]),
    (["act_bits=8", "act.mode=static"], ["act.calibration=histogram", "act.symmetric=false"]),
    (["kv_bits=4"], ["kv_bits=2", "kv.layout=token", "kv.group_size=16", "kv.residual=64", "kv.symmetric=true"]),
    (["kv_bits=4"], ["kv.mode=static"]),
    (["kv_bits=4", "kv.layout=token"], ["kv.group_size=32", "kv.residual=3", "kv.symmetric=true"]),
    (["kv_bits=4", "kv.mode=static"], ["kv.layout=head", "kv.layout=channel", "kv.residual=8"]),
    (["kv_bits=8"], ["kv.format=e4m3"]),
]


@pytest.mark.parametrize(
    ("base", "option"), [(" ".join(base), option) for base, options in KNOBS for option in options]
)
def test_every_option_changes_something(base, option):
    base = base.split()
    assert _effects(_build(*base, option)) != _effects(_build(*base))


REFUSED = [
    (["format=foo"], "format=foo", "mxfp4"),
    (["format=e9m9"], "format=e9m9", "e4m3"),
    (["format=e0m3"], "format=e0m3", "e4m3"),
    (["format=nvfp4", "group_size=32"], "group_size=32", "nvfp4"),
    (["format=mxfp4", "bits=4"], "bits=4", "mxfp4"),
    (["format=mxfp4", "symmetric=false"], "symmetric=false", "mxfp4"),
    (["format=nvfp4", "scale_dtype=float16"], "scale_dtype=float16", "nvfp4"),
    (["format=e4m3", "symmetric=false"], "symmetric=false", "true"),
    (["format=e4m3", "zero_point=int"], "zero_point=int", "format=int"),
    (["format=e4m3", "reach=full"], "reach=full", "format=int"),
    (["format=e4m3", "bits=4"], "bits=4", "8"),
    (["format=fp", "bits=5"], "bits=5", "8, 6, 4"),
    (["bits=16", "group_size=64"], "group_size=64", "bits=16"),
    (["format=none", "bits=4"], "bits=4", "format=none"),
    (["format=none", "range.method=mse"], "range.method=mse", "format=none"),
    (["bits=1.5"], "bits=1.5", "2 to 8"),
    (["bits=1.58", "zero_point=int"], "zero_point=int", "format=int"),
    (["bits=1.58", "symmetric=false"], "symmetric=false", "zero point"),
    (["symmetric=true", "zero_point=float"], "zero_point=float", "symmetric"),
    (["symmetric=true", "zero_point=int"], "zero_point=int", "symmetric"),
    (["symmetric=false", "zero_point=none"], "zero_point=none", "int or float"),
    (["symmetric=false", "reach=full"], "reach=full", "symmetric=true"),
    (["symmetric=true", "reach=full", "scale_dtype=e8m0"], "reach=full", "sign"),
    (["symmetric=true", "reach=full", "scale_dtype=e8m0ceil"], "reach=full", "sign"),
    (["symmetric=true", "reach=full", "scale_dtype=e4m3"], "reach=full", "sign"),
    (["symmetric=true", "reach=full", "scale_dtype=dq8"], "reach=full", "sign"),
    (["reach=far"], "reach=far", "midpoint"),
    (["scale_dtype=int8", "symmetric=true"], "scale_dtype=int8", "asymmetric"),
    (["scale_dtype=int8", "group_size=-1"], "scale_dtype=int8", "groups"),
    (["scale_dtype=e4m3", "group_size=0"], "scale_dtype=e4m3", "group_size"),
    (["scale_dtype=dq8", "group_size=0"], "scale_dtype=dq8", "group_size"),
    (["scale_dtype=int8", "tile=[2,64]"], "scale_dtype=int8", "groups"),
    (["group_size=true"], "group_size=true", "integer"),
    (["tile=[16,16]", "group_size=64"], "tile=[16,16]", "group_size"),
    (["tile=[16]"], "tile=[16]", "[128,128]"),
    (["tile=[0,16]"], "tile=[0,16]", "[128,128]"),
    (["format=mxfp4", "range.method=mse"], "range.method=mse", "standard"),
    (["range.method=best"], "range.method=best", "mse"),
    (["range.method=absmean"], "range.method=absmean", "ternary"),
    (["range.norm=2"], "range.norm=2", "minmax"),
    (["range.method=mse", "range.percentile=99"], "range.percentile=99", "mse"),
    (["range.method=mse", "range.max_shrink=2"], "range.max_shrink=2", "at most 1"),
    (["range.method=mse", "range.grid=1.5"], "range.grid=1.5", "number"),
    (["range.method=percentile", "range.percentile=101"], "range.percentile=101", "at most 100"),
    (["range.method=percentile", "range.percentile=50"], "range.percentile=50", "above 50"),
    (["range.method=mse", "range.max_shrink=0"], "range.max_shrink=0", "above 0"),
    (["bits=1.58", "range.norm=2"], "range.norm=2", "absmean"),
    (["range.method=mse", "zero_point=float"], "range.method=mse", "zero_point=float"),
    (["act_bits=1"], "act_bits=1", "2 to 8"),
    (["act.mode=static"], "act.mode=static", "act_bits"),
    (["act_bits=8", "act.granularity=tensor"], "act.granularity=tensor", "static"),
    (["act_bits=8", "act.mode=static", "act.granularity=token"], "act.granularity=token", "tensor"),
    (["act_bits=8", "act.group_size=32"], "act.group_size=32", "group"),
    (["act_bits=8", "act.calibration=moving"], "act.calibration=moving", "static"),
    (["act_bits=8", "act.clip=0"], "act.clip=0", "above 0"),
    (
        ["act_bits=8", "act.mode=static", "act.granularity=channel", "act.calibration=histogram"],
        "act.calibration=histogram",
        "moving",
    ),
    (["act_bits=8", "act.clip=1.5"], "act.clip=1.5", "at most 1"),
    (["act_bits=8", "act.clip=0.9", "act.mode=static"], "act.clip=0.9", "dynamic"),
    (["act_bits=8", "act.format=mxfp4"], "act_bits=8", "mxfp4"),
    (["act.format=mxfp4", "act.granularity=token"], "act.granularity=token", "mxfp4"),
    (["act.format=mxfp4", "act.mode=static"], "act.mode=static", "mxfp4"),
    (["act.format=ternary"], "act.format=ternary", "nvfp4"),
    (["act.format=nf4dq"], "act.format=nf4dq", "nvfp4"),
    (["act.format=foo"], "act.format=foo", "mxfp4"),
    (["act.format=e4m3", "act_bits=4"], "act_bits=4", "8"),
    (["act.format=e4m3", "act.symmetric=false"], "act.symmetric=false", "true"),
    (["kv_bits=1"], "kv_bits=1", "2 to 8"),
    (["kv.layout=kivi"], "kv.layout=kivi", "kv_bits"),
    (["kv_bits=4", "kv.residual=0"], "kv.residual=0", "32"),
    (["kv_bits=4", "kv.residual=40"], "kv.residual=40", "32"),
    (["kv_bits=4", "kv.layout=channel"], "kv.layout=channel", "kivi"),
    (["kv_bits=4", "kv.layout=kivi", "kv.mode=static"], "kv.layout=kivi", "tensor"),
    (["kv_bits=4", "kv.mode=static", "kv.group_size=32"], "kv.group_size=32", "kivi"),
    (["kv_bits=8", "kv.format=e4m3", "kv.symmetric=false"], "kv.symmetric=false", "true"),
    (["kv.format=foo"], "kv.format=foo", "nf4"),
    (["overrides=foo"], "overrides=foo", "list"),
    (["overrides=[{modules:down_proj}]"], "overrides=", "change"),
    (["overrides=[{bits:8}]"], "overrides=", "modules"),
    (["overrides=[{modules:down_proj,foo:8}]"], "overrides.foo=8", "bits"),
    (["overrides=[{modules:down_proj,bits:9}]"], "bits=9", "2 to 8"),
    (["overrides=[{modules:lm_head,act_bits:8}]"], "overrides.act_bits=8", "lm_head"),
    (["overrides=[{modules:lm_head,blocks:[0],bits:8}]"], "overrides.blocks=[0]", "lm_head"),
    (["overrides=[{modules:down_proj,range:mse}]"], "overrides.range=mse", "range.method"),
    (["overrides=[{modules:down_proj,range:{foo:1}}]"], "overrides.range=", "range.method"),
    (["overrides=[{modules:down_proj,format:[3]}]"], "format=[3]", "a name"),
    (["format=[int]"], "format=[int]", "a name"),
    (["act.format=[int]"], "act.format=[int]", "a name"),
    (["kv.format=[int]"], "kv.format=[int]", "a name"),
    (["format=fp", "bits=[8]"], "bits=[8]", "8, 6, 4"),
    (["partial_group=true", "group_size=-1"], "partial_group=true", "groups"),
    (["partial_group=true", "tile=[8,8]"], "partial_group=true", "groups"),
    (["kv_bits=4", "kv.group_size=12"], "kv.group_size=12", "128"),
    (["kv.format=mxfp4"], "kv.format=mxfp4", "e4m3"),
    (["overrides=[{blocks:first,bits:8}]"], "overrides.blocks=first", "[0,-1]"),
    (["overrides=[{blocks:[0],skip:false}]"], "overrides.skip=false", "true"),
    (["overrides=[{blocks:[0],skip:true,bits:8}]"], "overrides.skip=true", "beside"),
    (["overrides=[{modules:down_proj,kv_bits:8}]"], "overrides.kv_bits=8", "blocks"),
]


@pytest.mark.parametrize(("overrides", "given", "accepted"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_impossible_combinations_are_refused(overrides, given, accepted):
    with pytest.raises(SpecError) as caught:
        _build(*overrides)
    message = str(caught.value)
    assert message.startswith(given)
    assert accepted in message
    assert "\n" not in message


def test_options_at_their_default_are_the_default():
    """A default that is written out is the same experiment."""
    for options in (
        ["bits=4", "group_size=64", "symmetric=false", "zero_point=int", "scale_dtype=float16"],
        ["range.method=minmax"],
        ["act_bits=16", "kv_bits=16"],
    ):
        assert _build(*options) == _build()
    assert _build("bits=16") == _build("format=none")
    assert _build("partial_group=true") == _build()  # the same numbers where nothing is left over


def test_sixteen_bits_switch_off_what_a_scheme_asks_for():
    for name in ("w8a8", "w8a8_static", "fp8", "nvfp4"):
        scheme = _build("act_bits=16", scheme=name)
        assert (scheme.input, scheme.weight) == (None, _build(scheme=name).weight)
        first = _build("overrides=[{blocks:[0],act_bits:16}]", scheme=name)
        assert first.of_input("mlp.up_proj.weight", 0, 2) is None
        assert first.of_input("mlp.up_proj.weight", 1, 2) == _build(scheme=name).input
    assert _build("kv_bits=16", scheme="kv4").cache is None
    assert _build("overrides=[{blocks:[0],kv_bits:null}]", scheme="kv4").of_cache(0, 2) is None


@pytest.mark.parametrize("node", ["range", "act", "kv"])
@pytest.mark.parametrize("value", [8, "mse", None, [1]])
def test_a_group_of_options_is_not_a_value(node, value):
    with pytest.raises(SpecError, match=rf"^{node}="):
        build_scheme(_values() | {node: value})
    assert _build("act_bits=8", "act.granularity=token", "act.mode=dynamic", "act.clip=1") == _build("act_bits=8")
    assert _build("kv_bits=4", "kv.residual=128", "kv.group_size=32", "kv.layout=kivi") == _build("kv_bits=4")


def test_blocks_and_scales_of_every_role_are_those_of_their_options():
    assert _build("zero_point=none") == _build("symmetric=true")
    inputs = {
        ("granularity=token",): Block(1, 0),
        ("granularity=group", "group_size=32"): Block(1, 32),
        ("mode=static",): Block(0, 0),
        ("mode=static", "granularity=channel"): Block(0, 1),
    }
    for options, block in inputs.items():
        fmt = _build("act_bits=8", *(f"act.{option}" for option in options)).input.format
        assert (fmt.block, fmt.scale.name, fmt.zero) == (block, "float32", "none")
    caches = {  # blocks of keys and values, zero point, residual, whether heads share a scale
        ("layout=kivi",): (Block(32, 1), Block(1, 32), "float", 128, False),
        ("layout=kivi", "group_size=64"): (Block(64, 1), Block(1, 64), "float", 128, False),
        ("layout=token",): (Block(1, 0), Block(1, 0), "int", 0, False),
        ("layout=token", "group_size=16"): (Block(1, 16), Block(1, 16), "int", 0, False),
        ("mode=static",): (Block(0, 0), Block(0, 0), "int", 0, True),
        ("mode=static", "layout=head"): (Block(0, 0), Block(0, 0), "int", 0, False),
        ("mode=static", "layout=channel"): (Block(0, 1), Block(0, 1), "int", 0, False),
    }
    for options, (key, value, zero, residual, shared) in caches.items():
        cache = _build("kv_bits=4", *(f"kv.{option}" for option in options)).cache
        assert (cache.key.block, cache.value.block, cache.residual) == (key, value, residual)
        assert {cache.key.zero, cache.value.zero} == {zero}
        assert cache.across_heads == shared
        assert {cache.key.scale.name, cache.value.scale.name} == {"float16"}


def test_a_rest_of_a_group_is_allowed_where_asked_for_and_at_the_edge_of_tiles():
    assert not _build().weight.partial
    assert _build("tile=[16,16]").weight.partial
    scheme = _build("partial_group=true", "overrides=[{modules:down_proj,bits:8}]")
    assert scheme.weight.partial
    assert scheme.of_weight("mlp.down_proj.weight", 0, 4).partial


def test_nominal_bits_are_those_that_people_say():
    formats = (_build(*options).weight for options in (["bits=1.58"], ["bits=3"], ["format=nf4"], ["format=none"]))
    assert [nominal_bits(fmt) for fmt in formats] == [1.58, 3, 4, None]


def test_overrides_of_inputs_and_cache_keep_the_scheme_s_other_options():
    group = ("act_bits=8", "act.granularity=group", "act.group_size=32")
    scheme = _build(*group, "overrides=[{modules:down_proj,act_bits:4}]")
    changed = scheme.of_input("mlp.down_proj.weight", 0, 4)
    assert (changed.format.bits, changed.format.block) == (4, Block(1, 32))
    assert scheme.of_weight("mlp.down_proj.weight", 0, 4) == scheme.weight
    scheme = _build("kv_bits=4", "kv.residual=64", "overrides=[{blocks:[1],kv_bits:8}]")
    assert (scheme.of_cache(1, 4).bits, scheme.of_cache(1, 4).residual) == (8, 64)
    skipped = _build("overrides=[{blocks:[0],skip:true}]", scheme="w8a8")
    assert skipped.of_input("mlp.down_proj.weight", 0, 4) is None
    assert skipped.of_input("mlp.down_proj.weight", 1, 4) == skipped.input


def test_an_override_needs_one_role_that_differs_and_the_head_none():
    scheme = _build("overrides=[{modules:down_proj,bits:4,act_bits:6}]", scheme="w4a8")
    assert scheme.of_input("mlp.down_proj.weight", 0, 4).format.bits == 6
    scheme = _build("overrides=[{modules:lm_head,bits:4}]")  # without it the head is in full precision
    assert scheme.of_weight("lm_head.weight", None, 4) == scheme.weight


def test_overrides_keep_what_they_do_not_name():
    overrides = (
        "{modules:down_proj,bits:8}",
        "{blocks:[0,-1],skip:true}",
        "{modules:lm_head,format:nf4}",
        "{blocks:[1],kv_bits:8}",
    )
    scheme = _build("group_size=32", "kv_bits=4", f"overrides=[{','.join(overrides)}]")
    assert scheme.of_weight("mlp.down_proj.weight", 1, 4).label == "int8_g32_asym"
    assert scheme.of_weight("mlp.up_proj.weight", 1, 4).label == "int4_g32_asym"
    assert scheme.of_weight("mlp.down_proj.weight", 0, 4) is None
    assert scheme.of_weight("mlp.up_proj.weight", 3, 4) is None
    assert scheme.of_weight("lm_head.weight", None, 4).label == "nf4"
    assert [scheme.of_cache(block, 4).bits for block in range(4)] == [4, 8, 4, 4]
    assert _build().of_weight("lm_head.weight", None, 4) is None


def test_building_changes_no_configuration():
    values = _values("overrides=[{modules:down_proj,bits:4}]", scheme="w8a8")
    before = copy.deepcopy(values)
    build_scheme(values)
    assert values == before


def test_every_named_scheme_fits_the_default_model():
    """576 and 1536 inputs: 128 does not divide the former, so that scheme has to allow a rest."""
    for name in SCHEMES:
        scheme = _build(scheme=name)
        for fmt in (scheme.weight, scheme.input and scheme.input.format):
            assert fmt is None or (fmt.fits(576, 576) and fmt.fits(1536, 576)), name
