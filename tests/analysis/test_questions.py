"""What is asked of the database: several evaluations of one text stay apart, can be chosen, and what is not there is
refused in one line."""

import json
from dataclasses import replace

import pytest

from analysis.attribution import attribute
from analysis.candidates import Only, fields
from analysis.recommend import Wishes, recommend
from analysis.tables.attribution import attribution_table
from analysis.tables.best_practice import best_practice, best_practice_table
from analysis.tables.front import fronts, fronts_table
from analysis.tables.render import Entry, Plain, latex
from qbench.cli import main
from qbench.errors import EvaluationError, SpecError
from tests.analysis.conftest import HERE, losses, measured, sha


@pytest.fixture
def plant(store):
    """Runs of two algorithms; each measured as often as there are measurements, per (dtype, fingerprint)."""

    def planted(places, ways):
        for dtype, fingerprint in places:
            for algo, gap in (("none", 0.0), ("rtn", 0.3), ("gptq", 0.2)):
                found = [measured(losses(3.0 + gap, n), spec_key=key) for n, key in ways]
                stage = {"name": algo, "version": 1, "options": {}}
                spec = {"model": {"fingerprint": fingerprint}, "pipeline": [stage]}
                store(algo, None if algo == "none" else 4, *found, dtype=dtype, spec=spec)

    return planted


ONE = [("float32", "a" * 64)]
CASES = {
    "items": (ONE, [(40, sha("x")), (20, sha("y"))], ["n = 40", "n = 20"], {"n": 20}),
    "dtype": ([*ONE, ("bfloat16", "a" * 64)], [(40, sha("x"))], ["float32", "bfloat16"], {"dtype": "bfloat16"}),
    "checkpoint": (
        *([*ONE, ("float32", "b" * 64)], [(40, sha("x"))]),
        *(["checkpoint aaaaaaaa", "checkpoint bbbbbbbb"], {"checkpoint": "bb"}),
    ),
    "options": (ONE, [(40, sha("x")), (40, sha("y"))], [f"evaluation {sha(name)[:8]}" for name in "xy"], None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_must_not_be_compared_has_a_part_of_its_own(database, plant, case):
    places, ways, apart, _ = CASES[case]
    plant(places, ways)
    assert [each.apart for each in fields(database)] == apart
    for table in (
        best_practice_table(best_practice(database, allow=["all"])),
        attribution_table(attribute(database, resamples=100, allow=["all"])),
    ):
        for (name, _), words in zip(table.parts(), apart, strict=True):
            assert words in name
    assert [each.text for each in best_practice_table(best_practice(database)).rows[0]].count("best") == 1


@pytest.mark.parametrize("ways", [[(40, sha("x")), (40, sha("y"))], [(40, sha("x")), (20, sha("y"))]])
def test_fronts_of_two_evaluations_are_two_parts(database, plant, ways):
    plant(ONE, ways)
    table = fronts_table(fronts(database), metric="ppl", cost="bits_per_weight")
    assert len(list(table.parts())) == 2


@pytest.mark.parametrize("case", ["items", "dtype", "checkpoint"])
def test_one_of_several_can_be_chosen(database, plant, case):
    places, ways, _, choice = CASES[case]
    plant(places, ways)
    (option,) = choice
    with pytest.raises(SpecError, match=rf"^{option}=.*: say which: the database has "):
        recommend(database, Wishes())
    found = recommend(database, Wishes(), only=Only(**choice))
    assert getattr(found.field, option) == choice[option] or found.field.checkpoint == "b" * 64
    assert len(fields(database, only=Only(**choice))) == 1


STRANGE = {
    ("--metric", "acc"): "metric=acc: the database has ppl",
    ("--model", "nope"): "model=nope: the database has tiny",
    ("--task", "nope"): "task=nope: the database has c4-sample",
    ("--protocol", "nope"): "protocol=nope: the database has window-512",
    ("--n", "7"): "n=7: the database has 40",
    ("--dtype", "int1"): "dtype=int1: the database has float32",
    ("--checkpoint", "zz"): "checkpoint=zz: with the other options, the beginning of one of aaaa",
}


@pytest.mark.parametrize("arguments", STRANGE)
@pytest.mark.parametrize("command", ["best", "recommend", "attribute"])
def test_what_is_not_there_is_refused(plant, tmp_path, capsys, command, arguments):
    plant(ONE, [(40, sha("x"))])
    assert main([command, "--store", f"sqlite:///{tmp_path}/results.db", *arguments]) == 2
    err = capsys.readouterr().err
    assert STRANGE[arguments] in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recommend", "--min-recovery", "99"], "min-recovery=99.0: a share of full precision's quality"),
        (["recommend", "--min-recovery", ""], "min-recovery=: such as 0.99"),
        (["recommend", "--max-size", ""], "max-size=: such as 100MB"),
        (["recommend", "--max-calib", ""], "max-calib=: such as 10min"),
        (["recommend", "--rejected", "-3"], "rejected=-3: 0 or more"),
        (["best", "--worse", "-1"], "worse=-1: 0 or more"),
        (["attribute", "--algo", "nope"], "algo=nope: the database has rtn, gptq"),
        (["pareto", "--y", "acc"], "y=acc: the database has ppl"),
        *(([name, "--out", "file/x"], "--out=file/x: Not a directory") for name in ("best", "recommend", "pareto")),
        *(([name, "--out", "file"], "--out=file: File exists") for name in ("attribute", "align")),
        (["layers", "1", "--out", "file"], "--out=file: File exists"),
    ],
)
def test_bad_requests_are_refused_in_one_line(plant, tmp_path, monkeypatch, capsys, arguments, message):
    plant(ONE, [(40, sha("x"))])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main([*arguments, "--store", f"sqlite:///{tmp_path}/results.db"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["best", "recommend", "attribute", "align"])
def test_files_are_written_beside_json(plant, tmp_path, capsys, command):
    plant(ONE, [(40, sha("x"))])
    arguments = [command, "--json", "--out", str(tmp_path / "out"), "--store", f"sqlite:///{tmp_path}/results.db"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    json.loads(said.out)
    assert said.err.count("wrote") == 4
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".tex", ".md", ".html", ".csv"}


def test_recipes_of_one_algorithm_are_told_apart(database, store):
    from analysis.tables.recommendation import recommendation_table

    for damp in (0.01, 0.1):
        stage = {"name": "gptq", "version": 1, "options": {"damp": damp}}
        store("gptq", 4, measured(losses(3.0 + damp)), spec={"pipeline": [stage]})
    table = recommendation_table(recommend(database, Wishes()), rejected=5)
    assert len({row[1].text for row in table.rows}) == 2


def test_parts_of_one_table_are_checked_together(database, store):
    for algo, bits, commit in (("rtn", 4, "a"), ("gptq", 4, "a"), ("rtn", 3, "b")):
        store(algo, bits, measured(losses(3.0)), environment=replace(HERE, git_commit=commit * 40, git_dirty=False))
    with pytest.raises(EvaluationError, match="several code versions"):
        best_practice(database)
    table = best_practice_table(best_practice(database, allow=["code"]))
    assert [row[0].notes for row in table.rows] == [(), (), (1,)]


@pytest.mark.parametrize("count", [45, 46])
def test_a_table_longer_than_a_page_goes_on_over_several(count):
    rows = tuple((Entry(f"r{i}"), Entry("x" * 8)) for i in range(count))
    text = latex(Plain(title="T", columns=("a", "runs"), rows=rows, numeric=(False, False), caption="C"))
    assert ("longtable" in text) == (count > 45)
    assert text.count(r"\endhead") == (count > 45)
    assert "xxxxxxxx" not in text  # keys of runs are for the other forms
