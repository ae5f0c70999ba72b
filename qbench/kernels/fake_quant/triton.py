"""Fused fake quantization: x is read once, fitted, rounded, decoded and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.kernels.triton import all_finite, fit_scale, round_even, store_rounded

_WIDEST = 8192
"""Elements of a group kept in registers; wider groups are read twice, the second time mostly from cache."""
_TILE = 4096
"""Elements per program where groups are small."""


def fake_quant(
    x: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale: Tensor | None,
    zero: Tensor | None,
    scale_dtype: torch.dtype,
) -> Tensor:
    """As `reference.fake_quant`, bit for bit."""
    rows, columns = x.shape
    group = columns if group_size == -1 else min(group_size, columns)
    groups = -(-columns // group)
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    width = min(triton.next_power_of_2(group), _WIDEST)
    pairs = min(max(1, _TILE // width), triton.next_power_of_2(rows * groups))
    fake_quant_kernel[(triton.cdiv(rows * groups, pairs),)](
        x,
        out,
        x if scale is None else scale,  # never read where the kernel fits its own
        x if zero is None else zero,
        rows,
        columns,
        groups,
        group,
        x.stride(0),
        x.stride(1),
        *((0, 0) if scale is None else scale.stride()),
        *((0, 0) if zero is None else zero.stride()),
        BITS=bits,
        SYMMETRIC=symmetric,
        GIVEN=scale is not None,
        SCALE=str(scale_dtype).removeprefix("torch."),
        PAIRS=pairs,
        WIDTH=width,
        WHOLE=width >= group,
        num_warps=8 if pairs * width > _TILE else 4,
        enable_fp_fusion=False,
    )
    return out


@triton.jit
def fake_quant_kernel(
    x: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    groups: tl.tensor,
    group: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    scale_row: tl.tensor,
    scale_group: tl.tensor,
    zero_row: tl.tensor,
    zero_group: tl.tensor,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    GIVEN: tl.constexpr,
    SCALE: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """One program: PAIRS consecutive (row, group) pairs, WIDTH elements of each at a time."""
    steps: tl.constexpr = (1 << BITS) - 1
    minimum: tl.constexpr = -(1 << (BITS - 1)) if SYMMETRIC else 0
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    valid = pair < rows * groups
    row = (pair // groups).to(tl.int64)
    index = pair % groups
    start = index * group
    offset = tl.arange(0, WIDTH)
    x_start = x + (row * x_row + start * x_column)[:, None]
    out_start = out + (row * columns + start)[:, None]
    inside = valid[:, None] & (offset < group)[None, :] & (start[:, None] + offset[None, :] < columns)
    if WHOLE:
        values = tl.load(x_start + (offset * x_column)[None, :], mask=inside, other=0.0).to(tl.float32)

    if GIVEN:
        s = tl.load(scale + row * scale_row + index * scale_group, mask=valid, other=1.0)
        if SYMMETRIC:
            z = tl.zeros_like(s)
        else:
            z = tl.load(zero + row * zero_row + index * zero_group, mask=valid, other=0.0)
    else:
        if WHOLE:
            lower = tl.min(values, axis=1)
            upper = tl.max(values, axis=1)
            finite = all_finite(values, 1)
        else:
            lower = tl.zeros([PAIRS], tl.float32)
            upper = tl.zeros([PAIRS], tl.float32)
            finite = valid | True
            for first in range(0, group, WIDTH):
                column = first + offset
                mask = valid[:, None] & (column < group)[None, :] & (start[:, None] + column[None, :] < columns)
                part = tl.load(x_start + (column * x_column)[None, :], mask=mask, other=0.0).to(tl.float32)
                lower = tl.minimum(lower, tl.min(part, axis=1))
                upper = tl.maximum(upper, tl.max(part, axis=1))
                finite = finite & all_finite(part, 1)
        lower = tl.minimum(lower, 0.0)
        upper = tl.maximum(upper, 0.0)
        if SYMMETRIC:
            s = fit_scale(tl.maximum(-lower, upper), steps / 2, finite, SCALE)
            z = tl.zeros_like(s)
        else:
            s = fit_scale(upper - lower, steps * 1.0, finite, SCALE)
            z = tl.minimum(tl.maximum(round_even(tl.div_rn(-lower, s)), 0.0), steps)

    if WHOLE:
        decoded = decode(values, s[:, None], z[:, None], minimum, steps)
        store_rounded(out_start + offset[None, :], decoded, inside)
    else:
        for first in range(0, group, WIDTH):
            column = first + offset
            mask = valid[:, None] & (column < group)[None, :] & (start[:, None] + column[None, :] < columns)
            part = tl.load(x_start + (column * x_column)[None, :], mask=mask, other=0.0).to(tl.float32)
            store_rounded(out_start + column[None, :], decode(part, s[:, None], z[:, None], minimum, steps), mask)


@triton.jit
def decode(x: tl.tensor, s: tl.tensor, z: tl.tensor, minimum: tl.constexpr, steps: tl.constexpr) -> tl.tensor:
    """s (q - z), q = clamp(round(x / s) + z, minimum, minimum + steps); NaN where x or s is."""
    codes = tl.minimum(tl.maximum(round_even(tl.div_rn(x, s)) + z, minimum), minimum + steps)
    return tl.where(x == x, (codes - z) * s, x)  # minimum and maximum drop a NaN
