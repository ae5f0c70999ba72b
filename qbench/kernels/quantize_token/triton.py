"""Per-token quantization in one kernel: a program reads its tokens once (twice where they are very wide)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.kernels.quantize_token.reference import EXTENT
from qbench.kernels.triton import all_finite, fit_scale, round_even

_WIDEST = 8192
"""Features of a token kept in registers; wider tokens are read twice, the second time mostly from cache."""
_TILE = 4096
"""Elements per program where tokens are narrow."""


def quantize_token(x: Tensor, code: str) -> tuple[Tensor, Tensor]:
    """As `reference.quantize_token`, bit for bit."""
    tokens, features = x.shape
    # float8 codes are written as bytes: Triton has no such cast for devices before sm_89, nor a correct one on the CPU.
    codes = torch.empty(tokens, features, dtype=torch.int8 if code == "int8" else torch.uint8, device=x.device)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    width = min(triton.next_power_of_2(features), _WIDEST)
    rows = min(max(1, _TILE // width), triton.next_power_of_2(tokens))
    quantize_token_kernel[(triton.cdiv(tokens, rows),)](
        x,
        codes,
        scale,
        tokens,
        features,
        x.stride(0),
        x.stride(1),
        EXTENT=EXTENT[code],
        FLOAT8=code != "int8",
        ROWS=rows,
        WIDTH=width,
        WHOLE=width >= features,
        num_warps=8 if rows * width > _TILE else 4,
        enable_fp_fusion=False,
    )
    return codes.view(getattr(torch, code)), scale


@triton.jit
def quantize_token_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    EXTENT: tl.constexpr,
    FLOAT8: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """One program: ROWS tokens, WIDTH features at a time."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    valid = row < tokens
    column = tl.arange(0, WIDTH)
    x_start = x + (row * x_row)[:, None]
    codes_start = codes + (row * features)[:, None]
    inside = valid[:, None] & (column < features)[None, :]
    if WHOLE:
        values = tl.load(x_start + (column * x_column)[None, :], mask=inside, other=0.0).to(tl.float32)
        largest = tl.max(tl.abs(values), axis=1)
        finite = all_finite(values, 1)
    else:
        largest = tl.zeros([ROWS], tl.float32)
        finite = valid | True
        for first in range(0, features, WIDTH):
            mask = valid[:, None] & (first + column < features)[None, :]
            part = tl.load(x_start + ((first + column) * x_column)[None, :], mask=mask, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(part), axis=1))
            finite = finite & all_finite(part, 1)
    extent = tl.zeros_like(largest) + EXTENT
    s = fit_scale(largest, extent, finite, "float32")
    tl.store(scale + row, s, mask=valid)
    if WHOLE:
        tl.store(codes_start + column[None, :], encode(values, s[:, None], FLOAT8), mask=inside)
    else:
        for first in range(0, features, WIDTH):
            mask = valid[:, None] & (first + column < features)[None, :]
            part = tl.load(x_start + ((first + column) * x_column)[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(codes_start + (first + column)[None, :], encode(part, s[:, None], FLOAT8), mask=mask)


@triton.jit
def encode(x: tl.tensor, s: tl.tensor, FLOAT8: tl.constexpr) -> tl.tensor:
    """Codes of x / s; 0 where s is NaN."""
    levels = tl.where(s == s, tl.div_rn(x, s), 0.0)
    if FLOAT8:
        return float8_bits(levels)
    else:  # noqa: RET505
        return round_even(tl.minimum(tl.maximum(levels, -128.0), 127.0)).to(tl.int8)


@triton.jit
def float8_bits(x: tl.tensor) -> tl.tensor:
    """Bytes (uint8) of the nearest float8_e4m3fn to finite float32 x, ties to even, saturating at 448.

    From 2^-6 on, rounding float32's 23 bits of mantissa to 3 is integer addition (the carry moves the exponent on), and
    exponents differ by the biases, 127 - 7. Below, steps are 2^-9, which is float32's spacing at 2^14.
    """
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(magnitude < 0.015625, subnormal, normal) | sign).to(tl.uint8)
