"""Best practice: per model, scheme and budget the best pipeline and calibration, and whatever is not worse.

"Best" is a claim about a difference. A row is tied where a paired test, corrected for the number of rows, does not
tell it from the best one; of tied rows the cheaper one is the better practice, so every row says what it costs and
which runs are the evidence.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from analysis.axes import axis_levels
from analysis.candidates import Candidate, Field, Judged, Only, fields, judged
from analysis.claims import Cell, Checked, check
from analysis.tables.labels import pipeline_labels
from analysis.tables.render import Entry, Plain, number, with_error
from qbench.errors import SpecError
from qbench.store.database import Database

_ALPHA = 0.05
_WORDS = {"best": "best", "tied": "tied", "worse": "worse", "untested": "not tested"}
_RUNS = 5  # named of a recipe with more seeds; the frame has all
_ALWAYS_VARIED = ("algo", "options", "calib", "calib_n", "calib_length", "calib_seed")
_ALWAYS_VARIED += ("model", "dtype", "bits", "act_bits", "kv_bits")  # named by the parts
_UNCHECKED = Checked()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The candidates of one model, scheme and budget under one evaluation, best first. `budget_s` is the largest time
    that quantizing may take, None: any. `checked` are footnotes, by position in `judged`."""

    field: Field
    scheme: str
    budget_s: float | None
    judged: tuple[Judged, ...]
    checked: Checked = _UNCHECKED

    @property
    def best(self) -> Candidate:
        return self.judged[0].candidate

    @property
    def tied(self) -> tuple[Candidate, ...]:
        """The best one and all that are not significantly worse."""
        return tuple(each.candidate for each in self.judged if each.standing in ("best", "tied"))


def best_practice(
    database: Database,
    *,
    metric: str = "ppl",
    task: str | None = None,
    model: str | None = None,
    only: Only = Only(),  # noqa: B008 (frozen)
    budgets_s: Sequence[float | None] = (None,),
    alpha: float = _ALPHA,
    allow: Collection[str] = (),
) -> tuple[Choice, ...]:
    """The choices that the finished runs offer; none where there are no quantized points with this metric.

    A budget takes the candidates whose mean quantization time is known and within it. Raises SpecError for a budget
    that is not positive, EvaluationError where the numbers must not stand in one table (`analysis.claims`), unless
    allowed.
    """
    for budget in budgets_s:
        if budget is not None and not budget > 0:
            raise SpecError("budget", budget, "a positive time in seconds")
    found = []
    for field in fields(database, metric=metric, task=task, model=model, only=only):
        for scheme in dict.fromkeys(each.scheme for each in field.candidates):
            of_scheme = [each for each in field.candidates if each.scheme == scheme]
            for budget in dict.fromkeys(budgets_s):
                within = [each for each in of_scheme if _within(each, budget)]
                if within:
                    ordered = judged(within, alpha)
                    found.append(Choice(field=field, scheme=scheme, budget_s=budget, judged=ordered))
    return _checked(database, found, allow)


def best_practice_table(choices: Sequence[Choice], *, worse: int = 0, alpha: float = _ALPHA) -> Plain:
    """The choices as a table: the best and the tied rows of each, and up to `worse` of those that are worse."""
    metrics = list(dict.fromkeys(_titled(each.field) for each in choices))
    title = "Best practice" + (f" by {metrics[0]}" if len(metrics) == 1 else "")
    columns = ("pipeline", "calibration", "value ± SE", "Δ full ± SE", "to the best", "standing")
    columns += ("bits/weight", "quantize s", "peak MB", "runs")
    rows, groups, records, notes = [], [], [], {}
    for choice in choices:
        shown = [each for each in choice.judged if each.standing != "worse"]
        shown += [each for each in choice.judged if each.standing == "worse"][:worse]
        levels = axis_levels([each.candidate.runs[0] for each in choice.judged])
        pipelines = pipeline_labels([each.candidate.runs[0] for each in choice.judged])
        for place, (each, level, pipeline) in enumerate(zip(choice.judged, levels, pipelines, strict=True)):
            if each not in shown:
                continue
            marks = []
            for note in (n for n in choice.checked.footnotes if place in n.cells):
                marks.append(notes.setdefault(note.text, len(notes) + 1))
            rows.append(_row(each, pipeline, level, tuple(marks)))
            groups.append(_group(choice, len(metrics) > 1))
            records.append(_record(choice, each, level))
    return Plain(
        title=title,
        columns=columns,
        rows=tuple(rows),
        groups=tuple(groups),
        numeric=(False, False, True, True, True, False, True, True, True, False),
        caption=_caption(choices, alpha),
        footnotes=tuple((mark, text) for text, mark in notes.items()),
        frame=pd.DataFrame.from_records(records, columns=_FRAME),
    )


def _within(each: Candidate, budget: float | None) -> bool:
    return budget is None or (each.quantize_s is not None and each.quantize_s <= budget)


def _checked(database: Database, choices: Sequence[Choice], allow: Collection[str]) -> tuple[Choice, ...]:
    """The choices with their footnotes, by candidate: what is said of a seed is said of its recipe, what is said of
    full precision alone of nobody. All are checked together, for they stand in one table."""
    owners, cells = [], []
    for part, choice in enumerate(choices):
        full = [choice.field.full] if choice.field.full else []
        for place, candidate in enumerate([*(each.candidate for each in choice.judged), *full]):
            for run, metric in zip(candidate.runs, candidate.measured, strict=True):
                owners.append((part, place))
                cells.append(Cell(where=candidate.label, run=run, metric=metric, column=_group(choice, True)))
    found = check(database, cells, varied=_ALWAYS_VARIED, allow=allow)

    def of(part: int, choice: Choice) -> Checked:
        notes = []
        for note in found.footnotes:
            mine = {place for owner, place in (owners[i] for i in note.cells) if owner == part}
            notes += [replace(note, cells=tuple(sorted(mine - {len(choice.judged)})))] if mine else []
        return Checked(footnotes=tuple(notes))

    return tuple(replace(choice, checked=of(part, choice)) for part, choice in enumerate(choices))


def _group(choice: Choice, with_metric: bool) -> str:
    words = [choice.field.name, choice.scheme]
    words += [f"within {number(choice.budget_s)} s"] if choice.budget_s is not None else []
    words += [_titled(choice.field)] if with_metric else []
    return " · ".join(words)


def _titled(field: Field) -> str:
    return f"{field.info.label} {field.info.arrow} on {field.task} ({field.protocol})"


def _row(each: Judged, pipeline: str, level: dict[str, str], marks: tuple[int, ...]) -> tuple[Entry, ...]:
    candidate, leads = each.candidate, each.standing in ("best", "tied")
    peak = candidate.peak_bytes
    to_best = "" if each.standing == "best" else with_error(each.difference, each.stderr, sign=True, least=2)
    return (
        Entry(pipeline, bold=leads, notes=marks),
        Entry(level["calibration"]),
        Entry(with_error(candidate.value, candidate.metric.stderr, least=2), bold=leads),
        Entry(with_error(candidate.delta, candidate.delta_stderr, sign=True, least=2)),
        Entry(to_best + (f" (p = {each.p_holm:.2g})" if each.p_holm is not None else "")),
        Entry(_WORDS[each.standing]),
        Entry("" if candidate.bits_per_weight is None else f"{candidate.bits_per_weight:.3f}"),
        Entry(number(candidate.quantize_s, 3)),
        Entry("" if peak is None else f"{peak / 1e6:.0f}"),
        Entry(_named(candidate.keys)),
    )


def _named(keys: Sequence[str]) -> str:
    names = [key[:8] for key in keys[:_RUNS]]
    return ", ".join([*names, *([f"{len(keys) - _RUNS} more"] if len(keys) > _RUNS else [])])


_FRAME = (
    *("model", "dtype", "task", "protocol", "metric", "scheme", "budget_s", "label", "algo", "calibration"),
    *("transformation", "clipping", "reconstruction", "value", "stderr", "n", "delta", "delta_stderr", "recovery"),
    *("recovery_low", "difference", "difference_stderr", "p", "p_holm", "standing", "bits_per_weight", "model_bytes"),
    *("quantize_s", "peak_bytes", "seeds", "keys", "spec_key"),
)


def _record(choice: Choice, each: Judged, level: dict[str, str]) -> dict[str, object]:
    c, field = each.candidate, choice.field
    return level | {
        **{"model": field.model, "dtype": field.dtype, "task": field.task, "protocol": field.protocol},
        **{"metric": field.info.name, "scheme": choice.scheme, "budget_s": choice.budget_s, "label": c.label},
        **{"algo": c.runs[0].algo, "value": c.value, "stderr": c.metric.stderr, "n": c.metric.n, "delta": c.delta},
        **{"delta_stderr": c.delta_stderr, "recovery": c.recovery, "recovery_low": c.recovery_low},
        **{"difference": each.difference, "difference_stderr": each.stderr, "p": each.p, "p_holm": each.p_holm},
        **{"standing": each.standing, "bits_per_weight": c.bits_per_weight, "model_bytes": c.model_bytes},
        **{"quantize_s": c.quantize_s, "peak_bytes": c.peak_bytes, "seeds": len(c.runs), "keys": " ".join(c.keys)},
        "spec_key": field.spec_key,
    }


def _caption(choices: Sequence[Choice], alpha: float) -> str:
    if not choices:
        return "No finished run of a quantized model has this metric: nothing to choose from."
    counts = sorted({each.best.metric.n for each in choices})
    alone = sum(len(each.judged) == 1 for each in choices)
    text = (
        f"n = {' or '.join(map(str, counts))} {choices[0].field.items}. Bold: best, or not distinguishable from it "
        f"(paired tests against the best, Holm, α = {alpha:g}). Seeds of a recipe count as one row. "
        "Δ full: difference from full precision."
    )
    if alone:
        text += f" In {alone} of {len(choices)} parts there is one candidate only: best of nothing else."
    if any(each.field.full is None for each in choices):
        text += " Where Δ is empty, full precision was not measured."
    return text
