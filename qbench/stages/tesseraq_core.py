"""TesseraQ's parametrisation (arXiv 2410.19103): soft rounding that hardens, and learned dequantization scales."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qbench.formats import QParams, QTensor, Range, TensorFormat, fit
from qbench.formats.differentiable import from_levels, straight_through
from qbench.stages.training import parts

#: The rectified sigmoid reaches both ends at finite values: it is stretched by this beyond them (arXiv 1712.01312).
STRETCH = 0.1
#: What is known of a rounding.
SOFT, UP, DOWN = 0, 1, 2
#: A scale is never learned away altogether.
SMALLEST_FACTOR = 1e-3


def rectified_sigmoid(x: Tensor) -> Tensor:
    """clamp(1.2 sigmoid(x) - 0.1, 0, 1): 0.5 at 0, exactly 0 and 1 from about ∓2.4 on."""
    return (torch.sigmoid(x) * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)


def inverse_rectified_sigmoid(share: Tensor) -> Tensor:
    """x with rectified_sigmoid(x) = share, in [0, 1]."""
    return -torch.log((1 + 2 * STRETCH) / (share + STRETCH) - 1)


@dataclass(frozen=True)
class Packed:
    """Numbers from 0 to 3 of `shape` [rows, groups, elements], four to a byte: uint8 [rows, bytes]."""

    packed: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, values: Tensor) -> Packed:
        """Of uint8 [rows, groups, elements]."""
        flat = values.flatten(1)
        quarters = F.pad(flat, (0, -flat.shape[1] % 4)).unflatten(1, (-1, 4)).unbind(-1)
        return cls(quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6, values.shape)

    def values(self, rows: slice = slice(None)) -> Tensor:
        """Those of some rows, uint8 [rows, groups, elements]; a new tensor."""
        quarters = torch.stack([self.packed[rows] >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
        return quarters.flatten(1)[:, : self.shape[1] * self.shape[2]].reshape(-1, *self.shape[1:])


@dataclass(frozen=True)
class SoftRounding:
    """A weight W of `shape` [out, in], of any float dtype, on its way to codes, with the fitted `params` of its range.

    A code is floor(W / s) + z + RS(nu), RS the rectified sigmoid: nu = ±inf is a decision.
    up: nu of what is still soft, float32 [soft], in the order of the format's blocks: only that is learned, and costs
    an optimizer's memory. decided: what is up, down or soft, by rows of blocks. below: for every such row how many soft
    ones lie before it, and all of them in the end. factor: v, float32 [rows, groups]; decoding multiplies s by 2 RS(v),
    1 at 0.
    """

    shape: torch.Size
    params: QParams
    up: Tensor
    decided: Packed
    below: tuple[int, ...]
    factor: Tensor

    @classmethod
    def start(
        cls, weight: Tensor, fmt: TensorFormat, bounds: Range | None = None, *, learn_scale: bool = True
    ) -> SoftRounding:
        """Where nothing is rounded yet: RS(nu) is the fraction of W / s, so that W itself is decoded, but for what
        the range cuts off. bounds: the range; None: the one that the format's own method finds."""
        params = fit(weight.float(), fmt, bounds)
        sides = fmt.blocks(torch.zeros_like(weight, dtype=torch.uint8), fill=DOWN)  # padding is decided
        steps = _steps(fmt.blocks(weight), params, fmt)
        up = inverse_rectified_sigmoid(steps.sub_(steps.floor()))[sides == SOFT]
        factor = torch.zeros_like(params.scale, requires_grad=learn_scale)
        return cls(weight.shape, params, up.requires_grad_(), Packed.of(sides), _below(sides), factor)

    def decoding_scale(self, fmt: TensorFormat) -> Tensor:
        """s · 2 RS(v) [rows, groups], rounded to the scale's dtype, with the gradient of what is rounded."""
        ideal = self.params.scale * (2 * rectified_sigmoid(self.factor)).clamp_min(SMALLEST_FACTOR)
        return straight_through(fmt.scale.store(ideal.detach(), 1.0).value, ideal)

    def fake_quantize(self, weight: Tensor, fmt: TensorFormat) -> Tensor:
        """s · 2 RS(v) · (clamp(floor(W / s) + RS(nu) + z) - z) [out, in] (paper, eq. 4 and 7); gradients to nu, v."""
        values = _SoftQuantize.apply(self.up, self.decoding_scale(fmt), fmt.blocks(weight), self, fmt)
        return fmt.unblocks(values, self.shape)

    @torch.no_grad()
    def harden(self, soft_share: float) -> SoftRounding:
        """With all but `soft_share` of the weight's roundings decided, nearest to decided first (paper, alg. 1).

        Exactly so many, whatever ties there are; what is decided stays so. Itself where so many are decided.
        """
        stay = int(soft_share * self.shape.numel())
        wanted = len(self.up) - stay
        if wanted <= 0:
            return self
        score = (rectified_sigmoid(self.up) - 0.5).abs_()
        bound = score.kthvalue(stay + 1).values
        decided, tied = score > bound, score == bound
        decided |= tied & (tied.cumsum(0) <= wanted - decided.sum())
        chosen = torch.where(self.up > 0, UP, DOWN).to(torch.uint8).masked_fill_(~decided, SOFT)
        sides = self.decided.values()
        sides.masked_scatter_(sides == SOFT, chosen)
        up = self.up[~decided].requires_grad_(self.up.requires_grad)
        return replace(self, up=up, decided=Packed.of(sides), below=_below(sides))

    def soft(self, rows: slice) -> slice:
        """Which part of `up` lies in these rows."""
        first, last, _ = rows.indices(len(self.below) - 1)
        return slice(self.below[first], self.below[last])

    @torch.no_grad()
    def variables(self, rows: slice = slice(None)) -> Tensor:
        """nu of rows of blocks, float32 [rows, groups, elements]: ±inf where it is decided."""
        sides = self.decided.values(rows)
        whole = torch.where(sides == UP, math.inf, -math.inf)
        return whole.masked_scatter_(sides == SOFT, self.up[self.soft(rows)])

    @torch.no_grad()
    def quantize(self, weight: Tensor, fmt: TensorFormat) -> QTensor:
        """The codes when everything is decided (RS(nu) > 0.5: up), with the learned scales."""
        params = replace(self.params, scale=self.decoding_scale(fmt))
        levels = _base(fmt.blocks(weight), self.params, fmt).add_((self.variables() > 0).float())
        levels = fmt.unblocks(levels.clamp_(fmt.element.minimum, fmt.element.maximum), weight.shape)
        return from_levels(levels, params, fmt)


def _below(sides: Tensor) -> tuple[int, ...]:
    return (0, *(sides == SOFT).sum(dim=(1, 2)).cumsum(0).tolist())


def _steps(blocks: Tensor, params: QParams, fmt: TensorFormat) -> Tensor:
    """W / s, with a float zero point W / s + z: what is rounded; a new tensor."""
    steps = blocks.float() / params.scale[..., None]
    return steps.add_(params.zero[..., None]) if fmt.zero == "float" else steps


def _base(blocks: Tensor, params: QParams, fmt: TensorFormat) -> Tensor:
    """The lower of the two codes between which a weight lies, before saturation; a new tensor."""
    base = _steps(blocks, params, fmt).floor_()
    return base.add_(params.zero[..., None]) if fmt.zero == "int" else base


class _SoftQuantize(torch.autograd.Function):
    """Decodes soft codes of blocks [rows, groups, elements], part by part; what is needed going backwards is computed
    again, so that a weight costs its decoded values and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, up: Tensor, decoding_scale: Tensor, blocks: Tensor, rounding: SoftRounding, fmt: TensorFormat
    ) -> Tensor:
        ctx.save_for_backward(up, decoding_scale, blocks)
        ctx.rounding, ctx.fmt = rounding, fmt
        values = torch.empty_like(blocks, dtype=torch.float32)
        for rows in parts(len(blocks), blocks[0].numel()):
            params = _of_rows(rounding.params, rows)
            codes = _base(blocks[rows], params, fmt).add_(rectified_sigmoid(rounding.variables(rows)))
            codes.clamp_(fmt.element.minimum, fmt.element.maximum)
            if params.zero is not None:
                codes -= params.zero[..., None]
            torch.mul(codes, decoding_scale[rows, :, None], out=values[rows])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        up, decoding_scale, blocks = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        of_up = torch.empty_like(up) if wanted[0] else None
        of_scale = torch.empty_like(decoding_scale) if wanted[1] else None
        for rows in parts(len(blocks), blocks[0].numel()):
            found = _gradients(ctx.rounding, rows, blocks[rows], decoding_scale[rows], grad[rows], ctx.fmt)
            if wanted[0]:
                of_up[ctx.rounding.soft(rows)] = found[0]
            if wanted[1]:
                of_scale[rows] = found[1]
        return of_up, of_scale, None, None, None


def _gradients(
    rounding: SoftRounding, rows: slice, blocks: Tensor, scale: Tensor, grad: Tensor, fmt: TensorFormat
) -> tuple[Tensor, Tensor]:
    """Of nu [soft] and s' [rows, groups]: dŵ/dnu = s' RS'(nu) where the code does not saturate; dŵ/ds' = code - z."""
    element, params, up = fmt.element, _of_rows(rounding.params, rows), rounding.variables(rows)
    codes = _base(blocks, params, fmt).add_(rectified_sigmoid(up))
    moves = (codes >= element.minimum) & (codes <= element.maximum)
    codes.clamp_(element.minimum, element.maximum)
    if params.zero is not None:
        codes -= params.zero[..., None]
    of_scale = codes.mul_(grad).sum(dim=-1)
    del codes
    sigmoid = up.sigmoid_()
    stretched = sigmoid * (1 + 2 * STRETCH) - STRETCH
    moves &= (stretched >= 0) & (stretched <= 1)
    del stretched
    slope = sigmoid.mul_(1 - sigmoid).mul_(1 + 2 * STRETCH)
    of_up = slope.mul_(scale[..., None]).mul_(grad).mul_(moves)
    return of_up[rounding.decided.values(rows) == SOFT], of_scale


def _of_rows(params: QParams, rows: slice) -> QParams:
    return QParams(params.scale[rows], None if params.zero is None else params.zero[rows])
