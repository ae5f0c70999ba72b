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
    blocks = triton.cdiv(columns, _BLOCK)
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
    """Byte i holds bits 8i ... 8i + 7: those of codes 8i // BITS onwards, of which it touches at most `touched`."""
    touched: tl.constexpr = 8 // BITS if 8 % BITS == 0 else (6 + BITS) // BITS + 1
    row = (tl.program_id(0) // blocks).to(tl.int64)
    byte = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < size
    first = byte * 8 // BITS
    word = tl.zeros([BLOCK], tl.int32)
    for place in tl.static_range(touched):
        column = first + place
        code = tl.load(codes + row * codes_row + column * codes_column, mask=inside & (column < columns), other=0)
        code = code.to(tl.int32) & ((1 << BITS) - 1)
        shift = column * BITS - byte * 8
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
    """Code j lies in at most two neighbouring bytes, from bit j * BITS on."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    bit = column * BITS
    start = packed + row * packed_row
    word = tl.load(start + (bit // 8) * packed_column, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:
        next_byte = bit // 8 + 1
        above = tl.load(start + next_byte * packed_column, mask=inside & (next_byte < size), other=0)
        word |= above.to(tl.int32) << 8
    code = (word >> (bit % 8)) & ((1 << BITS) - 1)
    if SIGNED:
        half: tl.constexpr = 1 << (BITS - 1)
        code = (code ^ half) - half
    tl.store(codes + row * columns + column, code.to(codes.dtype.element_ty), mask=inside)
