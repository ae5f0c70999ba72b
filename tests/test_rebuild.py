"""Finished runs, measured again: from a row back to the point, for every scheme and algorithm that has a file."""

import json
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qbench.__main__ import main
from qbench.assets import resolve_model
from qbench.command import compose_evaluation, conf_dir
from qbench.compose import evaluations_of, freeze
from qbench.errors import SpecError
from qbench.rebuild import Means, rebuilt
from qbench.store.records import RunRow

ROOT = Path(__file__).parents[1]
BASE = ["model=tiny", "eval.corpora=[pydoc-heldout]", "eval.n=2", "eval.length=64", "calib=pydoc", "calib.n=2"]
BASE += ["calib.length=32"]


def point_of(*overrides):
    """As the command line freezes it."""
    import hydra

    from qbench.command import _check_keys

    _check_keys(list(overrides))
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return freeze(hydra.compose("config", overrides=[*BASE, *overrides]))


def row_of(point, **changes):
    """What the database would have of a point, through JSON."""
    spec = json.loads(json.dumps(point.spec.describe()))
    known = {"id": 7, "key": point.spec.key(), "status": "done", "environment_id": 1, "owner": "", "heartbeat": 0.0}
    known |= {"created": "", "model": point.spec.model.name, "algo": point.spec.algo, "spec": spec}
    return RunRow(**(known | changes))


def means_of(point, **changes):
    return replace(Means(model=point.model, calib_path=None, device=torch.device("cpu"), resume_s=60.0), **changes)


SETTINGS = [
    *(("algo=rtn", f"scheme={path.stem}") for path in sorted((conf_dir() / "scheme").glob("*.yaml"))),
    *(("scheme=w4a4", f"algo={name}") for name in ("quarot", "spinquant", "smoothquant+gptq")),
    ("algo=tesseraq", "bits=2"),
    ("algo=none",),
    ("algo=hqq",),
    ("algo=gptq", "calib.shuffle=words"),
    ("algo=gptq", "calib.shuffle=tokens", "calib.sampler=sequential", "calib.seed=3"),
    ("algo=gptq", "format=int", "scale_dtype=int8", "act_bits=8"),
    ("algo=rtn", "overrides=[{modules:down_proj,bits:8},{blocks:[0,-1],skip:true},{modules:lm_head,bits:8}]"),
    ("algo=rtn", "kv_bits=4", "kv.layout=token", "format=none", "overrides=[{blocks:[0],kv_bits:8}]"),
    ("algo=rtn", "format=ternary"),
    ("algo=rtn", "format=nf4dq"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: " ".join(each))
def test_a_row_leads_back_to_its_point(settings):
    settings = [each for each in settings if each != "scheme=default"]
    if any("g128" in each for each in settings):
        settings.append("group_size=64")
    try:
        point = point_of(*settings)
    except SpecError as error:
        pytest.fail(f"the test's own settings: {error}")
    again = rebuilt(row_of(point), point.evaluations, means_of(point))
    assert again.spec.key() == point.spec.key()
    assert again.recipe == point.recipe
    assert again.spec.describe() == point.spec.describe()
    assert again.calibration == point.calibration


def test_what_cannot_be_rebuilt_is_refused_in_one_line():
    point = point_of("algo=gptq")
    row, means = row_of(point), means_of(point)
    for problem, expected in [
        (lambda: rebuilt(row, (), replace(means, model=replace(means.model, fingerprint="0" * 64))), "^model=tiny"),
        (lambda: rebuilt(_changed(row, ("pipeline", 0, "version"), 0), (), means), "version 1.*start it anew"),
        (lambda: rebuilt(_changed(row, ("pipeline", 0, "options", "damp"), 0.5), (), means), "start it anew"),
        (lambda: rebuilt(_changed(row, ("scheme", "weight", "element"), {"odd": 1}), (), means), "start it anew"),
        (lambda: rebuilt(_changed(row, ("calibration", "fingerprint"), "0"), (), means), "^calib.path=pydoc: the text"),
        (lambda: rebuilt(_changed(row, ("calibration", "corpus"), "mine"), (), means), "^calib.path=null"),
    ]:
        with pytest.raises(SpecError, match=expected) as caught:
            problem()
        assert "\n" not in str(caught.value)


def _changed(row, path, value):
    spec = json.loads(json.dumps(row.spec))
    inner = spec
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    return replace(row, spec=spec)


def test_other_settings_than_evaluations_are_refused():
    for argument in ("algo=rtn", "bits=3", "model=tiny", "calib.n=3", "seed=1"):
        with pytest.raises(SpecError, match="all else is as it was in the run"):
            compose_evaluation([argument])
    assert evaluations_of({**compose_evaluation(["eval.n=3"]).eval, "corpora": ["pydoc"]}, "memory")[0].spec.n == 3


def test_a_finished_run_is_measured_again_after_a_restart(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["algo=gptq", "bits=3", "eval=perplexity", *BASE]) == 0
    again = ["eval", "2", "eval.corpora=[pydoc]", "eval.n=3", "eval.length=32"]
    command = [sys.executable, "-m", "qbench", *again]
    subprocess.run(command, check=True, env={**_environment(), "PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    with sqlite3.connect("results/results.db") as connection:
        found = connection.execute("select run_id, task, protocol, n from metric order by id").fetchall()
        runs = connection.execute("select count(*) from run").fetchone()
    assert found == [
        (1, "pydoc-heldout", "window-64", 2),
        (2, "pydoc-heldout", "window-64", 2),
        (1, "pydoc", "window-32", 3),  # the baseline is measured beside it
        (2, "pydoc", "window-32", 3),
    ]
    assert runs == (2,)
    capfd.readouterr()
    assert main(again) == 0
    assert "Nothing to do" in capfd.readouterr().out


def test_evaluations_are_composed_and_measured_in_one_run(tmp_path, monkeypatch):
    """Points that differ in what is measured alone are one run, quantized once."""
    monkeypatch.chdir(tmp_path)
    assert main(["-m", "algo=rtn", "eval.n=1,2", *(each for each in BASE if not each.startswith("eval.n"))]) == 0
    with sqlite3.connect("results/results.db") as connection:
        found = connection.execute("select run_id, n from metric order by id").fetchall()
    assert found == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_an_unfinished_run_and_an_unknown_model_are_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["algo=rtn", *BASE]) == 0
    with sqlite3.connect("results/results.db") as connection:
        connection.execute("update run set status = 'failed' where id = 2")
        connection.execute("update run set model = 'mine' where id = 1")
    capfd.readouterr()
    assert main(["eval", "2"]) == 2
    assert "run=2: a finished run; this one is failed" in capfd.readouterr().err
    assert main(["eval", "1"]) == 2
    assert "model.path=null: where the model mine of run 1 is" in capfd.readouterr().err
    assert main(["eval", "eval.n=3"]) == 2
    assert "at least one run" in capfd.readouterr().err


def _environment():
    import os

    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads() + 1)}  # a rebuild takes the run's number


def test_the_models_files_are_found_by_name(tmp_path):
    """A model that a named file describes needs no path."""
    tiny = resolve_model(name="tiny", asset="package:tiny")
    assert point_of("algo=rtn").model == tiny
