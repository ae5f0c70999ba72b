"""Integer quantization with gradients: what learned clipping and learned rounding train through.

Values are those of `fake_quantize`, bit for bit. Rounding (of weights, zero points, and of scales to their dtype) has
the straight-through gradient 1 (Bengio et al., arXiv 1308.3432); saturating codes have gradient 0, as in LSQ (arXiv
1902.08153, eq. 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qbench.errors import NumericsError, SpecError
from qbench.formats.element import Int
from qbench.formats.qtensor import QTensor
from qbench.formats.ranges import Range, extrema
from qbench.formats.scale import FloatScale
from qbench.formats.tensor import QParams, TensorFormat

#: Elements whose gradients are computed at once: bounds the temporaries of a backward pass.
CHUNK = 1 << 16


def supports(fmt: TensorFormat) -> bool:
    """Whether the format has gradients here: integers whose scale is one float, with any zero point and any blocks."""
    return isinstance(fmt.element, Int) and isinstance(fmt.scale, FloatScale)


def require_supported(fmt: TensorFormat, stage: str) -> None:
    """SpecError unless `supports(fmt)`; `stage` is who learns."""
    if not supports(fmt):
        raise SpecError("format", fmt.label, f"integers with float scales with {stage}, which learns by gradients")


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """`value`, exactly, with the gradient of `x` (same shape): x + (value - x) would round."""
    return _StraightThrough.apply(value.detach(), x)


def ste_round(x: Tensor) -> Tensor:
    """x rounded to integers, ties to even, with gradient 1."""
    return straight_through(x.detach().round(), x)


def ste_params(lower: Tensor, upper: Tensor, fmt: TensorFormat) -> QParams:
    """Scales and zero points (float32 [rows, groups]) of ranges [rows, groups], what `fit` gives for
    `Range(lower, upper)`, with gradients to both ends. Raises NumericsError as `fit` does."""
    element, limit = fmt.element, torch.finfo(torch.float16).max
    lower, upper = lower.float(), upper.float()
    if fmt.zero == "none":
        largest = torch.maximum(-lower, upper)
        if element.reach == "full":
            largest = torch.where(upper > -lower, -largest, largest)
        return QParams(_store(largest, element.extent, fmt), None)
    if fmt.zero == "int":
        scale = _store(upper - lower, element.steps, fmt)
        return QParams(scale, ste_round((0 - lower) / scale).clamp(0, element.maximum))
    farthest = torch.maximum(lower.abs(), upper.abs())
    scale = _store(torch.maximum(upper - lower, farthest * (2 * element.steps / limit)), element.steps, fmt)
    ideal = (-lower / scale).clamp(-limit, limit)
    return QParams(scale, straight_through(ideal.detach().to(torch.float16).float(), ideal))


def ste_fake_quantize(weight: Tensor, fmt: TensorFormat, params: QParams, offset: Tensor | None = None) -> Tensor:
    """s (q - z), [out, in], with q = clamp(round(w / s + offset) + z): gradients to weight, `params` and offset.

    weight: float32 [out, in]; offset: float32 [out, in], in steps (AutoRound's V, arXiv 2309.05516, eq. 3), None for 0.
    Keeps its arguments for the backward pass and no other tensor of the weight's size.
    """
    offset = None if offset is None else fmt.blocks(offset)
    values = _Quantize.apply(fmt.blocks(weight), params.scale, params.zero, offset, fmt)
    return fmt.unblocks(values, weight.shape)


def ste_quantize(
    weight: Tensor,
    fmt: TensorFormat,
    *,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """`fake_quantize(weight, fmt, Range(lower, upper))` with gradients to weight, ends and offset.

    weight: float32 [out, in]. lower, upper: [rows, groups], min-max of the weight where left out. offset: see
    `ste_fake_quantize`. SpecError for a format without gradients, NumericsError where a scale is not finite.
    """
    require_supported(fmt, "differentiable quantization")
    if lower is None or upper is None:
        bounds = extrema(weight, fmt)
        lower, upper = bounds.lower if lower is None else lower, bounds.upper if upper is None else upper
    return ste_fake_quantize(weight, fmt, ste_params(lower, upper, fmt), offset)


@torch.no_grad()
def levels_of(weight: Tensor, fmt: TensorFormat, params: QParams, offset: Tensor | None = None) -> Tensor:
    """The levels q, float32 [out, in], that `ste_fake_quantize` decodes."""
    offset = None if offset is None else fmt.blocks(offset.detach())
    scale, zero = params.scale.detach(), None if params.zero is None else params.zero.detach()
    levels = _unclamped(fmt.blocks(weight.detach().float()), scale, zero, offset, fmt)
    return fmt.unblocks(levels.clamp_(fmt.element.minimum, fmt.element.maximum), weight.shape)


@torch.no_grad()
def from_levels(levels: Tensor, params: QParams, fmt: TensorFormat) -> QTensor:
    """The quantized tensor of learned levels (integers, float [out, in]) with these scales and zero points.

    Raises NumericsError for what cannot be stored: a level that is no code, a scale its dtype does not hold, a zero
    point that is no code (integer) or no float16.
    """
    element, scale, zero = fmt.element, params.scale.detach(), None if params.zero is None else params.zero.detach()
    _require_codes(levels, element, "level")
    if not torch.equal(fmt.scale.store(scale, 1.0).value, scale):
        raise NumericsError(f"learned scales are not {fmt.scale.name} numbers: round them with the format's scale")
    if fmt.zero == "int":
        _require_codes(zero, element, "zero point")
    elif fmt.zero == "float" and not torch.equal(zero.to(torch.float16).float(), zero):
        raise NumericsError("learned zero points are not float16 numbers")
    return QTensor(element.to_codes(levels.detach()), scale.clone(), None if zero is None else zero.clone(), fmt)


def quantize_learned(weight: Tensor, fmt: TensorFormat, bounds: Range, offset: Tensor | None = None) -> QTensor:
    """Codes of `ste_quantize(weight, fmt, lower, upper, offset)`: the tensor that a trained range and offset mean."""
    with torch.no_grad():
        params = ste_params(bounds.lower.detach(), bounds.upper.detach(), fmt)
    return from_levels(levels_of(weight, fmt, params, offset), params, fmt)


def _require_codes(values: Tensor, element: Int, what: str) -> None:
    fine = (values >= element.minimum) & (values <= element.maximum) & (values == values.round())
    if not bool(fine.all()):
        wrong = values[~fine].flatten()[0].item()
        raise NumericsError(
            f"learned {what} {wrong:g} is no {element.name} code: {element.minimum} to {element.maximum}"
        )


def _store(spread: Tensor, extent: float, fmt: TensorFormat) -> Tensor:
    with torch.no_grad():
        stored = fmt.scale.store(spread, extent).value
    return straight_through(stored, spread / extent)


def _unclamped(blocks: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, fmt: TensorFormat) -> Tensor:
    """round(w / s + offset) + z before saturation; a new tensor, in the order of operations of `encode`."""
    levels = blocks / scale[..., None]
    if offset is not None:
        levels += offset
    if fmt.zero == "float":
        return levels.add_(zero[..., None]).round_()
    levels = levels.round_()
    return levels if zero is None else levels.add_(zero[..., None])


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class _Quantize(torch.autograd.Function):
    """Rounds, saturates and decodes blocks [rows, groups, elements]; levels are computed again going backwards, so
    that a block of linear weights costs its quantized values and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, blocks: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, fmt: TensorFormat
    ) -> Tensor:
        ctx.save_for_backward(blocks, scale, zero, offset)
        ctx.fmt = fmt
        levels = _unclamped(blocks, scale, zero, offset, fmt).clamp_(fmt.element.minimum, fmt.element.maximum)
        if zero is not None:
            levels -= zero[..., None]
        return levels.mul_(scale[..., None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With i = 1 where codes do not saturate: dŵ/dw = i, dŵ/dV = s i, dŵ/ds = q - z - i w/s, dŵ/dz = -s (1 - i);
        in chunks of rows."""
        saved, wanted = (*ctx.saved_tensors, grad), ctx.needs_input_grad
        found = [torch.empty_like(saved[k]) if wanted[k] else None for k in range(4)]
        rows = max(1, CHUNK // max(1, grad[0].numel()))
        for k in range(0, len(grad), rows):
            part = [None if x is None else x[k : k + rows] for x in saved]
            for whole, of_part in zip(found, _gradients(*part, ctx.fmt, wanted), strict=True):
                if whole is not None:
                    whole[k : k + rows] = of_part
        return (*found, None)


def _gradients(
    blocks: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    grad: Tensor,
    fmt: TensorFormat,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Those of blocks, scale, zero and offset as `_Quantize.backward` says; None where they are not wanted."""
    element = fmt.element
    levels = _unclamped(blocks, scale, zero, offset, fmt)
    inside = (levels >= element.minimum) & (levels <= element.maximum)
    passed = grad * inside
    of_scale = of_zero = None
    if wanted[1]:
        levels.clamp_(element.minimum, element.maximum)
        if zero is not None:
            levels -= zero[..., None]
        of_scale = (levels.mul_(grad) - passed * blocks / scale[..., None]).sum(dim=-1)
    if zero is not None and wanted[2]:
        of_zero = scale * (passed - grad).sum(dim=-1)
    return passed, of_scale, of_zero, passed * scale[..., None] if wanted[3] else None
