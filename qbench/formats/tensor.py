"""Tensor formats: an element format, the block of elements that shares a scale, and how scales are stored.

Weights are `[out, in]`. A group runs along `in` and never straddles rows. With `group_size` n a row has
ceil(in / n) groups; the last one may be shorter only where `partial_group` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.errors import NumericsError
from qbench.formats.element import Int

if TYPE_CHECKING:
    from qbench.formats.qtensor import QTensor

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PER_CHANNEL, PER_TENSOR = -1, 0


@dataclass(frozen=True)
class Range:
    """Smallest and largest value that a block should represent: float [rows, groups] each, lower <= 0 <= upper."""

    lower: Tensor
    upper: Tensor


@dataclass(frozen=True)
class QParams:
    """Fitted parameters: `scale` float32 [rows, groups] (exactly representable in the format's scale dtype) and
    `zero` float32 [rows, groups] holding integer codes, or None. rows is 1 where the whole tensor shares a scale."""

    scale: Tensor
    zero: Tensor | None


@dataclass(frozen=True, kw_only=True)
class TensorFormat:
    """Uniform integer weights with one scale (and zero point) per tensor (0), row (-1) or group of a row (n > 0)."""

    bits: int
    group_size: int
    symmetric: bool
    scale: str = "float16"
    partial_group: bool = False

    @property
    def element(self) -> Int:
        return Int(self.bits, signed=self.symmetric)

    def fits(self, in_features: int) -> bool:
        return self.group_size <= 0 or self.partial_group or in_features % self.group_size == 0

    def width(self, in_features: int) -> int:
        """Columns per group."""
        return self.group_size if self.group_size > 0 else in_features

    def groups(self, in_features: int) -> int:
        return -(-in_features // self.width(in_features))

    def parameter_bits(self) -> int:
        """Bits that one block's parameters take: the scale and, where there is one, a zero point of `bits` bits."""
        return SCALE_DTYPES[self.scale].itemsize * 8 + (0 if self.symmetric else self.bits)

    def storage_bits(self, out_features: int, in_features: int) -> int:
        """Bits of codes, scales and zero points of one `[out, in]` weight."""
        rows = 1 if self.group_size == PER_TENSOR else out_features
        return out_features * in_features * self.bits + rows * self.groups(in_features) * self.parameter_bits()

    def blocks(self, x: Tensor) -> Tensor:
        """View (a zero-padded copy where the last group is short) of x `[out, in]` as [rows, groups, elements].

        Zeros change no range: every range includes 0.
        """
        if self.group_size == PER_TENSOR:
            return x.reshape(1, 1, -1)
        width, groups = self.width(x.shape[1]), self.groups(x.shape[1])
        missing = groups * width - x.shape[1]
        return (F.pad(x, (0, missing)) if missing else x).reshape(x.shape[0], groups, width)

    def unblocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `blocks`."""
        if self.group_size == PER_TENSOR:
            return blocks.reshape(shape)
        return blocks.reshape(shape[0], -1)[:, : shape[1]]


def extrema(x: Tensor, fmt: TensorFormat) -> Range:
    """Min-max range of every block of x `[out, in]`, extended to include 0 so that the zero point exists."""
    lower, upper = fmt.blocks(x).aminmax(dim=-1)
    return Range(lower.clamp_max(0), upper.clamp_min(0))


def fit(x: Tensor, fmt: TensorFormat, clip: Range | None = None) -> QParams:
    """Scale and zero point of every block of x (float `[out, in]`), from `clip` or from the blocks' extrema.

    Asymmetric: s = (hi - lo) / (2^b - 1), z = round(-lo / s) clamped to codes. Symmetric: s = 2 max|x| / (2^b - 1)
    on codes -2^(b-1) … 2^(b-1)-1, the convention of GPTQ's authors and of compressed-tensors, not max|x| / (2^(b-1)-1).
    The scale is rounded to its storage dtype before anything is encoded with it. A block of zeros gets s = 1.

    Raises NumericsError where the range is not finite or the scale overflows its dtype.
    """
    bounds = clip or extrema(x, fmt)
    lower, upper = bounds.lower.float(), bounds.upper.float()
    spread = 2 * torch.maximum(-lower, upper) if fmt.symmetric else upper - lower
    scale = spread / fmt.element.steps
    stored = scale.to(SCALE_DTYPES[fmt.scale])
    tiny = torch.finfo(stored.dtype).smallest_normal * torch.finfo(stored.dtype).eps  # smallest subnormal
    stored = torch.where((stored == 0) & (scale > 0), torch.full_like(stored, tiny), stored).float()
    if not torch.isfinite(stored).all():
        raise NumericsError(
            f"scale is not finite in {fmt.scale}: largest range {spread.max().item():g}; "
            "NaN or infinite weights, or scale_dtype=float32 is needed"
        )
    stored = torch.where(stored == 0, torch.ones_like(stored), stored)
    if fmt.symmetric:
        return QParams(stored, None)
    return QParams(stored, (-lower / stored).round_().clamp_(0, fmt.element.maximum))


def encode(blocks: Tensor, fmt: TensorFormat, params: QParams) -> Tensor:
    """Codes (as float) of [rows, groups, elements]: nearest, ties to even, saturating."""
    codes = (blocks / params.scale[..., None]).round_()
    if params.zero is not None:
        codes += params.zero[..., None]
    return codes.clamp_(fmt.element.minimum, fmt.element.maximum)


def decode(codes: Tensor, params: QParams) -> Tensor:
    """Values s (q - z) of float codes [rows, groups, elements]; overwrites `codes`."""
    if params.zero is not None:
        codes -= params.zero[..., None]
    return codes.mul_(params.scale[..., None])


def fake_quantize(x: Tensor, fmt: TensorFormat, clip: Range | None = None) -> Tensor:
    """Quantize and decode x (float32 `[out, in]`) without keeping codes: what a search evaluates many times."""
    params = fit(x, fmt, clip)
    return fmt.unblocks(decode(encode(fmt.blocks(x), fmt, params), params), x.shape)


def quantize(x: Tensor, fmt: TensorFormat, params: QParams | None = None) -> QTensor:
    """x (float `[out, in]`) in format `fmt`, round to nearest, with `params` or freshly fitted ones."""
    from qbench.formats.qtensor import QTensor

    params = params or fit(x, fmt)
    codes = fmt.unblocks(encode(fmt.blocks(x.float()), fmt, params), x.shape)
    return QTensor(codes.to(fmt.element.storage), params.scale, params.zero, fmt)
