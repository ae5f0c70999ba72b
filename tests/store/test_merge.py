"""Merging: nothing is lost, what counts is right, twice is once, and every attempt keeps its machine."""

from dataclasses import replace

import numpy as np
import pytest
from sqlalchemy import func, select

from qbench.errors import AssetError
from qbench.store import queries, schema
from qbench.store.database import Database
from qbench.store.merge import merge, source_url
from qbench.store.records import (
    Anchor,
    Artifact,
    Environment,
    Failure,
    LayerMetric,
    Measurement,
    Noise,
    Outcome,
    RunColumns,
)

HERE = Environment(
    git_commit="a" * 40, git_dirty=False, versions={}, platform="p", cpu="c", threads=1, gpu=None, driver=None
)
THERE = replace(HERE, cpu="another")
NLLS = np.array([2.0, 2.5, 3.0])
ANCHORS = [
    Anchor(
        **{"source": source, "url": "https://example.org", "model": "m", "task": "t", "protocol": "p", "metric": "ppl"},
        **{"value": 3.0, "tolerance": 0.01, "algo": "gptq", "weight_format": "int4_g64_asym", "stages": ("gptq",)},
    )
    for source in ("a paper", "another")
]


def measured(name="ppl", spec_key="e" * 64) -> Measurement:
    return Measurement(
        evaluator="perplexity",
        protocol="window-512",
        task="text",
        name=name,
        value=float(np.exp(NLLS.mean())),
        stderr=0.5,
        n=3,
        unit="ppl",
        spec_key=spec_key,
        samples=NLLS,
        clusters=np.array([0, 0, 1]),
    )


def columns(algo="rtn") -> RunColumns:
    return RunColumns(model="tiny", algo=algo, spec={"algo": algo, "nested": [{"name": "ü"}]}, bits=4)


def done(database, key, environment=HERE, codes="1" * 64, measurements=None):
    claim = database.begin(columns(), key, environment)
    layers = [LayerMetric(block=0, module="q_proj", name="output_error", value=0.1)]
    artifacts = [Artifact(kind="hf", path="out", sha256=None, bytes=3)]
    found = [measured()] if measurements is None else measurements
    database.finish(claim, Outcome(codes_sha256=codes, phases={"a": 1.5}), found, layers, artifacts)
    return claim.run_id


def failed(database, key, environment=HERE, message="m"):
    claim = database.begin(columns(), key, environment)
    database.fail(claim, "NumericsError", message, "trace")
    return claim.run_id


def dump(database):
    """Every row of every table."""
    with database.read() as connection:
        return {
            name: [tuple(map(repr, row)) for row in connection.execute(select(table).order_by(*table.primary_key))]
            for name, table in schema.metadata.tables.items()
        }


def count(database, table):
    with database.read() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar()


def counting(database, key):
    return database.find([key])[key]


@pytest.fixture
def other(tmp_path):
    with Database(f"sqlite:///{tmp_path}/other.db") as opened:
        yield opened


def test_into_an_empty_database_everything_comes_as_it_is(database, other):
    failed(other, "k1")
    run_id = done(other, "k1", THERE)
    done(other, "k2")
    failed(other, "k3")
    other.append(
        run_id,
        [],
        failures=[
            Failure(evaluator="e", protocol="p", task="t", spec_key="f" * 64, error_type="E", message="m", trace="long")
        ],
    )
    other.add_noise(
        [
            Noise(
                family="f",
                spec_key="e" * 64,
                name="ppl",
                component="seed",
                sd=0.1,
                n=2,
                unit="ppl",
                settings=[0, 1],
                values=[1.0, 1.2],
            )
        ],
        THERE,
    )
    other.publish(ANCHORS)
    before = dump(other)
    found = merge(database, other)
    assert (found.added, found.present, found.measurements, found.noise, found.anchors) == (4, 0, 2, 1, 2)
    assert queries.anchors(database) == ANCHORS
    assert dump(other) == before
    for name, table in schema.metadata.tables.items():
        assert count(database, table) == len(before[name]), name
    copied, original = counting(database, "k1"), counting(other, "k1")
    assert replace(copied, id=0, environment_id=0) == replace(original, id=0, environment_id=0)
    assert queries.environment(database, copied.environment_id) == THERE
    metric = queries.metrics(database, [copied.id])[0]
    samples = queries.clustered_samples_of(database, [metric.id])[metric.id]
    assert samples.values.tolist() == NLLS.tolist()
    assert samples.clusters.tolist() == [0, 0, 1]
    assert queries.layer_metrics(database, copied.id) == queries.layer_metrics(other, original.id)
    attempts = [row for row in queries.runs(database, superseded=True) if row.key == "k1"]
    assert [row.superseded_by for row in attempts if row.id != copied.id] == [copied.id]


def test_twice_is_once(database, other):
    for key in ("k1", "k2"):
        done(database, key)
    failed(other, "k1")
    done(other, "k1", THERE)
    done(other, "k2", THERE, codes="2" * 64)
    failed(other, "k3")
    other.publish(ANCHORS)
    database.publish(ANCHORS[1:])
    merge(database, other)
    once = dump(database)
    again = merge(database, other)
    assert dump(database) == once
    assert (again.added, again.kept, again.measurements, again.shared, again.noise, again.anchors) == (0,) * 6
    assert queries.anchors(database) == ANCHORS[::-1]  # of a source that both have, those that were here


def test_there_and_back_again_adds_nothing_new(database, other):
    done(database, "k1")
    done(other, "k1", THERE)
    done(other, "k2", THERE)
    merge(database, other)
    merge(other, database)
    once = dump(database)
    assert merge(database, other).added == 0
    assert dump(database) == once
    assert count(other, schema.run) == count(database, schema.run) == 3


@pytest.mark.parametrize("here", ["failed", "done", "running"])
@pytest.mark.parametrize("there", ["failed", "done"])
def test_of_two_attempts_at_one_key_the_right_one_counts(database, other, here, there):
    make = {"failed": failed, "done": done, "running": lambda db, key, env=HERE: db.begin(columns(), key, env).run_id}
    ours = make[here](database, "k")
    make[there](other, "k", THERE)
    found = merge(database, other)
    newcomer_counts = {"failed": 0, "running": 1, "done": 2}
    wins = newcomer_counts[there] > newcomer_counts[here]
    assert (counting(database, "k").id != ours) == wins
    assert (found.replaced, found.kept) == (int(wins), int(not wins))
    assert count(database, schema.run) == 2
    loser = next(row for row in queries.runs(database, superseded=True) if row.superseded_by is not None)
    assert loser.superseded_by == counting(database, "k").id
    of_loser = queries.environment(database, loser.environment_id)
    assert of_loser == (HERE if wins else THERE)


def test_attempts_keep_the_order_in_which_they_superseded_each_other(database, other):
    originals = [failed(other, "k", message="first"), failed(other, "k", message="second"), done(other, "k")]
    merge(database, other)
    rows = {row.error_message: row for row in queries.runs(database, superseded=True)}
    assert len(rows) == len(originals)
    assert rows["first"].superseded_by == rows["second"].id
    assert rows["second"].superseded_by == rows[None].id
    assert rows[None].superseded_by is None


def test_equal_weights_share_measurements_and_different_ones_do_not(database, other):
    ours = done(database, "same")
    done(database, "different")
    extra = [measured(), measured("kl_mean", "a" * 64)]
    done(other, "same", THERE, measurements=extra)
    done(other, "different", THERE, codes="2" * 64, measurements=extra)
    found = merge(database, other)
    assert (found.shared, found.different) == (1, ["different"])
    places = {m.name: queries.environment(database, m.environment_id) for m in queries.metrics(database, [ours])}
    assert places == {"ppl": HERE, "kl_mean": THERE}
    assert {each.name for each in queries.metrics(database, [counting(database, "different").id])} == {"ppl"}


def test_what_was_measured_later_comes_with_the_next_merge(database, other):
    run_id = done(other, "k")
    merge(database, other)
    later = replace(THERE, git_dirty=True)
    other.append(run_id, [measured("kl_mean", "a" * 64)], environment=later)
    assert merge(database, other).measurements == 1
    found = queries.metrics(database, [counting(database, "k").id])
    assert [queries.environment(database, each.environment_id) for each in found] == [HERE, later]


def test_a_run_at_work_is_left_where_it_is_and_comes_when_it_is_done(database, other):
    failed(other, "k")
    claim = other.begin(columns(), "k", HERE)
    found = merge(database, other)
    assert (found.added, found.running, counting(database, "k").status) == (1, 1, "failed")
    other.finish(claim, Outcome(), [measured()])
    merge(database, other)
    assert counting(database, "k").status == "done"
    assert count(database, schema.run) == 2


def test_a_database_is_not_merged_with_itself(tmp_path, url, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (url, "results/results.db", str(tmp_path / "results" / ".." / "results" / "results.db")):
        with pytest.raises(AssetError, match="is the database to merge into"):
            source_url(name, url)
    assert source_url("other.db", url) == "sqlite:///other.db"
