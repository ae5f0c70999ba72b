"""What the report knows is what the database and the tables say, and nothing in it can become markup."""

import base64
import json
import re
import sys
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from analysis.report.layers import layers
from analysis.report.page import json_for_script, page, plotting_library, report_data, write_report
from analysis.tables.sweep import sweep_table
from qbench.errors import AssetError
from tests.analysis.conftest import HERE, losses, measured, sha
from tests.analysis.report.conftest import HOSTILE, LAYERS, sha_of

STORE = "postgresql://me:secret@host/results"


def test_an_empty_database_gives_a_page(database):
    data = report_data(database, "sqlite:///r.db")
    assert (data["ids"], data["evaluations"]) == ([], [])
    assert "<html" in page(data)


@pytest.mark.parametrize("error", [None, ("E", "m")])
def test_one_row_gives_a_page(database, store, error):
    store("gptq", 4, error=error)
    assert "gptq 4-bit" in page(report_data(database, "sqlite:///r.db"))


def test_values_and_differences_are_those_of_the_sweep_table(filled):
    data = report_data(filled, STORE)
    spec_key = sha("c4-sample window-512")
    table = sweep_table(filled, data["keys"], [spec_key])
    evaluation = next(each for each in data["evaluations"] if each["specKey"] == spec_key)
    columns = table.evaluations[0]
    frame = table.frame.set_index("key")
    assert len(evaluation["run"]) == 13
    for position, run in enumerate(evaluation["run"]):
        row = frame.loc[data["keys"][run]]
        assert evaluation["value"][position] == row[columns.value]
        wanted = {"stderr": columns.stderr, "delta": columns.delta, "deltaStderr": columns.delta_stderr}
        for name, column in wanted.items():
            found = evaluation[name][position]
            assert (found is None) == np.isnan(row[column]), name
            assert found is None or found == pytest.approx(row[column], rel=1e-5), name
        assert (evaluation["delta"][position] is None) == (row["algo"] == "none")
        assert data["labels"][run] == row["label"]


def test_no_difference_is_taken_from_other_items(database, store):
    store("none", None, measured(losses(3.0)))
    store("gptq", 4, measured(losses(3.1, n=30)))
    evaluation = report_data(database, STORE)["evaluations"][0]
    assert evaluation["delta"] == [None, None]


def test_protocols_are_never_in_one_column(database, store):
    store("rtn", 4, measured(losses(3.0)), measured(losses(3.0), protocol="window-2048", spec_key=sha("other")))
    store("gptq", 4, measured(losses(3.1), spec_key=sha("same name, other settings")))
    labels = [each["label"] for each in report_data(database, STORE)["evaluations"]]
    assert len(set(labels)) == len(labels) == 3


def test_superseded_attempts_are_counted_and_not_shown(database, store):
    first = store("gptq", 4, error=("E", "m"))
    assert store("gptq", 4, measured(losses(3.0))) == first
    data = report_data(database, STORE)
    assert (len(data["ids"]), data["attempts"], data["superseded"]) == (1, [2], 1)


def test_settings_and_environments_are_all_there(database, store):
    spec = {"algo": {"stages": [{"name": "gptq", "damp": 0.01}]}, "empty": {}, "none": None, "text": "x"}
    store("gptq", 4, spec=spec, environment=replace(HERE, git_commit="c" * 40, git_dirty=True))
    store("rtn", 4)
    data = report_data(database, STORE)
    found = dict(data["pairs"][index] for index in data["specs"][0])
    wanted = {"algo.stages.0.name": "gptq", "algo.stages.0.damp": "0.01", "empty": "{}", "none": "null", "text": "x"}
    assert found == wanted
    assert data["environments"][data["environment"][0]]["git_dirty"] is True
    assert data["environment"][0] != data["environment"][1]


def test_maps_hold_each_layer_at_its_place(filled):
    row = filled.find([sha_of(filled, "gptq", 4)]).popitem()[1]
    found = layers(filled, {row.id: 7})
    packed = found["runs"][7]["output_error"]
    values = np.frombuffer(base64.b64decode(packed["values"]), "<f4").reshape(2, 3)
    assert [found["modules"][index] for index in packed["modules"]] == ["self_attn.q_proj", "mlp.down_proj"]
    for each in LAYERS:
        line = [found["modules"][index] for index in packed["modules"]].index(each.module)
        assert values[line, packed["blocks"].index(each.block)] == pytest.approx(each.value)
    assert layers(filled, {row.id: 7}, budget=11) == {**found, "modules": [], "runs": {}, "left_out": 1}


def test_nothing_in_the_data_can_end_its_element_or_stand_for_a_part_of_the_page(filled):
    text = page(report_data(filled, STORE))
    assert HOSTILE not in text
    assert "<img" not in text
    assert text.count("</script>") == 3
    assert "secret" not in text
    body = re.search('<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    assert HOSTILE in json.loads(body)["texts"]["algo"]["levels"]


def test_json_for_a_script_is_the_same_json():
    value = {"a": ["<!--", "]]>", "&amp;", "\u2028", "\ud800", "é"], "b": 1e-300}
    text = json_for_script(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value
    text.encode()


def test_the_page_asks_nothing_of_the_network(database):
    program = "".join(path.read_text() for path in (files("analysis.report") / "assets").iterdir())
    assert not re.search(r"https?://|//[a-z]+\.|fetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML|eval\(", program)
    policy = re.search('Content-Security-Policy" content="(.*?)"', page(report_data(database, STORE)))[1]
    assert "default-src 'none'" in policy
    scripts = re.search("script-src ([^;]*);", policy)[1].split()
    assert len(scripts) == 2
    assert all(each.startswith("'sha256-") for each in scripts)
    assert "connect-src" not in policy
    library = plotting_library()
    assert "</script" not in library
    assert "sourceMappingURL" not in library


def test_a_missing_plotting_library_is_one_line(database, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(AssetError, match=r"^qbench report: .* pip install plotly$"):
        write_report(database, tmp_path / "r.html", STORE)
    assert not (tmp_path / "r.html").exists()


def test_a_report_that_cannot_be_written_is_one_line(database, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match="name a place you can write to"):
        write_report(database, tmp_path / "file" / "r.html", STORE)
    assert write_report(database, tmp_path / "new" / "r.html", STORE)["runs"] == 0
