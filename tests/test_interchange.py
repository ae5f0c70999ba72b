"""`qbench report`, `qbench export` and `qbench merge` from the shell's side."""

import json

import numpy as np
import pytest

from qbench.cli import main
from qbench.store.database import Database
from qbench.store.records import Environment, Measurement, Outcome, RunColumns

HERE = Environment(
    git_commit=None, git_dirty=None, versions={}, platform="p", cpu="c", threads=1, gpu=None, driver=None
)


def fill(url: str, key: str, codes: str = "1") -> None:
    metric = Measurement(
        evaluator="perplexity",
        protocol="window-512",
        task="text",
        name="ppl",
        value=20.0,
        stderr=None,
        n=1,
        unit="ppl",
        spec_key="e" * 64,
        samples=np.array([3.0]),
    )
    with Database(url) as database:
        claim = database.begin(RunColumns(model="tiny", algo="rtn", bits=4, spec={}), key, HERE)
        database.finish(claim, Outcome(codes_sha256=codes), [metric])


@pytest.fixture
def url(tmp_path):
    fill(f"sqlite:///{tmp_path}/a.db", "a" * 64)
    return f"sqlite:///{tmp_path}/a.db"


def test_the_report_is_one_file(url, tmp_path, capsys):
    out = tmp_path / "new" / "r.html"
    assert main(["report", "--store", url, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": 1, "bytes": out.stat().st_size, "out": str(out)}
    assert [path.name for path in out.parent.iterdir()] == ["r.html"]


def test_export_says_how_many_rows_and_refuses_in_one_line(url, tmp_path, capsys):
    assert main(["export", "--store", url, "--out", str(tmp_path / "r.csv")]) == 0
    assert "rows 1" in capsys.readouterr().out
    assert main(["export", "--store", url, "--out", str(tmp_path / "r.txt")]) == 2
    assert (
        capsys.readouterr().err == "qbench: --format=txt: must be one of parquet, csv, json, or the ending of --out\n"
    )
    assert main(["export", "--store", url, "--out", str(tmp_path / "r"), "--format", "json", "--table", "x"]) == 2
    assert "--table=x" in capsys.readouterr().err


def test_merge_creates_what_it_merges_into_and_says_what_came(url, tmp_path, capsys):
    fill(f"sqlite:///{tmp_path}/b.db", "b" * 64)
    fill(f"sqlite:///{tmp_path}/b.db", "a" * 64, codes="2")
    everything = f"sqlite:///{tmp_path}/all.db"
    assert main(["merge", str(tmp_path / "a.db"), "--store", everything]) == 0
    assert capsys.readouterr().out == "added 1, measurements 1\n"
    assert main(["merge", str(tmp_path / "b.db"), "--store", everything, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["added"], found["kept"], found["different"]) == (2, 1, ["a" * 64])
    assert main(["merge", str(tmp_path / "missing.db"), "--store", everything]) == 2
    assert "no such database" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "all.db"), "--store", everything]) == 2
    assert "is the database to merge into" in capsys.readouterr().err
