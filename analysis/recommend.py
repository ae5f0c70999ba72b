"""Which recipe to take, given what the deployment allows: size, kernel, recovery, time to calibrate.

A recipe that fits is ranked by its measured quality, but recipes that no test tells from the best one are equally good:
of those the smaller, then the faster one comes first. Everything that does not fit, or is not first, is listed with the
reason, and each recipe with the runs that are its evidence.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field

from analysis.candidates import Candidate, Field, Judged, Only, fields, judged
from analysis.claims import Cell, Checked, check
from analysis.serving import kernel as kernel_named
from analysis.tables.render import number, with_error
from qbench.errors import SpecError
from qbench.store.database import Database

_VARIED = ("algo", "options", "calib", "calib_n", "calib_length", "calib_seed")
_FORMATS = ("bits", "weight_format", "act_format", "kv_format")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a recipe must keep within; None: anything goes. `min_recovery` is a share of full precision's quality (see
    `Candidate.recovery`); with `certain` the lower end of its interval must reach it, not only the value."""

    max_bytes: float | None = None
    kernel: str | None = None
    min_recovery: float | None = None
    max_calib_s: float | None = None
    certain: bool = False


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A recipe that fits, and why it is not first; of the first whether its value is the best one."""

    judged: Judged
    reason: str = ""

    @property
    def candidate(self) -> Candidate:
        return self.judged.candidate


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A recipe that does not fit, with one reason for each wish that it fails."""

    candidate: Candidate
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """Recipes that fit, first choice first, and those that don't, nearest miss first."""

    field: Field
    wishes: Wishes
    ranked: tuple[Ranked, ...]
    rejected: tuple[Rejected, ...]
    checked: Checked = field(default_factory=Checked)

    def as_json(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            **{"model": self.field.model, "task": self.field.task, "protocol": self.field.protocol},
            **{"metric": self.field.info.name, "wishes": asdict(self.wishes)},
            "recipes": [as_plain(each.candidate) | _of(each) for each in self.ranked],
            "rejected": [as_plain(each.candidate) | {"reasons": list(each.reasons)} for each in self.rejected],
            "footnotes": [each.text for each in self.checked.footnotes],
        }


def recommend(
    database: Database,
    wishes: Wishes,
    *,
    model: str | None = None,
    metric: str = "ppl",
    task: str | None = None,
    only: Only = Only(),  # noqa: B008 (frozen)
    alpha: float = 0.05,
    allow: Collection[str] = (),
) -> Recommendation | None:
    """The finished runs of one model as recipes under these wishes; None where no run has the metric.

    Raises SpecError for a wish out of range, an unknown kernel, and where the database holds several models or
    evaluations with this metric, EvaluationError where its numbers must not be compared (`analysis.claims`).
    """
    _require(wishes)
    found = [each for each in fields(database, metric=metric, task=task, model=model, only=only) if each.candidates]
    if not found:
        return None
    for option, given, values in (
        ("model", model, [each.model for each in found]),
        ("task", task, [each.task for each in found]),
        ("protocol", only.protocol, [each.protocol for each in found]),
        ("n", only.n, [str(each.n) for each in found]),
        ("dtype", only.dtype, [str(each.dtype) for each in found]),
        ("checkpoint", only.checkpoint, [each.checkpoint[:12] for each in found]),
    ):
        if len(set(values)) > 1:
            raise SpecError(option, given, f"say which: the database has {', '.join(dict.fromkeys(values))}")
    if len(found) > 1:
        raise SpecError("task", task, f"{found[0].task} was measured under several options, which cannot be ranked")
    (chosen,) = found
    if wishes.min_recovery is not None and chosen.full is None:
        raise SpecError("min-recovery", wishes.min_recovery, "a metric that was measured of full precision too")
    fits, rejected = [], []
    for each in chosen.candidates:
        reasons = refusals(each, wishes)
        (rejected.append(Rejected(candidate=each, reasons=reasons)) if reasons else fits.append(each))
    cells = [
        Cell(where=each.label, run=run, metric=metric)
        for each in everyone(chosen)
        for run, metric in zip(each.runs, each.measured, strict=True)
    ]
    return Recommendation(
        field=chosen,
        wishes=wishes,
        ranked=_ranked(judged(fits, alpha)),
        rejected=tuple(sorted(rejected, key=lambda each: (len(each.reasons), each.candidate.loss))),
        checked=check(database, cells, varied=(*_VARIED, *_FORMATS), allow=allow),
    )


def refusals(each: Candidate, wishes: Wishes) -> tuple[str, ...]:
    """One reason for every wish that the recipe fails; a cost that is not known fails a limit on it."""
    found = []
    if wishes.kernel is not None and (reason := kernel_named(wishes.kernel).refusal(each.runs[0])) is not None:
        found.append(reason)
    if wishes.max_bytes is not None:
        if each.model_bytes is None:
            found.append("size not known")
        elif each.model_bytes > wishes.max_bytes:
            found.append(f"{megabytes(each.model_bytes)} > {megabytes(wishes.max_bytes)}")
    if wishes.max_calib_s is not None:
        if each.quantize_s is None:
            found.append("time to quantize not known")
        elif each.quantize_s > wishes.max_calib_s:
            found.append(f"quantizing takes {number(each.quantize_s, 3)} s > {number(wishes.max_calib_s, 3)} s")
    if wishes.min_recovery is not None:
        reached = each.recovery_low if wishes.certain else each.recovery
        if reached is None:
            found.append("recovery not known" + (" with certainty" if wishes.certain else ""))
        elif reached < wishes.min_recovery:
            surely = "at least " if wishes.certain else ""
            found.append(f"recovery {surely}{reached:.4f} < {wishes.min_recovery:g}")
    return tuple(found)


def _require(wishes: Wishes) -> None:
    for option, value in (
        ("max-size", wishes.max_bytes),
        ("max-calib", wishes.max_calib_s),
        ("min-recovery", wishes.min_recovery),
    ):
        if value is not None and not 0 < value < math.inf:
            raise SpecError(option, value, "a positive number")
    if wishes.min_recovery is not None and wishes.min_recovery > 1:
        raise SpecError("min-recovery", wishes.min_recovery, "a share of full precision's quality: 0.99 or 99%")
    if wishes.certain and wishes.min_recovery is None:
        raise SpecError("certain", True, "only together with min-recovery")
    if wishes.kernel is not None:
        kernel_named(wishes.kernel)


def _ranked(found: Sequence[Judged]) -> tuple[Ranked, ...]:
    """First the best and the tied by size, time and value, then the others by value."""
    leaders = sorted(
        (each for each in found if each.standing in ("best", "tied")), key=lambda each: _cost(each.candidate)
    )
    ordered = [*leaders, *(each for each in found if each.standing not in ("best", "tied"))]
    return tuple(Ranked(judged=each, reason=_reason(each, ordered)) for each in ordered)


def _cost(each: Candidate) -> tuple[float, float, float]:
    known = [math.inf if value is None else value for value in (each.model_bytes, each.quantize_s)]
    return known[0], known[1], each.loss


def dominates(one: Candidate, other: Candidate) -> bool:
    """Whether `one` is no worse in quality, size and time to quantize, and better in one of them; a cost that is not
    known of either is not compared."""
    mine, its = [one.loss], [other.loss]
    for name in ("model_bytes", "quantize_s"):
        values = getattr(one, name), getattr(other, name)
        if None not in values:
            mine.append(values[0])
            its.append(values[1])
    return all(a <= b for a, b in zip(mine, its, strict=True)) and mine != its


def _reason(each: Judged, ordered: Sequence[Judged]) -> str:
    candidate, first = each.candidate, ordered[0].candidate
    if each is ordered[0]:
        if each.standing == "best":
            return "best value"
        best = next(other.candidate.label for other in ordered if other.standing == "best")
        gap = with_error(each.difference, each.stderr, sign=True, least=2)
        return (
            f"cheapest of the tied; {gap} to the best value, {best} (p = {each.p_holm:.2g}, n = {candidate.metric.n})"
        )
    above = next((o.candidate for o in ordered if dominates(o.candidate, candidate)), None)
    if each.standing in ("best", "tied"):
        which = "best value" if each.standing == "best" else f"tied with the best (p = {each.p_holm:.2g})"
        return f"{which}, but {_costlier(candidate, first)}"
    if each.standing == "untested":
        return "nothing tells whether it is worse than the best"
    gap = f"{with_error(each.difference, each.stderr, sign=True, least=2)} to the best (p = {each.p_holm:.2g})"
    if above is not None:
        return f"{gap}; dominated by {above.label}"
    return f"{gap}; {_cheaper(candidate, first)}"


def _costlier(each: Candidate, first: Candidate) -> str:
    if each.model_bytes is not None and first.model_bytes is not None and each.model_bytes > first.model_bytes:
        return f"{megabytes(each.model_bytes - first.model_bytes)} larger"
    if each.quantize_s is not None and first.quantize_s is not None and each.quantize_s > first.quantize_s:
        return f"{number(each.quantize_s - first.quantize_s, 3)} s longer to quantize"
    return "its costs are not known" if None in (each.model_bytes, each.quantize_s) else "no cheaper"


def _cheaper(each: Candidate, first: Candidate) -> str:
    words = []
    if each.model_bytes is not None and first.model_bytes is not None and each.model_bytes < first.model_bytes:
        words.append(f"{megabytes(first.model_bytes - each.model_bytes)} smaller")
    if each.quantize_s is not None and first.quantize_s is not None and each.quantize_s < first.quantize_s:
        words.append(f"{number(first.quantize_s - each.quantize_s, 3)} s faster to quantize")
    return " and ".join(words) + " than the first" if words else "no cheaper than the first"


def megabytes(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e6:.4g} MB"


def everyone(field_: Field) -> tuple[Candidate, ...]:
    """The candidates, then full precision: the order of what is checked."""
    return (*field_.candidates, *([field_.full] if field_.full else []))


def as_plain(each: Candidate) -> dict[str, object]:
    """The recipe as plain values."""
    return {
        **{"label": each.label, "algo": each.runs[0].algo, "scheme": each.scheme, "calib": each.runs[0].calib},
        **{"value": each.value, "stderr": each.metric.stderr, "n": each.metric.n, "delta": each.delta},
        **{"recovery": each.recovery, "recovery_low": each.recovery_low, "model_bytes": each.model_bytes},
        **{"bits_per_weight": each.bits_per_weight, "quantize_s": each.quantize_s, "keys": list(each.keys)},
    }


def _of(each: Ranked) -> dict[str, object]:
    found = each.judged
    return {"standing": found.standing, "difference": found.difference, "p_holm": found.p_holm, "reason": each.reason}
