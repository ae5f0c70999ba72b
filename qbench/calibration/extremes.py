"""Smallest and largest value of every input channel: where a shift and a threshold of outliers come from."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor


class Extremes:
    """min x_j and max x_j over all tokens, float32 [2, in]; 0 without any. `tokens` counts them; their order and
    batching change nothing (see `Statistic`)."""

    paired: ClassVar[bool] = False

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.ends = torch.zeros(2, in_features, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):  # extremes of nothing do not exist
            return
        seen = torch.stack([rows.amin(dim=0), rows.amax(dim=0)]).float()
        if self.tokens:
            seen = torch.stack([torch.minimum(self.ends[0], seen[0]), torch.maximum(self.ends[1], seen[1])])
        self.ends = seen
        self.tokens += len(rows)

    def finish(self) -> None:
        """Nothing to do: two vectors cost nothing to keep."""

    def value(self) -> Tensor:
        return self.ends

    def rescaled(self, scale: Tensor) -> Self:
        """The statistic of x / scale, scale > 0."""
        other = type(self)(0, self.ends.device)
        other.ends, other.tokens = self.ends / scale, self.tokens
        return other
