"""Schemes: which modules an override is about, and which format each role has there."""

import pytest

from qbench.formats import Block, Int, TensorFormat, uniform
from qbench.formats.named import COMPOSITE
from qbench.formats.scheme import CacheFormat, InputFormat, Override, Scheme

FOUR, EIGHT, THREE = (uniform(bits, 64, symmetric=False) for bits in (4, 8, 3))
TOKEN = InputFormat(format=TensorFormat(element=Int(8, signed=True), block=Block(1, 0)))
CACHE = CacheFormat(key=FOUR, value=FOUR)
WIDE_CACHE = CacheFormat(key=EIGHT, value=EIGHT)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("down_proj", "mlp.down_proj.weight", True),
        ("mlp.down_proj", "mlp.down_proj.weight", True),
        ("mlp.down_proj.weight", "mlp.down_proj.weight", True),
        ("mlp.*", "mlp.down_proj.weight", True),
        ("*_proj", "self_attn.q_proj.weight", True),
        ("[qk]_proj", "self_attn.k_proj.weight", True),
        ("[qk]_proj", "self_attn.v_proj.weight", False),
        ("self_attn.*.weight", "self_attn.o_proj.weight", True),
        ("self_attn.weight", "self_attn.o_proj.weight", False),  # components are next to each other
        ("mlp.down", "mlp.down_proj.weight", False),  # and whole
        ("proj", "mlp.down_proj.weight", False),
        ("layers.1", "model.layers.1.mlp.down_proj.weight", True),
        ("layers.1", "model.layers.10.mlp.down_proj.weight", False),
        ("layers.1?", "model.layers.10.mlp.down_proj.weight", True),
        ("Down_proj", "mlp.down_proj.weight", False),
        ("a.b.c.d.e", "mlp.down_proj.weight", False),
        ("*", "lm_head.weight", True),
    ],
)
def test_patterns_match_whole_components_that_follow_each_other(pattern, path, expected):
    override = Override(modules=pattern)
    assert override.matches(path, 3, 12) is expected
    assert override.matches(f"{path}[7]", 3, 12) is expected  # one expert of a parameter
    assert override.matches(path, None, 12) is (expected and pattern.startswith("lm_head"))  # nothing by accident


@pytest.mark.parametrize(
    ("blocks", "matched"),
    [((0,), {0}), ((-1,), {11}), ((0, -1), {0, 11}), ((-12,), {0}), ((3, 5), {3, 5}), (None, set(range(12)))],
)
def test_block_numbers_count_from_either_end(blocks, matched):
    for modules in (None, "down_proj"):
        override = Override(modules=modules, blocks=blocks)
        found = {block for block in range(12) if override.matches("mlp.down_proj.weight", block, 12)}
        assert found == matched
        # Outside the blocks, only a pattern can be meant.
        assert override.matches("mlp.down_proj.weight", None, 12) is False


def test_without_overrides_every_block_has_the_schemes_formats_and_the_head_none():
    scheme = Scheme(weight=FOUR, input=TOKEN, cache=CACHE)
    assert scheme.of_weight("mlp.down_proj.weight", 0, 2) == FOUR
    assert scheme.of_input("mlp.down_proj.weight", 1, 2) == TOKEN
    assert scheme.of_cache(1, 2) == CACHE
    assert scheme.of_weight("lm_head.weight", None, 2) is None
    assert scheme.weights == {FOUR}
    assert Scheme().weights == frozenset()
    assert Scheme().of_weight("mlp.down_proj.weight", 0, 2) is None


def test_the_last_override_that_matches_decides():
    scheme = Scheme(
        weight=FOUR,
        overrides=(
            Override(modules="down_proj", roles=("weight",), weight=EIGHT),
            Override(blocks=(0,), roles=("weight",), weight=THREE),
            Override(modules="down_proj", blocks=(-1,), roles=("weight",)),
        ),
    )
    found = {
        (module, block): scheme.of_weight(f"mlp.{module}.weight", block, 3)
        for module in ("down_proj", "up_proj")
        for block in range(3)
    }
    assert found == {
        ("down_proj", 0): THREE,
        ("down_proj", 1): EIGHT,
        ("down_proj", 2): None,  # full precision
        ("up_proj", 0): THREE,
        ("up_proj", 1): FOUR,
        ("up_proj", 2): FOUR,
    }
    assert scheme.weights == {FOUR, EIGHT, THREE}


def test_only_an_override_by_name_quantizes_the_head():
    for modules, expected in [
        ("lm_head", EIGHT),
        ("lm_head.weight", EIGHT),
        ("*", None),
        ("lm_*", None),
        ("down_proj", None),
        (None, None),
    ]:
        scheme = Scheme(weight=FOUR, overrides=(Override(modules=modules, roles=("weight",), weight=EIGHT),))
        assert scheme.of_weight("lm_head.weight", None, 2) == expected


def test_an_override_leaves_roles_alone_that_it_is_not_about():
    override = Override(modules="down_proj", roles=("input",), weight=EIGHT, input=None, cache=WIDE_CACHE)
    scheme = Scheme(weight=FOUR, input=TOKEN, cache=CACHE, overrides=(override,))
    assert scheme.of_weight("mlp.down_proj.weight", 0, 2) == FOUR
    assert scheme.of_input("mlp.down_proj.weight", 0, 2) is None
    assert scheme.of_input("mlp.up_proj.weight", 0, 2) == TOKEN
    assert scheme.of_cache(0, 2) == CACHE
    assert scheme.weights == {FOUR}


def test_caches_are_overridden_by_block():
    by_block = Override(blocks=(0, -1), roles=("cache",), cache=WIDE_CACHE)
    by_module = Override(modules="k_proj", roles=("cache",), cache=WIDE_CACHE)
    scheme = Scheme(cache=CACHE, overrides=(by_block, by_module))
    assert [scheme.of_cache(block, 4) for block in range(4)] == [WIDE_CACHE, CACHE, CACHE, WIDE_CACHE]


@pytest.mark.parametrize(
    ("scheme", "needs_data", "at_run_time"),
    [
        (Scheme(weight=FOUR), False, False),
        (Scheme(weight=FOUR, input=TOKEN), False, True),
        (Scheme(input=InputFormat(format=TOKEN.format, static=True)), True, True),
        (Scheme(input=InputFormat(format=COMPOSITE["nvfp4"])), True, True),  # the tensor's own scale is calibrated
        (Scheme(input=InputFormat(format=COMPOSITE["mxfp4"])), False, True),
        (Scheme(cache=CACHE), False, True),
        (Scheme(cache=CacheFormat(key=FOUR, value=FOUR, static=True)), True, True),
        (Scheme(weight=FOUR, overrides=(Override(modules="x", roles=("input",), input=TOKEN),)), False, True),
        (Scheme(weight=COMPOSITE["nvfp4"]), False, False),
    ],
    ids=str,
)
def test_a_scheme_knows_what_it_needs(scheme, needs_data, at_run_time):
    assert scheme.needs_data is needs_data
    assert scheme.at_run_time is at_run_time


def test_labels_of_overrides_say_where_and_what():
    every = [
        (Override(modules="down_proj", roles=("weight",), weight=EIGHT), f"down_proj:{EIGHT.label}"),
        (Override(blocks=(0, -1), roles=("weight", "input")), "blocks 0,-1:skip"),
        (Override(modules="q_proj", blocks=(2,), roles=("input",)), "q_proj blocks 2:act-float"),
        (Override(blocks=(1,), roles=("cache",), cache=CACHE), f"blocks 1:kv-{CACHE.label}"),
    ]
    for override, label in every:
        assert override.label == label
