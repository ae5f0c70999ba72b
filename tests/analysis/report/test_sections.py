"""What stands below the results: tables as the commands make them, figures, and reasons where there is nothing."""

import base64
import re
from dataclasses import replace

from analysis.findings.takeaways import takeaways
from analysis.report.page import page, report_data
from analysis.report.sections import measured_points, sections
from analysis.report.tables import PARTS, ROWS, declared_table, plain_table, words_table
from analysis.tables import filled as tables
from analysis.tables.best_practice import best_practice, best_practice_table
from analysis.tables.declared import Cell, Declared, Wanted
from analysis.tables.plain import PlainTable
from analysis.tables.render import Entry, Plain
from tests.analysis.conftest import HERE, losses, measured, sha
from tests.analysis.report.conftest import HOSTILE

STORE = "sqlite:///results.db"


def named(database, **more) -> dict[str, dict]:
    return {each["id"]: each for each in sections(database, **more)}


def declared_of(store) -> Declared:
    """Two algorithms by two widths, one of them not run."""
    base = store("none", None, measured(losses(3.0)))
    keys = {
        ("R", "4"): store("rtn", 4, measured(losses(3.2))),
        ("G", "4"): store("gptq", 4, measured(losses(3.1))),
        ("R", "3"): store("rtn", 3, measured(losses(3.9))),
        ("G", "3"): "f" * 64,
    }
    cells = [
        [
            Cell(
                metric=("ppl",),
                wanted=(Wanted(key=keys[a, b], baseline=base, spec_keys=(sha("c4-sample window-512"),)),),
            )
            for b in "34"
        ]
        for a in "RG"
    ]
    return Declared(
        name="t0", size="tiny", title="Title", caption="Caption.", row_axes=("Algo",), column_axes=("Bits", "Kind"),
        rows=(("R",), ("G",)), columns=(("3", "W"), ("4", "W")), cells=tuple(map(tuple, cells)),
    )  # fmt: skip


def test_a_declared_table_has_values_marks_and_the_runs_behind_them(database, store):
    drawn = declared_table(tables.filled(database, declared_of(store)))
    assert drawn["title"] == "T0 (tiny). Title"
    assert [[cell["text"] for cell in line] for line in drawn["head"]] == [
        ["", "3", "4"], ["", "W"], ["Algo", "PPL ↓", "PPL ↓"],
    ]  # fmt: skip
    assert drawn["head"][1][1]["span"] == 2
    texts = [[cell["text"] for cell in row["cells"]] for row in drawn["rows"]]
    assert [row[0] for row in texts] == ["full precision", "R", "G"]
    assert texts[2][1] == "not run"
    best = drawn["rows"][2]["cells"][2]
    assert (best["best"], best["runs"]) == (True, (3,))
    assert best["small"].startswith("+")
    assert "best" not in drawn["rows"][1]["cells"][2]
    assert any("not distinguishable" in note["text"] for note in drawn["notes"])


def test_each_declared_table_is_drawn_below_itself(database, store):
    found = named(database, declared=[tables.filled(database, declared_of(store))])["declared"]
    assert found["text"] == []
    assert [each["title"] for each in found["tables"]] == ["T0 (tiny). Title"]
    assert [each["figure"]["title"] for each in found["tables"]] == ["T0 (tiny). Title, drawn"]
    assert found["figures"] == []


def test_declared_tables_of_a_size_say_what_becomes_of_the_takeaways(database, store):
    tiny = tables.filled(database, declared_of(store))
    demo = replace(tiny, declared=replace(tiny.declared, size="demo"))
    found = named(database, declared=[tiny, demo])["takeaways"]
    titles = [each["title"] for each in found["tables"]]
    assert titles == ["The paper's takeaways (tiny)", "The paper's takeaways (demo)"]
    rows = [[cell["text"] for cell in row["cells"]] for row in found["tables"][0]["rows"]]
    assert [row[0] for row in rows] == [each.id for each in takeaways()]
    assert {row[2] for row in rows} == {"not tested"}


def test_a_plain_table_keeps_its_groups_marks_and_footnotes_and_long_parts_are_cut():
    rows = tuple((Entry(f"r{i}", bold=i == 0, notes=(1,) if i == 0 else ()), Entry(str(i))) for i in range(ROWS + 3))
    table = Plain(
        title="T", columns=("a", "b"), rows=rows, numeric=(False, True), caption="C", footnotes=((1, "why"),),
        groups=("x",) * len(rows),
    )  # fmt: skip
    drawn = plain_table(table)
    assert drawn["rows"][0] == {"group": "x"}
    assert drawn["rows"][1]["cells"][0] == {"text": "r0", "bold": True, "notes": "1"}
    assert drawn["rows"][-1] == {"group": "… and 3 more"}
    assert len(drawn["rows"]) == ROWS + 2
    assert drawn["notes"] == [{"mark": "1", "text": "why"}]
    groups = tuple(str(part) for part in range(PARTS + 2) for _ in range(2 if part else 1))
    drawn = plain_table(replace(table, rows=rows[:1] * len(groups), groups=groups), command="qbench best")
    named = [row["group"] for row in drawn["rows"] if "group" in row]
    assert named == [*map(str, range(1, PARTS + 1)), "… and 2 more parts: qbench best shows all"]
    drawn = plain_table(replace(table, rows=rows[:1] * len(groups), groups=groups))
    assert len([row for row in drawn["rows"] if "group" in row]) == PARTS + 2
    words = words_table(PlainTable(name="t1", title="T", caption="C", header=("a",), rows=(("x",),)))
    assert words["rows"] == [{"cells": [{"text": "x"}]}]


def test_without_runs_every_section_says_what_is_missing(database):
    found = named(database, declared=[])
    assert "qbench fill" in found["declared"]["text"][0]
    assert "--tables none" in named(database)["declared"]["text"][0]
    assert "none is shown" in found["takeaways"]["text"][0]
    for name in ("best", "attribution"):
        assert found[name]["text"] == ["Nothing to show: no finished run has been measured."]
    assert "no finished run" in found["fronts"]["text"][0]
    assert all("a run of" in row["cells"][-1]["text"] for row in found["align"]["tables"][0]["rows"] if "cells" in row)


def test_a_database_with_runs_has_a_table_per_metric_and_a_figure_per_front(filled):
    found = named(filled)
    wanted = best_practice_table(best_practice(filled, metric="ppl"), worse=3)
    assert found["best"]["tables"] == [plain_table(wanted, command="qbench best --metric ppl")]
    assert found["attribution"]["tables"][0]["rows"]
    (drawn,) = [each for each in found["fronts"]["figures"] if "c4-sample" in each["title"]]
    kind, _, content = drawn["source"].partition(",")
    assert kind == "data:image/svg+xml;base64"
    text = base64.b64decode(content).decode()
    assert text.startswith("<?xml")
    assert "<script" not in text
    assert "bars ±1 standard error" in drawn["caption"]
    assert "CSV" not in drawn["caption"]


def test_names_in_figures_and_tables_stay_text(filled):
    text = page(report_data(filled, STORE))
    assert HOSTILE not in text
    for each in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", text):
        assert "<img" not in base64.b64decode(each).decode()


def test_what_must_not_stand_in_one_table_is_a_sentence_unless_allowed(database, store):
    for commit in "ab":
        place = replace(HERE, git_commit=commit * 40, git_dirty=False)
        for algo in ("rtn", "gptq"):
            store(algo + commit, 4, measured(losses(3.0 + 0.1 * (algo == "rtn"))), environment=place)
    found = named(database)
    for name in ("best", "fronts"):
        assert "code versions" in found[name]["text"][0], name
        assert "--allow" in found[name]["text"][0]
    assert not found["best"]["tables"]
    assert not found["fronts"]["figures"]
    allowed = named(database, allow=["code"])
    assert any("code versions" in note["text"] for note in allowed["best"]["tables"][0]["notes"])
    assert len(allowed["fronts"]["figures"]) == 1
    refused = named(database, declared=[("T7 (demo)", "mixes")])["declared"]["text"]
    assert refused[0] == "T7 (demo) is not shown: mixes"


def test_points_are_counted_by_metric_and_model(filled):
    counts = measured_points(filled)
    assert counts == {("ppl", "tiny"): 13}


def test_the_best_of_the_results_are_those_of_the_sweep_table(filled):
    from analysis.tables.sweep import sweep_table

    data = report_data(filled, STORE)
    spec_key = sha("c4-sample window-512")
    evaluation = next(each for each in data["evaluations"] if each["specKey"] == spec_key)
    frame = (table := sweep_table(filled, data["keys"], [spec_key])).frame.set_index("key")
    wanted = frame.loc[[data["keys"][run] for run in evaluation["run"]], table.evaluations[0].best]
    assert evaluation["best"] == wanted.astype(int).tolist()
    assert 0 < sum(evaluation["best"]) < len(evaluation["best"])
