import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis.front import pareto_front
from analysis.pareto import caption, figure, pareto_figures, plotted_rows
from analysis.pareto_axes import draw, sideways_slots
from analysis.style import house_style, marks
from analysis.tables.sweep import sweep_table
from qbench.store.records import Outcome
from tests.analysis.conftest import losses, measured, sha

C4 = sha("c4-sample window-512")
POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@given(POINTS)
def test_the_front_is_what_no_point_dominates(points):
    costs, values = np.array([p[0] for p in points]), np.array([p[1] for p in points])

    def dominated(x, y):
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)

    assert pareto_front(costs, values).tolist() == [not dominated(x, y) for x, y in points]


def sweep(store, points, **columns):
    """Keys of a full-precision row and of points (algo, bits per weight, perplexity)."""
    keys = [store("none", None, measured(losses(np.log(28.74))), **columns)]
    for algo, bits, ppl in points:
        outcome = Outcome(bits_per_weight=bits)
        keys.append(store(algo, int(bits), measured(losses(np.log(ppl))), outcome=outcome, **columns))
    return keys


USUAL = [
    ("gptq", 2.3, 8900.0),
    ("awq", 2.3, 12000.0),
    ("gptq", 4.3, 36.4),
    ("awq", 4.3, 35.0),
    ("rtn", 4.3, 38.0),
]


def test_a_figure_has_all_points_the_baseline_and_its_rows_beside_it(database, store, tmp_path):
    keys = [*sweep(store, USUAL), store("rtn", 3, error=("E", "m"))]
    files = pareto_figures(sweep_table(database, keys, [C4]), tmp_path / "new" / "results")
    assert [path.name for path in files] == [f"pareto-c4-sample.{kind}" for kind in ("pdf", "png", "csv")]
    assert files[0].read_bytes().startswith(b"%PDF")
    assert files[1].read_bytes().startswith(b"\x89PNG")
    rows = pd.read_csv(files[2])
    assert rows["key"].tolist() == keys[:-1]
    assert rows["on_front"].tolist() == [False, True, False, False, True, False]
    assert set(rows["protocol"]) == {"window-512"}
    assert rows["value"].tolist() == pytest.approx([28.74, 8900.0, 12000.0, 36.4, 35.0, 38.0])


def test_equal_rows_give_equal_files(database, store, tmp_path):
    table = sweep_table(database, sweep(store, USUAL), [C4])
    first, second = (pareto_figures(table, tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert b"CreationDate" not in first[0].read_bytes()


def test_models_and_texts_get_figures_of_their_own(database, store, tmp_path):
    wiki = measured(losses(3.0), "wiki/text 2")
    keys = [*sweep(store, USUAL[:1]), *sweep(store, USUAL[:1], model="org/big")]
    keys.append(store("rtn", 5, wiki))
    files = pareto_figures(sweep_table(database, keys, [C4, wiki.spec_key]), tmp_path)
    assert [path.name for path in files if path.suffix == ".csv"] == [
        "pareto-tiny-c4-sample.csv", "pareto-tiny-wiki_text_2.csv", "pareto-org_big-c4-sample.csv",
    ]  # fmt: skip
    assert {path.parent for path in files} == {tmp_path}


def test_without_points_there_is_no_figure(database, store, tmp_path):
    assert pareto_figures(sweep_table(database, sweep(store, []), [C4]), tmp_path) == []
    assert pareto_figures(sweep_table(database, [store("rtn", 4, error=("E", "m"))], [C4]), tmp_path) == []


def drawn(database, keys) -> tuple:
    table = sweep_table(database, keys, [C4])
    points = plotted_rows(table, "tiny", table.evaluations[0])
    with house_style():
        figure = Figure()
        axes = figure.add_subplot()
        draw(points, table.evaluations[0].metric, axes)
        figure.canvas.draw()
    return points, axes


@pytest.mark.parametrize(("worst", "scale"), [(28.74 * 19, "linear"), (28.74 * 21, "log"), (1e6, "log")])
def test_the_axis_is_logarithmic_where_a_linear_one_hides_differences(database, store, worst, scale):
    _, axes = drawn(database, sweep(store, [("rtn", 2.3, worst), ("rtn", 8.3, 29.0)]))
    assert axes.get_yscale() == scale
    assert all("e" not in label.get_text() for label in axes.get_yticklabels())


@pytest.mark.parametrize("points", [USUAL[:1], USUAL, [("awq", b + 0.3, 20 + 1e6 / 9**b) for b in range(2, 9)]])
def test_every_point_with_its_error_bar_lies_within_the_axes(database, store, points):
    _, axes = drawn(database, sweep(store, points))
    frame = axes.get_window_extent()
    bars = axes.containers
    assert len(bars) == len(points)
    for bar in bars:
        line, _, (whisker,) = bar
        x, y = line.get_transform().transform(line.get_xydata())[0]
        assert frame.x0 < x < frame.x1
        low, high = whisker.get_transform().transform(whisker.get_segments()[0])[:, 1]
        assert frame.y0 <= low < y < high <= frame.y1


def test_labels_say_quantity_and_direction_and_the_caption_what_a_reader_needs(database, store):
    points, axes = drawn(database, sweep(store, USUAL))
    assert axes.get_ylabel() == "perplexity on c4-sample (better ↓)"
    assert axes.get_xlabel() == "bits per weight (better ←)"
    assert axes.get_title() == ""
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["full precision\n28.74\nat 16 bits", "front", "awq", "gptq", "rtn"]
    for word in ("tiny", "c4-sample", "window-512", "40 windows", C4[:12]):
        assert word in caption(points, sweep_table(database, points["key"], [C4]).evaluations[0])


@pytest.mark.parametrize(
    ("full", "beyond", "marker", "place"),
    [
        (16.0, False, ">", 1.0),
        (0.0, False, "<", 0.0),
        (3.0, False, "D", 3.0),
        (16.0, True, "D", 4.3 + 0.16 * 2),  # where the point of 16 bits stands, behind the break
        (4.5, True, ">", 1.0),
    ],
)
def test_full_precision_is_marked_where_it_lies(database, store, full, beyond, marker, place):
    table = sweep_table(database, sweep(store, [("gptq", 2.3, 40.0), ("awq", 4.3, 35.0), ("hqq", 16.0, 30.0)]), [C4])
    points = plotted_rows(table, "tiny", table.evaluations[0])
    points.loc[points["algo"] == "none", "x"] = full
    points.loc[points["algo"] == "hqq", "beyond"] = True
    points = points if beyond else points[points["algo"] != "hqq"]
    axes = Figure().add_subplot()
    draw(points, table.evaluations[0].metric, axes)
    (mark,) = [line for line in axes.lines if line.get_color() == "black" and line.get_marker() != "None"]
    assert mark.get_marker() == marker
    assert mark.get_xdata()[0] == pytest.approx(place)


def test_a_long_name_of_a_metric_stands_beside_the_axis_and_above_the_caption(database, store):
    table = sweep_table(database, sweep(store, USUAL), [C4])
    points = plotted_rows(table, "tiny", table.evaluations[0])
    points["task"] = "top-1 agreement with full precision on a long"
    made = figure(points, table.evaluations[0], text="caption " * 80)
    made.canvas.draw()
    label, below = (text.get_window_extent() for text in (made.axes[0].yaxis.label, made.findobj(_is_caption)[0]))
    assert below.y1 < label.y0 < label.y1 < made.bbox.y1


def _is_caption(artist) -> bool:
    return isinstance(artist, Text) and artist.get_text().startswith("caption")


def test_no_two_points_hide_each_other():
    same = [4.3] * 6
    rows = pd.DataFrame(
        {
            "x": [*same, 2.3],
            "value": [30.0, 30.1, 30.2, 30.0, 60.0, 61.0, 30.0],
            "stderr": [0.5, 0.5, np.nan, 0.5, 0.5, 0.5, 0.5],
            "on_front": [False, False, False, True, False, False, True],
        }
    )
    slots = sideways_slots(rows, logarithmic=False)
    assert slots[3] == slots[6] == 0, "the front stays in place"
    assert sorted(slots[:4]) == [-1, 0, 1, 2]
    assert sorted(slots[4:6]) == [0, 1], "far above the first four there is room again"


def test_marks_differ_and_stay_with_their_algorithm():
    few = marks(["gptq", "rtn"])
    many = marks(["rtn", "gptq", "awq", "hqq", "spinquant", "quip"])
    assert few == {name: many[name] for name in few}
    assert len({mark.colour for mark in many.values()}) == len({mark.marker for mark in many.values()}) == 6
    assert len(set(marks(map(str, range(20))).values())) == 20


def test_the_style_ends_with_its_context():
    before = dict(mpl.rcParams)
    with house_style():
        assert mpl.rcParams["axes.grid"]
    assert dict(mpl.rcParams) == before


def test_the_analysis_never_imports_a_model_library():
    script = (
        "import sys; import analysis.pareto, analysis.tables.terminal;"
        "print(*({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_a_method_with_its_cache_quantized_is_another_series_even_where_no_inputs_are(database, store, tmp_path):
    keys = sweep(store, USUAL[-2:])
    keys += [store("awq", 3, measured(losses(np.log(40.0))), kv_format=kv) for kv in ("int4_token", None)]
    table = sweep_table(database, keys, [C4])
    found = plotted_rows(table, "tiny", table.evaluations[0])["series"]
    wanted = ["none", "awq, weights only", "rtn, weights only", "awq, cache int4_token", "awq, weights only"]
    assert found.tolist() == wanted
    assert len(pareto_figures(table, tmp_path)) == 3
