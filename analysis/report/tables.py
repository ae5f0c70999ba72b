"""Tables as the report's page draws them: texts, marks and run numbers, never markup."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from analysis.tables import declared_text
from analysis.tables.declared import FilledTable
from analysis.tables.plain import PlainTable
from analysis.tables.render import Plain

#: Rows of one part of a table that a page shows; the command that makes the table shows all.
ROWS = 40

#: Parts of a table with many that a page shows.
PARTS = 12

#: One cell: its text, and what the page adds to it where there is anything to add.
Drawn = dict[str, Any]


def plain_table(table: Plain, command: str = "") -> Drawn:
    """Of a table of words and rounded numbers; without rows its caption says what is missing. Of a table whose
    `command` is named only the parts with the most rows are drawn, and the command is what shows all."""
    rows = []
    parts = list(table.parts())
    most = sorted(parts, key=lambda part: -len(part[1]))[: PARTS if command else None]
    shown = {name for name, _ in most}
    for name, some in parts:
        if name not in shown:
            continue
        rows += [{"group": name}] if name else []
        for row in some[:ROWS]:
            cells = [
                _cell(
                    entry.text, bold=entry.bold, notes=",".join(map(str, entry.notes)), number=table.is_numeric(place)
                )
                for place, entry in enumerate(row)
            ]
            rows.append({"cells": cells})
        rows += [{"group": f"… and {len(some) - ROWS} more"}] if len(some) > ROWS else []
    left_out = len(parts) - len(shown)
    rows += [{"group": f"… and {left_out} more parts: {command} shows all"}] if left_out else []
    head = [[_cell(name, number=table.is_numeric(place)) for place, name in enumerate(table.columns)]] if rows else []
    notes = [{"mark": str(mark), "text": text} for mark, text in table.footnotes]
    return {"title": table.title, "caption": table.caption, "head": head, "rows": rows, "notes": notes}


def words_table(table: PlainTable) -> Drawn:
    """Of a table that is drawn from the code."""
    return {
        "title": f"{table.name.upper()}. {table.title}",
        "caption": table.caption,
        "head": [[_cell(name) for name in table.header]],
        "rows": [{"cells": [_cell(text) for text in row]} for row in table.rows],
        "notes": [],
    }


def declared_table(table: FilledTable) -> Drawn:
    """Of a declared table: values with their differences from full precision below, the best marked, each cell with the
    runs that it is made of."""
    declared = table.declared
    styled, notes = declared_text.styled_cells(table)
    rows: list[Drawn] = []
    previous: tuple[str, ...] = ()
    for row, cells in zip(table.rows, styled, strict=True):
        labels = [_cell(text) for text in declared_text.unrepeated(row.labels, previous)]
        values = [
            _cell(
                cell.value,
                bold=cell.best,
                best=cell.best,
                small=cell.delta,
                notes=cell.mark,
                runs=found.run_ids,
                number=True,
                state=found.state,
            )
            for cell, found in zip(cells, row.cells, strict=True)
        ]
        rows.append({"cells": [*labels, *values], "labels": len(labels)})
        previous = row.labels
    legend = declared_text.legend(table, {})
    return {
        "title": f"{declared.name.upper()} ({declared.size}). {declared.title}",
        "caption": table.caption,
        "head": _heads(declared.row_axes, declared_text.headers(table)),
        "rows": rows,
        "notes": [{"mark": "", "text": text} for text in legend] + [{"mark": k, "text": v} for k, v in notes.items()],
    }


def _heads(row_axes: Sequence[str], headers: Sequence[tuple[str, ...]]) -> list[list[Drawn]]:
    """A line per column axis and one of metrics; equal neighbours share a cell, but for the metrics."""
    lines = []
    depth = len(headers[0]) if headers else 1
    for level in range(depth):
        last = level == depth - 1
        names = [header[level] for header in headers]
        if not any(names) and not last:
            continue
        spans = [(name, 1) for name in names] if last else [(name, len(list(same))) for name, same in groupby(names)]
        leading = [_cell(axis if last else "") for axis in row_axes]
        lines.append([*leading, *(_cell(name, number=True, span=span) for name, span in spans)])
    return lines


def _cell(text: str, **more: object) -> Drawn:
    """The text and what is not nothing of the rest; a span of one column is nothing."""
    rest = {
        name: value for name, value in more.items() if value and (name, value) not in (("span", 1), ("state", "done"))
    }
    return {"text": text, **rest}
