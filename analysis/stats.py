"""Estimates with standard errors from per-window losses.

A window's loss is its mean negative log-likelihood in nats per token. Windows have equal token counts, so
that the mean over windows is the mean over tokens, and perplexity is exp of it. The windows count as a simple
random sample of the text: neighbouring windows of one document resemble each other, so a standard error is
rather too small. For the same reason differences are taken window by window: what a window has by being hard
cancels, which makes a paired standard error several times smaller than the two single ones suggest.
"""

import math
from dataclasses import dataclass

import numpy as np

from qbench.errors import EvaluationError


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value, its standard error in the same unit (None for n = 1: one window shows no spread) and the
    windows used."""

    value: float
    stderr: float | None
    n: int


def mean_nll(nll: np.ndarray) -> Estimate:
    """Mean of the per-window losses [n], in nats per token, with stderr s / √n (s with n - 1 degrees of
    freedom)."""
    losses = _checked(nll, "losses")
    n = len(losses)
    stderr = float(np.std(losses, ddof=1)) / math.sqrt(n) if n > 1 else None
    return Estimate(value=float(np.mean(losses)), stderr=stderr, n=n)


def perplexity(nll: np.ndarray) -> Estimate:
    """exp of the mean of the per-window losses [n]; stderr by the delta method, d exp(m) = exp(m) dm."""
    mean = mean_nll(nll)
    value = _exp(mean.value)
    return Estimate(value=value, stderr=None if mean.stderr is None else value * mean.stderr, n=mean.n)


def nll_difference(a: np.ndarray, b: np.ndarray) -> Estimate:
    """Mean loss of `a` minus that of `b` on the same windows, [n] each in the same order, with paired
    stderr."""
    first, second = _paired(a, b)
    return mean_nll(first - second)


def perplexity_difference(a: np.ndarray, b: np.ndarray) -> Estimate:
    """Perplexity of `a` minus that of `b` on the same windows, [n] each in the same order, with paired
    stderr.

    Delta method on the pairs: to first order exp(mean a) - exp(mean b) moves with the mean of
    ppl_a · a_i - ppl_b · b_i over the windows, whose standard error is therefore that of the difference.
    """
    first, second = _paired(a, b)
    ppl_a, ppl_b = _exp(float(np.mean(first))), _exp(float(np.mean(second)))
    linear = mean_nll(ppl_a * first - ppl_b * second)
    return Estimate(value=ppl_a - ppl_b, stderr=linear.stderr, n=linear.n)


def _paired(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = _checked(a, "first losses"), _checked(b, "second losses")
    if len(first) != len(second):
        raise EvaluationError(
            f"paired difference of {len(first)} and {len(second)} windows: both runs need the same windows"
        )
    return first, second


def _checked(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise EvaluationError(f"{name} have shape {array.shape}: expected one number per window")
    if not np.isfinite(array).all():
        raise EvaluationError(f"{name} hold {array[~np.isfinite(array)][0]}: expected finite numbers")
    return array


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        raise EvaluationError(f"perplexity exp({mean:.6g}) is too large to be represented") from None
