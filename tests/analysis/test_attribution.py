import json
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from analysis.attribution import Anova, _bootstrap, attribute
from analysis.tables.attribution import attribution_table
from analysis.tables.render import write
from qbench.cli import main
from qbench.errors import EvaluationError, SpecError
from tests.analysis.conftest import HERE, losses, measured, sha

FULL = losses(3.0)
CALIB, TRANSFORM, ROUND, BITS = ("c4", "pile"), (None, "smoothquant", "awq_scale"), ("rtn", "gptq"), (3, 4)


def spec(*stages):
    return {"pipeline": [{"name": name, "version": 1, "options": {}} for name in stages if name]}


@pytest.fixture
def plant(store):
    """Stores a full grid whose ΔNLL is `effect(calib, transform, round, bits)` and some noise of the points."""

    def planted(effect, sd: float = 0.002, seed: int = 0, seeds: int = 1, keep=lambda *point: True):
        rng = np.random.default_rng(seed)
        store("none", None, measured(FULL))
        for point in product(CALIB, TRANSFORM, ROUND, BITS):
            if not keep(*point):
                continue
            calib, transform, rounding, bits = point
            for draw in range(seeds):
                items = FULL + effect(*point) + rng.normal(0, sd) + rng.normal(0, 0.01, len(FULL))
                columns = {"calib": calib, "calib_n": 16, "calib_length": 512, "family": sha(str(point))}
                store(
                    f"{transform}+{rounding}", bits, measured(items), spec=spec(transform, rounding) | {"seed": draw},
                    calib_seed=draw, **columns,
                )  # fmt: skip

    return planted


def shares(found) -> dict[str, float]:
    return {term.name: term.share for term in found.terms}


def test_planted_effects_are_recovered_with_intervals_that_hold_them(database, plant):
    size = {(None, "smoothquant", "awq_scale")[i]: e for i, e in enumerate((0.3, 0.1, 0.0))}
    plant(lambda c, t, r, b: size[t] + 0.1 * (r == "rtn") + 0.4 * (b == 3) + 0.2 * (b == 3) * (r == "rtn"))
    (found,) = attribute(database, resamples=300)
    truth = np.array([size[t] + 0.1 * (r == "rtn") + 0.4 * (b == 3) + 0.2 * (b == 3) * (r == "rtn")
                      for _, t, r, b in product(CALIB, TRANSFORM, ROUND, BITS)])  # fmt: skip
    total = truth.var()
    expected = {
        "transformation": np.var([0.3, 0.1, 0.0]) / total,
        "reconstruction": np.var([0.2, 0.0]) / total,  # 0.1, and half of the interaction
        "format": np.var([0.5, 0.0]) / total,
        "reconstruction × format": 0.05**2 / total,
        "calibration": 0.0,
    }
    assert found.response == "ΔNLL, nats per token"
    assert found.points == 24
    for term in found.terms:
        planted = expected.get(term.name, 0.0)
        assert term.share == pytest.approx(planted, abs=0.01), term
        assert term.low <= planted <= term.high, term
        assert (term.p_holm < 0.001) == (planted > 0), term
    assert found.residual < 0.01
    assert found.shared == pytest.approx(0, abs=1e-9), "a full grid has nothing that is nobody's"
    assert found.notes == ("clipping does not vary",)


def test_without_any_effect_nothing_is_found(database, plant):
    plant(lambda *_: 0.1, sd=0.01)
    (found,) = attribute(database, resamples=100)
    assert all(term.p_holm > 0.05 for term in found.terms)
    assert max(term.share for term in found.terms) < 0.35
    assert all(term.low < 0.05 for term in found.terms)


def test_shares_are_without_bias_and_intervals_hold_them_about_as_often_as_they_say():
    points = list(product("01", "01234567", "01"))
    factors = {name: [point[place] for point in points] for place, name in enumerate("abc")}
    effect = np.array([0.3 * (a == "1") + 0.05 * int(b) for a, b, _ in points])
    variances = np.array([np.var([0.3, 0.0]), 0.05**2 * np.var(range(8)), 0.0])
    truth = variances / (variances.sum() + 0.2**2)
    held, estimates, centers = np.zeros(3), [], []
    for seed in range(80):
        response = effect + np.random.default_rng(seed).normal(0, 0.2, len(points))
        anova = Anova(response, factors, [("a",), ("b",), ("c",)])
        drawn = _bootstrap(anova, None, 200, seed)
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        held += (low <= truth + 1e-12) & (truth <= high)
        estimates.append(anova.shares())
        centers.append(drawn.mean(axis=0))
    assert (held[:2] >= 0.85 * 80).all(), held
    assert np.mean(estimates, axis=0)[:2] == pytest.approx(truth[:2], abs=0.05)  # 0.12 above it without the correction
    assert np.mean(centers, axis=0)[:2] == pytest.approx(np.mean(estimates, axis=0)[:2], abs=0.05)


@pytest.mark.parametrize("drop", [(), (0, 5, 11), (3, 4, 5, 20)])
def test_sums_of_squares_are_those_of_statsmodels(drop):
    rng = np.random.default_rng(1)
    points = [p for i, p in enumerate(product("xy", "uvw", "mn", "12")) if i not in drop]
    frame = pd.DataFrame(points, columns=["a", "b", "c", "again"]).assign(y=rng.normal(size=len(points)))
    terms = [("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c")]
    anova = Anova(frame["y"].to_numpy(), {name: list(frame[name]) for name in "abc"}, terms)
    fitted = ols("y ~ C(a) + C(b) + C(c) + C(a):C(b) + C(a):C(c) + C(b):C(c)", frame).fit()
    expected = anova_lm(fitted, typ=2)
    names = [":".join(f"C({name})" for name in term) for term in terms]
    np.testing.assert_allclose(anova.ss, expected.loc[names, "sum_sq"], rtol=1e-8)
    assert anova.df.tolist() == expected.loc[names, "df"].tolist()
    assert (anova.residual_ss, anova.residual_df) == (pytest.approx(fitted.ssr), fitted.df_resid)


def test_p_values_are_those_of_statsmodels(database, plant):
    plant(lambda c, t, r, b: 0.02 * (c == "pile") + 0.05 * (b == 3), sd=0.02)
    (found,) = attribute(database, interactions=False, resamples=100)
    values = {(c, t, r, b) for c, t, r, b in product(CALIB, map(str, TRANSFORM), ROUND, BITS)}
    rows = []
    for each in found.field.candidates:
        run = each.runs[0]
        transform, rounding = run.algo.split("+")
        rows.append((run.calib, transform, rounding, run.bits, np.log(each.value)))
    frame = pd.DataFrame(rows, columns=["calibration", "transformation", "reconstruction", "format", "y"])
    assert len(values) == len(frame)
    names = ["calibration", "transformation", "reconstruction", "format"]
    expected = anova_lm(ols("y ~ " + " + ".join(f"C({name})" for name in names), frame).fit(), typ=2)
    by_name = {term.name: term for term in found.terms}
    assert [by_name[name].p for name in names] == pytest.approx([expected.loc[f"C({n})", "PR(>F)"] for n in names])


def test_a_missing_part_of_the_grid_is_allowed_and_what_is_aliased_is_said(database, plant):
    plant(lambda c, t, r, b: 0.3 * (b == 3), keep=lambda c, t, r, b: t is None and (r == "gptq") == (c == "pile"))
    (found,) = attribute(database, resamples=100, interactions=False)
    assert {term.name: term.df for term in found.terms}["calibration"] == 0
    assert "calibration and reconstruction cannot be told from the rest in these points" in found.notes
    (found,) = attribute(database, resamples=100, algos=["None+gptq"])
    assert found.terms == ()
    assert "too small" in found.notes[-1]


def test_whole_methods_that_are_not_crossed_count_as_pipelines(database, plant):
    """As in a comparison of RTN, SmoothQuant + RTN and GPTQ: transformation and reconstruction exclude each other."""
    methods = {("rtn", None): 0.2, ("rtn", "smoothquant"): 0.1, ("gptq", "awq_scale"): 0.0}
    plant(lambda c, t, r, b: methods[r, t] + 0.3 * (b == 3), keep=lambda c, t, r, b: (r, t) in methods)
    (found,) = attribute(database, resamples=100, interactions=False)
    total = np.var([0.2, 0.1, 0.0]) + 0.15**2
    assert shares(found)["pipeline"] == pytest.approx(np.var([0.2, 0.1, 0.0]) / total, abs=0.01)
    assert shares(found)["format"] == pytest.approx(0.15**2 / total, abs=0.01)
    assert len(found.levels["pipeline"]) == 3
    assert any("taken together as the pipeline" in note for note in found.notes)
    assert found.shared == pytest.approx(0, abs=1e-9)


def test_a_design_without_room_for_interactions_says_so(database, plant):
    plant(lambda c, t, r, b: 0.3 * (b == 3), keep=lambda c, t, r, b: t is None and c == "c4")
    (found,) = attribute(database, resamples=100)
    assert {term.name for term in found.terms} == {"reconstruction", "format"}
    assert "too small for interactions: 4 points leave nothing to tell them from chance" in found.notes
    assert "only 1 residual degrees of freedom: shares and intervals are rough" in found.notes


def test_seeds_are_repetitions_that_leave_room(database, plant):
    plant(lambda c, t, r, b: 0.3 * (b == 3), seeds=3, keep=lambda c, t, r, b: t is None and c == "c4")
    (found,) = attribute(database, resamples=100)
    assert found.points == 12
    assert found.residual_df == 12 - 4
    assert "reconstruction × format" in shares(found)


def test_documents_are_drawn_whole(database, store):
    widths = []
    for clusters in (None, np.arange(40) // 20):
        for bits, rounding, n in product((3, 4), ("rtn", "gptq"), range(2)):
            shift = np.where(np.arange(40) < 20, 0.1, 0.5) * (bits == 3)  # two documents that feel it differently
            items = FULL + shift + np.random.default_rng(bits * 10 + n).normal(0, 0.01, 40)
            more = {"clusters": clusters, "spec_key": sha(str(clusters))}
            store(rounding, bits, measured(items, **more), spec=spec(rounding) | {"n": n, "c": str(clusters)})
    for found in attribute(database, resamples=200):
        assert "items are not stored" not in " ".join(found.notes)
        term = next(term for term in found.terms if term.name == "format")
        widths.append(term.high - term.low)
    assert widths[1] > widths[0]


def test_without_items_the_points_alone_vary(database, store):
    store("none", None, measured(FULL, samples=None))
    for bits, rounding in product((3, 4), ("rtn", "gptq")):
        own = {"rtn": 0.01, "gptq": 0.0}[rounding] + 0.3 * (bits == 3) + 0.001 * bits * (rounding == "rtn")
        store(rounding, bits, measured(FULL + own, samples=None), spec=spec(rounding))
    (found,) = attribute(database, resamples=100)
    assert found.notes[-1] == "items are not stored: intervals are of the points alone"
    assert shares(found)["format"] > 0.95


def test_empty_and_one_row_databases_say_what_is_missing(database, store, tmp_path):
    assert attribute(database) == ()
    assert "nothing to attribute" in attribution_table(()).caption
    write(attribution_table(()), tmp_path, "empty")
    store("rtn", 4, measured(FULL))
    (found,) = attribute(database)
    assert "too small: 1 points that differ in no axis" in found.notes
    table = attribution_table([found])
    assert table.rows[0][0].text == "no answer"
    assert any("too small" in text for _, text in table.footnotes)
    write(table, tmp_path, "one")
    store("none", None, measured(FULL), model="alone")
    assert [each.points for each in attribute(database)] == [1, 0]


def test_equal_points_have_no_variance_to_share(database, store):
    for bits, rounding in product((3, 4), ("rtn", "gptq")):
        store(rounding, bits, measured(FULL), spec=spec(rounding))
    (found,) = attribute(database, interactions=False)
    assert found.notes[-1] == "all points have the same value"


def test_mixtures_are_refused_and_footnoted_when_allowed(database, store):
    for bits, rounding in product((3, 4), ("rtn", "gptq")):
        where = replace(HERE, git_dirty=True) if (bits, rounding) == (3, "rtn") else HERE
        store(rounding, bits, measured(FULL + 0.1 * bits), spec=spec(rounding), environment=where)
    with pytest.raises(EvaluationError, match="allow=dirty"):
        attribute(database)
    found = attribute(database, allow=["dirty"])
    assert any("uncommitted" in text for _, text in attribution_table(found).footnotes)
    with pytest.raises(SpecError, match="bootstrap=5"):
        attribute(database, resamples=5)


def test_the_command_shows_the_terms(database, plant, tmp_path, capsys):
    plant(lambda c, t, r, b: 0.3 * (b == 3) + 0.1 * (r == "rtn"))
    store = ["--store", f"sqlite:///{tmp_path}/results.db", "--bootstrap", "100"]
    assert main(["attribute", *store, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert shown.index("format") < shown.index("reconstruction"), "largest first"
    assert (tmp_path / "out" / "attribution.tex").exists()
    assert main(["attribute", *store, "--main", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["term"] for row in rows} == {"calibration", "transformation", "reconstruction", "format"}
