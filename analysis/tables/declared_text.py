"""A declared table as text: on a terminal, in LaTeX (booktabs), Markdown and CSV."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import pandas as pd
from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.tables.declared import Filled, FilledTable, Row, infos_of
from analysis.tables.render import TEX_FITTED, TEX_GAP

ABSENT = {"missing": "not run", "stale": "stale", "failed": "failed", "running": "running", "undefined": "–"}
_LEGEND = "* best, or not distinguishable from it (paired, Holm, α = .05)"
_DELTAS = "Δ: difference from full precision ± paired standard error"
_LARGE = 1e5


@dataclass(frozen=True)
class Styled:
    """The parts of a cell as text; `mark` has the letters of its footnotes."""

    value: str
    delta: str
    best: bool
    mark: str


@dataclass(frozen=True)
class Rendered:
    """The table on a terminal: values, differences from full precision below them, footnotes, caption."""

    table: FilledTable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table, declared = self.table, self.table.declared
        styled, notes = styled_cells(table)
        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
        for axis in declared.row_axes:
            drawn.add_column(axis, overflow="fold")
        for header in headers(table):
            drawn.add_column(Text("\n".join(header)), justify="right")
        previous: tuple[str, ...] = ()
        for row, cells in zip(table.rows, styled, strict=True):
            texts = []
            for cell, found in zip(cells, row.cells, strict=True):
                text = f"{cell.value}{'*' if cell.best else ''}{cell.mark and f' [{cell.mark}]'}"
                text += f"\n{cell.delta}" if cell.delta else ""
                texts.append(Text(text, style={"failed": "red", "missing": "dim", "stale": "dim"}.get(found.state, "")))
            drawn.add_row(*map(Text, unrepeated(row.labels, previous)), *texts)
            previous = row.labels
        yield Text(f"{declared.name.upper()} ({declared.size}). {declared.title}", style="bold")
        yield drawn
        yield Text(table.caption, style="italic")
        for line in legend(table, notes):
            yield Text(line)


def headers(table: FilledTable) -> list[tuple[str, ...]]:
    """A line per column axis, and the metric with its better direction."""
    return [(*labels, _metric_of(table, j)) for j, labels in enumerate(table.declared.columns)]


def latex(table: FilledTable) -> str:
    """A `table` environment that needs the packages booktabs and graphicx."""
    declared = table.declared
    styled, notes = styled_cells(table)
    left, columns = len(declared.row_axes), headers(table)
    lines = [
        f"% qbench fill {declared.name} --size {declared.size}; runs {', '.join(map(str, table.run_ids)) or 'none'}",
        r"\begin{table}",
        r"\centering",
        TEX_GAP,
        rf"\caption{{{tex(f'{declared.title}. {table.caption}')}}}",
        rf"\label{{tab:{declared.name}}}",
        TEX_FITTED[0],
        rf"\begin{{tabular}}{{{'l' * left}{'r' * len(columns)}}}",
        r"\toprule",
    ]
    for level in range(len(columns[0]) if columns else 0):
        names = [header[level] for header in columns]
        if not any(names):
            continue
        last = level == len(columns[0]) - 1
        spans = [(name, len(list(same))) for name, same in groupby(names)]
        leading = [tex(axis) if last else "" for axis in declared.row_axes]
        spanned = [tex(name) if n == 1 else rf"\multicolumn{{{n}}}{{c}}{{{tex(name)}}}" for name, n in spans]
        lines.append(f"{' & '.join([*leading, *spanned])} \\\\")
        place, rules = left + 1, []
        for _, n in spans:
            if n > 1 and not last:
                rules.append(rf"\cmidrule(lr){{{place}-{place + n - 1}}}")
            place += n
        lines += ["".join(rules)] if rules else []
    lines.append(r"\midrule")
    previous: tuple[str, ...] = ()
    for row, cells in zip(table.rows, styled, strict=True):
        if previous and len(row.labels) > 1 and row.labels[0] != previous[0]:
            lines.append(r"\addlinespace")
        labels = [tex(label) for label in unrepeated(row.labels, previous)]
        lines.append(f"{' & '.join([*labels, *map(_tex_cell, cells)])} \\\\")
        previous = row.labels
    lines += [r"\bottomrule", r"\end{tabular}" + TEX_FITTED[1]]
    lines += [rf"\par\footnotesize {tex(line)}" for line in legend(table, notes, star=r"bold:")]
    return "\n".join([*lines, r"\end{table}", ""])


def markdown(table: FilledTable) -> str:
    declared = table.declared
    styled, notes = styled_cells(table)
    header = [*declared.row_axes, *(" ".join(part for part in parts if part) for parts in headers(table))]
    lines = [
        f"**{declared.name.upper()} ({declared.size}). {md(declared.title)}.** {md(table.caption)}",
        "",
        f"| {' | '.join(map(md, header))} |",
        f"|{'---|' * len(declared.row_axes)}{'---:|' * len(declared.columns)}",
    ]
    for row, cells in zip(table.rows, styled, strict=True):
        texts = [*map(md, row.labels)]
        for cell in cells:
            value = f"**{cell.value}**" if cell.best else cell.value
            delta = f" ({cell.delta})" if cell.delta else ""
            texts.append(f"{value}{delta}{cell.mark and f' [{cell.mark}]'}")
        lines.append(f"| {' | '.join(texts)} |")
    lines += ["", *(f"- {md(line)}" for line in legend(table, notes, star="bold:"))]
    return "\n".join([*lines, ""])


def frame(table: FilledTable) -> pd.DataFrame:
    """One line per cell: labels of all axes, then everything that is known of the cell."""
    declared, records = table.declared, []
    for row in table.rows:
        for labels, cell in zip(declared.columns, row.cells, strict=True):
            if row.full_precision and cell.value is None:
                continue
            record = dict(zip((*declared.row_axes, *declared.column_axes), (*row.labels, *labels), strict=True))
            record |= {"metric": cell.info.name if cell.info else "", "unit": cell.info.unit if cell.info else ""}
            names = ("value", "stderr", "delta", "delta_stderr", "spread", "n", "best", "state", "protocol")
            record |= {name: getattr(cell, name) for name in names}
            records.append(record | {"runs": " ".join(map(str, cell.run_ids)), "notes": "; ".join(cell.notes)})
    found = pd.DataFrame.from_records(records)
    return found.astype({"n": "Int64"}) if records else found


def styled_cells(table: FilledTable) -> tuple[list[list[Styled]], dict[str, str]]:
    """The cells as text, rows by columns, and the footnotes by letter."""
    decimals = [_decimals([row.cells[j] for row in table.rows]) for j in range(len(table.declared.columns))]
    notes: dict[str, str] = {}
    styled = []
    for row in table.rows:
        cells = []
        for cell, places in zip(row.cells, decimals, strict=True):
            marks = []
            for text in cell.notes:
                marks.append(next((letter for letter, note in notes.items() if note == text), _letter(len(notes))))
                notes[marks[-1]] = text
            cells.append(_cell(row, cell, places, ",".join(marks)))
        styled.append(cells)
    return styled, notes


def _cell(row: Row, cell: Filled, places: int, mark: str) -> Styled:
    if row.full_precision and cell.value is None:
        return Styled("", "", best=False, mark="")
    if cell.value is None:
        return Styled(ABSENT.get(cell.state, ""), "", best=False, mark=mark)
    value = _number(cell.value, places)
    if cell.delta is not None:
        error = "" if cell.delta_stderr is None else f" ± {_number(cell.delta_stderr, places)}"
        delta = f"{_number(cell.delta, places, sign='+')}{error}"
    else:
        delta = "" if cell.stderr is None else f"± {_number(cell.stderr, places)}"
    return Styled(value, delta, best=cell.best, mark=mark)


def _decimals(cells: Sequence[Filled]) -> int:
    """As many for a whole column as show two digits of the smaller half of its errors, or three of the smallest value
    where there are none; at most four."""
    errors = sorted(
        error
        for cell in cells
        for error in (cell.delta_stderr if cell.delta is not None else cell.stderr,)
        if error is not None and error > 0
    )
    values = [abs(cell.value) for cell in cells if cell.value]
    if errors:
        return min(4, max(0, 1 - math.floor(math.log10(errors[(len(errors) - 1) // 2]))))
    return min(4, max(0, 2 - math.floor(math.log10(min(values))))) if values else 2


def _number(value: float, places: int, sign: str = "") -> str:
    return f"{value:{sign}.2e}" if abs(value) >= _LARGE else f"{value:{sign}.{places}f}"


def _metric_of(table: FilledTable, column: int) -> str:
    """The metric of a column, where all its cells show the same or variants of it; else that it was declared with."""
    infos = infos_of(table, column)
    same = len({info.name for info in infos}) == 1
    labels = (f"{i.label if same else i.family}{f', {i.unit}' if i.unit else ''} {i.arrow}".rstrip() for i in infos)
    return " or ".join(dict.fromkeys(labels))


def legend(table: FilledTable, notes: dict[str, str], star: str = "*") -> list[str]:
    cells = [cell for row in table.rows for cell in row.cells]
    lines = [f"{star}{_LEGEND[1:]}"] if any(cell.best for cell in cells) else []
    lines += [_DELTAS] if any(cell.delta is not None for cell in cells) else []
    if any(cell.state == "stale" for cell in cells):
        lines.append("stale: only measured with an earlier version of a method, and to be run again")
    return [*lines, *table.notes, *(f"[{letter}] {note}" for letter, note in notes.items())]


def unrepeated(labels: tuple[str, ...], previous: tuple[str, ...]) -> list[str]:
    """The labels without those that the row above has already said."""
    shown = list(labels)
    for place in range(min(len(labels) - 1, len(previous))):
        if labels[place] != previous[place]:
            break
        shown[place] = ""
    return shown


def _letter(place: int) -> str:
    """a, b, … z, aa, ab, …"""
    last = chr(ord("a") + place % 26)
    return last if place < 26 else _letter(place // 26 - 1) + last


def _tex_cell(cell: Styled) -> str:
    value = tex(cell.value)
    text = rf"\textbf{{{value}}}" if cell.best else value
    text += rf" {{\scriptsize {tex(cell.delta)}}}" if cell.delta else ""
    return text + (rf"\textsuperscript{{{cell.mark}}}" if cell.mark else "")


_TEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"},
    **{">": r"\textgreater{}", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "Δ": r"$\Delta$"},
    **{"α": r"$\alpha$", "–": "--", "…": r"\dots{}", "→": r"$\to$", "×": r"$\times$", "‖": r"$\Vert$", "|": r"$\vert$"},
}


def tex(text: str) -> str:
    """Text as LaTeX."""
    return "".join(_TEX.get(char, char) for char in text)


def md(text: str) -> str:
    """Text as Markdown."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
