"""Element formats, exhaustively: every code, every midpoint and its neighbours, signs of zero, infinities and NaN."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.errors import NumericsError
from qbench.formats import Codebook, Float, Int
from tests.formats.cases import ELEMENTS, FLOATS, INTS, all_codes, awkward_floats, name_of, nearest_index, same

every_element = pytest.mark.parametrize("element", ELEMENTS, ids=name_of)
every_float = pytest.mark.parametrize("element", FLOATS, ids=name_of)


def _parity(element):
    return (element.to_codes(element.codebook).to(torch.int32) & 1).numpy()


def _magnitude(element, code):
    """OFP8 (arXiv 2209.05433), section 3, in rational numbers."""
    e, f = code >> element.mantissa, Fraction(code & ((1 << element.mantissa) - 1), 1 << element.mantissa)
    bias = 2 ** (element.exponent - 1) - (element.specials != "fnuz")
    return (f * Fraction(2) ** (1 - bias)) if e == 0 else (1 + f) * Fraction(2) ** (e - bias)


@pytest.mark.parametrize("element", INTS, ids=name_of)
def test_integers_are_every_integer_once_in_order(element):
    expected = [k - (2 ** (element.bits - 1) if element.signed else 0) for k in range(2**element.bits)]
    assert element.codebook.tolist() == expected
    assert (element.minimum, element.maximum) == (expected[0], expected[-1])
    assert element.steps == len(expected) - 1


@pytest.mark.parametrize(
    ("reach", "extents"), [("midpoint", [1.5, 3.5, 7.5]), ("narrow", [1, 3, 7]), ("full", [2, 4, 8])]
)
def test_reach_says_where_a_symmetric_scale_puts_the_largest_value(reach, extents):
    assert [Int(bits, signed=True, reach=reach).extent for bits in (2, 3, 4)] == extents


@every_float
def test_floats_mean_what_the_definition_says_and_special_codes_are_where_the_standard_puts_them(element):
    count = 1 << (element.exponent + element.mantissa)
    values = element.from_codes(torch.arange(2 * count).to(element.storage))
    for code, value in enumerate(values.tolist()):
        magnitude, sign = code % count, -1 if code >= count else 1
        e, f = magnitude >> element.mantissa, magnitude % (1 << element.mantissa)
        top = e == (1 << element.exponent) - 1
        if (element.specials, code) == ("fnuz", count) or (element.specials, magnitude) == ("fn", count - 1):
            assert np.isnan(value)
        elif element.specials == "ieee" and top:
            assert np.isnan(value) if f else value == sign * np.inf
        else:
            assert Fraction(value) == sign * _magnitude(element, magnitude)
            assert np.signbit(value) == (sign < 0)


@every_element
def test_the_codebook_is_every_finite_value_once_ascending(element):
    levels = element.codebook
    assert levels.dtype == torch.float32
    assert bool((levels.diff() > 0).all())
    found = element.from_codes(all_codes(element))
    assert sorted({float(v) for v in found if v.isfinite()}) == levels.tolist()
    if isinstance(element, Float):
        assert element.maximum == levels[-1].item()
        assert element.from_codes(torch.tensor([element.largest_code], dtype=torch.uint8)).item() == element.maximum


@every_element
def test_every_code_of_a_number_is_the_code_of_its_value(element):
    """-0 keeps its sign in floats that have one; ±infinity saturates, and every NaN becomes the one with all ones
    (fnuz: minus zero)."""
    codes = all_codes(element)
    values = element.from_codes(codes)
    number = values.isfinite()
    assert same(element.encode(values[number]), codes[number])
    assert same(element.to_codes(values[number]), codes[number])
    infinite = values[values.isinf()]
    assert torch.equal(element.from_codes(element.encode(infinite)), infinite.sign() * element.codebook[-1])
    if values.isnan().any():
        ones = (1 << (element.bits - 1)) - 1
        allowed = {1 << (element.bits - 1)} if element.specials == "fnuz" else {ones, ones | 1 << (element.bits - 1)}
        assert set(element.encode(values[values.isnan()]).tolist()) <= allowed


@every_element
def test_infinities_saturate_and_a_nan_is_encoded_or_refused(element):
    low, high = element.codebook[[0, -1]].tolist()
    ends = element.from_codes(element.encode(torch.tensor([-torch.inf, -3e38, 3e38, torch.inf])))
    assert ends.tolist() == [low, low, high, high]
    nan = torch.tensor([1.0, torch.nan, -torch.nan])
    with_nan = isinstance(element, Float) and element.has_nan
    if isinstance(element, Float):
        # An IEEE format without mantissa bits has infinities, but no code left for a NaN.
        assert with_nan == (element.specials in ("fn", "fnuz") or (element.specials == "ieee" and element.mantissa > 0))
    if with_nan:
        assert element.from_codes(element.encode(nan)).isnan().tolist() == [False, True, True]
    else:
        with pytest.raises(NumericsError, match="NaN cannot be encoded in"):
            element.encode(nan)
    assert element.nearest(nan.clone()).isnan().tolist() == [False, True, True]


@every_element
def test_rounding_is_to_nearest_at_every_midpoint_and_on_both_sides_of_it(element):
    """Half to the even code at midpoints that float32 holds; the two floats around each go where they are nearer."""
    levels = element.codebook.numpy()
    middle = (levels[1:].astype(np.float64) + levels[:-1]) / 2
    single = middle.astype(np.float32)
    around = [np.nextafter(single, np.float32(end)) for end in (-np.inf, np.inf)]
    x = np.concatenate([single, *around, levels, *(np.nextafter(levels, np.float32(end)) for end in (-np.inf, np.inf))])
    expected = levels[nearest_index(levels, _parity(element), x)]
    assert np.array_equal(element.nearest(torch.from_numpy(x.copy())).numpy(), expected)
    exact = single.astype(np.float64) == middle
    if not isinstance(element, Codebook):
        assert exact.all()
    ties = element.encode(torch.from_numpy(single[exact]))
    assert not bool((ties.to(torch.int32) & 1).any())


@every_element
def test_rounding_is_to_nearest_for_every_float16_and_random_float32(element):
    x = awkward_floats(patterns=1 << 12)
    levels = element.codebook.numpy()
    expected = levels[nearest_index(levels, _parity(element), x.numpy())]
    found = element.nearest(x.clone())
    assert np.array_equal(found.numpy(), expected)
    assert same(element.encode(x), element.to_codes(found))
    assert torch.equal(element.from_codes(element.encode(x)), found)


@every_element
def test_rounding_is_monotone_and_symmetric_where_the_codebook_is(element):
    x = awkward_floats(patterns=1 << 12).sort().values
    found = element.nearest(x.clone())
    assert bool((found.diff() >= 0).all())
    if torch.equal(element.codebook, -element.codebook.flip(0)):
        assert torch.equal(element.nearest(-x), -found)


@every_float
def test_the_sign_of_zero_is_kept_where_there_is_a_code_for_it(element):
    zeros = element.encode(torch.tensor([0.0, -0.0, 1e-30, -1e-30])).tolist()
    minus = 0 if element.specials == "fnuz" else 1 << (element.exponent + element.mantissa)
    assert zeros == [0, minus, 0, minus]


@every_element
def test_encoding_leaves_its_input_alone_and_takes_any_layout(element):
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)) * 2
    before = x.clone()
    codes = element.encode(x)
    assert torch.equal(x, before)
    assert codes.dtype == element.storage
    assert torch.equal(element.encode(x.t()), codes.t())
    assert torch.equal(element.encode(x[:, ::2]), codes[:, ::2])
    assert torch.equal(element.encode(x.double()), codes)
    assert element.encode(torch.zeros(0, 3)).shape == (0, 3)


@settings(max_examples=300, deadline=None)
@given(
    element=st.sampled_from(ELEMENTS),
    x=st.floats(width=32, allow_nan=False, allow_infinity=False),
    scale=st.sampled_from([1.0, 1e-36, 1e-6]),
)
def test_no_level_is_nearer(element, x, scale):
    x = torch.tensor([x * scale])
    exact = Fraction(x.item())
    found = Fraction(element.nearest(x.clone()).item())
    assert abs(exact - found) == min(abs(exact - Fraction(level)) for level in element.codebook.tolist())


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=40, unique=True).map(sorted),
    x=st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=20),
)
def test_any_codebook_gives_its_nearest_value(values, x):
    element = Codebook("learned", tuple(values), 6)
    found = element.nearest(torch.tensor(x)).tolist()
    for value, level in zip(x, found, strict=True):
        assert abs(Fraction(value) - Fraction(level)) == min(abs(Fraction(value) - Fraction(v)) for v in values)


def test_widths_beyond_8_bits_round_trip_too():
    for element in (Float(4, 7), Float(5, 10, "ieee"), Float(7, 8, "fn"), Float(5, 9, "fnuz")):
        codes = torch.arange(1 << element.bits).to(element.storage)
        values = element.from_codes(codes)
        assert same(element.encode(values[values.isfinite()]), codes[values.isfinite()])
