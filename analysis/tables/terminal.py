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


@dataclass(frozen=True)
class Rendered:
    """The table, its caption, and what failed and why.

    On a terminal too narrow for all evaluations side by side they follow one below the other; nothing is cut.
    """

    table: SweepTable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        frame, evaluations = self.table.frame, self.table.evaluations
        whole = _drawn(frame, evaluations, costs=True)
        if (
            len(evaluations) < 2
            or Measurement.get(console, options.update(max_width=10_000), whole).maximum <= options.max_width
        ):
            yield whole
        else:
            for position, each in enumerate(evaluations):
                yield _drawn(frame, [each], costs=position == 0)
        yield Text(self.table.caption, style="italic")
        for _, row in frame[frame["status"] == "failed"].iterrows():
            yield Text(f"failed: {row['label']}: {row['error']}", style="red", no_wrap=True, overflow="ignore")


def _drawn(frame: pd.DataFrame, evaluations: Sequence[Evaluation], *, costs: bool) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
    drawn.add_column("\npoint", overflow="fold")
    for each in evaluations:
        drawn.add_column(f"{each.label}\nPPL ± SE ↓", justify="right", no_wrap=True)
        drawn.add_column("\nΔ ± paired SE", justify="right", no_wrap=True)
    has_device = bool(frame["peak_device_bytes"].fillna(0).gt(0).any())
    if not evaluations:
        drawn.add_column("\nstatus")
    if costs:
        for title in ("bits/\nweight", "quantize\ns", "peak\nMB", *(["GPU\nMB"] if has_device else [])):
            drawn.add_column(title, justify="right", no_wrap=True)
    for _, row in frame.iterrows():
        undone = Text(row["status"], style="red") if row["status"] != "done" else None
        cells: list[RenderableType] = [Text(row["label"])]
        for position, each in enumerate(evaluations):
            value = _with_error(row[f"ppl {each.label}"], row[f"ppl_stderr {each.label}"])
            cells.append(undone if undone is not None and position == 0 else value)
            cells.append(_with_error(row[f"delta {each.label}"], row[f"delta_stderr {each.label}"], sign="+"))
        if not evaluations:
            cells.append(undone or row["status"])
        if costs:
            cells += [_number(row["bits_per_weight"], ".3f"), _number(row["quantize_s"], ".1f")]
            cells.append(_number(row["peak_host_bytes"] / 1e6, ".0f"))
            if has_device:
                cells.append(_number(row["peak_device_bytes"] / 1e6, ".0f"))
        drawn.add_row(*cells)
    return drawn


def _with_error(value: float, stderr: float, sign: str = "") -> str:
    """Value ± standard error, with as many decimals as suit the value; thousands as k, millions as M."""
    if math.isnan(value):
        return ""
    size = abs(value)
    if size < 1e3:
        unit, form, suffix = 1.0, ".2f", ""
    elif size < 1e5:
        unit, form, suffix = 1.0, ".0f", ""
    else:
        unit, form, suffix = (1e3, ".0f", "k") if size < 1e7 else (1e6, ".3g", "M")
    text = f"{value / unit:{sign}{form}}{suffix}"
    return text if math.isnan(stderr) else f"{text} ± {stderr / unit:{form}}{suffix}"


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"
