"""TesseraQ's parametrisation (arXiv 2410.19103): soft rounding that hardens, and learned dequantization scales."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qbench.formats import QParams, QTensor, Range, TensorFormat, fit
from qbench.formats.differentiable import from_levels, straight_through

#: The rectified sigmoid reaches both ends at finite values: it is stretched by this beyond them (arXiv 1712.01312).
STRETCH = 0.1
#: A scale is never learned away altogether.
SMALLEST_FACTOR = 1e-3


def rectified_sigmoid(x: Tensor) -> Tensor:
    """clamp(1.2 sigmoid(x) - 0.1, 0, 1): 0.5 at 0, exactly 0 and 1 from about ∓2.4 on."""
    return (torch.sigmoid(x) * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)


def inverse_rectified_sigmoid(share: Tensor) -> Tensor:
    """x with rectified_sigmoid(x) = share, in [0, 1]."""
    return -torch.log((1 + 2 * STRETCH) / (share + STRETCH) - 1)


@dataclass(frozen=True)
class SoftRounding:
    """A weight W [out, in] on its way to codes, with the fitted `params` of its range.

    up: nu, float32 [out, in]; a code is floor(W / s) + z + RS(nu), RS the rectified sigmoid, so ±inf is a decision
    that no gradient moves. factor: v, float32 [rows, groups]; decoding multiplies s by 2 RS(v), 1 at 0.
    """

    params: QParams
    up: Tensor
    factor: Tensor

    @classmethod
    def start(
        cls, weight: Tensor, fmt: TensorFormat, bounds: Range | None = None, *, learn_scale: bool = True
    ) -> SoftRounding:
        """Where nothing is rounded yet: RS(nu) is the fraction of W / s, so that W itself is decoded, but for what
        the range cuts off. bounds: the range; None: the one that the format's own method finds."""
        params = fit(weight, fmt, bounds)
        steps = _steps(fmt.blocks(weight), params, fmt)
        up = fmt.unblocks(inverse_rectified_sigmoid(steps.sub_(steps.floor())), weight.shape).contiguous()
        return cls(params, up.requires_grad_(), torch.zeros_like(params.scale, requires_grad=learn_scale))

    def decoding_scale(self, fmt: TensorFormat) -> Tensor:
        """s · 2 RS(v) [rows, groups], rounded to the scale's dtype, with the gradient of what is rounded."""
        ideal = self.params.scale * (2 * rectified_sigmoid(self.factor)).clamp_min(SMALLEST_FACTOR)
        return straight_through(fmt.scale.store(ideal.detach(), 1.0).value, ideal)

    def fake_quantize(self, weight: Tensor, fmt: TensorFormat) -> Tensor:
        """s · 2 RS(v) · (clamp(floor(W / s) + RS(nu) + z) - z) [out, in] (paper, eq. 4 and 7); gradients to nu, v."""
        values = _SoftQuantize.apply(
            fmt.blocks(self.up), self.decoding_scale(fmt), fmt.blocks(weight), self.params.scale, self.params.zero, fmt
        )
        return fmt.unblocks(values, weight.shape)

    @torch.no_grad()
    def harden(self, soft_share: float) -> None:
        """Decides, in place, all but `soft_share` of the weight's roundings, nearest to decided first (paper, alg. 1).

        Exactly so many, whatever ties there are; what is decided stays so.
        """
        total = self.up.numel()
        wanted = total - int(soft_share * total)
        if not wanted:
            return
        score = (rectified_sigmoid(self.up) - 0.5).abs_().flatten()
        score[torch.isinf(self.up).flatten()] = 1.0  # decided, and first among equals
        bound = score.kthvalue(total - wanted + 1).values
        decided, tied = score > bound, score == bound
        decided |= tied & (tied.cumsum(0) <= wanted - decided.sum())
        side = torch.where(self.up > 0, math.inf, -math.inf)
        self.up.copy_(torch.where(decided.view_as(self.up), side, self.up))

    def quantize(self, weight: Tensor, fmt: TensorFormat) -> QTensor:
        """The codes when everything is decided (RS(nu) > 0.5: up), with the learned scales."""
        with torch.no_grad():
            params = replace(self.params, scale=self.decoding_scale(fmt).detach())
            levels = _base(fmt.blocks(weight), self.params, fmt).add_(fmt.blocks((self.up > 0).float()))
            levels = fmt.unblocks(levels.clamp_(fmt.element.minimum, fmt.element.maximum), weight.shape)
        return from_levels(levels, params, fmt)


def _steps(blocks: Tensor, params: QParams, fmt: TensorFormat) -> Tensor:
    """W / s, with a float zero point W / s + z: what is rounded; a new tensor."""
    steps = blocks / params.scale[..., None]
    return steps.add_(params.zero[..., None]) if fmt.zero == "float" else steps


def _base(blocks: Tensor, params: QParams, fmt: TensorFormat) -> Tensor:
    """The lower of the two codes between which a weight lies, before saturation; a new tensor."""
    base = _steps(blocks, params, fmt).floor_()
    return base.add_(params.zero[..., None]) if fmt.zero == "int" else base


class _SoftQuantize(torch.autograd.Function):
    """Decodes soft codes of blocks [rows, groups, elements]; what is needed going backwards is computed again, so
    that a weight costs its decoded values and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        up: Tensor,
        decoding_scale: Tensor,
        blocks: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        fmt: TensorFormat,
    ) -> Tensor:
        ctx.save_for_backward(up, decoding_scale, blocks, scale, zero)
        ctx.fmt = fmt
        codes = _base(blocks, QParams(scale, zero), fmt).add_(rectified_sigmoid(up))
        codes.clamp_(fmt.element.minimum, fmt.element.maximum)
        if zero is not None:
            codes -= zero[..., None]
        return codes.mul_(decoding_scale[..., None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dŵ/dnu = s' RS'(nu) where the code does not saturate; dŵ/ds' = code - z."""
        up, decoding_scale, blocks, scale, zero = ctx.saved_tensors
        element = ctx.fmt.element
        codes = _base(blocks, QParams(scale, zero), ctx.fmt).add_(rectified_sigmoid(up))
        of_up = of_scale = None
        if ctx.needs_input_grad[0]:
            sigmoid = torch.sigmoid(up)
            stretched = sigmoid * (1 + 2 * STRETCH) - STRETCH
            moves = (stretched >= 0) & (stretched <= 1) & (codes >= element.minimum) & (codes <= element.maximum)
            slope = sigmoid.mul_(1 - sigmoid).mul_(1 + 2 * STRETCH)
            of_up = slope.mul_(decoding_scale[..., None]).mul_(grad).mul_(moves)
        if ctx.needs_input_grad[1]:
            codes.clamp_(element.minimum, element.maximum)
            if zero is not None:
                codes -= zero[..., None]
            of_scale = codes.mul_(grad).sum(dim=-1)
        return of_up, of_scale, None, None, None, None
