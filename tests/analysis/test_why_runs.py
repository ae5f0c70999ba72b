"""`qbench why` of real runs of model=tiny that differ by one knob."""

import sqlite3
from pathlib import Path

import pytest

from analysis.tables.explanation import in_short
from analysis.why import explain
from qbench import __main__ as program
from qbench.store import queries
from qbench.store.database import Database

TINY = ["model=tiny", "eval.corpora=[pydoc-heldout]", "eval.n=1", "eval.length=64", "calib=pydoc", "calib.n=2"]
TINY += ["calib.length=64", "store.url=sqlite:///runs.db"]
BOTH = "algo=awq_scale+gptq"
KNOBS = {
    "base": [BOTH],
    "damp": [BOTH, "algo.gptq.damp=0.1"],
    "bits": [BOTH, "overrides=[{blocks:[2],bits:8}]"],
    "seed": [BOTH, "calib.seed=1"],
    "stage": ["algo=gptq"],
}


@pytest.fixture(scope="module")
def knobs(tmp_path_factory):
    """A database of real runs and the ids of them by knob, and a copy as it was before there were fingerprints."""
    folder = tmp_path_factory.mktemp("knobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("analysis.pareto.pareto_figures", lambda *_: [])
        for settings in KNOBS.values():
            assert program.main([*TINY, *settings]) == 0
    found = {}
    for name in ("runs.db", "old.db"):
        if name == "old.db":
            (folder / name).write_bytes((folder / "runs.db").read_bytes())
            with sqlite3.connect(folder / name) as connection:
                connection.execute("DELETE FROM layer_metric WHERE name LIKE '%\\_fingerprint' ESCAPE '\\'")
        found[name] = f"sqlite:///{folder / name}"
    with sqlite3.connect(folder / "runs.db") as connection:
        ids = [each for (each,) in connection.execute("SELECT id FROM run WHERE algo != 'none' ORDER BY id")]
    return found, dict(zip(KNOBS, ids, strict=True))


NORM, QUERY = "input_layernorm.weight", "self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("knob", "block", "by_prints", "by_metrics", "said"),
    [
        ("damp", 0, ("gptq", QUERY), ("gptq", QUERY), "settings: 1 differ (gptq.damp)"),
        ("bits", 2, ("awq_scale", NORM), ("awq_scale", QUERY), "settings: 1 differ (scheme.overrides.blocks 2:int8"),
        ("seed", 0, ("awq_scale", NORM), ("awq_scale", QUERY), "settings: seeds alone differ (calibration.seed)"),
        # What only one of the runs did has no numbers of the other one.
        ("stage", 0, ("awq_scale", NORM), ("gptq", QUERY), "settings: 2 differ (algo, awq_scale)"),
    ],
)  # fmt: skip
def test_the_flipped_knob_of_a_real_run_is_found(knobs, knob, block, by_prints, by_metrics, said):
    urls, ids = knobs
    for name, evidence, expected in (
        ("runs.db", "fingerprints", by_prints),
        ("old.db", "layer metrics", by_metrics),
    ):
        with Database(urls[name], create=False) as database:
            found = explain(database, *(queries.run_named(database, str(ids[each])) for each in ("base", knob)))
        first = found.parting.first
        assert found.parting.evidence == evidence
        assert (first.block, found.parting.stages[first.stage].name, first.module) == (block, *expected)
        assert found.same_codes is False
        assert in_short(found)[0].startswith(said)
        errors = {each.info.name: each for each in found.errors}
        assert set(errors) >= {"output_error", "weight_error", "sqnr_db"}
        if knob == "bits":
            assert errors["stream_error"].parted == 2
            assert errors["output_error"].by_ratio[0].block == 2
        if knob == "stage":
            assert any("only A has stream_error" in note for note in found.notes)


def test_two_equal_real_runs_have_no_difference(knobs, tmp_path):
    urls, ids = knobs
    copy = tmp_path / "copy.db"
    copy.write_bytes(Path(urls["runs.db"].removeprefix("sqlite:///")).read_bytes())
    with sqlite3.connect(copy) as connection:
        connection.execute("UPDATE layer_metric SET run_id = 1 WHERE run_id = ?", (ids["damp"],))
        connection.execute("DELETE FROM layer_metric WHERE run_id = ?", (ids["seed"],))
        connection.execute(
            "INSERT INTO layer_metric (run_id, block, module, name, value) SELECT ?, block, module, name, value "
            "FROM layer_metric WHERE run_id = ? ORDER BY id",
            (ids["seed"], ids["base"]),
        )
        connection.execute(
            "UPDATE run SET codes_sha256 = (SELECT codes_sha256 FROM run WHERE id = ?) WHERE id = ?",
            (ids["base"], ids["seed"]),
        )
    with Database(f"sqlite:///{copy}", create=False) as database:
        found = explain(database, *(queries.run_named(database, str(ids[each])) for each in ("base", "seed")))
    assert found.parting.first is None
    assert found.same_codes
    assert found.parting.compared >= 4 * 7
