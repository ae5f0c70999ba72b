"""Packing, a program per block of one packed (or unpacked) row: every output element is made from what it overlaps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def pack(codes: Tensor, bits: int) -> Tensor:
    """As `reference.pack`."""
    rows, columns = codes.shape
    size = -(-columns * bits // 8)
    packed = torch.empty(rows, size, dtype=torch.uint8, device=codes.device)
    blocks = triton.cdiv(size, _BLOCK)
    pack_kernel[(rows * blocks,)](
        codes, packed, columns, size, blocks, codes.stride(0), codes.stride(1), BITS=bits, BLOCK=_BLOCK
    )
    return packed


def unpack(packed: Tensor, bits: int, columns: int, signed: bool) -> Tensor:
    """As `reference.unpack`."""
    rows, size = packed.shape
    codes = torch.empty(rows, columns, dtype=torch.int8 if signed else torch.uint8, device=packed.device)
    blocks = triton.cdiv(columns, _BLOCK * (8 // bits if 8 % bits == 0 else 1))
    unpack_kernel[(rows * blocks,)](
        packed, codes, columns, size, blocks, packed.stride(0), packed.stride(1), BITS=bits, SIGNED=signed, BLOCK=_BLOCK
    )
    return codes


@triton.jit
def pack_kernel(
    codes: tl.tensor,
    packed: tl.tensor,
    columns: tl.tensor,
    size: tl.tensor,
    blocks: tl.tensor,
    codes_row: tl.tensor,
    codes_column: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: BLOCK bytes of a row. Byte i holds bits 8i ... 8i + 7, so parts of codes 8i // BITS onwards."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    byte = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < size
    if 8 % BITS == 0:
        per: tl.constexpr = 8 // BITS
        place = tl.arange(0, per)[None, :]
        column = byte[:, None] * per + place
        code = tl.load(codes + row * codes_row + column * codes_column, mask=column < columns, other=0)
        word = tl.sum((code.to(tl.int32) & ((1 << BITS) - 1)) << (place * BITS), axis=1)
    else:
        touched: tl.constexpr = (6 + BITS) // BITS + 1
        word = tl.zeros([BLOCK], tl.int32)
        for place in tl.static_range(touched):
            column = byte * 8 // BITS + place
            code = tl.load(codes + row * codes_row + column * codes_column, mask=inside & (column < columns), other=0)
            code = code.to(tl.int32) & ((1 << BITS) - 1)
            shift = column * BITS - byte * 8  # negative for the first code; beyond 8 it adds nothing to the byte
            word |= tl.where(shift < 0, code >> tl.maximum(-shift, 0), code << tl.minimum(tl.maximum(shift, 0), 8))
    tl.store(packed + row * size + byte, (word & 255).to(tl.uint8), mask=inside)


@triton.jit
def unpack_kernel(
    packed: tl.tensor,
    codes: tl.tensor,
    columns: tl.tensor,
    size: tl.tensor,
    blocks: tl.tensor,
    packed_row: tl.tensor,
    packed_column: tl.tensor,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: BLOCK bytes' worth of codes, or BLOCK codes where a code may lie in two neighbouring bytes."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    start = packed + row * packed_row
    if 8 % BITS == 0:
        per: tl.constexpr = 8 // BITS
        place = tl.arange(0, per)[None, :]
        column = index[:, None] * per + place
        word = tl.load(start + index * packed_column, mask=index < size, other=0).to(tl.int32)
        code = word[:, None] >> (place * BITS)
    else:
        column = index
        byte = column * BITS // 8
        word = tl.load(start + byte * packed_column, mask=byte < size, other=0).to(tl.int32)
        above = tl.load(start + (byte + 1) * packed_column, mask=byte + 1 < size, other=0).to(tl.int32)
        code = (word | (above << 8)) >> (column * BITS % 8)
    code = code & ((1 << BITS) - 1)
    if SIGNED:
        half: tl.constexpr = 1 << (BITS - 1)
        code = (code ^ half) - half
    tl.store(codes + row * columns + column, code.to(codes.dtype.element_ty), mask=column < columns)
