"""The table at the end of a sweep: what each point costs and what it loses against full precision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis import stats
from analysis.tables.labels import is_baseline, point_labels, shared_settings
from qbench.errors import EvaluationError
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.owner import state
from qbench.store.records import MetricRow, RunRow

_COSTS = ("bits_per_weight", "bits_per_weight_model", "quantize_s", "peak_host_bytes", "peak_device_bytes")
_IDENTITY = (
    *("model", "algo", "bits", "group_size", "symmetric", "weight_format", "act_format", "kv_format", "calib", "dtype"),
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One perplexity column: `label` is its task, made unambiguous where several columns have the same
    task."""

    label: str
    task: str
    protocol: str
    spec_key: str


@dataclass(frozen=True, kw_only=True)
class SweepTable:
    """Rows in the order of the keys that were asked for.

    `frame` has, besides the run's columns, `label`, `status`, `error` and for each evaluation E with label L
    the columns `ppl L`, `ppl_stderr L`, `delta L`, `delta_stderr L` and `n L`: perplexity, its difference
    from the full-precision row of the same model and dtype, their standard errors (that of the difference
    paired) and the number of windows; NaN where there is none. `caption` says what all rows share.
    """

    frame: pd.DataFrame
    evaluations: tuple[Evaluation, ...]
    caption: str


def sweep_table(database: Database, keys: Sequence[str], spec_keys: Sequence[str]) -> SweepTable:
    """The table of the runs with these keys, a perplexity column for each of the evaluators' spec keys.

    Keys without a row appear with status "missing". Raises EvaluationError where one column would have to mix
    protocols, or a difference windows of different texts.
    """
    found = database.find(keys)
    rows = [found[key] for key in dict.fromkeys(keys) if key in found]
    metrics = [each for each in queries.metrics(database, [row.id for row in rows]) if each.name == "ppl"]
    by_run = {(each.run_id, each.spec_key): each for each in metrics if each.spec_key in set(spec_keys)}
    evaluations = _evaluations(list(by_run.values()), spec_keys)
    samples = queries.samples_of(database, [each.id for each in by_run.values()])
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
            metric = by_run.get((row.id, each.spec_key))
            reference = by_run.get((baseline.id, each.spec_key)) if baseline and not is_baseline(row) else None
            if metric is not None:
                record |= _perplexity_cells(each.label, metric, reference, samples)
        records.append(record)

    names = ["label", "status"]
    for each in evaluations:
        names += [f"{kind} {each.label}" for kind in ("ppl", "ppl_stderr", "delta", "delta_stderr", "n")]
    names += [*_COSTS, *_IDENTITY, "error", "run_id", "key"]
    frame = pd.DataFrame.from_records(records, columns=names)
    frame["bits"] = pd.to_numeric(frame["bits"]).convert_dtypes()  # whole numbers, but for ternary weights
    whole = ["group_size", "run_id", *(f"n {each.label}" for each in evaluations)]
    frame = frame.astype(dict.fromkeys(whole, "Int64"))
    measured = [name for name in names if name.startswith(("ppl", "delta"))]
    frame = frame.astype(dict.fromkeys((*measured, *_COSTS), "float64"))
    return SweepTable(frame=frame, evaluations=evaluations, caption=_caption(rows, evaluations, list(by_run.values())))


def _evaluations(metrics: Sequence[MetricRow], spec_keys: Sequence[str]) -> tuple[Evaluation, ...]:
    """A column per spec key that was measured at all, labelled by its task and as much more as it takes."""
    found = []
    for spec_key in dict.fromkeys(spec_keys):
        measured = [each for each in metrics if each.spec_key == spec_key]
        protocols = sorted({each.protocol for each in measured})
        if len(protocols) > 1:
            raise EvaluationError(f"ppl {measured[0].task}: one column would mix protocols {', '.join(protocols)}")
        if measured:
            task = measured[-1].task
            found.append(Evaluation(label=task, task=task, protocol=protocols[0], spec_key=spec_key))
    for fuller in (
        lambda each: f"{each.task} {each.protocol}",
        lambda each: f"{each.label} {each.spec_key[:8]}",
    ):
        labels = [each.label for each in found]
        found = [replace(each, label=fuller(each)) if labels.count(each.label) > 1 else each for each in found]
    return tuple(found)


def _perplexity_cells(
    label: str, metric: MetricRow, reference: MetricRow | None, samples: Mapping[int, np.ndarray]
) -> dict[str, float | int | None]:
    cells = {f"ppl {label}": metric.value, f"ppl_stderr {label}": metric.stderr, f"n {label}": metric.n}
    if reference is None:
        return cells
    delta, stderr = metric.value - reference.value, None
    if metric.id in samples and reference.id in samples:
        difference = stats.perplexity_difference(samples[metric.id], samples[reference.id])
        delta, stderr = difference.value, difference.stderr
    return cells | {f"delta {label}": delta, f"delta_stderr {label}": stderr}


def _caption(rows: Sequence[RunRow], evaluations: Sequence[Evaluation], metrics: Sequence[MetricRow]) -> str:
    parts = shared_settings(rows)
    for each in evaluations:
        counts = sorted({metric.n for metric in metrics if metric.spec_key == each.spec_key})
        windows = " or ".join(map(str, counts)) + (" window" if counts == [1] else " windows")
        parts.append(f"{each.label}: {each.protocol}, {windows}")
    if (environments := len({row.environment_id for row in rows})) > 1:
        parts.append(f"rows come from {environments} environments: do not compare their seconds and memory")
    return " · ".join(parts)


def _error(row: RunRow) -> str | None:
    """Type and first line of the message of a failed run."""
    if row.error_type is None:
        return None
    return f"{row.error_type}: {(row.error_message or '').strip().partition(chr(10))[0]}".rstrip(": ")
