"""Many tests at once: Holm's correction, who is as good as the best, and whether two metrics rank alike."""

import math
from collections.abc import Sequence

import numpy as np

from analysis.stats.estimates import require_share
from analysis.stats.paired import Test, paired_test
from qbench.errors import EvaluationError


def holm(p_values: Sequence[float]) -> np.ndarray:
    """The p values [k] adjusted for their number (Holm 1979), in the order given.

    Rejecting what is below alpha keeps the chance of any false rejection below alpha, however the tests depend on
    each other. NaN stands for a test that was not made: it stays NaN and does not count.
    """
    given = np.asarray(p_values, dtype=np.float64)
    made = np.flatnonzero(~np.isnan(given))
    if ((given[made] < 0) | (given[made] > 1)).any():
        raise EvaluationError(f"p values {given.tolist()}: expected numbers between 0 and 1")
    order = made[np.argsort(given[made], kind="stable")]
    weighted = given[order] * np.arange(len(made), 0, -1)
    adjusted = np.full(len(given), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(weighted), 1.0)
    return adjusted


def tied_best(
    samples: Sequence[np.ndarray],
    *,
    higher_is_better: bool,
    clusters: np.ndarray | None = None,
    alpha: float = 0.05,
) -> np.ndarray:
    """Which of k runs on the same items are the best or not distinguishable from it: bool [k].

    Every run (its items, [n]) is tested against the one with the best mean, two-sidedly and paired, and the k - 1
    p values are Holm-corrected. One item tells nothing apart but equal values.
    """
    require_share("alpha", alpha)
    if not len(samples):
        return np.zeros(0, dtype=bool)
    means = [float(np.mean(each)) for each in samples]
    best = int(np.argmax(means) if higher_is_better else np.argmin(means))
    if len(samples[best]) < 2 or (clusters is not None and len(np.unique(clusters)) < 2):
        return np.array([value == means[best] for value in means])
    p_values = [
        math.nan if index == best else paired_test(each, samples[best], clusters).p
        for index, each in enumerate(samples)
    ]
    adjusted = holm(p_values)
    return np.isnan(adjusted) | (adjusted >= alpha)


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> Test:
    """Kendall's tau-b of two metrics over the same k runs, with its two-sided p value (exact for few runs without
    ties, else asymptotic).

    Of a metric that is better when lower give the negative: then 1 is "both rank alike". The statistic is NaN where
    one of the metrics is the same for all runs.
    """
    from scipy.stats import kendalltau  # here: it takes seconds to import

    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise EvaluationError(f"ranks of {first.shape} and {second.shape} values: expected two or more of each")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise EvaluationError("ranks of values that are not finite numbers")
    found = kendalltau(first, second)
    return Test(method="Kendall tau-b", statistic=float(found.statistic), p=float(found.pvalue))
