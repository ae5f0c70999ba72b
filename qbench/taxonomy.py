"""Which strategy each stage follows, as a table of the stages that there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.tables.plain import PlainTable
from qbench.errors import SpecError
from qbench.stages.base import Kind, Stage
from qbench.stages.pipeline import stage_types
from qbench.stages.rotation import RotateStage

#: What the kinds of stages are called in the literature.
TECHNIQUES = {
    Kind.ROTATE: "rotation",
    Kind.TRANSFORM: "transformation",
    Kind.PROTECT: "smaller magnitudes",
    Kind.SPARSIFY: "sparsity",
    Kind.RANGE: "clipping",
    Kind.ROUND: "rounding",
    Kind.RECONSTRUCT: "tuning",
}

_DATA_FREE = "°"


def taxonomy(name: str, title: str, caption: str, strategies: Mapping[str, Sequence[str]]) -> PlainTable:
    """Stages by technique (rows) and strategy (columns); `strategies` says which stages follow which.

    Raises SpecError for a stage that has no strategy or several, and for one that there is not.
    """
    types = stage_types()
    given = [stage for stages in strategies.values() for stage in stages]
    for stage in (*given, *types):
        if stage not in types:
            raise SpecError(f"{name}.static", stage, f"no such stage; one of {', '.join(sorted(types))}")
        if given.count(stage) != 1:
            raise SpecError(f"{name}.static", stage, "every stage under one strategy")
    rows = []
    for kind, technique in TECHNIQUES.items():
        cells = [
            ", ".join(_marked(types[stage]) for stage in sorted(stages) if types[stage].kind is kind)
            for stages in strategies.values()
        ]
        if any(cells):
            rows.append((technique, *cells))
    return PlainTable(
        name=name,
        title=title,
        caption=f"{caption} {_DATA_FREE}: without calibration text, in its default options.",
        header=("technique", *strategies),
        rows=tuple(rows),
    )


def learns(stage: type[Stage]) -> bool:
    """Whether it takes gradient steps."""
    return stage.trains or (issubclass(stage, RotateStage) and stage.learned)


def _marked(stage: type[Stage]) -> str:
    return stage.name if stage().needs_data or learns(stage) else f"{stage.name}{_DATA_FREE}"
