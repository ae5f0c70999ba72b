"""Paired bootstrap: the difference of two runs on resampled items, or on resampled clusters of items."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from analysis.stats.estimates import cluster_totals, paired_values, require_share
from analysis.stats.paired import Link
from qbench.errors import EvaluationError

_DRAWN_AT_ONCE = 2**22  # bounds the memory of one portion of resamples


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """The difference, its standard error over resamples, percentile interval and two-sided p value.

    p is the share of resamples (the original counted as one of them) whose distance from the difference is at least
    that of the difference from 0: its smallest value is 1 / (resamples + 1).
    """

    value: float
    stderr: float
    low: float
    high: float
    p: float
    resamples: int


def paired_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    clusters: np.ndarray | None = None,
    *,
    link: Link = "mean",
    resamples: int = 9999,
    seed: int = 0,
    confidence: float = 0.95,
) -> Bootstrap:
    """Difference of the means (or of `link` of the means) of `a` and `b` [n] under resampling of items (Efron 1979).

    An item keeps its pair; with `clusters` [n] whole clusters are drawn, as many as there are, and the mean is over
    the items they bring along. The same seed gives the same numbers. Raises EvaluationError for fewer than two
    independent items.
    """
    require_share("confidence", confidence)
    if resamples < 1:
        raise EvaluationError(f"resamples={resamples}: expected at least 1")
    first, second = paired_values(a, b)
    if clusters is None:
        sums, sizes = np.stack([first, second]), np.ones(len(first))
    else:
        totals = [cluster_totals(each, clusters) for each in (first, second)]
        sums, sizes = np.stack([totals[0][0], totals[1][0]]), totals[0][1]
    if len(sizes) < 2:
        raise EvaluationError("a bootstrap needs two independent items, not one")
    value = float(_statistic(sums.sum(axis=1), sizes.sum(), link))
    drawn = np.concatenate(list(_resampled(sums, sizes, link, resamples, np.random.default_rng(seed))))
    if not np.isfinite(drawn).all():
        raise EvaluationError("bootstrap: the perplexity of a resample is too large to be represented")
    low, high = np.percentile(drawn, [50 * (1 - confidence), 50 * (1 + confidence)])
    # Rounding must not count: a constant difference has resamples that differ from it in the last bits.
    as_far = np.abs(drawn - value) >= abs(value) * (1 - 1e-9)
    p = (1 + int(as_far.sum())) / (resamples + 1)
    spread = float(np.std(drawn, ddof=1)) if resamples > 1 else 0.0
    return Bootstrap(value=value, stderr=spread, low=float(low), high=float(high), p=p, resamples=resamples)


def _resampled(
    sums: np.ndarray, sizes: np.ndarray, link: Link, resamples: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """The statistic of `resamples` draws, in portions; sums [2, G], sizes [G]."""
    count = len(sizes)
    rows = max(1, _DRAWN_AT_ONCE // count)
    for start in range(0, resamples, rows):
        index = rng.integers(0, count, (min(rows, resamples - start), count))
        with np.errstate(over="ignore"):  # refused above with a reason
            yield _statistic(sums[:, index].sum(axis=2), sizes[index].sum(axis=1), link)


def _statistic(sums: np.ndarray, size: np.ndarray, link: Link) -> np.ndarray:
    """Difference of `link` of means from sums [2, ...] over `size` [...] items."""
    means = sums / size
    if link == "exp_mean":
        means = np.exp(means)
    elif link == "root_mean":
        means = np.sqrt(means)
    return means[0] - means[1]
