"""What a report shows of each run: columns, measurements with their differences, settings and provenance."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from analysis.noise import noise_floors
from analysis.pairing import info_of, pair
from analysis.style import marks
from analysis.tables.labels import is_baseline, point_labels
from analysis.tables.sweep import best_points
from qbench.errors import EvaluationError
from qbench.metrics import items_of
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.owner import state
from qbench.store.records import MetricRow, RunRow

_MARKED = 20  # algorithms with a mark of their own, the most frequent ones; the rest share one

# name: (title, unit as the page formats it, how it follows from a row)
_NUMBERS: Mapping[str, tuple[str, str, Callable[[RunRow], float | None]]] = {
    "bits_per_weight": ("bits/weight", "bits", lambda row: row.bits_per_weight),
    "bits_per_weight_model": ("bits/parameter", "bits", lambda row: row.bits_per_weight_model),
    "model_bytes": ("model size", "bytes", lambda row: row.model_bytes),
    "quantize_s": ("quantizing", "s", lambda row: row.quantize_s),
    "evaluate_s": ("measuring", "s", lambda row: row.evaluate_s),
    "total_s": ("all", "s", lambda row: row.total_s),
    "peak_host_bytes": ("peak memory", "bytes", lambda row: row.peak_host_bytes),
    "peak_device_bytes": ("peak GPU memory", "bytes", lambda row: row.peak_device_bytes),
    "bits": ("bits", "", lambda row: row.bits),
    "group_size": ("group size", "", lambda row: row.group_size),
    "calib_n": ("calib. sequences", "", lambda row: row.calib_n),
    "calib_length": ("calib. length", "", lambda row: row.calib_length),
    "calib_seed": ("calib. seed", "", lambda row: row.calib_seed),
}
_TEXTS: Mapping[str, tuple[str, Callable[[RunRow], str | None]]] = {
    "status": ("status", state),
    "model": ("model", lambda row: row.model),
    "algo": ("algorithm", lambda row: row.algo),
    "weight_format": ("weights", lambda row: row.weight_format),
    "act_format": ("inputs", lambda row: row.act_format),
    "kv_format": ("cache", lambda row: row.kv_format),
    "calib": ("calibration", lambda row: row.calib),
    "dtype": ("dtype", lambda row: row.dtype),
    "device": ("device", lambda row: row.device),
    "source": ("source", lambda row: row.source),
    "finished": ("finished", lambda row: row.finished),
    "created": ("started", lambda row: row.created),
    "codes_sha256": ("codes", lambda row: row.codes_sha256),
    "error": ("error", lambda row: _error(row)),
    "trace": ("trace", lambda row: row.error_trace),
}


def results(database: Database) -> dict[str, Any]:
    """The runs that count, oldest first, as JSON values; everything about a run is found by its position.

    `texts` and `numbers` are columns (texts as `levels` and the `codes` [n] that point at them), `evaluations` lists
    each metric of each evaluation with the positions of the runs that have it, `settings` holds each run's spec as
    numbers of (path, value) pairs, which runs share.
    """
    everything = queries.runs(database, superseded=True)
    rows = [row for row in everything if row.superseded_by is None]
    labels = point_labels(rows)
    ids = [row.id for row in rows]
    position = {run_id: index for index, run_id in enumerate(ids)}
    measured = queries.metrics(database, ids)
    attempts = Counter(row.key for row in everything)
    algorithms = [name for name, _ in Counter(row.algo for row in rows).most_common(_MARKED)]
    environments = sorted({row.environment_id for row in rows})
    settings = _Pairs()
    phases = [settings.of(row.phases or {}) for row in rows]
    specs = [settings.of(row.spec) for row in rows]
    return {
        "ids": ids,
        "keys": [row.key for row in rows],
        "labels": labels,
        "baseline": [int(is_baseline(row)) for row in rows],
        "attempts": [attempts[row.key] for row in rows],
        "texts": {name: {"title": title, **_coded([of(row) for row in rows])} for name, (title, of) in _TEXTS.items()},
        "numbers": {
            name: {"title": title, "unit": unit, "values": [of(row) for row in rows]}
            for name, (title, unit, of) in _NUMBERS.items()
        },
        "evaluations": _evaluations(database, rows, measured, position),
        "marks": {name: asdict(mark) for name, mark in marks(algorithms).items()},
        "environments": [asdict(queries.environment(database, each)) for each in environments],
        "environment": [environments.index(row.environment_id) for row in rows],
        "specs": specs,
        "phases": phases,
        "pairs": settings.pairs,
        "failures": _failures(database, position),
        "artifacts": _artifacts(database, position),
        "superseded": len(everything) - len(rows),
    }


def _error(row: RunRow) -> str | None:
    return None if row.error_type is None else f"{row.error_type}: {(row.error_message or '').strip()}".rstrip(": ")


def _coded(values: Sequence[str | None]) -> dict[str, list]:
    levels = sorted({value for value in values if value is not None})
    index = {value: code for code, value in enumerate(levels)} | {None: -1}
    return {"levels": levels, "codes": [index[value] for value in values]}


class _Pairs:
    """(path, value) pairs of nested settings, each stored once: most runs of a sweep share most of them."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []
        self._index: dict[tuple[str, str], int] = {}

    def of(self, value: object) -> list[int]:
        return [self._number(each) for each in _leaves(value)]

    def _number(self, pair: tuple[str, str]) -> int:
        if pair not in self._index:
            self._index[pair] = len(self.pairs)
            self.pairs.append(pair)
        return self._index[pair]


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}")
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _evaluations(
    database: Database, rows: Sequence[RunRow], measured: Sequence[MetricRow], position: Mapping[int, int]
) -> list[dict[str, Any]]:
    groups: dict[tuple[str, ...], list[MetricRow]] = {}
    for each in measured:
        groups.setdefault((each.evaluator, each.protocol, each.task, each.spec_key, each.name), []).append(each)
    names = [(protocol, task, name) for _, protocol, task, _, name in groups]
    baselines = {(row.model, row.dtype): row for row in rows if is_baseline(row) and row.status == "done"}
    floors = noise_floors(database, rows)
    found = []
    for (evaluator, protocol, task, spec_key, name), metrics in groups.items():
        info = info_of(metrics[-1])
        alike = names.count((protocol, task, name)) > 1
        record = {
            "label": f"{info.label} {task}, {protocol}" + (f" ({spec_key[:8]})" if alike else ""),
            "metric": name,
            "quantity": info.quantity,
            "unit": info.unit,
            "better": {True: 1, False: -1, None: 0}[info.higher_is_better],
            "headline": int(info.headline and info.higher_is_better is not None),
            "againstFull": int(info.against_full),
            "items": items_of(evaluator),
            **{"evaluator": evaluator, "protocol": protocol, "task": task, "specKey": spec_key},
            **{column: [] for column in ("run", "value", "stderr", "n", "delta", "deltaStderr", "noise", "best")},
        }
        by_run = {each.run_id: each for each in metrics}
        samples = queries.clustered_samples_of(database, [each.id for each in metrics])
        best = best_points(info, rows, [by_run.get(row.id) for row in rows], samples)
        for each in metrics:
            row = rows[position[each.run_id]]
            reference = baselines.get((row.model, row.dtype))
            base = None if reference is None or is_baseline(row) else by_run.get(reference.id)
            delta = delta_stderr = noise = None
            if base is not None:
                delta, delta_stderr = _difference(each, base, samples)
                noise = floors.of_difference(row, reference, spec_key, name)
            record["run"].append(position[each.run_id])
            record["value"].append(each.value)
            record["stderr"].append(_short(each.stderr))
            record["n"].append(each.n)
            record["delta"].append(_short(delta))
            record["deltaStderr"].append(_short(delta_stderr))
            record["noise"].append(_short(noise))
            record["best"].append(int(row.key in best))
        found.append(record)
    return sorted(found, key=lambda record: (-record["headline"], -len(record["run"])))


def _difference(metric: MetricRow, base: MetricRow, samples: Mapping[int, Any]) -> tuple[float | None, float | None]:
    """Difference from full precision and its paired standard error; (None, None) where the items differ."""
    try:
        items = pair(metric, base, samples.get(metric.id), samples.get(base.id))
    except EvaluationError:
        return None, None
    if items is None:
        return metric.value - base.value, None
    estimate = items.difference(info_of(metric))
    return metric.value - base.value, estimate.stderr


def _short(value: float | None) -> float | None:
    """`value` to six digits: what is only shown needs no more; not a number is nothing."""
    return None if value is None or value != value else float(f"{value:.6g}")


def _failures(database: Database, position: Mapping[int, int]) -> dict[int, list[dict[str, str]]]:
    found = queries.failures(database, position)
    return {position[run_id]: [asdict(each) for each in failures] for run_id, failures in found.items()}


def _artifacts(database: Database, position: Mapping[int, int]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for run_id, each in queries.artifacts_of(database, position):
        found.setdefault(position[run_id], []).append(asdict(each))
    return found
