"""A sweep: plan all points, run what is missing, end with a table and a figure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qbench.compose import Point, SweepOptions, baseline, evaluations_of, freeze, sweep_options
from qbench.errors import SpecError
from qbench.evaluation.base import Evaluation
from qbench.progress import SweepProgress
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.records import RunRow

if TYPE_CHECKING:
    from qbench.session import Session

State = Literal["done", "missing", "to measure", "to export", "failed before", "running"]

#: Seconds between looks at points that another process is working on.
POLL_S = 2.0

#: Width of what is written to a file or a pipe.
LOG_COLUMNS = 120


@dataclass(frozen=True)
class Planned:
    """A point and what the database has of it."""

    point: Point
    state: State
    row: RunRow | None
    missing: tuple[Evaluation, ...]


def run_sweep(configs: Sequence[DictConfig]) -> int:
    """Carry out the points of a sweep and the baselines they need; returns the exit code (1: some failed).

    Raises SpecError or AssetError for anything that can be refused before the first point starts.
    """
    options = _shared_options(configs)
    return run_points(with_baselines([freeze(config) for config in configs]), options)


def measure_rows(rows: Sequence[RunRow], config: DictConfig, named: Path, store_url: str) -> int:
    """Take the measurements that `config.eval` asks for of finished runs, and of their baselines; the exit code.

    `named` is the folder of named models. Raises SpecError or AssetError for a run that cannot be rebuilt.
    """
    from qbench.rebuild import means, rebuilt

    unfinished = next((row for row in rows if row.status != "done"), None)
    if unfinished is not None:
        raise SpecError("run", unfinished.id, f"a finished run; this one is {unfinished.status}")
    options = replace(sweep_options(config), store_url=store_url)
    evaluations = evaluations_of(OmegaConf.to_container(config.eval, resolve=True), "memory")
    return run_points(with_baselines([rebuilt(row, evaluations, means(row, config, named)) for row in rows]), options)


def run_points(
    points: Sequence[Point], options: SweepOptions, *, summary: bool = True, deadline: float | None = None
) -> int:
    """Carry out the points, each given once, as far as the database lacks them; the exit code.

    `summary`: end with the table and figures of a sweep. `deadline` (of `time.monotonic`): from then on none is
    started.
    """
    console = Console()
    if not console.is_terminal:  # a log file has no width of its own
        console = Console(width=LOG_COLUMNS)
    with Database(options.store_url) as database:
        plan = [look_up(point, database) for point in points]
        waiting = [planned for planned in plan if planned.state != "done"]
        session = _checked_session(waiting, console) if waiting else None
        print_plan(console, plan, options)
        if options.dry_run:
            return 0
        failures: dict[str, BaseException] = {}
        if session is not None:
            failures = _work(waiting, len(plan), session, database, options, console, deadline)
        if summary:
            return summarize(points, database, options, console, failures)
        return 1 if failures else 0


def with_baselines(points: Sequence[Point]) -> list[Point]:
    """The points, `merged`, after the full-precision points they are compared with."""
    return merged([*(each for each in map(baseline, points) if each.evaluations), *points])


def merged(points: Sequence[Point]) -> list[Point]:
    """The points, each once with all that is to be measured of it."""
    unique: dict[tuple, Point] = {}
    for point in points:
        identity = (point.spec.key(), str(point.export))
        known = unique.get(identity)
        unique[identity] = point if known is None else _with_evaluations(known, point.evaluations)
    for key, target in list(unique):  # what is exported need not be made once more without
        if target != "None" and (key, "None") in unique:
            exported = unique[key, target]
            unique[key, target] = _with_evaluations(exported, unique.pop((key, "None")).evaluations)
    exports = [point.export for point in unique.values() if point.export is not None]
    if len(set(exports)) < len(exports):
        raise SpecError(
            "export.path", exports[0], "a folder per point, for instance export.path='out/${algo.name}-${bits}'"
        )
    return list(unique.values())


def _with_evaluations(point: Point, more: Sequence[Evaluation]) -> Point:
    present = {evaluation.spec.key() for evaluation in point.evaluations}
    added = tuple(evaluation for evaluation in more if evaluation.spec.key() not in present)
    return replace(point, evaluations=point.evaluations + added)


def look_up(point: Point, database: Database) -> Planned:
    row = database.find([point.spec.key()]).get(point.spec.key())
    if row is None:
        return Planned(point, "missing", None, point.evaluations)
    if row.status == "failed":
        return Planned(point, "failed before", row, point.evaluations)
    if row.status == "running":
        return Planned(point, "running", row, point.evaluations)
    measured = database.measured(row.id)
    missing = tuple(each for each in point.evaluations if each.spec.key() not in measured)
    if missing:
        return Planned(point, "to measure", row, missing)
    if point.export is not None and not _exported(point, row, database):
        return Planned(point, "to export", row, ())
    return Planned(point, "done", row, ())


def _exported(point: Point, row: RunRow, database: Database) -> bool:
    """Whether the folder still holds exactly what this run wrote there."""
    from qbench.export.artifact import describe

    if not point.export.is_dir():
        return False
    return describe(point.export).sha256 in {a.sha256 for a in queries.artifacts(database, row.id)}


def print_plan(console: Console, plan: Sequence[Planned], options: SweepOptions) -> None:
    """What the sweep consists of, what is done, and what all points share."""
    shared, varying = _split_settings([p.point for p in plan])
    table = Table(title=f"Plan: {len(plan)} points, {sum(p.state == 'done' for p in plan)} done", title_justify="left")
    for column in ("point", *varying, "state", "key"):
        table.add_column(column, overflow="fold")
    for planned in plan:
        settings = _settings(planned.point)
        table.add_row(
            planned.point.label,
            *(settings.get(name, "") for name in varying),
            planned.state,
            planned.point.spec.key()[:12],
        )
    console.print(table)
    for name, value in shared.items():
        console.print(f"  {name}: {value}", highlight=False)
    console.print(f"  store: {options.store_url}", highlight=False)
    if all(planned.state == "done" for planned in plan):
        console.print("Nothing to do: every point is in the database.")


def _checked_session(waiting: Sequence[Planned], console: Console) -> Session:
    """A session in which everything that can be refused without weights has been looked at: sizes, texts, context."""
    from qbench.session import Session  # imports transformers: only if something has to run

    session = Session()
    console.print("Checking configurations and texts ...", highlight=False)
    for planned in waiting:
        session.preflight(planned.point)
    return session


def _work(
    waiting: Sequence[Planned],
    total: int,
    session: Session,
    database: Database,
    options: SweepOptions,
    console: Console,
    deadline: float | None = None,
) -> dict[str, BaseException]:
    """Run what is missing, until the deadline; returns the failures by key."""
    from qbench.run import execute, measure_again

    resume_root = options.results / "resume"
    failures: dict[str, BaseException] = {}
    with SweepProgress(console, total, total - len(waiting)) as progress:
        while waiting:
            busy = []
            for place, planned in enumerate(waiting):
                if deadline is not None and time.monotonic() >= deadline:
                    left = len(waiting) - place + len(busy)
                    console.print(f"time is up: {left} of {total} points are left for another time", highlight=False)
                    return failures
                point = planned.point
                key = point.spec.key()
                now = look_up(point, database)
                if now.state == "done":
                    progress.finish(point, None)
                    continue
                progress.start(point)
                if now.state in ("to measure", "to export"):
                    error = None
                    try:
                        measure_again(point, now.row, now.missing, session, database, resume_root, progress.phase)
                    except Exception as caught:  # one point's failure must not end the sweep; it is reported below
                        error = caught
                else:
                    result, error = execute(point, session, database, resume_root, progress.phase)
                    if result == "busy":
                        busy.append(planned)
                        continue
                if error is not None:
                    failures[key] = error
                progress.finish(point, error)
            waiting = busy
            if busy:
                progress.wait(busy[0].point)
                time.sleep(POLL_S)
    return failures


def summarize(
    points: Sequence[Point],
    database: Database,
    options: SweepOptions,
    console: Console,
    failures: dict[str, BaseException],
) -> int:
    """Print the table, write the figures, and say which points failed."""
    from analysis.pareto import pareto_figures
    from analysis.tables.sweep import sweep_table
    from analysis.tables.terminal import Rendered

    keys = [point.spec.key() for point in points]
    evaluations = list(dict.fromkeys(each.spec.key() for point in points for each in point.evaluations))
    table = sweep_table(database, keys, evaluations)
    console.print(Rendered(table))
    for path in pareto_figures(table, options.results):
        console.print(f"  wrote {path}", highlight=False, soft_wrap=True)
    rows = database.find(keys)
    failed = [row for row in rows.values() if row.status == "failed"]
    for row in failed:
        console.print(f"  trace of run {row.id}: qbench show {row.id} --store {options.store_url}", highlight=False)
    for point in points:  # a measurement of a finished run that failed leaves the row as it was
        key = point.spec.key()
        if key in failures and rows[key].status == "done":
            line = f"[red]failed[/] {escape(point.label)}: {escape(str(failures[key]))}"
            console.print(line, highlight=False, soft_wrap=True)
    console.print(f"  rows in {options.store_url}", highlight=False, soft_wrap=True)
    return 1 if failed or failures else 0


def _shared_options(configs: Sequence[DictConfig]) -> SweepOptions:
    options = [sweep_options(config) for config in configs]
    if len(set(options)) > 1:
        raise SpecError("store.url, results, dry_run", "several values", "one value for the whole sweep")
    return options[0]


def _settings(point: Point) -> dict[str, str]:
    """What a reader wants to know of a point, as text."""
    spec = point.spec
    settings = {
        "model": f"{spec.model.name} ({spec.model.dtype}, {point.model.served_by})",
        "device": f"{point.device}, source={point.source}",
        "evaluation": ", ".join(
            f"{e.task} {e.protocol} ({'all' if e.n is None else e.n})"
            for e in (each.spec for each in point.evaluations)
        ),
    }
    if spec.calibration is not None:
        c = spec.calibration
        seed = "" if c.seed is None else f", seed {c.seed}"
        settings["calibration"] = f"{c.label}, {c.n} x {c.length} tokens, {c.sampler}{seed}"
    for stage in spec.pipeline:
        if stage.options:
            settings[stage.name] = ", ".join(f"{name}={value}" for name, value in stage.options)
    return settings


def _split_settings(points: Sequence[Point]) -> tuple[dict[str, str], list[str]]:
    """Settings that all points that have them share, and the names of the others."""
    values: dict[str, set[str]] = {}
    for point in points:
        for name, value in _settings(point).items():
            values.setdefault(name, set()).add(value)
    shared = {name: next(iter(found)) for name, found in values.items() if len(found) == 1}
    return shared, [name for name in values if name not in shared]
