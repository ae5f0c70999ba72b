"""Codes of 2 to 8 bits to bytes and back."""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.errors import SpecError
from qbench.kernels.backend import Backend, choose
from qbench.kernels.pack import reference

CODES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int, *, backend: Backend | None = None) -> Tensor:
    """uint8 [rows, ceil(columns * bits / 8)] of codes [rows, columns]: every row is one little-endian string of bits.

    Code j lies in bits j*b ... j*b + b - 1 of the row, the lowest bit of byte 0 first, so that of two 4-bit codes in
    a byte the low nibble is the earlier; the last byte is filled up with zeros. Only the low `bits` of a code are kept:
    int8 codes in two's complement, uint8 as they are; float8 codes (8 bits only) as their bytes.

    Raises SpecError for another dtype or number of bits; a code out of range is not looked for.
    """
    _check(codes.dtype, bits)
    if codes.dim() != 2:
        raise SpecError("pack shape", tuple(codes.shape), "codes need 2 axes")
    if codes.numel() == 0:
        size = (codes.shape[0], packed_bytes(codes.shape[1], bits))
        return torch.empty(size, dtype=torch.uint8, device=codes.device)
    raw = codes.view(torch.uint8)
    if choose(backend, codes) == "triton":
        from qbench.kernels.pack import triton

        return triton.pack(raw, bits)
    return reference.pack(raw, bits)


def unpack(packed: Tensor, bits: int, columns: int, dtype: torch.dtype, *, backend: Backend | None = None) -> Tensor:
    """Codes [rows, columns] of `dtype` from what `pack` made: its exact inverse for codes in range.

    Raises SpecError for a dtype or number of bits that `pack` refuses and for rows of another length.
    """
    _check(dtype, bits)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != packed_bytes(columns, bits):
        raise SpecError(
            "packed",
            f"{packed.dtype} {list(packed.shape)}",
            f"{columns} columns of {bits} bits are uint8 [rows, {packed_bytes(columns, bits)}]",
        )
    if packed.numel() == 0:
        return torch.empty(packed.shape[0], columns, dtype=dtype, device=packed.device)
    signed = dtype == torch.int8
    if choose(backend, packed) == "triton":
        from qbench.kernels.pack import triton

        return triton.unpack(packed, bits, columns, signed).view(dtype)
    return reference.unpack(packed, bits, columns, signed).view(dtype)


def _check(dtype: torch.dtype, bits: int) -> None:
    if dtype not in CODES:
        raise SpecError("codes dtype", dtype, f"accepted: {', '.join(map(str, CODES))}")
    if not 2 <= bits <= 8:
        raise SpecError("bits", bits, "accepted: 2 to 8")
    if dtype.is_floating_point and bits != 8:
        raise SpecError("bits", bits, f"{dtype} codes: accepted: 8")
