"""Learnable weight clipping (LWC; OmniQuant, arXiv 2308.13137, eq. 2): shares of a weight's extremes to learn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.formats import Range

#: Shares below this have no logit worth starting from.
SMALLEST_SHARE = 1e-4


@dataclass(frozen=True)
class Clipping:
    """Learned shares of a weight's extremes, [rows, groups] each: upper = share(γ) max W, lower = share(β) min W.

    share(γ) = start + (σ(γ) - σ(γ0)), with γ0 where γ began. Without an earlier range start = σ(γ0): the authors' σ(γ)
    (eq. 2). From an earlier range start is its share of the extremes, so that training begins exactly there; γ0 is its
    logit, at most `init`, where there is still a gradient (a range that was never cut has an infinite one).
    """

    lower: Tensor
    upper: Tensor
    lower_start: Tensor
    upper_start: Tensor
    lower_logit: Tensor
    upper_logit: Tensor

    @classmethod
    def start(cls, full: Range, bounds: Range | None, init: float) -> Clipping:
        """full: extremes of the weight. bounds: an earlier range, or None. init: γ and β without one (authors: 4)."""
        ends = [_begin(extreme, None if bounds is None else end, init) for extreme, end in _ends(full, bounds)]
        (lower_start, lower_logit), (upper_start, upper_logit) = ends
        leaves = (logit.clone().requires_grad_() for logit in (lower_logit, upper_logit))
        return cls(*leaves, lower_start, upper_start, lower_logit, upper_logit)

    @property
    def shares(self) -> tuple[Tensor, Tensor]:
        """Of the smallest and of the largest value."""
        return (
            self.lower_start + (self.lower.sigmoid() - self.lower_logit.sigmoid()),
            self.upper_start + (self.upper.sigmoid() - self.upper_logit.sigmoid()),
        )

    def range(self, full: Range) -> Range:
        """The clipped range of a weight with these extremes."""
        lower, upper = self.shares
        return Range(lower * full.lower, upper * full.upper)


def _ends(full: Range, bounds: Range | None) -> list[tuple[Tensor, Tensor]]:
    bounds = bounds or full
    return [(full.lower, bounds.lower.to(full.lower)), (full.upper, bounds.upper.to(full.upper))]


def _begin(extreme: Tensor, end: Tensor | None, init: float) -> tuple[Tensor, Tensor]:
    """The share of the extreme that a range starts from, and its logit."""
    logit = torch.full_like(extreme, init)
    if end is None:
        return logit.sigmoid(), logit
    share = torch.where(extreme != 0, end / extreme, torch.ones_like(extreme)).clamp_min(SMALLEST_SHARE)
    return share, torch.logit(share.clamp_max(1 - SMALLEST_SHARE)).clamp_max(init)
