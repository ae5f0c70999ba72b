"""`qbench compare` on a terminal: `rich.print(RenderedComparison(comparison))`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.compare import Comparison, costs

_COST_TITLES = {
    "bits_per_weight": ("bits/weight", 1.0, ".3f"),
    "bits_per_weight_model": ("bits/parameter, whole model", 1.0, ".3f"),
    "model_bytes": ("model MB", 1e6, ".1f"),
    "load_s": ("load s", 1.0, ".1f"),
    "quantize_s": ("quantize s", 1.0, ".1f"),
    "evaluate_s": ("evaluate s", 1.0, ".1f"),
    "peak_host_bytes": ("peak MB", 1e6, ".0f"),
    "peak_device_bytes": ("GPU MB", 1e6, ".0f"),
}
_COLOURS = {"A": "green", "B": "red"}


@dataclass(frozen=True)
class RenderedComparison:
    """Metrics with their tests, what the verdicts mean in full, sizes and costs, settings, and what is missing."""

    comparison: Comparison
    heading: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        found = self.comparison
        for side, run, label in zip("AB", (found.a, found.b), found.labels, strict=True) if self.heading else ():
            yield Text(f"{side}: run {run.id}, {label} ({run.model}, key {run.key[:12]})", style="bold")
        if found.rows:
            yield from self._metrics()
        else:
            yield Text("no metric that both runs have under the same protocol")
        yield difference_table("sizes and costs", _cost_rows(found))
        if found.settings:
            yield difference_table("settings that differ", found.settings)
        for what, reason in found.refused:
            yield Text(f"not compared: {what}: {reason}", style="yellow")
        for each in found.lacking:
            other = {"A": "B", "B": "A"}[each.has]
            yield Text(f"only {each.has} has {each.what}; for {other}: {each.command}")

    def _metrics(self) -> Iterator[RenderableType]:
        found = self.comparison
        share = f"{100 * (1 - found.alpha):g}"
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
        table.add_column("metric", overflow="fold")
        for title in ("A ± SE", "B ± SE", f"A − B ± SE\n{share} % interval"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("test\nitems", no_wrap=True)
        table.add_column("p\nHolm", justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for row in found.rows:
            digits = _decimals(row.stderr, row.difference)
            ends = "" if row.low is None else f"{row.low:+.{digits}f} … {row.high:+.{digits}f}"
            table.add_row(
                f"{row.task}\n{row.metric.label} {row.metric.arrow}".rstrip(),
                _with_error(row.a, row.a_stderr),
                _with_error(row.b, row.b_stderr),
                f"{_with_error(row.difference, row.stderr, sign='+')}\n{ends}",
                f"{row.test or 'none'}\nn = {row.n}" + (f" in {row.clusters}" if row.clusters is not None else ""),
                f"{_p(row.p)}\n{_p(row.p_holm)}",
                Text(row.outcome, style=_COLOURS.get(row.outcome[0], "") if "better" in row.outcome else ""),
            )
        yield table
        for row in found.rows:
            if row.verdict != row.outcome:
                yield Text(f"{row.task} {row.metric.label} ({row.protocol}): {row.verdict}")
        for row in found.rows:
            if row.noise is not None:
                times = f"{abs(row.difference) / row.noise:.1f} × the noise floor"
                yield Text(f"{row.task} {row.metric.label}: |A − B| is {times} ({row.noise:.2g})")
        for row in found.rows:
            if row.flips is not None and row.flips.discordant:
                flips = f"right only in A {row.flips.only_first}, only in B {row.flips.only_second}"
                yield Text(f"{row.task} {row.metric.label}: {flips}, in both {row.flips.both}")


def _cost_rows(found: Comparison) -> list[tuple[str, str, str]]:
    of_a, of_b, rows = costs(found.a), costs(found.b), []
    for name, (title, unit, form) in _COST_TITLES.items():
        values = [of[name] for of in (of_a, of_b)]
        if any(values):
            rows.append((title, *("" if each is None else f"{each / unit:{form}}" for each in values)))
    if found.a.environment_id != found.b.environment_id:
        rows.append(("seconds and memory", "of different environments:", "do not compare"))
    return rows


def difference_table(title: str, rows: Sequence[tuple[str, object, object]]) -> Table:
    """(what, A's, B's) in three columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column(title, overflow="fold")
    for side in "AB":
        table.add_column(side, justify="right", overflow="fold")
    for what, *values in rows:
        table.add_row(Text(what), *(Text(short_setting(value)) for value in values))
    return table


def _decimals(stderr: float | None, value: float) -> int:
    """As many as show two digits of the standard error, or four of a value without one; at most six."""
    scale = stderr or abs(value) / 100 or 1.0
    return min(6, max(0, 1 - math.floor(math.log10(scale))))


def _with_error(value: float, stderr: float | None, sign: str = "") -> str:
    decimals = _decimals(stderr, value)
    text = f"{value:{sign}.{decimals}f}"
    return text if stderr is None else f"{text} ± {stderr:.{decimals}f}"


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 1e-6" if value < 1e-6 else f"{value:.2g}"


def short_setting(value: object) -> str:
    """A setting in one cell: the plain values of a mapping as name=value, without versions; "" for what is absent."""
    if isinstance(value, Mapping):
        inner = [(name, short_setting(item)) for name, item in value.items() if name not in ("version", "fingerprint")]
        plain = [f"{name}={text}" if not isinstance(value[name], Mapping) else text for name, text in inner if text]
        text = ", ".join(plain) or "yes"
    else:
        text = "" if value is None or value == [] else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
