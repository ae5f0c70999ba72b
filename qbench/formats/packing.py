"""A quantized tensor as the bytes it takes, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.errors import NumericsError
from qbench.formats.element import Element
from qbench.formats.qtensor import QTensor
from qbench.formats.tensor import TensorFormat

#: Base-3 digits of a byte: 3^5 = 243.
TERNARY_PER_BYTE = 5


@dataclass(frozen=True)
class Packed:
    """What a tensor of `shape` (rows, columns) takes in `format`: bytes (uint8, one axis) by part, None where there is
    none.

    codes: row by row without a gap, in a little-endian string of bits, the lowest bits of a byte first; ternary ones
    five to a byte, base 3, the first the least. scales: [block rows, groups] as their format stores them, a float or an
    8-bit code each. zeros: the same for zero points, integers in the element's bits, others as float16. outer: what
    gives scale codes their meaning. order: int32 each, see `QTensor`; none where no two columns of a row differ in
    scale. Numbers are little-endian.
    """

    format: TensorFormat
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    outer: Tensor | None = None
    order: Tensor | None = None

    @property
    def parts(self) -> dict[str, Tensor]:
        """Parts that there are, by name."""
        names = ("codes", "scales", "zeros", "outer", "order")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    @property
    def bytes(self) -> int:
        return sum(part.numel() for part in self.parts.values())


def pack(tensor: QTensor) -> Packed:
    """`unpack` makes the same QTensor of it, bit for bit, as long as the tensor's scales and zero points are what its
    format can store, which those of `fit` are. `8 * bytes` is `tensor.storage_bits()` but for the last byte of codes
    and zero points.

    Raises NumericsError where a scale or zero point isn't what the format stores, and for codes in another basis.
    """
    fmt = tensor.format
    if tensor.basis is not None:
        raise NumericsError(f"codes in a rotated basis ({fmt.label}, algo=quip) cannot be packed: no reader knows it")
    rows, columns = tensor.codes.shape
    outer = None
    if tensor.scale_codes is not None:
        scales = tensor.scale_codes
        if tensor.outer is not None:
            outer = _stored(tensor.outer, fmt.scale.dtype_outer, "outer scale", fmt)
    elif fmt.scale.dtype_stored == torch.uint8:
        raise NumericsError(f"scales without codes, which {fmt.scale.name} scales are stored as ({fmt.label})")
    else:
        scales = _stored(tensor.scale, fmt.scale.dtype_stored, "scale", fmt)
    zeros = None
    if tensor.zero is not None:
        if fmt.zero == "int":
            zeros = pack_codes(_stored(tensor.zero, torch.uint8, "zero point", fmt), fmt.element)
        else:
            zeros = _bytes(_stored(tensor.zero, torch.float16, "zero point", fmt))
    grouped = tensor.order is not None and fmt.block.columns > 0
    return Packed(
        format=fmt,
        shape=(rows, columns),
        codes=pack_codes(tensor.codes, fmt.element),
        scales=_bytes(scales),
        zeros=zeros,
        outer=None if outer is None else _bytes(outer),
        order=_bytes(tensor.order.to(torch.int32)) if grouped else None,
    )


def unpack(packed: Packed) -> QTensor:
    """Inverse of `pack`."""
    fmt, shape = packed.format, packed.shape
    grid = fmt.grid(shape)
    scale = _values(packed.scales, fmt.scale.dtype_stored).view(grid)
    scale_codes = outer = zero = None
    if packed.outer is not None:
        outer = _values(packed.outer, fmt.scale.dtype_outer).float().view(fmt.scale.shape_outer(*grid))
    if fmt.scale.dtype_stored == torch.uint8:
        scale_codes = scale
        scale = fmt.scale.value(scale_codes, outer, grid)
    if packed.zeros is not None and fmt.zero == "int":
        zero = unpack_codes(packed.zeros, fmt.element, math.prod(grid)).view(grid)
    elif packed.zeros is not None:
        zero = _values(packed.zeros, torch.float16).view(grid)
    return QTensor(
        codes=unpack_codes(packed.codes, fmt.element, math.prod(shape)).view(shape),
        scale=scale.float(),
        zero=None if zero is None else zero.float(),
        format=fmt,
        order=None if packed.order is None else _values(packed.order, torch.int32).long(),
        scale_codes=scale_codes,
        outer=outer,
    )


def pack_codes(codes: Tensor, element: Element) -> Tensor:
    """uint8 [bytes] of codes (the element's storage dtype, any shape) one after the other."""
    flat = codes.reshape(-1)
    if element.bits != int(element.bits):
        digits = F.pad(flat, (0, -len(flat) % TERNARY_PER_BYTE)).view(-1, TERNARY_PER_BYTE)
        total = torch.zeros(len(digits), dtype=torch.uint8, device=codes.device)
        for place in reversed(range(TERNARY_PER_BYTE)):
            total = total * 3 + digits[:, place]
        return total
    bits = int(element.bits)
    # A byte of an 8-bit code shifted left loses what belongs to the next byte by itself.
    flat = flat.view(torch.uint8) if bits <= 8 else flat.to(torch.int32) & 0xFFFF
    if bits == 8:
        return flat.clone()
    per, size = _period(bits)
    padded = F.pad(flat, (0, -len(flat) % per)).view(-1, per)
    if bits < 8:
        padded = padded & ((1 << bits) - 1)
    found = torch.zeros(len(padded), size, dtype=padded.dtype, device=codes.device)
    for place, byte, shift in _overlaps(bits):
        found[:, byte] |= padded[:, place] << shift if shift >= 0 else padded[:, place] >> -shift
    length = -(-len(flat) * bits // 8)
    return (found if bits < 8 else found & 255).to(torch.uint8).view(-1)[:length].clone()


def unpack_codes(packed: Tensor, element: Element, count: int) -> Tensor:
    """The first `count` codes, in the element's storage dtype, of what `pack_codes` made."""
    if element.bits != int(element.bits):
        digits = torch.stack([packed // 3**place % 3 for place in range(TERNARY_PER_BYTE)], dim=1)
        return digits.view(-1)[:count].clone()
    bits = int(element.bits)
    if bits == 8:
        return packed.clone().view(element.storage)
    per, size = _period(bits)
    padded = F.pad(packed, (0, -len(packed) % size)).view(-1, size)
    if bits > 8:
        padded = padded.to(torch.int32)
    found = torch.zeros(len(padded), per, dtype=padded.dtype, device=packed.device)
    for place, byte, shift in _overlaps(bits):
        found[:, place] |= padded[:, byte] >> shift if shift >= 0 else padded[:, byte] << -shift
    flat = (found & ((1 << bits) - 1)).view(-1)[:count]
    if element.storage != torch.int8:
        return flat.to(element.storage, copy=True)
    # The sign bit flipped and its weight taken off: the upper half becomes negative.
    half = 1 << (bits - 1)
    return (flat ^ half).view(torch.int8) - half


def _period(bits: int) -> tuple[int, int]:
    """Fewest (codes, bytes) that fill each other."""
    common = math.lcm(bits, 8)
    return common // bits, common // 8


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """(code, byte, shift) of every code and byte of a period that share bits: code << shift lies in the byte."""
    per, size = _period(bits)
    return [
        (place, byte, place * bits - 8 * byte)
        for place in range(per)
        for byte in range(size)
        if place * bits < 8 * (byte + 1) and 8 * byte < (place + 1) * bits
    ]


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8).reshape(-1).clone()


def _values(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `_bytes`; a copy, since a view of a file's bytes need not lie where numbers of `dtype` may."""
    return part.clone().view(dtype)


def _stored(values: Tensor, dtype: torch.dtype, what: str, fmt: TensorFormat) -> Tensor:
    """`values` (float32) in the dtype that stores them exactly; NumericsError where that changes one."""
    stored = values.to(dtype)
    if not torch.equal(stored.to(values.dtype), values):
        raise NumericsError(f"{what} not representable in {dtype}, which {fmt.label} stores")
    return stored
