"""Fronts against any cost, their knee, and full precision that does not stretch the axis."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from analysis.costs import RUN_COSTS, Cost, cost_of
from analysis.front import knee, pareto_front
from analysis.pareto import caption, plotted_rows
from analysis.pareto_axes import draw
from analysis.tables.front import fronts, fronts_table
from analysis.tables.sweep import sweep_table
from qbench.cli import main
from qbench.errors import EvaluationError, SpecError
from qbench.store import queries
from qbench.store.records import Environment, Measurement, Outcome
from tests.analysis.conftest import losses, measured, sha

C4 = sha("c4-sample window-512")
WEIGHTS = {"weight_format": "int4_g64_asym"}


def rate(value: float, task: str = "decode") -> Measurement:
    return Measurement(
        evaluator="speed", protocol="batch-1", task=task, name="tokens_per_s", value=value, stderr=None, n=1,
        unit="tokens/s", spec_key=sha(task), higher_is_better=True,
    )  # fmt: skip


def outcome(bits: float, seconds: float = 1.0, size: int = 10**8) -> Outcome:
    return Outcome(bits_per_weight=bits, quantize_s=seconds, model_bytes=size)


@pytest.fixture
def planted(database, store):
    """Full precision, four points with their seconds and rates, and two that quantize the cache alone."""
    store("none", None, measured(losses(np.log(28.0))), outcome=outcome(32.0, 0.0, 5 * 10**8))
    for bits, ppl, seconds, tokens in (
        (2, 90.0, 9.0, 70.0),
        (3, 40.0, 5.0, 60.0),
        (4, 36.0, 7.0, 65.0),
        (8, 35.0, 8.0, 50.0),
    ):
        found = [measured(losses(np.log(ppl))), rate(tokens)]
        store("gptq", bits, *found, outcome=outcome(bits + 0.3, seconds, bits * 10**7))
    for kv, ppl in (("int8_token", 28.5), ("int2_token", 60.0)):
        store("rtn", None, measured(losses(np.log(ppl))), outcome=outcome(32.0, 0.5, 5 * 10**8), kv_format=kv)
    return database


def front_of(database, **wanted):
    (found,) = fronts(database, **wanted)
    return found


def on_front(found) -> list[float]:
    return sorted(found.points.loc[found.points["on_front"], "x"].tolist())


COUNTS = st.integers(0, 6)


@given(st.lists(st.tuples(COUNTS, COUNTS), max_size=12))
def test_a_front_found_in_one_walk_is_that_of_all_pairs(points):
    costs, values = (np.array([point[axis] for point in points], dtype=float) for axis in (0, 1))
    beaten = [any(a <= x and b <= y and (a, b) != (x, y) for a, b in points) for x, y in points]
    assert pareto_front(costs, values).tolist() == [not each for each in beaten]


def test_the_knee_is_where_the_front_bends():
    assert knee(np.array([2, 3, 4, 8.0]), np.array([90, 20, 15, 14.0])) == 1
    assert knee(np.array([2, 3, 4.0]), np.array([30, 20, 10.0])) is None, "a line does not bend"
    assert knee(np.array([2, 3, 4.0]), np.array([30, 28, 10.0])) is None, "outwards is no knee"
    assert knee(np.array([2, 3.0]), np.array([30, 10.0])) is None
    assert knee(np.array([]), np.array([])) is None
    values = np.array([1e6, 1000, 20, 19.0])
    assert knee(np.array([2, 3, 4, 8.0]), values) == 1
    assert knee(np.array([2, 3, 4, 8.0]), values, logarithmic=True) == 2


def test_each_cost_gives_its_own_front(planted):
    assert on_front(front_of(planted)) == [2.3, 3.3, 4.3, 8.3, 32.0]
    assert on_front(front_of(planted, cost="quantize_s")) == [0.5], "the cache in eight bits beats all"
    assert on_front(front_of(planted, cost="bytes")) == [20.0, 30.0, 40.0, 80.0, 500.0]
    rates = front_of(planted, cost="tokens_per_s")
    assert rates.cost.arrow == "→"
    assert on_front(rates) == [50.0, 65.0, 70.0], "more tokens are better"


@pytest.mark.parametrize("name", RUN_COSTS)
def test_every_cost_of_a_run_can_be_asked_for(planted, name):
    for found in fronts(planted, cost=name):
        values = {run.key: getattr(run, name) for run in queries.runs(planted)}
        for _, row in found.points.iterrows():
            stored = values[row["key"]]
            assert row["x"] * RUN_COSTS[name].divisor == pytest.approx(stored)


def test_an_unknown_cost_or_an_ambiguous_one_is_one_line(planted, store):
    with pytest.raises(
        SpecError, match=r"no run stores it; one of bits_per_weight.* or a stored metric: ppl, tokens_per_s"
    ):
        fronts(planted, cost="latency")
    store("awq", 4, measured(losses(3.6)), rate(10.0, "prefill"))
    with pytest.raises(SpecError, match="tokens_per_s@decode or tokens_per_s@prefill"):
        fronts(planted, cost="tokens_per_s")
    assert front_of(planted, cost="tokens_per_s@prefill").points["x"].dropna().tolist() == [10.0]
    assert cost_of(planted, queries.runs(planted), "tokens_per_s@decode")[0].unit == "tokens/s"
    for asked in ({"metric": "acc"}, {"model": "other"}, {"task": "wiki"}):
        with pytest.raises(SpecError, match="the database has "):
            fronts(planted, **asked)


def axes_of(found):
    axes = Figure().add_subplot()
    draw(found.points, found.evaluation.metric, axes, found.cost)
    axes.figure.canvas.draw()
    return axes


def test_weights_in_full_precision_stand_behind_a_break_and_stretch_nothing(planted):
    found = front_of(planted)
    assert found.points.loc[found.points["beyond"], "x"].tolist() == [32.0, 32.0]
    axes = axes_of(found)
    low, high = axes.get_xlim()
    assert high - low < 9
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert "32" in labels
    assert any(text.get_text() == "//" for text in axes.texts)
    assert "Behind the break" in caption(found.points, found.evaluation)
    for _, row in found.points[found.points["knee"]].iterrows():
        assert row["x"] == 3.3, "the knee is that of the weights, whatever stands behind the break"


def test_without_quantized_weights_nothing_breaks(database, store):
    store("none", None, measured(losses(3.3)), outcome=outcome(32.0))
    keys = [
        store("rtn", None, measured(losses(value)), outcome=outcome(32.0), kv_format=str(value)) for value in (3.4, 3.5)
    ]
    table = sweep_table(database, keys, [C4])
    points = plotted_rows(table, "tiny", table.evaluations[0])
    assert not points["beyond"].any()
    axes = Figure().add_subplot()
    draw(points, table.evaluations[0].metric, axes)
    assert axes.get_xlim()[0] < 32.0 < axes.get_xlim()[1]


def test_full_precision_is_a_line_with_its_cost(planted):
    found = front_of(planted, cost="bytes")
    labels = axes_of(found).get_legend_handles_labels()[1]
    assert labels[0] == "full precision\n28\nat 500 MB"


def test_a_cost_that_spans_much_gets_a_logarithmic_axis(database, store):
    for bits, seconds in ((2, 1.0), (3, 90.0)):
        store("gptq", bits, measured(losses(3.0 + bits)), outcome=outcome(bits, seconds), **WEIGHTS)
    assert axes_of(front_of(database, cost="quantize_s")).get_xscale() == "log"
    assert axes_of(front_of(database)).get_xscale() == "linear"


def test_thousands_of_points_are_drawn_without_one_artist_each(database, store):
    rng = np.random.default_rng(0)
    store("gptq", 4, measured(losses(3.0)), outcome=outcome(4.3))
    table = sweep_table(database, [run.key for run in queries.runs(database)], [C4])
    points = plotted_rows(table, "tiny", table.evaluations[0])
    points = pd.concat([points] * 400, ignore_index=True)
    points["x"], points["value"] = rng.uniform(2, 8, 400), rng.uniform(20, 40, 400)
    points["on_front"] = pareto_front(points["x"].to_numpy(), points["value"].to_numpy())
    axes = Figure().add_subplot()
    draw(points, table.evaluations[0].metric, axes)
    assert len(axes.containers) == 2
    drawn = sum(len(each.lines[0].get_xdata()) for each in axes.containers)
    assert drawn == 400


def test_a_name_may_have_dollars_and_be_long(database, store, tmp_path):
    name = r"$\nonsense" + "x" * 200
    store("none", None, measured(losses(3.0)))
    store(name, 4, measured(losses(3.1), task=r"$\alpha$"))
    assert main(["pareto", "--store", f"sqlite:///{tmp_path}/results.db", "--out", str(tmp_path / "f")]) == 0
    assert len(list((tmp_path / "f").iterdir())) == 3


def test_the_table_lists_the_front_and_counts_what_it_makes_superfluous(planted):
    found = fronts(planted)
    table = fronts_table(found, metric="ppl", cost="bits")
    assert [row[0].text.partition(" ")[0] for row in table.rows] == ["full", "gptq", "gptq", "gptq", "gptq", "rtn"]
    assert [row[4].text for row in table.rows] == ["", "0", "1", "1", "1", "1"]
    assert [row[3].text for row in table.rows].count("knee") == 1
    assert len(table.frame) == 7
    assert fronts_table((), metric="acc", cost="bits").caption.endswith("nothing to draw.")


def test_points_of_several_commits_are_refused_unless_allowed(database, store):
    for commit in ("a" * 40, "b" * 40):
        place = Environment(
            git_commit=commit, git_dirty=False, versions={}, platform="p", cpu="c", threads=1, gpu=None, driver=None
        )
        store(f"algo{commit[0]}", 4, measured(losses(3.0)), environment=place)
    with pytest.raises(EvaluationError, match="code versions"):
        fronts(database)
    found = front_of(database, allow=["code"])
    assert "code versions" in found.notes
    assert "code versions" in caption(found.points, found.evaluation, found.notes)


def test_a_metric_without_a_direction_is_refused(database, store):
    odd = measured(losses(3.0), name="odd", unit="odd")
    store("gptq", 4, odd)
    with pytest.raises(SpecError, match="y=odd: a metric of which higher or lower is better"):
        fronts(database, metric="odd")


def test_the_command_writes_figures_named_after_the_cost(planted, tmp_path, capsys):
    out = tmp_path / "figures"
    arguments = [
        "pareto",
        "--x",
        "quantize_s",
        "--y",
        "ppl",
        "--out",
        str(out),
        "--store",
        f"sqlite:///{tmp_path}/results.db",
    ]
    assert main(arguments) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        f"pareto-quantize_s-tiny-c4-sample-ppl.{kind}" for kind in ("csv", "pdf", "png")
    ]
    assert pd.read_csv(out / "pareto-quantize_s-tiny-c4-sample-ppl.csv")["cost"].unique().tolist() == ["quantize_s"]
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {"x", "value", "on_front", "knee", "key"} <= set(rows[0])


def test_a_cost_says_which_way_is_better():
    assert Cost(name="c", label="c", unit="").arrow == "←"
    assert Cost(name="c", label="c", unit="", higher_is_better=True).arrow == "→"
