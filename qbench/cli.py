"""`qbench ls` and `qbench show`: a look into a results database from the shell. Each is thin over
`store.queries`."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.commands import add_commands
from analysis.drilldown import add_commands as add_drilldown
from qbench.errors import AssetError, QbenchError, SpecError
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.owner import state
from qbench.store.records import LayerMetric, MetricRow, RunRow

DEFAULT_STORE = "sqlite:///results/results.db"
STATUSES = ("running", "done", "failed")
_WORST_LAYERS = 10
_FILE_COLUMNS = 120


class _OneLineParser(argparse.ArgumentParser):
    """Raises bad arguments as an error, so that they are reported like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise QbenchError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of a command (None: of this process's arguments): 2, and one line, for bad input."""
    try:
        parser = _parser()
        options, rest = parser.parse_known_args(argv)
        takes_more = options.command in (_evaluate, _fill)
        if rest and (not takes_more or any(each.startswith("-") for each in rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.rest = rest  # argparse takes no more positional arguments once an option has come
        if options.command in (_doctor, _fill, _findings):  # they don't need a database to be there
            return options.command(options)
        out = getattr(options, "out", None)
        if out is not None and options.command not in (_report, _export):  # which write a file, and say it themselves
            _require_folder(out)
        with Database(options.store, create=options.command is _merge) as database:
            return options.command(database, options)
    except QbenchError as error:
        print(f"qbench: {error}", file=sys.stderr)
        return 2


def _require_folder(out: Path) -> None:
    """AssetError for a folder that cannot be made or written to, before any work is done for it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(f"--out={out}: {error.strerror or error}; name a folder that you can write to") from error
    if not os.access(out, os.W_OK):
        raise AssetError(f"--out={out}: not writable; name a folder that you can write to")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="qbench", description="Look at the runs of a results database.")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--store", metavar="URL", default=DEFAULT_STORE, help="default: %(default)s")
    shared.add_argument("--json", action="store_true", help="machine-readable output")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_OneLineParser)

    listing = commands.add_parser("ls", parents=[shared], help="list runs, oldest first")
    listing.add_argument("--algo", help="only this algorithm (none: full precision)")
    listing.add_argument("--model", help="only this model")
    listing.add_argument("--status", choices=STATUSES, help="only runs of this status")
    listing.add_argument("--all", action="store_true", help="also attempts that a later one superseded")
    listing.set_defaults(command=_list)

    showing = commands.add_parser("show", parents=[shared], help="show all of a run")
    showing.add_argument("run", help="id, or the beginning of the key")
    showing.set_defaults(command=_show)

    comparing = commands.add_parser("compare", parents=[shared], help="compare two runs metric by metric")
    for name in ("a", "b"):
        comparing.add_argument(name, metavar=name.upper(), help="id, or the beginning of the key")
    comparing.add_argument(
        "--alpha", type=float, default=0.05, help="significance level after Holm's correction; default: %(default)s"
    )
    comparing.add_argument(
        "--margin", type=float, metavar="SHARE", help="test equivalence within this share of B's value (0.01: 1 %%)"
    )
    comparing.add_argument(
        "--bootstrap", type=int, metavar="N", help="paired bootstrap of N resamples instead of t and McNemar's test"
    )
    comparing.set_defaults(command=_compare)

    measuring = commands.add_parser("eval", help="measure finished runs again, with other evaluations")
    measuring.add_argument("--store", metavar="URL", default=DEFAULT_STORE, help="default: %(default)s")
    measuring.add_argument("run", nargs="+", help="id or beginning of the key; and key=value, such as eval=zeroshot")
    measuring.set_defaults(command=_evaluate)

    reporting = commands.add_parser("report", parents=[shared], help="write everything as one HTML file")
    reporting.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="default: %(default)s")
    reporting.add_argument("--tables", metavar="NAMES", default="all", help="declared tables: all, none or t2,t7")
    reporting.add_argument("--allow", metavar="WHAT", default="", help="mixtures to footnote: code,dirty or all")
    reporting.set_defaults(command=_report)

    exporting = commands.add_parser("export", parents=[shared], help="write a table for other programs")
    exporting.add_argument("--format", metavar="FORMAT", help="parquet, csv or json; default: the ending of --out")
    exporting.add_argument("--out", metavar="FILE", type=Path, required=True)
    exporting.add_argument("--table", metavar="NAME", default="results", help="default: the view %(default)s")
    exporting.set_defaults(command=_export)

    merging = commands.add_parser("merge", parents=[shared], help="bring another database's rows into this one")
    merging.add_argument("other", help="a file, or the address of a database")
    merging.set_defaults(command=_merge)

    filling = commands.add_parser("fill", help="run what declared tables still need, and draw them")
    filling.add_argument("--store", metavar="URL", default=DEFAULT_STORE, help="default: %(default)s")
    filling.add_argument("table", nargs="+", help="such as t7, all, or a .yaml; and key=value for all its runs")
    filling.add_argument("--size", choices=("demo", "paper", "tiny"), default="demo", help="default: %(default)s")
    filling.add_argument("--dry-run", action="store_true", help="show what is missing and stop")
    filling.add_argument("--render-only", action="store_true", help="run nothing, draw what there is")
    filling.add_argument("--only-failed", action="store_true", help="try again what failed, and nothing else")
    filling.add_argument("--limit-time", metavar="TIME", help="start no run after, for instance, 30min or 1h30min")
    filling.add_argument(
        "--allow", metavar="WHAT", default="", help="mixtures to draw with footnotes: code,dirty or all"
    )
    filling.set_defaults(command=_fill)

    finding = commands.add_parser("findings", help="write what the declared tables say about published takeaways")
    finding.add_argument("--store", metavar="URL", default=DEFAULT_STORE, help="default: %(default)s")
    finding.add_argument("--size", choices=("demo", "paper", "tiny"), default="demo", help="default: %(default)s")
    finding.add_argument("--out", metavar="FILE", type=Path, default=Path("findings.md"), help="default: %(default)s")
    finding.add_argument("--allow", metavar="WHAT", default="", help="mixtures to footnote: code,dirty or all")
    finding.add_argument("--takeaways", metavar="FILE", type=Path, help="a .yaml of your own instead of the paper's")
    finding.set_defaults(command=_findings)

    add_commands(commands, shared)
    add_drilldown(commands, shared)

    checking = commands.add_parser("doctor", parents=[shared], help="check this machine, install optional parts")
    checking.add_argument("--install", choices=["opencompass"], help="install an optional part in its own environment")
    checking.set_defaults(command=_doctor)
    return parser


def _list(database: Database, options: argparse.Namespace) -> int:
    rows = queries.runs(database, algo=options.algo, model=options.model, status=options.status, superseded=options.all)
    metrics: dict[int, list[MetricRow]] = {row.id: [] for row in rows}
    for each in queries.metrics(database, metrics):
        metrics[each.run_id].append(each)
    if options.json:
        _print_json([_run_json(row, metrics[row.id]) for row in rows])
        return 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("id", "key", "status", "model", "algo", "format", "calib", "bits/weight", "result"):
        right = title in ("id", "bits/weight")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for row in rows:
        per_weight = None if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}"
        cells = [
            row.id,
            row.key[:10],
            state(row),
            row.model,
            row.algo,
            "\n".join(
                f for f in (row.weight_format, _beside("act", row.act_format), _beside("kv", row.kv_format)) if f
            ),
            row.calib,
            per_weight,
        ]
        found = [f"{each.name} {each.task} {each.protocol} {each.value:.6g}" for each in metrics[row.id]]
        cells.append("\n".join(found) or row.error_type)
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in cells))
    _console().print(table if rows else "no runs match")
    return 0


def _beside(role: str, name: str | None) -> str | None:
    return None if name is None else f"{role} {name}"


def _show(database: Database, options: argparse.Namespace) -> int:
    row = queries.run_named(database, options.run)
    metrics, layers = queries.metrics(database, [row.id]), queries.layer_metrics(database, row.id)
    artifacts = queries.artifacts(database, row.id)
    environment = queries.environment(database, row.environment_id)
    failures = queries.failures(database, [row.id]).get(row.id, [])
    if options.json:
        _print_json(
            _run_json(row, metrics)
            | {
                "environment": asdict(environment),
                "layer_metrics": [asdict(each) for each in layers],
                "artifacts": [asdict(each) for each in artifacts],
                "failures": [asdict(each) for each in failures],
            }
        )
        return 0
    _section("run", {"status": state(row), **_columns(row)})
    _section("environment", _flat(asdict(environment)))
    _section("spec", _flat(row.spec))
    _section("phases (s)", _flat(row.phases or {}))
    _section("metrics", {f"{each.name} {each.task} {each.protocol}": _measured(each) for each in metrics})
    _section("failed measurements", {f"{each.task} {each.protocol}": each.message for each in failures})
    _section("artifacts", {each.path: f"{each.kind}, {each.bytes} bytes, {each.sha256}" for each in artifacts})
    _section(*_layer_summary(layers))
    for trace in [row.error_trace, *(each.trace for each in failures)]:
        if trace:
            _console().print(Text(f"\nerror trace\n{trace}", style="red"))
    return 0


def _evaluate(database: Database, options: argparse.Namespace) -> int:
    from qbench.command import compose_evaluation, conf_dir  # imports Hydra and torch, which no other command needs
    from qbench.sweep import measure_rows

    given = [*options.run, *options.rest]
    settings = [each for each in given if "=" in each]
    rows = [queries.run_named(database, each) for each in given if "=" not in each]
    if not rows:
        raise SpecError("run", " ".join(options.run), "at least one run, by its id or the beginning of its key")
    return measure_rows(rows, compose_evaluation(settings), conf_dir() / "model", options.store)


def _fill(options: argparse.Namespace) -> int:
    from qbench import fill  # imports Hydra and torch

    return fill.main(options)


def _findings(options: argparse.Namespace) -> int:
    from qbench import findings  # imports Hydra and torch

    return findings.main(options)


def _compare(database: Database, options: argparse.Namespace) -> int:
    from analysis.compare import compare  # here: the other commands do without statistics
    from analysis.tables.comparison import RenderedComparison

    runs = [queries.run_named(database, name) for name in (options.a, options.b)]
    found = compare(database, *runs, alpha=options.alpha, margin=options.margin, resamples=options.bootstrap)
    if options.json:
        _print_json(found.as_json())
        return 0
    console = Console()
    if not console.is_terminal:  # a file has no width of its own
        console = Console(width=_FILE_COLUMNS)
    console.print(RenderedComparison(found))
    return 0


def _report(database: Database, options: argparse.Namespace) -> int:
    from analysis.report.page import write_report

    allow = [each for each in options.allow.split(",") if each]
    tables = None
    if options.tables != "none":
        from qbench.shown import shown_tables  # imports Hydra and torch

        tables = list(shown_tables(database, options.tables, allow))
    return _done(write_report(database, options.out, options.store, tables, allow), options)


def _export(database: Database, options: argparse.Namespace) -> int:
    from qbench.store.export import export

    rows = export(database, options.out, file_format=options.format, table=options.table)
    return _done({"rows": rows, "out": str(options.out)}, options)


def _merge(database: Database, options: argparse.Namespace) -> int:
    from qbench.store.merge import merge, source_url

    with Database(source_url(options.other, options.store), create=False) as other:
        return _done(asdict(merge(database, other)), options)


def _done(found: Mapping[str, object], options: argparse.Namespace) -> int:
    """Say what was done: as JSON, or in words without what is nothing."""
    said = ", ".join(f"{name} {value}" for name, value in found.items() if value not in (0, []))
    _print_json(found) if options.json else print(said or "nothing to do")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from qbench import doctor

    return doctor.main(options.store, as_json=options.json, part=options.install)


def _columns(row: RunRow) -> dict[str, object]:
    """The plain columns of a run, without those that are shown on their own."""
    elsewhere = ("status", "spec", "phases", "error_trace")
    return {name: value for name, value in asdict(row).items() if name not in elsewhere}


def _run_json(row: RunRow, metrics: Sequence[MetricRow]) -> dict[str, object]:
    return asdict(row) | {"state": state(row), "metrics": [asdict(each) for each in metrics]}


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _measured(metric: MetricRow) -> str:
    stderr = "" if metric.stderr is None else f" ± {metric.stderr:.3g}"
    return f"{metric.value:.6g}{stderr} {metric.unit} ({metric.evaluator}, n = {metric.n})"


def _layer_summary(layers: Sequence[LayerMetric]) -> tuple[str, dict[str, object]]:
    """Title and lines for the layers with the largest output error, or weight error where no input was looked at."""
    name = "output_error" if any(each.name == "output_error" for each in layers) else "weight_error"
    errors = sorted((each for each in layers if each.name == name), key=lambda each: -each.value)
    lines = {f"block {each.block} {each.module}": f"{each.value:.4g}" for each in errors[:_WORST_LAYERS]}
    return f"largest {name.replace('_', ' ')}s (of {len(errors)} weights)", lines


def _flat(value: object, path: str = "") -> dict[str, object]:
    """Nested mappings and sequences as dotted names."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {path: value}
    flat: dict[str, object] = {}
    for key, item in items:
        flat |= _flat(item, f"{path}.{key}" if path else str(key))
    return flat


def _section(title: str, values: Mapping[str, object]) -> None:
    """Print names and values below a title; nothing where there is nothing."""
    present = {name: value for name, value in values.items() if value is not None}
    if not present:
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in present.items():
        table.add_row(Text(f"  {name}"), Text(str(value), overflow="fold"))
    _console().print(Text(title, style="bold"), table)


def _console() -> Console:
    """The terminal; into a file or pipe lines are not broken at the width of a terminal that is not there."""
    console = Console()
    return console if console.is_terminal else Console(width=500)


if __name__ == "__main__":
    sys.exit(main())
