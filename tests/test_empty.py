"""Every command and every figure of an empty database and of one with a single row: nothing breaks, and what is missing
is said."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from analysis.pareto import pareto_figures
from analysis.tables.sweep import sweep_table
from qbench.cli import _parser, main
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.records import Environment, LayerMetric, Measurement, Outcome, RunColumns

HERE = Environment(
    git_commit=None, git_dirty=None, versions={}, platform="p", cpu="c", threads=1, gpu=None, driver=None
)
MEASURED = Measurement(
    evaluator="perplexity", protocol="window-512", task="c4-sample", name="ppl", value=math.e**3, stderr=1.0, n=4,
    unit="ppl", spec_key="e" * 64, samples=np.full(4, 3.0),
)  # fmt: skip
LAYER = LayerMetric(block=0, module="self_attn.q_proj", name="output_error", value=0.1)


def columns(algo: str, **more) -> RunColumns:
    spec = {"algo": algo, "pipeline": [{"name": algo, "version": 1, "options": {}}] if algo != "none" else []}
    return RunColumns(model="tiny", algo=algo, spec=spec, dtype="float32", **more)


QUANTIZED = columns("gptq", bits=4, group_size=64, symmetric=False, weight_format="int4_g64_asym", calib="c4-sample")


def done(database: Database, run: RunColumns, *measurements: Measurement, layers: tuple[LayerMetric, ...] = ()) -> None:
    outcome = Outcome(bits_per_weight=4.3, quantize_s=1.0, model_bytes=10**6, peak_host_bytes=10**9)
    database.finish(database.begin(run, "a" * 64, HERE), outcome, measurements, layers)


DATABASES: dict[str, Callable[[Database], None]] = {
    "empty": lambda database: None,
    "one row": lambda database: done(database, QUANTIZED, MEASURED, layers=(LAYER,)),
    "one row without a measurement": lambda database: done(database, QUANTIZED),
    "full precision alone": lambda database: done(database, columns("none"), MEASURED),
    "one failed row": lambda database: database.fail(database.begin(QUANTIZED, "a" * 64, HERE), "E", "broken", "trace"),
    "one running row": lambda database: database.begin(QUANTIZED, "a" * 64, HERE),
}

#: Arguments of every command that shows something, and what an empty database has to make it say.
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "ls": ((), "no runs match"),
    "show": (("1",), "no run"),
    "compare": (("1", "1"), "no run"),
    "why": (("1", "1"), "no run"),
    "layers": (("1", "--out", "out"), "no run"),
    "export": (("--out", "out.csv"), "nothing to do|out.csv"),
    "best": (("--out", "out"), "No finished run"),
    "recommend": (("--out", "out"), "nothing to recommend"),
    "pareto": (("--out", "out"), "nothing to draw"),
    "pareto --x": (("--x", "quantize_s", "--y", "acc", "--out", "out"), "nothing to draw"),
    "attribute": (("--bootstrap", "100", "--out", "out"), "nothing to attribute"),
    "align": (("--out", "out"), "a run of llama-2-7b"),
    "report": (("--tables", "t7", "--out", "out.html"), "out.html"),
    "fill": (("t7", "--size", "tiny", "--render-only", "results=out"), "Nothing has been measured yet"),
    "findings": (("--size", "tiny", "--out", "out/findings.md"), "undecided|not tested"),
}
#: These change a database, or look at the machine; tests of their own have them on empty databases.
ELSEWHERE = {"eval", "merge", "doctor"}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planted(name: str) -> str:
    with Database("sqlite:///r.db") as database:
        DATABASES[name](database)
    return "sqlite:///r.db"


def test_no_command_is_left_out():
    (choices,) = [action.choices for action in _parser()._actions if action.choices]
    assert {name.partition(" ")[0] for name in COMMANDS} | ELSEWHERE == set(choices)


#: These compose declared tables, which takes seconds, whatever is in the database.
COMPOSING = {"report", "fill", "findings"}
CASES = [(name, command) for command in COMMANDS for name in DATABASES]


@pytest.mark.parametrize(
    ("name", "command"),
    [case for case in CASES if case[1] not in COMPOSING or case[0] in ("empty", "one row")],
)
def test_a_command_has_something_to_say(folder, capsys, name, command):
    arguments, missing = COMMANDS[command]
    code = main([command.partition(" ")[0], *arguments, "--store", planted(name)])
    said = "".join(capsys.readouterr())
    assert said.strip()
    assert "Traceback" not in said
    if name == "empty":
        assert any(words in said for words in missing.split("|")), said
    else:  # one line of reason is allowed where one row is too few; recommending nothing is code 1
        assert code in (0, 1) or (code == 2 and said.startswith("qbench: ") and said.count("\n") == 1), said


@pytest.mark.parametrize("name", DATABASES)
def test_a_sweeps_table_and_figures_are_drawn(folder, name):
    with Database(planted(name)) as database:
        runs = queries.runs(database)
        table = sweep_table(database, [run.key for run in runs] or ["b" * 64], [MEASURED.spec_key])
        files = pareto_figures(table, folder / "figures")
    assert len(files) == (3 if name == "one row" else 0)
    assert table.frame["status"].tolist() == [run.status for run in runs] or ["missing"]
