"""Ranges that leave a share of the weights out: `range.method=percentile` of the formats as a pipeline step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qbench.formats import RangeFit, TensorFormat
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require
from qbench.stages.range_mse import check_formats, fitted_ranges


@dataclass(frozen=True, kw_only=True)
class PercentileClip(Stage):
    """Per block the `percentile` and 100 - `percentile` points of its values. Data-free."""

    name: ClassVar[str] = "percentile_clip"
    kind: ClassVar[Kind] = Kind.RANGE
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset()

    percentile: float = RangeFit.percentile

    @property
    def uses_ranges(self) -> bool:
        return False

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(50 < self.percentile <= 100, "algo.percentile", self.percentile, "a number above 50, at most 100")
        check_formats(self.name, formats)

    def apply(self, view: BlockView) -> Outcome:
        return fitted_ranges(view, RangeFit(method="percentile", percentile=self.percentile))
