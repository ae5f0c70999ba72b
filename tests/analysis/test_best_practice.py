import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from analysis import stats
from analysis.axes import AXIS_OF, axis_levels, scheme_of
from analysis.candidates import fields, judged
from analysis.tables.best_practice import best_practice, best_practice_table
from analysis.tables.render import Entry, OnTerminal, Plain, csv, html, latex, markdown, with_error, write
from qbench.errors import EvaluationError, SpecError
from qbench.store import queries
from qbench.store.records import Noise, Outcome
from tests.analysis.conftest import HERE, losses, measured, sha

DIRTY = replace(HERE, git_dirty=True)


def cost(seconds: float, size: int = 100) -> Outcome:
    return Outcome(quantize_s=seconds, model_bytes=size, bits_per_weight=4.3125, peak_host_bytes=10**9)


def around(mean: float, shift: float, seed: int = 0, n: int = 40) -> np.ndarray:
    """Losses `shift` above the common ones of `mean`, with a little of their own."""
    return losses(mean, n) + shift + np.random.default_rng(seed).normal(0, 0.01, n)


@pytest.fixture
def planted(store):
    """Full precision, a true winner, one that truly ties with it and one that is truly worse, at 4 bits."""

    def plant(**columns):
        return {
            "none": store("none", None, measured(losses(3.0)), **columns),
            "gptq": store("gptq", 4, measured(around(3.0, 0.10, 1)), outcome=cost(60), calib="c4", **columns),
            "awq": store("awq", 4, measured(around(3.0, 0.102, 2)), outcome=cost(20), calib="pile", **columns),
            "rtn": store("rtn", 4, measured(around(3.0, 0.30, 3)), outcome=cost(1), **columns),
        }

    return plant


def test_the_true_winner_is_found_and_ties_are_tied(database, planted):
    keys = planted()
    (choice,) = best_practice(database)
    assert choice.scheme == "int4_g64_asym"
    assert {each.candidate.keys for each in choice.judged} == {(keys[n],) for n in ("gptq", "awq", "rtn")}
    assert {each.runs[0].algo for each in choice.tied} == {"gptq", "awq"}
    assert choice.best.runs[0].algo == "gptq"
    worst = choice.judged[-1]
    assert (worst.candidate.runs[0].algo, worst.standing) == ("rtn", "worse")


def test_numbers_are_those_of_the_paired_tests(database, planted):
    planted()
    (choice,) = best_practice(database)
    full, items = (
        losses(3.0),
        {n: around(3.0, d, s) for n, d, s in (("gptq", 0.1, 1), ("awq", 0.102, 2), ("rtn", 0.3, 3))},
    )
    raw = [stats.paired_test(items[name], items["gptq"]).p for name in ("awq", "rtn")]
    assert [each.p for each in choice.judged[1:]] == raw
    assert [each.p_holm for each in choice.judged[1:]] == stats.holm(raw).tolist()
    best = choice.best
    difference = stats.perplexity_difference(items["gptq"], full)
    assert (best.delta, best.delta_stderr) == (pytest.approx(difference.value), difference.stderr)
    assert best.recovery == pytest.approx(np.exp(-(items["gptq"] - full).mean()))
    upper = stats.interval(stats.nll_difference(items["gptq"], full), 0.9)[1]
    assert best.recovery_low == pytest.approx(np.exp(-upper))


def test_a_budget_leaves_out_what_takes_longer_and_models_and_schemes_are_apart(database, store, planted):
    planted()
    planted(model="big")
    store("gptq", 3, measured(around(3.0, 0.5)), outcome=cost(60))
    found = best_practice(database, budgets_s=(None, 30.0, 0.5))
    named = {(c.field.model, c.scheme, c.budget_s): c.best.runs[0].algo for c in found}
    assert named == {
        ("tiny", "int4_g64_asym", None): "gptq",
        ("tiny", "int4_g64_asym", 30.0): "awq",
        ("tiny", "int3_g64_asym", None): "gptq",
        ("big", "int4_g64_asym", None): "gptq",
        ("big", "int4_g64_asym", 30.0): "awq",
    }
    assert len(best_practice(database, model="big")) == 1
    with pytest.raises(SpecError, match="budget=-1"):
        best_practice(database, budgets_s=(-1,))


def test_models_in_another_dtype_are_other_models(database, store):
    for dtype in ("float32", "bfloat16"):
        store("none", None, measured(losses(3.0)), dtype=dtype)
        store("rtn", 4, measured(around(3.0, 0.1)), dtype=dtype)
    assert [(each.field.dtype, len(each.judged)) for each in best_practice(database)] == [
        ("float32", 1),
        ("bfloat16", 1),
    ]


def test_seeds_are_one_recipe_and_the_luckiest_does_not_win(database, store):
    family = {"family": sha("g")}
    for seed, shift in enumerate((0.05, 0.25, 0.25)):
        store("gptq", 4, measured(around(3.0, shift, seed)), calib_seed=seed, spec={"seed": seed}, **family)
    store("awq", 4, measured(around(3.0, 0.10, 7)))
    (choice,) = best_practice(database)
    assert [(each.candidate.runs[0].algo, len(each.candidate.runs)) for each in choice.judged] == [
        ("awq", 1),
        ("gptq", 3),
    ]
    seeds = choice.judged[1].candidate
    mean = np.mean([around(3.0, s, i) for i, s in enumerate((0.05, 0.25, 0.25))], axis=0)
    np.testing.assert_array_equal(seeds.items.values, mean)
    assert seeds.value == pytest.approx(np.exp(mean.mean()))
    assert choice.judged[1].standing == "tied", "three seeds that far apart do not show that it is worse"


def test_a_difference_below_the_noise_floor_is_a_tie(database, store):
    rows = [store("gptq", 4, measured(around(3.0, d, i)), family=sha(str(i))) for i, d in enumerate((0.1, 0.13))]
    before = best_practice(database)[0].judged[1]
    assert before.standing == "worse"
    run = next(iter(database.find(rows[:1]).values()))
    noise = Noise(
        family=sha("1"), spec_key=queries.metrics(database, [run.id])[0].spec_key, name="ppl", component="seed",
        sd=2.0, n=2, unit="ppl", settings=(0, 1), values=(1.0, 2.0),
    )  # fmt: skip
    database.add_noise([noise], HERE)
    assert best_practice(database)[0].judged[1].standing == "tied"


def test_without_items_standard_errors_decide_and_without_these_nothing_does(database, store):
    for name, shift, changes in (("a", 0.0, {}), ("b", 1.5, {}), ("c", 0.5, {"stderr": None})):
        store(name, 4, measured(around(3.0, shift, 1), samples=None, **changes))
    (choice,) = best_practice(database)
    assert [each.standing for each in choice.judged] == ["best", "untested", "worse"]


def test_higher_is_better_where_it_is(database, store):
    for algo, rate, seed in (("gptq", 0.9, 1), ("rtn", 0.3, 2)):
        right = (np.random.default_rng(seed).random(200) < rate).astype(float)
        store(algo, 4, measured(right, name="acc", value=right.mean(), stderr=0.03, evaluator="zeroshot"))
    (choice,) = best_practice(database, metric="acc")
    assert choice.best.runs[0].algo == "gptq"
    assert choice.judged[1].standing == "worse"


def test_a_metric_without_a_better_direction_is_refused(database, store):
    store("rtn", 4, measured(losses(1.0), name="something"))
    with pytest.raises(SpecError, match="metric=something"):
        best_practice(database, metric="something")


def test_mixtures_are_refused_and_footnoted_when_allowed(database, store, planted):
    planted()
    store("hqq", 4, measured(around(3.0, 0.101, 5)), environment=DIRTY, calib_n=3)
    with pytest.raises(EvaluationError, match=r"hqq.*allow=dirty"):
        best_practice(database)
    table = best_practice_table(best_practice(database, allow=["dirty"]))
    marked = {row[0].text: row[0].notes for row in table.rows}
    assert marked["hqq"] == (1,)
    assert marked["gptq"] == ()
    assert "uncommitted" in dict(table.footnotes)[1]


def test_the_table_shows_best_and_tied_with_costs_and_evidence(database, planted):
    keys = planted()
    table = best_practice_table(best_practice(database))
    assert [row[0].text for row in table.rows] == ["gptq", "awq"]
    assert all(row[0].bold for row in table.rows)
    assert [row[5].text for row in table.rows] == ["best", "tied"]
    assert [row[7].text for row in table.rows] == ["60", "20"]
    assert table.rows[0][9].text == keys["gptq"][:8]
    assert list(table.frame["keys"]) == [keys["gptq"], keys["awq"]]
    assert [row[0].text for row in best_practice_table(best_practice(database), worse=1).rows] == ["gptq", "awq", "rtn"]
    shown = io.StringIO()
    Console(file=shown, width=200).print(OnTerminal(table))
    assert "tiny · int4_g64_asym" in shown.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_a_terminal_of_any_width_shows_every_cell_of_every_row(database, planted, width):
    planted()
    table = best_practice_table(best_practice(database), worse=1)
    shown = io.StringIO()
    Console(file=shown, width=width).print(OnTerminal(table))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert sum(not line.strip() for line in lines) <= 4
    rest = " ".join(shown.getvalue().split())
    for row in table.rows:
        first = next(line for line in lines if line.strip().startswith(row[0].text))
        assert row[5].text in first
        assert all(entry.text in rest for entry in row)


def test_a_name_as_wide_as_the_terminal_is_folded():
    rows = tuple((Entry("x" * 90), Entry("1.5"), Entry("a reason " * 9), Entry(word)) for word in ("better", "worse"))
    table = Plain(title="", columns=("name", "value", "why", "verdict"), rows=rows, caption="")
    shown = io.StringIO()
    Console(file=shown, width=80).print(OnTerminal(table))
    lines = shown.getvalue().splitlines()
    assert sum(line.count("x") for line in lines) == 180
    assert [line.split()[-1] for line in lines if "1.5" in line] == ["better", "worse"]
    assert sum(line.count("reason") for line in lines) == 18


def test_the_table_names_few_of_many_seeds(database, store):
    for seed in range(10):
        store("gptq", 4, measured(around(3.0, 0.1, seed)), calib_seed=seed, spec={"seed": seed}, family=sha("g"))
    table = best_practice_table(best_practice(database))
    (row,), (keys,) = table.rows, table.frame["keys"]
    names = [key[:8] for key in keys.split()]
    assert len(names) == 10
    assert row[9].text == ", ".join([*names[:5], "5 more"])


def test_empty_and_one_row_databases_say_what_is_missing(database, store, tmp_path):
    table = best_practice_table(best_practice(database))
    assert table.rows == ()
    assert "No finished run" in table.caption
    write(table, tmp_path / "x", "empty")
    Console(file=io.StringIO()).print(OnTerminal(table))
    store("rtn", 4, measured(losses(3.0)))
    table = best_practice_table(best_practice(database))
    assert len(table.rows) == 1
    assert "one candidate only" in table.caption
    assert "full precision was not measured" in table.caption
    assert {path.suffix for path in write(table, tmp_path, "one")} == {".tex", ".md", ".html", ".csv"}


def test_every_form_escapes_what_would_be_markup():
    table = Plain(
        title="<b>&_%$",
        columns=("a|b", "x_1"),
        rows=((Entry("<script>", bold=True, notes=(1,)), Entry("5 ± 1\\")),),
        caption="100 %",
        numeric=(False, True),
        groups=("g_&",),
        footnotes=((1, "50 % <i>"),),
    )
    assert "<script>" not in html(table)
    assert "<strong>&lt;script&gt;</strong><sup>1</sup>" in html(table)
    assert r"a\|b" in markdown(table)
    assert r"**\<script\>**" in markdown(table)
    tex = latex(table, "tab:x")
    assert r"\textbf{$<$script$>$}$^{1}$ & 5 $\pm$ 1\textbackslash{} \\" in tex
    assert r"\&\_\%\$" in tex
    assert tex.count(r"\midrule") == 1
    assert r"\begin{tabular}{lr}" in tex
    assert csv(replace(table)) == "\n"


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (12.3456, 0.0123, "12.346 ± 0.012"),
        (1234.5, 22.0, "1234 ± 22"),
        (3.0, None, "3"),
        (None, None, ""),
        (0.5, 0, "0.5"),
    ],
)
def test_values_have_the_decimals_of_their_errors(value, stderr, text):
    assert with_error(value, stderr) == text


def test_every_stage_has_an_axis():
    from qbench.stages.pipeline import stage_types

    assert set(stage_types()) == set(AXIS_OF)


def test_levels_name_stages_by_axis_and_options_where_they_differ(database, store):
    def pipeline(shrink):
        stages = [("awq_scale", {"n": 20}), ("awq_clip", {"shrink": shrink}), ("gptq", {})]
        return {"pipeline": [{"name": n, "version": 1, "options": o} for n, o in stages]}

    calib = {"calib": "c4", "calib_n": 16, "calib_length": 512}
    keys = [store("awq+gptq", 4, spec=pipeline(s), weight_format="int4_g64_asym_mse", **calib) for s in (0.5, 0.8)]
    keys.append(store("rtn", 4, weight_format="int4_g64_asym_mse", act_format="int8_token"))
    rows = database.find(keys)
    first, second, third = axis_levels([rows[key] for key in keys])
    assert first == {
        "calibration": "c4",
        "transformation": "awq_scale",
        "clipping": "awq_clip (shrink=0.5)",
        "reconstruction": "gptq",
        "format": "int4_g64_asym",
    }
    assert second["clipping"] == "awq_clip (shrink=0.8)"
    assert third == {
        "calibration": "none",
        "transformation": "none",
        "clipping": "mse",
        "reconstruction": "none",
        "format": "int4_g64_asym, inputs int8_token",
    }
    assert scheme_of(rows[keys[0]]) == "int4_g64_asym"


def test_judging_nothing_gives_nothing(database):
    assert judged([]) == ()
    assert fields(database) == ()
