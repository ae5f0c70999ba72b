"""Files for other programs hold the same rows as the database, and pandas is one line away."""

import json

import numpy as np
import pandas as pd
import pytest

import qbench.store
from qbench.errors import AssetError, SpecError
from qbench.store import queries
from qbench.store.export import TABLES, export
from qbench.store.records import Environment, Measurement, Outcome, RunColumns

HERE = Environment(
    git_commit=None, git_dirty=None, versions={"torch": "2"}, platform="p", cpu="c", threads=1, gpu=None, driver=None
)


@pytest.fixture
def filled(database):
    for key, algo, bits, group in (("k0", "none", None, None), ("k1", "ü, <b>", 4, 64), ("k2", "ternary", 1.58, 64)):
        settings = RunColumns(model="tiny", algo=algo, spec={"a": [1, {"b": "ü"}]}, bits=bits, group_size=group)
        metric = Measurement(
            evaluator="perplexity",
            protocol="window-512",
            task="text",
            name="ppl",
            value=1 / 3,
            stderr=None,
            n=2,
            unit="ppl",
            spec_key="e" * 64,
            samples=np.array([1.0, 2.0]),
        )
        database.finish(database.begin(settings, key, HERE), Outcome(phases={"x": 0.5}), [metric])
    claim = database.begin(RunColumns(model="tiny", algo="gptq", spec={}), "k3", HERE)
    database.fail(claim, "E", "m", "line 1\nline 2")
    return database


READERS = {"parquet": pd.read_parquet, "csv": pd.read_csv, "json": lambda p: pd.DataFrame(json.loads(p.read_text()))}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("ending", READERS)
def test_each_table_comes_back_from_each_format_with_the_same_rows(filled, tmp_path, table, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / "new" / f"rows.{ending}"
    rows = export(filled, out, table=table)
    if not rows and ending == "csv":
        assert len(out.read_text().splitlines()) == 1  # names alone
        return
    back = READERS[ending](out)
    assert len(back) == rows
    if table == "results":
        assert back["value"].tolist() == [1 / 3] * 3  # to the last digit
        assert back["algo"].tolist() == ["none", "ü, <b>", "ternary"]
        assert [None if pd.isna(bits) else float(bits) for bits in back["bits"]] == [None, 4.0, 1.58]
    if table == "run":
        assert (rows, back["error_trace"].tolist()[-1]) == (4, "line 1\nline 2")
        spec = back["spec"][0]
        assert (spec if ending == "json" else json.loads(spec)) == {"a": [1, {"b": "ü"}]}


def test_an_empty_database_gives_a_file_without_rows(database, tmp_path):
    assert export(database, tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text()) == []
    assert export(database, tmp_path / "r.csv", table="run") == 0


def test_what_cannot_be_written_is_refused_in_a_line(filled, tmp_path):
    with pytest.raises(SpecError, match="--format=xlsx"):
        export(filled, tmp_path / "r.xlsx")
    with pytest.raises(SpecError, match="--table=sample"):
        export(filled, tmp_path / "r.csv", table="sample")
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match="name a place you can write to"):
        export(filled, tmp_path / "file" / "r.csv")


def test_pandas_in_one_line(filled, url):
    frame = qbench.store.frame(url, algo="ternary")
    assert frame["bits"].tolist() == [1.58]
    assert len(qbench.store.frame(url)) == len(queries.frame(filled)) == 3
    with pytest.raises(AssetError, match="no such database"):
        qbench.store.frame(f"{url}x")
