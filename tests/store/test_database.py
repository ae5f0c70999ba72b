import sqlite3
import time
from dataclasses import replace

import numpy as np
import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError, StatementError

from qbench.errors import AssetError, EvaluationError
from qbench.store import owner, queries, schema
from qbench.store.database import Database, Heartbeat
from qbench.store.records import Artifact, Environment, LayerMetric, Outcome, RunColumns
from tests.store.workers import columns, key_of, measurement

KEY = key_of("point")
ELSEWHERE = Environment(
    git_commit="c0ffee",
    git_dirty=False,
    versions={"torch": "2"},
    platform="p",
    cpu="c",
    threads=1,
    gpu=None,
    driver=None,
)


def rewrite(database: Database, run_id: int, **values) -> None:
    with database.write() as connection:
        connection.execute(update(schema.run).where(schema.run.c.id == run_id).values(values))


def count(database: Database, table) -> int:
    with database.read() as connection:
        return len(connection.execute(select(table)).all())


def test_everything_that_goes_in_comes_out(database):
    given = RunColumns(
        model="tiny", algo="gptq", spec={"stages": [{"damp": 0.01}], "ö": None},
        weight_format="int4_g64_asym", act_format="bf16", kv_format="bf16", bits=4, group_size=64,
        symmetric=False, act_bits=16, kv_bits=16,
        calib="c4-sample", calib_n=16, calib_length=512, calib_seed=2**40, device="cpu", dtype="float32",
        source="memory",
    )  # fmt: skip
    outcome = Outcome(
        bits_per_weight=4.3125, bits_per_weight_model=5.5, embedding_bytes=2**33, head_bytes=0,
        model_bytes=2**34, sparsity=0.0, quantize_s=1.5, evaluate_s=2.5, load_s=0.5, total_s=4.5,
        phases={"gptq": {"hessian": 1.0}}, peak_host_bytes=2**35, peak_device_bytes=0, codes_sha256="ab" * 32,
    )  # fmt: skip
    nlls = np.array([np.pi, np.e, 1e-300, 0.1 + 0.2])
    layers = [LayerMetric(block=0, module="q_proj", name="output_error", value=1e-30)]
    files = [Artifact(kind="hf", path="/models/ü", sha256="cd" * 32, bytes=2**36)]
    claim = database.begin(given, KEY, ELSEWHERE)
    documents = np.array([7, 7, -1, 2**40])
    measured = measurement(samples=nlls, clusters=documents, higher_is_better=False)
    database.finish(claim, outcome, [measured], layers, files)

    row = database.find([KEY, key_of("unknown")])
    assert list(row) == [KEY]
    row = row[KEY]
    assert (row.status, row.key, row.owner, row.error_type) == ("done", KEY, claim.owner, None)
    for expected in (given, outcome):
        for name, value in vars(expected).items():
            assert getattr(row, name) == value, name
    assert queries.environment(database, row.environment_id) == ELSEWHERE
    (metric,) = queries.metrics(database, [row.id])
    assert (metric.value, metric.stderr, metric.n, metric.protocol) == (20.0, 0.5, 4, "window-512")
    assert metric.higher_is_better is False
    assert np.array_equal(queries.samples(database, metric.id), nlls)
    stored = queries.clustered_samples_of(database, [metric.id])[metric.id]
    assert np.array_equal(stored.values, nlls)
    assert (stored.clusters.tolist(), stored.clusters.dtype) == (documents.tolist(), np.dtype(np.int64))
    assert queries.layer_metrics(database, row.id) == layers
    assert queries.artifacts(database, row.id) == files
    assert database.measured(row.id) == {measurement().spec_key}


def test_a_live_claim_and_a_done_run_are_refused(database):
    claim = database.begin(columns(), KEY)
    assert database.begin(columns(), KEY) is None
    database.finish(claim, Outcome(), [measurement()])
    assert database.begin(columns(), KEY) is None
    assert count(database, schema.run) == 1
    assert not database.heartbeat(claim)
    assert not database.fail(claim, "KeyboardInterrupt", "too late", "trace")
    assert database.find([KEY])[KEY].status == "done"


def test_a_failed_run_is_kept_and_superseded_by_the_next_attempt(database):
    attempts = []
    for number in range(3):
        claim = database.begin(columns(), KEY)
        attempts.append(claim.run_id)
        if number < 2:
            assert database.fail(claim, "NumericsError", f"no {number}", "trace", Outcome(load_s=1.0))
    rows = {row.id: row for row in queries.runs(database, superseded=True)}
    assert [rows[id].superseded_by for id in attempts] == [attempts[1], attempts[2], None]
    assert [rows[id].status for id in attempts] == ["failed", "failed", "running"]
    first = rows[attempts[0]]
    assert (first.error_type, first.error_message, first.error_trace, first.load_s) == (
        "NumericsError", "no 0", "trace", 1.0,
    )  # fmt: skip
    assert database.find([KEY])[KEY].id == attempts[2]


def test_a_dead_claim_is_taken_over_in_place_and_its_old_holder_can_do_nothing(database):
    old = database.begin(columns(), KEY, ELSEWHERE)
    rewrite(database, old.run_id, heartbeat=time.time() - owner.STALE_AFTER_S - 1)
    new = database.begin(columns("again"), KEY)
    assert new.run_id == old.run_id
    assert new.owner != old.owner
    row = database.find([KEY])[KEY]
    assert row.spec == {"name": "again"}
    assert queries.environment(database, row.environment_id) != ELSEWHERE

    assert not database.heartbeat(old)
    assert not database.fail(old, "E", "m", "t")
    with pytest.raises(AssetError, match="another process took its claim over"):
        database.finish(old, Outcome(), [measurement()])
    assert count(database, schema.metric) == 0
    database.finish(new, Outcome(), [measurement()])
    assert database.find([KEY])[KEY].status == "done"


def test_finish_stores_everything_or_nothing(database):
    claim = database.begin(columns(), KEY)

    def layers():
        yield LayerMetric(block=0, module="q", name="error", value=0.1)
        raise MemoryError  # whatever happens between the first and the last row

    with pytest.raises(MemoryError):
        database.finish(claim, Outcome(), [measurement()], layers())
    assert database.find([KEY])[KEY].status == "running"
    assert [count(database, table) for table in (schema.metric, schema.sample, schema.layer_metric)] == [
        0,
        0,
        0,
    ]


def test_a_heartbeat_is_written_until_the_block_ends_and_notices_a_lost_claim(database):
    claim = database.begin(columns(), KEY)
    rewrite(database, claim.run_id, heartbeat=0.0)
    with Heartbeat(database, claim, interval_s=0.01) as heartbeat:
        deadline = time.monotonic() + 10
        while database.find([KEY])[KEY].heartbeat == 0.0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not heartbeat.lost
        rewrite(database, claim.run_id, owner="other:1:x:y")
        while not heartbeat.lost:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    rewrite(database, claim.run_id, owner=claim.owner, heartbeat=0.0)
    time.sleep(0.05)
    assert database.find([KEY])[KEY].heartbeat == 0.0


def test_append_adds_what_is_missing_and_keeps_what_is_there(database):
    claim = database.begin(columns(), KEY)
    with pytest.raises(AssetError, match="is running: only a done run"):
        database.append(claim.run_id, [measurement()])
    with pytest.raises(AssetError, match="run 77 is not in the database"):
        database.append(77, [measurement()])
    database.finish(claim, Outcome(), [measurement(20.0)])
    other = key_of("another evaluator")
    assert database.append(claim.run_id, [measurement(99.0), measurement(30.0, spec_key=other)]) == 1
    assert database.append(claim.run_id, [measurement(98.0), measurement(97.0, spec_key=other)]) == 0
    exported = Artifact(kind="hf", path="/models/x", sha256=None, bytes=3)
    assert database.append(claim.run_id, [], [exported]) == 0
    assert queries.artifacts(database, claim.run_id) == [exported]
    assert [each.value for each in queries.metrics(database, [claim.run_id])] == [20.0, 30.0]
    assert count(database, schema.sample) == 2
    assert database.measured(claim.run_id) == {key_of("evaluator"), other}


def test_a_measurement_says_where_it_was_taken(database):
    claim = database.begin(columns(), KEY, ELSEWHERE)
    database.finish(claim, Outcome(), [measurement(20.0)])
    later = replace(ELSEWHERE, git_dirty=True)
    database.append(claim.run_id, [measurement(30.0, spec_key=key_of("b"))], environment=later)
    database.append(claim.run_id, [measurement(40.0, spec_key=key_of("c"))])
    places = [queries.environment(database, m.environment_id) for m in queries.metrics(database, [claim.run_id])]
    assert places == [ELSEWHERE, later, ELSEWHERE]
    view = queries.frame(database).sort_values("value")["environment_id"]
    assert [queries.environment(database, int(number)) for number in view] == places


def test_two_measurements_of_one_spec_and_name_are_refused(database):
    claim = database.begin(columns(), KEY)
    with pytest.raises(EvaluationError, match="two measurements named ppl"):
        database.finish(claim, Outcome(), [measurement(), measurement()])
    assert database.find([KEY])[KEY].status == "running"


def test_equal_environments_share_a_row(database):
    database.begin(columns(), key_of("a"), ELSEWHERE)
    database.begin(columns(), key_of("b"), ELSEWHERE)
    database.begin(columns(), key_of("c"))
    assert count(database, schema.environment) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.5e308, None])
def test_the_table_itself_refuses_values_that_are_not_finite(database, value):
    claim = database.begin(columns(), KEY)
    row = dict.fromkeys(("evaluator", "protocol", "task", "name", "unit", "spec_key", "created"), "x")
    row |= {"run_id": claim.run_id, "n": 1}
    with database.write() as connection:
        connection.execute(insert(schema.metric).values(row | {"value": 1e308}))
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(insert(schema.metric).values(row | {"name": "y", "value": value}))


def test_the_tables_refuse_what_would_break_the_bookkeeping(database):
    claim = database.begin(columns(), KEY)
    with database.read() as connection:
        row = dict(connection.execute(select(schema.run)).mappings().one()) | {"id": 50}
    broken = {
        "same key": {},
        "status": {"key": "x", "status": "Done"},
        "environment": {"key": "x", "environment_id": 9},
    }
    for change in broken.values():
        with pytest.raises(IntegrityError), database.write() as connection:
            connection.execute(insert(schema.run).values(row | change))
    with pytest.raises(StatementError):  # JSON has no NaN
        database.begin(RunColumns(model="m", algo="a", spec={"x": float("nan")}), key_of("nan"))
    assert claim.run_id == 1


def test_more_keys_than_a_statement_has_parameters(database):
    database.begin(columns(), KEY)
    with database.read() as connection:  # the pool hands this connection out again
        connection.connection.driver_connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)
    assert list(database.find([key_of(str(i)) for i in range(2000)] + [KEY])) == [KEY]


def test_the_results_view_shows_runs_that_are_done_and_count(database, url):
    for name, ending in (
        ("done", "done"),
        ("failed", "failed"),
        ("running", None),
        ("old", "done"),
        ("withdrawn", "done"),
    ):
        claim = database.begin(columns(name), key_of(name))
        if ending == "done":
            database.finish(claim, Outcome(bits_per_weight=4.5), [measurement()])
        if ending == "failed":
            database.fail(claim, "E", "m", "t")
    rewrite(database, database.find([key_of("old")])[key_of("old")].id, superseded_by=1)
    rewrite(database, database.find([key_of("withdrawn")])[key_of("withdrawn")].id, status="failed")
    with sqlite3.connect(url.removeprefix("sqlite:///")) as plain:
        rows = plain.execute("SELECT algo, bits, task, metric, value, bits_per_weight FROM results").fetchall()
    plain.close()
    assert rows == [("rtn", 4, "c4-sample", "ppl", 20.0, 4.5)]
