"""`qbench fill`: a declared table composed into points, what of it is missing run, and drawn."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from analysis.claims import MIXTURES
from analysis.tables import declared_text
from analysis.tables.checked import checked
from analysis.tables.declared import RUN_COLUMNS, Cell, Declared, FilledTable, Wanted
from analysis.tables.figure import write_figure
from analysis.tables.filled import filled, superseded_specs
from analysis.tables.plain import PlainTable
from qbench.checks import choice
from qbench.command import compose_one
from qbench.compose import Point, SweepOptions, baseline, freeze, sweep_options
from qbench.declaration import CellWish, Declaration, declared_names, last_wins, load, tables_dir
from qbench.errors import EvaluationError, QbenchError, SpecError
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.owner import state
from qbench.sweep import LOG_COLUMNS, look_up, merged, run_points, with_baselines
from qbench.taxonomy import taxonomy

#: Every declared table.
ALL = "all"

#: What belongs to the whole invocation and has an option of its own.
_ELSEWHERE = {"store.url": "--store", "dry_run": "--dry-run"}

#: What settings change in a run, as `analysis.claims` calls it; of a key that is not here, what its first part changes.
_VARIED = {
    **{"algo": ("algo", "options"), "scheme": ("bits", "act_bits", "kv_bits"), "dtype": ("dtype",)},
    **dict.fromkeys(("act", "act_bits"), ("act_format",)),
    **dict.fromkeys(("kv", "kv_bits"), ("kv_format",)),
    **{"calib": ("calib",), "calib.n": ("calib_n",), "calib.length": ("calib_length",)},
    **{"calib.seed": ("calib_seed",), "calib.sampler": ("calib_sampler",)},
    **{"seed": ("calib_seed",), "model": ("model", "weights")},
    **dict.fromkeys(("bits", "format", "group_size", "symmetric", "zero_point"), ("bits", "weight_format")),
    **dict.fromkeys(("reach", "scale_dtype", "tile", "partial_group", "range"), ("weight_format",)),
}

#: Points by their settings.
Made = dict[tuple[str, ...], Point]


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A declaration with the points of its cells, composed and checked; `points` has each run once per measurement."""

    declaration: Declaration
    declared: Declared
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Todo:
    """What a table's runs, full precision included, have come to: how many are in which state, and the points to run.
    Points that failed stand apart, with the measurements that failed only."""

    counts: Counter[str]
    missing: tuple[Point, ...]
    failed: tuple[Point, ...]


def main(options: argparse.Namespace) -> int:
    """`qbench fill` with its parsed arguments; the exit code (1: a run failed, 130: interrupted)."""
    given = [*options.table, *options.rest]
    settings = [each for each in given if "=" in each]
    names = [each for each in given if "=" not in each]
    if not names:
        accepted = f"one of all, {', '.join(declared_names(tables_dir()))}, or the path of a .yaml"
        raise SpecError("table", " ".join(given), accepted)
    if options.dry_run and options.render_only:
        raise SpecError("--render-only", True, "not with --dry-run, which draws nothing")
    allow = [each for each in options.allow.split(",") if each]
    for each in allow:
        choice("--allow", each, (*MIXTURES, "all"))
    deadline = None if options.limit_time is None else time.monotonic() + seconds(options.limit_time)
    try:
        return _fill(names, settings, options, allow, deadline)
    except KeyboardInterrupt:
        print("qbench: interrupted; finished runs are stored, run the command again to go on", file=sys.stderr)
        return 130


def _fill(
    names: Sequence[str],
    settings: Sequence[str],
    options: argparse.Namespace,
    allow: Sequence[str],
    deadline: float | None,
) -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"
    logging.getLogger("hydra").setLevel(logging.WARNING)
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_COLUMNS)
    for name in settings:
        if (key := name.partition("=")[0]) in _ELSEWHERE:
            raise SpecError(key, name.partition("=")[2], f"{_ELSEWHERE[key]} says that")
    if ALL in names:
        names = declared_names(tables_dir())
    declarations = [load(name, options.size) for name in dict.fromkeys(names)]
    shared = sweep_options(compose_one([each for each in settings if each.startswith("results=")]))
    shared = replace(shared, store_url=options.store, dry_run=options.dry_run)
    console.print(f"Composing {', '.join(each.name for each in declarations)} ...", highlight=False)
    made: Made = {}
    tables = [_static(each) if each.static else compose(each, settings, made) for each in declarations]  # errors early
    code = 0
    composed = [table for table in tables if isinstance(table, Composed)]
    if composed and not options.render_only:
        code = _run_missing(composed, shared, options.only_failed, deadline, console)
    for table in tables:
        if options.dry_run:
            continue
        if isinstance(table, PlainTable):
            console.print(table)
            _write(console, table.name, shared.results, table.texts())
        else:
            code = max(code, _draw(table, shared, allow, console))
    return code


def compose(declaration: Declaration, settings: Sequence[str] = (), made: Made | None = None) -> Composed:
    """Every cell composed and checked, `settings` added to all; `made` keeps points for other tables.

    Raises QbenchError, naming the cell, for what cannot be carried out.
    """
    made = {} if made is None else made
    cells: dict[tuple, Cell] = {}
    points: list[Point] = []
    for row, column, wish in declaration.cells():
        labels = tuple(level.label for level in row), tuple(level.label for level in column)
        try:
            cells[labels], own = _cell(wish, settings, made, declaration.aggregate)
        except QbenchError as error:
            raise QbenchError(f"{declaration.name}, {' / '.join(labels[0] + labels[1])}: {error}") from error
        points += own
    rows = tuple(tuple(level.label for level in place) for place in declaration.places(declaration.rows))
    columns = tuple(tuple(level.label for level in place) for place in declaration.places(declaration.columns))
    declared = Declared(
        name=declaration.name,
        size=declaration.size,
        title=declaration.title,
        caption=declaration.caption,
        row_axes=tuple(axis.name for axis in declaration.rows),
        column_axes=tuple(axis.name for axis in declaration.columns),
        rows=rows,
        columns=columns,
        cells=tuple(tuple(cells[row, column] for column in columns) for row in rows),
        aggregate=declaration.aggregate,
        best=declaration.best,
    )
    return Composed(declaration=declaration, declared=declared, points=tuple(points))


def todo(points: Sequence[Point], database: Database) -> Todo:
    """Which of these points, and of their baselines, the database lacks."""
    counts: Counter[str] = Counter()
    missing, failed = [], []
    wanted = with_baselines(points)
    stale = superseded_specs(database, [_wanted(point) for point in wanted])
    for point in wanted:
        found = look_up(point, database)
        if found.state == "done":
            counts["done"] += 1
        elif found.state == "failed before":
            counts["failed"] += 1
            failed.append(point)
        elif found.state == "to measure":
            broken = {each.spec_key for each in queries.failures(database, [found.row.id]).get(found.row.id, [])}
            again = tuple(each for each in found.missing if each.spec.key() in broken)
            rest = tuple(each for each in found.missing if each.spec.key() not in broken)
            counts["failed" if again else "missing"] += 1
            failed += [replace(point, evaluations=again)] if again else []
            missing += [replace(point, evaluations=rest)] if rest else []
        else:
            interrupted = found.state == "running" and state(found.row) == "interrupted"
            counts["stale" if point.spec.key() in stale else "missing" if interrupted else found.state] += 1
            missing.append(point)
    return Todo(counts=counts, missing=tuple(missing), failed=tuple(failed))


def varied(declaration: Declaration) -> set[str]:
    """What the axes of a table, or its repeats, change on purpose, in the words of `analysis.claims`."""
    axes = (*declaration.rows, *declaration.columns)
    settings = [setting for axis in axes for level in axis.levels for setting in level.settings]
    settings += [setting for repeat in declaration.repeat for setting in repeat]
    keys = {setting.partition("=")[0].removesuffix("+") for setting in settings}
    return {word for key in keys for word in _VARIED.get(key, _VARIED.get(key.partition(".")[0], ()))}


def seconds(text: str) -> float:
    """`30min`, `1h30min`, `90s` in seconds; SpecError for anything else."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)min)?(?:(\d+(?:\.\d+)?)s)?", text)
    if not text or found is None:
        raise SpecError("--limit-time", text, "a time such as 30min, 1h30min or 90s")
    return sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))


def _run_missing(
    tables: Sequence[Composed], options: SweepOptions, only_failed: bool, deadline: float | None, console: Console
) -> int:
    """Run what the tables lack as one sweep, so that what several of them show is quantized once; the exit code."""
    wanted: list[Point] = []
    failed = False
    for table in tables:
        declared = table.declared
        with Database(options.store_url) as database:
            cells = _filled(database, declared).counts
            found = todo(table.points, database)
        _print_counts(console, f"{declared.name} ({declared.size}), cells", cells)
        _print_counts(console, f"{declared.name} ({declared.size}), runs", found.counts)
        wanted += found.failed if only_failed else found.missing
        failed |= bool(found.failed)
    code = 0
    if failed and not only_failed:
        console.print("  what failed is not tried again, except with --only-failed", highlight=False, soft_wrap=True)
        code = 0 if options.dry_run else 1
    if not wanted:
        return code
    if deadline is not None and time.monotonic() >= deadline:
        console.print(f"  time is up: {len(merged(wanted))} points are left for another time", highlight=False)
        return code
    return max(code, run_points(merged(wanted), options, summary=False, deadline=deadline))


def _filled(database: Database, declared: Declared) -> FilledTable:
    """The table as far as the database has it; EvaluationError, naming it, where that makes no table."""
    try:
        return filled(database, declared)
    except EvaluationError as error:
        raise EvaluationError(f"{declared.name}: {error}") from error


def _draw(table: Composed, options: SweepOptions, allow: Sequence[str], console: Console) -> int:
    """Print and write the table; 1 where its cells must not stand in one table."""
    with Database(options.store_url) as database:
        try:
            found = _filled(database, table.declared)
        except EvaluationError as error:
            console.print(f"[red]not drawn[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            return 1
        try:
            found = checked(database, found, varied=varied(table.declaration), allow=allow)
        except EvaluationError as error:
            line = f"[red]not drawn[/] {table.declared.name}: {escape(str(error))}; --allow draws it with footnotes"
            console.print(line, highlight=False, soft_wrap=True)
            return 1
    console.print(declared_text.Rendered(found))
    texts = {"tex": declared_text.latex(found), "md": declared_text.markdown(found)}
    texts["csv"] = declared_text.frame(found).to_csv(index=False)
    stem = f"{table.declared.name}-{table.declared.size}"
    _write(console, stem, options.results, texts)
    for path in write_figure(found, options.results / "tables" / stem):
        console.print(f"  wrote {path}", highlight=False, soft_wrap=True)
    return 0


def _static(declaration: Declaration) -> PlainTable:
    return taxonomy(declaration.name, declaration.title, declaration.caption, declaration.static)


def _write(console: Console, stem: str, results: Path, texts: dict[str, str]) -> None:
    folder = results / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in texts.items():
        path = folder / f"{stem}.{suffix}"
        path.write_text(text, encoding="utf-8")
        console.print(f"  wrote {path}", highlight=False, soft_wrap=True)


def _print_counts(console: Console, what: str, counts: Counter[str]) -> None:
    parts = [f"{number} {name}" for name, number in counts.items() if number]
    console.print(f"{what}: {', '.join(parts) or 'none'}", highlight=False, soft_wrap=True)


def _cell(wish: CellWish, settings: Sequence[str], made: Made, aggregate: str) -> tuple[Cell, list[Point]]:
    if wish.reason is not None:
        return Cell(metric=wish.metric, reason=wish.reason), []
    points = []
    for repeat in wish.repeats:
        arguments = last_wins([*repeat, *settings])
        if arguments not in made:
            made[arguments] = freeze(compose_one(list(arguments)))
        points.append(made[arguments])
    if wish.metric[0] not in RUN_COLUMNS:
        _check_metric(wish, points, aggregate)
    return Cell(metric=wish.metric, wanted=tuple(map(_wanted, points))), points


def _check_metric(wish: CellWish, points: Sequence[Point], aggregate: str) -> None:
    """SpecError for metrics that no evaluation of the cell gives, and for several values without a mean.

    What an evaluation gives that follows from its tasks is known only when it has been measured.
    """
    given = [each.metrics for point in points for each in point.evaluations]
    wanted = {name.partition(",")[0] for name in wish.metric}
    if None not in given and not any(wanted.intersection(each) for each in given):
        names = dict.fromkeys(name for each in given for name in each)
        accepted = f"one of {', '.join((*names, *RUN_COLUMNS))}"
        raise SpecError("metric", " or ".join(wish.metric), accepted)
    values = sum(each is None or bool(wanted.intersection(each)) for each in given)
    if aggregate == "none" and values > 1 and (None not in given or len(points) > 1):
        raise SpecError("aggregate", aggregate, f"mean: a cell has {values} values of {' or '.join(wish.metric)}")


def _wanted(point: Point) -> Wanted:
    return Wanted(
        key=point.spec.key(),
        baseline=baseline(point).spec.key(),
        spec_keys=tuple(each.spec.key() for each in point.evaluations),
        spec=point.spec.describe(),
    )
