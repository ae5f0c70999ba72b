"""The declared tables that a database has something of, drawn, for the report."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator

from analysis.anchors import model_name
from analysis.tables.checked import checked
from analysis.tables.declared import FilledTable
from analysis.tables.filled import filled
from analysis.tables.plain import PlainTable
from qbench.declaration import SIZES, Declaration, declared_names, load, tables_dir
from qbench.errors import EvaluationError, QbenchError, SpecError
from qbench.fill import Made, compose, varied
from qbench.store import queries
from qbench.store.database import Database
from qbench.taxonomy import taxonomy

#: Words for all tables, and for none of them.
ALL, NONE = "all", "none"

_MODEL_KEYS = ("model", "model.path")


def shown_tables(
    database: Database, wanted: str = ALL, allow: Collection[str] = ()
) -> Iterator[FilledTable | PlainTable | tuple[str, str]]:
    """Every declared table (or those that `wanted` names, separated by commas) of any size that has a run in the
    database; in place of one whose cells must not stand together its name and the reason.

    Tables without a run are left out, and so are those that cannot be composed here: nothing of them can be in the
    database under their present keys. Raises SpecError for a name that is not declared.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"
    logging.getLogger("hydra").setLevel(logging.WARNING)
    names = chosen(wanted)
    models = {model_name(run.model) for run in queries.runs(database)}
    if not models:
        return
    made: Made = {}
    for name in names:
        for size in SIZES:
            declaration = load(name, size)
            if declaration.static:
                yield taxonomy(name, declaration.title, declaration.caption, declaration.static)
                break
            if not models & set(_models(declaration)):
                continue
            try:
                declared = compose(declaration, (), made).declared
            except QbenchError:
                continue
            found = filled(database, declared)
            if not found.run_ids:
                continue
            try:
                yield checked(database, found, varied=varied(declaration), allow=allow)
            except EvaluationError as error:
                yield f"{name.upper()} ({size})", str(error)


def chosen(wanted: str) -> list[str]:
    """The names of `wanted` in reading order; SpecError for one that is not declared."""
    declared = declared_names(tables_dir())
    names = declared if wanted == ALL else [each for each in wanted.split(",") if each and each != NONE]
    for name in names:
        if name not in declared:
            raise SpecError("--tables", name, f"one of {ALL}, {NONE}, {', '.join(declared)}")
    return [each for each in declared if each in names]


def _models(declaration: Declaration) -> Iterator[str]:
    """What the settings of a table say of models, by their names."""
    levels = [level for axis in (*declaration.rows, *declaration.columns) for level in axis.levels]
    for setting in (*declaration.settings, *(setting for level in levels for setting in level.settings)):
        key, _, value = setting.partition("=")
        if key in _MODEL_KEYS:
            yield model_name(value)
