"""Where to clip values that are known as a histogram, so that rounding and clipping cost the least squared error.

Lengths are in units of the bin width: bin k spans [k - BINS, k - BINS + 1], and values are evenly spread in their bin.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.formats.element import Int
from qbench.formats.ranges import Range
from qbench.formats.tensor import TensorFormat

BINS = 2048
"""Bins on either side of 0."""

_ENDS, _ROUNDS = 33, 3
"""Candidates for an end in each round; from 2 * 2048 bins, three rounds come down to single ones."""

_AT_ONCE = 1 << 20
"""Levels looked at together: bounds memory to some ten megabytes."""


def best_range(counts: Tensor, width: Tensor, whole: Range, format: TensorFormat) -> Range:
    """The part of the `whole` range ([groups] each) with which quantizing in `format` costs least, [groups] each.

    counts: int [groups, 2 BINS]; width: float32 [groups], length of a bin. Ends are tried at the bins' edges, in steps
    that are refined around the best. The error is that of the format's own levels, but scales count as exact, however
    they are stored. Without a zero point both ends are clipped at one magnitude, with one each has its own.
    """
    search = _one_magnitude if format.zero == "none" else _two_ends
    candidates = _ENDS if format.zero == "none" else _ENDS**2
    some = max(1, _AT_ONCE // (candidates * len(format.element.codebook)))
    parts = zip(*(x.split(some) for x in (counts, width, whole.lower, whole.upper)), strict=True)
    found = [
        search(Density(count.double()), low.double() / size, high.double() / size, format)
        for count, size, low, high in parts
    ]
    lower, upper = (torch.cat(ends).float() * width for ends in zip(*found, strict=True))
    return Range(torch.maximum(whole.lower, lower), torch.minimum(whole.upper, upper))


class Density:
    """Values of each group by their histogram, float64 [groups, 2 BINS]."""

    def __init__(self, counts: Tensor) -> None:
        middle = torch.arange(-BINS, BINS, device=counts.device, dtype=torch.float64) + 0.5
        self._moments = counts.sum(1), (counts * middle).sum(1), (counts * (middle**2 + 1 / 12)).sum(1)
        self._counts = F.pad(counts, (0, 1))
        self._below = F.pad(counts.cumsum(1), (1, 0))  # at the edges: how many values are below
        self._areas = F.pad((self._below[:, :-1] + counts / 2).cumsum(1), (1, 0))  # and its integral up to there

    def cost(self, levels: Tensor) -> Tensor:
        """Sum over values of the squared distance to the nearest level, [groups, n], for `levels` ascending, float64
        [groups, n, K].

        With N(t) values below t, A its integral, and levels l_k that meet at m_k = (l_k + l_{k+1}) / 2, this is
        sum (x - l_K)^2 - 2 sum_k (l_{k+1} - l_k) A(m_k): a value counts as rounded to l_K, and every level it does not
        reach takes off what is too much.
        """
        middles, top = (levels[..., 1:] + levels[..., :-1]) / 2, levels[..., -1]
        saved = (levels.diff(dim=-1) * self._area(middles)).sum(dim=-1)
        zeroth, first, second = (moment[:, None] for moment in self._moments)
        return second - 2 * top * first + top**2 * zeroth - 2 * saved

    def _area(self, t: Tensor) -> Tensor:
        """A(t), [groups, n, K]: quadratic within a bin, linear beyond the last."""
        shape, t = t.shape, t.clamp_min(-BINS).flatten(1)
        edge = t.floor().clamp_max_(BINS)
        rest, edge = t - edge, edge.long() + BINS
        below, area, count = (table.gather(1, edge) for table in (self._below, self._areas, self._counts))
        return (area + rest * (below + rest * count / 2)).view(shape)


def _one_magnitude(density: Density, lower: Tensor, upper: Tensor, format: TensorFormat) -> tuple[Tensor, Tensor]:
    unit = (format.element.codebook.double() / format.element.extent).to(lower.device).expand(len(lower), -1)
    full = isinstance(format.element, Int) and format.element.reach == "full"
    # With that reach the scale is negative where the largest value is positive: the levels are mirrored.
    mirrored = (upper > -lower) & full
    unit = torch.where(mirrored[:, None], -unit.flip(1), unit)
    # Clipping beyond the extremes is none; and a magnitude of 0 has no levels.
    limits = span = torch.ones_like(lower), torch.maximum(-lower, upper).ceil().clamp_min(1)
    for _ in range(_ROUNDS):
        tried = _spread(span)
        place = density.cost(tried[..., None] * unit[:, None]).argmin(dim=1)
        best = tried.gather(1, place[:, None])[:, 0]
        span = _around(best, span, limits)
    # Clipped at one magnitude, the side that was the larger has to remain so.
    return torch.where(mirrored, -best * (1 - 2.0**-20), -best), best


def _two_ends(density: Density, lower: Tensor, upper: Tensor, format: TensorFormat) -> tuple[Tensor, Tensor]:
    codes = format.element.codebook.double().to(lower.device)
    first, last = lower.floor(), upper.ceil()
    inside = format.zero == "int"  # 0 stays between the ends
    limits = (first, last.clamp_max(0) if inside else last), (first.clamp_min(0) if inside else first, last)
    spans = limits
    for _ in range(_ROUNDS):
        lows, highs = (_spread(span) for span in spans)
        low, high = lows[:, :, None].expand(-1, -1, _ENDS).flatten(1), highs.repeat(1, _ENDS)
        step = (high - low).clamp_min(1) / format.element.steps
        zero = (-low / step).round() if inside else -low / step
        cost = density.cost((codes - zero[..., None]) * step[..., None])
        place = cost.masked_fill_(high <= low, torch.inf).argmin(dim=1)[:, None]
        best = low.gather(1, place)[:, 0], high.gather(1, place)[:, 0]
        spans = tuple(_around(*each) for each in zip(best, spans, limits, strict=True))
    return best


def _spread(span: tuple[Tensor, Tensor]) -> Tensor:
    """Edges from one end of the span to the other, float64 [groups, _ENDS]."""
    low, high = span
    return (low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, _ENDS).to(low)).round()


def _around(best: Tensor, span: tuple[Tensor, Tensor], limits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The next span: as far to either side of the best edge as the last one's neighbours were."""
    stride = ((span[1] - span[0]) / (_ENDS - 1)).ceil()
    return torch.maximum(best - stride, limits[0]), torch.minimum(best + stride, limits[1])
