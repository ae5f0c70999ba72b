"""The table at the end of a sweep: what each point costs and what it loses against full precision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from analysis import stats
from analysis.noise import noise_floors
from analysis.pairing import Pair, info_of, pair
from analysis.tables.labels import is_baseline, point_labels, shared_settings
from qbench.errors import EvaluationError
from qbench.metrics import MetricInfo, items_of
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.owner import state
from qbench.store.records import MetricRow, RunRow, Samples

_COSTS = ("bits_per_weight", "bits_per_weight_model", "quantize_s", "peak_host_bytes", "peak_device_bytes")
_IDENTITY = (
    *("model", "algo", "bits", "group_size", "symmetric", "weight_format", "act_format", "kv_format", "calib", "dtype"),
)
_ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One metric of one evaluation, and the names of its columns.

    `label` is the evaluation's task, made unambiguous where several evaluations have the same task.
    """

    label: str
    task: str
    protocol: str
    spec_key: str
    metric: MetricInfo
    items: str

    @property
    def value(self) -> str:
        return f"{self.metric.name} {self.label}"

    @property
    def stderr(self) -> str:
        return f"{self.metric.name}_stderr {self.label}"

    @property
    def delta(self) -> str:
        return f"{self.metric.name}_delta {self.label}"

    @property
    def delta_stderr(self) -> str:
        return f"{self.metric.name}_delta_stderr {self.label}"

    @property
    def n(self) -> str:
        return f"{self.metric.name}_n {self.label}"

    @property
    def noise(self) -> str:
        return f"{self.metric.name}_noise {self.label}"

    @property
    def best(self) -> str:
        return f"{self.metric.name}_best {self.label}"

    @property
    def columns(self) -> tuple[str, ...]:
        return self.value, self.stderr, self.delta, self.delta_stderr, self.noise, self.n, self.best


@dataclass(frozen=True, kw_only=True)
class SweepTable:
    """Rows in the order of the keys that were asked for.

    `frame` has, besides the run's columns, `label`, `status`, `error` and for each evaluation the columns it names:
    value, difference from the full-precision row of the same model and dtype, their standard errors (that of the
    difference paired), the difference's standard deviation by seeds, batch sizes and threads alone where known, number
    of items, NaN where there is none; and whether the point is the best of its model's
    quantized points or not distinguishable from it (`stats.tied_best`; only where at least two can be compared).
    `caption` says what all rows share.
    """

    frame: pd.DataFrame
    evaluations: tuple[Evaluation, ...]
    caption: str


def sweep_table(database: Database, keys: Sequence[str], spec_keys: Sequence[str]) -> SweepTable:
    """The table of the runs with these keys, columns for every metric of the evaluators' spec keys.

    Keys without a row appear with status "missing". Raises EvaluationError where one column would have to mix
    protocols, or a difference windows of different texts.
    """
    found = database.find(keys)
    rows = [found[key] for key in dict.fromkeys(keys) if key in found]
    asked = set(spec_keys)
    metrics = [each for each in queries.metrics(database, [row.id for row in rows]) if each.spec_key in asked]
    by_run = {(each.run_id, each.spec_key, each.name): each for each in metrics}
    evaluations = _evaluations(metrics, spec_keys)
    samples = queries.clustered_samples_of(database, [each.id for each in metrics])
    floors = noise_floors(database, rows)
    baselines = {(row.model, row.dtype): row for row in rows if is_baseline(row)}

    labels = dict(zip((row.key for row in rows), point_labels(rows), strict=True))
    records = []
    for key in dict.fromkeys(keys):
        if (row := found.get(key)) is None:
            records.append({"label": key[:12], "status": "missing", "key": key})
            continue
        record = {name: getattr(row, name) for name in ("key", *_IDENTITY, *_COSTS)}
        record |= {"label": labels[key], "status": state(row), "error": _error(row), "run_id": row.id}
        baseline = baselines.get((row.model, row.dtype))
        for each in evaluations:
            metric = by_run.get((row.id, each.spec_key, each.metric.name))
            reference = None
            if baseline is not None and not is_baseline(row):
                reference = by_run.get((baseline.id, each.spec_key, each.metric.name))
            if metric is not None:
                record |= _cells(each, metric, reference, samples)
            if metric is not None and reference is not None:
                record[each.noise] = floors.of_difference(row, baseline, each.spec_key, each.metric.name)
        records.append(record)

    names = ["label", "status", *(name for each in evaluations for name in each.columns)]
    names += [*_COSTS, *_IDENTITY, "error", "run_id", "key"]
    frame = pd.DataFrame.from_records(records, columns=names)
    frame["bits"] = pd.to_numeric(frame["bits"]).convert_dtypes()  # whole numbers, but for ternary weights
    frame = frame.astype(dict.fromkeys(["group_size", "run_id", *(each.n for each in evaluations)], "Int64"))
    measured = [name for each in evaluations for name in each.columns[:5]]
    frame = frame.astype(dict.fromkeys((*measured, *_COSTS), "float64"))
    for each in evaluations:
        of_rows = [by_run.get((row.id, each.spec_key, each.metric.name)) for row in rows]
        best = best_points(each.metric, rows, of_rows, samples)
        frame[each.best] = [key in best for key in frame["key"]]
    return SweepTable(frame=frame, evaluations=evaluations, caption=_caption(rows, evaluations, metrics))


def _evaluations(metrics: Sequence[MetricRow], spec_keys: Sequence[str]) -> tuple[Evaluation, ...]:
    """One per metric of each spec key that was measured at all; labels tell spec keys apart."""
    found = []
    for spec_key in dict.fromkeys(spec_keys):
        measured = [each for each in metrics if each.spec_key == spec_key]
        for name in dict.fromkeys(each.name for each in measured):
            alike = [each for each in measured if each.name == name]
            protocols = sorted({each.protocol for each in alike})
            if len(protocols) > 1:
                mixed = ", ".join(protocols)
                raise EvaluationError(f"{name} {alike[0].task}: one column would mix protocols {mixed}")
            last = alike[-1]
            found.append(
                Evaluation(
                    label=last.task,
                    task=last.task,
                    protocol=last.protocol,
                    spec_key=spec_key,
                    metric=info_of(last),
                    items=items_of(last.evaluator),
                )
            )
    for fuller in (
        lambda each: f"{each.task} {each.protocol}",
        lambda each: f"{each.label} {each.spec_key[:8]}",
    ):
        keys_of: dict[str, set[str]] = {}
        for each in found:
            keys_of.setdefault(each.label, set()).add(each.spec_key)
        found = [replace(each, label=fuller(each)) if len(keys_of[each.label]) > 1 else each for each in found]
    return tuple(found)


def _cells(
    evaluation: Evaluation, metric: MetricRow, reference: MetricRow | None, samples: Mapping[int, Samples]
) -> dict[str, float | int | None]:
    cells = {evaluation.value: metric.value, evaluation.stderr: metric.stderr, evaluation.n: metric.n}
    if reference is None:
        return cells
    delta, stderr = metric.value - reference.value, None
    items = pair(metric, reference, samples.get(metric.id), samples.get(reference.id))
    if items is not None:
        difference = items.difference(evaluation.metric)
        delta, stderr = difference.value, difference.stderr
    return cells | {evaluation.delta: delta, evaluation.delta_stderr: stderr}


def best_points(
    info: MetricInfo, rows: Sequence[RunRow], metrics: Sequence[MetricRow | None], samples: Mapping[int, Samples]
) -> set[str]:
    """Keys of the quantized points that are the best of their model or not distinguishable from it."""
    if info.higher_is_better is None:
        return set()
    best: set[str] = set()
    for model in {row.model for row in rows}:
        points = [
            (row.key, metric)
            for row, metric in zip(rows, metrics, strict=True)
            if row.model == model and metric is not None and not is_baseline(row)
        ]
        if len(points) < 2:
            continue
        first = points[0][1]
        pairs: list[Pair | None] = [
            pair(metric, first, samples.get(metric.id), samples.get(first.id)) for _, metric in points
        ]
        if any(each is None for each in pairs):
            continue
        tied = stats.tied_best(
            [each.first for each in pairs],
            higher_is_better=info.higher_is_better,
            clusters=pairs[0].clusters,
            alpha=_ALPHA,
        )
        best |= {key for (key, _), is_tied in zip(points, tied, strict=True) if is_tied}
    return best


def _caption(rows: Sequence[RunRow], evaluations: Sequence[Evaluation], metrics: Sequence[MetricRow]) -> str:
    parts = shared_settings(rows)
    first: dict[str, Evaluation] = {}
    for each in evaluations:
        first.setdefault(each.spec_key, each)
    for each in first.values():
        counts = sorted({metric.n for metric in metrics if metric.spec_key == each.spec_key})
        items = " or ".join(map(str, counts)) + " " + (each.items[:-1] if counts == [1] else each.items)
        parts.append(f"{each.label}: {each.protocol}, {items}")
    if (environments := len({row.environment_id for row in rows})) > 1:
        parts.append(f"rows come from {environments} environments: do not compare their seconds and memory")
    return " · ".join(parts)


def _error(row: RunRow) -> str | None:
    """Type and first line of the message of a failed run."""
    if row.error_type is None:
        return None
    return f"{row.error_type}: {(row.error_message or '').strip().partition(chr(10))[0]}".rstrip(": ")
