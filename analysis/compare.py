"""Two runs against each other: every metric that both have under the same protocol, tested on the same items.

The tests are paired where items are stored, and all p values shown together are Holm-corrected together. A claim of
equivalence (two one-sided tests) is not corrected: "equivalent in all of them" needs no correction.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from analysis import stats
from analysis.matching import Lacking, incomparable, matched, named
from analysis.noise import noise_floors
from analysis.pairing import info_of, pair
from analysis.tables.labels import point_labels, setting_differences
from qbench.errors import EvaluationError, SpecError
from qbench.metrics import MetricInfo, items_of
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.records import MetricRow, RunRow, Samples

Outcome = Literal["A better", "B better", "A larger", "B larger", "equivalent", "identical", "open", "untested"]

COSTS = (
    *("bits_per_weight", "bits_per_weight_model", "model_bytes"),
    *("load_s", "quantize_s", "evaluate_s", "peak_host_bytes", "peak_device_bytes"),
)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One metric of both runs. Differences are A minus B in the metric's unit; a number that cannot be known is None.

    `low` and `high` are the ends of the difference's 1 - alpha confidence interval, `p` is uncorrected and `p_holm`
    corrected over all metrics of the comparison. `smallest_effect` is what n items detect with power .8, and
    `items_needed` how many items the observed difference takes; `noise` is the standard deviation that the difference
    has by seeds, batch sizes and threads alone (`analysis.noise`); `flips` counts 0/1 items.
    """

    task: str
    protocol: str
    metric: MetricInfo
    items: str
    n: int
    clusters: int | None
    a: float
    a_stderr: float | None
    b: float
    b_stderr: float | None
    difference: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    test: str | None = None
    p: float | None = None
    p_holm: float | None = None
    margin: float | None = None
    p_equivalent: float | None = None
    smallest_effect: float | None = None
    items_needed: int | None = None
    noise: float | None = None
    flips: stats.Flips | None = None
    outcome: Outcome = "untested"
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that `qbench compare` shows; `refused` are metrics of both runs that must not be compared, with the reason,
    `settings` the (path, A's value, B's value) in which the runs' specs differ."""

    a: RunRow
    b: RunRow
    labels: tuple[str, str]
    rows: tuple[Compared, ...]
    refused: tuple[tuple[str, str], ...]
    lacking: tuple[Lacking, ...]
    settings: tuple[tuple[str, object, object], ...]
    alpha: float
    margin: float | None

    def as_json(self) -> dict[str, object]:
        """Plain values for JSON."""
        sides = {
            side: {"id": run.id, "key": run.key, "label": label, **{name: getattr(run, name) for name in COSTS}}
            for side, run, label in zip("ab", (self.a, self.b), self.labels, strict=True)
        }
        return sides | {
            "alpha": self.alpha,
            "margin": self.margin,
            "settings": [{"setting": path, "a": here, "b": there} for path, here, there in self.settings],
            "metrics": [asdict(each) for each in self.rows],
            "refused": [{"metric": what, "reason": reason} for what, reason in self.refused],
            "lacking": [asdict(each) for each in self.lacking],
        }


def compare(
    database: Database,
    a: RunRow,
    b: RunRow,
    *,
    alpha: float = 0.05,
    margin: float | None = None,
    resamples: int | None = None,
) -> Comparison:
    """Compare two finished runs.

    `margin` is the difference that does not matter, as a share of B's value: with it, equivalence is tested. With
    `resamples` intervals and p values are those of the paired bootstrap instead of t or McNemar's test. Raises
    SpecError for values out of range, and for a run that is not done.
    """
    if not 0 < alpha < 1:
        raise SpecError("alpha", alpha, "a number between 0 and 1, such as 0.05")
    if margin is not None and not 0 < margin < math.inf:
        raise SpecError("margin", margin, "a positive share of B's value: 0.01 is one percent")
    if resamples is not None and resamples < 100:
        raise SpecError("bootstrap", resamples, "100 resamples or more")
    for run in (a, b):
        if run.status != "done":
            raise SpecError("run", run.id, f"is {run.status}: only finished runs can be compared")

    measured = [queries.metrics(database, [run.id]) for run in (a, b)]
    shared, refused, lacking = matched(a, b, *measured)
    ids = [each.id for pair in shared for each in pair]
    samples = queries.clustered_samples_of(database, ids)
    floors, rows = noise_floors(database, [a, b]), []
    for first, second in shared:
        if (reason := incomparable(a, b, first, second)) is not None:
            refused.append((named(first), reason))
            continue
        try:
            row = _compared(first, second, samples.get(first.id), samples.get(second.id), alpha, resamples)
        except EvaluationError as error:
            refused.append((named(first), str(error)))
        else:
            noise = floors.of_difference(a, b, first.spec_key, first.name)
            rows.append(replace(_with_margin(row, margin), noise=noise))
    adjusted = stats.holm([math.nan if row.p is None else row.p for row in rows])
    judged = [
        _judged(replace(row, p_holm=None if math.isnan(p) else float(p)), alpha)
        for row, p in zip(rows, adjusted, strict=True)
    ]
    labels = point_labels([a, b])
    return Comparison(
        a=a,
        b=b,
        labels=(labels[0], labels[-1]),
        rows=tuple(judged),
        refused=tuple(refused),
        lacking=tuple(lacking),
        settings=tuple(setting_differences(a.spec, b.spec)),
        alpha=alpha,
        margin=margin,
    )


def _compared(
    first: MetricRow,
    second: MetricRow,
    of_first: Samples | None,
    of_second: Samples | None,
    alpha: float,
    resamples: int | None,
) -> Compared:
    """The numbers of one metric: paired where the stored items give both values, else by the standard errors."""
    info = info_of(first)
    row = Compared(
        task=first.task,
        protocol=first.protocol,
        metric=info,
        items=items_of(first.evaluator),
        n=first.n,
        clusters=None,
        a=first.value,
        a_stderr=first.stderr,
        b=second.value,
        b_stderr=second.stderr,
        difference=first.value - second.value,
    )
    if (items := pair(first, second, of_first, of_second)) is None:
        return _unpaired(row, alpha)
    x, y, clusters = items.first, items.second, items.clusters
    found = items.difference(info)
    flips = stats.flips(x, y) if stats.is_binary(x) and stats.is_binary(y) else None
    row = replace(row, stderr=found.stderr, clusters=found.clusters, flips=flips)
    if np.array_equal(x, y):
        return replace(row, low=0.0, high=0.0, test="identical", p=1.0)
    if found.stderr is None:
        return row
    if resamples is None:
        test = stats.paired_test(x, y, clusters)
        low, high = stats.interval(found, 1 - alpha)
        row = replace(row, low=low, high=high, test=test.method, p=test.p)
    else:
        drawn = stats.paired_bootstrap(x, y, clusters, link=info.link, resamples=resamples, confidence=1 - alpha)
        row = replace(row, low=drawn.low, high=drawn.high, test="bootstrap", p=drawn.p)
    return replace(
        row,
        smallest_effect=stats.smallest_effect(found, alpha=alpha),
        items_needed=stats.items_needed(found, alpha=alpha),
    )


def _unpaired(row: Compared, alpha: float) -> Compared:
    """A test by the two standard errors, for metrics without stored items."""
    if row.a_stderr is None or row.b_stderr is None:
        return row
    test = stats.unpaired_z(
        stats.Estimate(value=row.a, stderr=row.a_stderr, n=row.n),
        stats.Estimate(value=row.b, stderr=row.b_stderr, n=row.n),
    )
    found = stats.Estimate(value=row.difference, stderr=math.hypot(row.a_stderr, row.b_stderr), n=row.n)
    low, high = stats.interval(found, 1 - alpha) if row.n > 1 else (None, None)
    return replace(row, stderr=found.stderr, low=low, high=high, test=test.method, p=test.p)


def _with_margin(row: Compared, margin: float | None) -> Compared:
    """The row with the equivalence test for ±margin · |B|, where B is not 0."""
    if margin is None or row.b == 0 or row.stderr is None:
        return row
    independent = row.n if row.clusters is None else row.clusters
    if independent < 2:
        return row
    found = stats.Estimate(value=row.difference, stderr=row.stderr, n=row.n, clusters=row.clusters)
    room = margin * abs(row.b)
    return replace(row, margin=room, p_equivalent=stats.equivalence(found, room).p)


def _judged(row: Compared, alpha: float) -> Compared:
    """The row with its outcome and a sentence."""
    within = row.p_equivalent is not None and row.p_equivalent < alpha
    if row.test == "identical":
        return replace(row, outcome="identical", verdict=f"identical on all {row.n} {row.items}")
    if row.p_holm is None:
        why = f"one of the {row.items} shows no spread" if row.n == 1 or row.clusters == 1 else "no standard error"
        return replace(row, outcome="untested", verdict=f"cannot be judged: {why}")
    if row.p_holm < alpha:
        larger = "A" if row.difference > 0 else "B"
        direction = row.metric.higher_is_better
        better = larger if direction else {"A": "B", "B": "A"}[larger]
        outcome = f"{larger} larger" if direction is None else f"{better} better"
        return replace(row, outcome=outcome, verdict=outcome + (f", within ±{row.margin:.2g}" if within else ""))
    if within:
        return replace(row, outcome="equivalent", verdict=f"equivalent within ±{row.margin:.2g}")
    parts = [f"not distinguishable at n = {row.n}"]
    if row.smallest_effect is not None:
        parts.append(f"smallest detectable effect {row.smallest_effect:.2g}")
    if row.items_needed is not None and row.items_needed > row.n:
        parts.append(f"about {_rounded(row.items_needed)} {row.items} needed for the observed one")
    return replace(row, outcome="open", verdict="; ".join(parts))


def _rounded(count: int) -> int:
    """To two digits, upwards: the third would pretend to be known."""
    step = 10 ** max(0, len(str(count)) - 2)
    return -(-count // step) * step


def costs(run: RunRow) -> Mapping[str, float | int | None]:
    """What the run cost and how large it is, by column name."""
    return {name: getattr(run, name) for name in COSTS}
