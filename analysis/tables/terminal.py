"""A sweep's table on a terminal: `rich.print(Rendered(table))`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from analysis.tables.sweep import Evaluation, SweepTable

_SIDE_BY_SIDE = 4  # metrics beyond which a reader loses the line


@dataclass(frozen=True)
class Rendered:
    """The table, its caption, and what failed and why.

    On a terminal too narrow for all metrics side by side, or with very many, the rest follow below; nothing is cut.
    """

    table: SweepTable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        frame = self.table.frame
        wide = options.update(max_width=10_000)
        yield from _tables(frame, self.table.evaluations, console, wide, options.max_width)
        yield Text(self.table.caption, style="italic")
        if any(frame[each.noise].notna().any() for each in self.table.evaluations):
            yield Text("(×) difference in units of the noise floor: what seeds, batch sizes and threads alone change")
        if any(frame[each.best].any() for each in self.table.evaluations):
            yield Text("* best of the quantized points, or not distinguishable from it (paired, Holm, α = .05)")
        for _, row in frame[frame["status"] == "failed"].iterrows():
            yield Text(f"failed: {row['label']}: {row['error']}", style="red", no_wrap=True, overflow="ignore")


def _tables(
    frame: pd.DataFrame, evaluations: Sequence[Evaluation], console: Console, wide: ConsoleOptions, width: int
) -> Iterator[Table]:
    """As few tables as hold all metrics, the costs in the first; each holds one metric at least."""
    rest = list(evaluations)
    costs = True
    while rest or costs:
        for count in range(min(len(rest), _SIDE_BY_SIDE), -1, -1):
            drawn = _drawn(frame, rest[:count], costs=costs)
            if count <= 1 or Measurement.get(console, wide, drawn).maximum <= width:
                break
        yield drawn
        rest, costs = rest[count:], False


def _drawn(frame: pd.DataFrame, evaluations: Sequence[Evaluation], *, costs: bool) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
    drawn.add_column("\npoint", overflow="fold")
    columns: list[list[str]] = []
    for each in evaluations:
        unit = f", {each.metric.unit}" if each.metric.unit else ""
        title = f"{each.metric.label}{unit} ± SE {each.metric.arrow}".rstrip()
        drawn.add_column(f"{each.label}\n{title}", justify="right", no_wrap=True)
        columns.append(_marked(_with_errors(frame[each.value], frame[each.stderr]), frame[each.best]))
        if not each.metric.against_full and frame[each.delta].notna().any():
            drawn.add_column("\nΔ ± paired SE", justify="right", no_wrap=True)
            deltas = _with_errors(frame[each.delta], frame[each.delta_stderr], sign="+")
            columns.append(_in_noise(deltas, frame[each.delta] / frame[each.noise]))
    has_device = bool(frame["peak_device_bytes"].fillna(0).gt(0).any())
    if not evaluations:
        drawn.add_column("\nstatus")
    if costs:
        for title in ("bits/\nweight", "quantize\ns", "peak\nMB", *(["GPU\nMB"] if has_device else [])):
            drawn.add_column(title, justify="right", no_wrap=True)
    for position, (_, row) in enumerate(frame.iterrows()):
        undone = Text(row["status"], style="red") if row["status"] != "done" else None
        cells: list[RenderableType] = [Text(row["label"]), *(column[position] for column in columns)]
        if evaluations and undone is not None:
            cells[1] = undone
        if not evaluations:
            cells.append(undone or row["status"])
        if costs:
            cells += [_number(row["bits_per_weight"], ".3f"), _number(row["quantize_s"], ".1f")]
            cells.append(_number(row["peak_host_bytes"] / 1e6, ".0f"))
            if has_device:
                cells.append(_number(row["peak_device_bytes"] / 1e6, ".0f"))
        drawn.add_row(*cells)
    return drawn


def _with_errors(values: pd.Series, stderrs: pd.Series, sign: str = "") -> list[str]:
    """A column of values ± standard errors with as many decimals as suit most of them, at least two."""
    spread = stderrs[stderrs > 0]
    smallest = spread.median() if len(spread) else values.abs().median() / 100
    decimals = 2
    if smallest > 0 and values.abs().median() < 10:
        decimals = min(6, max(2, 1 - math.floor(math.log10(smallest))))
    return [_with_error(value, stderr, decimals, sign) for value, stderr in zip(values, stderrs, strict=True)]


def _with_error(value: float, stderr: float, decimals: int, sign: str) -> str:
    """Value ± standard error; thousands as k, millions as M."""
    if math.isnan(value):
        return ""
    size = abs(value)
    if size < 1e3:
        unit, form, suffix = 1.0, f".{decimals}f", ""
    elif size < 1e5:
        unit, form, suffix = 1.0, ".0f", ""
    else:
        unit, form, suffix = (1e3, ".0f", "k") if size < 1e7 else (1e6, ".3g", "M")
    text = f"{value / unit:{sign}{form}}{suffix}"
    return text if math.isnan(stderr) else f"{text} ± {stderr / unit:{form}}{suffix}"


def _marked(cells: Sequence[str], best: Sequence[bool]) -> list[str]:
    """A column with an asterisk behind the best, numbers still one below the other."""
    if not any(best):
        return list(cells)
    return [cell and f"{cell}{'*' if marked else ' '}" for cell, marked in zip(cells, best, strict=True)]


def _in_noise(cells: Sequence[str], times: pd.Series) -> list[str]:
    """A column of differences with their size in units of the noise floor behind, where that is known."""
    behind = ["" if math.isnan(each) else f" ({abs(each):.1f}×)" for each in times]
    width = max(map(len, behind), default=0)
    return [cell and cell + noise.rjust(width) for cell, noise in zip(cells, behind, strict=True)]


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"
