"""The GPTQ stage: second-order rounding of each weight group behind the already quantized ones (arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from qbench.calibration.statistics import Hessian
from qbench.errors import numerics_at
from qbench.formats import QTensor, Range, TensorFormat
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require
from qbench.stages.gptq_core import GptqResult, ScaleSource, gptq
from qbench.structure.trace import LinearGroup
from qbench.structure.weights import WeightRef

SCALE_SOURCES = ("compensated", "stale", "original")


@dataclass(frozen=True, kw_only=True)
class Gptq(Stage):
    """Options and defaults are the authors'; `scale_source` names a choice their code makes silently (see `gptq`)."""

    name: ClassVar[str] = "gptq"
    kind: ClassVar[Kind] = Kind.ROUND
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need(Hessian, "quantized")})

    damp: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    block_size: int = 128
    scale_source: ScaleSource = "compensated"

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(0 <= self.damp <= 10, "algo.damp", self.damp, "a share of mean(diag H) from 0 to 10 (authors: 0.01)")
        require(self.block_size >= 1, "algo.block_size", self.block_size, "a number of columns >= 1")
        require(
            self.scale_source in SCALE_SOURCES,
            "algo.scale_source",
            self.scale_source,
            f"one of {', '.join(SCALE_SOURCES)}",
        )
        grouped = any(fmt.block.columns > 0 for fmt in formats)
        require(
            not self.static_groups or self.scale_source != "stale",
            "algo.scale_source",
            self.scale_source,
            "with static_groups=true all scales come from the original weight: compensated (default) or original",
        )
        require(
            grouped or not self.static_groups,
            "algo.static_groups",
            self.static_groups,
            "has no effect without groups: set group_size > 0 or static_groups=false",
        )

        for fmt in formats:
            require(
                not fmt.scale.whole or not fmt.block.columns or self.static_groups or self.scale_source == "original",
                "algo.scale_source",
                self.scale_source,
                f"original, or algo.static_groups=true, with {fmt.label}: its scales are quantized together, so that "
                "none is known before all are",
            )

    def apply(self, view: BlockView) -> Outcome:
        codes: dict[str, QTensor] = {}
        metrics = []
        for group in view.groups:
            statistics = {need.statistic: view.statistic(group, need.statistic) for need in self.needs}
            values = {kind: statistic.value() for kind, statistic in statistics.items()}
            for refs, fmt in _stacks(group, view):
                weight = torch.cat([view.weight(ref).float() for ref in refs])
                with numerics_at(f"{view.where}, {refs[0].name} ({statistics[Hessian].tokens} tokens)"):
                    result = self._solve(weight, values, fmt, _joined([view.ranges.get(ref.name) for ref in refs]))
                codes.update(zip((ref.name for ref in refs), _split(result.weight, refs), strict=True))
            metrics += [(ref.name, "damp", self.damp) for ref in group.weights]
        return Outcome(codes=codes, metrics=tuple(metrics))

    def _solve(
        self, weight: Tensor, values: Mapping[type, Tensor], fmt: TensorFormat, clip: Range | None
    ) -> GptqResult:
        """One weight (or several, stacked) with the statistics of its input by type."""
        return self._gptq(weight, values[Hessian], fmt, clip)

    def _gptq(
        self, weight: Tensor, hessian: Tensor, fmt: TensorFormat, clip: Range | None, drift: Tensor | None = None
    ) -> GptqResult:
        return gptq(
            weight,
            hessian,
            fmt,
            damp=self.damp,
            act_order=self.act_order,
            static_groups=self.static_groups,
            block_size=self.block_size,
            scale_source=self.scale_source,
            clip=clip,
            drift=drift,
        )


def _stacks(group: LinearGroup, view: BlockView) -> Iterator[tuple[list[WeightRef], TensorFormat]]:
    """Weights of a group that can be quantized in one sweep over the columns: same Hessian, same format, and rows
    that share nothing (a per-tensor scale belongs to one weight). Ranges are given for all rows or none."""

    def stack(ref: WeightRef) -> tuple:
        fmt = view.format(ref)
        alone = "" if fmt.by_row else ref.name
        return (repr(fmt), ref.name in view.ranges, alone)

    for _, refs in groupby(sorted(group.weights, key=stack), key=stack):
        members = list(refs)
        yield members, view.format(members[0])


def _joined(ranges: list[Range | None]) -> Range | None:
    if ranges[0] is None:
        return None
    return Range(torch.cat([r.lower for r in ranges]), torch.cat([r.upper for r in ranges]))


def _split(stacked: QTensor, refs: list[WeightRef]) -> list[QTensor]:
    if len(refs) == 1:
        return [stacked]
    sizes = [ref.out_features for ref in refs]

    def rows(values: Tensor | None) -> list:
        return [None] * len(sizes) if values is None else [part.contiguous() for part in values.split(sizes)]

    names = ("codes", "scale", "zero", "scale_codes", "outer")
    parts = zip(*(rows(getattr(stacked, name)) for name in names))
    return [replace(stacked, **dict(zip(names, part, strict=True))) for part in parts]
