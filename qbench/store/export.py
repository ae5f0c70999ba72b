"""Tables of the database as files for other programs: Parquet, CSV or JSON."""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import JSON, LargeBinary, text

from qbench.errors import AssetError, SpecError
from qbench.store import queries, schema
from qbench.store.database import Database

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("parquet", "csv", "json")
#: `results` is the view: finished runs and their metrics side by side. Samples are packed bytes: see `queries.samples`.
TABLES = ("results", *(name for name in schema.metadata.tables if name != "sample"))


def export(database: Database, out: Path, *, file_format: str | None = None, table: str = "results") -> int:
    """Write a table (or the view `results`) to `out`; how many rows it has.

    The format follows from the ending of `out` unless given. JSON columns (spec, phases, versions) are text in CSV
    and Parquet and nested in JSON; what is missing is empty in CSV and null elsewhere. Raises SpecError for an unknown
    format or table, AssetError where the file cannot be written or Parquet's library is not installed.
    """
    chosen = file_format or out.suffix.removeprefix(".")
    if chosen not in FORMATS:
        raise SpecError("--format", chosen or out.name, f"must be one of {', '.join(FORMATS)}, or the ending of --out")
    if table not in TABLES:
        raise SpecError("--table", table, f"must be one of {', '.join(TABLES)}")
    if chosen == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise AssetError("--format=parquet: pyarrow is not installed; pip install pyarrow, or export csv or json")
    frame = _frame(database, table)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if chosen == "parquet":
            frame.to_parquet(out, index=False)
        elif chosen == "csv":
            frame.to_csv(out, index=False)
        else:
            out.write_text(_json(frame, _json_columns(table)), encoding="utf-8")
    except OSError as error:
        raise AssetError(f"--out={out}: {error.strerror or error}; name a place you can write to") from error
    return len(frame)


def _frame(database: Database, table: str) -> "pd.DataFrame":
    if table == "results":
        return queries.frame(database)
    import pandas as pd

    columns = [c.name for c in schema.metadata.tables[table].c if not isinstance(c.type, LargeBinary)]
    names = ", ".join(f'"{name}"' for name in columns)  # "values" is a keyword
    with database.read() as connection:
        frame = pd.read_sql(text(f'SELECT {names} FROM "{table}" ORDER BY id'), connection)
    for name in _json_columns(table):  # PostgreSQL gives them parsed
        frame[name] = frame[name].map(_as_text, na_action="ignore")
    return queries.with_nullable_types(frame)


def _json_columns(table: str) -> list[str]:
    if table == "results":
        return []
    return [c.name for c in schema.metadata.tables[table].c if isinstance(c.type, JSON)]


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _json(frame: "pd.DataFrame", nested: list[str]) -> str:
    """A list of objects, one per row and line; numbers keep all their digits."""
    lines = []
    for row in frame.astype(object).where(frame.notna(), None).to_dict(orient="records"):
        for name in nested:
            row[name] = None if row[name] is None else json.loads(row[name])
        lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False))
    return "[\n" + ",\n".join(lines) + "\n]\n"
