"""The definition of fake quantization, on any device; see the package for what it means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fake_quant(
    x: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale: Tensor | None,
    zero: Tensor | None,
    scale_dtype: torch.dtype,
) -> Tensor:
    """x [rows, columns]; scale and zero float32 [rows, groups] or None: fitted."""
    rows, columns = x.shape
    width = columns if group_size == -1 else group_size
    groups = -(-columns // width)
    missing = groups * width - columns
    # Zeros change no range: every range includes 0.
    blocks = (F.pad(x, (0, missing)) if missing else x).reshape(rows, groups, width).float()
    if scale is None:
        scale, zero = fit(blocks, bits, symmetric, scale_dtype)
    minimum = -(1 << (bits - 1)) if symmetric else 0
    codes = (blocks / scale[..., None]).round_()
    if zero is not None:
        codes += zero[..., None]
    codes.clamp_(minimum, minimum + (1 << bits) - 1)
    if zero is not None:
        codes -= zero[..., None]
    values = codes.mul_(scale[..., None]).reshape(rows, groups * width)
    return values[:, :columns].to(x.dtype).contiguous()


def fit(blocks: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero, float32 [rows, groups] each, of float32 blocks [rows, groups, elements]."""
    lower, upper = blocks.aminmax(dim=-1)
    lower, upper = lower.clamp_max(0), upper.clamp_min(0)
    steps = (1 << bits) - 1
    if symmetric:
        return fit_scale(torch.maximum(-lower, upper), steps / 2, scale_dtype), None
    scale = fit_scale(upper - lower, steps, scale_dtype)
    return scale, (-lower / scale).round_().clamp_(0, steps)


def fit_scale(spread: Tensor, extent: float, scale_dtype: torch.dtype) -> Tensor:
    """spread / extent (float32) rounded to `scale_dtype`, as float32: never 0, NaN where it would not be finite."""
    exact = spread / extent
    scale = exact.to(scale_dtype)
    info = torch.finfo(scale_dtype)
    smallest = info.smallest_normal * info.eps  # subnormal
    scale = torch.where((scale == 0) & (exact > 0), torch.full_like(exact, smallest), scale.float())
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.where(torch.isfinite(scale), scale, torch.full_like(scale, torch.nan))
