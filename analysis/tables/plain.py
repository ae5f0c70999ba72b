"""A table of words, without numbers or runs, in the same forms as the others."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.tables.declared_text import md, tex
from analysis.tables.render import TEX_FITTED


@dataclass(frozen=True, kw_only=True)
class PlainTable:
    """`rows` hold as many texts as the header; the first column names the row."""

    name: str
    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
        for title in self.header:
            drawn.add_column(title, overflow="fold")
        for row in self.rows:
            drawn.add_row(*map(Text, row))
        yield Text(f"{self.name.upper()}. {self.title}", style="bold")
        yield drawn
        yield Text(self.caption, style="italic")

    def texts(self) -> dict[str, str]:
        """LaTeX, Markdown and CSV by the ending of a file's name."""
        return {"tex": self._latex(), "md": self._markdown(), "csv": self._csv()}

    def _latex(self) -> str:
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{tex(f'{self.title}. {self.caption}')}}}",
            rf"\label{{tab:{self.name}}}",
            TEX_FITTED[0],
            rf"\begin{{tabular}}{{{'l' * len(self.header)}}}",
            r"\toprule",
            *(f"{' & '.join(map(tex, self.header))} \\\\", r"\midrule"),
            *(f"{' & '.join(map(tex, row))} \\\\" for row in self.rows),
            *(r"\bottomrule", r"\end{tabular}" + TEX_FITTED[1], r"\end{table}"),
        ]
        return "\n".join([*lines, ""])

    def _markdown(self) -> str:
        lines = [
            *(f"**{self.name.upper()}. {md(self.title)}.** {md(self.caption)}", ""),
            f"| {' | '.join(map(md, self.header))} |",
            f"|{'---|' * len(self.header)}",
            *(f"| {' | '.join(map(md, row))} |" for row in self.rows),
        ]
        return "\n".join([*lines, ""])

    def _csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()
