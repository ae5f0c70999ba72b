"""Where to clip values that are known as a histogram, so that rounding and clipping cost the least squared error.

Lengths are in units of the bin width, in which bin k spans [k - BINS, k - BINS + 1]; values count as evenly spread in
their bin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.formats.element import Element, Int
from qbench.formats.ranges import Range
from qbench.formats.tensor import TensorFormat

BINS = 2048
"""Bins on either side of 0."""

_CHUNK = 32
"""Thresholds whose errors are computed together, and _GROUPS whose histograms: bound memory."""
_GROUPS = 512

_ENDS, _ROUNDS = 65, 3
"""Candidates per end and round; 2 * 2048 bins are down to single ones in three rounds."""


def best_range(counts: Tensor, width: Tensor, whole: Range, format: TensorFormat) -> Range:
    """Part of the `whole` range ([groups] each) that makes quantization in `format` cost least, [groups] each.

    counts: int [groups, 2 BINS]; width: float32 [groups], length of a bin. How scales are stored is left out: they
    count as exact. Without a zero point both ends are clipped at the same magnitude and errors are those of the
    element's own levels; with one, each has its own end and steps count as (upper - lower)^2 / (12 (2^b - 1)^2), as if
    values were spread evenly over a step (METHODS 3.1).
    """
    search = _symmetric if format.zero == "none" else _asymmetric
    parts = zip(*(x.split(_GROUPS) for x in (counts, width, whole.lower, whole.upper)), strict=True)
    found = [search(count, size, Range(low, high), format) for count, size, low, high in parts]
    lower, upper = (torch.cat(ends) for ends in zip(*found, strict=True))
    return Range(torch.maximum(whole.lower, lower), torch.minimum(whole.upper, upper))


def _symmetric(counts: Tensor, width: Tensor, whole: Range, format: TensorFormat) -> tuple[Tensor, Tensor]:
    largest = torch.maximum(-whole.lower, whole.upper)
    if isinstance(format.element, Int) and format.element.reach == "full":
        # The scale is negative where the largest value is positive: the levels are mirrored.
        counts = torch.where((whole.upper > -whole.lower)[:, None], counts.flip(1), counts)
    last = (largest / width).ceil().clamp_min(1)  # clipping beyond the extremes is none
    best = torch.full(largest.shape, torch.inf, dtype=torch.float64, device=counts.device)
    threshold = torch.ones_like(best)
    counts = counts.double()
    for some in torch.arange(1, BINS + 1, device=counts.device, dtype=torch.float64).split(_CHUNK):
        cost = counts @ bin_errors(format.element, some).t()
        lowest, place = cost.masked_fill_(some > last[:, None], torch.inf).min(dim=1)
        better = lowest < best
        best, threshold = torch.where(better, lowest, best), torch.where(better, some[place], threshold)
    found = threshold.float() * width
    return -found, found


def bin_errors(element: Element, thresholds: Tensor) -> Tensor:
    """Mean squared error in every bin, float64 [thresholds, 2 BINS], if the element's extent is at each threshold.

    With levels l_k that differ by d_k, the integral of (t - Q(t))^2 up to y is (y - l_k)^3 / 3 + sum_{i<k} d_i^3 / 12
    for the level l_k nearest to y, up to a constant; beyond the last level, too.
    """
    levels = element.codebook.double().to(thresholds.device)
    gaps = levels.diff()
    before = torch.cat([gaps.new_zeros(1), (gaps**3 / 12).cumsum(0)])
    scale = thresholds[:, None] / element.extent
    edges = torch.arange(-BINS, BINS + 1, device=thresholds.device, dtype=torch.float64)
    y = edges / scale
    if isinstance(element, Int):  # as below, without a search
        nearest = y.round().clamp_(element.minimum, element.maximum).sub_(element.minimum).long()
    else:
        nearest = torch.bucketize(y, (levels[1:] + levels[:-1]) / 2)
    integral = before[nearest] + (y - levels[nearest]) ** 3 / 3
    return integral.diff(dim=1) * scale**3


def _asymmetric(counts: Tensor, width: Tensor, whole: Range, format: TensorFormat) -> tuple[Tensor, Tensor]:
    """Both ends among the bins' edges: the best pair of a coarse grid, then of finer ones around it."""
    costs = _ClipCosts(counts.double(), format.element.steps)
    first, last = (whole.lower / width).floor().long() + BINS, (whole.upper / width).ceil().long() + BINS
    inside = format.zero == "int"  # 0 stays between the ends
    limits = (first, last.clamp_max(BINS) if inside else last), (first.clamp_min(BINS) if inside else first, last)
    spans = limits
    for _ in range(_ROUNDS):
        lower, upper = (_spread(*span) for span in spans)
        place = costs.of(lower, upper).flatten(1).argmin(dim=1, keepdim=True)
        ends = lower.gather(1, place // _ENDS), upper.gather(1, place % _ENDS)
        strides = [((high - low) / (_ENDS - 1)).ceil().long() for low, high in spans]
        spans = tuple(
            (torch.maximum(end[:, 0] - stride, low), torch.minimum(end[:, 0] + stride, high))
            for end, stride, (low, high) in zip(ends, strides, limits, strict=True)
        )
    return tuple((end[:, 0] - BINS).float() * width for end in ends)


def _spread(low: Tensor, high: Tensor) -> Tensor:
    """_ENDS edges from low to high, int64 [groups, _ENDS]."""
    share = torch.linspace(0, 1, _ENDS, dtype=torch.float64, device=low.device)
    return low[:, None] + ((high - low)[:, None] * share).round().long()


class _ClipCosts:
    """Squared errors of all values, from what their histogram (float64 [groups, 2 BINS]) adds up to below each edge."""

    def __init__(self, counts: Tensor, steps: int) -> None:
        self._steps = steps
        middle = torch.arange(-BINS, BINS, device=counts.device, dtype=torch.float64) + 0.5
        moments = torch.stack([counts, counts * middle, counts * (middle**2 + 1 / 12)])
        self._below = torch.nn.functional.pad(moments.cumsum(dim=2), (1, 0))

    def of(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Of all pairs of edges, int64 [groups, n] each: [groups, n, n], infinite where lower >= upper."""
        below, above = self._below.gather(2, lower.expand(3, -1, -1)), self._below.gather(2, upper.expand(3, -1, -1))
        beyond = self._below[..., -1:] - above
        clipped = _around(lower, below)[:, :, None] + _around(upper, beyond)[:, None, :]
        inside = above[0][:, None, :] - below[0][:, :, None]
        length = (upper[:, None, :] - lower[:, :, None]).double()
        cost = clipped + inside * length**2 / (12 * self._steps**2)
        return cost.masked_fill_(length <= 0, torch.inf)


def _around(edge: Tensor, moments: Tensor) -> Tensor:
    """Sum of (x - e)^2 at edges e, [groups, n], from the moments of order 0, 1, 2 of x, [3, groups, n]."""
    e = (edge - BINS).double()
    return moments[2] - 2 * e * moments[1] + e**2 * moments[0]
