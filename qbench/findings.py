"""`qbench findings`: the declared tables of a size, and what they say about the takeaways, as one page."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from analysis.claims import MIXTURES
from analysis.findings.page import check_out, write_page
from analysis.findings.takeaways import TAKEAWAYS, Axes, check, takeaways
from analysis.findings.words import takeaways_table
from analysis.tables.checked import checked
from analysis.tables.filled import filled
from analysis.tables.render import OnTerminal
from qbench.checks import choice
from qbench.declaration import SIZES, Declaration, declared_names, load, tables_dir
from qbench.errors import EvaluationError
from qbench.fill import Made, compose, varied
from qbench.store.database import Database
from qbench.sweep import LOG_COLUMNS


def main(options: argparse.Namespace) -> int:
    """`qbench findings` with its parsed arguments; 1 where a table's cells must not stand in one table."""
    allow = [each for each in options.allow.split(",") if each]
    for each in allow:
        choice("--allow", each, (*MIXTURES, "all"))
    check_out(options.out)
    os.environ["HYDRA_FULL_ERROR"] = "1"
    logging.getLogger("hydra").setLevel(logging.WARNING)
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_COLUMNS)
    given, declarations = takeaways(options.takeaways or TAKEAWAYS), declared(options.size)
    check(given, axes_by_size())
    with Database(options.store, create=False) as database:
        console.print(f"Composing {', '.join(each.name for each in declarations)} ...", highlight=False)
        made: Made = {}
        tables = {}
        for declaration in declarations:
            found = filled(database, compose(declaration, made=made).declared)
            try:
                tables[declaration.name] = checked(database, found, varied=varied(declaration), allow=allow)
            except EvaluationError as error:
                line = f"[red]not written[/] {declaration.name}: {escape(str(error))}; --allow writes it with footnotes"
                console.print(line, highlight=False, soft_wrap=True)
                return 1
        found, paths = write_page(database, given, tables, options.out, allow)
    console.print(OnTerminal(takeaways_table(found, options.size)))
    for path in paths:
        console.print(f"  wrote {path}", highlight=False, soft_wrap=True)
    return 0


def declared(size: str, folder: Path | None = None) -> list[Declaration]:
    """The declared tables that have runs."""
    folder = folder or tables_dir()
    found = [load(name, size, folder) for name in declared_names(folder)]
    return [each for each in found if not each.static]


def axes_by_size(folder: Path | None = None) -> Mapping[str, Mapping[str, Axes]]:
    """The labels of every axis of every declared table, by table and size."""
    found: dict[str, dict[str, Axes]] = {}
    for size in SIZES:
        for each in declared(size, folder):
            axes = {axis.name: [level.label for level in axis.levels] for axis in (*each.rows, *each.columns)}
            found.setdefault(each.name, {})[size] = axes
    return found
