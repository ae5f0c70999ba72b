"""The noise floor on model=tiny: which components there are, that they are what the rows say, and how they add up."""

import math
import sqlite3
from statistics import stdev

import pytest

from qbench.command import compose_one
from qbench.compose import freeze, sweep_options
from qbench.errors import SpecError
from qbench.noise import Plan, floor, noise_floor
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.records import Noise

BASE = ["model=tiny", "eval.corpora=[pydoc-heldout]", "eval.n=3", "eval.length=32", "calib=pydoc", "calib.n=2"]
BASE += ["calib.length=32", "group_size=32"]


def measured(folder, monkeypatch, *overrides, **plan):
    monkeypatch.chdir(folder)
    config = compose_one([*BASE, *overrides])
    said = []
    point = freeze(config)
    return point, noise_floor(point, Plan(**plan), sweep_options(config), said.append), said


def test_every_component_that_applies_is_measured_and_stored(tmp_path, monkeypatch):
    overrides = ("scheme=w4a4", "group_size=-1", "algo=quarot+gptq", "algo.quarot.rotate_mode=random")
    point, components, said = measured(tmp_path, monkeypatch, *overrides, repeats=3, batches=(1, 3), threads=(1, 2))
    found = {each.component: each for each in components}
    assert list(found) == ["calib_seed", "seed", "batch", "threads"]
    assert said == []
    assert {each.family for each in components} == {point.spec.family()}
    with sqlite3.connect("results/results.db") as connection:
        query = (
            "select run.calib_seed, metric.value from run join metric on metric.run_id = run.id where algo != 'none'"
        )
        values = connection.execute(f"{query} order by run.id").fetchall()
        families = connection.execute("select distinct family from run where algo != 'none'").fetchall()
    assert families == [(point.spec.family(),)]
    assert len(values) == 5  # three seeds of each kind, of which one point is the same
    assert sorted(found["calib_seed"].values) == sorted(dict(reversed(values)).values())
    assert 0 < found["calib_seed"].sd == pytest.approx(stdev(found["calib_seed"].values))
    assert found["seed"].sd > 0
    assert found["batch"].sd < 1e-4  # threads add in another order, which a rotation and GPTQ may amplify
    with Database("sqlite:///results/results.db") as database:
        stored = queries.noise(database, [point.spec.family()])
    assert list(stored) == [(point.spec.family(), point.evaluations[0].spec.key(), "ppl")]
    assert {each.component: each.sd for each in next(iter(stored.values()))} == {n: c.sd for n, c in found.items()}


def test_what_a_point_does_not_depend_on_is_said(tmp_path, monkeypatch):
    _, components, said = measured(tmp_path, monkeypatch, "algo=rtn", repeats=2, batches=(), threads=())
    assert components == []
    assert [line.split(":")[0].strip() for line in said] == ["calib_seed", "seed"]


def test_the_newest_component_counts_and_variances_add_up(tmp_path):
    def noise(component, sd):
        common = {"family": "f", "spec_key": "k", "name": "ppl", "unit": "ppl"}
        return Noise(component=component, sd=sd, n=2, settings=[0, 1], values=[1.0, 2.0], **common)

    assert floor([noise("seed", 3.0), noise("threads", 4.0)]) == 5.0
    from qbench.store.environment import detect

    with Database(f"sqlite:///{tmp_path}/r.db") as database:
        database.add_noise([noise("seed", 3.0), noise("threads", 4.0)], detect())
        database.add_noise([noise("seed", 12.0)], detect())
        (found,) = queries.noise(database, ["f", "g"]).values()
    assert math.isclose(floor(found), math.hypot(12, 4))


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"repeats": 1}, "repeats=1"), ({"batches": (0, 1)}, "batches=0,1"), ({"threads": (1, 1)}, "threads=1,1")],
)
def test_a_plan_that_shows_no_spread_is_refused(options, expected):
    with pytest.raises(SpecError, match=expected):
        Plan(**options)
