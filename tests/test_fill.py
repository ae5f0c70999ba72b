"""`qbench fill` on model=tiny: exactly what is missing is run, and everything else is left alone."""

from __future__ import annotations

import csv
import json
import random
import sqlite3
from pathlib import Path

import pytest
import yaml

import qbench.run
from qbench.__main__ import main
from qbench.declaration import declared_names, load, tables_dir
from qbench.errors import SpecError
from qbench.fill import seconds, varied

SIZES = {
    "tiny": {
        "set": [
            *("model=tiny", "calib=pydoc", "calib.n=2", "calib.length=64"),
            *("eval.corpora=[pydoc-heldout]", "eval.n=3", "eval.length=64"),
        ]
    }
}
TABLE = {
    "title": "Bits",
    "caption": "C.",
    "metric": "ppl",
    "rows": [{"name": "Algo", "values": [{"label": "R", "set": ["algo=rtn"]}, {"label": "G", "set": ["algo=gptq"]}]}],
    "columns": [{"name": "Bits", "values": [{"label": 3, "set": ["bits=3"]}, {"label": 2, "set": ["bits=2"]}]}],
}
STORE = "results/results.db"


class Work:
    """Counts what is run and measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.executed: list[str] = []
        self.measured: list[str] = []
        execute, measure = qbench.run.execute, qbench.run.measure_again

        def counted(point, *rest):
            self.executed.append(point.spec.key())
            return execute(point, *rest)

        def measured(point, *rest):
            self.measured.append(point.spec.key())
            return measure(point, *rest)

        monkeypatch.setattr(qbench.run, "execute", counted)
        monkeypatch.setattr(qbench.run, "measure_again", measured)

    def of(self, *arguments: str) -> tuple[int, int, int]:
        """(exit code, runs, measurements of finished runs) of one command."""
        self.executed.clear()
        self.measured.clear()
        code = main(["fill", "own.yaml", "--size", "tiny", "--allow", "all", *arguments])
        return code, len(self.executed), len(self.measured)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder in which the table has been filled."""
    folder = tmp_path_factory.mktemp("filled")
    (folder / "sizes.yaml").write_text(yaml.safe_dump(SIZES))
    (folder / "own.yaml").write_text(yaml.safe_dump(TABLE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert Work(patch).of() == (0, 5, 0)
    return folder


@pytest.fixture
def work(finished, tmp_path, monkeypatch) -> Work:
    """In a fresh folder with a copy of the filled table's database."""
    for name in ("sizes.yaml", "own.yaml"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "results").mkdir()
    with sqlite3.connect(finished / STORE) as source, sqlite3.connect(tmp_path / STORE) as copy:
        source.backup(copy)
    monkeypatch.chdir(tmp_path)
    return Work(monkeypatch)


def sql(*statements: str) -> list:
    with sqlite3.connect(STORE) as connection:
        connection.execute("pragma foreign_keys = on")
        return [connection.execute(each).fetchall() for each in statements][-1]


def values() -> list[tuple[str, float]]:
    query = "select r.key, m.value from run r join metric m on m.run_id = r.id where r.superseded_by is null"
    return sorted(sql(query))


def state_of_cells() -> dict[str, int]:
    lines = Path("results/tables/own-tiny.csv").read_text().splitlines()
    place = lines[0].split(",").index("state")
    states = [line.split(",")[place] for line in lines[1:] if "full precision" not in line]
    return {state: states.count(state) for state in states}


def test_a_filled_table_needs_nothing_and_is_drawn_in_all_forms(work, capsys):
    assert work.of() == (0, 0, 0)
    out = capsys.readouterr().out
    assert "own (tiny), cells: 4 done" in out
    assert "own (tiny), runs: 5 done" in out
    assert "full precision" in out
    assert state_of_cells() == {"done": 4}
    assert r"\toprule" in Path("results/tables/own-tiny.tex").read_text()
    assert "| full precision |" in Path("results/tables/own-tiny.md").read_text()


@pytest.mark.parametrize("seed", range(4))
def test_after_deleting_k_random_runs_exactly_those_are_run(work, seed):
    before = values()
    ids = [row[0] for row in sql("select id from run")]
    generator = random.Random(seed)
    gone = generator.sample(ids, generator.randint(1, len(ids)))
    some = ",".join(map(str, gone))
    keys = {row[0] for row in sql(f"select key from run where id in ({some})")}
    sql(f"delete from run where id in ({some})")
    assert len(values()) == len(before) - len(gone)
    code, runs, measured = work.of()
    assert (code, runs, measured) == (0, len(gone), 0)
    assert set(work.executed) == keys
    assert values() == before


def test_the_plan_alone_and_drawing_alone_run_nothing(work, capsys):
    sql("delete from run where algo = 'gptq'")
    assert work.of("--dry-run") == (0, 0, 0)
    assert "2 missing" in capsys.readouterr().out
    assert main(["fill", "t1", "--dry-run"]) == 0
    assert not Path("results/tables").exists()
    assert work.of("--render-only") == (0, 0, 0)
    assert state_of_cells() == {"done": 2, "missing": 2}


def test_when_time_is_up_nothing_more_starts(work):
    sql("delete from run where algo = 'gptq'")
    assert work.of("--limit-time", "0s") == (0, 0, 0)
    assert state_of_cells() == {"done": 2, "missing": 2}


def test_time_that_runs_out_on_the_way_leaves_the_rest_for_later(work, monkeypatch, capsys):
    sql("delete from run where algo = 'gptq'")
    monkeypatch.setattr("qbench.sweep.time.monotonic", lambda: 99.0 if work.executed else 0.0)
    assert work.of("--limit-time", "50s") == (0, 1, 0)
    assert "time is up: 1 of 2 points are left" in capsys.readouterr().out
    assert state_of_cells() == {"done": 3, "missing": 1}


def test_what_failed_is_tried_again_only_when_asked(work, capsys):
    sql("update run set status = 'failed', error_type = 'NumericsError', error_message = 'bad' where algo = 'gptq'")
    sql("delete from run where algo = 'rtn' and bits = 2")
    assert work.of() == (1, 1, 0)
    out = capsys.readouterr().out
    assert "2 failed" in out
    assert "NumericsError: bad" in out
    assert state_of_cells() == {"done": 2, "failed": 2}
    sql("delete from run where algo = 'rtn' and bits = 2")
    assert work.of("--only-failed") == (0, 2, 0)
    assert state_of_cells() == {"done": 3, "missing": 1}


def test_full_precision_that_failed_is_left_alone_as_well(work):
    """And one that is missing is not what failed."""
    sql("update run set status = 'failed' where algo = 'none'", "delete from run where algo = 'rtn' and bits = 2")
    assert work.of() == (1, 1, 0)
    assert work.of("--only-failed") == (0, 1, 0)
    sql("delete from run where algo = 'none'", "update run set status = 'failed' where algo = 'gptq'")
    assert work.of("--only-failed") == (0, 2, 0)
    assert work.of() == (0, 1, 0)


def test_a_run_that_was_interrupted_is_missing(work, capsys):
    some = "algo = 'gptq' and bits = 2"
    sql(
        f"delete from metric where run_id in (select id from run where {some})",
        f"update run set status = 'running', owner = 'gone:1:2:3', heartbeat = 0 where {some}",
    )
    assert work.of("--dry-run") == (0, 0, 0)
    assert "own (tiny), runs: 4 done, 1 missing" in capsys.readouterr().out
    assert work.of() == (0, 1, 0)


def test_a_measurement_that_failed_is_tried_again_only_when_asked(work):
    row = sql("select run_id, evaluator, protocol, task, spec_key, created from metric limit 1")[0]
    sql(f"delete from metric where run_id = {row[0]}")
    columns = "run_id, evaluator, protocol, task, spec_key, created, error_type, message, trace"
    sql(f"insert into failure ({columns}) values ({', '.join(map(repr, row))}, 'EvaluationError', 'no', 't')")
    assert work.of() == (1, 0, 0)
    assert work.of("--only-failed") == (0, 0, 1)
    assert work.of() == (0, 0, 0)
    assert state_of_cells() == {"done": 4}


def test_runs_of_an_earlier_version_of_a_method_are_stale_and_run_again(work, capsys):
    for key, text in sql("select key, spec from run where algo = 'gptq'"):
        spec = json.loads(text)
        spec["pipeline"][0]["version"] = 0
        with sqlite3.connect(STORE) as connection:
            connection.execute("update run set key = ?, spec = ? where key = ?", (key[::-1], json.dumps(spec), key))
    assert work.of("--render-only") == (0, 0, 0)
    assert state_of_cells() == {"done": 2, "stale": 2}
    assert work.of() == (0, 2, 0)
    assert "2 stale" in capsys.readouterr().out
    assert state_of_cells() == {"done": 4}


def test_a_table_of_several_commits_is_drawn_only_when_allowed(work, capsys):
    sql("update environment set git_commit = 'aaaa', git_dirty = 0")
    columns = "git_commit, git_dirty, versions, platform, cpu, threads, gpu, driver"
    sql(
        f"insert into environment (hash, {columns}) select 'other', 'bbbb', {columns.partition(', ')[2]} "
        "from environment limit 1",
        "update run set environment_id = (select id from environment where hash = 'other') where algo = 'gptq'",
    )
    assert work.of("--allow", "dirty")[0] == 1
    out = capsys.readouterr().out
    assert "not drawn own: several code versions" in out
    assert work.of("--allow", "code") == (0, 0, 0)
    assert "several code versions" in Path("results/tables/own-tiny.md").read_text()
    sql("update run set environment_id = (select id from environment where hash = 'other')")
    assert work.of("--allow", "")[0] == 0
    assert "code versions" not in Path("results/tables/own-tiny.md").read_text()


def test_another_evaluation_is_measured_of_the_same_runs(work):
    assert work.of("eval.n=2") == (0, 0, 5)
    assert work.of("eval.n=2") == (0, 0, 0)


def test_runs_that_two_tables_share_are_quantized_once_and_measured_for_both(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "sizes.yaml").write_bytes((finished / "sizes.yaml").read_bytes())
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(TABLE))
    (tmp_path / "short.yaml").write_text(yaml.safe_dump({**TABLE, "set": ["eval.n=2"]}))
    monkeypatch.chdir(tmp_path)
    work = Work(monkeypatch)
    assert work.of("short.yaml") == (0, 5, 0)
    assert capsys.readouterr().out.count("Plan: 5 points") == 1
    assert sql("select count(*) from metric where name = 'ppl'") == [(10,)]
    assert work.of("short.yaml") == (0, 0, 0)


def test_settings_reach_every_run(work):
    assert work.of("calib.seed=7") == (0, 2, 0)  # rtn looks at no text


def test_an_empty_database_is_drawn_with_what_is_missing(work, capsys):
    assert work.of("--render-only", "--store", "sqlite:///results/new.db") == (0, 0, 0)
    out = capsys.readouterr().out
    assert "not run" in out
    assert "qbench fill runs it, in size tiny" in out
    assert state_of_cells() == {"missing": 4}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("t4", {"bits", "weight_format", "options", "algo"}),
        ("t9", {"kv_format"}),
        ("t10", {"algo", "options", "bits", "weight_format", "calib"}),
        ("t10b", {"algo", "options", "bits", "weight_format", "calib"}),
    ],
)
def test_what_the_axes_vary_is_no_deviation(name, expected):
    assert varied(load(name, "demo")) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t99"], "table=t99: unknown; one of all, t1"),
        (["bits=3"], "table=bits=3: one of all, t1"),
        (["own.yaml", "--limit-time", "soon"], "--limit-time=soon"),
        (["own.yaml", "--allow", "lies"], "--allow=lies"),
        (["own.yaml", "--dry-run", "--render-only"], "--render-only"),
        (["own.yaml", "store.url=sqlite:///x.db"], "--store says that"),
        (["own.yaml", "--size", "tiny", "no.such=1"], "own, R / 3: no.such=1"),
        (["own.yaml", "--size", "big"], "invalid choice"),
    ],
)
def test_bad_requests_are_refused_in_one_line(work, arguments, message, capsys):
    assert main(["fill", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "pppl"}, "own, R / 3: metric=pppl: one of ppl, quantize_s, peak_host_bytes"),
        ({"metric": ["acc", "acc_norm"]}, "own, R / 3: metric=acc or acc_norm: one of ppl"),
        ({"repeat": [["seed=0"], ["seed=1"]]}, "own, R / 3: aggregate=none: mean: a cell has 2 values of ppl"),
        ({"set": ["eval=perplexity+decode"]}, "own, R / 3: aggregate=none: mean: a cell has 2 values of ppl"),
    ],
)
def test_cells_that_can_have_no_value_are_refused_before_anything_runs(work, changes, message, capsys):
    sql("delete from run")
    Path("own.yaml").write_text(yaml.safe_dump(TABLE | changes))
    for more in ((), ("--dry-run",)):
        assert work.of(*more) == (2, 0, 0)
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_a_table_that_cannot_be_filled_leaves_others_alone(work, capsys):
    """What an evaluation of tasks gives is known only afterwards."""
    (Path("other.yaml")).write_text(yaml.safe_dump(TABLE))
    sql("update metric set name = 'nll'")
    assert main(["fill", "own.yaml", "other.yaml", "--size", "tiny", "--allow", "all", "--render-only"]) == 1
    out = capsys.readouterr().out
    assert "not drawn own: ppl: not among what was measured, nll" in out
    assert "not drawn other" in out
    assert work.of() == (2, 0, 0)
    assert "own: ppl: not among what was measured, nll" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"), [("30min", 1800), ("1h30min", 5400), ("90s", 90), ("0.5h", 1800), ("1h1s", 3601), ("0s", 0)]
)
def test_times(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "30", "min", "30min1h", "-1s"])
def test_what_is_no_time(text):
    with pytest.raises(SpecError):
        seconds(text)


def test_kurtosis_and_cosines_are_added_to_the_runs_of_another_table(tmp_path, monkeypatch, capsys):
    """T3 of the paper, in its own size but for fewer rows, on runs that have been there before."""
    short = yaml.safe_load((tables_dir() / "t3.yaml").read_text())
    short["sizes"]["tiny"]["axes"]["Transformation"] = [
        {"label": "none", "set": ["algo=rtn"]},
        {"label": "QuaRot", "set": ["algo=quarot"]},
    ]
    sizes = yaml.safe_load((tables_dir() / "sizes.yaml").read_text())
    (tmp_path / "sizes.yaml").write_text(yaml.safe_dump(sizes))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(short))
    monkeypatch.chdir(tmp_path)
    work = Work(monkeypatch)
    settings = ("scheme=w4a4", "model=tiny", "calib=pydoc", "calib.n=2", "calib.length=128")
    assert main(["-m", "algo=rtn,quarot", *settings, "eval.corpora=[pydoc-heldout]", "eval.n=2", "eval.length=64"]) == 0
    assert work.of("eval.n=2", "eval.length=64") == (0, 0, 3)
    assert work.of("eval.n=2", "eval.length=64") == (0, 0, 0)
    assert "K inputs" in capsys.readouterr().out
    with open("results/tables/own-tiny.csv") as file:
        found = {(row["Layer"], row["Transformation"], row["Quantity"]): row for row in csv.DictReader(file)}
    assert len(found) == 7 * (2 * 3 + 2)  # full precision has no cosine with itself
    assert {row["n"] for row in found.values()} == {"4"}
    inputs = {place[:2]: float(row["value"]) for place, row in found.items() if place[2] == "inputs"}
    assert inputs["down", "QuaRot"] < 0.2 * inputs["down", "full precision"]
    assert inputs["down", "none"] == inputs["down", "full precision"]
    cosines = {place[:2]: float(row["value"]) for place, row in found.items() if place[2] == "outputs"}
    assert all(0.8 < value < 1 for value in cosines.values())


def test_every_table_of_the_package_is_filled_from_an_empty_database(tmp_path, monkeypatch):
    """The whole set on the tiny model, of one calibration sequence and one test window; then nothing is left to do."""
    monkeypatch.chdir(tmp_path)
    arguments = ["fill", "all", "--size", "tiny", "--allow", "all", "calib.n=1", "eval.n=1"]
    assert main(arguments) == 0
    names = [name for name in declared_names(tables_dir()) if name != "t1"]
    assert len(names) == 11
    for name in names:
        path = Path("results/tables") / f"{name}-tiny.csv"
        with path.open() as lines:
            states = {row["state"] for row in csv.DictReader(lines)}
        assert states - {"undefined"} == {"done"}, name
        assert all(path.with_suffix(f".{suffix}").stat().st_size > 0 for suffix in ("tex", "md", "pdf", "png"))
    runs = sql("select count(*) from run where status = 'done'")
    assert main(arguments) == 0
    assert sql("select count(*) from run") == runs
