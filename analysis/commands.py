"""The commands that answer questions: `qbench best`, `qbench recommend`, `qbench pareto`, `qbench attribute`,
`qbench align`.

What they need is imported when they run.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.errors import SpecError
from qbench.store.database import Database

if TYPE_CHECKING:
    from analysis.tables.render import Plain

_BYTES = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SECONDS = {"": 1, "s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}
_FILE_COLUMNS = 200


def add_commands(commands: argparse._SubParsersAction, shared: argparse.ArgumentParser) -> None:
    """Add the commands to the parser of `qbench`; `shared` has what all commands take."""
    asking = argparse.ArgumentParser(add_help=False)
    asking.add_argument("--model", help="only this model")
    asking.add_argument("--metric", default="ppl", help="default: %(default)s")
    asking.add_argument("--task", help="only this text or task")
    asking.add_argument("--protocol", help="only this protocol, such as window-2048")
    asking.add_argument("--n", type=int, metavar="N", help="only measurements of so many items")
    asking.add_argument("--dtype", help="only this dtype")
    asking.add_argument("--checkpoint", metavar="SHA", help="only the checkpoint whose fingerprint begins so")
    asking.add_argument("--alpha", type=float, default=0.05, help="significance level; default: %(default)s")
    asking.add_argument(
        "--allow", default="", metavar="MIXTURES", help="footnote instead of refusing: code, dirty, or all"
    )
    asking.add_argument("--out", metavar="FOLDER", type=Path, help="also write LaTeX, Markdown, HTML and CSV there")

    best = commands.add_parser("best", parents=[shared, asking], help="best practice per model, scheme and budget")
    best.add_argument("--budget", action="append", metavar="TIME", help="to quantize within, such as 10min; repeatable")
    best.add_argument("--worse", type=int, default=3, metavar="N", help="worse rows to show; default: %(default)s")
    best.set_defaults(command=_best)

    wishing = commands.add_parser("recommend", parents=[shared, asking], help="the recipe for a deployment's limits")
    wishing.add_argument("--max-size", metavar="SIZE", help="of the whole model, such as 100MB")
    wishing.add_argument("--kernel", metavar="RUNTIME:KERNEL", help="that has to serve the format, such as vllm:w4a16")
    wishing.add_argument("--min-recovery", metavar="SHARE", help="of full precision's quality, such as 0.99")
    wishing.add_argument("--certain", action="store_true", help="with the lower end of its 95 %% interval")
    wishing.add_argument("--max-calib", metavar="TIME", help="to quantize within, such as 10min")
    wishing.add_argument("--rejected", type=int, default=5, metavar="N", help="misfits to show; default: %(default)s")
    wishing.set_defaults(command=_recommend)

    weighing = commands.add_parser("pareto", parents=[shared], help="what no other point beats in accuracy and cost")
    weighing.add_argument("--x", default="bits_per_weight", metavar="COST", help="or a metric; default: %(default)s")
    weighing.add_argument("--y", default="ppl", metavar="METRIC", help="default: %(default)s")
    weighing.add_argument("--model", help="only this model")
    weighing.add_argument("--task", help="only this text or task")
    weighing.add_argument(
        "--allow", default="", metavar="MIXTURES", help="footnote instead of refusing: code, dirty, all"
    )
    weighing.add_argument("--out", metavar="FOLDER", type=Path, help="write the figures there: PDF, PNG, CSV")
    weighing.set_defaults(command=_pareto)

    analysing = commands.add_parser("attribute", parents=[shared, asking], help="what the loss of quality is due to")
    analysing.add_argument("--algo", action="append", help="only these algorithms; repeatable")
    analysing.add_argument("--main", action="store_true", help="without interactions")
    analysing.add_argument(
        "--bootstrap", type=int, default=999, metavar="N", help="resamples of the intervals; default: %(default)s"
    )
    analysing.set_defaults(command=_attribute)

    aligning = commands.add_parser("align", parents=[shared], help="published numbers against those of the database")
    aligning.add_argument("--anchors", metavar="FILE", type=Path, action="append", help="published numbers of your own")
    aligning.add_argument("--out", metavar="FOLDER", type=Path, help="also write LaTeX, Markdown, HTML and CSV there")
    aligning.set_defaults(command=_align)


def size(text: str) -> float:
    """Bytes of "100MB" (10^6), "95MiB" (2^20), "4.2GB" or a plain number; SpecError for anything else."""
    return _measure("max-size", text, _BYTES, str.upper, "100MB or 95MiB")


def duration(text: str, option: str = "max-calib") -> float:
    """Seconds of "10min", "90s", "1.5h" or a plain number; SpecError for anything else."""
    return _measure(option, text, _SECONDS, str.lower, "10min, 90s or 1.5h")


def share(text: str) -> float:
    """0.99 of "0.99" or "99%"; SpecError for anything else."""
    return _measure("min-recovery", text, {"": 1, "%": 0.01}, str.lower, "0.99 or 99%")


def count(option: str, value: int) -> int:
    """The number itself; SpecError if it is negative."""
    if value < 0:
        raise SpecError(option, value, "0 or more")
    return value


def _measure(option: str, text: str, units: Mapping[str, float], case: Callable[[str], str], accepted: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z%]*)\s*", text)
    unit = case(found[2]) if found else None
    if unit not in units:
        raise SpecError(option, text, f"such as {accepted}")
    return float(found[1]) * units[unit]


def _best(database: Database, options: argparse.Namespace) -> int:
    from analysis.tables.best_practice import best_practice, best_practice_table

    budgets = (None, *(duration(each, "budget") for each in options.budget or ()))
    count("worse", options.worse)
    found = best_practice(database, budgets_s=budgets, **_asked(options))
    return _show(best_practice_table(found, worse=options.worse, alpha=options.alpha), options, "best-practice")


def _recommend(database: Database, options: argparse.Namespace) -> int:
    from analysis.recommend import Wishes, recommend
    from analysis.tables.recommendation import recommendation_table

    wishes = Wishes(
        max_bytes=None if options.max_size is None else size(options.max_size),
        kernel=options.kernel,
        min_recovery=None if options.min_recovery is None else share(options.min_recovery),
        max_calib_s=None if options.max_calib is None else duration(options.max_calib, "max-calib"),
        certain=options.certain,
    )
    count("rejected", options.rejected)
    found = recommend(database, wishes, **_asked(options))
    table = recommendation_table(found, rejected=options.rejected)
    if options.json:
        print(json.dumps(found.as_json() if found else {"recipes": []}, indent=2, ensure_ascii=False))
        _write(table, options, "recommendation")
    else:
        _show(table, options, "recommendation")
    return 0 if found and found.ranked else 1


def _pareto(database: Database, options: argparse.Namespace) -> int:
    from analysis.tables.front import fronts, fronts_table, write_fronts

    allow = [each for each in options.allow.split(",") if each]
    found = fronts(database, metric=options.y, cost=options.x, model=options.model, task=options.task, allow=allow)
    _show(fronts_table(found, metric=options.y, cost=options.x), options, None)
    if options.out is not None:
        for path in write_fronts(found, options.out):
            print(f"  wrote {path}", file=sys.stderr if options.json else sys.stdout)
    return 0


def _attribute(database: Database, options: argparse.Namespace) -> int:
    from analysis.attribution import attribute
    from analysis.tables.attribution import attribution_table

    asked = _asked(options)
    alpha = asked.pop("alpha")
    found = attribute(database, algos=options.algo, interactions=not options.main, resamples=options.bootstrap, **asked)
    return _show(attribution_table(found, alpha=alpha), options, "attribution")


def _align(database: Database, options: argparse.Namespace) -> int:
    from analysis.anchors import ANCHORS, align, align_table, anchors

    given = [*anchors(ANCHORS)]
    for path in options.anchors or ():
        more = anchors(path)
        taken = {each.source for each in given} & {each.source for each in more}
        if taken:
            raise SpecError("--anchors", path, f"sources of their own; {min(taken)} is given elsewhere")
        given += more
    database.publish(given)  # in place of what these sources had
    return _show(align_table(align(database)), options, "align")


def _asked(options: argparse.Namespace) -> dict[str, object]:
    from analysis.candidates import Only

    if not 0 < options.alpha < 1:
        raise SpecError("alpha", options.alpha, "a number between 0 and 1, such as 0.05")
    return {
        **{"model": options.model, "metric": options.metric, "task": options.task, "alpha": options.alpha},
        "only": Only(protocol=options.protocol, n=options.n, dtype=options.dtype, checkpoint=options.checkpoint),
        "allow": [each for each in options.allow.split(",") if each],
    }


def _show(table: "Plain", options: argparse.Namespace, stem: str | None) -> int:
    """Print the table, as JSON where that was asked for, and write its files (without a `stem` it has none)."""
    from rich.console import Console

    from analysis.tables.render import OnTerminal

    if options.json:
        notes = {"caption": table.caption, "footnotes": [text for _, text in table.footnotes]}
        rows = json.loads(table.frame.to_json(orient="records"))
        print(json.dumps({"title": table.title, "rows": rows} | notes, indent=2, ensure_ascii=False))
        _write(table, options, stem)
        return 0
    console = Console()
    if not console.is_terminal:  # a file has no width of its own
        console = Console(width=_FILE_COLUMNS)
    console.print(OnTerminal(table))
    _write(table, options, stem)
    return 0


def _write(table: "Plain", options: argparse.Namespace, stem: str | None) -> None:
    """The table's files, where they were asked for, and their names, beside JSON on the error stream."""
    from analysis.tables.render import write

    for path in write(table, options.out, stem) if options.out and stem else ():
        print(f"  wrote {path}", file=sys.stderr if options.json else sys.stdout)
