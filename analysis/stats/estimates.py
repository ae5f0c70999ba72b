"""Values with standard errors and confidence intervals, from one number per item.

A window's loss is its mean negative log-likelihood in nats per token. Windows have equal token counts, so that the
mean over windows is the mean over tokens, and perplexity is exp of it. Items count as a simple random sample unless
it is said which belong together (`clusters`): windows of one document resemble each other, and a standard error that
ignores it is too small.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special  # not scipy.stats, which takes seconds to import

from qbench.errors import EvaluationError


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value, its standard error in the same unit (None where only one independent item was seen: it shows no
    spread), the items used, and into how many clusters they fall (None: each is its own)."""

    value: float
    stderr: float | None
    n: int
    clusters: int | None = None

    @property
    def df(self) -> int:
        """Degrees of freedom of the standard error: independent items less one."""
        return (self.n if self.clusters is None else self.clusters) - 1


def mean(values: np.ndarray, clusters: np.ndarray | None = None) -> Estimate:
    """Mean of `values` [n] with its standard error.

    Without `clusters` it is s / √n with n - 1 degrees of freedom in s; of right and wrong answers (0, 1) that is
    √(p (1 - p) / (n - 1)). With `clusters` [n], equal numbers for items that belong together, it is the
    cluster-robust error of a mean (Liang & Zeger 1986; Cameron & Miller 2015, with their factor G / (G - 1)):
    √(G / (G - 1) Σ_g (Σ_{i in g} (x_i - mean))²) / n for G clusters, the same as above where every item is its own.
    """
    array = _checked(values, "values")
    n, center = len(array), float(np.mean(array))
    if clusters is None:
        stderr = float(np.std(array, ddof=1)) / math.sqrt(n) if n > 1 else None
        return Estimate(value=center, stderr=stderr, n=n)
    totals, _ = cluster_totals(array - center, clusters)
    count = len(totals)
    stderr = math.sqrt(count / (count - 1) * float(totals @ totals)) / n if count > 1 else None
    return Estimate(value=center, stderr=stderr, n=n, clusters=count)


def mean_nll(nll: np.ndarray, clusters: np.ndarray | None = None) -> Estimate:
    """Mean of the per-window losses [n], in nats per token."""
    return mean(nll, clusters)


def perplexity(nll: np.ndarray, clusters: np.ndarray | None = None) -> Estimate:
    """exp of the mean of the per-window losses [n]; stderr by the delta method, d exp(m) = exp(m) dm."""
    loss = mean(nll, clusters)
    value = exp(loss.value)
    stderr = None if loss.stderr is None else value * loss.stderr
    return Estimate(value=value, stderr=stderr, n=loss.n, clusters=loss.clusters)


def interval(estimate: Estimate, confidence: float = 0.95) -> tuple[float, float]:
    """value ± t · stderr, t of Student's distribution with the estimate's degrees of freedom; infinite ends where
    there is no standard error."""
    require_share("confidence", confidence)
    if estimate.stderr is None:
        return -math.inf, math.inf
    half = float(special.stdtrit(estimate.df, 0.5 + confidence / 2)) * estimate.stderr
    return estimate.value - half, estimate.value + half


def perplexity_interval(
    nll: np.ndarray, clusters: np.ndarray | None = None, confidence: float = 0.95
) -> tuple[float, float]:
    """exp of the interval of the mean loss: unlike value ± t · stderr never below zero."""
    low, high = interval(mean(nll, clusters), confidence)
    return exp(low), math.inf if high == math.inf else exp(high)


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927): unlike value ± z · stderr it stays in [0, 1] and does not
    shrink to nothing where all or no items succeed."""
    require_share("confidence", confidence)
    if not 0 <= successes <= n or n < 1:
        raise EvaluationError(f"{successes} successes of {n}: expected 0 <= successes <= n and n >= 1")
    z = float(special.ndtri(0.5 + confidence / 2))
    share, weight = successes / n, z * z / n
    center = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    # The ends at 0 and 1 are exact; rounding would put them beside.
    return (0.0 if successes == 0 else center - half), (1.0 if successes == n else center + half)


def cluster_totals(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sums of `values` [n] over each cluster, items of each cluster), float64 [G] both."""
    labels = np.asarray(clusters)
    if labels.shape != values.shape:
        raise EvaluationError(f"clusters have shape {labels.shape}: expected one per item, {values.shape}")
    _, index = np.unique(labels, return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(np.float64)


def paired_values(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [n]; EvaluationError unless they have as many items."""
    first, second = _checked(a, "first values"), _checked(b, "second values")
    if len(first) != len(second):
        raise EvaluationError(f"paired difference of {len(first)} and {len(second)} items: both need the same items")
    return first, second


def require_share(name: str, value: float) -> None:
    """EvaluationError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise EvaluationError(f"{name}={value}: expected a number between 0 and 1")


def exp(exponent: float) -> float:
    """exp; EvaluationError where the perplexity is too large to be represented."""
    try:
        return math.exp(exponent)
    except OverflowError:
        raise EvaluationError(f"perplexity exp({exponent:.6g}) is too large to be represented") from None


def _checked(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise EvaluationError(f"{name} have shape {array.shape}: expected one number per item")
    if not np.isfinite(array).all():
        raise EvaluationError(f"{name} hold {array[~np.isfinite(array)][0]}: expected finite numbers")
    return array
