"""Every field of a format changes the quantized values or what they take to store: no option is without effect."""

from dataclasses import fields, replace

import pytest
import torch

from qbench.formats import SCALES, Block, Codebook, Float, Int, RangeFit, TensorFormat, quantize
from qbench.formats.named import COMPOSITE, NF4, float_element
from qbench.formats.scale import DoubleQuantized, Fp8Scale, IntegerScale, PowerOfTwo
from tests.formats.cases import weights

SIGNED, UNSIGNED = Int(4, signed=True), Int(4, signed=False)
BASE = TensorFormat(element=SIGNED, block=Block(1, 16), partial=True)
ASYMMETRIC = replace(BASE, element=UNSIGNED, zero="int")
SEARCHED = replace(BASE, range=RangeFit(method="mse", grid=20))


def _element(element):
    return replace(BASE, element=element)


def _range(**options):
    return replace(SEARCHED, range=replace(SEARCHED.range, **options))


# Of every field what to change it to: pairs of formats that differ in it alone.
CHANGES = {
    TensorFormat: {
        "element": [(BASE, _element(Float(2, 1))), (BASE, _element(NF4)), (BASE, _element(Int(5, signed=True)))],
        "block": [
            (BASE, replace(BASE, block=block)) for block in (Block(1, 8), Block(1, 0), Block(0, 0), Block(2, 16))
        ],
        "zero": [(ASYMMETRIC, replace(ASYMMETRIC, zero="float"))],
        "scale": [
            (ASYMMETRIC, replace(ASYMMETRIC, scale=scale)) for name, scale in SCALES.items() if name != "float16"
        ],
        "range": [
            (BASE, replace(BASE, range=RangeFit(method=method, percentile=90, share=0.9)))
            for method in ("mse", "percentile", "absmean", "share")
        ],
    },
    Block: {
        "rows": [(BASE, replace(BASE, block=Block(3, 16)))],
        "columns": [(BASE, replace(BASE, block=Block(1, 8)))],
    },
    RangeFit: {
        "method": [(BASE, SEARCHED)],
        "norm": [(SEARCHED, _range(norm=1.0)), (SEARCHED, _range(norm=2.0))],
        "grid": [(SEARCHED, _range(grid=100))],
        "max_shrink": [(SEARCHED, _range(max_shrink=0.1))],
        "percentile": [(_range(method="percentile", percentile=99), _range(method="percentile", percentile=90))],
        "share": [(_range(method="share", share=0.9), _range(method="share", share=0.8))],
    },
    Int: {
        "bits": [(_element(Int(bits, signed=True)), _element(Int(bits + 1, signed=True))) for bits in range(2, 8)],
        "signed": [(BASE, ASYMMETRIC)],  # goes with the zero point
        "reach": [
            (_element(Int(bits, True, a)), _element(Int(bits, True, b)))
            for bits in range(2, 9)
            for a, b in [("midpoint", "narrow"), ("narrow", "full"), ("full", "midpoint")]
        ],
    },
    Float: {
        "exponent": [(_element(Float(2, 2)), _element(Float(3, 2)))],
        "mantissa": [(_element(Float(2, 2)), _element(Float(2, 3)))],
        "specials": [
            (_element(Float(3, 2, a)), _element(Float(3, 2, b)))
            for a, b in [("finite", "fn"), ("fn", "ieee"), ("ieee", "fnuz")]
        ],
    },
    Codebook: {
        "values": [(_element(NF4), _element(replace(NF4, values=(*NF4.values[:14], 0.8, 1.0))))],
        "bits": [(_element(NF4), _element(replace(NF4, bits=5)))],
    },
    PowerOfTwo: {
        "rounding": [(replace(BASE, scale=PowerOfTwo("floor")), replace(BASE, scale=PowerOfTwo("ceil")))],
    },
    DoubleQuantized: {
        "block": [(replace(BASE, scale=DoubleQuantized(256)), replace(BASE, scale=DoubleQuantized(16)))],
    },
    Fp8Scale: {},
    IntegerScale: {},
}
#: Fields that are no options: what a format is called, and `partial`, which says what fits rather than how it is done.
NAMES = {TensorFormat: {"name", "partial"}, Codebook: {"label"}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(one, other, id=f"{kind.__name__}.{name}-{k}")
        for kind, changes in CHANGES.items()
        for name, pairs in changes.items()
        for k, (one, other) in enumerate(pairs)
    ],
)
def test_a_field_changes_values_or_bits(one, other):
    x = weights(12, 70, kind="outliers")
    first, second = quantize(x, one), quantize(x, other)
    assert not torch.equal(first.dequantize(), second.dequantize()) or first.storage_bits() != second.storage_bits()
    assert one != other
    assert (
        one.label != other.label or one.range != other.range or one.scale != other.scale or one.element != other.element
    )


@pytest.mark.parametrize("kind", CHANGES, ids=lambda kind: kind.__name__)
def test_every_field_is_among_the_changes(kind):
    assert {field.name for field in fields(kind)} == {*CHANGES[kind]} | NAMES.get(kind, set())


def test_partial_decides_what_is_accepted():
    assert BASE.fits(70)
    assert not replace(BASE, partial=False).fits(70)


def test_what_a_format_is_called_makes_it_no_other_one():
    assert replace(COMPOSITE["mxfp4"], name="other") == COMPOSITE["mxfp4"]
    assert hash(replace(COMPOSITE["nf4"], name=None)) == hash(COMPOSITE["nf4"])
    assert replace(NF4, label="other") == NF4


def test_scale_formats_have_names_of_their_own_and_are_found_by_them():
    for name, scale in SCALES.items():
        assert scale.name == name


def test_labels_tell_formats_apart_but_for_the_width_of_float_scales():
    labels = [
        replace(BASE, element=element, zero=zero, block=block, scale=scale, range=how).label
        for element, zero in [(SIGNED, "none"), (UNSIGNED, "int"), (UNSIGNED, "float"), (float_element("e2m1"), "none")]
        for block in (Block(1, 16), Block(1, 0), Block(0, 0), Block(4, 4))
        for scale in (SCALES["float16"], SCALES["e8m0"], SCALES["e4m3"])
        for how in (RangeFit(), RangeFit(method="mse"), RangeFit(method="percentile"))
    ]
    assert len(set(labels)) == len(labels)
