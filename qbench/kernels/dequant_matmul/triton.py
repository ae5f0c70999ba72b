"""Product with a packed weight: one kernel for a single token, bound by reading the weight, one for many tokens.

Both turn a code u into u - z by arithmetic on bits: the float32 with bits 0x4B000000 + u is 2^23 + u, from which
2^23 + z is subtracted exactly; that is a logical operation and an addition, where a conversion of integers runs at a
fraction of that rate. A signed code is read as u = code + 2^(bits-1) by flipping its highest bit, with z = 2^(bits-1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from qbench.kernels.backend import interpreted
from qbench.kernels.triton import store_rounded

_CHUNK = 128
"""Columns that share a scale in the kernel for one token; groups that are no multiple of a smaller power of two >= 32
go to the other kernel."""
_PROGRAMS = 512
"""Programs that keep a device of some 130 multiprocessors busy: fewer rows (or a part of `in`) each until reached."""


def dequant_matmul(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    """As `reference.dequant_matmul`; sums run in another order."""
    columns = x.shape[1]
    one_group = group_size == -1 or group_size >= columns
    group = triton.cdiv(columns, _CHUNK) * _CHUNK if one_group else group_size
    chunk = min(_CHUNK, group & -group)
    if x.shape[0] == 1 and chunk >= 32:
        return _vector(x, packed, scale, zero, bits, group, chunk)
    return _matrix(x, packed, scale, zero, bits, group)


def _vector(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, chunk: int) -> Tensor:
    rows, columns = packed.shape[0], x.shape[1]
    y = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    chunks = triton.cdiv(columns, chunk)
    size = chunk * bits // 8
    per_program = max(1, min(8, triton.next_power_of_2(rows // _PROGRAMS)))
    vector_kernel[(triton.cdiv(rows, per_program),)](
        x,
        packed,
        scale,
        scale if zero is None else zero,
        y,
        rows,
        columns,
        packed.shape[1],
        chunks,
        x.stride(1),
        packed.stride(0),
        packed.stride(1),
        scale.stride(0),
        scale.stride(1),
        *((0, 0) if zero is None else zero.stride()),
        BITS=bits,
        SIGNED=zero is None,
        PER_GROUP=group // chunk,
        CHUNK=chunk,
        ROWS=per_program,
        # 4 KiB of codes in flight per program; several programs share a multiprocessor.
        CHUNKS=min(triton.next_power_of_2(chunks), max(1, 4096 // (per_program * size))),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return y


def _matrix(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int) -> Tensor:
    (tokens, columns), rows = x.shape, packed.shape[0]
    per = 8 // bits
    if per == 2:
        # Even columns, then odd ones: low and high nibbles meet contiguous vectors of x.
        x = F.pad(x, (0, columns % 2)).view(tokens, -1, 2).permute(2, 0, 1).contiguous()
    else:
        x = x[None]
    block_m = min(128, max(16, triton.next_power_of_2(tokens)))
    block_n = 64 if block_m < 64 else 128
    size = 32 if bits == 4 else 64
    aligned = group % (size * per) == 0 and columns % group == 0
    # An odd group starts or ends within a byte, which both neighbours then read.
    per_group = (
        triton.cdiv(group // per + (group % per), size) if group % per == 0 else triton.cdiv(group // per + 1, size)
    )
    steps = triton.cdiv(columns, group) * per_group
    tiles = triton.cdiv(tokens, block_m) * triton.cdiv(rows, block_n)
    splits = max(1, min(steps, _PROGRAMS // 2 // tiles))
    y = torch.empty(splits, tokens, rows, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    matrix_kernel[(tiles, splits)](
        x,
        packed,
        scale,
        scale if zero is None else zero,
        y,
        tokens,
        rows,
        columns,
        group,
        steps,
        triton.cdiv(steps, splits),
        *x.stride(),
        packed.stride(0),
        packed.stride(1),
        scale.stride(0),
        scale.stride(1),
        *((0, 0) if zero is None else zero.stride()),
        BITS=bits,
        SIGNED=zero is None,
        ALIGNED=aligned,
        PER_GROUP=per_group,
        # Triton's CPU interpreter multiplies the raw bits of bfloat16 operands.
        OPERAND=tl.float32
        if x.dtype == torch.float32 or interpreted()
        else tl.bfloat16
        if x.dtype == torch.bfloat16
        else tl.float16,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SIZE=size,
        num_warps=8 if block_m * block_n > 8192 else 4,
        num_stages=3,
        enable_fp_fusion=True,
    )
    return y[0] if splits == 1 else y.sum(0).to(x.dtype)


@triton.jit
def level(
    codes: tl.tensor, zero: tl.tensor, SHIFT: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr
) -> tl.tensor:
    """float32 u - zero for the BITS bits from SHIFT on of int32 `codes`."""
    flip: tl.constexpr = 0x4B000000 + ((1 << (BITS - 1)) if SIGNED else 0)
    bits = ((codes >> SHIFT) & ((1 << BITS) - 1)) ^ flip
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + zero)


@triton.jit
def vector_kernel(
    x: tl.tensor,
    packed: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    packed_bytes: tl.tensor,
    chunks: tl.tensor,
    x_column: tl.tensor,
    packed_row: tl.tensor,
    packed_column: tl.tensor,
    scale_row: tl.tensor,
    scale_group: tl.tensor,
    zero_row: tl.tensor,
    zero_group: tl.tensor,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """One program: ROWS outputs; every step takes CHUNKS chunks of CHUNK columns, each within one group."""
    per: tl.constexpr = 8 // BITS
    size: tl.constexpr = CHUNK // per
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    exists = row < rows
    total = tl.zeros((ROWS, CHUNKS, size), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        byte = chunk[:, None] * size + tl.arange(0, size)[None, :]
        mask = exists[:, None, None] & (byte < packed_bytes)[None, :, :]
        pointers = packed + (row * packed_row)[:, None, None] + (byte * packed_column)[None, :, :]
        codes = tl.load(pointers, mask=mask, other=0).to(tl.int32)
        pair = exists[:, None] & (chunk < chunks)[None, :]
        group = (chunk // PER_GROUP)[None, :]
        s = tl.load(scale + (row * scale_row)[:, None] + group * scale_group, mask=pair, other=0).to(tl.float32)
        if SIGNED:
            z = tl.full((ROWS, CHUNKS), 1 << (BITS - 1), tl.float32)
        else:
            z = tl.load(zero + (row * zero_row)[:, None] + group * zero_group, mask=pair, other=0).to(tl.float32)
        z = z[:, :, None]
        column = byte[:, :, None] * per + tl.arange(0, per)[None, None, :]
        values = tl.load(x + column * x_column, mask=column < columns, other=0).to(tl.float32)
        if per == 2:
            even, odd = tl.split(values)
            product = level(codes, z, 0, BITS, SIGNED) * even[None, :, :]
            product += level(codes, z, 4, BITS, SIGNED) * odd[None, :, :]
        else:
            product = level(codes, z, 0, BITS, SIGNED) * tl.reshape(values, (CHUNKS, size))[None, :, :]
        total += product * s[:, :, None]
    store_rounded(y + row, tl.sum(tl.sum(total, axis=2), axis=1), exists)


@triton.jit
def matrix_kernel(
    x: tl.tensor,
    packed: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    group: tl.tensor,
    steps: tl.tensor,
    steps_each: tl.tensor,
    x_parity: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    packed_row: tl.tensor,
    packed_column: tl.tensor,
    scale_row: tl.tensor,
    scale_group: tl.tensor,
    zero_row: tl.tensor,
    zero_group: tl.tensor,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PER_GROUP: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """One program: a tile of y [splits, tokens, out] over its share of the steps; a step is SIZE bytes of one group."""
    per: tl.constexpr = 8 // BITS
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    token = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_exists = (token < tokens)[:, None]
    exists = row < rows
    x_start = x + (token.to(tl.int64) * x_row)[:, None]
    packed_start = packed + (row.to(tl.int64) * packed_row)[None, :]
    split = tl.program_id(1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * steps_each, tl.minimum((split + 1) * steps_each, steps)):
        index = step // PER_GROUP
        start = index * group
        stop = tl.minimum(start + group, columns)
        byte = start // per + (step % PER_GROUP) * SIZE + tl.arange(0, SIZE)
        s = tl.load(scale + row * scale_row + index * scale_group, mask=exists, other=0).to(tl.float32)
        if SIGNED:
            z = tl.full((BLOCK_N,), 1 << (BITS - 1), tl.float32)
        else:
            z = tl.load(zero + row * zero_row + index * zero_group, mask=exists, other=0).to(tl.float32)
        codes_mask = exists[None, :]
        if not ALIGNED:
            codes_mask = codes_mask & (byte * per < stop)[:, None]
        codes = tl.load(packed_start + (byte * packed_column)[:, None], mask=codes_mask, other=0).to(tl.int32)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for parity in tl.static_range(per):
            mask = token_exists
            if not ALIGNED:
                column = byte * per + parity
                mask = mask & ((column >= start) & (column < stop))[None, :]
            values = tl.load(x_start + parity * x_parity + (byte * x_column)[None, :], mask=mask, other=0).to(OPERAND)
            # Exact: integers of magnitude at most 255.
            weights = level(codes, z[None, :], parity * BITS, BITS, SIGNED).to(OPERAND)
            product = tl.dot(values, weights, product, input_precision="tf32x3")
        total += product * s[None, :]
    pointers = y + ((split.to(tl.int64) * tokens + token) * rows)[:, None] + row[None, :]
    store_rounded(pointers, total, token_exists & exists[None, :])
