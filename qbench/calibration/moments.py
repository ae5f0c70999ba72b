"""How heavy the tails of a distribution are: kurtosis of a tensor, or of values that come in pieces."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Central moments up to the fourth of all values seen, whatever pieces they come in.

    Within a piece in float32, between pieces in float64 by Chan's and Pébay's update (Sandia report SAND2008-6212,
    eq. 2.1): sums of powers about zero would cancel where the mean is large.
    """

    def __init__(self) -> None:
        self.count, self._mean, self._sums = 0, 0.0, (0.0, 0.0, 0.0)

    def update(self, x: Tensor) -> None:
        """Values of any shape and floating dtype."""
        if not x.numel():
            return
        values = x.float()
        mean = values.mean()
        delta = values - mean
        square = delta.square()
        second, third = square.sum(dtype=torch.float64), (square * delta).sum(dtype=torch.float64)
        fourth = square.square_().sum(dtype=torch.float64)
        self._merge(x.numel(), mean.item(), (second.item(), third.item(), fourth.item()))

    def _merge(self, count: int, mean: float, sums: tuple[float, float, float]) -> None:
        m, n = self.count, count
        (a2, a3, a4), (b2, b3, b4) = self._sums, sums
        d, total = mean - self._mean, m + n
        self._sums = (
            a2 + b2 + d**2 * m * n / total,
            a3 + b3 + d**3 * m * n * (m - n) / total**2 + 3 * d * (m * b2 - n * a2) / total,
            a4
            + b4
            + d**4 * m * n * (m**2 - m * n + n**2) / total**3
            + 6 * d**2 * (m**2 * b2 + n**2 * a2) / total**2
            + 4 * d * (m * b3 - n * a3) / total,
        )
        self._mean += d * n / total
        self.count = total

    def kurtosis(self) -> float | None:
        """E[(x - μ)⁴] / σ⁴ over all values: 3 for a normal distribution, 1 for two values equally often; None where
        all values are equal (or there are none)."""
        second, _, fourth = self._sums
        return None if second == 0 else fourth * self.count / second**2


def kurtosis(x: Tensor) -> float | None:
    """The same of a whole tensor at once, in float32."""
    values = x.float()
    square = (values - values.mean()).square_()
    second = square.mean()
    return None if second == 0 else square.div_(second).square_().mean().item()
