"""How scales are stored: laws of every scale format, over the whole range of numbers they take."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from qbench.errors import NumericsError
from qbench.formats import SCALES, Block, Float, Int, Range, TensorFormat, fit, quantize, shared_scale
from qbench.formats.named import COMPOSITE, float_element
from qbench.formats.scale import DTYPES, dynamic_map
from tests.formats.cases import awkward_floats, weights

EXTENTS = [0.5, 1.0, 1.5, 6.0, 7.0, 7.5, 28.0, 127.5, 448.0, 57344.0]


def _spreads():
    """Positive numbers of every size, with every power of two, the floats beside it, and 0."""
    powers = torch.tensor([2.0**e for e in range(-149, 128)])
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    beside = torch.cat([torch.nextafter(powers, up), torch.nextafter(powers, down)])
    random = awkward_floats(seed=3, patterns=1 << 12)[::31].abs()
    found = torch.cat([powers, beside, random[random.isfinite()]])
    return found[: len(found) // 4 * 4].view(-1, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_scales_are_the_nearest_number_never_zero_and_keep_their_sign(dtype):
    info = torch.finfo(DTYPES[dtype])
    spread = _spreads()
    spread = spread[(spread / 7.5 <= info.max).all(dim=1)]
    for sign in (1, -1):
        ideal = sign * spread / 7.5
        stored = SCALES[dtype].store(sign * spread, 7.5)
        assert stored.codes is None
        assert stored.outer is None
        assert torch.equal(stored.value, stored.value.to(DTYPES[dtype]).float())
        nearest = ideal.to(DTYPES[dtype]).float()
        tiny = sign * info.smallest_normal * info.eps
        expected = torch.where(nearest == 0, torch.where(ideal == 0, 1.0, tiny), nearest)
        assert torch.equal(stored.value, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_float_scale_that_is_not_finite_is_refused(dtype, value):
    with pytest.raises(NumericsError, match=f"scale is not finite in {dtype}"):
        SCALES[dtype].store(torch.tensor([[1.0, value]]), 7.5)


@pytest.mark.parametrize("name", ["e8m0", "e8m0ceil", "e4m3", "int8", "dq8"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_by_every_format_with_codes(name, value):
    fmt = TensorFormat(element=Int(4, signed=False), block=Block(1, 4), zero="int", scale=SCALES[name])
    x = torch.ones(3, 8)
    x[1, 5] = value
    with pytest.raises(NumericsError, match="scale is not finite"):
        fit(x, fmt)


def test_float16_scales_underflow_to_the_smallest_number_and_overflow_is_refused():
    fmt = TensorFormat(element=Int(4, signed=True), block=Block(1, 4), scale=SCALES["float16"])
    assert fit(torch.full((1, 4), 1e-20), fmt).scale.item() == 2.0**-24
    largest = 65504 * 7.5
    assert fit(torch.full((1, 4), largest), fmt).scale.item() == 65504
    with pytest.raises(NumericsError, match="scale_dtype=float32 is needed"):
        fit(torch.full((1, 4), largest * 1.001), fmt)


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_powers_of_two_follow_their_rule(rounding, extent):
    """floor: floor(log2 max) - floor(log2 extent); ceil: the smallest power with max <= power * extent. Both held in
    -127 … 127; in rational numbers."""
    spread = _spreads()
    stored = SCALES["e8m0" if rounding == "floor" else "e8m0ceil"].store(spread, extent)
    exponents = (stored.codes.to(torch.int32) - 127).flatten().tolist()
    for value, exponent in zip(spread.flatten().tolist(), exponents, strict=True):
        if value == 0:
            assert exponent == -127
            continue
        if rounding == "floor":
            expected = math.frexp(value)[1] - math.frexp(extent)[1]
        else:
            expected = math.frexp(value)[1] - math.frexp(extent)[1] - 1
            while Fraction(2) ** expected * Fraction(extent) < Fraction(value):
                expected += 1
        assert exponent == max(-127, min(127, expected)), value
    assert stored.codes.dtype == torch.uint8
    assert torch.equal(stored.value.double(), 2.0 ** (stored.codes.double() - 127))


def test_every_e8m0_code_means_what_it_does_in_ml_dtypes():
    codes = np.arange(255, dtype=np.uint8)  # 255 is a NaN, which is never stored
    theirs = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    found = SCALES["e8m0"].value(torch.from_numpy(codes), None, (1, 255))
    assert np.array_equal(found.double().numpy(), theirs)


MX = ["mxfp8", "mxfp8e5m2", "mxfp6", "mxfp6e2m3", "mxfp4", "mxint8"]


@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize("scale", ["e8m0", "e8m0ceil"])
def test_mx_scales_go_with_powers_of_two_and_what_is_representable_is_exact(name, scale):
    fmt = TensorFormat(element=COMPOSITE[name].element, block=Block(1, 32), scale=SCALES[scale])
    x = weights(8, 64, kind="outliers")
    assert torch.equal(quantize(2 * x, fmt).dequantize(), 2 * quantize(x, fmt).dequantize())
    assert torch.equal(quantize(x / 1024, fmt).dequantize() * 1024, quantize(x, fmt).dequantize())
    # A block whose largest value is an element's largest one (its own scale's exponent then) times a power of two.
    levels = fmt.element.codebook
    generator = torch.Generator().manual_seed(1)
    blocks = levels[torch.randint(len(levels), (6, 32), generator=generator)]
    blocks[:, 0] = levels[-1]
    blocks = blocks * torch.tensor([2.0**e for e in (-20, -3, 0, 1, 7, 30)])[:, None]
    if isinstance(fmt.element, Int):
        blocks = blocks.clamp_min(-blocks.amax(dim=1, keepdim=True))  # -128 would be the largest magnitude
    assert torch.equal(quantize(blocks, fmt).dequantize(), blocks)


@pytest.mark.parametrize("name", MX)
def test_ceil_never_saturates_and_floor_may(name):
    element = COMPOSITE[name].element
    top = max(abs(element.codebook[0].item()), element.codebook[-1].item())
    x = weights(64, 64)
    found = {}
    for scale in ("e8m0", "e8m0ceil"):
        fmt = TensorFormat(element=element, block=Block(1, 32), scale=SCALES[scale])
        params = fit(x, fmt)
        found[scale] = (fmt.blocks(x).abs() / params.scale[..., None]).max().item()
    assert found["e8m0ceil"] <= element.extent
    assert found["e8m0"] < 2 ** math.frexp(element.extent)[1]
    if not isinstance(element, Int):  # 127.5 is all but a power of two: nothing is left to saturate
        assert found["e8m0"] > top


def test_nvfp4_scales_are_positive_codes_and_the_largest_value_is_reproduced():
    fmt = COMPOSITE["nvfp4"]
    for seed, magnitude in enumerate([1e-30, 1e-4, 1.0, 3.7, 1e6, 1e30]):
        x = weights(16, 64, seed=seed, kind="outliers") * magnitude
        x[3, 16:32] *= 1e-6  # far below what E4M3 reaches beside the largest block
        found = quantize(x, fmt)
        levels = float_element("e4m3").from_codes(found.scale_codes)
        assert bool((levels > 0).all())
        assert levels.max().item() == 448
        assert levels.min().item() == 2.0**-9
        assert torch.equal(found.scale, levels / found.outer)
        place = x.abs().argmax()
        row, column = divmod(place.item(), 64)
        assert found.scale_codes[row, column // 16] == 0x7E
        assert fmt.element.from_codes(found.codes)[row, column].abs() == 6
        # Exact but for the three roundings to float32 of G, 448 / G and the product.
        assert found.dequantize()[row, column].item() == pytest.approx(x[row, column].item(), rel=3 * 2.0**-24)
    assert fmt.storage_bits(16, 64) == 4.5 * 16 * 64 + 32


@pytest.mark.parametrize("fmt", [f for f in COMPOSITE.values() if f.name != "ternary"], ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(1, 256), (5, 128), (256, 1), (1, 1)])
def test_zero_blocks_stay_zero_and_one_row_or_column_is_a_tensor_too(fmt, shape):
    partial = TensorFormat(element=fmt.element, block=fmt.block, zero=fmt.zero, scale=fmt.scale, partial=True)
    zeros = quantize(torch.zeros(shape), partial)
    assert not zeros.dequantize().any()
    assert bool((zeros.scale > 0).all())
    assert bool(zeros.scale.isfinite().all())
    x = weights(*shape)
    x[:, : partial.width(shape[1])] = 0  # a block of zeros beside others
    found = quantize(x, partial).dequantize()
    assert not found[:, : partial.width(shape[1])].any()
    x = weights(*shape)
    error = (quantize(x, partial).dequantize() - x).abs().max()
    assert error <= 0.26 * x.abs().max()


def test_the_dynamic_map_is_the_published_one():
    """arXiv 2110.02861: 256 values, decimal exponents -6 … 0 whose fractions have 0 … 6 bits."""
    values = np.array(dynamic_map().values)
    assert len(values) == len(set(values)) == 256
    assert np.array_equal(values, np.sort(values))
    assert {0.0, 1.0} <= set(values)
    positive = values[values > 0]
    assert np.allclose(np.sort(-values[values < 0]), positive[:-1])  # 1 alone has no partner
    for exponent in range(7):
        decade = positive[(positive > 10.0 ** (exponent - 7)) & (positive < 10.0 ** (exponent - 6))]
        edges = np.linspace(0.1, 1, 2**exponent + 1) * 10.0 ** (exponent - 6)
        assert np.allclose(decade, (edges[1:] + edges[:-1]) / 2)


def test_double_quantized_scales_are_within_one_percent():
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    plain, double = fit(x, COMPOSITE["nf4"]), fit(x, COMPOSITE["nf4dq"])
    assert ((double.scale / plain.scale - 1).abs() < 0.01).all()
    assert not torch.equal(double.scale, plain.scale)
    assert double.outer.shape == (1 + 64 * 16 // 256,)
    # The definition, block of 256 scales by block.
    ideal = plain.scale.flatten()
    values = torch.tensor(dynamic_map().values)
    for k, part in enumerate(ideal.split(256)):
        centred = part - ideal.mean()
        code = ((centred / centred.abs().max())[:, None] - values).abs().argmin(dim=1)
        expected = values[code] * centred.abs().max() + ideal.mean()
        assert torch.allclose(double.scale.flatten()[k * 256 : (k + 1) * 256], expected, rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e-44, 1e30])
def test_double_quantized_scales_are_never_zero_or_negative(magnitude):
    x = weights(8, 256)
    x[1:7] *= 1e-5  # scales that lie where the map of what is left after the mean is coarse
    found = fit(x * magnitude, COMPOSITE["nf4dq"])
    assert bool((found.scale > 0).all())
    assert bool(quantize(x * magnitude, COMPOSITE["nf4dq"]).dequantize().isfinite().all())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["normal", "outliers"])
@pytest.mark.parametrize("magnitude", [1.0, 1e-4, 1e-6, 1e-9, 1e3])
def test_two_level_values_are_int8_codes_of_their_row(bits, kind, magnitude):
    """METHODS 1.7: what the second level decodes to is a whole number of the row's steps, within int8; min-max ranges
    never even need clipping for it."""
    fmt = TensorFormat(element=Int(bits, signed=False), block=Block(1, 16), zero="int", scale=SCALES["int8"])
    x = weights(24, 64, seed=bits, kind=kind) * magnitude
    x[5], x[6] = x[5].abs(), -x[6].abs()
    found = quantize(x, fmt)
    assert torch.equal(found.outer, found.outer.half().float())
    codes = found.dequantize() / found.outer
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() <= 127
    assert (x.abs() <= found.outer * 127).all()
    shown = (found.scale / found.outer).repeat_interleave(16, dim=1)
    unclipped = torch.round(torch.round(x / found.outer) / shown) * shown
    assert unclipped.abs().max() <= 127


@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0, 30.0, 1e4])
def test_two_level_values_stay_int8_where_the_row_scale_is_another_tensors(factor):
    """As in GPTQ: the row's scale is the original weight's, whatever compensation adds to the columns."""
    fmt = COMPOSITE["int4in8"]
    x = weights(16, 256)
    outer = shared_scale(x, fmt)
    larger = x * factor
    params = fit(larger, fmt, outer=outer)
    codes = quantize(larger, fmt, params).dequantize() / outer
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() <= 127
    clip = Range(torch.full((16, 2), -factor), torch.full((16, 2), factor))
    codes = quantize(x, fmt, fit(x, fmt, clip)).dequantize() / outer
    assert codes.abs().max() <= 127


def test_the_row_scale_of_two_levels_protects_what_rounding_adds():
    scale = SCALES["int8"]
    assert [scale.protected(Int(bits, signed=False).extent) for bits in (2, 3, 4, 8)] == [95, 111, 119, 126]


def test_e4m3_scales_of_any_float_element_keep_zero_small_and_large_blocks():
    fmt = TensorFormat(element=Float(3, 2), block=Block(1, 8), scale=SCALES["e4m3"])
    x = torch.cat([torch.zeros(1, 8), torch.full((1, 8), 1e-12), torch.ones(1, 8)])
    found = quantize(x, fmt)
    assert not found.dequantize()[0].any()
    assert (found.dequantize() - x).abs().max() <= 1e-6
