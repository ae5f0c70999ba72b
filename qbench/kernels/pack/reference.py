"""The definition of packing, on any device; see the package for the order of bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _period(bits: int) -> tuple[int, int]:
    """Smallest (codes, bytes) that fill each other: (2, 1) for 4 bits, (8, 3) for 3, (4, 3) for 6."""
    common = math.lcm(bits, 8)
    return common // bits, common // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns], whose low bits count, to uint8 [rows, ceil(columns * bits / 8)]."""
    rows, columns = codes.shape
    if bits == 8:
        return codes.clone(memory_format=torch.contiguous_format)
    per, size = _period(bits)
    blocks = -(-columns // per)
    padded = F.pad(codes, (0, blocks * per - columns)) if columns % per else codes
    padded = (padded & ((1 << bits) - 1)).reshape(rows, blocks, per)
    words = torch.zeros(rows, blocks, dtype=torch.uint8 if size == 1 else torch.int64, device=codes.device)
    for place in range(per):  # at most 8
        words |= padded[..., place].to(words.dtype) << (place * bits)
    if size == 1:
        return words
    # At most 56 bits, so that a signed word holds them and its first bytes, lowest first, are the string.
    parts = torch.stack([(words >> (8 * place)) & 255 for place in range(size)], dim=-1).to(torch.uint8)
    return parts.reshape(rows, blocks * size)[:, : -(-columns * bits // 8)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int, signed: bool) -> Tensor:
    """uint8 (int8 where signed) [rows, columns]."""
    if bits == 8:
        codes = packed.clone(memory_format=torch.contiguous_format)
        return codes.view(torch.int8) if signed else codes
    rows = packed.shape[0]
    per, size = _period(bits)
    blocks = -(-columns // per)
    parts = F.pad(packed, (0, blocks * size - packed.shape[1])).reshape(rows, blocks, size)
    words = torch.zeros(rows, blocks, dtype=torch.uint8 if size == 1 else torch.int64, device=packed.device)
    for place in range(size):
        words |= parts[..., place].to(words.dtype) << (8 * place)
    mask = (1 << bits) - 1
    codes = torch.empty(rows, blocks, per, dtype=torch.uint8, device=packed.device)
    for place in range(per):
        codes[..., place] = (words >> (place * bits)) & mask
    codes = codes.reshape(rows, blocks * per)[:, :columns].contiguous()
    if not signed:
        return codes
    # Flip the sign bit and take its weight off again: the upper half becomes negative.
    half = 1 << (bits - 1)
    return codes.bitwise_xor_(half).view(torch.int8).sub_(half)
