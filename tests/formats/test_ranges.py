"""Range fitting: searched ranges against a slow loop over blocks, percentiles against numpy, and what they promise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.errors import NumericsError
from qbench.formats import SCALES, Block, Int, Range, RangeFit, TensorFormat, fake_quantize, fit, quantize, shared_scale
from qbench.formats.named import COMPOSITE, TABLES, float_element
from qbench.formats.ranges import extrema, find_range
from tests.formats.cases import block_of, name_of, weights

FLOAT32 = SCALES["float32"]
FAMILIES = [
    *COMPOSITE.values(),
    *(
        TensorFormat(element=Int(bits, signed=True, reach=reach), block=Block(1, 16), scale=FLOAT32)
        for bits in (2, 4, 8)
        for reach in ("midpoint", "narrow", "full")
    ),
    *(
        TensorFormat(element=Int(bits, signed=False), block=block, zero="int")
        for bits in (2, 3, 4)
        for block in (Block(1, 16), Block(0, 0), Block(8, 8))
    ),
    TensorFormat(element=Int(3, signed=False), block=Block(1, 16), zero="float"),
    *(TensorFormat(element=float_element(name), block=Block(1, 32)) for name in ("e2m1", "e3m2", "e4m3")),
    *(TensorFormat(element=TABLES[name], block=Block(1, 0)) for name in ("nf3", "nf4")),
    TensorFormat(element=Int(4, signed=True), block=Block(1, 16), scale=SCALES["e4m3"]),
]
every_family = pytest.mark.parametrize("fmt", [replace(f, range=RangeFit()) for f in FAMILIES], ids=name_of)


def _errors(x, fmt, norm):
    return fmt.blocks((fake_quantize(x, fmt) - x).abs().pow(norm)).sum(dim=-1)


@every_family
@pytest.mark.parametrize("kind", ["normal", "outliers"])
@pytest.mark.parametrize("norm", [2.4, 2.0, 1.0])
def test_a_searched_range_is_never_worse_than_the_full_one_by_its_own_norm(fmt, kind, norm):
    x = weights(16, 256, kind=kind)
    searched = replace(fmt, range=RangeFit(method="mse", norm=norm, grid=20))
    full, found = _errors(x, fmt, norm), _errors(x, searched, norm)
    if fmt.scale.whole:  # scales stored together: only the whole tensor is promised
        full, found = full.sum(), found.sum()
    assert bool((found <= full * (1 + 1e-6)).all())


SEARCHED = [f for f in FAMILIES if not f.scale.whole and f.block.columns and f.block.rows == 1]


@pytest.mark.parametrize("fmt", SEARCHED, ids=name_of)
@pytest.mark.parametrize(("norm", "grid", "max_shrink"), [(2.4, 100, 0.8), (2.0, 10, 0.5), (3.0, 7, 0.2)])
def test_a_search_takes_the_best_share_of_each_blocks_own_extremes(fmt, norm, grid, max_shrink):
    """A loop over blocks and shares p = 1 - i / grid, i < grid * max_shrink, each from the original extremes: ranges
    never compound, whatever other blocks choose."""
    fmt = replace(fmt, range=RangeFit(method="mse", norm=norm, grid=grid, max_shrink=max_shrink))
    x = weights(2, 2 * fmt.block.columns, kind="outliers")
    found, outer = find_range(x, fmt, shared_scale(x, fmt)), shared_scale(x, fmt)
    width = fmt.block.columns
    for i in range(2):
        for j in range(2):
            block = x[i : i + 1, j * width : (j + 1) * width]
            own = None if outer is None else outer[i : i + 1] if len(outer) > 1 else outer
            low, high = (block.min()[None, None], block.max()[None, None])
            if fmt.zero != "float":
                low, high = low.clamp_max(0), high.clamp_min(0)
            best = None
            for step in range(max(1, round(grid * max_shrink))):
                share = 1 - step / grid
                clip = Range(share * low, share * high)
                error = (fake_quantize(block, fmt, clip, own) - block).abs().pow(norm).sum().item()
                if best is None or error < best[0] * (1 - 1e-6):
                    best = error, share, clip
            clip = Range(found.lower[i : i + 1, j : j + 1], found.upper[i : i + 1, j : j + 1])
            error = (fake_quantize(block, fmt, clip, own) - block).abs().pow(norm).sum().item()
            assert error == pytest.approx(best[0], rel=1e-5)
            span = (clip.upper - clip.lower).item() / (high - low).item()
            assert round((1 - span) * grid) == pytest.approx((1 - span) * grid, abs=1e-3)


def test_the_whole_range_is_in_the_grid_and_eight_bits_keep_nearly_all_of_it():
    x = weights(64, 64)
    for fmt in FAMILIES[:3]:
        only = replace(fmt, range=RangeFit(method="mse", grid=10, max_shrink=0.1))
        assert torch.equal(fake_quantize(x, only), fake_quantize(x, replace(fmt, range=RangeFit())))
    fmt = TensorFormat(element=Int(8, signed=False), block=Block(1, 0), zero="int", range=RangeFit(method="mse"))
    full = extrema(x, fmt)
    found = find_range(x, fmt)
    assert bool((found.upper >= 0.9 * full.upper).all())


@pytest.mark.parametrize("seed", [4, 19, 20])
def test_scales_that_are_stored_together_are_searched_only_where_that_helps(seed):
    """Rows of very different size, so that the mean and the largest deviation, which all scales of a block share in
    double quantization, move with the ranges that are chosen: each better by itself, here they are worse together."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 128, generator=generator) * torch.rand(3, 1, generator=generator) ** 4
    plain = COMPOSITE["nf4dq"]
    searched = replace(plain, range=RangeFit(method="mse", grid=10))
    assert _errors(x, searched, 2.4).sum() <= _errors(x, plain, 2.4).sum()


def test_searching_again_in_what_was_found_changes_nothing():
    x = weights(8, 64)
    fmt = TensorFormat(element=Int(2, signed=False), block=Block(1, 16), zero="int", range=RangeFit(method="mse"))
    assert torch.equal(quantize(x, fmt, fit(x, fmt)).codes, quantize(x, fmt, fit(x, fmt, find_range(x, fmt))).codes)


@pytest.mark.parametrize("block", [Block(0, 0), Block(1, 0), Block(1, 7), Block(3, 4), Block(0, 1)])
@pytest.mark.parametrize("percentile", [99.9, 99.0, 90.0, 50.0, 100.0])
@pytest.mark.parametrize("zero", ["int", "float"])
def test_percentiles_are_numpys_in_short_blocks_too(block, percentile, zero):
    x = weights(8, 30, kind="outliers") + 0.5
    how = RangeFit(method="percentile", percentile=percentile)
    fmt = TensorFormat(element=Int(4, signed=False), block=block, zero=zero, partial=True, range=how)
    found = find_range(x, fmt)
    row, column = block_of(block, x.shape)
    for i in range(found.lower.shape[0]):
        for j in range(found.lower.shape[1]):
            own = x[(row == i) & (column == j)].double().numpy()
            low, high = np.percentile(own, [100 - percentile, percentile])
            if zero == "int":
                low, high = min(low, 0), max(high, 0)
            assert found.lower[i, j].item() == pytest.approx(low, rel=1e-5, abs=1e-5)
            assert found.upper[i, j].item() == pytest.approx(high, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("block", [Block(0, 0), Block(1, 0), Block(1, 7), Block(3, 4)])
def test_absmean_is_the_mean_magnitude_of_short_blocks_too(block):
    fmt = TensorFormat(
        element=COMPOSITE["ternary"].element, block=block, partial=True, range=RangeFit(method="absmean")
    )
    x = weights(8, 30)
    found = find_range(x, fmt)
    row, column = block_of(block, x.shape)
    for i in range(found.lower.shape[0]):
        for j in range(found.lower.shape[1]):
            mean = x[(row == i) & (column == j)].abs().mean().item()
            assert found.upper[i, j].item() == pytest.approx(mean, rel=1e-6)
            assert found.lower[i, j] == -found.upper[i, j]


def test_ternary_is_bitnets():
    """arXiv 2402.17764, eq. 1-3: round(w / mean|w|), clipped to -1 … 1."""
    x = weights(16, 48)
    scale = x.abs().mean().half().float()
    found = quantize(x, COMPOSITE["ternary"]).dequantize()
    assert torch.equal(found, (x / scale).round().clamp(-1, 1) * scale)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5])
def test_a_share_is_that_share_of_the_extremes(share):
    x, fmt = weights(4, 32), TensorFormat(element=Int(4, signed=False), block=Block(1, 8), zero="int")
    found, full = find_range(x, replace(fmt, range=RangeFit(method="share", share=share))), extrema(x, fmt)
    assert torch.equal(found.lower, share * full.lower)
    assert torch.equal(found.upper, share * full.upper)


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile", "absmean", "share"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("zero", ["none", "int", "float"])
@pytest.mark.parametrize("columns", [64, 61])
def test_one_number_that_is_none_is_refused_by_every_method(method, value, zero, columns):
    """A percentile may look past it."""
    x = weights(3, columns)
    x[1, -1] = value
    how = RangeFit(method=method, percentile=90.0)
    element = Int(4, signed=zero == "none")
    fmt = TensorFormat(element=element, block=Block(1, 32), zero=zero, partial=True, range=how)
    with pytest.raises(NumericsError, match="scale is not finite"):
        fit(x, fmt)


@settings(max_examples=150, deadline=None)
@given(
    bits=st.integers(2, 8),
    offset=st.floats(-1e4, 1e4, width=32),
    spread=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 30.0]),
    scale=st.sampled_from(["float16", "bfloat16", "float32"]),
    columns=st.integers(1, 20),
)
def test_float_zero_points_reach_ranges_far_from_zero(bits, offset, spread, scale, columns):
    """Error at most half a step, what rounding the zero point to float16 (11 bits) moves, and what rounding the scale
    down cuts off the top."""
    x = offset + spread * torch.rand(2, columns, generator=torch.Generator().manual_seed(bits))
    fmt = TensorFormat(
        element=Int(bits, signed=False), block=Block(1, 7), zero="float", scale=SCALES[scale], partial=True
    )
    params = fit(x, fmt)
    found = quantize(x, fmt, params)
    assert torch.equal(params.zero, params.zero.half().float())
    error = (found.dequantize() - x).abs()
    eps = torch.finfo(fmt.scale.dtype_stored).eps
    step = params.scale.repeat_interleave(7, dim=1)[:, :columns]
    bound = step / 2 + x.abs() * 2.0**-10 + step * (2**bits - 1) * eps + (2**bits) * 2.0**-25 * (scale == "float16")
    assert bool((error <= bound + 1e-6 * x.abs()).all())


@pytest.mark.parametrize("fmt", [f for f in FAMILIES if f.zero == "float"], ids=name_of)
def test_float_zero_codes_follow_the_definition(fmt):
    """q = clamp(round(x / s + z)), z = -lo / s in float16, s = (hi - lo) / (2^b - 1): element by element."""
    x = weights(4, 32) + 2
    found = quantize(x, fmt)
    for i in range(4):
        for j in range(2):
            block = x[i, 16 * j : 16 * (j + 1)]
            s = ((block.max() - block.min()) / fmt.element.steps).half().float()
            z = (-block.min() / s).half().float()
            q = (block / s + z).round().clamp(0, fmt.element.maximum)
            assert torch.equal(found.codes[i, 16 * j : 16 * (j + 1)].float(), q)
            assert torch.equal(found.dequantize()[i, 16 * j : 16 * (j + 1)], s * (q - z))
