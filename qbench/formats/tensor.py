"""Tensor formats: an element format, the block of elements that shares a scale, and how scales are stored.

Tensors are 2-D: weights `[out, in]`, activations `[tokens, features]`, cached keys and values `[tokens, head_dim]` of
one head. One idea covers every granularity: blocks of `rows` x `columns` elements share a scale, 0 meaning the whole
axis. Blocks at the lower and right edge may be smaller only where `partial` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.formats.element import Codebook, Element, Int
from qbench.formats.ranges import Range, RangeFit, extrema, find_range
from qbench.formats.scale import FLOAT16, SCALES, FloatScale, ScaleFormat

if TYPE_CHECKING:
    from qbench.formats.qtensor import QTensor

PER_CHANNEL, PER_TENSOR = -1, 0

Zero = Literal["none", "int", "float"]


@dataclass(frozen=True)
class Block:
    """Elements that share a scale; 0: the whole axis. Tensor (0, 0), row, token or channel (1, 0), group (1, n), tile
    (r, c), column (0, 1), head (1, head_dim) or (0, head_dim)."""

    rows: int = 1
    columns: int = 0

    @property
    def label(self) -> str:
        match (self.rows, self.columns):
            case (0, 0):
                return "tensor"
            case (1, 0):
                return "channel"
            case (0, 1):
                return "column"
            case (1, n):
                return f"g{n}"
        return f"{self.rows or 'all'}x{self.columns or 'all'}"


@dataclass(frozen=True)
class QParams:
    """Fitted parameters, [rows, groups] each: `scale` float32, exactly what the format stores; `zero` float32 (integers
    or, with a float zero point, what its dtype holds) or None. `scale_codes` and `outer`: how the scale is stored,
    where that is not itself (see `Stored`)."""

    scale: Tensor
    zero: Tensor | None
    scale_codes: Tensor | None = None
    outer: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TensorFormat:
    """What a quantized tensor consists of. `name` is a published format's; `range` is how ranges are fitted."""

    element: Element
    block: Block = Block()
    zero: Zero = "none"
    scale: ScaleFormat = FLOAT16
    partial: bool = field(default=False, compare=False)  # what is allowed, not what is computed
    range: RangeFit = field(default_factory=RangeFit)
    name: str | None = field(default=None, compare=False)

    @property
    def group_size(self) -> int:
        """Columns per scale; -1 for a whole row, 0 for the whole tensor."""
        return {(0, 0): PER_TENSOR, (1, 0): PER_CHANNEL}.get((self.block.rows, self.block.columns), self.block.columns)

    @property
    def tiled(self) -> bool:
        """Whether some but not all rows share a scale: then a group size does not describe it."""
        return self.block.rows > 1

    @property
    def bits(self) -> float:
        return self.element.bits

    @property
    def symmetric(self) -> bool:
        return self.zero == "none"

    @property
    def by_row(self) -> bool:
        """Whether rows share nothing: neither a scale nor what scales are stored with."""
        return self.block.rows == 1 and self.scale.by_row

    @cached_property
    def label(self) -> str:
        """Short name such as `int4_g64_asym` or `nvfp4`."""
        if self.name is not None:
            return self.name
        zero = {"none": "sym", "int": "asym", "float": "asym-float"}[self.zero]
        words = [self.element.name, self.block.label, *([zero] if isinstance(self.element, Int) else [])]
        if isinstance(self.element, Int) and self.symmetric and self.element.reach != "midpoint":
            words.append(self.element.reach)
        if not isinstance(self.scale, FloatScale):
            words.append(self.scale.name)
        if self.range.method != ("absmean" if self.element.name == "ternary" else "minmax"):
            words.append(self.range.method)
        return "_".join(words)

    def fits(self, columns: int, rows: int | None = None) -> bool:
        """Whether blocks tile a tensor of that many columns (and rows) without a rest, or may leave one."""
        down = rows is None or self.block.rows <= 1 or rows % self.block.rows == 0
        return self.partial or (down and (self.block.columns == 0 or columns % self.block.columns == 0))

    def width(self, columns: int) -> int:
        """Columns per block."""
        return self.block.columns or columns

    def groups(self, columns: int) -> int:
        return -(-columns // self.width(columns))

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Number of blocks down and across a tensor [rows, columns]."""
        return -(-shape[0] // (self.block.rows or shape[0])), self.groups(shape[1])

    def block_sizes(self, shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
        """Number of elements of every block, float32 [rows, groups]."""
        down, across = self.grid(shape)
        height, width = self.block.rows or shape[0], self.width(shape[1])
        tall = (shape[0] - height * torch.arange(down, device=device)).clamp_max(height)
        wide = (shape[1] - width * torch.arange(across, device=device)).clamp_max(width)
        return (tall[:, None] * wide[None, :]).float()

    def storage_bits(self, out_features: int, in_features: int) -> int:
        """Bits of codes, scales and zero points of one tensor: exactly what packing writes, but for a last byte."""
        down, across = self.grid((out_features, in_features))
        zeros = 0
        if self.zero == "int":
            zeros = down * across * self.element.bits
        elif self.zero == "float":
            zeros = down * across * 16
        return code_bits(self.element, out_features * in_features) + self.scale.bits(down, across) + int(zeros)

    def blocks(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """View (a copy where blocks span rows; padded with `fill` at a smaller edge) of x `[rows, columns]` as [block
        rows, groups, elements].

        Zeros change no range that includes 0.
        """
        rows, columns = x.shape
        height, width = self.block.rows or rows, self.block.columns or columns
        down, across = -(-rows // height), -(-columns // width)
        if (down * height, across * width) != (rows, columns):
            x = F.pad(x, (0, across * width - columns, 0, down * height - rows), value=fill)
        if height == 1 or across == 1:
            return x.reshape(down, across, height * width)
        return x.reshape(down, height, across, width).transpose(1, 2).reshape(down, across, height * width)

    def unblocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `blocks`."""
        rows, columns = shape
        height, width = self.block.rows or rows, self.block.columns or columns
        down, across = blocks.shape[:2]
        if height != 1 and across != 1:
            blocks = blocks.reshape(down, across, height, width).transpose(1, 2)
        return blocks.reshape(down * height, across * width)[:rows, :columns]


def uniform(
    bits: int,
    group_size: int,
    symmetric: bool,
    scale: str = "float16",
    partial: bool = False,
) -> TensorFormat:
    """Uniform integers with one scale (and integer zero point) per tensor (0), row (-1) or group of a row (n > 0)."""
    block = {PER_TENSOR: Block(0, 0), PER_CHANNEL: Block(1, 0)}.get(group_size, Block(1, group_size))
    return TensorFormat(
        element=Int(bits, signed=symmetric),
        block=block,
        zero="none" if symmetric else "int",
        scale=SCALES[scale],
        partial=partial,
    )


def code_bits(element: Element, count: int) -> int:
    """Bits of `count` packed codes: five ternary ones share a byte, others lie end to end."""
    if isinstance(element, Codebook) and element.bits != int(element.bits):
        per_byte = int(8 / element.bits)
        return 8 * -(-count // per_byte)
    return count * int(element.bits)


def shared_scale(x: Tensor, fmt: TensorFormat) -> Tensor | None:
    """What all scales of x share (see `ScaleFormat.outer`); None where they share nothing."""
    if not fmt.scale.needs_outer:
        return None
    bounds = extrema(x.float(), fmt)
    return fmt.scale.outer(torch.maximum(-bounds.lower, bounds.upper), fmt.element.extent)


def fit(x: Tensor, fmt: TensorFormat, clip: Range | None = None, outer: Tensor | None = None) -> QParams:
    """Scale and zero point of every block of x (float `[out, in]`), from `clip` or by the format's range fitting.

    Integer zero: s = (hi - lo) / (2^b - 1), z = round(-lo / s) clamped to codes. Float zero: the same s, z = -lo / s in
    float16. None: s = max|x| / extent of the element format (see `Int.reach`: 2 max|x| / (2^b - 1) unless told
    otherwise). The scale is rounded to its storage before anything is encoded with it. outer: what scales share, where
    it comes from more than this tensor.

    Raises NumericsError where the range is not finite or the scale overflows its dtype.
    """
    if outer is None:
        outer = shared_scale(x, fmt)
    bounds = clip or find_range(x.float(), fmt, outer)
    lower, upper = bounds.lower.float(), bounds.upper.float()
    element = fmt.element
    if fmt.zero == "none":
        largest = torch.maximum(-lower, upper)
        if isinstance(element, Int) and element.reach == "full":
            largest = torch.where(upper > -lower, -largest, largest)
        stored = fmt.scale.store(largest, element.extent, outer)
        return QParams(stored.value, None, stored.codes, stored.outer)
    if fmt.zero == "int":
        stored = fmt.scale.store(upper - lower, element.steps, outer)
        zero = ((0 - lower) / stored.value).round_().clamp_(0, element.maximum)  # -lower would make a zero of -0
    else:
        # A short range far from 0 gets a longer step, so that float16 holds the zero point (half of its largest number
        # leaves room for the rounding of tiny scales); the zero point's own rounding still costs more than the step.
        limit = torch.finfo(torch.float16).max
        farthest = torch.maximum(lower.abs(), upper.abs())
        stored = fmt.scale.store(
            torch.maximum(upper - lower, farthest * (2 * element.steps / limit)), element.steps, outer
        )
        zero = (-lower / stored.value).clamp_(-limit, limit).to(torch.float16).float()
    return QParams(stored.value, zero, stored.codes, stored.outer)


def encode(blocks: Tensor, fmt: TensorFormat, params: QParams) -> Tensor:
    """Levels (float32) of [rows, groups, elements], before zero points are taken off: nearest, ties to even,
    saturating."""
    if fmt.scale.name == "int8":
        # Two levels: first to the int8 codes of the row, then to the group's grid on them.
        codes = (blocks / params.outer[..., None]).round_().clamp_(-127, 127)
        step = (params.scale / params.outer)[..., None]
        limit = torch.floor(127 / step)  # so that no decoded value leaves the int8 range
        levels = torch.clamp(codes.div_(step), -limit, limit)
    else:
        levels = blocks / params.scale[..., None]
    if params.zero is None:
        return fmt.element.nearest(levels)
    if fmt.zero == "float":
        return fmt.element.nearest(levels.add_(params.zero[..., None]))
    levels = levels.round_().add_(params.zero[..., None])
    return levels.clamp_(fmt.element.minimum, fmt.element.maximum)


def decode(levels: Tensor, params: QParams) -> Tensor:
    """Values s (q - z) of levels [rows, groups, elements]; overwrites `levels`."""
    if params.zero is not None:
        levels -= params.zero[..., None]
    return levels.mul_(params.scale[..., None])


def fake_quantize(x: Tensor, fmt: TensorFormat, clip: Range | None = None, outer: Tensor | None = None) -> Tensor:
    """Quantize and decode x (float32 `[out, in]`) without keeping codes: what a search evaluates many times."""
    params = fit(x, fmt, clip, outer)
    return fmt.unblocks(decode(encode(fmt.blocks(x), fmt, params), params), x.shape)


def quantize(x: Tensor, fmt: TensorFormat, params: QParams | None = None) -> QTensor:
    """x (float `[out, in]`) in format `fmt`, round to nearest, with `params` or freshly fitted ones."""
    from qbench.formats.qtensor import QTensor

    params = params or fit(x, fmt)
    levels = fmt.unblocks(encode(fmt.blocks(x.float()), fmt, params), x.shape)
    codes = fmt.element.to_codes(levels)
    return QTensor(codes, params.scale, params.zero, fmt, scale_codes=params.scale_codes, outer=params.outer)
