"""The reading side of the results database: rows as plain values, results as pandas frames."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlalchemy import Boolean, Integer, RowMapping, Table, select, text

from qbench.errors import AssetError, SpecError
from qbench.store import schema
from qbench.store.database import Database
from qbench.store.records import (
    Anchor,
    Artifact,
    Environment,
    Failure,
    LayerMetric,
    MetricRow,
    Noise,
    RunRow,
    Samples,
    field_names,
    unpack,
    unpack_clusters,
)

if TYPE_CHECKING:
    import pandas as pd


def runs(
    database: Database,
    *,
    algo: str | None = None,
    model: str | None = None,
    status: str | None = None,
    superseded: bool = False,
) -> list[RunRow]:
    """The runs that match all given values, oldest first; superseded ones only on request."""
    run = schema.run
    conditions = [
        run.c[name] == value for name, value in (("algo", algo), ("model", model), ("status", status)) if value
    ]
    if not superseded:
        conditions.append(run.c.superseded_by.is_(None))
    with database.read() as connection:
        rows = connection.execute(select(run).where(*conditions).order_by(run.c.id)).mappings()
        return [RunRow(**row) for row in rows]


def run_named(database: Database, reference: str) -> RunRow:
    """The one run with this id or with a key that starts with `reference`; an id wins over a key.

    Of several attempts at one key the one that counts is meant; a superseded one has to be named by its id.
    Raises SpecError if there is no such run or more than one.
    """
    run = schema.run
    with database.read() as connection:
        if reference.isascii() and reference.isdigit() and len(reference) < 18:
            row = connection.execute(select(run).where(run.c.id == int(reference))).mappings().first()
            if row is not None:
                return RunRow(**row)
        query = select(run).where(run.c.key.startswith(reference, autoescape=True), run.c.superseded_by.is_(None))
        rows = connection.execute(query.order_by(run.c.id).limit(4)).mappings().all() if reference else []
    if len(rows) == 1:
        return RunRow(**rows[0])
    if rows:
        some = ", ".join(row["key"][:16] for row in rows[:3])
        raise SpecError("run", reference, f"several keys start so ({some}, …); give more of the key, or the id")
    raise SpecError("run", reference, "no run has this id or a key that starts so; see qbench ls")


def metrics(database: Database, run_ids: Iterable[int]) -> list[MetricRow]:
    """The metrics of these runs, in the order of the runs' ids and of measuring."""
    return [MetricRow(**row) for row in _of_runs(database, schema.metric, run_ids)]


def samples(database: Database, metric_id: int) -> np.ndarray:
    """The per-item values of a metric, float64 [n], in item order; AssetError if none were stored."""
    found = samples_of(database, [metric_id])
    if not found:
        raise AssetError(f"metric {metric_id}: no samples are stored for it")
    return found[metric_id]


def samples_of(database: Database, metric_ids: Iterable[int]) -> dict[int, np.ndarray]:
    """As `samples` for several metrics at once; metrics without stored samples are left out."""
    return {metric_id: found.values for metric_id, found in clustered_samples_of(database, metric_ids).items()}


def clustered_samples_of(database: Database, metric_ids: Iterable[int]) -> dict[int, Samples]:
    """The per-item values of several metrics with the items' clusters; metrics without stored samples are left
    out."""
    wanted, found = sorted(set(metric_ids)), {}
    with database.read() as connection:
        for some in _portions(wanted):
            query = select(schema.sample).where(schema.sample.c.metric_id.in_(some))
            for row in connection.execute(query).mappings():
                blob, n = row["clusters"], row["n"]
                clusters = None if blob is None else unpack_clusters(blob, n)
                found[row["metric_id"]] = Samples(values=unpack(row["values"], n), clusters=clusters)
    return found


def layer_metrics(database: Database, run_id: int) -> list[LayerMetric]:
    """What was recorded per block and module of a run, in the order of recording."""
    return [_record(LayerMetric, row) for row in _of_runs(database, schema.layer_metric, [run_id])]


def layer_metrics_named(database: Database, run_id: int, names: Iterable[str]) -> list[tuple[str, int, str, float]]:
    """(name, block, module, value) of a run's layer metrics of these names, in the order of recording."""
    table = schema.layer_metric
    columns = (table.c.name, table.c.block, table.c.module, table.c.value)
    query = select(*columns).where(table.c.run_id == run_id, table.c.name.in_(list(names))).order_by(table.c.id)
    with database.read() as connection:
        return [tuple(row) for row in connection.execute(query)]


def artifacts(database: Database, run_id: int) -> list[Artifact]:
    """The files that a run left behind."""
    return [artifact for _, artifact in artifacts_of(database, [run_id])]


def artifacts_of(database: Database, run_ids: Iterable[int]) -> list[tuple[int, Artifact]]:
    """(id of the run, artifact) for the files that these runs left behind."""
    return [(row["run_id"], _record(Artifact, row)) for row in _of_runs(database, schema.artifact, run_ids)]


def failures(database: Database, run_ids: Iterable[int]) -> dict[int, list[Failure]]:
    """By run, the measurements that failed and have not succeeded since, the newest attempt at each."""
    wanted = sorted(set(run_ids))
    measured = {(row["run_id"], row["spec_key"]) for row in _of_runs(database, schema.metric, wanted)}
    newest = {(row["run_id"], row["spec_key"]): row for row in _of_runs(database, schema.failure, wanted)}
    found: dict[int, list[Failure]] = {}
    for (run_id, spec_key), row in newest.items():
        if (run_id, spec_key) not in measured:
            found.setdefault(run_id, []).append(_record(Failure, row))
    return found


def noise(database: Database, families: Iterable[str]) -> dict[tuple[str, str, str], list[Noise]]:
    """The newest component of each kind, by (family, spec key, metric name)."""
    newest: dict[tuple[str, str, str, str], Noise] = {}
    with database.read() as connection:
        for some in _portions(sorted(set(families))):
            query = select(schema.noise).where(schema.noise.c.family.in_(some)).order_by(schema.noise.c.id)
            for row in connection.execute(query).mappings():
                newest[row["family"], row["spec_key"], row["name"], row["component"]] = _record(Noise, row)
    found: dict[tuple[str, str, str], list[Noise]] = {}
    for (family, spec_key, name, _), component in newest.items():
        found.setdefault((family, spec_key, name), []).append(component)
    return found


def anchors(database: Database) -> list[Anchor]:
    """The published numbers, source by source in the order in which they were stored."""
    with database.read() as connection:
        rows = connection.execute(select(schema.anchor).order_by(schema.anchor.c.id)).mappings()
        return [_record(Anchor, {**row, "stages": row["stages"] and tuple(row["stages"])}) for row in rows]


def environment(database: Database, environment_id: int) -> Environment:
    """The environment of this id, AssetError if there is none."""
    table = schema.environment
    with database.read() as connection:
        row = connection.execute(select(table).where(table.c.id == environment_id)).mappings().first()
    if row is None:
        raise AssetError(f"environment {environment_id}: not in the database")
    return _record(Environment, row)


def frame(database: Database, **equals: str | int | float | bool) -> "pd.DataFrame":
    """The view `results` as a pandas frame, restricted to rows whose columns equal the given values.

    For instance `frame(database, model="tiny", metric="ppl")`. Raises SpecError for a column the view does
    not have.
    """
    import pandas as pd  # not at import: the command line lists runs without it

    with database.read() as connection:
        everything = pd.read_sql(text("SELECT * FROM results ORDER BY run_id, metric, task"), connection)
    everything = with_nullable_types(everything)
    for column, value in equals.items():
        if column not in everything:
            raise SpecError(column, value, f"no such column; the view results has {', '.join(everything.columns)}")
        everything = everything[everything[column] == value]
    return everything.reset_index(drop=True)


def with_nullable_types(frame: "pd.DataFrame") -> "pd.DataFrame":
    """`frame`, its whole numbers and truth values in nullable types.

    With pandas' own, one missing value turns a column of whole numbers into floats. Bits are whole unless a row has
    ternary weights.
    """
    columns = {c.name: c.type for table in schema.metadata.tables.values() for c in table.c if c.name != "bits"}
    types = {
        name: "boolean" if isinstance(columns[name], Boolean) else "Int64"
        for name in frame
        if isinstance(columns.get(name), Boolean | Integer)
    }
    frame = frame.astype(types)
    if "bits" in frame:
        frame["bits"] = frame["bits"].astype("float64").convert_dtypes()
    return frame


def _of_runs(database: Database, table: Table, run_ids: Iterable[int]) -> Sequence[RowMapping]:
    found: list[RowMapping] = []
    with database.read() as connection:
        for some in _portions(sorted(set(run_ids))):
            query = select(table).where(table.c.run_id.in_(some)).order_by(table.c.run_id, table.c.id)
            found += connection.execute(query).mappings()
    return found


def _portions(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """`values` in pieces that fit into one statement: databases limit the number of its parameters."""
    for start in range(0, len(values), 500):
        yield values[start : start + 500]


def _record(kind: type, row: Any) -> Any:
    """An instance of the dataclass `kind` from the columns of `row` that it has."""
    return kind(**{name: row[name] for name in field_names(kind)})
