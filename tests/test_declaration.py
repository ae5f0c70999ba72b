"""Declared tables as data: what cells need, what is refused, and that the paper's tables can be composed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import qbench.models
from qbench.declaration import SIZES, Declaration, declared_names, last_wins, load, tables_dir
from qbench.errors import AssetError, QbenchError, SpecError
from qbench.fill import compose
from qbench.stages.pipeline import stage_types
from qbench.taxonomy import learns, taxonomy

TINY = Path(qbench.models.__file__).parent / "tiny"
NAMES = declared_names(tables_dir())
TABLE = {
    "title": "T",
    "caption": "C.",
    "metric": "ppl",
    "rows": [{"name": "Algo", "values": [{"label": "A", "set": ["algo=awq"]}, {"label": "G", "set": ["algo=gptq"]}]}],
    "columns": [{"name": "Bits", "values": [{"label": 3, "set": ["bits=3"]}, {"label": 2, "set": ["bits=2"]}]}],
}


def written(folder: Path, table: dict | None = None, sizes: dict | None = None) -> str:
    (folder / "sizes.yaml").write_text(yaml.safe_dump(sizes or {"tiny": {"set": ["model=tiny", "bits=8"]}}))
    (folder / "own.yaml").write_text(yaml.safe_dump(TABLE if table is None else table))
    return str(folder / "own.yaml")


def test_a_cell_is_the_sum_of_size_table_row_and_column_and_the_last_wins(tmp_path):
    found = load(written(tmp_path, TABLE | {"set": ["group_size=32"], "repeat": [["seed=0"], ["seed=1"]]}), "tiny")
    cells = {(row[0].label, column[0].label): wish for row, column, wish in found.cells()}
    assert list(cells) == [("A", "3"), ("A", "2"), ("G", "3"), ("G", "2")]
    base = {"model=tiny", "group_size=32", "algo=gptq", "bits=2"}
    assert [set(each) for each in cells["G", "2"].repeats] == [base | {"seed=0"}, base | {"seed=1"}]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a=1", "b=2", "a=3"], {"a=3", "b=2"}),
        (["algo=awq", "algo.clip=false", "algo=gptq"], {"algo=gptq"}),
        (["eval=decode", "eval.n=4", "eval=needle"], {"eval=needle"}),
        (["eval.n=4", "eval.length=8"], {"eval.n=4", "eval.length=8"}),
        (["calib.n=4", "calib=pydoc"], {"calib.n=4", "calib=pydoc"}),
        (["algo+=gptq"], {"algo=gptq"}),
        (["algo=quarot", "algo+=gptq"], {"algo=quarot+gptq"}),
        (["algo=awq", "algo.awq.clip=false"], {"algo=awq", "algo.clip=false"}),
        (["algo=awq", "algo.awq.clip=false", "algo+=gptq"], {"algo=awq+gptq", "algo.awq.clip=false"}),
    ],
)
def test_last_wins(given, expected):
    assert set(last_wins(given)) == expected
    assert set(last_wins(last_wins(given))) == expected


def test_sizes_replace_axes_and_several_models_are_rows(tmp_path):
    bits = [{"label": "8", "set": ["bits=8"]}]
    models = [{"label": name, "set": [f"model.path={name}"]} for name in ("m", "n")]
    path = written(tmp_path, TABLE | {"sizes": {"paper": {"axes": {"Bits": bits}}}}, {"paper": {"models": models}})
    found = load(path, "paper")
    assert [axis.name for axis in found.rows] == ["Model", "Algo"]
    assert len(list(found.cells())) == 4
    one = load(written(tmp_path, None, {"demo": {"models": models[:1]}}), "demo")
    assert [axis.name for axis in one.rows] == ["Algo"]
    assert all("model.path=m" in wish.repeats[0] for _, _, wish in one.cells())


def test_undefined_cells_have_a_reason_and_levels_metrics_of_their_own(tmp_path):
    table = json.loads(json.dumps(TABLE))
    table["columns"][0]["values"].append({"label": "time", "metric": "quantize_s"})
    table["except"] = [{"where": {"Algo": "A", "Bits": ["3"]}, "reason": "no"}]
    cells = {
        (row[0].label, column[0].label): wish for row, column, wish in load(written(tmp_path, table), "tiny").cells()
    }
    assert {place for place, wish in cells.items() if wish.reason} == {("A", "3")}
    assert cells["G", "time"].metric == ("quantize_s",)
    assert cells["G", "2"].metric == ("ppl",)


def test_a_variant_stands_behind_the_comma_of_every_metric(tmp_path):
    rows = [{"name": "Layer", "values": [{"label": "q", "variant": "q_proj"}, {"label": "all"}]}]
    columns = [{"name": "Q", "values": [{"label": "K", "metric": ["kurtosis", "k"]}, {"label": "C"}]}]
    found = load(written(tmp_path, TABLE | {"rows": rows, "columns": columns, "metric": "cosine"}), "tiny")
    cells = {(row[0].label, column[0].label): wish.metric for row, column, wish in found.cells()}
    assert cells == {
        ("q", "K"): ("kurtosis,q_proj", "k,q_proj"),
        ("q", "C"): ("cosine,q_proj",),
        ("all", "K"): ("kurtosis", "k"),
        ("all", "C"): ("cosine",),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"titel": "x"}, "own.titel=x: unknown"),
        ({"metric": None}, "own.metric=null"),
        ({"rows": []}, "own.rows=[]"),
        ({"best": "all"}, "own.best=all"),
        ({"aggregate": "median"}, "own.aggregate=median"),
        ({"set": ["bits"]}, "own.set=[bits]"),
        ({"rows": [{"name": "R", "values": [{"label": "a"}, {"label": "a"}]}]}, "every label once"),
        ({"rows": [{"name": "R", "values": []}]}, "own.rows.R=[]: at least one value"),
        ({"rows": [{"name": "R"}]}, "own.rows.R=[]: at least one value"),
        ({"rows": TABLE["columns"]}, "own.rows and columns=[Bits,Bits]: every axis once"),
        ({"columns": TABLE["columns"] * 2}, "own.rows and columns=[Algo,Bits,Bits]: every axis once"),
        ({"except": 5}, "own.except=5: a list of combinations"),
        ({"except": None}, "own.except=null: a list of combinations"),
        ({"except": [{"where": ["Algo"], "reason": "x"}]}, "own.except.where=[Algo]: a mapping of axes to labels"),
        ({"except": [{"reason": "x"}]}, "own.except.where=null: a mapping of axes to labels"),
        ({"except": [{"where": {"Nothing": "a"}, "reason": "x"}]}, "own.except=Nothing: an axis of the table"),
        ({"except": [{"where": {"Algo": "nope"}, "reason": "x"}]}, "own.except.Algo=nope: one of A, G"),
        ({"except": [{"where": {"Bits": [3, 4]}, "reason": "x"}]}, "own.except.Bits=4: one of 3, 2"),
        ({"except": [{"where": {"Bits": []}, "reason": "x"}]}, "own.except.Bits=[]: one of 3, 2"),
        ({"repeat": 5}, "own.repeat=5: a list of lists of settings"),
        ({"repeat": None}, "own.repeat=null: a list of lists of settings"),
        ({"repeat": []}, "own.repeat=[]: a list of lists of settings"),
        ({"repeat": ["seed=0"]}, "own.repeat=[seed=0]: a list of lists of settings"),
        ({"sizes": {"tiny": {"repeat": []}}}, "own.sizes.tiny.repeat=[]: a list of lists of settings"),
        ({"sizes": {"tiny": {"axes": [1]}}}, "own.sizes.tiny.axes=[1]: a mapping with Algo, Bits"),
        ({"sizes": {"tiny": {"axes": None}}}, "own.sizes.tiny.axes=null: a mapping with Algo, Bits"),
        ({"sizes": {"tiny": {"axes": {"Nothing": []}}}}, "own.sizes.tiny.axes.Nothing=[]: unknown; one of Algo, Bits"),
        ({"sizes": {"paper": {"axes": {"Algo": 5}}}}, "own.sizes.paper.axes.Algo=5: a list of values"),
        ({"sizes": {"huge": {}}}, "own.sizes.huge"),
    ],
)
def test_what_is_not_as_expected_is_refused_in_one_line(tmp_path, change, message):
    with pytest.raises(SpecError) as caught:
        load(written(tmp_path, TABLE | change), "tiny")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    ["store.url=sqlite:///x.db", "dry_run=true", "results=foo", "results+=foo", "hydra.run.dir=x", "hydra/launcher=x"],
)
@pytest.mark.parametrize(
    "place",
    [
        lambda level: {"set": ["bits=3", *level["set"]]},
        lambda level: {"sizes": {"tiny": {"set": level["set"]}}},
        lambda level: {"sizes": {"tiny": {"models": [level]}}},
        lambda level: {"rows": [{"name": "R", "values": [level]}]},
        lambda level: {"columns": [{"name": "C", "values": [level]}]},
        lambda level: {"repeat": [["seed=0"], level["set"]]},
    ],
    ids=["table", "size", "model", "row", "column", "repeat"],
)
def test_what_belongs_to_the_whole_invocation_is_no_setting_of_a_cell(tmp_path, setting, place):
    level = {"label": "x", "set": [setting]}
    for table, sizes in ((TABLE | place(level), None), (TABLE, {"tiny": {"set": [setting]}})):
        with pytest.raises(SpecError, match="belong to the whole invocation") as caught:
            load(written(tmp_path, table, sizes), "tiny")
        assert setting in str(caught.value)


def test_an_axis_called_model_is_refused_beside_several_models(tmp_path):
    table = TABLE | {"rows": [{"name": "Model", "values": [{"label": "x"}]}]}
    models = [{"label": name, "set": [f"model.path={name}"]} for name in ("m", "n")]
    path = written(tmp_path, table, {"paper": {"models": models}, "demo": {"models": models[:1]}})
    with pytest.raises(SpecError, match=r"\[Model,Model,Bits\]: every axis once; Model is that of several models"):
        load(path, "paper")
    assert [axis.name for axis in load(path, "demo").rows] == ["Model"]


@pytest.mark.parametrize("label", ["8", "3"])
def test_what_makes_no_sense_may_have_labels_of_another_size(tmp_path, label):
    axes = {"Bits": [{"label": 8, "set": ["bits=8"]}]}
    table = TABLE | {"sizes": {"tiny": {"axes": axes}}, "except": [{"where": {"Bits": label}, "reason": "no"}]}
    path = written(tmp_path, table)
    undefined = {size: sum(wish.reason is not None for *_, wish in load(path, size).cells()) for size in SIZES}
    assert undefined == ({"tiny": 2, "demo": 0, "paper": 0} if label == "8" else {"tiny": 0, "demo": 2, "paper": 2})


def test_an_axis_may_have_its_values_by_size_alone(tmp_path):
    table = TABLE | {"columns": [{"name": "Bits"}], "sizes": {"tiny": {"axes": {"Bits": [{"label": 8}]}}}}
    path = written(tmp_path, table)
    assert len(list(load(path, "tiny").cells())) == 2
    with pytest.raises(SpecError, match=r"own.columns.Bits=\[\]: at least one value"):
        load(path, "demo")


def test_a_size_may_add_to_the_caption(tmp_path):
    path = written(tmp_path, TABLE | {"caption": "All.", "sizes": {"tiny": {"caption": "Of few  items."}}})
    assert [load(path, size).caption for size in ("tiny", "demo")] == ["All. Of few items.", "All."]


def test_labels_may_be_numbers(tmp_path):
    values = [{"label": 1.58, "set": ["bits=1.58"]}, {"label": 2, "set": ["bits=2"]}]
    table = TABLE | {"columns": [{"name": "Bits", "values": values}]}
    found = load(written(tmp_path, table | {"except": [{"where": {"Bits": 1.58}, "reason": "no"}]}), "tiny")
    assert [(column[0].label, wish.reason) for _, column, wish in found.cells()] == [("1.58", "no"), ("2", None)] * 2


@pytest.mark.parametrize("file", ["own.yaml", "sizes.yaml"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"title: caf\xe9", "not UTF-8 (byte 10: "),
        (b"title: [", "expected the node content"),
        (b"title: 2024-13-45", "month must be in 1..12"),
        (b"title", "a mapping"),
    ],
)
def test_what_is_no_yaml_is_refused_in_one_line(tmp_path, file, content, message):
    path = written(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises((SpecError, AssetError)) as caught:
        load(path, "tiny")
    assert file in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["axes", "repeat"])
def test_what_all_tables_share_has_no_axes_and_repeats(tmp_path, key):
    with pytest.raises(SpecError, match=rf"sizes.yaml.tiny.{key}=\[\]: unknown; one of set, models"):
        load(written(tmp_path, None, {"tiny": {key: []}}), "tiny")


def test_tables_are_listed_in_reading_order(tmp_path):
    for name in ("cost", "t10b", "t10", "t2", "t9", "sizes", "t1"):
        (tmp_path / f"{name}.yaml").write_text("")
    assert declared_names(tmp_path) == ["t1", "t2", "t9", "t10", "t10b", "cost"]


def test_unknown_tables_and_sizes_name_the_known_ones():
    with pytest.raises(SpecError, match=r"all, t1, t2, .*t10"):
        load("t99", "tiny")
    with pytest.raises(SpecError, match="demo, paper, tiny"):
        load("t2", "small")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_declared_table_can_be_read(name, size):
    found = load(name, size)
    assert found.static or list(found.cells())


def some_points(found: Declaration, settings: list[str]) -> int:
    """Compose as few cells as show every level of every axis; how many points that made."""
    axes = (*found.rows, *found.columns)
    defined = {(row, column) for row, column, wish in found.cells() if wish.reason is None}
    made = {}
    for i in range(max(len(axis.levels) for axis in axes)):
        place = [axis.levels[i % len(axis.levels)] for axis in axes]
        row, column = tuple(place[: len(found.rows)]), tuple(place[len(found.rows) :])
        if (row, column) in defined:
            compose(single(found, row, column), settings, made)
    return len(made)


def single(found: Declaration, row: tuple, column: tuple) -> Declaration:
    """The table with this row and column alone."""
    rows, columns = (
        tuple(type(axis)(name=axis.name, levels=(level,)) for axis, level in zip(axes, place, strict=True))
        for axes, place in ((found.rows, row), (found.columns, column))
    )
    return Declaration(**(vars(found) | {"rows": rows, "columns": columns}))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "t1"])
def test_the_papers_sizes_compose(name, tmp_path, monkeypatch):
    monkeypatch.setenv("QBENCH_DATA", str(tmp_path))
    for text in ("pileval", "wikitext2-train", "wikitext2-test", "c4-train", "c4-validation", "ptb-test"):
        row = json.dumps({"text": f"words of {text}", "sentence": f"words of {text}"})
        (tmp_path / f"{text}.jsonl").write_text(f"{row}\n{row}\n")
    assert some_points(load(name, "paper"), [f"model.path={TINY}"]) > 0


def test_the_declaration_in_the_docs_is_one(tmp_path):
    text = (Path(qbench.models.__file__).parents[2] / "docs" / "experiments.md").read_text()
    example = text.partition("## A declaration")[2].split("```yaml\n")[1].split("```")[0]
    for size in ("tiny", "demo"):
        found = load(written(tmp_path, yaml.safe_load(example)), size)
    assert len(list(found.cells())) == 8
    assert sum(wish.reason is not None for _, _, wish in found.cells()) == 2


def test_what_cannot_be_composed_is_refused_with_its_cell(tmp_path):
    with pytest.raises(QbenchError, match=r"^own, A / 3: bits=99: "):
        compose(load(written(tmp_path), "tiny"), ["bits=99"])


def test_the_taxonomy_has_every_stage_once_under_a_strategy_that_fits_it():
    strategies = load("t1", "tiny").static
    found = taxonomy("t1", "T", "C.", strategies)
    words = " ".join(" ".join(row[1:]) for row in found.rows).replace(",", " ").replace("°", "").split()
    assert sorted(words) == sorted(stage_types())
    assert {name for name, stage in stage_types().items() if learns(stage)} == set(strategies["learned"])
    with pytest.raises(SpecError, match="every stage under one strategy"):
        taxonomy("t1", "T", "C.", {"rule": strategies["rule"]})
    with pytest.raises(SpecError, match="no such stage"):
        taxonomy("t1", "T", "C.", strategies | {"other": ("nothing",)})
