"""Measurements that fail while others succeed: the run is done, the failure is kept, and tried again."""

import json
import sqlite3

import pytest

from qbench.__main__ import main
from qbench.errors import EvaluationError
from qbench.evaluation.perplexity import WindowPerplexity

BASE = ["model=tiny", "algo=rtn", "calib=pydoc", "eval.n=2", "eval.length=32", "eval.corpora=[pydoc-heldout,pydoc]"]


def fail_on(monkeypatch, *tasks):
    original = WindowPerplexity.measure

    def measure(self, subject, report):
        if self.spec.task in tasks and subject.weights.tensors:  # of the quantized model alone
            raise EvaluationError(f"{self.spec.task}: broken\nlong log")
        return original(self, subject, report)

    monkeypatch.setattr(WindowPerplexity, "measure", measure)


def query(text):
    with sqlite3.connect("results/results.db") as connection:
        return connection.execute(text).fetchall()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_one_failed_measurement_leaves_the_others(monkeypatch, capfd):
    with monkeypatch.context() as patch:
        fail_on(patch, "pydoc")
        assert main(BASE) == 1
        out = capfd.readouterr().out
        assert "failed rtn int4_g64_asym: pydoc: broken" in out
        assert query("select status from run where algo = 'rtn'") == [("done",)]
        assert query("select task from metric where run_id = 2") == [("pydoc-heldout",)]
        assert query("select run_id, task, error_type, message from failure") == [
            (2, "pydoc", "EvaluationError", "pydoc: broken")
        ]
        assert main(["show", "2"]) == 0
        out = capfd.readouterr().out
        assert "failed measurements" in out
        assert "long log" in out
        assert main(BASE) == 1  # tried again, and fails again
        assert query("select count(*) from failure") == [(2,)]
    capfd.readouterr()
    assert main(BASE) == 0
    assert query("select task from metric where run_id = 2") == [("pydoc-heldout",), ("pydoc",)]
    capfd.readouterr()
    assert main(["show", "2", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["failures"] == []


def test_a_run_of_which_nothing_could_be_measured_has_failed(monkeypatch):
    fail_on(monkeypatch, "pydoc", "pydoc-heldout")
    assert main(BASE) == 1
    ((status, message, trace),) = query("select status, error_message, error_trace from run where algo = 'rtn'")
    assert (status, message) == ("failed", "pydoc-heldout: broken")
    assert "in measure" in trace
    assert query("select count(*) from failure") == [(0,)]
