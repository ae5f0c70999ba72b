"""The commands that look into runs layer by layer: `qbench why` and `qbench layers`.

What they need is imported when they run.
"""

import argparse
import json
from pathlib import Path

from qbench.errors import SpecError
from qbench.store import queries
from qbench.store.database import Database

_FILE_COLUMNS = 160


def add_commands(commands: argparse._SubParsersAction, shared: argparse.ArgumentParser) -> None:
    """Add the commands to the parser of `qbench`; `shared` has what all commands take."""
    asking = commands.add_parser("why", parents=[shared], help="why two runs differ")
    for name in ("a", "b"):
        asking.add_argument(name, metavar=name.upper(), help="id, or the beginning of the key")
    asking.add_argument("--top", type=int, default=5, metavar="N", help="layers to list; default: %(default)s")
    asking.add_argument("--alpha", type=float, default=0.05, help="significance level; default: %(default)s")
    asking.set_defaults(command=_why)

    drawing = commands.add_parser("layers", parents=[shared], help="draw errors by block and module, of one run or two")
    drawing.add_argument("runs", metavar="RUN", nargs="+", help="id, or the beginning of the key; at most two")
    drawing.add_argument(
        "--metric",
        default="",
        metavar="NAMES",
        help="such as output_error,sqnr_db; default: errors, SQNR, cosine and kurtosis",
    )
    drawing.add_argument("--worst", type=int, default=10, metavar="N", help="layers to list; default: %(default)s")
    drawing.add_argument("--out", metavar="FOLDER", type=Path, default=Path("results"), help="default: %(default)s")
    drawing.set_defaults(command=_layers)


def _why(database: Database, options: argparse.Namespace) -> int:
    from analysis.tables.explanation import RenderedExplanation
    from analysis.why import explain

    runs = [queries.run_named(database, name) for name in (options.a, options.b)]
    found = explain(database, *runs, top=options.top, alpha=options.alpha)
    _print(RenderedExplanation(found), found.as_json() if options.json else None)
    return 0


def _layers(database: Database, options: argparse.Namespace) -> int:
    from rich.console import Group

    from analysis.layer_figures import layer_figures
    from analysis.layers import chosen_metrics, layers_to_draw
    from analysis.tables.layers import worst_layers
    from analysis.tables.render import OnTerminal

    if len(options.runs) > 2:
        raise SpecError("run", " ".join(options.runs), "one run, or two to be compared")
    runs = [queries.run_named(database, name) for name in options.runs]
    rows = layers_to_draw(database, runs)
    wanted = [each for each in options.metric.split(",") if each]
    names = chosen_metrics(rows, wanted)
    tables = worst_layers(runs, rows, wanted or names[:1], options.worst)
    written = layer_figures(runs, rows, names, options.out)
    found = {"worst": {name: each.frame.to_dict("records") for name, each in tables.items()}}
    found |= {"files": [str(path) for path in written]}
    _print(Group(*map(OnTerminal, tables.values())), found if options.json else None)
    if not options.json:
        for path in written:
            print(f"  wrote {path}")
    return 0


def _print(rendered: object, as_json: object | None) -> None:
    from rich.console import Console

    if as_json is not None:
        print(json.dumps(as_json, indent=2, ensure_ascii=False))
        return
    console = Console()
    if not console.is_terminal:  # a file has no width of its own
        console = Console(width=_FILE_COLUMNS)
    console.print(rendered)
