"""Ranges of a linear layer's input from calibration text, for scales that are fixed before the model is used.

All tokens share the scales of a static format: one per tensor, per group of features or per feature. A format's own
`range` is about the tensor at hand and plays no part here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.calibration.clipping import BINS, best_range
from qbench.errors import NumericsError
from qbench.formats.ranges import Range
from qbench.formats.scheme import Calibration
from qbench.formats.tensor import TensorFormat

MOMENTUM = 0.01
"""Weight of a new sequence in the moving average (METHODS 0.2)."""

_SMALLEST_EXPONENT = -100
"""Smaller magnitudes count as 2^-100, so that the number of bins per unit does not overflow."""


class InputRanges(Protocol):
    """Range of every group of features of inputs x `[..., in]`, updated as they come; `tokens` counts them.

    How tokens are split into updates changes nothing, and their order only the moving average.
    """

    tokens: int

    def __init__(self, in_features: int, device: torch.device, format: TensorFormat) -> None: ...

    def update(self, x: Tensor) -> None: ...

    def range(self) -> Range:
        """float32 [1, groups] each, with 0 inside unless the format has a float zero point; NumericsError before the
        first token and where the inputs were not finite."""


class MinMax:
    """The extremes over all tokens."""

    def __init__(self, in_features: int, device: torch.device, format: TensorFormat) -> None:
        groups = format.groups(in_features)
        self.format, self.tokens = format, 0
        self.lower = torch.full((groups,), torch.inf, device=device)
        self.upper = torch.full((groups,), -torch.inf, device=device)

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows):
            self.tokens += len(rows)
            lower, upper = _extremes(rows, self.format)
            self.lower, self.upper = torch.minimum(self.lower, lower), torch.maximum(self.upper, upper)

    def range(self) -> Range:
        return _range(self.lower, self.upper, self)


class MovingMinMax:
    """The moving average m <- m + c (e - m), c = 0.01, of each sequence's extremes e, from the first one's on.

    x is [sequences, length, in]; x `[tokens, in]` counts as one sequence.
    """

    def __init__(self, in_features: int, device: torch.device, format: TensorFormat) -> None:
        self.format, self.tokens = format, 0
        self.average = torch.zeros(2, format.groups(in_features), device=device)

    def update(self, x: Tensor) -> None:
        if not x.numel():
            return
        sequences = x if x.ndim == 3 else x[None]
        for extremes in torch.stack(_extremes(sequences, self.format), dim=1):
            self.average = extremes if self.tokens == 0 else self.average + MOMENTUM * (extremes - self.average)
            self.tokens += sequences.shape[1]

    def range(self) -> Range:
        return _range(self.average[0], self.average[1], self)


class Histogram:
    """The range with the least expected squared error of rounding and clipping (METHODS 3.1).

    2048 bins on either side of 0 reach up to the smallest power of two above the largest magnitude in the group. When
    that grows, neighbouring bins merge, which gives exactly the counts of bins that had been as wide from the start; so
    1024 bins at least cover the largest magnitude.
    """

    def __init__(self, in_features: int, device: torch.device, format: TensorFormat) -> None:
        groups = format.groups(in_features)
        self.format = format
        self.extremes = MinMax(in_features, device, format)
        self.counts = torch.zeros(groups, 2 * BINS, dtype=torch.int32, device=device)
        self.exponent = torch.full((groups,), _SMALLEST_EXPONENT, dtype=torch.int32, device=device)
        self.group = torch.arange(in_features, device=device) // format.width(in_features)

    @property
    def tokens(self) -> int:
        return self.extremes.tokens

    def update(self, x: Tensor) -> None:
        self.extremes.update(x)
        if not x.numel():
            return
        magnitude = torch.maximum(-self.extremes.lower, self.extremes.upper)
        if not torch.isfinite(magnitude).all():
            return  # there are no bins for them; `range` refuses
        self._widen(torch.frexp(magnitude)[1].clamp_min(_SMALLEST_EXPONENT))
        per_unit = BINS / self._top()  # a power of two: the product below rounds nothing
        bins = (x.reshape(-1, x.shape[-1]).float() * per_unit[self.group]).floor_().add_(BINS).to(torch.int64)
        bins += self.group * (2 * BINS)
        self.counts += torch.bincount(bins.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def range(self) -> Range:
        whole = self.extremes.range()
        lower, upper = whole.lower[0], whole.upper[0]
        found = best_range(self.counts, self._top() / BINS, Range(lower, upper), self.format)
        return _range(found.lower, found.upper, self)

    def _top(self) -> Tensor:
        return torch.ldexp(torch.ones_like(self.extremes.lower), self.exponent)

    def _widen(self, exponent: Tensor) -> None:
        """Bins for magnitudes below 2^exponent, int32 [groups]."""
        steps = (exponent - self.exponent).clamp_max(BINS.bit_length())  # then all are in the two innermost bins
        for step in range(int(steps.max())):
            merged = F.pad(self.counts.view(-1, BINS, 2).sum(dim=2, dtype=torch.int32), (BINS // 2, BINS // 2))
            self.counts = torch.where((steps > step)[:, None], merged, self.counts)
        self.exponent = torch.maximum(exponent, self.exponent)


RANGES: Mapping[Calibration, Callable[[int, torch.device, TensorFormat], InputRanges]] = {
    "minmax": MinMax,
    "moving": MovingMinMax,
    "histogram": Histogram,
}


def _extremes(x: Tensor, format: TensorFormat) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, float32 [..., groups], of x `[..., tokens, in]` over tokens and each group."""
    width = format.width(x.shape[-1])
    missing = format.groups(x.shape[-1]) * width - x.shape[-1]
    lower, upper = x.amin(dim=-2).float(), x.amax(dim=-2).float()
    lower, upper = F.pad(lower, (0, missing), value=torch.inf), F.pad(upper, (0, missing), value=-torch.inf)
    return lower.unflatten(-1, (-1, width)).amin(dim=-1), upper.unflatten(-1, (-1, width)).amax(dim=-1)


def _range(lower: Tensor, upper: Tensor, found: InputRanges) -> Range:
    """[1, groups] of [groups], with 0 inside where the zero point needs it (see `formats.ranges.extrema`)."""
    if not found.tokens:
        raise NumericsError("static scales need calibration tokens, 0 were seen")
    if not (torch.isfinite(lower) & torch.isfinite(upper)).all():
        raise NumericsError("activations on calibration text contain NaN or infinity")
    if found.format.zero == "float":
        return Range(lower[None], upper[None])
    return Range(lower[None].clamp_max(0), upper[None].clamp_min(0))
