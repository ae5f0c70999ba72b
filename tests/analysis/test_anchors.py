import json
import math

import numpy as np
import pytest

from analysis.anchors import align, align_table, anchors, model_name
from analysis.tables.render import write
from qbench.cli import main
from tests.analysis.conftest import losses, measured

GPTQ = next(each for each in anchors() if (each.algo, each.weights) == ("gptq", "int3_g128_asym"))
SETTINGS = {
    **{"model": "meta-llama/Llama-2-7b-hf", "weight_format": "int3_g128_asym", "group_size": 128},
    **{"calib": "c4.train", "calib_n": 128, "calib_length": 2048},
}


def value(wanted: float, task: str = "wikitext2.test", protocol: str = "window-2048", **changes):
    items = losses(1.0)
    return measured(items - items.mean() + math.log(wanted), task=task, protocol=protocol, **changes)


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
    assert len(published) == 22
    assert all(np.isfinite(each.value) and each.url.startswith("https://") for each in published)
    assert all(each.calib and each.calib_n and each.calib_length for each in published)
    for name in ("empty", "one"):
        table = align_table(align(database))
        assert "22 published numbers: 0 agrees, 0 differs, 22 missing" in table.caption
        write(table, tmp_path, name)
        store("rtn", 4, measured(losses(1.0)), model=name)


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
