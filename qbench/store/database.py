"""The writing side of the results database: claim a key, keep the claim alive, store what came of it at once.

A key is claimed by inserting a `running` row; a unique index lets at most one row per key count. The claim
ends with `finish` (row, metrics, samples, layer metrics and artifacts in one transaction) or `fail`. A
process that dies leaves a running row behind, which the next one to ask for the key takes over.
"""

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, RowMapping, delete, insert, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from qbench.errors import AssetError, EvaluationError
from qbench.store import environment as environments
from qbench.store import schema
from qbench.store.connect import first_line, open_engine, reading, writing
from qbench.store.owner import HEARTBEAT_INTERVAL_S, is_alive, new_owner
from qbench.store.records import (
    Anchor,
    Artifact,
    Claim,
    Environment,
    Failure,
    LayerMetric,
    Measurement,
    Noise,
    Outcome,
    RunColumns,
    RunRow,
    field_names,
    pack,
    pack_clusters,
)

_KEYS_PER_QUERY = 500  # databases limit the number of parameters of one statement


class Database:
    """A results database; a context manager. Any number of processes and threads may use the same one.

    `url` is `sqlite:///<file>` (relative to the current folder; `sqlite:////<file>` is absolute) or a
    PostgreSQL address. With `create` (the default) a missing one is made and the place proved writable;
    without, a missing one is an error. Raises AssetError as `connect.open_engine` does.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self._engine = open_engine(url, create=create)
        self._environment: Environment | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def read(self) -> AbstractContextManager[Connection]:
        """A transaction that only reads."""
        return reading(self._engine)

    def write(self) -> AbstractContextManager[Connection]:
        """A transaction that may write; committed at the end, rolled back if an exception leaves it."""
        return writing(self._engine)

    def find(self, keys: Iterable[str]) -> dict[str, RunRow]:
        """The rows that count (not superseded) for those of `keys` that have one."""
        wanted, found = sorted(set(keys)), {}
        with self.read() as connection:
            for start in range(0, len(wanted), _KEYS_PER_QUERY):
                some = wanted[start : start + _KEYS_PER_QUERY]
                query = select(schema.run).where(schema.run.c.key.in_(some), schema.run.c.superseded_by.is_(None))
                for row in connection.execute(query).mappings():
                    found[row["key"]] = RunRow(**row)
        return found

    def measured(self, run_id: int) -> set[str]:
        """The spec keys of the evaluators whose measurements run `run_id` has."""
        with self.read() as connection:
            query = select(schema.metric.c.spec_key).where(schema.metric.c.run_id == run_id).distinct()
            return set(connection.execute(query).scalars())

    def begin(self, columns: RunColumns, key: str, environment: Environment | None = None) -> Claim | None:
        """The claim on `key`; None if it is done, or a live process is at work on it.

        A failed row is superseded by a new one. A running row whose owner is gone is taken over: it becomes
        this claim's, with these columns and this environment (None: the present one, found out once). Of
        several processes that try at the same time, one gets the claim.
        """
        if environment is None:
            self._environment = self._environment or environments.detect()
            environment = self._environment
        for attempts_left in (2, 1, 0):
            try:
                with self.write() as connection:
                    return _claim(connection, columns, key, environment)
            except IntegrityError:
                # PostgreSQL: another process inserted the same key or environment since we looked. Look
                # again.
                if not attempts_left:
                    raise
        return None

    def heartbeat(self, claim: Claim) -> bool:
        """Note that `claim` is being worked on; False if it is no longer held."""
        with self.write() as connection:
            return _update_claimed(connection, claim, heartbeat=time.time())

    def finish(
        self,
        claim: Claim,
        outcome: Outcome,
        measurements: Sequence[Measurement],
        layer_metrics: Iterable[LayerMetric] = (),
        artifacts: Iterable[Artifact] = (),
        failures: Iterable[Failure] = (),
    ) -> None:
        """Store all that came of a claimed run and set it done, in one transaction; `failures` are measurements that
        it lacks.

        Raises AssetError if the claim was taken over meanwhile (nothing is stored), EvaluationError if two of
        the measurements have the same spec key and name.
        """
        _refuse_repeated(measurements)
        with self.write() as connection:
            if not _update_claimed(connection, claim, status="done", finished=_now(), **_values(outcome, Outcome)):
                run = f"run {claim.run_id} (key {claim.key[:12]})"
                raise AssetError(f"{run}: another process took its claim over; this result is not stored")
            place = connection.execute(
                select(schema.run.c.environment_id).where(schema.run.c.id == claim.run_id)
            ).scalar()
            _insert_measurements(connection, claim.run_id, measurements, place)
            _insert_all(connection, schema.layer_metric, claim.run_id, layer_metrics, LayerMetric)
            _insert_all(connection, schema.artifact, claim.run_id, artifacts, Artifact)
            _insert_failures(connection, claim.run_id, failures)

    def append(
        self,
        run_id: int,
        measurements: Sequence[Measurement],
        artifacts: Iterable[Artifact] = (),
        failures: Iterable[Failure] = (),
        environment: Environment | None = None,
    ) -> int:
        """Add measurements (and artifacts) to a run that is done; how many measurements were added. They were taken in
        `environment` (None: the run's).

        What the run already has (same spec key and name) stays as it is: two processes that measure the same
        run do double work but no harm. Raises AssetError unless the run is done, EvaluationError as `finish`
        does.
        """
        _refuse_repeated(measurements)
        with self.write() as connection:
            # Locking the row makes simultaneous appends to one run take turns on PostgreSQL too.
            run = schema.run
            query = select(run.c.status, run.c.environment_id).where(run.c.id == run_id).with_for_update()
            found = connection.execute(query).first()
            if found is None or found.status != "done":
                what = found.status if found else "not in the database"
                raise AssetError(f"run {run_id} is {what}: only a done run can be measured")
            place = found.environment_id if environment is None else _environment_id(connection, environment)
            held = select(schema.metric.c.spec_key, schema.metric.c.name).where(schema.metric.c.run_id == run_id)
            present = {tuple(row) for row in connection.execute(held)}
            missing = [each for each in measurements if (each.spec_key, each.name) not in present]
            _insert_measurements(connection, run_id, missing, place)
            _insert_all(connection, schema.artifact, run_id, artifacts, Artifact)
            _insert_failures(connection, run_id, failures)
            return len(missing)

    def add_noise(self, components: Iterable[Noise], environment: Environment) -> None:
        """Store components of noise that were found in this environment; earlier ones of the same kind stay."""
        with self.write() as connection:
            common = {"environment_id": _environment_id(connection, environment), "created": _now()}
            values = [_values(each, Noise) | common for each in components]
            if values:
                connection.execute(insert(schema.noise), values)

    def publish(self, anchors: Sequence[Anchor]) -> int:
        """Store published numbers, in place of those that the same sources had; how many rows changed, came or went."""
        table = schema.anchor
        sources = {each.source for each in anchors}
        with self.write() as connection:
            query = select(table).where(table.c.source.in_(sources)).order_by(table.c.id)
            held = [_without_id(row) for row in connection.execute(query).mappings()]
            wanted = [_values(each, Anchor) | {"stages": each.stages and list(each.stages)} for each in anchors]
            if held == wanted:
                return 0
            connection.execute(delete(table).where(table.c.source.in_(sources)))
            connection.execute(insert(table), wanted)
            return sum(row not in held for row in wanted) + sum(row not in wanted for row in held)

    def fail(self, claim: Claim, error_type: str, message: str, trace: str, outcome: Outcome | None = None) -> bool:
        """Set a claimed run failed, with its error and as much of the outcome as there is.

        False if the claim was taken over meanwhile: it is the new owner's to report on.
        """
        with self.write() as connection:
            return _update_claimed(
                connection,
                claim,
                status="failed",
                finished=_now(),
                error_type=error_type,
                error_message=message,
                error_trace=trace,
                **_values(outcome or Outcome(), Outcome),
            )


class Heartbeat:
    """Keeps a claim alive from a thread of its own while the `with` block works on it.

    `lost` turns True when another process has taken the claim over. A beat that cannot be written is logged,
    and tried again at the next interval: claims survive several missed beats.
    """

    def __init__(self, database: Database, claim: Claim, interval_s: float = HEARTBEAT_INTERVAL_S) -> None:
        self.lost = False
        self._database, self._claim, self._interval_s = database, claim, interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat-{claim.run_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                held = self._database.heartbeat(self._claim)
            except DBAPIError as error:
                logging.getLogger(__name__).warning("run %d: no heartbeat: %s", self._claim.run_id, first_line(error))
                continue
            if not held:
                self.lost = True
                return


def _claim(connection: Connection, columns: RunColumns, key: str, environment: Environment) -> Claim | None:
    run = schema.run
    query = select(run.c.id, run.c.status, run.c.owner, run.c.heartbeat)
    live = connection.execute(query.where(run.c.key == key, run.c.superseded_by.is_(None)).with_for_update()).first()
    if live is not None and (
        live.status == "done" or (live.status == "running" and is_alive(live.owner, live.heartbeat))
    ):
        return None
    values = _values(columns, RunColumns) | {
        "key": key,
        "status": "running",
        "environment_id": _environment_id(connection, environment),
        "owner": new_owner(),
        "heartbeat": time.time(),
        "created": _now(),
    }
    if live is not None and live.status == "running":
        still_the_same = (run.c.id == live.id, run.c.status == "running", run.c.owner == live.owner)
        taken = connection.execute(update(run).where(*still_the_same).values(values))
        return Claim(run_id=live.id, key=key, owner=values["owner"]) if taken.rowcount == 1 else None
    if live is not None:  # failed: out of the unique index first (superseded by itself), then by its successor
        connection.execute(update(run).where(run.c.id == live.id).values(superseded_by=live.id))
    run_id = connection.execute(insert(run).values(values)).inserted_primary_key[0]
    if live is not None:
        connection.execute(update(run).where(run.c.id == live.id).values(superseded_by=run_id))
    return Claim(run_id=run_id, key=key, owner=values["owner"])


def _environment_id(connection: Connection, environment: Environment) -> int:
    digest = environments.environment_hash(environment)
    table = schema.environment
    found = connection.execute(select(table.c.id).where(table.c.hash == digest)).scalar()
    if found is not None:
        return found
    values = _values(environment, Environment) | {"hash": digest}
    return connection.execute(insert(table).values(values)).inserted_primary_key[0]


def _update_claimed(connection: Connection, claim: Claim, **values: Any) -> bool:
    """Set columns of a run that is still running under `claim`; False if it is not."""
    run = schema.run
    held = (run.c.id == claim.run_id, run.c.owner == claim.owner, run.c.status == "running")
    return connection.execute(update(run).where(*held).values(values)).rowcount == 1


def _refuse_repeated(measurements: Sequence[Measurement]) -> None:
    seen: set[tuple[str, str]] = set()
    for each in measurements:
        if (each.spec_key, each.name) in seen:
            raise EvaluationError(
                f"{each.evaluator}: two measurements named {each.name} under one spec key (task {each.task})"
            )
        seen.add((each.spec_key, each.name))


def _insert_measurements(
    connection: Connection, run_id: int, measurements: Iterable[Measurement], environment_id: int
) -> None:
    common = {"run_id": run_id, "created": _now(), "environment_id": environment_id}
    for each in measurements:
        values = _values(each, Measurement) | common
        samples, clusters = values.pop("samples"), values.pop("clusters")
        metric_id = connection.execute(insert(schema.metric).values(values)).inserted_primary_key[0]
        if samples is not None:
            stored = {"metric_id": metric_id, "n": each.n, "values": pack(samples)}
            stored["clusters"] = None if clusters is None else pack_clusters(clusters)
            connection.execute(insert(schema.sample).values(stored))


def _insert_all(connection: Connection, table: schema.Table, run_id: int, rows: Iterable[object], kind: type) -> None:
    values = [_values(row, kind) | {"run_id": run_id} for row in rows]
    if values:
        connection.execute(insert(table), values)


def _insert_failures(connection: Connection, run_id: int, failures: Iterable[Failure]) -> None:
    values = [_values(each, Failure) | {"run_id": run_id, "created": _now()} for each in failures]
    if values:
        connection.execute(insert(schema.failure), values)


def _values(record: object, kind: type) -> dict[str, Any]:
    """The columns that the dataclass `kind` stands for, from an instance of it."""
    return {name: getattr(record, name) for name in field_names(kind)}


def _without_id(row: RowMapping) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "id"}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
