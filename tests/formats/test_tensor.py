"""Fitting, encoding and decoding: laws over every number of bits, block shape and kind of zero point."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from qbench.errors import NumericsError
from qbench.formats import QParams, Range, fake_quantize, fit, quantize, uniform
from qbench.formats.ranges import extrema
from qbench.formats.scale import DTYPES as SCALE_DTYPES

BITS = range(2, 9)
GROUPS = [0, -1, 1, 5, 8]
SYMMETRIC = [False, True]
every_format = pytest.mark.parametrize("bits", BITS)
both_zeros = pytest.mark.parametrize("symmetric", SYMMETRIC)


def _format(bits, group_size, symmetric, **options):
    return uniform(bits=bits, group_size=group_size, symmetric=symmetric, partial=True, **options)


def _weights(rows=7, columns=21, seed=0):
    """Odd sizes, a few outliers, a zero row, an all-positive and an all-negative row."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    w[0, ::5] *= 10
    if rows > 3:
        w[1], w[2], w[3] = 0, w[2].abs() + 1, -w[3].abs() - 1
    return w


def _block_of(fmt, shape):
    """Index (row, group) of the scale of every element, by the definition and not by the code's reshaping."""
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    if fmt.group_size == 0:
        return torch.zeros_like(rows), torch.zeros_like(columns)
    return rows, columns // fmt.group_size if fmt.group_size > 0 else torch.zeros_like(columns)


@every_format
@both_zeros
@pytest.mark.parametrize("group_size", GROUPS)
def test_every_code_round_trips_and_decodes_to_scale_times_code_minus_zero(bits, symmetric, group_size):
    fmt = _format(bits, group_size, symmetric)
    codes = fmt.element.codebook.repeat(3, 2)
    rows = 1 if group_size == 0 else 3
    shape = rows, fmt.groups(codes.shape[1])
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(bits)) + 0.01
    zero = None if symmetric else torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(1)).float()
    row, group = _block_of(fmt, codes.shape)
    values = scale[row, group] * (codes - (0 if symmetric else zero[row, group]))
    found = quantize(values, fmt, QParams(scale, zero))
    assert torch.equal(found.codes.float(), codes)
    assert found.codes.dtype == fmt.element.storage
    assert torch.equal(found.dequantize(), values)


@every_format
@both_zeros
@pytest.mark.parametrize("scale", SCALE_DTYPES)
def test_error_is_at_most_half_a_step_plus_what_rounding_the_scale_costs(bits, symmetric, scale):
    """With s the stored and s' the exact scale, codes reach from -s·z to s·(2^b - 1 - z).

    Asymmetric: z <= -lo/s + 1/2, so the range's top lies at most s/2 + (2^b - 1)(s' - s) beyond the last code.
    Symmetric: M = (2^b - 1)/2 · s' and the last code is (2^b - 2)/2 · s, so it lies s/2 + (2^b - 1)/2 · (s' - s)
    beyond; elsewhere the error is s/2.
    """
    steps = 2**bits - 1
    for group_size, magnitude in itertools.product(GROUPS, [1e-9, 1e-4, 1.0, 1e3]):
        w = _weights() * magnitude
        fmt = _format(bits, group_size, symmetric, scale=scale)
        params, bounds = fit(w, fmt), extrema(w, fmt)
        spread = 2 * torch.maximum(-bounds.lower, bounds.upper) if symmetric else bounds.upper - bounds.lower
        excess = (spread / steps - params.scale).clamp_min(0) * steps * (0.5 if symmetric else 1)
        bound = params.scale / 2 + excess
        assert torch.equal(params.scale, params.scale.to(SCALE_DTYPES[scale]).float())
        assert bool((params.scale > 0).all())
        error = (quantize(w, fmt, params).dequantize() - w).abs()
        row, group = _block_of(fmt, w.shape)
        slack = 1e-6 * (w.abs() + params.scale[row, group])  # float32 arithmetic of the division and the product
        assert bool((error <= bound[row, group] + slack).all()), (group_size, magnitude)


@every_format
@both_zeros
@pytest.mark.parametrize("group_size", GROUPS)
def test_zeros_stay_zeros_and_blocks_of_zeros_get_a_unit_scale(bits, symmetric, group_size):
    w = _weights()
    fmt = _format(bits, group_size, symmetric)
    assert torch.equal(quantize(w, fmt).dequantize()[1], torch.zeros(w.shape[1]))
    nothing = quantize(torch.zeros(3, 5), fmt)
    assert torch.equal(nothing.dequantize(), torch.zeros(3, 5))
    assert torch.equal(nothing.scale, torch.ones_like(nothing.scale))


@every_format
@pytest.mark.parametrize("sign", [1, -1])
def test_blocks_of_one_sign_are_represented_up_to_their_extreme(bits, sign):
    w = sign * torch.linspace(5, 6, 9)[None]
    found = quantize(w, _format(bits, -1, False, scale="float32"))
    assert found.zero.item() == (0 if sign > 0 else 2**bits - 1)
    assert found.dequantize()[0, -1].item() == pytest.approx(sign * 6, rel=1e-6)


@both_zeros
@pytest.mark.parametrize("group_size", [0, -1, 4])
def test_what_underflows_the_scale_dtype_is_kept_at_its_resolution(symmetric, group_size):
    w = torch.tensor([[1e-8, -2e-8, 5e-9, 0.0], [0.1, -0.2, 0.3, 0.4]])[: 1 if group_size == 0 else 2]
    found = quantize(w, _format(4, group_size, symmetric))
    assert found.scale[0, 0].item() == 2.0**-24
    assert (found.dequantize()[0] - w[0]).abs().max() <= 2.0**-25


@both_zeros
def test_one_row_and_one_column(symmetric):
    for shape in [(1, 6), (6, 1), (1, 1)]:
        w = _weights(*shape)
        for group_size in (0, -1, 1):
            fmt = _format(8, group_size, symmetric)
            found = quantize(w, fmt)
            assert found.codes.shape == w.shape
            assert (found.dequantize() - w).abs().max() <= w.abs().max() * 2 / 255


@every_format
@both_zeros
def test_ties_go_to_the_even_step_from_zero(bits, symmetric):
    fmt = _format(bits, -1, symmetric, scale="float32")
    zero = None if symmetric else torch.tensor([[float(2 ** (bits - 1))]])
    whole = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    w = (whole + 0.5)[None] * 0.25
    found = quantize(w, fmt, QParams(torch.tensor([[0.25]]), zero)).dequantize()[0] / 0.25
    expected = [float(round(Fraction(2 * k + 1, 2))) for k in whole.tolist()]  # Python rounds half to even too
    assert found.tolist() == expected


@every_format
@both_zeros
def test_values_beyond_the_range_saturate(bits, symmetric):
    fmt = _format(bits, -1, symmetric, scale="float32")
    clip = Range(torch.tensor([[-1.0]]), torch.tensor([[1.0]]))
    w = torch.tensor([[-1e30, -50.0, 50.0, 1e30]])
    codes = quantize(w, fmt, fit(w, fmt, clip)).codes[0].tolist()
    assert codes == [fmt.element.minimum] * 2 + [fmt.element.maximum] * 2


@every_format
@both_zeros
@pytest.mark.parametrize("scale", SCALE_DTYPES)
def test_requantizing_with_its_own_parameters_changes_nothing(bits, symmetric, scale):
    for group_size in GROUPS:
        fmt = _format(bits, group_size, symmetric, scale=scale)
        once = quantize(_weights(), fmt)
        again = quantize(once.dequantize(), fmt, QParams(once.scale, once.zero))
        assert torch.equal(again.codes, once.codes), group_size


@every_format
@both_zeros
@pytest.mark.parametrize("group_size", [0, -1, 1024])
def test_a_block_has_at_most_two_to_the_bits_values_and_all_where_data_is_everywhere(bits, symmetric, group_size):
    w = torch.stack([torch.linspace(-3, 5, 2048), torch.randn(2048, generator=torch.Generator().manual_seed(bits))])
    fmt = _format(bits, group_size, symmetric)
    for block in fmt.blocks(quantize(w, fmt).dequantize()).flatten(0, 1):
        assert len(block.unique()) <= 2**bits
    everywhere = torch.linspace(-3, 3, 2048)[None]
    assert len(quantize(everywhere, _format(bits, -1, symmetric, scale="float32")).dequantize().unique()) == 2**bits


@every_format
@both_zeros
@pytest.mark.parametrize("group_size", GROUPS)
def test_fake_quantization_is_quantization(bits, symmetric, group_size):
    w, fmt = _weights(), _format(bits, group_size, symmetric)
    before = w.clone()
    assert torch.equal(fake_quantize(w, fmt), quantize(w, fmt).dequantize())
    full = extrema(w, fmt)
    clip = Range(full.lower * 0.7, full.upper * 0.6)
    assert torch.equal(fake_quantize(w, fmt, clip), quantize(w, fmt, fit(w, fmt, clip)).dequantize())
    assert torch.equal(w, before)


@both_zeros
@pytest.mark.parametrize("group_size", [0, -1, 5])
def test_half_precision_weights_are_quantized_in_float32(symmetric, group_size):
    w, fmt = _weights().bfloat16(), _format(4, group_size, symmetric)
    found, expected = quantize(w, fmt), quantize(w.float(), fmt)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("group_size", GROUPS)
def test_blocks_are_rows_cut_every_group_size_columns(group_size):
    w, fmt = _weights(), _format(4, group_size, False)
    row, group = _block_of(fmt, w.shape)
    blocks = fmt.blocks(w)
    for r in range(blocks.shape[0]):
        for g in range(blocks.shape[1]):
            own = w[(row == r) & (group == g)]
            assert torch.equal(blocks[r, g, : own.numel()], own)
            assert not blocks[r, g, own.numel() :].any()
    assert torch.equal(fmt.unblocks(blocks, w.shape), w)


@pytest.mark.parametrize(("width", "partial", "fits"), [(24, False, True), (20, False, False), (20, True, True)])
def test_a_group_size_fits_where_it_divides_or_a_short_group_is_allowed(width, partial, fits):
    fmt = uniform(bits=4, group_size=8, symmetric=False, partial=partial)
    assert fmt.fits(width) is fits
    for group_size in (0, -1):
        assert uniform(bits=4, group_size=group_size, symmetric=False).fits(width)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "scale", "expected"),
    [  # of a [6, 20] weight: 120 codes, then blocks x (scale + zero point)
        (4, 5, False, "float16", 120 * 4 + 24 * (16 + 4)),
        (4, 8, False, "float16", 120 * 4 + 18 * (16 + 4)),
        (3, -1, False, "float32", 120 * 3 + 6 * (32 + 3)),
        (2, 0, False, "bfloat16", 120 * 2 + 1 * (16 + 2)),
        (8, 20, True, "float16", 120 * 8 + 6 * 16),
        (5, 0, True, "float32", 120 * 5 + 32),
    ],
)
def test_bits_counted_by_hand(bits, group_size, symmetric, scale, expected):
    fmt = _format(bits, group_size, symmetric, scale=scale)
    assert fmt.storage_bits(6, 20) == expected
    assert quantize(_weights(6, 20), fmt).storage_bits() == expected


@both_zeros
@pytest.mark.parametrize("group_size", [0, -1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e6])
def test_a_scale_that_is_not_finite_is_refused(symmetric, group_size, value):
    w = torch.ones(2, 8)
    w[1, 5] = value  # 3e6 overflows a float16 scale of 4 bits
    with pytest.raises(NumericsError, match="scale is not finite in float16") as refused:
        quantize(w, _format(4, group_size, symmetric))
    assert "\n" not in str(refused.value)
    if math.isfinite(value):
        quantize(w, _format(4, group_size, symmetric, scale="float32"))
