"""Recipes that can be chosen between: finished points of one model under one evaluation, seeds taken together.

Best practice and recommendations both start from here. Runs that differ in their seeds alone are one candidate, whose
items are the means over its seeds: picking the luckiest of several seeds is not picking a better recipe.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import special

from analysis import stats
from analysis.axes import scheme_of
from analysis.noise import NoiseFloors, noise_floors
from analysis.pairing import Pair, info_of, pair, reproduces
from analysis.stats.paired import linked
from analysis.tables.labels import is_baseline, point_labels
from qbench.errors import SpecError
from qbench.metrics import MetricInfo, items_of
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.records import MetricRow, RunRow, Samples

Standing = Literal["best", "tied", "worse", "untested"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One recipe under one evaluation.

    `runs` are its seeds, `measured` the value of each, `metric` the value over all of them and `items` the values
    behind it. `delta` is the difference from full precision in the metric's unit with its paired standard error.
    `recovery` is the share of full precision's quality that is left (1: all of it), full / own for what is better when
    lower, else own / full;
    `recovery_low` is the lower end of its one-sided 95 % interval. `noise` is the standard deviation of the value by
    seeds, batch sizes and threads, where known. Seconds are means over the seeds, bytes the largest.
    """

    label: str
    scheme: str
    runs: tuple[RunRow, ...]
    measured: tuple[MetricRow, ...]
    metric: MetricRow
    info: MetricInfo
    items: Samples | None
    delta: float | None = None
    delta_stderr: float | None = None
    recovery: float | None = None
    recovery_low: float | None = None
    noise: float | None = None

    @property
    def value(self) -> float:
        return self.metric.value

    @property
    def loss(self) -> float:
        """The value with its sign such that smaller is better."""
        return -self.value if self.info.higher_is_better else self.value

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(run.key for run in self.runs)

    @property
    def quantize_s(self) -> float | None:
        return _mean([run.quantize_s for run in self.runs])

    @property
    def model_bytes(self) -> int | None:
        return _most([run.model_bytes for run in self.runs])

    @property
    def peak_bytes(self) -> int | None:
        """Of the device where there is one, else of the host."""
        return _most([run.peak_device_bytes or run.peak_host_bytes for run in self.runs])

    @property
    def bits_per_weight(self) -> float | None:
        return _mean([run.bits_per_weight for run in self.runs])


@dataclass(frozen=True, kw_only=True)
class Only:
    """Which of several evaluations of one text, or of several checkpoints of one name, is meant; None: all.
    `checkpoint` is the beginning of a fingerprint, `n` counts items."""

    protocol: str | None = None
    n: int | None = None
    dtype: str | None = None
    checkpoint: str | None = None

    def takes(self, field: "Field") -> bool:
        """Whether the field is one that is meant."""
        same = all(
            mine in (None, own)
            for mine, own in ((self.protocol, field.protocol), (self.n, field.n), (self.dtype, field.dtype))
        )
        return same and field.checkpoint.startswith(self.checkpoint or "")


@dataclass(frozen=True, kw_only=True)
class Field:
    """All candidates of one model under one evaluation, and full precision if it was measured. `apart` says what tells
    it from others of the same model, text and protocol; empty where there is none."""

    model: str
    checkpoint: str
    dtype: str | None
    task: str
    protocol: str
    spec_key: str
    items: str
    info: MetricInfo
    full: Candidate | None
    candidates: tuple[Candidate, ...]
    apart: str = ""

    @property
    def name(self) -> str:
        """The model, and what tells the field from others of it."""
        return self.model + (f" ({self.apart})" if self.apart else "")

    @property
    def n(self) -> int:
        """How many items every value of the field has."""
        return (self.full or self.candidates[0]).metric.n


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A candidate against the best of its group: difference (its own minus the best's), p before and after Holm's
    correction. "untested": nothing says whether it is worse."""

    candidate: Candidate
    standing: Standing
    difference: float | None = None
    stderr: float | None = None
    p: float | None = None
    p_holm: float | None = None


def fields(
    database: Database,
    *,
    metric: str = "ppl",
    task: str | None = None,
    model: str | None = None,
    only: Only = Only(),
    seeds_apart: bool = False,
) -> tuple[Field, ...]:
    """What there is to choose from, by model and evaluation, in the order of the runs.

    With `seeds_apart` every run is a candidate of its own. Raises SpecError for a metric without a better direction,
    and for a model, metric, task or anything of `only` that no finished run has, where there are finished runs.
    """
    every = queries.runs(database, status="done")
    rows = [row for row in every if model in (None, row.model)]
    require_known("model", model, [row.model for row in every])
    measured = queries.metrics(database, [row.id for row in rows])
    require_known("metric", metric, [each.name for each in measured])
    of_metric = [each for each in measured if each.name == metric]
    require_known("task", task, [each.task for each in of_metric])
    found = [each for each in of_metric if task in (None, each.task)]
    if found and info_of(found[-1]).higher_is_better is None:
        raise SpecError("metric", metric, "a metric of which more, or less, is better")
    samples = queries.clustered_samples_of(database, [each.id for each in found])
    floors, by_id = noise_floors(database, rows), {row.id: row for row in rows}
    groups: dict[tuple, list[tuple[RunRow, MetricRow]]] = {}
    for each in found:
        row = by_id[each.run_id]
        fingerprint = (row.spec.get("model") or {}).get("fingerprint", row.model)
        groups.setdefault((fingerprint, row.dtype, each.spec_key, each.n), []).append((row, each))
    everything = [_field(rows, samples, floors, seeds_apart) for rows in groups.values()]
    for option in ("protocol", "n", "dtype"):
        require_known(option, getattr(only, option), [getattr(each, option) for each in everything])
    chosen = [each for each in everything if only.takes(each)]
    if everything and not chosen:
        known = _listed(each.checkpoint for each in everything)
        raise SpecError("checkpoint", only.checkpoint, f"with the other options, the beginning of one of {known}")
    return _told_apart(chosen)


def require_known(option: str, value: object, known: Sequence[object]) -> None:
    """SpecError, listing what there is, for a value that is not among what the database has; nothing where it has
    nothing."""
    if value is not None and known and value not in known:
        raise SpecError(option, value, f"the database has {_listed(known)}")


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


def _told_apart(found: Sequence[Field]) -> tuple[Field, ...]:
    """The fields, each with what tells it from others of its model, text and protocol."""
    named = []
    for field in found:
        alike = [each for each in found if _same_heading(each, field)]
        differing = {
            f"{field.dtype}": {each.dtype for each in alike},
            f"n = {field.n}": {each.n for each in alike},
            f"checkpoint {field.checkpoint[:8]}": {each.checkpoint for each in alike},
        }
        named.append(replace(field, apart=", ".join(word for word, values in differing.items() if len(values) > 1)))
    return tuple(
        replace(field, apart=", ".join(filter(None, (field.apart, f"evaluation {field.spec_key[:8]}"))))
        if sum(_same_heading(each, field) and each.apart == field.apart for each in named) > 1
        else field
        for field in named
    )


def _same_heading(one: Field, other: Field) -> bool:
    return (one.model, one.task, one.protocol) == (other.model, other.task, other.protocol)


def judged(candidates: Sequence[Candidate], alpha: float = 0.05) -> tuple[Judged, ...]:
    """The candidates from best to worst, each with its standing.

    All are tested against the best, paired where items are stored, else by their standard errors; p values are
    Holm-corrected. Where the noise floor is known, a difference must also stand out from it.
    """
    if not candidates:
        return ()
    ordered = sorted(candidates, key=lambda each: each.loss)
    best = ordered[0]
    tests = [_against(each, best) for each in ordered[1:]]
    adjusted = stats.holm([math.nan if p is None else p for _, _, p in tests])
    found = [Judged(candidate=best, standing="best", difference=0.0)]
    for each, (difference, stderr, p), p_holm in zip(ordered[1:], tests, adjusted, strict=True):
        standing: Standing = "untested" if p is None else "worse" if p_holm < alpha else "tied"
        corrected = None if p is None else float(p_holm)
        found.append(
            Judged(candidate=each, standing=standing, difference=difference, stderr=stderr, p=p, p_holm=corrected)
        )
    return tuple(found)


def _against(each: Candidate, best: Candidate) -> tuple[float, float | None, float | None]:
    """(difference, standard error, p) of a candidate and the best one; p None where nothing can be tested."""
    difference, stderr, p = each.value - best.value, None, None
    items = pair(each.metric, best.metric, each.items, best.items)
    if items is not None:
        stderr = items.difference(each.info).stderr
        if stderr is not None:
            p = 1.0 if np.array_equal(items.first, items.second) else _paired(items)
        elif difference == 0:
            p = 1.0
    elif each.metric.stderr is not None and best.metric.stderr is not None:
        stderr = math.hypot(each.metric.stderr, best.metric.stderr)
        p = 1.0 if difference == 0 else (2 * float(special.ndtr(-abs(difference) / stderr)) if stderr else 0.0)
    noise = math.hypot(each.noise or 0.0, best.noise or 0.0)
    if p is not None and noise:
        p = max(p, 2 * float(special.ndtr(-abs(difference) / math.hypot(stderr or 0.0, noise))))
    return difference, stderr, p


def _paired(items: Pair) -> float:
    return stats.paired_test(items.first, items.second, items.clusters).p


def _field(
    rows: Sequence[tuple[RunRow, MetricRow]], samples: Mapping[int, Samples], floors: NoiseFloors, seeds_apart: bool
) -> Field:
    families: dict[str, list[tuple[RunRow, MetricRow]]] = {}
    for run, metric in rows:
        families.setdefault(run.key if seeds_apart else run.family or run.key, []).append((run, metric))
    ones = [members[0][0] if seeds_apart else _seedless(members[0][0]) for members in families.values()]
    made = [
        _candidate(members, label, samples, floors)
        for members, label in zip(families.values(), point_labels(ones), strict=True)
    ]
    full = next((each for each in made if is_baseline(each.runs[0])), None)
    first = rows[0]
    return Field(
        model=first[0].model,
        checkpoint=(first[0].spec.get("model") or {}).get("fingerprint", first[0].model),
        dtype=first[0].dtype,
        task=first[1].task,
        protocol=first[1].protocol,
        spec_key=first[1].spec_key,
        items=items_of(first[1].evaluator),
        info=made[0].info,
        full=full,
        candidates=tuple(_beside(each, full) for each in made if not is_baseline(each.runs[0])),
    )


def _candidate(
    members: Sequence[tuple[RunRow, MetricRow]], label: str, samples: Mapping[int, Samples], floors: NoiseFloors
) -> Candidate:
    """The runs of one family as one candidate."""
    metrics = [metric for _, metric in members]
    info, values = info_of(metrics[0]), [metric.value for metric in metrics]
    stderrs = [metric.stderr for metric in metrics]
    stored = [samples.get(metric.id) for metric in metrics]
    usable = all(each is not None and reproduces(m, each.values) for each, m in zip(stored, metrics, strict=True))
    items, value = None, float(np.mean(values))
    stderr = None if None in stderrs else float(np.mean(stderrs))
    if usable:
        clusters = next((each.clusters for each in stored if each.clusters is not None), None)
        items = Samples(values=np.mean([each.values for each in stored], axis=0), clusters=clusters)
        if len(members) > 1:
            value = linked(float(np.mean(items.values)), info.link)[0]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    floor = floors.of(members[0][0], metrics[0].spec_key, metrics[0].name) or spread
    run = members[0][0]
    return Candidate(
        label=label,
        scheme=scheme_of(run),
        runs=tuple(run for run, _ in members),
        measured=tuple(metrics),
        metric=replace(metrics[0], value=value, stderr=stderr),
        info=info,
        items=items,
        noise=None if floor is None else floor / math.sqrt(len(members)),
    )


def _beside(each: Candidate, full: Candidate | None) -> Candidate:
    """The candidate with what it has lost against full precision."""
    if full is None or each.info.against_full:
        return each
    delta, stderr = each.value - full.value, None
    items = pair(each.metric, full.metric, each.items, full.items)
    if items is not None:
        stderr = items.difference(each.info).stderr
    better, worse = (each.value, full.value) if each.info.higher_is_better else (full.value, each.value)
    recovery = low = None
    if better >= 0 and worse > 0:
        recovery = better / worse
        low = _lowest(each, full, recovery, None if items is None else (items.first, items.second, items.clusters))
    return replace(each, delta=delta, delta_stderr=stderr, recovery=recovery, recovery_low=low)


def _lowest(each: Candidate, full: Candidate, recovery: float, items: tuple | None) -> float | None:
    """Lower end of the recovery's one-sided 95 % interval: of the paired NLLs for perplexities, else by the delta
    method; None without standard errors."""
    if each.info.link == "exp_mean" and items is not None:
        found = stats.nll_difference(*items)
        return None if found.stderr is None else math.exp(-stats.interval(found, 0.9)[1])
    above, below = (each, full) if each.info.higher_is_better else (full, each)
    if items is not None and each.info.link == "mean":
        first, second = (items[0], items[1]) if above is each else (items[1], items[0])
        found = stats.mean((first - recovery * second) / below.value, items[2])
        if found.stderr is None:
            return None
        return recovery + stats.interval(replace(found, value=0.0), 0.9)[0]
    if above.metric.stderr is None or below.metric.stderr is None or above.value == 0:
        return None
    relative = math.hypot(above.metric.stderr / above.value, below.metric.stderr / below.value)
    return recovery * (1 - float(special.ndtri(0.95)) * relative)


def _seedless(run: RunRow) -> RunRow:
    """The row as it stands for all its seeds in labels."""
    spec = dict(run.spec) | {"seed": None}
    if spec.get("calibration"):
        spec["calibration"] = dict(spec["calibration"]) | {"seed": None}
    return replace(run, spec=spec, calib_seed=None)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [each for each in values if each is not None]
    return math.fsum(known) / len(known) if known else None


def _most(values: Sequence[int | None]) -> int | None:
    return max((each for each in values if each is not None), default=None)
