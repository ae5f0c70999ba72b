import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qbench.cli import main
from qbench.store.database import Database
from qbench.store.records import Artifact, LayerMetric, Measurement, Outcome, RunColumns

KEYS = ("a" * 64, "ab" * 32, "c" * 64)


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A database with a done run (1), a failed one (2) and one that was interrupted (3)."""
    url = f"sqlite:///{tmp_path}/results.db"
    ppl = Measurement(
        evaluator="perplexity", protocol="window-512", task="c4-sample", name="ppl", value=38.14,
        stderr=0.52, n=2, unit="ppl", spec_key="e" * 64, samples=np.array([3.6, 3.7]),
    )  # fmt: skip
    layers = [LayerMetric(block=b, module="q_proj", name="output_error", value=b / 100) for b in range(12)]
    layers.append(LayerMetric(block=0, module="q_proj", name="seconds", value=99.0))
    spec = {"pipeline": [{"name": "round_gptq", "options": [["damp", 0.01]]}], "seed": None}
    columns = RunColumns(model="tiny", algo="gptq", spec=spec, bits=4, weight_format="int4_g64_asym", calib="c4-sample")
    outcome = Outcome(bits_per_weight=4.3125, phases={"quantize": {"gptq": 1.5}}, model_bytes=123)
    with Database(url) as database:
        claim = database.begin(columns, KEYS[0])
        files = [Artifact(kind="hf", path="/models/[bold]x", sha256="f" * 64, bytes=10)]
        database.finish(claim, outcome, [ppl], layers, files)
        claim = database.begin(RunColumns(model="big", algo="awq", spec={}), KEYS[1])
        database.fail(claim, "NumericsError", "singular [red]", 'File "x.py", line 3\nNumericsError: singular')
        claim = database.begin(RunColumns(model="tiny", algo="none", spec={}), KEYS[2])
        with database.write() as connection:
            connection.exec_driver_sql(f"UPDATE run SET heartbeat = 0 WHERE id = {claim.run_id}")
    return url


def output(capsys, *arguments: str) -> str:
    assert main(arguments) == 0
    found = capsys.readouterr()
    assert found.err == ""
    return found.out


def test_ls_lists_runs_with_what_they_gave(store, capsys):
    lines = output(capsys, "ls", "--store", store).splitlines()
    rows = [" ".join(line.split()) for line in lines if line.strip()[:1].isdigit()]
    assert rows == [
        "1 aaaaaaaaaa done tiny gptq int4_g64_asym c4-sample 4.312 ppl c4-sample window-512 38.14",
        "2 ababababab failed big awq NumericsError",
        "3 cccccccccc interrupted tiny none",
    ]


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ([], [1, 2, 3]),
        (["--algo", "gptq"], [1]),
        (["--model", "tiny"], [1, 3]),
        (["--model", "tiny", "--status", "running"], [3]),
        (["--algo", "gptq", "--status", "failed"], []),
    ],
)
def test_ls_filters_by_every_given_value(store, capsys, filters, ids):
    assert [run["id"] for run in json.loads(output(capsys, "ls", "--store", store, "--json", *filters))] == ids
    if not ids:
        assert output(capsys, "ls", "--store", store, *filters) == "no runs match\n"


def test_ls_shows_superseded_attempts_on_request(store, capsys):
    with Database(store) as database:
        database.begin(RunColumns(model="big", algo="awq", spec={}), KEYS[1])
    ids = [
        [run["id"] for run in json.loads(output(capsys, "ls", "--store", store, "--json", *more))]
        for more in ([], ["--all"])
    ]
    assert ids == [[1, 3, 4], [1, 2, 3, 4]]


@pytest.mark.parametrize("reference", ["1", "aa", KEYS[0]])
def test_show_prints_all_of_a_run(store, capsys, reference):
    text = output(capsys, "show", reference, "--store", store)
    parts = ("done", KEYS[0], "damp", "0.01", "window-512", "38.14 ± 0.52", "n = 2", "quantize.gptq", "1.5")
    for part in (*parts, "versions.python", "/models/[bold]x", "f" * 64):
        assert part in text
    errors = [line.split()[1:] for line in text.splitlines() if line.strip().startswith("block ")]
    assert errors == [[str(b), "q_proj", f"{b / 100:.4g}"] for b in range(11, 1, -1)]
    assert "of 12 weights" in text


def test_show_prints_the_trace_of_a_failed_run(store, capsys):
    text = output(capsys, "show", "2", "--store", store)
    assert 'File "x.py", line 3\nNumericsError: singular' in text
    assert "singular [red]" in text


def test_show_as_json_holds_everything(store, capsys):
    run = json.loads(output(capsys, "show", "1", "--store", store, "--json"))
    assert (run["id"], run["state"], run["bits_per_weight"]) == (1, "done", 4.3125)
    assert run["metrics"][0]["value"] == 38.14
    assert len(run["layer_metrics"]) == 13
    assert run["artifacts"][0]["bytes"] == 10
    assert run["environment"]["versions"]["qbench"]
    assert run["spec"]["seed"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "9", "--store", "{store}"], ["run=9", "qbench ls"]),
        (["show", "a", "--store", "{store}"], ["run=a", "several"]),
        (["ls", "--store", "{store}x"], ["store.url=", "no such database"]),
        (["ls", "--store", "results.db"], ["store.url=results.db", "sqlite:///"]),
        (["ls", "--status", "finished"], ["finished", "done"]),
        (["ls", "--colour"], ["--colour"]),
        (["sho", "1"], ["sho", "show"]),
        (["show"], ["run"]),
        ([], ["command"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(store, capsys, arguments, words):
    assert main([each.format(store=store) for each in arguments]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert len(found.err.splitlines()) == 1
    for word in words:
        assert word in found.err


def test_without_a_database_nothing_is_created(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["ls"]) == 2
    assert "store.url=sqlite:///results/results.db" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_looking_imports_no_heavy_library(store):
    script = (
        f"import sys; from qbench.cli import main; main(['ls', '--store', {store!r}]);"
        "print('HEAVY', *({'torch', 'transformers', 'pandas', 'matplotlib', 'alembic'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "HEAVY"
