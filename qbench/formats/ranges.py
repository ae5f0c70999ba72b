"""Range fitting: which part of a block's values its codes should cover."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qbench.formats.tensor import TensorFormat

Method = Literal["minmax", "mse", "percentile", "absmean"]


@dataclass(frozen=True)
class Range:
    """Smallest and largest value that a block should represent: float [rows, groups] each; lower <= 0 <= upper unless
    the format has a float zero point."""

    lower: Tensor
    upper: Tensor


@dataclass(frozen=True, kw_only=True)
class RangeFit:
    """How a block's range is found (METHODS 0.2).

    minmax: its extremes. mse: the shares 1, 1 - 1/grid, … above 1 - max_shrink of the extremes, whichever gives the
    smallest Σ|Q(x) - x|^norm; the whole range is among them. percentile: the `percentile` and 100 - `percentile` points
    of its values. absmean: ± mean|x| (BitNet b1.58, arXiv 2402.17764).
    """

    method: Method = "minmax"
    norm: float = 2.4
    grid: int = 100
    max_shrink: float = 0.8
    percentile: float = 99.9


def extrema(x: Tensor, fmt: TensorFormat) -> Range:
    """Min-max range of every block of x `[out, in]`; without a float zero point extended to include 0, so that the zero
    point exists."""
    lower, upper = fmt.blocks(x).aminmax(dim=-1)
    if fmt.zero == "float":
        return Range(lower, upper)
    return Range(lower.clamp_max(0), upper.clamp_min(0))


def find_range(x: Tensor, fmt: TensorFormat, outer: Tensor | None = None) -> Range:
    """Range of every block of x (float32 `[out, in]`) by the format's own method. outer: see `ScaleFormat.outer`."""
    how = fmt.range
    if how.method == "minmax":
        return extrema(x, fmt)
    if how.method == "mse":
        return _search(x, fmt, how, outer)
    blocks = fmt.blocks(x)
    if how.method == "absmean":
        count = fmt.block_sizes(x.shape, x.device)  # a short block is padded with zeros
        mean = blocks.abs().sum(dim=-1) / count
        return Range(-mean, mean)
    return _percentile(blocks, fmt, how.percentile)


def _search(x: Tensor, fmt: TensorFormat, how: RangeFit, outer: Tensor | None) -> Range:
    from qbench.formats.tensor import fake_quantize

    full = extrema(x, fmt)
    best, lower, upper = None, full.lower, full.upper
    for step in range(max(1, round(how.max_shrink * how.grid))):
        share = 1 - step / how.grid
        candidate = Range(share * full.lower, share * full.upper)
        delta = fake_quantize(x, fmt, candidate, outer).sub_(x)
        error = fmt.blocks(delta.abs_().pow_(how.norm)).sum(dim=-1)
        if best is None:
            best = error
            continue
        better = error < best
        best = torch.where(better, error, best)
        lower = torch.where(better, candidate.lower, lower)
        upper = torch.where(better, candidate.upper, upper)
    return Range(lower, upper)


def _percentile(blocks: Tensor, fmt: TensorFormat, percentile: float) -> Range:
    """Interpolated between neighbours in the sorted block, as numpy's default does."""
    ordered = blocks.sort(dim=-1).values
    place = (blocks.shape[-1] - 1) * percentile / 100
    below = int(place)
    above, share = min(below + 1, blocks.shape[-1] - 1), place - below
    upper = torch.lerp(ordered[..., below], ordered[..., above], share)
    last = blocks.shape[-1] - 1
    lower = torch.lerp(ordered[..., last - below], ordered[..., last - above], share)
    if fmt.zero == "float":
        return Range(lower, upper)
    return Range(lower.clamp_max(0), upper.clamp_min(0))
