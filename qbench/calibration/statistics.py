"""Streaming statistics of a linear layer's input: sums and maxima over tokens, of no order and no batching."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor


class Statistic(Protocol):
    """A sum (or maximum) over input tokens x [..., in]; `tokens` counts them."""

    tokens: int

    def __init__(self, in_features: int, device: torch.device) -> None: ...

    def update(self, x: Tensor) -> None: ...

    def finish(self) -> None: ...

    def value(self) -> Tensor: ...

    def rescaled(self, scale: Tensor) -> Self: ...


class Hessian:
    """E[x xᵀ], float32 [in, in], the mean over tokens (METHODS 4.1; the usual factor 2 is left out: it cancels)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0
        self._averaged = False

    def update(self, x: Tensor) -> None:
        assert not self._averaged, "the mean has been taken"
        rows = x.reshape(-1, x.shape[-1]).float()
        self.total.addmm_(rows.t(), rows)
        self.tokens += rows.shape[0]

    def finish(self) -> None:
        """Ends the updates: the mean takes the sum's place, since two such matrices may not fit into memory."""
        if not self._averaged:
            self.total /= max(self.tokens, 1)
            self._averaged = True

    def value(self) -> Tensor:
        return self.total if self._averaged else self.total / max(self.tokens, 1)

    def rescaled(self, scale: Tensor) -> Self:
        """The statistic of x / scale: D⁻¹ H D⁻¹ with D = diag(scale), exactly what a fold does to the input."""
        other = type(self)(0, self.total.device)
        other.total = self.total / (scale[:, None] * scale[None, :])
        other.tokens, other._averaged = self.tokens, self._averaged
        return other


class AbsMean:
    """E|x_j|, float32 [in]: AWQ's measure of how salient an input channel is."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self.total += rows.abs().sum(dim=0)
        self.tokens += rows.shape[0]

    def finish(self) -> None:
        """Nothing to do: a vector costs nothing to keep."""

    def value(self) -> Tensor:
        return self.total / max(self.tokens, 1)

    def rescaled(self, scale: Tensor) -> Self:
        other = type(self)(0, self.total.device)
        other.total = self.total / scale
        other.tokens = self.tokens
        return other


class AbsMax:
    """max|x_j| over all tokens, float32 [in], 0 without any: how large an input channel gets (SmoothQuant)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.largest = torch.zeros(in_features, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows):  # a maximum over none does not exist
            self.largest = torch.maximum(self.largest, rows.abs().amax(dim=0).float())
        self.tokens += rows.shape[0]

    def finish(self) -> None:
        """Nothing to do: a vector costs nothing to keep."""

    def value(self) -> Tensor:
        return self.largest

    def rescaled(self, scale: Tensor) -> Self:
        other = type(self)(0, self.largest.device)
        other.largest = self.largest / scale
        other.tokens = self.tokens
        return other
