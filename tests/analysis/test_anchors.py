import json
import math
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import yaml

from analysis.anchors import align, align_table, anchors, model_name
from analysis.tables.render import write
from qbench.cli import main
from qbench.errors import SpecError
from qbench.store import queries
from tests.analysis.conftest import losses, measured

OF_GPTQ = ("gptq", "int3_g128_asym", 6.318)
GPTQ = next(each for each in anchors() if (each.algo, each.weight_format, each.value) == OF_GPTQ)
SETTINGS = {
    **{"model": "meta-llama/Llama-2-7b-hf", "weight_format": "int3_g128_asym", "group_size": 128},
    **{"calib": "c4.train", "calib_n": 128, "calib_length": 2048},
}


def value(wanted: float, task: str = "wikitext2.test", protocol: str = "window-2048", **changes):
    items = losses(1.0, 256)
    nlls = items - items.mean() + math.log(wanted)
    return measured(nlls, **({"task": task, "protocol": protocol, "whole": task != "c4_new.validation"} | changes))


@pytest.mark.parametrize("whole", [False, None])
def test_a_part_of_the_text_is_not_compared(database, store, whole):
    store("gptq", 3, value(6.318, whole=whole), **SETTINGS)
    (found,) = align(database, [GPTQ])
    assert (found.status, found.ours) == ("missing", None)
    assert found.why == "all items: measured on n = 256, the source on all; eval.n=null takes them"
    store("gptq", 3, value(6.318), value(9.0, whole=False, spec_key="f" * 64), **SETTINGS, calib_seed=1)
    assert align(database, [GPTQ])[0].status == "agrees"


def test_a_number_of_items_is_compared_where_the_source_states_it(database, store):
    (mine,) = anchored(calib="c4", calib_n=None, weight_format="int3_g128_asym", algo="gptq", task="c4_new")
    assert mine.n == 256
    settings = SETTINGS | {"calib_length": 512, "calib_n": 64}
    part = measured(losses(2.0, 40), task="c4_new.validation", protocol="window-2048", whole=True)
    store("gptq", 3, part, **settings)
    assert align(database, [mine])[0].why.startswith("all items: measured on n = 40, the source on 256")
    store("gptq", 3, value(mine.value, task="c4_new.validation"), **settings, calib_seed=1)
    assert align(database, [mine])[0].status == "agrees"


def test_a_published_zero_is_compared(database, store):
    store("gptq", 3, value(6.318), **SETTINGS)
    found = align(database, [replace(GPTQ, value=0.0)])
    assert found[0].status == "differs"
    assert align_table(found).rows[0][3].text == ""


@pytest.mark.parametrize(
    ("factor", "status"), [(1.0, "agrees"), (1.004, "agrees"), (0.994, "differs"), (1.5, "differs")]
)
def test_the_same_settings_are_compared(database, store, factor, status):
    key = store("gptq", 3, value(6.318 * factor), **SETTINGS)
    (found,) = align(database, [GPTQ])
    assert (found.status, found.run.key) == (status, key)
    assert found.ours.value == pytest.approx(6.318 * factor)
    table = align_table([found])
    assert table.rows[0][3].text == f"{100 * (factor - 1):+.2f} %"
    assert table.rows[0][4].bold == (status == "differs")


@pytest.mark.parametrize(
    ("changes", "algo", "missing"),
    [
        ({"model": "tiny"}, "gptq", "a run of llama-2-7b"),
        ({"weight_format": "int3_g64_asym"}, "gptq", "the format int3_g128_asym"),
        ({"act_format": "int8_token"}, "gptq", "the format int3_g128_asym"),
        ({"kv_format": "int4_kivi"}, "gptq", "the format int3_g128_asym"),
        ({}, "awq", "the algorithm gptq"),
        ({"calib": "c4-sample"}, "gptq", "calibration with c4, 128 × 2048 tokens"),
        ({"calib_n": 16}, "gptq", "calibration with c4, 128 × 2048 tokens"),
    ],
)
def test_with_other_settings_it_says_what_is_missing(database, store, changes, algo, missing):
    store(algo, 3, value(6.318), **(SETTINGS | changes))
    (found,) = align(database, [GPTQ])
    assert (found.status, found.why, found.ours) == ("missing", missing, None)


@pytest.mark.parametrize("other", [{"protocol": "window-512"}, {"task": "c4"}, {"name": "nll"}])
def test_other_measurements_of_the_same_run_are_not_compared(database, store, other):
    store("gptq", 3, value(6.318, **other), **SETTINGS)
    (found,) = align(database, [GPTQ])
    assert found.status == "missing"
    assert "qbench eval 1 eval=wikitext2 eval.path=<file> eval.length=2048" in found.why


def test_the_published_numbers_are_complete_and_drawn_from_any_database(database, store, tmp_path):
    published = anchors()
    assert len(published) == 90
    assert all(np.isfinite(each.value) and each.url.startswith("https://") for each in published)
    assert len({(each.source, each.algo, each.formats, each.task) for each in published}) == 90
    assert {each.task for each in published if each.reading is None} == {"wikitext2", "c4_new", "ptb"}
    for name in ("empty", "one"):
        table = align_table(align(database))
        assert "90 published numbers: 0 agrees, 0 differs, 90 missing" in table.caption
        write(table, tmp_path, name)
        store("rtn", 4, measured(losses(1.0)), model=name)


def anchored(**wanted) -> list:
    return [each for each in anchors() if all(getattr(each, name) == value for name, value in wanted.items())]


def test_a_pipeline_without_its_clipping_is_another_one(database, store):
    stages = lambda *names: {"algo": "awq", "pipeline": [{"name": name} for name in names]}  # noqa: E731
    settings = {"model": "meta-llama/Meta-Llama-3-8B", "weight_format": "int3_g128_asym"}
    without, clipped = anchored(model="llama-3-8b", algo="awq")
    store("awq", 3, value(8.57), spec=stages("awq_scale", "rtn"), **settings)
    assert [each.status for each in align(database, [without, clipped])] == ["agrees", "missing"]
    assert align(database, [clipped])[0].why == "a pipeline of awq_scale + awq_clip + rtn"


def test_full_precision_is_compared_and_what_a_source_leaves_out_is_not(database, store):
    (full,) = anchored(model="opt-125m", algo="none")
    assert align(database, [full])[0].why == "a run of opt-125m"
    store("rtn", 4, value(37.28), model="facebook/opt-125m", weight_format="int4_channel_asym", group_size=-1)
    assert align(database, [full])[0].why == "full precision of it"
    store("none", None, value(27.66), model="facebook/opt-125m", dtype="float16")
    assert [each.status for each in align(database, anchored(model="opt-125m", task="wikitext2"))] == [
        "agrees", "agrees", "missing", "missing",
    ]  # fmt: skip
    mine = anchored(calib="c4", calib_n=None, weight_format="int3_g128_asym", algo="gptq")
    assert [each.task for each in mine] == ["wikitext2", "c4_new", "ptb"]
    store("gptq", 3, value(8.385, task="c4_new.validation"), **(SETTINGS | {"calib_length": 512, "calib_n": 64}))
    assert [each.status for each in align(database, mine)] == ["missing", "agrees", "missing"]


def test_a_reading_that_no_evaluation_has_is_said_and_no_command_given(database, store):
    (ptb,) = anchored(task="ptb_validation")
    opt = {"model": "opt-125m", "weight_format": "int4_channel_asym", "group_size": -1}
    store("gptq", 4, value(36.96), **(SETTINGS | opt))
    why = align(database, [ptb])[0].why
    assert "which no evaluation of qbench reads" in why
    assert "qbench eval" not in why


def test_models_go_by_their_names_without_folders():
    names = ["meta-llama/Llama-2-7b-hf", "/models/llama-2-7b/", "llama-2-7b"]
    assert {model_name(name) for name in names} == {"llama-2-7b"}
    assert model_name("Llama-2-7b-chat-hf") != "llama-2-7b"


def test_the_command_shows_them(database, store, tmp_path, capsys):
    store("gptq", 3, value(6.318), **SETTINGS)
    assert main(["align", "--store", f"sqlite:///{tmp_path}/results.db", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["status"] for row in rows].count("agrees") == 2
    assert main(["align", "--store", f"sqlite:///{tmp_path}/results.db"]) == 0
    assert "a run of llama-2-7b" not in (shown := capsys.readouterr().out)
    assert "agrees" in shown


OWN = {
    **{"source": "a paper", "url": "https://example.org", "model": "llama-2-7b", "task": ["wikitext2", "c4_new"]},
    **{"protocol": "window-2048", "metric": "ppl", "tolerance": 0.01, "calibration": {"all": {"text": "c4", "n": 128}}},
    **{"stages": {"gptq": ["gptq"]}, "values": {"int3_g128_asym,int8_token": {"gptq": [6.5, 9.5]}}},
}


def own(path, **changes):
    path.write_text(yaml.safe_dump({"tables": [{**OWN, **changes}]}))
    return path


def test_published_numbers_are_rows(database, tmp_path, capsys):
    """Those of the package and of a file of one's own; published anew they replace those of the same source."""
    arguments = ["align", "--store", f"sqlite:///{tmp_path}/results.db"]
    assert main(arguments) == 0
    assert queries.anchors(database) == [*anchors()]
    assert main([*arguments, "--anchors", str(own(tmp_path / "own.yaml"))]) == 0
    assert "a paper" in capsys.readouterr().out
    with sqlite3.connect(tmp_path / "results.db") as connection:
        columns = "task, value, tolerance, algo, weight_format, act_format, calib, calib_n, calib_length, stages"
        rows = connection.execute(f"select {columns} from anchor where source = 'a paper'").fetchall()
    settings = (0.01, "gptq", "int3_g128_asym", "int8_token", "c4", 128, None, '["gptq"]')
    assert rows == [("wikitext2", 6.5, *settings), ("c4_new", 9.5, *settings)]
    assert main(arguments) == 0  # they stay, and are compared without being named again
    assert "a paper" in capsys.readouterr().out
    assert database.publish(anchors(tmp_path / "own.yaml")) == 0
    changed = anchors(own(tmp_path / "own.yaml", values={"int3_g128_asym": {"gptq": [6.5, 9.6]}}, stages={}))
    assert database.publish(changed) == 4
    assert queries.anchors(database) == [*anchors(), *changed]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sauce": 1}, "tables.0.sauce=1: needed: source, url"),
        ({"values": {"int3_g128_asym": {"gptq": 6.5}}}, "a value for each of wikitext2, c4_new"),
        ({"values": {"int3_g128_asym": {"gptq": ["low", 1]}}}, "tables.0.values.int3_g128_asym.gptq=low: a number"),
        ({"tolerance": "small"}, "tables.0.tolerance=small: a number"),
        ({"calibration": "c4"}, "tables.0.calibration=c4: a mapping"),
        ({"calibration": {"all": 7}}, "tables.0.calibration.gptq=7: a mapping"),
        ({"tolerance": -0.1}, "tables.0.tolerance=-0.1: 0 or more"),
        ({"n": 5}, "tables.0.n=5: a mapping"),
    ],
)
def test_a_file_that_is_not_as_expected_is_refused(tmp_path, changes, message):
    with pytest.raises(SpecError, match=message.replace(".", r"\.")):
        anchors(own(tmp_path / "own.yaml", **changes))


def test_nothing_is_stored_of_a_file_that_is_refused(database, tmp_path, capsys):
    store = f"sqlite:///{tmp_path}/results.db"
    taken, bad = own(tmp_path / "own.yaml", source=GPTQ.source), own(tmp_path / "bad.yaml", x=1)
    (tmp_path / "latin.yaml").write_bytes("tables: [\u00e9]".encode("latin-1"))
    for path in (taken, bad, tmp_path / "none.yaml", tmp_path / "latin.yaml", tmp_path):
        assert main(["align", "--store", store, "--anchors", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert queries.anchors(database) == []
