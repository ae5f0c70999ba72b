"""`qbench pareto`: what no other point dominates, as a table, and the figures beside it."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.candidates import require_known
from analysis.claims import Cell, Checked, check
from analysis.costs import BITS, Cost, cost_of
from analysis.pareto import figure_points, write_figure
from analysis.tables.render import Entry, Plain, number, with_error
from analysis.tables.sweep import Evaluation, sweep_table
from qbench.errors import SpecError
from qbench.store import queries
from qbench.store.database import Database

#: What points of one figure differ in on purpose.
_VARIED = ("algo", "options", "calib", "calib_n", "calib_length", "calib_seed", "bits", "weight_format")
_VARIED += ("act_format", "kv_format")


@dataclass(frozen=True, kw_only=True)
class Front:
    """The points of one model under one evaluation (`analysis.pareto.plotted_rows`) against one cost."""

    evaluation: Evaluation
    cost: Cost
    points: pd.DataFrame
    checked: Checked

    @property
    def model(self) -> str:
        return self.points["model"].iloc[0]

    @property
    def notes(self) -> str:
        return " ".join(f"{each.text}." for each in self.checked.footnotes)


def fronts(
    database: Database,
    *,
    metric: str | None = "ppl",
    cost: str = BITS.name,
    model: str | None = None,
    task: str | None = None,
    allow: Collection[str] = (),
) -> tuple[Front, ...]:
    """One front for every model and evaluation that has the metric (None: every headline metric) and the cost.

    `cost` as in `analysis.costs.cost_of`. Raises SpecError for a metric that is stored, but without a better direction
    or only as a detail of another, EvaluationError where the points must not stand in one figure (`analysis.claims`),
    unless allowed.
    """
    runs = queries.runs(database, model=model, status="done")
    by_id = {run.id: run for run in runs}
    measured = queries.metrics(database, by_id)
    mine = [each for each in measured if metric in (None, each.name) and task in (None, each.task)]
    every = queries.runs(database, status="done")
    require_known("model", model, [run.model for run in every])
    require_known("y", metric, [each.name for each in measured])
    require_known("task", task, [each.task for each in measured if metric in (None, each.name)])
    if not mine:
        return ()
    known, values = cost_of(database, runs, cost)
    table = sweep_table(database, [run.key for run in runs], list(dict.fromkeys(each.spec_key for each in mine)))
    of_metric = {(each.run_id, each.spec_key, each.name): each for each in mine}
    found = []
    for evaluation, points in figure_points(table, known, values, headline=metric is None):
        if metric not in (None, evaluation.metric.name) or task not in (None, evaluation.task):
            continue
        place = (evaluation.spec_key, evaluation.metric.name)
        cells = [
            Cell(where=row["label"], run=by_id[row["run_id"]], metric=of_metric[(row["run_id"], *place)])
            for _, row in points.iterrows()
        ]
        checked = check(database, cells, varied=_VARIED, allow=allow)
        found.append(Front(evaluation=evaluation, cost=known, points=points, checked=checked))
    directions = [each.metric.higher_is_better for each in table.evaluations if each.metric.name == metric]
    if directions and all(each is None for each in directions):
        raise SpecError("y", metric, "a metric of which higher or lower is better")
    return tuple(found)


def fronts_table(found: Sequence[Front], *, metric: str, cost: str) -> Plain:
    """The points of each front, cheapest first, below full precision; the frame has the dominated ones, too."""
    label = found[0].cost.label if found else cost
    columns = ("point", label, "value ± SE", "", "dominates", "run")
    rows, groups, headings, notes = [], [], set(), {}
    for each in found:
        points = each.points
        shown = points[points["on_front"]].sort_values("x", ascending=not each.cost.higher_is_better)
        shown = pd.concat([points[points["algo"] == "none"], shown])
        metric_info = each.evaluation.metric
        group = f"{each.model}: {metric_info.label} {metric_info.arrow} on {each.evaluation.task} "
        group += f"({each.evaluation.protocol}, {each.points['n'].iloc[0]} {each.evaluation.items})"
        if group in headings:  # other options of an evaluation with the same protocol
            group += f", evaluation {each.evaluation.spec_key[:8]}"
        headings.add(group)
        for place, row in shown.iterrows():
            marks = [notes.setdefault(n.text, len(notes) + 1) for n in each.checked.footnotes if place in n.cells]
            rows.append(_row(row, points, each.cost, metric_info.higher_is_better, tuple(marks)))
            groups.append(group)
    frame = pd.concat([each.points for each in found], ignore_index=True) if found else pd.DataFrame()
    return Plain(
        title=f"Pareto front: {metric} against {label}",
        columns=columns,
        numeric=(False, True, True, False, True, True),
        rows=tuple(rows),
        groups=tuple(groups),
        caption=_caption(found, metric, cost),
        footnotes=tuple((mark, text) for text, mark in notes.items()),
        frame=frame,
    )


def write_fronts(found: Sequence[Front], folder: Path) -> list[Path]:
    """A figure (PDF, PNG, CSV) for each front, named after cost, model, task and metric."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for each in found:
        parts = ["pareto", each.cost.name, each.model, each.evaluation.label, each.evaluation.metric.name]
        name = re.sub(r"[^\w.=+-]+", "_", "-".join(parts))
        written += write_figure(each.points, each.evaluation, folder / name, each.cost, each.notes)
    return written


def _row(
    row: pd.Series, points: pd.DataFrame, cost: Cost, higher_is_better: bool | None, marks: tuple[int, ...]
) -> tuple[Entry, ...]:
    """A point of the front; how many others it dominates says how much it alone makes superfluous."""
    baseline = row["algo"] == "none"
    others = points[(points["algo"] != "none") & (points["key"] != row["key"])]
    dearer = others["x"] <= row["x"] if cost.higher_is_better else others["x"] >= row["x"]
    worse = others["value"] <= row["value"] if higher_is_better else others["value"] >= row["value"]
    equal = (others["x"] == row["x"]) & (others["value"] == row["value"])
    count = "" if baseline else str(int((dearer & worse & ~equal).sum()))
    return (
        Entry(row["label"], notes=marks),
        Entry("" if np.isnan(row["x"]) else number(row["x"], 5)),
        Entry(with_error(row["value"], row["stderr"], least=2)),
        Entry("knee" if row["knee"] else "", bold=bool(row["knee"])),
        Entry(count),
        Entry(str(row["run_id"])),
    )


def _caption(found: Sequence[Front], metric: str, cost: str) -> str:
    if not found:
        return f"No finished run of a quantized model has both {metric} and {cost}: nothing to draw."
    points = sum(int((each.points["algo"] != "none").sum()) for each in found)
    return (
        f"{points} points; those that no other one beats in both, and how many others each beats in both. "
        "Whether neighbours differ by more than chance: qbench compare, qbench best. "
        "Knee: where the front bends, both axes scaled to their ranges."
    )
