"""Ranges by the squared (or other) error of the weights alone: `range.method=mse` of the formats as a pipeline step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from qbench.formats import RangeFit, TensorFormat, shared_scale
from qbench.formats.ranges import find_range
from qbench.formats.scale import PowerOfTwo
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require


def fitted_ranges(view: BlockView, how: RangeFit) -> Outcome:
    """The range that `how` finds for every block of the weights of `view.groups`, as formats with that method do."""
    ranges = {}
    for group in view.groups:
        for ref in group.weights:
            weight, fmt = view.weight(ref).float(), view.format(ref)
            ranges[ref.name] = find_range(weight, replace(fmt, range=how), shared_scale(weight, fmt))
    return Outcome(ranges=ranges)


def check_formats(name: str, formats: Iterable[TensorFormat]) -> None:
    """Raises SpecError for formats whose ranges are fixed or chosen already."""
    for fmt in formats:
        require(
            fmt.range.method == "minmax",
            "range.method",
            fmt.range.method,
            f"minmax with {name}, which chooses the ranges itself",
        )
        require(
            not isinstance(fmt.scale, PowerOfTwo) or fmt.name is None,
            "format",
            fmt.label,
            f"one whose standard does not fix its scales, as {name} chooses the ranges",
        )


@dataclass(frozen=True, kw_only=True)
class MseClip(Stage):
    """Per block the shares 1, 1 - 1/grid, … above 1 - max_shrink of its extremes, whichever gives the smallest
    Σ|Q(w) - w|^norm (GPTQ's `--mse`, QuaRot's `w_clip`). Data-free."""

    name: ClassVar[str] = "mse_clip"
    kind: ClassVar[Kind] = Kind.RANGE
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset()

    norm: float = RangeFit.norm
    grid: int = RangeFit.grid
    max_shrink: float = RangeFit.max_shrink

    @property
    def uses_ranges(self) -> bool:
        return False

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(0.1 < self.norm <= 10, "algo.norm", self.norm, "a number above 0.1, at most 10 (authors: 2.4)")
        require(1 < self.grid <= 10_000, "algo.grid", self.grid, "a number of steps from 2 to 10000 (authors: 100)")
        require(
            0 < self.max_shrink <= 1, "algo.max_shrink", self.max_shrink, "a share above 0, at most 1 (authors: 0.8)"
        )
        steps = round(self.max_shrink * self.grid)
        require(steps >= 2, "algo.max_shrink", self.max_shrink, f"with grid={self.grid} at least {2 / self.grid:g}")
        check_formats(self.name, formats)
        for fmt in formats:
            require(fmt.zero != "float", "zero_point", fmt.zero, "int or none: mse_clip shrinks ranges around 0")

    def apply(self, view: BlockView) -> Outcome:
        how = RangeFit(method="mse", norm=self.norm, grid=self.grid, max_shrink=self.max_shrink)
        return fitted_ranges(view, how)
