"""What the loss of quality is due to: shares of the variance of ΔNLL by calibration, transformation, clipping,
reconstruction, format, and their interactions in pairs.

Analysis of variance over the points of a grid with sums of squares of type II: a term counts for what it explains
beyond all other terms that do not contain it, so that the order of the terms does not matter and an incomplete grid is
allowed. What several terms explain only together is nobody's (`shared`). From every term's sum of squares goes what
chance alone would give it, degrees of freedom × residual mean square, as in ω². Runs that differ in their seeds alone
are repetitions: they say what chance gives.

Intervals come from a bootstrap of both sources of chance: the evaluation's items are drawn anew (whole documents where
they are known; all points were measured on the same ones), and so are the residuals of the points.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from analysis import stats
from analysis.axes import AXES, axis_levels
from analysis.candidates import Field, Only, fields, require_known
from analysis.claims import Cell, Checked, check
from analysis.stats.estimates import cluster_totals
from qbench.errors import SpecError
from qbench.store.database import Database

_VARIED = ("algo", "options", "calib", "calib_n", "calib_length", "calib_seed", "bits", "weight_format")
_VARIED += ("act_format", "kv_format")
_PARTS = ("transformation", "clipping", "reconstruction")
_FEW = 5  # residual degrees of freedom below which shares are hardly more than guesses


@dataclass(frozen=True, kw_only=True)
class Term:
    """One factor, or two that act together.

    `levels`: how many, or combinations that occur. `share` of the variance, at least 0, with the ends of its 95 %
    interval; `p` of the F test and Holm-corrected over the terms. What cannot be known is None.
    """

    factors: tuple[str, ...]
    levels: int
    df: int
    sum_of_squares: float
    share: float
    low: float | None = None
    high: float | None = None
    f: float | None = None
    p: float | None = None
    p_holm: float | None = None

    @property
    def name(self) -> str:
        return " × ".join(self.factors)


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """The analysis of one model under one evaluation.

    `levels` are the levels of each factor that varies; `residual` is the share that no term explains, `shared` what
    terms explain only together (negative where they mask each other). `notes` say what the design could not answer;
    without `terms` it could answer nothing, and the last note says why.
    """

    field: Field
    response: str
    points: int
    levels: Mapping[str, tuple[str, ...]]
    terms: tuple[Term, ...]
    residual_df: int
    residual: float | None
    shared: float | None
    notes: tuple[str, ...]
    checked: Checked


def attribute(
    database: Database,
    *,
    model: str | None = None,
    metric: str = "ppl",
    task: str | None = None,
    only: Only = Only(),  # noqa: B008 (frozen)
    algos: Collection[str] | None = None,
    interactions: bool = True,
    resamples: int = 999,
    seed: int = 0,
    allow: Collection[str] = (),
) -> tuple[Attribution, ...]:
    """One analysis for every model and evaluation that has the metric.

    `algos` restricts the points to these algorithms. Without full precision the values themselves are analysed; the
    shares are the same. Raises SpecError for fewer than 100 resamples, EvaluationError where the points must not be
    compared (`analysis.claims`), unless allowed.
    """
    if resamples < 100:
        raise SpecError("bootstrap", resamples, "100 resamples or more")
    found = []
    for field in fields(database, metric=metric, task=task, model=model, only=only, seeds_apart=True):
        for each in algos or ():
            require_known("algo", each, [candidate.runs[0].algo for candidate in field.candidates])
        points = [each for each in field.candidates if algos is None or each.runs[0].algo in algos]
        cells = [
            Cell(where=each.label, run=run, metric=metric)
            for each in points
            for run, metric in zip(each.runs, each.measured, strict=True)
        ]
        checked = check(database, cells, varied=_VARIED, allow=allow)
        one = _attribution(replace(field, candidates=tuple(points)), interactions, resamples, seed)
        found.append(replace(one, checked=checked))
    return tuple(found)


def type_two(response: np.ndarray, factors: Mapping[str, Sequence[str]], terms: Sequence[tuple[str, ...]]) -> "Anova":
    """Sums of squares of type II of `terms` (tuples of names of `factors`, levels [n] each) for response [n]."""
    return Anova(np.asarray(response, dtype=np.float64), factors, terms)


class Anova:
    """Projections for an analysis of variance, made once and applied to many responses (the bootstrap's).

    `ss` [terms], `df` [terms], `residual_ss`, `residual_df` and `total_ss` (around the mean) are those of the response.
    Designs without full rank are allowed: degrees of freedom are differences of ranks, and 0 for a term that the others
    already explain.
    """

    def __init__(
        self, response: np.ndarray, factors: Mapping[str, Sequence[str]], terms: Sequence[tuple[str, ...]]
    ) -> None:
        self.terms = tuple(terms)
        columns = {term: _columns(factors, term, len(response)) for term in terms}
        self.levels = tuple(found.shape[1] for found in columns.values())
        mean = np.ones((len(response), 1))
        self._full = _basis([mean, *columns.values()])
        self._pairs, df = [], []
        for term in terms:
            others = [columns[o] for o in terms if not set(term) <= set(o)]
            without, with_ = _basis([mean, *others]), _basis([mean, *others, columns[term]])
            self._pairs.append((without, with_))
            df.append(with_.shape[1] - without.shape[1])
        self.df = np.array(df, dtype=int)
        self.residual_df = len(response) - self._full.shape[1]
        self.ss, self.residual_ss, self.total_ss = self.sums(response)
        self.fitted = self._full @ (self._full.T @ response)
        self.residuals = response - self.fitted

    def sums(self, response: np.ndarray) -> tuple[np.ndarray, float, float]:
        """(sums of squares of the terms, of the residuals, in all) of another response [n] in the same design."""
        centred = response - response.mean()
        found = [_explained(with_, centred) - _explained(without, centred) for without, with_ in self._pairs]
        total = float(centred @ centred)
        return np.maximum(np.array(found), 0.0), max(total - _explained(self._full, centred), 0.0), total

    def shares(self, response: np.ndarray | None = None) -> np.ndarray:
        """Share of the variance [terms], without what chance gives each term."""
        ss, residual, total = (self.ss, self.residual_ss, self.total_ss) if response is None else self.sums(response)
        if total == 0:
            return np.zeros(len(ss))
        chance = self.df * (residual / self.residual_df if self.residual_df else 0.0)
        return np.maximum(ss - chance, 0.0) / total


def _attribution(field: Field, interactions: bool, resamples: int, seed: int) -> Attribution:
    points = field.candidates
    by_point = axis_levels([each.runs[0] for each in points])
    factors = {axis: [levels[axis] for levels in by_point] for axis in AXES}
    varying = {axis: levels for axis, levels in factors.items() if len(set(levels)) > 1}
    varying, merged = _crossed(varying)
    levels = {axis: tuple(dict.fromkeys(found)) for axis, found in varying.items()}
    notes = [f"{axis} does not vary" for axis in AXES if axis not in (*varying, *merged)]
    if merged:
        notes.append(f"{_listed(merged)} do not vary independently in these points: taken together as the pipeline")
    items, response, quantity = _responses(field)
    empty = Attribution(
        field=field, response=quantity, points=len(points), levels=levels, terms=(), residual_df=0, residual=None,
        shared=None, notes=(), checked=Checked(),
    )  # fmt: skip
    main = [(axis,) for axis in varying]
    if not main:
        return replace(empty, notes=(*notes, f"too small: {len(points)} points that differ in no axis"))
    pairs = list(itertools.combinations(varying, 2)) if interactions else []
    design = Anova(response, varying, [*main, *pairs])
    if pairs and design.residual_df < 1:
        notes.append(f"too small for interactions: {len(points)} points leave nothing to tell them from chance")
        pairs, design = [], Anova(response, varying, main)
    if aliased := [" × ".join(term) for term, df in zip(design.terms, design.df, strict=True) if df == 0]:
        notes.append(f"{_listed(aliased)} cannot be told from the rest in these points")
    if design.residual_df < 1:
        needed = 1 + sum(len(found) - 1 for found in levels.values()) + 1
        used = len(points) - design.residual_df
        text = f"too small: {len(points)} points for {used} parameters; {needed} points or more are needed"
        return replace(empty, notes=(*notes, text))
    if design.residual_df < _FEW:
        notes.append(f"only {design.residual_df} residual degrees of freedom: shares and intervals are rough")
    if design.total_ss <= 1e-24 * float(response @ response):
        return replace(empty, notes=(*notes, "all points have the same value"))
    drawn = _bootstrap(design, items, resamples, seed)
    return replace(
        empty,
        terms=_terms(design, drawn),
        residual_df=design.residual_df,
        residual=design.residual_ss / design.total_ss,
        shared=1 - (design.residual_ss + float(design.ss.sum())) / design.total_ss,
        notes=tuple(
            notes if items is not None else [*notes, "items are not stored: intervals are of the points alone"]
        ),
    )


def _crossed(factors: Mapping[str, Sequence[str]]) -> tuple[dict[str, Sequence[str]], tuple[str, ...]]:
    """(factors, names of those that were taken together): parts of pipelines that do not vary independently of each
    other, as in a comparison of whole methods, cannot have effects of their own and become one factor "pipeline"."""
    parts = [name for name in _PARTS if name in factors]
    if len(parts) < 2:
        return dict(factors), ()
    n = len(factors[parts[0]])
    design = Anova(np.zeros(n), factors, [(name,) for name in parts])
    if all(df == count - 1 for df, count in zip(design.df, design.levels, strict=True)):
        return dict(factors), ()
    together = [" / ".join(each) for each in zip(*(factors[name] for name in parts), strict=True)]
    found = {name: levels for name, levels in factors.items() if name not in parts}
    return {"pipeline": together, **found}, tuple(parts)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _responses(field: Field) -> tuple[list[np.ndarray] | None, np.ndarray, str]:
    """(per-item differences of all points, sums and sizes by cluster, or None; response [points]; its name)."""
    full, perplexity = field.full, field.info.link == "exp_mean"
    usable = [*field.candidates, *([full] if full else [])]
    if perplexity:
        base = math.log(full.value) if full else 0.0
        response = np.array([math.log(each.value) - base for each in field.candidates])
    else:
        base = full.value if full and not field.info.against_full else 0.0
        response = np.array([each.value - base for each in field.candidates])
    name = ("ΔNLL, nats per token" if perplexity else f"Δ {field.info.label}") if full else field.info.label
    if field.info.link == "root_mean" or any(each.items is None for each in usable):
        return None, response, name
    own = [each.items.values - (full.items.values if full else 0.0) for each in field.candidates]
    clusters = next((each.items.clusters for each in usable if each.items.clusters is not None), None)
    groups = np.arange(len(own[0])) if own and clusters is None else clusters
    totals = [cluster_totals(np.asarray(each), groups) for each in own]
    return ([np.stack([t for t, _ in totals]), totals[0][1]] if totals else None), response, name


def _bootstrap(design: Anova, items: list[np.ndarray] | None, resamples: int, seed: int) -> np.ndarray:
    """Shares [resamples, terms] with the items and the residuals drawn anew.

    The fit that residuals are added to already holds what chance gave its terms: that goes from every draw.
    """
    rng = np.random.default_rng(seed)
    # Residuals are smaller than the errors behind them: the fit has taken some of these.
    residuals = design.residuals * math.sqrt(len(design.residuals) / design.residual_df)
    chance = design.df * design.residual_ss / design.residual_df / design.total_ss
    drawn = np.empty((resamples, len(design.terms)))
    for place in range(resamples):
        response = design.fitted
        if items is not None:
            sums, sizes = items
            chosen = rng.integers(0, len(sizes), len(sizes))
            moved = sums[:, chosen].sum(axis=1) / sizes[chosen].sum() - sums.sum(axis=1) / sizes.sum()
            response = response + moved
        drawn[place] = design.shares(response + rng.choice(residuals, len(residuals)))
    return np.clip(drawn - chance, 0.0, 1.0)


def _terms(design: Anova, drawn: np.ndarray) -> tuple[Term, ...]:
    mean_square = design.residual_ss / design.residual_df
    shares, terms = design.shares(), []
    for place, (factors, df, ss) in enumerate(zip(design.terms, design.df.tolist(), design.ss.tolist(), strict=True)):
        low, high = np.percentile(drawn[:, place], [2.5, 97.5]).tolist()
        f = p = None
        if df and mean_square > 0:
            f = ss / df / mean_square
            p = float(special.fdtrc(df, design.residual_df, f))
        share = float(shares[place])
        interval = {"low": min(low, share), "high": max(high, share)} if df else {}
        terms.append(
            Term(
                factors=factors,
                levels=design.levels[place],
                df=df,
                sum_of_squares=ss,
                share=share,
                f=f,
                p=p,
                **interval,
            )
        )
    adjusted = stats.holm([math.nan if term.p is None else term.p for term in terms])
    return tuple(
        replace(term, p_holm=None if math.isnan(p) else float(p)) for term, p in zip(terms, adjusted, strict=True)
    )


def _columns(factors: Mapping[str, Sequence[str]], term: tuple[str, ...], n: int) -> np.ndarray:
    """Indicators [n, combinations] of the levels of a term's factors."""
    joint = list(zip(*(factors[name] for name in term), strict=True))
    names = {combination: place for place, combination in enumerate(dict.fromkeys(joint))}
    found = np.zeros((n, len(names)))
    found[np.arange(n), [names[each] for each in joint]] = 1.0
    return found


def _basis(columns: Sequence[np.ndarray]) -> np.ndarray:
    """An orthonormal basis [n, rank] of what the columns span."""
    matrix = np.concatenate(list(columns), axis=1)
    left, singular, _ = np.linalg.svd(matrix, full_matrices=False)
    return left[:, singular > 1e-9 * singular[0]]


def _explained(basis: np.ndarray, response: np.ndarray) -> float:
    projected = basis.T @ response
    return float(projected @ projected)
