"""Whole sweeps on model=tiny: rows, resuming, killing, concurrency, failures, determinism."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import qbench.models
from qbench.__main__ import main
from qbench.store.owner import is_alive

ROOT = Path(__file__).parents[1]
TINY = Path(qbench.models.__file__).parent / "tiny"
BASE = [
    "model=tiny",
    "eval.corpora=[pydoc-heldout]",
    "eval.n=4",
    "eval.length=128",
    "calib=pydoc",
    "calib.n=4",
    "calib.length=128",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(path="results/results.db", where="superseded_by is null"):
    with sqlite3.connect(path) as connection:
        return connection.execute(
            f"select algo, bits, status, key, id from run where {where} order by algo, bits"
        ).fetchall()


def values(path="results/results.db"):
    query = (
        "select run.key, run.codes_sha256, metric.value, metric.stderr, metric.n, sample.\"values\" from run "
        "join metric on metric.run_id = run.id join sample on sample.metric_id = metric.id order by run.key"
    )
    with sqlite3.connect(path) as connection:
        return connection.execute(query).fetchall()


def command(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "qbench", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_main_job_gives_a_row_per_point_and_the_baseline(folder, capfd):
    assert main(["-m", "algo=awq,gptq", "bits=2,3,4", *BASE]) == 0
    found = rows()
    assert [(algo, bits, status) for algo, bits, status, *_ in found] == [
        *[(algo, bits, "done") for algo in ("awq", "gptq") for bits in (2, 3, 4)],
        ("none", None, "done"),
    ]
    assert len(values()) == 7
    for suffix in ("pdf", "png", "csv"):
        assert Path(f"results/pareto-pydoc-heldout.{suffix}").stat().st_size > 100
    capfd.readouterr()
    before = values()
    assert main(["-m", "algo=awq,gptq", "bits=2,3,4", *BASE]) == 0
    assert "Nothing to do" in capfd.readouterr().out
    assert values() == before
    assert main(["-m", "algo=awq,gptq", "bits=2,3,4,8", *BASE]) == 0
    out = capfd.readouterr().out
    assert sum(line.startswith("done   ") for line in out.splitlines()) == 2
    assert len(rows()) == 9


def test_the_same_configuration_gives_the_same_bits(folder):
    for name in ("a", "b"):
        assert main(["-m", "algo=awq,gptq", "bits=3", f"store.url=sqlite:///{name}.db", *BASE]) == 0
    assert values("a.db") == values("b.db")


def test_memory_and_stream_agree(folder):
    for source in ("memory", "stream"):
        arguments = ["-m", "algo=rtn,awq,gptq", "bits=3", f"store.url=sqlite:///{source}.db", f"source={source}"]
        assert main([*arguments, *BASE]) == 0
    memory, stream = values("memory.db"), values("stream.db")
    assert [row[:2] for row in memory] == [row[:2] for row in stream]
    for here, there in zip(memory, stream, strict=True):
        assert here[2] == pytest.approx(there[2], rel=1e-6)


def test_measuring_more_appends_to_the_same_run(folder, capfd):
    assert main(["algo=gptq", "bits=3", *BASE]) == 0
    first = rows()
    other = [argument.replace("eval.n=4", "eval.n=3") for argument in BASE]
    assert main(["algo=gptq", "bits=3", *other]) == 0
    assert "to measure" in capfd.readouterr().out
    assert rows() == first
    assert len(values()) == 4


def test_a_failing_point_leaves_a_row_and_the_sweep_goes_on(folder, capfd):
    # Sixteen tokens and no damping: the Hessian of 128 inputs is singular.
    arguments = [a.replace("calib.n=4", "calib.n=1").replace("calib.length=128", "calib.length=16") for a in BASE]
    assert main(["-m", "algo=gptq", "algo.damp=0,0.01", "bits=4", *arguments]) == 1
    found = {row[2] for row in rows()}
    assert found == {"done", "failed"}
    with sqlite3.connect("results/results.db") as connection:
        kind, message, trace = connection.execute(
            "select error_type, error_message, error_trace from run where status = 'failed'"
        ).fetchone()
    assert kind == "NumericsError"
    assert "singular Hessian" in message
    assert "Traceback" in trace
    assert "singular Hessian" in capfd.readouterr().out
    assert main(["-m", "algo=gptq", "algo.damp=0,0.01", "bits=4", *arguments]) == 1  # tried again, one live row
    assert len(rows()) == 3
    assert len(rows(where="status = 'failed'")) == 2


def test_weights_that_are_not_finite_fail_every_point(folder, capfd):
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(folder / "broken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "broken" / name).write_bytes((TINY / name).read_bytes())
    arguments = [argument for argument in BASE if argument != "model=tiny"]
    assert main(["algo=rtn", "model.path=broken", *arguments]) == 1
    assert {row[2] for row in rows()} == {"failed"}
    for source in ("memory", "stream"):
        assert main(["algo=gptq", "model.path=broken", f"source={source}", *arguments]) == 1
    assert "up_proj" in capfd.readouterr().out


def test_an_export_loads_without_qbench(folder):
    assert main(["algo=gptq", "bits=3", "export=hf", "export.path=out", *BASE]) == 0
    model = AutoModelForCausalLM.from_pretrained("out")
    weight = model.model.layers[2].mlp.down_proj.weight.data
    groups = weight.view(-1, 64)
    assert max(len(torch.unique(group)) for group in groups) <= 8
    assert main(["algo=gptq", "bits=3", "export=hf", "export.path=out", *BASE]) == 0
    assert main(["algo=gptq", "bits=3", "export=hf", "export.path=out2", "source=stream", *BASE]) == 0
    again = AutoModelForCausalLM.from_pretrained("out2")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def working():
    """Whether a process that is alive has a point in work."""
    try:
        with sqlite3.connect("results/results.db") as connection:
            found = connection.execute("select owner, heartbeat from run where status = 'running'").fetchall()
    except sqlite3.OperationalError:  # no file or no tables yet
        return False
    return any(is_alive(owner, heartbeat) for owner, heartbeat in found)


def test_a_killed_sweep_goes_on_and_loses_nothing(folder):
    arguments = ["-m", "algo=gptq,rtn", "bits=2,3,4,5,6,7,8", *BASE]
    kept: set = set()
    generator = random.Random(0)
    for _ in range(4):
        process = command(*arguments)
        while not working() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = {row[3:] for row in rows(where="status = 'done'")}
        assert kept <= done
        kept = done
    process = command(*arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert [status for _, _, status, *_ in rows()] == ["done"] * 15
    assert kept <= {row[3:] for row in rows()}


def test_two_sweeps_at_once_share_the_work(folder):
    arguments = ["-m", "algo=gptq,rtn", "bits=2,3,4", *BASE]
    processes = [command(*arguments), command(*arguments)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "locked" not in "".join(outputs)
    found = rows(where="1 = 1")
    assert len(found) == len({row[3] for row in found}) == 7
    assert {row[2] for row in found} == {"done"}


def test_nothing_to_do_needs_no_transformers(folder):
    assert main(["algo=gptq", "bits=4", *BASE]) == 0
    code = (
        "import sys; from qbench.__main__ import main; "
        f"code = main({['algo=gptq', 'bits=4', *BASE]!r}); assert code == 0; "
        "sys.exit(7 if 'transformers' in sys.modules else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
