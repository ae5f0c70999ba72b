"""Takeaways tested: every comparison on the items that its cells share, Holm's correction, and what that makes of them.

Perplexities are compared by their logarithm, the mean NLL: an effect is a difference in nats per token, and a
difference of differences is a ratio of ratios. Effects count in the direction of the takeaway.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import special

from analysis import stats
from analysis.findings.contrasts import Contrast, Place, contrasts
from analysis.findings.takeaways import Takeaway
from analysis.pairing import info_of, pair
from analysis.tables.declared import Cell, FilledTable
from analysis.tables.declared_text import ABSENT
from analysis.tables.filled import Items, Look, baseline_of
from qbench.errors import EvaluationError
from qbench.metrics import MetricInfo
from qbench.store.database import Database

ALPHA = 0.05

Verdict = Literal["confirmed", "partly confirmed", "mixed", "contradicted", "undecided", "not tested"]
Says = Literal["for", "against", "open"]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A comparison with what came out, or with the `reason` why nothing could (of the `cell` that lacks a value).

    `values` has a pair for each of the contrast's; `effect` and `stderr` are in `unit`, positive where they speak for
    the takeaway; `p` is uncorrected, `p_holm` corrected over the comparisons of the takeaway, `p_page` over all of the
    page.
    """

    contrast: Contrast
    reason: str = ""
    cell: str = ""
    values: tuple[tuple[float, float], ...] = ()
    effect: float | None = None
    stderr: float | None = None
    unit: str = ""
    p: float = math.nan
    p_holm: float = math.nan
    p_page: float = math.nan

    def says(self, p: float) -> Says:
        """What it says at a corrected p value."""
        if p >= ALPHA:
            return "open"
        return "for" if self.effect > 0 else "against"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A takeaway with its verdict (`on_page`: corrected over the page), its comparisons, and what tables lack."""

    takeaway: Takeaway
    verdict: Verdict
    on_page: Verdict
    compared: tuple[Compared, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def tested(self) -> tuple[Compared, ...]:
        return tuple(each for each in self.compared if not each.reason)

    @property
    def untested(self) -> tuple[Compared, ...]:
        return tuple(each for each in self.compared if each.reason)


def findings(
    database: Database, takeaways: Sequence[Takeaway], tables: Mapping[str, FilledTable]
) -> tuple[Finding, ...]:
    """Every takeaway with its verdict, from filled tables by name; what has no table there is not tested."""
    wanted = {
        name: [each for row in table.declared.cells for cell in row for each in cell.wanted]
        for name, table in tables.items()
    }
    looks = {name: Look(database, some) for name, some in wanted.items()}
    compared: list[list[Compared]] = []
    absent: list[list[str]] = []
    for takeaway in takeaways:
        compared.append([])
        absent.append([])
        for each in takeaway.expects:
            if each.table not in tables:
                absent[-1].append(f"{each.table} has no run")
                continue
            found, lacking = contrasts(each, tables[each.table].declared)
            compared[-1] += [_compared(one, tables[each.table], looks[each.table]) for one in found]
            absent[-1] += lacking
    page = iter(stats.holm([each.p for some in compared for each in some]))
    results = []
    for takeaway, some, lacking in zip(takeaways, compared, absent, strict=True):
        own = stats.holm([each.p for each in some])
        tested = tuple(
            replace(each, p_holm=float(p), p_page=float(next(page))) for each, p in zip(some, own, strict=True)
        )
        results.append(
            Finding(
                takeaway=takeaway,
                verdict=verdict([each.says(each.p_holm) for each in tested if not each.reason]),
                on_page=verdict([each.says(each.p_page) for each in tested if not each.reason]),
                compared=tested,
                absent=tuple(dict.fromkeys(lacking)),
            )
        )
    return tuple(results)


def verdict(said: Sequence[Says]) -> Verdict:
    """Confirmed if all comparisons speak for it, partly if the others are open; contradicted if some speak against it
    and none for it; mixed if some speak for it and some against; undecided if none says anything."""
    if not said:
        return "not tested"
    if all(each == "for" for each in said):
        return "confirmed"
    if all(each == "open" for each in said):
        return "undecided"
    if "against" not in said:
        return "partly confirmed"
    return "mixed" if "for" in said else "contradicted"


def _compared(contrast: Contrast, table: FilledTable, look: Look) -> Compared:
    rows = [row for row in table.rows if not row.full_precision]
    places = [place for pair_of in contrast.pairs for place in pair_of if place is not None]
    for i, j in places:
        cell = rows[i].cells[j]
        if cell.value is None:
            where = " / ".join((*table.declared.rows[i], *table.declared.columns[j]))
            why = ": ".join([ABSENT.get(cell.state, "without a value"), *cell.notes[:1]])
            return Compared(contrast=contrast, reason=why, cell=f"{table.declared.name}, {where}")
    try:
        return _tested(contrast, table, look)
    except EvaluationError as error:
        return Compared(contrast=contrast, reason=str(error))


def _tested(contrast: Contrast, table: FilledTable, look: Look) -> Compared:
    """The comparison on stored items; EvaluationError where that cannot be done."""

    def items(place: Place | None, other: Place) -> Items:
        cell: Cell = table.declared.cells[(place or other)[0]][(place or other)[1]]
        found = look.items(cell if place is not None else baseline_of(cell))
        if not found:
            raise EvaluationError("full precision was not measured" if place is None else "without stored measurements")
        return found

    pairs = [(items(ahead, ahead), items(behind, ahead)) for ahead, behind in contrast.pairs]
    info = info_of(pairs[0][0][0][0])
    parts = [_part(contrast, pairs, spec_key, info) for spec_key in dict.fromkeys(m.spec_key for m, _ in pairs[0][0])]
    effect = float(np.mean([part.value for part, _ in parts]))
    if len(parts) == 1:
        ((found, p),) = parts
        stderr = found.stderr
    else:  # independent measurements: of texts with fewer items than others the fewest count
        stderr = math.hypot(*(part.stderr for part, _ in parts)) / len(parts)
        df = min(part.df for part, _ in parts)
        p = 2 * float(special.stdtr(df, -abs(effect / stderr))) if stderr else float(effect == 0)
    values = tuple(tuple(float(np.mean([metric.value for metric, _ in side])) for side in sides) for sides in pairs)
    unit = "nats" if info.link == "exp_mean" else info.unit or info.family
    return Compared(contrast=contrast, values=values, effect=effect, stderr=stderr, unit=unit, p=p)


def _part(
    contrast: Contrast, pairs: Sequence[tuple[Items, Items]], spec_key: str, info: MetricInfo
) -> tuple[stats.Estimate, float]:
    """(effect, p) on the items of one measurement."""
    reference = next(each for each in pairs[0][0] if each[0].spec_key == spec_key)
    clusters = None
    advantages, sides = [], []
    for pair_of in pairs:
        means = []
        for side in pair_of:
            own = [each for each in side if each[0].spec_key == spec_key and each[0].name == reference[0].name]
            if not own:
                raise EvaluationError("the cells were not measured on the same items")
            found = [pair(metric, reference[0], samples, reference[1]) for metric, samples in own]
            if any(each is None for each in found):
                raise EvaluationError(f"{info.label}: no stored items that give its value")
            clusters = found[0].clusters
            means.append(np.mean([each.first for each in found], axis=0))
        advantages.append(_advantage(contrast, means[0], means[1], info))
        sides.append(means)
    effects = advantages[0] - advantages[1] if len(advantages) == 2 else advantages[0]
    found = stats.mean(effects, clusters)
    if found.stderr is None:
        raise EvaluationError("one item alone shows no spread")
    if len(sides) == 1 and contrast.expectation.share is None:
        return found, stats.paired_test(*sides[0], clusters).p
    return found, stats.paired_t(effects, np.zeros_like(effects), clusters).p


def _advantage(contrast: Contrast, ahead: np.ndarray, behind: np.ndarray, info: MetricInfo) -> np.ndarray:
    """By how much each item speaks for the takeaway, [n]."""
    kind, share = contrast.expectation.kind, contrast.expectation.share
    if kind in ("larger", "smaller"):
        return ahead - behind if kind == "larger" else behind - ahead
    if info.higher_is_better is None:
        raise EvaluationError(f"{info.label}: of this metric neither direction is better")
    if share is None:
        return ahead - behind if info.higher_is_better else behind - ahead
    if info.higher_is_better:
        room = ahead - (1 - share) * behind
    else:
        room = behind + math.log1p(share) - ahead if info.link == "exp_mean" else (1 + share) * behind - ahead
    return room if kind == "less" else -room
