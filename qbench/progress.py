"""Progress of a sweep on a terminal: points, blocks and windows, each with its remaining time."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qbench.compose import Point

UNITS = {"quantize": "blocks", "evaluate": "items"}


class SweepProgress:
    """Bars for the sweep and for the phase that runs; a line for every point that ends."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._sweep = self._bars.add_task("sweep", total=total, completed=done, unit="points")
        self._phase = self._bars.add_task("", total=None, visible=False, unit="")
        self._name, self._started = "", 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, point: Point) -> None:
        self._name, self._started = "load", time.monotonic()
        self._bars.reset(self._phase, description=f"{point.label}: load", total=None, visible=True, unit="")

    def phase(self, name: str, done: float, total: int, note: str = "") -> None:
        """One step of a phase of the running point; note: what else there is to say, such as a loss."""
        label = self._bars.tasks[self._phase].description.partition(":")[0]
        if name != self._name or done == 1:
            unit = UNITS.get(name.partition(" ")[0], "")
            self._bars.reset(self._phase, description=f"{label}: {name}", total=total, unit=unit)
            self._name = name
        description = f"{label}: {name}{f' ({note})' if note else ''}"
        self._bars.update(self._phase, completed=done, total=total, description=description)

    def wait(self, point: Point) -> None:
        self._bars.update(self._phase, description=f"{point.label}: another process is at it", total=None)

    def finish(self, point: Point, error: BaseException | None) -> None:
        """A point ended: say so and move the sweep's bar."""
        self._bars.advance(self._sweep)
        self._bars.update(self._phase, visible=False)
        seconds = time.monotonic() - self._started if self._started else 0.0
        if error is None:
            self._bars.console.print(f"[green]done[/]   {point.label} ({seconds:.0f} s)", highlight=False)
        else:
            text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            line = f"[red]failed[/] {escape(point.label)}: {escape(text)}"
            self._bars.console.print(line, highlight=False, soft_wrap=True)
