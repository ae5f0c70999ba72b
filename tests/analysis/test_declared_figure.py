"""Figures of declared tables: every cell in its place, full precision as a line, and what is missing by name."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.style import marks_in_order
from analysis.tables import declared_text
from analysis.tables.declared import Cell, Declared, Filled, FilledTable, Row
from analysis.tables.figure import LOG_BEYOND, caption, figure, write_figure
from qbench.metrics import metric_info

PPL, ACC = metric_info("ppl"), metric_info("acc")


def cell(value: float | None = None, state: str = "done", info=PPL, **more) -> Filled:
    fields = {"value": value, "info": info if value is not None else None, "protocol": "t: w", "n": 9}
    return Filled(state=state, **(fields | more))


def table(rows: list[Row], columns: tuple[tuple[str, ...], ...], axes=("Method", "Element"), **changes) -> FilledTable:
    declared = Declared(
        **{"name": "t0", "size": "tiny", "title": "Title", "caption": "Caption."},
        row_axes=axes,
        column_axes=("Bits",),
        rows=tuple(row.labels for row in rows if not row.full_precision),
        columns=columns,
        cells=tuple((Cell(metric=("ppl",)),) * len(columns) for row in rows if not row.full_precision),
        **({"best": "group"} | changes),
    )
    return FilledTable(declared=declared, rows=tuple(rows), caption="Caption. n = 9.", counts={}, run_ids=())


ROWS = [
    Row(labels=("full precision", ""), cells=(cell(14.0), cell(14.0)), full_precision=True),
    Row(labels=("RTN", "INT"), cells=(cell(15.0, stderr=3.0, delta=1.0, delta_stderr=0.5, best=True), cell(900.0))),
    Row(labels=("RTN", "FP"), cells=(cell(16.0), cell(800.0, stderr=900.0))),
    Row(labels=("GPTQ", "INT"), cells=(cell(None, "missing"), cell(20.0))),
    Row(labels=("GPTQ", "FP"), cells=(cell(None, "failed", notes=("run 3: out of memory",)), cell(18.0))),
]
COLUMNS = (("W4",), ("W2",))


def panels(found: FilledTable):
    drawn = figure(found)
    drawn.draw_without_rendering()
    return [axes for axes in drawn.axes if axes.axison]


def dots(axes) -> list[tuple[float, float]]:
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in axes.lines
        if len(line.get_xdata()) == 1 and line.get_marker() not in ("|", "None", "")
    ]


def test_every_value_is_a_dot_in_its_row_and_panel():
    first, second = panels(table(ROWS, COLUMNS))
    assert [text.get_text() for text in first.get_yticklabels()] == [
        *("Method: RTN", "INT", "FP", "Method: GPTQ", "INT", "FP")
    ]
    assert dots(first) == [(15.0, 1.0), (16.0, 2.0)]
    assert dots(second) == [(900.0, 1.0), (800.0, 2.0), (20.0, 4.0), (18.0, 5.0)]
    assert first.get_ylim() == (5.5, -0.5)
    assert first.get_title() == "W4"
    assert first.get_xlabel() == "perplexity (better ←)"


def test_what_is_missing_or_failed_is_named_in_its_row():
    first, _ = panels(table(ROWS, COLUMNS))
    assert [(text.get_text(), text.get_position()[1]) for text in first.texts] == [("not run", 4), ("failed", 5)]
    assert "Run 3: out of memory." in caption(table(ROWS, COLUMNS))


def test_bars_are_those_of_the_paired_difference_where_it_is_known():
    first, second = panels(table(ROWS, COLUMNS))
    ends = [tuple(segment[:, 0]) for bars in first.collections for segment in bars.get_segments()]
    assert ends == [(14.5, 15.5)]
    ends = [tuple(segment[:, 0]) for bars in second.collections for segment in bars.get_segments()]
    assert ends == [(400.0, 1700.0)]  # on a logarithmic axis nothing reaches zero
    assert "±1 standard error of the difference from full precision" in caption(table(ROWS, COLUMNS))


@pytest.mark.parametrize("columns", [1, 3, 9])
def test_the_caption_stays_inside_the_figure(columns):
    """Of wide letters, which fit fewer to a line, too."""
    rows = [Row(labels=("RTN",), cells=(cell(10.0, best=True),) * columns)]
    found = table(rows, tuple((f"c{i}",) for i in range(columns)), ("Method",))
    for text in ("WMWM MWMWMW " * 40, "ill il " * 100, "Settings: " * 60):
        drawn = figure(replace(found, caption=text))
        drawn.draw_without_rendering()
        box, page = drawn._supxlabel.get_window_extent(), drawn.bbox
        assert page.x0 <= box.x0
        assert 0.7 * page.x1 < box.x1 <= page.x1


def test_large_ratios_take_a_logarithmic_axis():
    first, second = panels(table(ROWS, COLUMNS))
    assert (first.get_xscale(), second.get_xscale()) == ("linear", "log")
    edge = [Row(labels=("x", "y"), cells=(cell(1.0),)), Row(labels=("x", "z"), cells=(cell(LOG_BEYOND),))]
    assert panels(table(edge, (("W4",),)))[0].get_xscale() == "linear"


def test_only_what_is_beaten_by_a_marked_rival_is_hollow():
    def faces(found: FilledTable) -> list[str]:
        lines = [line for line in panels(found)[0].lines if len(line.get_xdata()) == 1]
        return [
            "hollow" if line.get_markerfacecolor() == "white" else "full" for line in lines if line.get_marker() != "|"
        ]

    done = [*ROWS[:3], Row(labels=("GPTQ", "INT"), cells=(cell(17.0), cell(20.0)))]
    assert faces(table(done, COLUMNS)) == ["full", "hollow", "full"]
    assert faces(table(done, COLUMNS, best="column")) == ["full", "hollow", "hollow"]


def test_each_models_full_precision_spans_its_own_rows():
    rows = [
        Row(labels=("a", "full precision"), cells=(cell(10.0),), full_precision=True),
        Row(labels=("a", "RTN"), cells=(cell(11.0),)),
        Row(labels=("b", "full precision"), cells=(cell(5.0),), full_precision=True),
        Row(labels=("b", "RTN"), cells=(cell(6.0),)),
        Row(labels=("b", "AWQ"), cells=(cell(5.5),)),
    ]
    (axes,) = panels(table(rows, (("W4",),), ("Model", "Method")))
    lines = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [(line.get_xdata()[0], *line.get_ydata()) for line in lines] == [(10.0, 0.5, 1.5), (5.0, 2.5, 4.5)]


@pytest.mark.parametrize(("columns", "shape"), [(1, (1, 1)), (5, (1, 5)), (6, (1, 6)), (8, (2, 4)), (21, (5, 5))])
def test_many_panels_are_wrapped(columns, shape):
    rows = [Row(labels=("RTN",), cells=(cell(10.0),) * columns)]
    found = table(rows, tuple((f"c{i}",) for i in range(columns)), ("Method",))
    grid = figure(found).axes[0].get_subplotspec().get_gridspec()
    assert grid.get_geometry() == shape


def test_groups_of_columns_stay_together():
    rows = [Row(labels=("RTN",), cells=(cell(10.0),) * 14)]
    columns = tuple((f"K{i}", f"layer {j}") for i in range(2) for j in range(7))
    grid = figure(table(rows, columns, ("Method",))).axes[0].get_subplotspec().get_gridspec()
    assert grid.get_geometry() == (2, 7)


@pytest.mark.parametrize("rows", [[], [Row(labels=("RTN", "INT"), cells=(cell(None, "missing"),) * 2)], ROWS[:2]])
def test_nothing_and_little_are_drawn_and_files_are_the_same_every_time(tmp_path, rows):
    found = table(rows, COLUMNS)
    first = write_figure(found, tmp_path / "a/t0")
    assert [path.name for path in first] == ["t0.pdf", "t0.png"]
    again = write_figure(found, tmp_path / "b/t0")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


def test_the_csv_has_what_is_plotted():
    found = table(ROWS, COLUMNS)
    frame = declared_text.frame(found)
    plotted = [x for axes in panels(found) for x, _ in dots(axes)]
    quantized = frame[frame["Method"] != "full precision"]
    assert sorted(plotted) == sorted(quantized["value"].dropna())
    assert isinstance(frame, pd.DataFrame)


def test_labels_do_not_overlap():
    """Tick labels of neighbouring panels and rows, drawn for real values over eight orders."""
    rows = [
        Row(labels=(f"Method {i}",), cells=tuple(cell(10.0 ** (1 + i * j / 2)) for j in range(5))) for i in range(4)
    ]
    drawn = figure(table(rows, tuple((f"W{j}",) for j in range(5)), ("Method",)))
    drawn.draw_without_rendering()
    for axes in drawn.axes:
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            low, high = sorted(axes.get_xlim())
            shown = [
                each.get_window_extent()
                for each in labels
                if each.get_text() and (labels is not axes.get_xticklabels() or low <= each.get_position()[0] <= high)
            ]
            assert not any(a.overlaps(b) for i, a in enumerate(shown) for b in shown[:i] if a.width and b.width)


def test_marks_differ_and_algorithms_keep_theirs():
    found = marks_in_order(["RTN", "INT", "FP", "GPTQ", "x", "y", "z"])
    assert len(set(found.values())) == len(found)
    assert found["RTN"].marker == "s"
    assert marks_in_order(["INT", "FP"])["FP"] == marks_in_order(["a", "FP", "c"])["FP"]
    assert all(re.fullmatch(r"#[0-9A-F]{6}", mark.colour, re.I) for mark in found.values())
    assert np.unique([mark.marker for mark in marks_in_order([str(i) for i in range(8)]).values()]).size == 8
