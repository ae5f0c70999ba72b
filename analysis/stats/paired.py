"""Two runs on the same items: differences, tests of whether there is one, and of whether there is none that matters.

Differences are taken item by item: what an item has by being hard cancels, which makes a paired standard error
several times smaller than the two single ones suggest.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from analysis.stats.estimates import Estimate, exp, mean, paired_values
from qbench.errors import EvaluationError

#: With fewer discordant pairs McNemar's test is the exact binomial one.
EXACT_BELOW = 25

#: How a metric's value follows from the mean of its items: as it is, exp of it, or its root.
Link = Literal["mean", "exp_mean", "root_mean"]


@dataclass(frozen=True, kw_only=True)
class Test:
    """A two-sided p value, the statistic behind it (NaN where there is none) and the test's name with what the reader
    has to know of it."""

    __test__ = False  # pytest: nothing to collect

    method: str
    statistic: float
    p: float


@dataclass(frozen=True, kw_only=True)
class Flips:
    """How 0/1 items fall together: right in both, only in the first, only in the second, in neither."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def discordant(self) -> int:
        return self.only_first + self.only_second


def nll_difference(a: np.ndarray, b: np.ndarray, clusters: np.ndarray | None = None) -> Estimate:
    """Mean of `a` minus that of `b` on the same items, [n] each in the same order, with paired stderr."""
    first, second = paired_values(a, b)
    return mean(first - second, clusters)


def perplexity_difference(a: np.ndarray, b: np.ndarray, clusters: np.ndarray | None = None) -> Estimate:
    """Perplexity of `a` minus that of `b` on the same windows, [n] each in the same order, with paired
    stderr.

    Delta method on the pairs: to first order exp(mean a) - exp(mean b) moves with the mean of
    ppl_a · a_i - ppl_b · b_i over the windows, whose standard error is therefore that of the difference.
    """
    return difference(a, b, clusters, "exp_mean")


def difference(a: np.ndarray, b: np.ndarray, clusters: np.ndarray | None = None, link: Link = "mean") -> Estimate:
    """The paired difference of a metric whose value is a function of the mean of its items, with its stderr by the
    delta method."""
    first, second = paired_values(a, b)
    value_a, slope_a = linked(float(np.mean(first)), link)
    value_b, slope_b = linked(float(np.mean(second)), link)
    linear = mean(slope_a * first - slope_b * second, clusters)
    return Estimate(value=value_a - value_b, stderr=linear.stderr, n=linear.n, clusters=linear.clusters)


def linked(center: float, link: Link) -> tuple[float, float]:
    """(value, its derivative) for a mean of items; EvaluationError for the root of a negative one."""
    if link == "exp_mean":
        value = exp(center)
        return value, value
    if link == "root_mean":
        if center < 0:
            raise EvaluationError(f"root of the mean {center:.6g}: expected items that are squares")
        root = math.sqrt(center)
        return root, 0.5 / root if root else 0.0  # a mean of squares is 0 only if all are: then nothing varies
    return center, 1.0


def paired_t(a: np.ndarray, b: np.ndarray, clusters: np.ndarray | None = None) -> Test:
    """Student's paired t test that `a` and `b` have the same mean, by clusters where given.

    Of perplexities this tests equality too: exp is monotone. With clusters the statistic has their standard error
    and G - 1 degrees of freedom. Raises EvaluationError for fewer than two independent items.
    """
    found = nll_difference(a, b, clusters)
    if found.stderr is None:
        raise EvaluationError("a paired test needs two independent items, not one")
    name = "paired t" if clusters is None else "clustered t"
    if found.stderr == 0:  # all differences alike: nothing, or without any doubt something
        return Test(method=name, statistic=math.nan, p=1.0 if found.value == 0 else 0.0)
    t = found.value / found.stderr
    return Test(method=name, statistic=t, p=2 * float(special.stdtr(found.df, -abs(t))))


def mcnemar(a: np.ndarray, b: np.ndarray, method: Literal["auto", "exact", "chi2"] = "auto") -> Test:
    """McNemar's test (1947) that right and wrong (1, 0) are as frequent in `a` as in `b`, on the same items [n].

    Only discordant pairs count: b right in the first alone, c in the second alone. "exact": two-sided binomial
    test of b in b + c; "chi2": (b - c)² / (b + c) with one degree of freedom, without continuity correction, which
    would make it as conservative as the exact test (Fagerland, Lydersen & Laake 2013). "auto" is exact below
    `EXACT_BELOW` discordant pairs. The method is named in the result.
    """
    found = flips(a, b)
    count = found.discordant
    if method == "exact" or (method == "auto" and count < EXACT_BELOW):
        fewer = min(found.only_first, found.only_second)
        p = min(1.0, 2 * float(special.bdtr(fewer, count, 0.5))) if count else 1.0
        return Test(method="McNemar exact", statistic=float(fewer), p=p)
    statistic = (found.only_first - found.only_second) ** 2 / count if count else 0.0
    return Test(method="McNemar χ²", statistic=statistic, p=float(special.chdtrc(1, statistic)))


def flips(a: np.ndarray, b: np.ndarray) -> Flips:
    """Items by their outcome in both runs; EvaluationError unless all values are 0 or 1."""
    first, second = paired_values(a, b)
    if not (is_binary(first) and is_binary(second)):
        raise EvaluationError("items are counted as right or wrong: expected values 0 and 1 alone")
    one, two = first == 1, second == 1
    counts = (one & two, one & ~two, ~one & two, ~one & ~two)
    both, only_first, only_second, neither = (int(each.sum()) for each in counts)
    return Flips(both=both, only_first=only_first, only_second=only_second, neither=neither)


def is_binary(values: np.ndarray) -> bool:
    """Whether all values are 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def paired_test(a: np.ndarray, b: np.ndarray, clusters: np.ndarray | None = None) -> Test:
    """The test for these items: McNemar's for independent 0/1 items, else the paired t test."""
    if clusters is None and is_binary(np.asarray(a)) and is_binary(np.asarray(b)):
        return mcnemar(a, b)
    return paired_t(a, b, clusters)


def unpaired_z(first: Estimate, second: Estimate) -> Test:
    """z test of two values by their own standard errors, as if of different items.

    Of accuracies on the same items this is what lm-eval's comparison script computes; it throws the pairing away and
    finds less. For values without stored items there is nothing better.
    """
    if first.stderr is None or second.stderr is None:
        raise EvaluationError("an unpaired test needs the standard errors of both values")
    spread = math.hypot(first.stderr, second.stderr)
    gap = first.value - second.value
    if spread == 0:
        return Test(method="unpaired z", statistic=math.nan, p=1.0 if gap == 0 else 0.0)
    return Test(method="unpaired z", statistic=gap / spread, p=2 * float(special.ndtr(-abs(gap / spread))))


def equivalence(found: Estimate, margin: float) -> Test:
    """Two one-sided t tests (Schuirmann 1987) of whether a difference lies within ±margin.

    A small p says that it does; a large one only that it has not been shown. Raises EvaluationError for a margin
    that is not positive or a difference without standard error.
    """
    if not margin > 0:
        raise EvaluationError(f"margin={margin}: expected a positive number in the metric's unit")
    if found.stderr is None:
        raise EvaluationError("an equivalence test needs the difference's standard error")
    room = margin - abs(found.value)
    if found.stderr == 0:
        return Test(method="TOST", statistic=math.nan, p=0.0 if room > 0 else 1.0)
    t = room / found.stderr
    return Test(method="TOST", statistic=t, p=float(special.stdtr(found.df, -t)))
