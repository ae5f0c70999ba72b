"""Range fitting: which part of a block's values its codes should cover."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qbench.formats.tensor import TensorFormat

Method = Literal["minmax", "mse", "percentile", "absmean", "share"]


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
    of its values. absmean: ± mean|x| (BitNet b1.58, arXiv 2402.17764). share: `share` of the extremes (QuaRot's clip
    ratio of activations).
    """

    method: Method = "minmax"
    norm: float = 2.4
    grid: int = 100
    max_shrink: float = 0.8
    percentile: float = 99.9
    share: float = 1.0


def extrema(x: Tensor, fmt: TensorFormat) -> Range:
    """Min-max range of every block of x `[out, in]`; without a float zero point extended to include 0, so that the zero
    point exists."""
    if fmt.zero == "float":
        return Range(fmt.blocks(x, torch.inf).amin(dim=-1), fmt.blocks(x, -torch.inf).amax(dim=-1))
    blocks = fmt.blocks(x)
    lower, upper = blocks.amin(dim=-1), blocks.amax(dim=-1)  # apart: many times faster than aminmax along an axis
    return Range(lower.clamp_max(0), upper.clamp_min(0))


def find_range(x: Tensor, fmt: TensorFormat, outer: Tensor | None = None) -> Range:
    """Range of every block of x (float32 `[out, in]`) by the format's own method. outer: see `ScaleFormat.outer`."""
    how = fmt.range
    if how.method == "minmax":
        return extrema(x, fmt)
    if how.method == "share":
        full = extrema(x, fmt)
        return Range(how.share * full.lower, how.share * full.upper)
    if how.method == "mse":
        return _search(x, fmt, how, outer)
    if how.method == "absmean":
        mean = fmt.blocks(x).abs().sum(dim=-1) / fmt.block_sizes(x.shape, x.device)  # padded with zeros
        return Range(-mean, mean)
    return _percentile(x, fmt, how.percentile)


def _search(x: Tensor, fmt: TensorFormat, how: RangeFit, outer: Tensor | None) -> Range:
    from qbench.formats.tensor import fake_quantize

    def error(candidate: Range) -> Tensor:
        delta = fake_quantize(x, fmt, candidate, outer).sub_(x)
        return fmt.blocks(delta.abs_().pow_(how.norm)).sum(dim=-1)

    full = extrema(x, fmt)
    lower, upper = full.lower, full.upper
    best = of_full = error(full)
    for step in range(1, round(how.max_shrink * how.grid)):
        share = 1 - step / how.grid
        candidate = Range(share * full.lower, share * full.upper)
        found = error(candidate)
        better = found < best
        best = torch.where(better, found, best)
        lower = torch.where(better, candidate.lower, lower)
        upper = torch.where(better, candidate.upper, upper)
    chosen = Range(lower, upper)
    # Scales that are stored together come out otherwise than each did among those of its own share.
    if fmt.scale.whole and bool(error(chosen).sum() > of_full.sum()):
        return full
    return chosen


def _percentile(x: Tensor, fmt: TensorFormat, percentile: float) -> Range:
    """Interpolated between neighbours in the sorted block, as numpy's default does."""
    ordered = fmt.blocks(x, torch.inf).sort(dim=-1).values  # what pads a block at the edge comes last
    last = fmt.block_sizes(x.shape, x.device).to(torch.int64) - 1
    place = last.double() * (percentile / 100)
    below = place.long()
    above, share = torch.minimum(below + 1, last), (place - below).float()

    def at(index: Tensor) -> Tensor:
        return ordered.gather(-1, index[..., None])[..., 0]

    lower, upper = (torch.lerp(at(a), at(b), share) for a, b in [(last - below, last - above), (below, above)])
    # The percentiles may leave out the one value that must not go on.
    finite = torch.isfinite(at(last) - at(torch.zeros_like(last)))
    lower, upper = lower.where(finite, torch.nan), upper.where(finite, torch.nan)
    if fmt.zero == "float":
        return Range(lower, upper)
    return Range(lower.clamp_max(0), upper.clamp_min(0))
