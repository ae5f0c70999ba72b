"""Opening a database: its address, the connection settings that make sharing safe, and its schema version.

Everything that can be wrong with `store.url` becomes an AssetError of one line here.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from qbench.errors import AssetError
from qbench.store.schema import REVISION

T = TypeVar("T")

BUSY_TIMEOUT_S = 30.0
ACCEPTED = "accepted: sqlite:///<file> or postgresql://<user>@<host>/<database>"

_DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
# Execution option: the statement that opens a connection's transactions on SQLite; None: they are not opened.
_BEGIN = "qbench_begin"


def open_engine(url: str, *, create: bool) -> Engine:
    """An engine on a database of the current schema.

    With `create`, a missing database and its folder are created and the place is proved writable; without, a
    missing database is an error. An older schema is migrated, whichever process comes first. Takes
    milliseconds when nothing is to be done (alembic is imported only to migrate).

    Raises AssetError, naming store.url: unknown scheme, unwritable place, not a database, somebody else's
    database, a schema newer than this code.
    """
    address = _parse(url)
    where = f"store.url={address.render_as_string(hide_password=True)}"
    is_sqlite = address.get_backend_name() == "sqlite"
    if is_sqlite:
        address = _prepare_file(address, where, create=create)
    try:
        engine = create_engine(address, json_serializer=partial(json.dumps, ensure_ascii=False, allow_nan=False))
    except ImportError as error:
        raise AssetError(f"{where}: {error}; install qbench[postgres]") from error
    try:
        if is_sqlite:
            event.listen(engine, "connect", _configure_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            _use_wal(engine, where)
        _bring_up_to_date(engine, where)
        if create:
            _prove_writable(engine)
    except DBAPIError as error:
        engine.dispose()
        raise AssetError(f"{where}: {first_line(error)}") from error
    except AssetError:
        engine.dispose()
        raise
    return engine


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that may read and then write: it commits at the end, or rolls back when an exception
    leaves it.

    On SQLite it takes the write lock at once (BEGIN IMMEDIATE). A transaction that begins as a reader and is
    overtaken by a writer can never be upgraded, however long it waits; one that begins as a writer only ever
    waits at its start.
    """
    with engine.connect().execution_options(**{_BEGIN: "BEGIN IMMEDIATE"}) as connection, connection.begin():
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads, and sees one state of the database throughout."""
    with engine.connect() as connection, connection.begin():
        yield connection


def first_line(error: DBAPIError) -> str:
    """What the driver said, without SQLAlchemy's statement and parameters."""
    lines = str(error.orig or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _parse(url: str) -> URL:
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise AssetError(f"store.url={url}: not a database address; {ACCEPTED}") from error
    if address.drivername not in _DRIVERS:
        raise AssetError(f"store.url={url}: unknown scheme {address.drivername!r}; {ACCEPTED}")
    return address.set(drivername=_DRIVERS[address.drivername])


def _prepare_file(address: URL, where: str, *, create: bool) -> URL:
    """The address with `~` spelled out, after looking at the path it names."""
    if not address.database or address.database == ":memory:" or address.database.startswith("file:"):
        raise AssetError(f"{where}: a results database is a file; {ACCEPTED}")
    path = Path(address.database).expanduser()
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise AssetError(f"{where}: is a folder; name a file in it")
        if not create and not path.is_file():
            raise AssetError(f"{where}: no such database; running a sweep creates it")
    except OSError as error:
        raise AssetError(f"{where}: {error.strerror}: {error.filename}; name a place you can write to") from error
    return address.set(database=str(path))


def _configure_sqlite(connection: sqlite3.Connection, _record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver would otherwise decide by itself when transactions begin
    connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000:.0f}")
    # With a write-ahead log: a crash loses nothing, a power cut at most the newest transactions.
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    statement = connection.get_execution_options().get(_BEGIN, "BEGIN")
    if statement is not None:
        _insist(lambda: connection.exec_driver_sql(statement))


def _insist(action: Callable[[], T]) -> T:
    """What `action` returns, tried again while SQLite is busy, for the time that its own busy timeout grants.

    Some states never reach SQLite's busy handler: another process changing the journal mode, recovering the
    log of a killed one, or removing it as the last to close.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            return action()
        except OperationalError as error:
            code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
            if code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _use_wal(engine: Engine, where: str) -> None:
    """Turn on write-ahead logging, with which readers and the writer do not block each other.

    The file remembers it. The journal mode cannot be changed inside a transaction.
    """
    with engine.connect().execution_options(**{_BEGIN: None}) as connection:
        if _insist(lambda: connection.exec_driver_sql("PRAGMA journal_mode").scalar()) == "wal":
            return
        mode = _insist(lambda: connection.exec_driver_sql("PRAGMA journal_mode=WAL").scalar())
    if mode != "wal":
        raise AssetError(f"{where}: no write-ahead log on this file system ({mode}); use a local disk or PostgreSQL")


def _bring_up_to_date(engine: Engine, where: str) -> None:
    with reading(engine) as connection:
        if _version(connection) == REVISION:
            return
    try:
        with writing(engine) as connection:
            _migrate(connection, where)
    except DBAPIError:
        # On PostgreSQL another process that created the same tables makes ours fail; by now it has committed.
        with writing(engine) as connection:
            _migrate(connection, where)


def _version(connection: Connection) -> str | None:
    """The schema version of the database; None if it has never been migrated."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _migrate(connection: Connection, where: str) -> None:
    """Bring the schema to REVISION inside the caller's transaction: entirely, or not at all."""
    version = _version(connection)
    if version is None and (tables := inspect(connection).get_table_names()):
        some = ", ".join(sorted(tables)[:3])
        raise AssetError(f"{where}: holds tables of something else ({some}); name another database")

    # Only here: importing alembic takes longer than all the rest of opening a database.
    from qbench.store import migrations

    if version is not None and version not in migrations.revisions():
        raise AssetError(f"{where}: schema {version} is newer than this qbench, which knows {REVISION}; update it")
    migrations.upgrade(connection, REVISION)


def _prove_writable(engine: Engine) -> None:
    """Raise the driver's error now, and not after an hour of quantization, if the database cannot be written
    to."""
    with engine.connect().execution_options(**{_BEGIN: "BEGIN IMMEDIATE"}) as connection:
        transaction = connection.begin()
        connection.execute(text("UPDATE alembic_version SET version_num = version_num"))
        transaction.rollback()
