"""Measurements of one spec from per-item values, with standard errors over the items."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qbench.spec import EvaluationSpec
from qbench.store.records import Measurement


@dataclass(frozen=True)
class Recorder:
    """Makes measurements of `spec` over n items; `clusters`, int64 [n] or None, go with all samples."""

    spec: EvaluationSpec
    n: int
    clusters: np.ndarray | None = None

    def __call__(
        self, name: str, unit: str, value: float, stderr: float | None = None, samples: np.ndarray | None = None
    ) -> Measurement:
        """A measurement that was computed elsewhere."""
        return Measurement(
            evaluator=self.spec.evaluator,
            protocol=self.spec.protocol,
            task=self.spec.task,
            name=name,
            value=value,
            stderr=stderr,
            n=self.n,
            unit=unit,
            spec_key=self.spec.key(),
            samples=samples,
            clusters=self.clusters if samples is not None else None,
            whole=self.spec.n is None,
        )

    def mean(self, name: str, unit: str, samples: np.ndarray) -> Measurement:
        """The mean of `samples`, float64 [n]."""
        return self(name, unit, float(samples.mean()), self.stderr(samples), samples)

    def quantile(self, name: str, unit: str, values: np.ndarray, share: float) -> Measurement:
        """A quantile over all values [n, per item]; without samples, of which it is no mean.

        Woodruff (JASA 47, 1952): the share of values below the quantile has a standard error e over items or
        clusters; half of the distance between the quantiles of share - e and share + e is that of the quantile.
        """
        value, error = float(np.quantile(values, share)), None
        share_error = self.stderr((values <= value).mean(1))
        if share_error is not None:
            low, high = np.quantile(values, [max(0.0, share - share_error), min(1.0, share + share_error)])
            error = float(high - low) / 2
        return self(name, unit, value, error)

    def stderr(self, samples: np.ndarray) -> float | None:
        """Standard error of the mean of `samples` [n] over items, or over clusters of them; None where there is only
        one, which shows no spread. Clustered it is Liang and Zeger's (Biometrika 73, 1986) with G / (G - 1)."""
        sums = samples - samples.mean()
        if self.clusters is not None:
            sums = np.bincount(np.unique(self.clusters, return_inverse=True)[1], weights=sums)
        count = len(sums)
        return math.sqrt(float(sums @ sums) * count / (count - 1)) / self.n if count > 1 else None
