"""Streaming statistics of a linear layer's input: sums and maxima over tokens, of no order and no batching."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor


class Statistic(Protocol):
    """A sum (or maximum) over input tokens x [..., in]; `tokens` counts them. paired: whether `update` also takes the
    same tokens' input on the full-precision stream."""

    paired: ClassVar[bool]
    tokens: int

    def __init__(self, in_features: int, device: torch.device) -> None: ...

    def update(self, x: Tensor) -> None: ...

    def finish(self) -> None: ...

    def value(self) -> Tensor: ...

    def rescaled(self, scale: Tensor) -> Self: ...


class _SecondMoment:
    """The mean over tokens of an outer product, float32 [in, in], which is summed until it is finished."""

    paired: ClassVar[bool] = False

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0
        self._averaged = False

    def _add(self, left: Tensor, right: Tensor) -> None:
        """Adds Σ left rightᵀ over tokens, float32 [tokens, in] each."""
        assert not self._averaged, "the mean has been taken"
        self.total.addmm_(left.t(), right)
        self.tokens += right.shape[0]

    def finish(self) -> None:
        """Ends the updates: the mean takes the sum's place, since two such matrices may not fit into memory."""
        if not self._averaged:
            self.total /= max(self.tokens, 1)
            self._averaged = True

    def value(self) -> Tensor:
        return self.total if self._averaged else self.total / max(self.tokens, 1)

    def rescaled(self, scale: Tensor) -> Self:
        """The statistic of x / scale: D⁻¹ H D⁻¹ with D = diag(scale), exactly what a fold does to the input."""
        return self._like(self.total / (scale[:, None] * scale[None, :]))

    def transformed(self, transform: Callable[[Tensor], Tensor]) -> Self:
        """The statistic of x T: Tᵀ H T, where transform(x) is x T for x [..., in]."""
        return self._like(transform(transform(self.total).t()).t().contiguous())

    def _like(self, total: Tensor) -> Self:
        other = type(self)(0, self.total.device)
        other.total, other.tokens, other._averaged = total, self.tokens, self._averaged
        return other


class Hessian(_SecondMoment):
    """E[x xᵀ], float32 [in, in], the mean over tokens (METHODS 4.1; the usual factor 2 is left out: it cancels)."""

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self._add(rows, rows)


class CrossMoment(_SecondMoment):
    """E[(x_full - x) xᵀ], float32 [in, in]: how far inputs x behind quantized layers lie from those x_full of the
    untouched model at the same tokens, by the inputs themselves (GPTAQ, arXiv 2504.02692: ΔX Xᵀ over tokens)."""

    paired: ClassVar[bool] = True

    def update(self, x: Tensor, full: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self._add(full.reshape(rows.shape).float() - rows, rows)


class AbsMean:
    """E|x_j|, float32 [in]: AWQ's measure of how salient an input channel is."""

    paired: ClassVar[bool] = False

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

    paired: ClassVar[bool] = False

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


class LoudestTokens:
    """Row j is the token in which |x_j| is largest, float32 [in, in]: real inputs that hold every channel's extreme.

    The diagonal's magnitudes are what `AbsMax` gives. A token that many channels peak in stands in many rows; of equal
    magnitudes the first token seen counts.
    """

    paired: ClassVar[bool] = False

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.rows = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        seen = x.reshape(-1, x.shape[-1])
        if len(seen):
            largest, place = seen.abs().max(dim=0)
            louder = (largest > self.rows.diagonal().abs()) | largest.isnan()  # nothing is larger than a NaN: it stays
            self.rows[louder] = seen[place[louder]].float()
        self.tokens += seen.shape[0]

    def finish(self) -> None:
        """Nothing to do: these are tokens, not a sum."""

    def value(self) -> Tensor:
        return self.rows

    def rescaled(self, scale: Tensor) -> Self:
        """The statistic of x / scale, exactly: no channel's largest token changes."""
        other = type(self)(0, self.rows.device)
        other.rows, other.tokens = self.rows / scale, self.tokens
        return other
