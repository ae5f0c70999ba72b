"""The stored items of two values of one metric, where a paired difference may be taken from them."""

import math
from dataclasses import dataclass

import numpy as np

from analysis import stats
from qbench.errors import EvaluationError
from qbench.metrics import MetricInfo, metric_info
from qbench.store.records import MetricRow, Samples


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Items of two runs in the same order, float64 [n] each, and the cluster of each item, int64 [n], if known."""

    first: np.ndarray
    second: np.ndarray
    clusters: np.ndarray | None

    def difference(self, info: MetricInfo) -> stats.Estimate:
        """First minus second, with the paired standard error."""
        return stats.difference(self.first, self.second, self.clusters, info.link)


def info_of(metric: MetricRow) -> MetricInfo:
    """What is known of a stored metric."""
    return metric_info(metric.name, higher_is_better=metric.higher_is_better, unit=metric.unit)


def pair(first: MetricRow, second: MetricRow, of_first: Samples | None, of_second: Samples | None) -> Pair | None:
    """The items of both, or None where they do not give the two values (a percentile is not the mean of its items).

    Raises EvaluationError where the runs do not have the same items: other numbers of them, other clusters.
    """
    if of_first is None or of_second is None:
        return None
    if not (reproduces(first, of_first.values) and reproduces(second, of_second.values)):
        return None
    if first.n != second.n:
        raise EvaluationError(
            f"{first.name} {first.task}: {first.n} and {second.n} items: a paired difference needs the same items"
        )
    clusters = of_first.clusters if of_first.clusters is not None else of_second.clusters
    if of_second.clusters is not None and not np.array_equal(clusters, of_second.clusters):
        raise EvaluationError(f"{first.name} {first.task}: the runs group their items differently: not the same items")
    return Pair(first=of_first.values, second=of_second.values, clusters=clusters)


def reproduces(metric: MetricRow, samples: np.ndarray) -> bool:
    """Whether the value is what the metric's link makes of its items."""
    center, link = float(np.mean(samples)), info_of(metric).link
    if link == "exp_mean":
        return metric.value > 0 and math.isclose(center, math.log(metric.value), rel_tol=1e-6, abs_tol=1e-6)
    expected = metric.value**2 if link == "root_mean" else metric.value
    return math.isclose(center, expected, rel_tol=1e-6, abs_tol=1e-12)
