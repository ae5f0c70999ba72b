import re
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from qbench.errors import AssetError
from qbench.store import connect, migrations, queries, schema
from qbench.store.database import Database
from qbench.store.records import pack


def objects(path: Path) -> dict[str, str]:
    """The SQL text of every table and index of an SQLite file, white space and quotes normalized."""
    with sqlite3.connect(path) as plain:
        rows = plain.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND type <> 'view'").fetchall()
    plain.close()
    return {name: re.sub(r'[\s"]+', "", sql) for name, sql in rows if name != "alembic_version"}


def statements(sql: str) -> list[str]:
    """The parts of a CREATE statement in an order that does not depend on who wrote it."""
    head, _, rest = sql.partition("(")
    inside, _, tail = rest.rpartition(")")
    return [head, *sorted(re.split(r",(?![^(]*\))", inside)), tail]


def test_the_migrations_arrive_at_the_declared_tables(tmp_path):
    Database(f"sqlite:///{tmp_path}/migrated.db").close()
    declared = create_engine(f"sqlite:///{tmp_path}/declared.db")
    schema.metadata.create_all(declared)
    migrated, expected = objects(tmp_path / "migrated.db"), objects(tmp_path / "declared.db")
    assert migrated.keys() == expected.keys()
    # Compared as text, since alembic's own comparison leaves out checks and partial indexes.
    for name, sql in expected.items():
        assert statements(migrated[name]) == statements(sql), name
    with create_engine(f"sqlite:///{tmp_path}/migrated.db").connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
    assert migrations.revisions()[0] == schema.REVISION


def test_a_database_of_an_older_schema_keeps_its_rows(url, tmp_path):
    path = tmp_path / "old.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        migrations.upgrade(connection, "0002")
        run = {"id": 1, "key": "k", "status": "done", "environment_id": 1, "owner": "o", "heartbeat": 0.0,
               "created": "c", "model": "m", "algo": "rtn", "spec": "{}"}  # fmt: skip
        metric = {"id": 1, "run_id": 1, "evaluator": "e", "protocol": "p", "task": "t", "name": "ppl", "value": 2.0,
                  "n": 2, "unit": "ppl", "spec_key": "s", "created": "c"}  # fmt: skip
        environment = {"id": 1, "hash": "h", "versions": "{}", "platform": "p", "cpu": "c", "threads": 1}
        sample = {"metric_id": 1, "n": 2, "values": pack(np.array([1.0, 3.0]))}
        for table, row in (("environment", environment), ("run", run), ("metric", metric), ("sample", sample)):
            names = ", ".join(f'"{name}"' for name in row)
            places = ", ".join(f":{name}" for name in row)
            connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({places})"), row)
    engine.dispose()
    with Database(f"sqlite:///{path}") as database:
        (found,) = queries.metrics(database, [1])
        assert (found.value, found.higher_is_better) == (2.0, None)
        stored = queries.clustered_samples_of(database, [1])[1]
        assert (stored.values.tolist(), stored.clusters) == ([1.0, 3.0], None)
        assert queries.frame(database)["value"].tolist() == [2.0], "the view is still there"


def test_settings_that_make_sharing_safe(url):
    with Database(url) as database, database.read() as connection:
        pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        values = [connection.execute(text(f"PRAGMA {name}")).scalar() for name in pragmas]
    assert values == ["wal", 1, 1, 30_000]


def test_a_write_transaction_holds_the_lock_from_its_start(url):
    """Else a transaction that reads first and is overtaken by a writer fails at its own first write."""
    with Database(url) as database, database.write():
        rival = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=0, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            rival.execute("BEGIN IMMEDIATE")
        rival.close()


def test_a_lock_is_waited_for_even_where_sqlite_itself_does_not_wait(url):
    """As while another process changes the journal mode or recovers a log."""
    with Database(url) as database:
        with database.read() as connection:  # the pool hands this connection out again
            connection.exec_driver_sql("PRAGMA busy_timeout=0")
        rival = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, check_same_thread=False)
        rival.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.2, rival.execute, ["ROLLBACK"])
        release.start()
        with database.write() as connection:
            assert release.finished.is_set()
            assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 0
        rival.close()


def test_opening_an_up_to_date_database_is_fast_and_imports_little(url):
    Database(url).close()
    start = time.perf_counter()
    Database(url).close()
    assert time.perf_counter() - start < 0.3
    script = (
        f"import sys; from qbench.store.database import Database; Database({url!r}).close();"
        "print(*({'torch', 'transformers', 'pandas', 'matplotlib', 'alembic'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def refusal(url: str, **options) -> str:
    with pytest.raises(AssetError) as caught:
        Database(url, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("store.url=")
    return message


@pytest.mark.parametrize("url", ["results.db", "", "mysql://host/x", "sqlite+aiosqlite:///x.db", "nonsense:///x"])
def test_an_address_that_is_none_is_refused_with_what_is_accepted(url):
    assert "accepted: sqlite:///<file>" in refusal(url)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_a_database_that_would_vanish_is_refused(url):
    assert "is a file" in refusal(url)


def test_places_that_cannot_be_written_to_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refusal(f"sqlite:///{tmp_path}/file/below/results.db")
    assert "is a folder" in refusal(f"sqlite:///{tmp_path}")
    refusal("sqlite:////proc/results.db")
    refusal("sqlite:////proc/below/results.db")


def test_files_that_are_not_ours_are_refused_and_stay_as_they_are(tmp_path):
    prose = tmp_path / "notes.txt"
    prose.write_text("Not a database, but a text that is longer than a file header. " * 20)
    before = prose.read_bytes()
    assert "file is not a database" in refusal(f"sqlite:///{prose}")
    assert prose.read_bytes() == before

    other = tmp_path / "other.db"
    with sqlite3.connect(other) as plain:
        plain.execute("CREATE TABLE bookmarks (x)")
    plain.close()
    assert "bookmarks" in refusal(f"sqlite:///{other}")
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".db", ".txt")] == []


def test_a_truncated_database_is_refused(url, tmp_path):
    Database(url).close()
    whole = Path(url.removeprefix("sqlite:///"))
    cut = tmp_path / "cut.db"
    cut.write_bytes(whole.read_bytes()[:5000])
    assert "malformed" in refusal(f"sqlite:///{cut}")


def test_a_database_of_a_newer_schema_is_refused(url):
    Database(url).close()
    with sqlite3.connect(url.removeprefix("sqlite:///")) as plain:
        plain.execute("UPDATE alembic_version SET version_num = '9999'")
    plain.close()
    assert "schema 9999 is newer" in refusal(url)


def test_reading_does_not_create(tmp_path):
    assert "no such database" in refusal(f"sqlite:///{tmp_path}/missing/results.db", create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_cannot_be_written_to_is_refused_before_any_work(url):
    Database(url).close()
    with sqlite3.connect(url.removeprefix("sqlite:///")) as plain:  # root may write to read-only files
        plain.execute(
            "CREATE TRIGGER guard BEFORE UPDATE ON alembic_version BEGIN SELECT RAISE(ABORT, 'read-only'); END"
        )
    plain.close()
    assert "read-only" in refusal(url)
    Database(url, create=False).close()


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Database("sqlite:///~/results.db").close()
    assert (tmp_path / "results.db").is_file()


def test_a_relative_address_means_the_folder_at_opening(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Database("sqlite:///results/results.db") as database:
        monkeypatch.chdir(tmp_path / "elsewhere")
        database._engine.dispose()  # so that the next use connects anew
        assert database.find(["x"]) == {}
    assert (tmp_path / "results/results.db").is_file()


def test_a_password_is_not_repeated(monkeypatch):
    monkeypatch.setattr(connect, "create_engine", lambda *_, **__: (_ for _ in ()).throw(ImportError("no psycopg")))
    message = refusal("postgresql://me:secret@host/x")
    assert "secret" not in message
    assert "qbench[postgres]" in message
