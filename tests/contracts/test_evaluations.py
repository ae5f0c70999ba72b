"""Every evaluation gives the metrics that it says it gives."""

import sqlite3
from pathlib import Path

import pytest

from qbench.__main__ import main
from qbench.command import compose_one, conf_dir
from qbench.compose import freeze

TEXT = "eval.corpora=[pydoc-heldout]"
#: By evaluator the options that make it short.
SHORT = {
    "perplexity": (TEXT, "eval.n=2", "eval.length=64"),
    "decode": (TEXT, "eval.n=1", "eval.length=16"),
    "rolling": ("eval.path=rows.jsonl", "eval.n=2"),
    "token_kl": (TEXT, "eval.n=2", "eval.length=64"),
    "layers": (TEXT, "eval.n=2", "eval.length=64"),
    "needle": (TEXT, "eval.lengths=[256]", "eval.depths=[0.5]", "eval.n=2"),
    "fidelity": (TEXT, "eval.n=2", "eval.length=64", "eval.greedy.n=2", "eval.greedy.prompt=8", "eval.greedy.tokens=8"),
    "wikitext2": ("eval.path=rows.jsonl", "eval.length=64"),
}
#: What their tasks give is known to others.
OF_TASKS = {"zeroshot", "opencompass"}


def test_no_evaluator_is_left_out():
    names = {path.stem for path in (conf_dir() / "eval").glob("*.yaml")}
    assert names == set(SHORT) | OF_TASKS | {"ptb", "c4", "c4_new"}  # definitions of texts, as wikitext2


@pytest.mark.parametrize("name", SHORT)
def test_metrics_are_those_that_were_announced(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 60)
    settings = ["model=tiny", "algo=gptq", "bits=4", "calib=pydoc", "calib.n=2", "calib.length=64", f"eval={name}"]
    arguments = [*settings, *SHORT[name]]
    announced = [each.metrics for each in freeze(compose_one(arguments)).evaluations]
    assert main(arguments) == 0
    with sqlite3.connect("results/results.db") as connection:
        query = "select distinct m.name from metric m join run r on r.id = m.run_id where r.algo = 'gptq'"
        found = {each.partition(",")[0] for (each,) in connection.execute(query)}
    assert found == {each for some in announced for each in some}
