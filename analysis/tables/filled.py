"""A declared table with what the database has for it: values, paired differences, ties, and what is missing and why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import special

from analysis import stats
from analysis.pairing import info_of, pair, reproduces
from analysis.stats.paired import linked
from analysis.tables.declared import (
    OF_FULL_PRECISION,
    RUN_COLUMNS,
    Cell,
    Declared,
    Filled,
    FilledTable,
    Row,
    State,
    Wanted,
)
from analysis.tables.labels import is_baseline, shared_settings
from qbench.errors import EvaluationError
from qbench.metrics import MetricInfo, items_of
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.owner import state
from qbench.store.records import MetricRow, RunRow, Samples

_ALPHA = 0.05


def filled(database: Database, declared: Declared) -> FilledTable:
    """The table as far as the database has it. EvaluationError where a cell would have to mix what must not be."""
    wanted = [each for row in declared.cells for cell in row for each in cell.wanted]
    look = Look(database, wanted)
    cells = [[look.cell(cell, declared.aggregate) for cell in row] for row in declared.cells]
    _mark_best(declared, cells, look)
    rows: list[Row] = []
    above: tuple | None = None
    several = any(len({baseline_of(cell) for cell in column if cell.wanted}) > 1 for column in zip(*declared.cells))
    for labels, row, found in zip(declared.rows, declared.cells, cells, strict=True):
        baselines = tuple(baseline_of(cell) for cell in row)
        known = tuple(new if new.wanted else old for new, old in zip(baselines, above or baselines, strict=True))
        if known != above:
            above = known
            full = tuple(look.full_precision(cell, declared.aggregate) for cell in above)
            if any(cell.value is not None for cell in full):
                rows.append(Row(labels=_full_labels(labels, several), cells=full, full_precision=True))
        rows.append(Row(labels=labels, cells=tuple(found)))
    counts = dict.fromkeys(("done", "missing", "stale", "failed", "running", "undefined"), 0)
    for row in cells:
        for cell in row:
            counts[cell.state] += 1
    run_ids = sorted({run_id for row in rows for cell in row.cells for run_id in cell.run_ids})
    return FilledTable(
        declared=declared,
        rows=tuple(rows),
        caption=_caption(declared, rows, look),
        counts=counts,
        run_ids=tuple(run_ids),
    )


def superseded_specs(database: Database, wanted: Sequence[Wanted]) -> set[str]:
    """Keys without a row of which the database has the same run by another version of a stage."""
    found = database.find([each.key for each in wanted])
    absent = [each for each in wanted if each.key not in found]
    if not absent:
        return set()
    older = {_without_versions(row.spec) for row in queries.runs(database, status="done")}
    return {each.key for each in absent if _without_versions(each.spec) in older}


class Look:
    """Everything of the database that a table needs, read at once."""

    def __init__(self, database: Database, wanted: Sequence[Wanted]) -> None:
        self.runs = database.find([key for each in wanted for key in (each.key, each.baseline)])
        ids = [row.id for row in self.runs.values()]
        asked = {key for each in wanted for key in each.spec_keys}
        metrics = [each for each in queries.metrics(database, ids) if each.spec_key in asked]
        self.metrics = {(each.run_id, each.spec_key, each.name): each for each in metrics}
        self.measured = {(each.run_id, each.spec_key) for each in metrics}
        self.samples: Mapping[int, Samples] = queries.clustered_samples_of(database, [each.id for each in metrics])
        self.failures = {
            (run_id, each.spec_key): each for run_id, some in queries.failures(database, ids).items() for each in some
        }
        self.stale = superseded_specs(database, wanted)

    def cell(self, cell: Cell, aggregate: str) -> Filled:
        if cell.reason is not None:
            return Filled(state="undefined", notes=(cell.reason,))
        states = [self._state(each, cell) for each in cell.wanted]
        undone = next((found for found in states if found[0] != "done"), None)
        if undone is not None:
            return Filled(state=undone[0], notes=tuple(filter(None, undone[1:])))
        if cell.metric[0] in RUN_COLUMNS:
            return self._run_column(cell)
        return self._measurements(cell, aggregate)

    def full_precision(self, cell: Cell, aggregate: str) -> Filled:
        """The same cell of the full-precision run; empty where it has nothing to show."""
        if cell.wanted and cell.metric[0] in RUN_COLUMNS and cell.metric[0] not in OF_FULL_PRECISION:
            return Filled(state="undefined")
        found = self.cell(cell, aggregate) if cell.wanted else Filled(state="undefined")
        against_full = found.info is not None and found.info.against_full
        return Filled(state="undefined") if against_full or found.state != "done" else found

    def items(self, cell: Cell) -> list[tuple[MetricRow, Samples | None]]:
        """The cell's measurements with their items, runs in order, each with its measurements in order."""
        found = []
        for each in cell.wanted:
            run = self.runs.get(each.key)
            for spec_key in each.spec_keys if run is not None else ():
                names = (self.metrics.get((run.id, spec_key, name)) for name in cell.metric)
                metric = next((metric for metric in names if metric is not None), None)
                if metric is not None:
                    found.append((metric, self.samples.get(metric.id)))
        return found

    def _state(self, wanted: Wanted, cell: Cell) -> tuple[State, str | None]:
        run = self.runs.get(wanted.key)
        if run is None:
            return ("stale" if wanted.key in self.stale else "missing"), None
        if run.status != "done":
            now = state(run)
            if now == "failed":
                message = (run.error_message or "").partition("\n")[0]
                return "failed", f"run {run.id}: {run.error_type}: {message}".rstrip(": ")
            return ("running" if now == "running" else "missing"), None
        if cell.metric[0] in RUN_COLUMNS:
            return "done", None
        lacking = [key for key in wanted.spec_keys if (run.id, key) not in self.measured]
        failure = next((self.failures[run.id, key] for key in lacking if (run.id, key) in self.failures), None)
        if failure is not None:
            return "failed", f"run {run.id}: {failure.error_type}: {failure.message}"
        return ("missing" if lacking else "done"), None

    def _run_column(self, cell: Cell) -> Filled:
        info, divisor = RUN_COLUMNS[cell.metric[0]]
        runs = [self.runs[each.key] for each in cell.wanted]
        values = [getattr(run, info.name) for run in runs]
        ids = tuple(run.id for run in runs)
        if any(value is None for value in values):
            return Filled(state="done", info=info, run_ids=ids)
        mean, spread = float(np.mean(values)) / divisor, _spread([value / divisor for value in values])
        return Filled(state="done", info=info, value=mean, spread=spread, run_ids=ids)

    def _measurements(self, cell: Cell, aggregate: str) -> Filled:
        items = self.items(cell)
        where = " or ".join(cell.metric)
        if not items:
            ids = {self.runs[each.key].id for each in cell.wanted}
            names = sorted({name for run_id, _, name in self.metrics if run_id in ids})
            raise EvaluationError(f"{where}: not among what was measured, {', '.join(names)}")
        if aggregate == "none" and len(items) > 1:
            found = ", ".join(f"{metric.name} {metric.task}" for metric, _ in items)
            raise EvaluationError(
                f"{where}: a cell has {len(items)} values ({found}); aggregate: mean takes their mean"
            )
        metrics = [metric for metric, _ in items]
        info = info_of(metrics[0])
        if any(info_of(metric).higher_is_better != info.higher_is_better for metric in metrics):
            raise EvaluationError(f"{where}: a mean of metrics of which higher and lower is better")
        value = float(np.mean([metric.value for metric in metrics]))
        stderr = metrics[0].stderr if len(metrics) == 1 else _stderr(_influences(items))
        delta = delta_stderr = None
        base = [] if info.against_full else self.items(baseline_of(cell))
        base *= len(items) // max(1, len(base))  # the same for every repeat
        alike = [(a.spec_key, a.name) for a, _ in items] == [(b.spec_key, b.name) for b, _ in base]
        if alike and cell.wanted[0].key != cell.wanted[0].baseline:
            delta, delta_stderr = difference(items, base)
        by_run: dict[int, list[float]] = {}
        for metric in metrics:
            by_run.setdefault(metric.run_id, []).append(metric.value)
        return Filled(
            state="done",
            info=info,
            value=value,
            stderr=stderr,
            delta=delta,
            delta_stderr=delta_stderr,
            spread=_spread([float(np.mean(some)) for some in by_run.values()]),
            n=sum({metric.spec_key: metric.n for metric in metrics}.values()),
            protocol=", ".join(dict.fromkeys(f"{metric.task}: {metric.protocol}" for metric in metrics)),
            run_ids=tuple(by_run),
            spec_keys=tuple(dict.fromkeys(metric.spec_key for metric in metrics)),
        )


Items = Sequence[tuple[MetricRow, Samples | None]]


def difference(first: Items, second: Items) -> tuple[float, float | None]:
    """Mean of the first measurements minus that of the second, pair by pair, and its standard error over the items that
    both have; None where those are not known.

    Repeats have the same items: they are averaged item by item first. Different measurements are independent.
    """
    total = float(np.mean([a.value - b.value for (a, _), (b, _) in zip(first, second, strict=True)]))
    influences = []
    for (a, of_a), (b, of_b) in zip(first, second, strict=True):
        items = pair(a, b, of_a, of_b)
        if items is None:
            return total, None
        link = info_of(a).link
        slopes = [linked(float(np.mean(each)), link)[1] for each in (items.first, items.second)]
        influences.append((a.spec_key, slopes[0] * items.first - slopes[1] * items.second, items.clusters))
    return total, _stderr(influences)


_Influence = tuple[str, np.ndarray, np.ndarray | None]


def _influences(items: Items) -> list[_Influence] | None:
    """Per measurement how its value moves with each item (delta method), [n]."""
    found = []
    for metric, samples in items:
        if samples is None or not reproduces(metric, samples.values):
            return None
        slope = linked(float(np.mean(samples.values)), info_of(metric).link)[1]
        found.append((metric.spec_key, slope * samples.values, samples.clusters))
    return found


def _stderr(influences: Sequence[_Influence] | None) -> float | None:
    """Standard error of the mean over all measurements."""
    if influences is None:
        return None
    by_measurement: dict[str, list[_Influence]] = {}
    for each in influences:
        by_measurement.setdefault(each[0], []).append(each)
    parts = []
    for some in by_measurement.values():
        found = stats.mean(np.mean([values for _, values, _ in some], axis=0), some[0][2]).stderr
        if found is None:
            return None
        parts.append(found * len(some) / len(influences))
    return math.hypot(*parts)


def _mark_best(declared: Declared, cells: list[list[Filled]], look: Look) -> None:
    """Mark, in place, the cells that are the best of those they are compared with, or not distinguishable from it."""
    groups: dict[tuple, list[tuple[int, int]]] = {}
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            wish = declared.cells[i][j]
            if cell.value is None or cell.info is None or cell.info.higher_is_better is None or not cell.protocol:
                continue
            place = {"column": (j,), "group": (j, *declared.rows[i][:-1]), "row": (i,)}.get(declared.best)
            if place is not None:
                spec_keys = tuple(each.spec_keys for each in wish.wanted)
                groups.setdefault((place, baseline_of(wish).wanted, spec_keys, cell.info.name), []).append((i, j))
    for places in groups.values():
        tied = _tied([look.items(declared.cells[i][j]) for i, j in places], cells[places[0][0]][places[0][1]].info)
        for (i, j), best in zip(places, tied, strict=True):
            if best:
                cells[i][j] = replace(cells[i][j], best=True)


def _tied(candidates: Sequence[Items], info: MetricInfo) -> list[bool]:
    """Which candidates are the best, or not distinguishable from it (paired, Holm); none where that cannot be told."""
    nothing = [False] * len(candidates)
    if len(candidates) < 2:
        return nothing
    if all(len(items) == 1 for items in candidates):
        first = candidates[0][0]
        pairs = [pair(metric, first[0], samples, first[1]) for ((metric, samples),) in candidates]
        if any(each is None for each in pairs):
            return nothing
        values = [each.first for each in pairs]
        tied = stats.tied_best(values, higher_is_better=info.higher_is_better, clusters=pairs[0].clusters, alpha=_ALPHA)
        return [bool(each) for each in tied]
    means = [float(np.mean([metric.value for metric, _ in items])) for items in candidates]
    best = int(np.argmax(means) if info.higher_is_better else np.argmin(means))
    p_values = [math.nan] * len(candidates)
    for place, items in enumerate(candidates):
        if place == best:
            continue
        gap, stderr = difference(items, candidates[best])
        if stderr is None:
            return nothing
        degrees = min(metric.n for metric, _ in items) - 1
        tail = float(special.stdtr(degrees, -abs(gap / stderr))) if stderr > 0 else 0.5 * (gap == 0)
        p_values[place] = 2 * tail
    adjusted = stats.holm(p_values)
    return [bool(math.isnan(p) or p >= _ALPHA) for p in adjusted]


def baseline_of(cell: Cell) -> Cell:
    """The cell of the full-precision run that this one is compared with; without runs where the cell is undefined."""
    once = {
        each.baseline: Wanted(key=each.baseline, baseline=each.baseline, spec_keys=each.spec_keys)
        for each in cell.wanted
    }
    return Cell(metric=cell.metric, wanted=tuple(once.values()))


def _full_labels(labels: tuple[str, ...], several: bool) -> tuple[str, ...]:
    if not several:
        return ("full precision", *[""] * (len(labels) - 1))
    if len(labels) > 1:
        return (labels[0], "full precision", *[""] * (len(labels) - 2))
    return ("full precision",)


def _caption(declared: Declared, rows: Sequence[Row], look: Look) -> str:
    shown = [cell for row in rows if not row.full_precision for cell in row.cells if cell.state == "done"]
    if not shown:
        return f"{declared.caption} Nothing has been measured yet: qbench fill runs it, in size {declared.size}."
    by_id: dict[int, RunRow] = {run.id: run for run in look.runs.values()}
    runs = [by_id[run_id] for run_id in dict.fromkeys(run_id for cell in shown for run_id in cell.run_ids)]
    shown_ids = {run.id for run in runs}
    protocols: dict[str, set[str]] = {}
    for metric in (each for each in look.metrics.values() if each.run_id in shown_ids):
        name = f"{metric.task}: {metric.protocol}"
        protocols.setdefault(name, set()).add(f"n = {metric.n} {items_of(metric.evaluator)}")
    quantized = [run for run in runs if not is_baseline(run)]
    # What some runs quantize at run time and others leave alone is not shared, whatever the label of the former.
    own = [set(shared_settings([run])) for run in quantized]
    shared = [
        word
        for word in shared_settings(runs)
        if not word.startswith(("act ", "kv ")) or all(word in words for words in own)
    ]
    parts = [*shared, *(f"{name}, {' or '.join(sorted(n))}" for name, n in protocols.items())]
    if any(cell.spread is not None for cell in shown):
        parts.append("means of repeats; standard errors are over items, not over repeats")
    if (environments := len({run.environment_id for run in runs})) > 1:
        parts.append(f"runs come from {environments} environments: do not compare their seconds and memory")
    return f"{declared.caption} Settings: {'; '.join(parts)}."


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _without_versions(spec: Mapping[str, Any]) -> str:
    """A run's description as text, without the versions of its stages."""
    stages = [{name: value for name, value in each.items() if name != "version"} for each in spec.get("pipeline", [])]
    scrubbed = {name: value for name, value in spec.items() if name not in ("pipeline", "algo")}
    return repr(_plain({**scrubbed, "pipeline": stages}))


def _plain(value: Any) -> Any:
    """Mappings as sorted pairs and tuples as lists, so that equal descriptions give equal text."""
    if isinstance(value, Mapping):
        return [(name, _plain(value[name])) for name in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
