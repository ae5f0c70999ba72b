"""Several processes on one database, some of them killed."""

import random
import signal
import sqlite3
import time

from qbench.store import queries
from qbench.store.database import Database
from qbench.store.records import Outcome
from tests.store.workers import columns, key_of, measurement


def test_eight_processes_share_a_database_that_none_of_them_found(url, start):
    """All begin by creating it; then each goes through the same 50 keys, so that they meet all the time."""
    workers = [start("churn", url, 6 * number, 50) for number in range(8)]
    finished = []
    for worker in workers:
        out, err = worker.communicate(timeout=60)
        assert worker.returncode == 0, err
        finished += out.split()
    assert sorted(finished, key=int) == [str(number) for number in range(50)]  # each once
    with Database(url) as database:
        rows = queries.runs(database, superseded=True)
        assert [(row.status, row.superseded_by) for row in rows] == [("done", None)] * 50
        assert len(queries.metrics(database, [row.id for row in rows])) == 50


def test_of_simultaneous_claims_one_is_granted(url, start):
    workers = [start("claim", url, "point") for _ in range(4)]
    assert {worker.stdout.readline() for worker in workers} == {"ready\n"}
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    answers = sorted(worker.stdout.readline().strip() for worker in workers)
    assert answers == ["held", "refused", "refused", "refused"]


def test_the_claim_of_a_killed_process_is_taken_over_at_once_that_of_a_live_one_never(database, url, start):
    worker = start("hold", url, "point")
    assert worker.stdout.readline().strip() == "held"
    assert database.begin(columns(), key_of("point")) is None
    before = database.find([key_of("point")])[key_of("point")]
    worker.send_signal(signal.SIGSTOP)  # asleep is not dead, however long it lasts
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE run SET heartbeat = 0")
    assert database.begin(columns(), key_of("point")) is None

    worker.kill()
    deadline = time.monotonic() + 10  # the worker is not waited for: a zombie is dead too
    while (claim := database.begin(columns(), key_of("point"))) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert claim.run_id == before.id
    database.finish(claim, Outcome(), [measurement()])
    assert [row.status for row in queries.runs(database, superseded=True)] == ["done"]


def test_killing_writers_at_random_moments_leaves_whole_rows_only(url, start):
    """Every row is either running without metrics or done with exactly one; the next process completes the
    rest."""
    chance = random.Random(7)
    Database(url).close()
    for _ in range(5):
        worker = start("churn", url, 0, 400)
        worker.stdout.readline()
        time.sleep(chance.uniform(0, 0.2))
        worker.kill()
        worker.wait()
        with sqlite3.connect(url.removeprefix("sqlite:///")) as plain:
            assert plain.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            broken = """SELECT run.id, status, count(metric.id), count(sample.n) FROM run
                LEFT JOIN metric ON metric.run_id = run.id LEFT JOIN sample ON sample.metric_id = metric.id
                GROUP BY run.id
                HAVING count(metric.id) <> (status = 'done') OR count(sample.n) <> (status = 'done')"""
            assert plain.execute(broken).fetchall() == []
        plain.close()
    out, err = start("churn", url, 0, 400).communicate(timeout=60)
    assert out, err
    with Database(url) as database:
        rows = queries.runs(database, superseded=True)
    assert len(rows) == len({row.key for row in rows}) == 400
    assert {row.status for row in rows} == {"done"}
