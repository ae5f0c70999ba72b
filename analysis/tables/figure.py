"""A declared table as a figure: a dot plot of its cells, one panel per column, the rows grouped as in the table.

The plotted rows are the table's CSV (`declared_text.frame`).
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image  # matplotlib writes its PNGs with it

from analysis.style import Mark, house_style, marks_in_order, wrapped
from analysis.tables.declared import Filled, FilledTable, Row, infos_of
from analysis.tables.declared_text import ABSENT

#: Ratio of the largest to the smallest value of a panel beyond which a linear axis hides the differences at its foot.
LOG_BEYOND = 20.0
_ABREAST = 5  # panels beside each other, but for whole groups of columns
_GREY = "#666666"
_DPI, _COLOURS = 120, 256
_CAPTION_POINTS = 6.5


@dataclass(frozen=True)
class _Line:
    """A line of the y axis: the heading of a group, or a row with its place in the table."""

    label: str
    row: int | None


def write_figure(table: FilledTable, base: Path, suffixes: Sequence[str] = ("pdf", "png")) -> list[Path]:
    """`<base>.pdf` and `<base>.png`; equal tables give equal files."""
    paths = [base.with_name(f"{base.name}.{suffix}") for suffix in suffixes]
    base.parent.mkdir(parents=True, exist_ok=True)
    drawn = figure(table)
    with house_style():
        for path in paths:
            if path.suffix == ".pdf":
                drawn.savefig(path, metadata={"CreationDate": None})
            else:
                _write_small(drawn, path)
    return paths


def _write_small(drawn: Figure, path: Path) -> None:
    """A PNG for pages that are kept in a repository: of few colours, which halves it more than once."""
    buffer = BytesIO()
    drawn.savefig(buffer, format="png", dpi=_DPI)
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(_COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            path, optimize=True
        )


def figure(table: FilledTable) -> Figure:
    """The table drawn; without any value its panels are empty and the caption says what is missing."""
    declared, lines = table.declared, _lines(table)
    style = marks_in_order(list(dict.fromkeys(row.labels[-1] for row in table.rows if not row.full_precision)))
    abreast = _abreast(declared.columns)
    deep = -(-len(declared.columns) // abreast)
    longest = max((len(line.label) for line in lines), default=0)
    width = 0.45 + 0.068 * longest + (1.75 if abreast > 2 else 2.4) * abreast
    text = wrapped(caption(table), width - 0.2, _CAPTION_POINTS)
    height = deep * (0.75 + 0.19 * len(lines)) + 0.14 * (text.count("\n") + 2)
    with house_style():
        drawn = Figure(figsize=(width, height), layout="constrained")
        panels = drawn.subplots(deep, abreast, sharey=True, squeeze=False).ravel()
        for column, axes in enumerate(panels):
            if column >= len(declared.columns):
                axes.set_axis_off()
                continue
            _panel(axes, table, column, lines, style)
        drawn.supxlabel(text, fontsize=_CAPTION_POINTS, color="#444444", x=0.01, ha="left")
    return drawn


def caption(table: FilledTable) -> str:
    """What a reader has to know to judge and recompute the figure."""
    cells = [cell for row in table.rows for cell in row.cells]
    parts = [f"{table.declared.title}. {table.caption}"]
    if any(cell.value is not None and cell.delta_stderr is not None for cell in cells):
        parts.append(
            "Bars: ±1 standard error of the difference from full precision (dashed), paired item by item; of the value"
            " itself where there is no such difference."
        )
    elif any(cell.value is not None and cell.stderr is not None for cell in cells):
        parts.append("Bars: ±1 standard error.")
    if any(cell.best for cell in cells):
        parts.append("Hollow: worse than the best of the cells it is compared with (paired, Holm, α = .05).")
    reasons = dict.fromkeys(note for cell in cells if cell.value is None for note in cell.notes)
    parts += [f"{reason[:1].upper()}{reason[1:]}." for reason in reasons]
    return " ".join([*parts, *table.notes])


def _lines(table: FilledTable) -> list[_Line]:
    """From top to bottom, without full precision, which is a line through the others."""
    rows = [(place, row) for place, row in enumerate(table.rows) if not row.full_precision]
    found = []
    for outer, some in groupby(rows, key=lambda each: each[1].labels[:-1]):
        if outer:
            named = zip(table.declared.row_axes, outer)
            found.append(_Line(", ".join(f"{axis}: {label}" for axis, label in named), None))
        found += [_Line(row.labels[-1], place) for place, row in some]
    return found


def _abreast(columns: Sequence[tuple[str, ...]]) -> int:
    """Panels side by side: all where they fit, else those of one group of columns."""
    if len(columns) <= _ABREAST:
        return max(1, len(columns))
    sizes = {len(list(same)) for _, same in groupby(columns, key=lambda labels: labels[:-1])}
    alike = sizes.pop() if len(sizes) == 1 else 0
    deep = -(-len(columns) // _ABREAST)
    return alike if 2 <= alike <= _ABREAST + 2 else -(-len(columns) // deep)


def _panel(axes: Axes, table: FilledTable, column: int, lines: Sequence[_Line], style: dict[str, Mark]) -> None:
    cells = [row.cells[column] for row in table.rows]
    values = [cell.value for cell in cells if cell.value is not None]
    logarithmic = bool(values) and min(values) > 0 and max(values) > LOG_BEYOND * min(values)
    if logarithmic:
        axes.set_xscale("log")
    places = {line.row: y for y, line in enumerate(lines)}
    for y, line in enumerate(lines):
        if line.row is None:
            continue
        cell = cells[line.row]
        if cell.value is None:
            text = ABSENT.get(cell.state, "no value")
            look = {"color": _GREY, "fontsize": 7.5, "ha": "center", "va": "center"}
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
            axes.text(0.5, y, text, transform=axes.get_yaxis_transform(), bbox=box, **look)
            continue
        _dot(
            axes,
            cell,
            y,
            style[table.rows[line.row].labels[-1]],
            hollow=_is_beaten(table, line.row, column),
            log=logarithmic,
        )
    for value, first, last in _references(table.rows, column, places):
        axes.plot([value, value], [first - 0.5, last + 0.5], "--", color="black", linewidth=0.9, zorder=1.5)
    _ticks(axes, values, logarithmic)
    axes.set_ylim(max(1, len(lines)) - 0.5, -0.5)
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    for tick, line in zip(axes.get_yticklabels(), lines):  # of panels to the right there are none
        tick.set(fontsize=8.5, fontweight="bold" if line.row is None else "normal")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    for gridline, line in zip(axes.get_ygridlines(), lines, strict=True):
        gridline.set_visible(line.row is not None)
    varying = [len(set(labels)) > 1 for labels in zip(*table.declared.columns, strict=True)]
    title = [part for part, varies in zip(table.declared.columns[column], varying, strict=True) if varies]
    axes.set_title("\n".join(filter(None, title or table.declared.columns[column])), fontsize=9)
    axes.set_xlabel(_quantity(table, column), fontsize=8)
    if column == 0 and any(cell.full_precision for cell in table.rows):
        handle = Line2D([], [], linestyle="--", color="black", linewidth=0.9, label="full precision")
        axes.figure.legend(handles=[handle], loc="outside upper right", fontsize=7.5)


def _dot(axes: Axes, cell: Filled, y: int, mark: Mark, *, hollow: bool, log: bool) -> None:
    error = cell.delta_stderr if cell.delta_stderr is not None else cell.stderr
    bars = None
    if error is not None:
        bars = [[min(error, cell.value / 2) if log else error], [error]]  # a logarithmic axis has no place for zero
    axes.errorbar(
        *(cell.value, y),
        xerr=bars,
        fmt=mark.marker,
        color=mark.colour,
        markerfacecolor="white" if hollow else mark.colour,
        markersize=5.5,
        capsize=2,
        elinewidth=1.0,
        zorder=3,
    )


def _is_beaten(table: FilledTable, row: int, column: int) -> bool:
    """Whether another one of the cells that this one is compared with is marked as the best, and this one is not."""
    best, own = table.declared.best, table.rows[row]
    if own.cells[column].best:
        return False
    if best == "row":
        return any(cell.best for cell in own.cells)
    rivals = (each for each in table.rows if best != "group" or each.labels[:-1] == own.labels[:-1])
    return any(each.cells[column].best for each in rivals)


def _references(rows: Sequence[Row], column: int, places: dict[int, int]) -> list[tuple[float, int, int]]:
    """(value, first line, last line) of each full-precision row, which holds for the rows below it."""
    found: list[tuple[float, int, int]] = []
    value = None
    for place, row in enumerate(rows):
        if row.full_precision:
            value, fresh = row.cells[column].value, True
        elif value is not None:
            first = places[place] if fresh else found.pop()[1]
            found.append((value, first, places[place]))
            fresh = False
    return found


def _ticks(axes: Axes, values: Sequence[float], logarithmic: bool) -> None:
    if not values:
        axes.set_xticks([])
        return
    axes.margins(x=0.12)
    if not logarithmic:
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        return
    ratio = max(values) / min(values)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if ratio < 300 else (1,), numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _short(value: float, _: int) -> str:
    """1, 300, 10k, 3M: labels that stay apart in a narrow panel."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= 10 * size or (value >= size and value % size == 0):
            return f"{value / size:g}{letter}" if value < 1e9 else f"{value:.0e}"
    return f"{value:g}"


def _quantity(table: FilledTable, column: int) -> str:
    """What a panel shows, in words, with unit and better direction."""
    infos = infos_of(table, column)
    arrows = {False: " (better ←)", True: " (better →)", None: ""}
    words = dict.fromkeys(f"{i.quantity}{i.unit and f', {i.unit}'}{arrows[i.higher_is_better]}" for i in infos)
    return "\nor ".join(textwrap.fill(each, 26) for each in words)
