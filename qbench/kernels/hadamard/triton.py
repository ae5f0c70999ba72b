"""Fast Walsh-Hadamard transform on matrix units: 2^a as M x N and a small dot along each axis.

Butterflies would move the tile through shared memory about a times, two dots with Sylvester matrices do so twice, and
their +-1 are exact in every format. x of 16 bits is exact in TF32 (significands of 8 and 11 bits against 11), so the
first dot loses nothing; the others take float32 apart into two TF32 numbers, which leaves an error of about 2^-22.
One pass over memory where k is at most 64 and a row fits in registers, else two: 2^a, then the base.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.kernels.hadamard.reference import sylvester
from qbench.kernels.triton import store_rounded

_TILE = 16384
"""Most elements of a program's tile: 64 KiB of float32 in registers of 8 warps."""
_LONGEST = 8192
"""Longest 2^a of one program: its two matrices and operands want at most 163 KiB of shared memory (sm_80's)."""
_USUAL_TILE = 4096
_WIDEST_BASE = 64
_SHORTEST = 16
"""Smallest side of a matrix that a dot takes on every device."""


def hadamard(x: Tensor, base: Tensor) -> Tensor:
    """As `reference.hadamard`, for float32, float16 and bfloat16."""
    rows, n = x.shape
    length = n // base.shape[0]
    # Sylvester 2^a = kron(Sylvester 2^(a-c), Sylvester 2^c): what no tile holds, or no dot takes, joins the base.
    if length < _SHORTEST:
        folded, length = length, 1
    else:
        folded, length = max(1, length // _LONGEST), min(length, _LONGEST)
    k = n // length
    matrix = base.to(x.device)
    if folded > 1:
        matrix = torch.kron(matrix, sylvester(folded, matrix))
    matrix = matrix.contiguous()
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    wide = max(_SHORTEST, triton.next_power_of_2(k)) if k > 1 else 1
    if wide <= _WIDEST_BASE and wide * length <= _TILE:
        _transform(x, out, matrix, length, wide, n**-0.5)
    elif length == 1:
        _mix(x, out, matrix, length, n**-0.5)
    else:
        parts = torch.empty(rows, n, dtype=torch.float32, device=x.device)
        _transform(x.contiguous().view(rows * k, length), parts.view(rows * k, length), matrix, length, 1, 1.0)
        _mix(parts, out, matrix, length, n**-0.5)
    return out


def _transform(x: Tensor, out: Tensor, matrix: Tensor, length: int, wide: int, factor: float) -> None:
    """One pass: Sylvester along `length` and, where wide > 1, the base [k, k] padded to [wide, wide]."""
    rows = x.shape[0]
    log = length.bit_length() - 1
    first = 1 if length <= 128 else 1 << (log // 2)
    per = max(1, _USUAL_TILE // (wide * length))  # so that every dot has at least 16 rows
    tile = per * wide * length
    transform_kernel[(triton.cdiv(rows, per),)](
        x,
        out,
        matrix,
        rows,
        x.stride(0),
        x.stride(1),
        factor,
        K=matrix.shape[0] if wide > 1 else 1,
        ROWS=per,
        WIDE=wide,
        FIRST=first,
        SECOND=length // first,
        num_warps=8 if tile >= _USUAL_TILE else 4,
        enable_fp_fusion=True,
    )


def _mix(x: Tensor, out: Tensor, matrix: Tensor, length: int, factor: float) -> None:
    """The base alone: out[r, i, c] = factor * sum_j matrix[i, j] x[r, j, c], x [rows, k * length]."""
    k = matrix.shape[0]
    total = x.shape[0] * length
    block = 64 if total > 32 else _SHORTEST
    mix_kernel[(triton.cdiv(total, block), triton.cdiv(k, 64))](
        x,
        out,
        matrix,
        total,
        x.stride(0),
        x.stride(1),
        factor,
        K=k,
        LENGTH=length,
        BLOCK_M=block,
        BLOCK_N=64,
        BLOCK_K=32,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=True,
    )


@triton.jit
def dot_signs(y: tl.tensor, signs: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    """y times a matrix of +-1 and 0 in float32 precision, by TF32 (one product where y is EXACT in TF32, else two)."""
    if EXACT:
        return tl.dot(y, signs, input_precision="tf32")
    else:  # noqa: RET505
        # The first 10 bits of the significand; the remaining 13 are a number of their own, of which TF32 keeps 11.
        high = (y.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
        return tl.dot(high, signs, tl.dot(y - high, signs, input_precision="tf32"), input_precision="tf32")


@triton.jit
def sylvester_tile(N: tl.constexpr) -> tl.tensor:
    """float32 [N, N], N <= 256: -1 where i and j have an odd number of ones in common."""
    both = tl.arange(0, N)[:, None] & tl.arange(0, N)[None, :]
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return (1 - 2 * (both & 1)).to(tl.float32)


@triton.jit
def transform_kernel(
    x: tl.tensor,
    out: tl.tensor,
    matrix: tl.tensor,
    rows: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    factor: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
) -> None:
    """One program: ROWS rows, each [WIDE, FIRST, SECOND], of which [K, FIRST, SECOND] exist."""
    index = tl.arange(0, ROWS * WIDE * FIRST)
    row = (tl.program_id(0) * ROWS + index // (WIDE * FIRST)).to(tl.int64)
    part = index // FIRST % WIDE
    column = (part * FIRST + index % FIRST) * SECOND
    within = tl.arange(0, SECOND)
    mask = ((row < rows) & (part < K))[:, None] & (within < SECOND)[None, :]
    loaded = tl.load(x + (row * x_row + column * x_column)[:, None] + (within * x_column)[None, :], mask=mask, other=0)
    y = loaded.to(tl.float32)
    exact: tl.constexpr = x.dtype.element_ty != tl.float32
    if SECOND > 1:
        y = dot_signs(y, sylvester_tile(SECOND), exact)
    if FIRST > 1:
        y = tl.permute(tl.reshape(y, (ROWS * WIDE, FIRST, SECOND)), (0, 2, 1))
        y = tl.reshape(y, (ROWS * WIDE * SECOND, FIRST))
        y = dot_signs(y, sylvester_tile(FIRST), False)
        y = tl.permute(tl.reshape(y, (ROWS * WIDE, SECOND, FIRST)), (0, 2, 1))
    if WIDE > 1:
        i = tl.arange(0, WIDE)
        transposed = tl.load(matrix + i[None, :] * K + i[:, None], mask=(i < K)[None, :] & (i < K)[:, None], other=0)
        y = tl.permute(tl.reshape(y, (ROWS, WIDE, FIRST * SECOND)), (0, 2, 1))
        y = tl.reshape(y, (ROWS * FIRST * SECOND, WIDE))
        y = dot_signs(y, transposed.to(tl.float32), exact and SECOND == 1)
        y = tl.permute(tl.reshape(y, (ROWS, FIRST * SECOND, WIDE)), (0, 2, 1))
    y = tl.reshape(y, (ROWS * WIDE * FIRST, SECOND)) * factor
    store_rounded(out + (row * (K * FIRST * SECOND) + column)[:, None] + within[None, :], y, mask)


@triton.jit
def mix_kernel(
    x: tl.tensor,
    out: tl.tensor,
    matrix: tl.tensor,
    total: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    factor: tl.tensor,
    K: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """A matrix product whose rows are the pairs (r, c) of x [r, j, c] and whose columns are i."""
    pair = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (pair // LENGTH).to(tl.int64)
    position = pair % LENGTH
    i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        inside = (pair < total)[:, None] & (j < K)[None, :]
        offset = (row * x_row + position * x_column)[:, None] + (j * LENGTH * x_column)[None, :]
        values = tl.load(x + offset, mask=inside, other=0).to(tl.float32)
        weights = tl.load(matrix + i[None, :] * K + j[:, None], mask=(i < K)[None, :] & (j < K)[:, None], other=0)
        y += dot_signs(values, weights.to(tl.float32), x.dtype.element_ty != tl.float32)
    mask = (pair < total)[:, None] & (i < K)[None, :]
    offset = (row * (K * LENGTH) + position)[:, None] + (i * LENGTH)[None, :]
    store_rounded(out + offset, y * factor, mask)
