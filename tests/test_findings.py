"""`qbench findings`: the carried takeaways fit the carried tables, and the command writes its page."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml

import qbench.findings
from analysis.findings.takeaways import check, takeaways
from qbench.__main__ import main
from qbench.declaration import load
from qbench.errors import SpecError
from qbench.fill import compose
from qbench.findings import axes_by_size
from qbench.store.database import Database
from qbench.store.records import Environment, Measurement, Outcome, RunColumns
from tests.test_fill import SIZES, TABLE

STORE = "sqlite:///results.db"
TAKEAWAYS = {
    "takeaways": [
        {
            "id": "1",
            "title": "More bits are better",
            "statement": "S.",
            "source": "Q",
            "expects": [{"table": "own", "better": {"Bits": 3}, "than": {"Bits": 2}}],
        }
    ]
}


def test_every_carried_takeaway_names_tables_axes_and_labels_that_there_are():
    given = takeaways()
    check(given, axes_by_size())
    numbers = {each.id[0] for each in given}
    assert numbers == set("12345678")


def test_a_renamed_label_is_noticed():
    axes = axes_by_size()
    axes["t8"] = {
        size: {name: [label.replace("FP", "float") for label in labels] for name, labels in of.items()}
        for size, of in axes["t8"].items()
    }
    with pytest.raises(SpecError, match=r"takeaway 6a, t8.Element=FP"):
        check(takeaways(), axes)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of one declared table and one takeaway, and an empty database."""
    (tmp_path / "sizes.yaml").write_text(yaml.safe_dump(SIZES))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(TABLE))
    (tmp_path / "own").mkdir()
    (tmp_path / "own/takeaways.yaml").write_text(yaml.safe_dump(TAKEAWAYS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qbench.findings, "tables_dir", lambda: tmp_path)
    with Database(STORE):
        pass
    return tmp_path


def plant(commits: tuple[str, ...] = ("a", "a", "a", "a")) -> None:
    """Rows for the cells of the table: 3 bits are better than 2."""
    shared = np.random.default_rng(0).normal(3.0, 0.3, 30)
    cells = [cell for row in compose(load("own.yaml", "tiny")).declared.cells for cell in row]
    with Database(STORE) as database:
        for place, (cell, commit) in enumerate(zip(cells, commits, strict=True)):
            nlls = shared + (0.3 if place % 2 else 0.1) + np.random.default_rng(place).normal(0.0, 0.02, 30)
            fields = {"evaluator": "perplexity", "protocol": "window-64", "task": "pydoc-heldout", "name": "ppl"}
            found = Measurement(
                **fields,
                value=float(np.exp(nlls.mean())),
                stderr=0.1,
                n=30,
                unit="ppl",
                spec_key=cell.wanted[0].spec_keys[0],
                samples=nlls,
            )
            environment = Environment(
                git_commit=commit, git_dirty=False, versions={}, platform="p", cpu="c", threads=1, gpu=None, driver=None
            )
            columns = RunColumns(model="tiny", algo="gptq", spec={"place": place}, bits=3)
            claim = database.begin(columns, cell.wanted[0].key, environment)
            database.finish(claim, Outcome(bits_per_weight=3.0), [found])


def findings(*arguments: str) -> int:
    shared = ["--store", STORE, "--out", "docs/found.md", "--takeaways", "own/takeaways.yaml"]
    return main(["findings", "--size", "tiny", *shared, *arguments])


def test_the_page_is_written_from_the_rows(folder, capsys):
    plant()
    assert findings() == 0
    out = capsys.readouterr().out
    assert "confirmed" in out
    assert "wrote docs/found.md" in out
    text = Path("docs/found.md").read_text(encoding="utf-8")
    assert "**confirmed** | 2 for |" in text
    assert "](img/found/own-tiny.png)" in text
    assert Path("docs/img/found/own-tiny.png").is_file()
    assert findings() == 0
    assert Path("docs/found.md").read_text(encoding="utf-8") == text


def test_an_empty_database_gives_a_page_that_says_so(folder):
    assert findings() == 0
    text = Path("docs/found.md").read_text(encoding="utf-8")
    assert "nothing is tested" in text
    assert "**not tested**" in text


def test_mixtures_are_refused_unless_allowed(folder, capsys):
    plant(("a", "a", "a", "b"))
    assert findings() == 1
    assert "not written own: several code versions" in capsys.readouterr().out
    assert not Path("docs").exists()
    assert findings("--allow", "code") == 0
    assert "several code versions" in Path("docs/found.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--allow", "lies"], "--allow=lies"),
        (["--store", "sqlite:///none.db"], "none.db"),
        (["--size", "big"], "invalid choice"),
        (["--takeaways", "none.yaml"], "none.yaml: no such file"),
        (["t7"], "unrecognized arguments: t7"),
        (["--out", "own"], "--out=own: own is a directory; name a place"),
        (["--out", "own.yaml/f.md"], "--out=own.yaml/f.md: own.yaml is no directory; name a place"),
        (["--out", "own.yaml/more/f.md"], "--out=own.yaml/more/f.md: own.yaml is no directory; name a place"),
    ],
)
def test_bad_requests_are_refused_in_one_line_before_any_work(folder, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(qbench.findings, "compose", None)
    assert findings(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_figures_that_cannot_be_written_are_one_line(folder, capsys):
    plant()
    Path("img").write_text("")
    assert findings("--out", "found.md") == 2
    err = capsys.readouterr().err
    assert "--out=found.md: " in err
    assert err.count("\n") == 1


def test_a_place_that_cannot_be_written_to_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert findings("--out", "new/found.md") == 2
    assert "--out=new/found.md: . cannot be written to; name a place" in capsys.readouterr().err
    assert not Path("new").exists()
