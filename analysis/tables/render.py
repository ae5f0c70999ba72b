"""One table in many forms: LaTeX (booktabs), Markdown, HTML, CSV, and for a terminal.

A `Plain` table is text that is already rounded and worded, plus a frame with the exact numbers for CSV. Texts may come
from a database: every form escapes what would otherwise be markup.
"""

import html as html_text
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "×": r"$\times$", "Δ": r"$\Delta$", "α": r"$\alpha$", "χ": r"$\chi$", "²": r"$^2$"},
    **{"↓": r"$\downarrow$", "↑": r"$\uparrow$", "←": r"$\leftarrow$", "→": r"$\rightarrow$"},
    **{"≥": r"$\geq$", "≤": r"$\leq$", "≈": r"$\approx$", "−": "$-$", "–": "--", "…": r"\dots{}", "·": r"$\cdot$"},
    **{"<": "$<$", ">": "$>$"},
}
_VERDICTS = ("standing", "verdict")
_FOLDED = 30  # letters of a column of texts, at least
_GAP, _INDENT, _DOT = 2, 4, " · "
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~#])")


@dataclass(frozen=True)
class Entry:
    """One cell: text, whether it stands out, and the numbers of its footnotes."""

    text: str = ""
    bold: bool = False
    notes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A table as text. `numeric` columns are set to the right; `groups` [rows] (or empty) name the part of the table
    that a row belongs to, each of which gets a line between rules; `footnotes` are (number, text); `frame` holds the
    exact numbers, one row per row. Without rows `caption` says what is missing."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    caption: str
    numeric: tuple[bool, ...] = ()
    groups: tuple[str, ...] = ()
    footnotes: tuple[tuple[int, str], ...] = ()
    frame: pd.DataFrame = field(default_factory=pd.DataFrame, compare=False)

    def parts(self) -> Iterator[tuple[str, tuple[tuple[Entry, ...], ...]]]:
        """(group, its rows) in order; one part without a name where there are no groups."""
        names = self.groups or ("",) * len(self.rows)
        for name in dict.fromkeys(names):
            yield name, tuple(row for row, own in zip(self.rows, names, strict=True) if own == name)

    def is_numeric(self, column: int) -> bool:
        return bool(self.numeric) and self.numeric[column]


#: Around a tabular: its own width, or the line's where that is less.
TEX_FITTED = (r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%", "}")
_PAGE_ROWS = 45
_OFF_PAPER = ("runs", "peak MB")  # columns
_LINE = 36  # letters of a cell beyond which it is broken into lines
#: Room between a caption and the table below it: classes such as `article` expect captions below.
TEX_GAP = r"\setlength{\belowcaptionskip}{6pt}"


def latex(table: Plain, label: str = "") -> str:
    """A `table` environment for a document with \\usepackage{booktabs,graphicx}.

    Where there are more than 45 rows a `longtable` over several pages, which needs \\usepackage{longtable} as well.
    What is of little use on paper (keys of runs, peak memory) is left to the other forms: the letters stay readable.
    """
    shown = [i for i, name in enumerate(table.columns) if name not in _OFF_PAPER]
    head = " & ".join(_tex(table.columns[i]) for i in shown) + r" \\"
    long = len(table.rows) > _PAGE_ROWS
    body = []
    for place, (name, rows) in enumerate(table.parts()):
        body += [r"\midrule"] if place or not long else []
        if name:
            words = (
                rf"\parbox[t]{{0.9\linewidth}}{{\raggedright\textit{{{_tex(name)}}}}}"
                if long
                else rf"\textit{{{_tex(name)}}}"
            )
            body += [rf"\multicolumn{{{len(shown)}}}{{l}}{{{words}}} \\"]
        body += [" & ".join(_tex_entry(row[i]) for i in shown) + r" \\" for row in rows]
    align = "".join("r" if table.is_numeric(i) else "l" for i in shown)
    named = [rf"\caption{{{_tex(table.title)}}}", *([rf"\label{{{label}}}"] if label else [])]
    below = [r"\par\smallskip\footnotesize\noindent", _tex(table.caption)]
    below += [rf"\par $^{{{number}}}$ {_tex(text)}" for number, text in table.footnotes]
    if long:
        lines = [
            "% needs booktabs and longtable",
            r"{\scriptsize\setlength{\tabcolsep}{3pt}",
            rf"\begin{{longtable}}{{{align}}}",
            *named,
            r"\\",
        ]
        for end in (r"\endfirsthead", r"\endhead"):
            lines += [r"\toprule", head, r"\midrule", end]
        return "\n".join([*lines, *body, r"\bottomrule", r"\end{longtable}", *below, r"\par}", ""])
    lines = ["% needs booktabs and graphicx", r"\begin{table}", r"\centering", TEX_GAP, *named]
    lines += [r"\setlength{\tabcolsep}{4pt}", TEX_FITTED[0], rf"\begin{{tabular}}{{{align}}}", r"\toprule", head, *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}" + TEX_FITTED[1], *below, r"\end{table}", ""])


def markdown(table: Plain) -> str:
    """A pipe table below its title; groups become a column of their own."""
    grouped = any(table.groups)
    head = [*([""] if grouped else []), *table.columns]
    rules = [
        *(["---"] if grouped else []),
        *("---:" if table.is_numeric(i) else "---" for i in range(len(table.columns))),
    ]
    lines = [f"**{_md(table.title)}**", "", _md_row(map(_md, head)), _md_row(rules)]
    for name, rows in table.parts():
        for place, row in enumerate(rows):
            first = [_md(name) if place == 0 else ""] if grouped else []
            lines.append(_md_row([*first, *map(_md_entry, row)]))
    lines += ["", _md(table.caption)]
    for number, text in table.footnotes:
        lines += ["", f"<sup>{number}</sup> {_md(text)}"]
    return "\n".join([*lines, ""])


def html(table: Plain) -> str:
    """A `<figure>` with the table, without styles of its own."""
    escape = html_text.escape
    head = "".join(f'<th scope="col"{_align(table, i)}>{escape(name)}</th>' for i, name in enumerate(table.columns))
    lines = ["<figure>", f"<table><caption>{escape(table.title)}</caption>", f"<thead><tr>{head}</tr></thead>"]
    for name, rows in table.parts():
        lines.append("<tbody>")
        if name:
            lines.append(f'<tr><th scope="colgroup" colspan="{len(table.columns)}">{escape(name)}</th></tr>')
        for row in rows:
            cells = "".join(f"<td{_align(table, i)}>{_html_entry(entry)}</td>" for i, entry in enumerate(row))
            lines.append(f"<tr>{cells}</tr>")
        lines.append("</tbody>")
    lines += ["</table>", f"<figcaption>{escape(table.caption)}"]
    lines += [f"<br><sup>{number}</sup> {escape(text)}" for number, text in table.footnotes]
    return "\n".join([*lines, "</figcaption>", "</figure>", ""])


def csv(table: Plain) -> str:
    """The exact numbers, one line per row of the table."""
    return table.frame.to_csv(index=False)


def write(table: Plain, folder: Path, stem: str) -> list[Path]:
    """`<stem>.tex`, `.md`, `.html` and `.csv` in `folder`, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"tex": latex(table, f"tab:{stem}"), "md": markdown(table), "html": html(table), "csv": csv(table)}
    paths = []
    for suffix, text in texts.items():
        paths.append(folder / f"{stem}.{suffix}")
        paths[-1].write_text(text, encoding="utf-8")
    return paths


@dataclass(frozen=True)
class OnTerminal:
    """The table for `rich`: where it is wider than the terminal, what does not fit stands below each row."""

    table: Plain

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table, room = self.table, options.max_width
        yield Text(table.title, style="bold")
        widths = [max(map(cell_len, cells)) for cells in zip(table.columns, *_texts(table), strict=True)]
        fits = _is_within(table, widths, room)
        kept = {} if fits else _leading(table, widths, room)
        for place, (name, rows) in enumerate(table.parts()):
            if name:  # a line above each part: as a row it would widen the first column
                yield Text(name, style="italic")
            if fits:
                yield self._drawn(rows, widths, header=place == 0)
            else:
                yield from self._stacked(rows, kept, room, header=place == 0)
        yield Text(table.caption, style="italic")
        for number, text in table.footnotes:
            yield Text(f"[{number}] {text}")

    def _drawn(self, rows: Sequence[tuple[Entry, ...]], widths: Sequence[int], *, header: bool) -> Table:
        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_header=header)
        last = len(widths) - 1  # the one that may be folded: it holds texts where texts are long
        for index, (name, width) in enumerate(zip(self.table.columns, widths, strict=True)):
            right = self.table.is_numeric(index)
            drawn.add_column(
                Text(name),
                justify="right" if right else "left",
                no_wrap=right,
                overflow="fold",
                min_width=None if index == last and not right else width,
            )
        for row in rows:
            drawn.add_row(*map(_styled, row))
        return drawn

    def _stacked(
        self, rows: Sequence[tuple[Entry, ...]], kept: Mapping[int, int], room: int, *, header: bool
    ) -> Iterator[RenderableType]:
        """Rows of the columns `kept` (index to width), each above its other cells as `name value · name value`."""
        columns = self.table.columns

        def line(cells: Sequence[Text]) -> Table:
            drawn = Table.grid(padding=(0, _GAP, 0, 0))
            for index, width in kept.items():
                right = self.table.is_numeric(index)
                drawn.add_column(width=width, justify="right" if right else "left", overflow="fold")
            drawn.add_row(*(cells[index] for index in kept))
            return drawn

        yield Text()
        if header:
            yield line([Text(name, style="bold") for name in columns])
            yield Text("─" * _extent(kept.values()))
        for row in rows:
            yield line([_styled(entry) for entry in row])
            others = [(name, entry) for i, (name, entry) in enumerate(zip(columns, row, strict=True)) if i not in kept]
            said = [Text.assemble((name, "dim"), " ", _styled(entry)) for name, entry in others if entry.text]
            if said:
                yield Padding(_packed(said, room - _INDENT), (0, 0, 0, _INDENT))
        yield Text()


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """A number to so many significant digits, thousands without an exponent; empty for None and NaN."""
    if value is None or value != value:
        return ""
    text = f"{value:{'+' if sign else ''}.{digits}g}"
    if "e" in text and abs(value) < 1e9 and abs(value) >= 1:
        text = f"{value:{'+' if sign else ''}.0f}"
    return text


def with_error(value: float | None, stderr: float | None, *, sign: bool = False, least: int = 0) -> str:
    """value ± standard error with the decimals that the error has to two digits, and `least` at least below 1000."""
    if value is None or value != value:
        return ""
    if stderr is None or stderr != stderr or stderr == 0:
        return number(value, sign=sign)
    decimals = max(least if abs(value) < 1000 else 0, 1 - int(f"{stderr:.1e}".partition("e")[2]))
    return f"{value:{'+' if sign else ''}.{decimals}f} ± {stderr:.{decimals}f}"


def _texts(table: Plain) -> list[tuple[str, ...]]:
    return [tuple(map(_plain, row)) for row in table.rows]


def _plain(entry: Entry) -> str:
    return entry.text + "".join(f" [{each}]" for each in entry.notes)


def _styled(entry: Entry) -> Text:
    return Text(_plain(entry), style="bold" if entry.bold else "")


def _is_within(table: Plain, widths: Sequence[int], room: int) -> bool:
    """Whether all columns fit between the rules, the last one folded where it holds texts."""
    last = widths[-1:] if table.is_numeric(len(widths) - 1) else [min(width, _FOLDED) for width in widths[-1:]]
    return sum([*widths[:-1], *last]) + 3 * len(widths) - 1 <= room


def _leading(table: Plain, widths: Sequence[int], room: int) -> dict[int, int]:
    """Index and width of the columns that have room on a row's first line: those that name the row up to the first
    text, folded at half of the room, its verdict, then whatever fits."""
    names = next((i for i in range(len(widths)) if not table.is_numeric(i) and table.columns[i]), 0)
    first = [*range(names + 1), *(i for i, column in enumerate(table.columns) if column in _VERDICTS)]
    kept = {index: min(widths[index], room // 2) for index in first}
    for index in range(names + 1, len(widths)):
        if index not in kept and _extent([*kept.values(), widths[index]]) <= room:
            kept[index] = widths[index]
    return dict(sorted(kept.items()))


def _extent(widths: Collection[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _packed(said: Sequence[Text], room: int) -> Text:
    """The texts with dots between them, in lines that break between texts where they can."""
    lines: list[Text] = []
    for text in said:
        if lines and lines[-1].cell_len + cell_len(_DOT) + text.cell_len <= room:
            lines[-1] = Text(_DOT).join([lines[-1], text])
        else:
            lines.append(text)
    return Text("\n").join(lines)


def _tex(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in text.replace("\n", " "))


def _tex_entry(entry: Entry) -> str:
    text = _tex(entry.text)
    text = rf"\textbf{{{text}}}" if entry.bold and text else text
    if len(entry.text) > _LINE:
        text = rf"\parbox[t]{{12em}}{{\raggedright\strut {text}\strut}}"
    return text + (f"$^{{{','.join(map(str, entry.notes))}}}$" if entry.notes else "")


def _md(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text.replace("\n", " "))


def _md_entry(entry: Entry) -> str:
    text = _md(entry.text)
    text = f"**{text}**" if entry.bold and text else text
    return text + (f"<sup>{','.join(map(str, entry.notes))}</sup>" if entry.notes else "")


def _md_row(cells: Sequence[str] | Iterator[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _html_entry(entry: Entry) -> str:
    text = html_text.escape(entry.text)
    text = f"<strong>{text}</strong>" if entry.bold and text else text
    return text + (f"<sup>{','.join(map(str, entry.notes))}</sup>" if entry.notes else "")


def _align(table: Plain, column: int) -> str:
    return ' style="text-align:right"' if table.is_numeric(column) else ""
