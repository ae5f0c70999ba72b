"""Formats by name: tables against their definitions and published values, and bits counted by hand."""

from statistics import NormalDist

import numpy as np
import pytest
import torch

from qbench.formats import Block, Int, fake_quantize
from qbench.formats.named import (
    AF4,
    COMPOSITE,
    FP_BY_BITS,
    NF4,
    TABLES,
    TERNARY,
    activation_format,
    float_element,
    normal_float,
)
from tests.formats.cases import weights


def _quantiles(bits):
    """QLoRA (arXiv 2305.14314), section 3 and appendix E: an offset probability, one half with 2^(b-1) quantiles, the
    other with one less, and 0; divided by the largest."""
    normal, half = NormalDist(), 2 ** (bits - 1)
    offset = 1 - (1 / (2 * half - 1) + 1 / (2 * half)) / 4
    positive = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, half + 1)[:-1]]
    negative = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, half)[:-1]]
    return np.array(sorted([*negative, 0.0, *positive])) / max(positive)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_normal_floats_are_quantiles_of_the_normal_distribution(bits):
    found = normal_float(bits)
    assert np.allclose(found.values, _quantiles(bits), atol=1e-6)
    assert len(found.values) == 2**bits
    assert {-1.0, 0.0, 1.0} <= set(found.values)


def test_nf4_is_the_published_table():
    assert np.allclose(NF4.values, _quantiles(4), atol=2e-7)
    assert [round(v, 7) for v in NF4.values[:3]] == [-1.0, -0.6961928, -0.5250731]


@pytest.mark.parametrize("element", [*TABLES.values(), TERNARY], ids=lambda e: e.name)
def test_tables_are_sorted_and_have_zero_and_ends_at_one(element):
    values = np.array(element.values)
    assert bool((np.diff(values) > 0).all())
    assert 0.0 in element.values
    assert (values[0], values[-1]) == (-1, 1)
    assert element.extent == 1
    assert len(values) <= 2**element.bits or element is TERNARY


def test_af4_is_as_far_from_nf4_as_published():
    """arXiv 2306.06965: for blocks of 64 its inner levels lie closer to 0, the outer ones hardly move."""
    inward = np.abs(NF4.values) - np.abs(AF4.values)
    assert len(AF4.values) == 16
    assert bool((inward[[5, 6, 8, 9]] > 0.03).all())
    assert bool((np.abs(inward[[0, 1, 7, 14, 15]]) < 0.002).all())


def test_the_bitsandbytes_float_has_its_twelfths():
    expected = sorted({0.0, *(s * v for v in (0.0625 / 12, 8 / 12, 1, 4 / 12, 0.5, 2 / 12, 0.25) for s in (-1, 1))})
    assert TABLES["fp4bnb"].codebook.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "rows", "columns", "expected"),
    [
        ("mxfp8", 64, 96, 8 + 8 / 32),
        ("mxfp8e5m2", 64, 96, 8 + 8 / 32),
        ("mxfp6", 64, 96, 6 + 8 / 32),
        ("mxfp6e2m3", 64, 96, 6 + 8 / 32),
        ("mxfp4", 64, 96, 4 + 8 / 32),
        ("mxint8", 64, 96, 8 + 8 / 32),
        ("nvfp4", 64, 96, 4 + 8 / 16 + 32 / (64 * 96)),
        ("fp8block", 256, 384, 8 + 32 / 128**2),
        ("nf4", 64, 128, 4 + 32 / 64),
        ("nf4dq", 256, 256, 4 + 8 / 64 + 32 / (64 * 256) + 32 / 256**2),
        ("af4", 64, 128, 4 + 32 / 64),
        ("fp4bnb", 64, 128, 4 + 32 / 64),
        ("ternary", 50, 100, 8 / 5 + 16 / 5000),
        ("int4in8", 64, 256, 4 + (8 + 4) / 128 + 16 / 256),
    ],
)
def test_bits_per_weight_counted_by_hand(name, rows, columns, expected):
    assert COMPOSITE[name].storage_bits(rows, columns) == pytest.approx(expected * rows * columns, rel=1e-12)
    assert COMPOSITE[name].label == name


def test_every_named_format_has_its_hand_count_above():
    counted = test_bits_per_weight_counted_by_hand.pytestmark[0].args[1]
    assert {row[0] for row in counted} == {*COMPOSITE}


def test_floats_by_their_number_of_bits_have_that_many():
    for bits, name in FP_BY_BITS.items():
        assert float_element(name).bits == bits


def test_activation_blocks_lie_within_a_token():
    for name in COMPOSITE:
        fmt = activation_format(name)
        assert fmt.block.rows <= 1
        assert fmt.label == name
    assert activation_format("fp8block").block == Block(1, 128)


def test_mxint8_uses_the_whole_byte():
    """OCP MX v1.0, 5.3.4: -2 to 1.984375 in steps of 1/64, here in units of the scale."""
    element = COMPOSITE["mxint8"].element
    assert element == Int(8, signed=True)
    x = torch.tensor([[-1.999, 1.984375, 1 / 64, *[0.0] * 29]])
    assert fake_quantize(x, COMPOSITE["mxint8"])[0, :3].tolist() == [-2.0, 1.984375, 1 / 64]


@pytest.mark.parametrize("name", [n for n in COMPOSITE if n != "ternary"])
def test_every_named_format_is_close_to_what_it_quantizes(name):
    x = weights(128, 256)
    error = (fake_quantize(x, COMPOSITE[name]) - x).square().mean()
    assert error < (0.02 if COMPOSITE[name].bits == 4 else 0.004)
