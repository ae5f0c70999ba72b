import io
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from analysis.layer_figures import caption, draw, drawn_rows, layer_figures
from analysis.layers import (
    chosen_metrics,
    contrast,
    layer_info,
    layer_maps,
    layers_of,
    metric_names,
    module_kind,
    worst_first,
)
from analysis.tables.layers import worst_layers
from qbench.cli import main
from qbench.errors import SpecError
from qbench.store import queries
from qbench.store.records import LayerMetric, Outcome, RunColumns
from tests.analysis.conftest import HERE, sha

WEIGHTS = ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight")


def metric(block, module, value, name="output_error"):
    return LayerMetric(block=block, module=module, name=name, value=value)


def grid(value, name="output_error", blocks=4, weights=WEIGHTS):
    """`value(block, weight)` of every weight."""
    return [metric(b, w, value(b, w), name) for b in range(blocks) for w in weights]


@pytest.fixture
def stored(database):
    """Stores a finished run with these layer metrics; its row."""

    def store(rows, algo="gptq", model="tiny", **spec):
        columns = RunColumns(model=model, algo=algo, spec={"algo": algo} | spec, dtype="float32")
        key = sha(repr((algo, model, sorted(spec.items()), len(queries.runs(database)))))
        database.finish(database.begin(columns, key, HERE), Outcome(), [], rows)
        return database.find([key])[key]

    return store


def test_modules_of_one_type_are_one_kind():
    assert module_kind("self_attn.q_proj.weight") == "self_attn.q_proj"
    assert module_kind("mlp.experts.gate_up_proj[13]") == "mlp.experts.gate_up_proj.*"
    assert module_kind("mlp.experts.3.w1.weight") == "mlp.experts.*.w1"
    assert module_kind("fc1.weight") == "fc1", "a number inside a name counts nothing"
    assert module_kind("") == "block"


def test_a_map_holds_every_value_at_its_place_and_means_of_experts():
    rows = [
        *grid(lambda b, w: b + 0.1 * WEIGHTS.index(w), blocks=2, weights=WEIGHTS[:2]),
        *(metric(1, f"mlp.experts.{i}.w1.weight", value) for i, value in enumerate((1.0, 2.0, 6.0))),
        metric(0, WEIGHTS[0], 99.0, "sqnr_db"),
    ]
    (found,) = layer_maps([rows], "output_error")
    assert (found.blocks, found.kinds) == ((0, 1), ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts.*.w1"))
    np.testing.assert_allclose(found.values, [[0.0, 0.1, np.nan], [1.0, 1.1, 3.0]])
    assert found.counts.tolist() == [[1, 1, 0], [1, 1, 3]]


def test_maps_of_two_runs_are_on_one_grid():
    first, second = layer_maps([[metric(0, "a.weight", 2.0)], [metric(3, "b.weight", 4.0)]], "output_error")
    assert first.blocks == second.blocks == (0, 3)
    assert first.kinds == second.kinds == ("a", "b")
    assert np.isnan(contrast(first, second)).all()


def test_errors_are_contrasted_by_ratio_and_decibels_by_difference():
    for name, expected in (("output_error", 0.25), ("sqnr_db", -6.0)):
        maps = layer_maps([[metric(0, "a", 2.0, name)], [metric(0, "a", 8.0, name)]], name)
        assert contrast(*maps).tolist() == [[expected]]
    zero = layer_maps([[metric(0, "a", 0.0)], [metric(0, "a", 8.0)]], "output_error")
    assert np.isnan(contrast(*zero)).all(), "a ratio to nothing says nothing"


@pytest.mark.parametrize(
    ("name", "bad"), [("output_error", 0.9), ("sqnr_db", 1.0), ("weight_kurtosis", 50.0), ("odd", 7.0)]
)
def test_a_planted_bad_layer_is_named_first(stored, name, bad):
    good = {"output_error": 0.01, "sqnr_db": 20.0, "weight_kurtosis": 3.0, "odd": 1.0}[name]
    rows = grid(lambda b, w: bad if (b, w) == (2, WEIGHTS[1]) else good + b / 1000, name)
    layers = worst_first(layers_of([rows], name), layer_info(name))
    assert layers[0].where == "block 2 self_attn.o_proj.weight"
    others = grid(lambda b, w: good, name)
    for both in ((rows, others), (others, rows)):
        assert worst_first(layers_of(both, name), layer_info(name))[0].block == 2
    table = worst_layers([stored(rows)], [rows], [name], 3)[name]
    assert table.rows[0][0].text == "block 2 self_attn.o_proj.weight"
    assert len(table.rows) == len(table.frame) == 3
    assert "of 12 layers" in table.caption


def test_the_names_leave_out_digests_and_end_with_seconds():
    names = ("solve_s", "gptq_fingerprint", "odd", "sqnr_db", "output_error", "spinquant_loss003", "stream_error")
    rows = [metric(0, "a", 1.0, name) for name in names]
    assert metric_names(rows) == ["output_error", "sqnr_db", "stream_error", "odd", "solve_s"]
    assert chosen_metrics([rows], []) == ["output_error", "sqnr_db", "stream_error"]
    assert chosen_metrics([rows], ["odd"]) == ["odd"]
    assert chosen_metrics([rows[:3]], []) == ["odd"], "what is not known, where there is nothing else"
    both = [metric(0, "a", 1.0, name) for name in ("weight_error", "sqnr_db", "output_error")]
    assert chosen_metrics([both], []) == ["output_error", "sqnr_db"]
    assert chosen_metrics([both[:1]], []) == ["weight_error"]
    with pytest.raises(SpecError, match="metric=nope: what the run has: output_error, sqnr_db"):
        chosen_metrics([rows], ["nope"])


def test_a_figure_comes_with_the_drawn_values(stored, tmp_path):
    of_a = grid(lambda b, w: 0.1 * (b + 1))
    of_b = grid(lambda b, w: 0.2 * (b + 1), weights=WEIGHTS[:2])
    runs = [stored(of_a), stored(of_b, "rtn")]
    files = layer_figures(runs, [of_a, of_b], ["output_error"], tmp_path / "new")
    assert [path.name for path in files] == [f"layers-1-2-output_error.{kind}" for kind in ("pdf", "png", "csv")]
    assert files[0].read_bytes().startswith(b"%PDF")
    assert files[1].read_bytes().startswith(b"\x89PNG")
    rows = pd.read_csv(files[2])
    assert len(rows) == 12 + 8
    assert set(rows["key"]) == {run.key for run in runs}
    assert rows.loc[rows["module"] == "self_attn.q_proj", "a_over_b"].tolist() == pytest.approx([0.5] * 8)
    assert rows.loc[rows["module"] == "mlp.down_proj", "a_over_b"].isna().all()
    again = layer_figures(runs, [of_a, of_b], ["output_error"], tmp_path / "again")
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in again]


def images(figure: Figure) -> list[AxesImage]:
    return [image for axes in figure.axes for image in axes.images]


def test_two_runs_share_a_scale_and_the_contrast_is_centred():
    of_a, of_b = grid(lambda b, w: 0.001 * (b + 1)), grid(lambda b, w: 0.05 * (b + 1))
    first, second, against = images(draw(layer_maps([of_a, of_b], "output_error"), ["x", "y"]))
    assert first.norm is second.norm
    assert isinstance(first.norm, LogNorm)
    assert (first.norm.vmin, first.norm.vmax) == (0.001, 0.2)
    assert against.norm.vmin * against.norm.vmax == pytest.approx(1.0)
    np.testing.assert_allclose(against.get_array(), 0.02)


def colour(image: AxesImage, value: float) -> np.ndarray:
    return np.array(image.cmap(image.norm(value)))


def test_dark_is_bad_and_the_colour_of_the_better_run_is_one():
    dark, better = {}, {}
    for name, worse in (("output_error", 0.2), ("sqnr_db", 0.1)):
        rows = [grid(lambda b, w, v=value: v, name) for value in (0.1, 0.2)]
        first, _, against = images(draw(layer_maps(rows, name), ["x", "y"]))
        dark[name] = colour(first, worse)[:3].sum() < colour(first, 0.3 - worse)[:3].sum()
        a_better = against.get_array()[0, 0]
        better[name] = colour(against, a_better if name == "output_error" else -a_better)
    assert dark == {"output_error": True, "sqnr_db": True}
    np.testing.assert_allclose(better["output_error"], better["sqnr_db"], atol=0.02)


def test_missing_values_are_hatched_and_said(stored):
    rows = [row for row in grid(lambda b, w: 0.1 + b) if (row.block, row.module) != (2, WEIGHTS[0])]
    maps = layer_maps([rows], "output_error")
    (image,) = images(figure := draw(maps, ["x"]))
    assert image.get_array().mask.tolist() == [[False] * 3, [False] * 3, [True, False, False], [False] * 3]
    assert any(patch.get_hatch() for patch in figure.axes[0].patches)
    run = stored(rows)
    assert "hatched: no value" in caption([run], ["x"], maps)
    assert "hatched" not in caption([run], ["x"], layer_maps([grid(lambda b, w: 1.0)], "output_error"))
    assert "n = 11" in caption([run], ["x"], maps)


def test_exact_layers_have_the_colour_of_the_smallest_error():
    (image,) = images(draw(layer_maps([grid(lambda b, w: b / 10)], "output_error"), ["x"]))
    assert image.get_array()[0, 0] == pytest.approx(0.1)
    assert not np.ma.getmaskarray(image.get_array()).any()


def test_whole_blocks_are_curves():
    rows = [[metric(b, "", f * 10**b, "stream_error") for b in range(5)] for f in (1, 2)]
    figure = draw(layer_maps(rows, "stream_error"), ["x", "y"])
    (axes,) = figure.axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [
        [f * 10.0**b for b in range(5)] for f in (1, 2)
    ]  # fmt: skip
    assert axes.get_yscale() == "log"
    assert "stream error" in axes.get_ylabel()
    assert "better ↓" in axes.get_ylabel()


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [metric(0, "a.weight", 0.5)],
        [metric(-1, "lm_head.weight", 0.5)],
        [metric(0, "", 0.5)],
        grid(lambda b, w: 0.0),
    ],
    ids=["nothing", "one layer", "the head", "one block", "all exact"],
)  # fmt: skip
@pytest.mark.parametrize("runs", [1, 2])
def test_few_values_make_a_figure_too(stored, rows, runs):
    every = [rows] * runs
    rows_of_runs = [stored(rows, algo) for algo in ("gptq", "rtn")[:runs]]
    maps = layer_maps(every, "output_error")
    draw(maps, ["x", "y"][:runs]).savefig(io.BytesIO(), dpi=20)
    assert caption(rows_of_runs, ["x", "y"][:runs], maps)
    tables = worst_layers(rows_of_runs, every, ["output_error"], 5)
    assert len(tables["output_error"].rows) == min(5, len(rows))
    if not rows:
        assert draw(maps, ["x", "y"][:runs]).axes[0].texts[0].get_text() == "no values of output_error"
        assert drawn_rows(rows_of_runs, maps).empty
        assert tables["output_error"].caption == "no values"


def test_many_modules_and_blocks_still_make_a_figure():
    rows = grid(lambda b, w: 1.0 + b, blocks=200, weights=[f"part{chr(65 + i)}.x{i}" for i in range(60)])
    draw(layer_maps([rows, rows], "output_error"), ["x", "y"]).savefig(io.BytesIO(), dpi=20)


@pytest.fixture
def url(database, stored):
    stored(grid(lambda b, w: 0.1 + b))
    stored(grid(lambda b, w: 0.2 + b), "rtn")
    stored([], "none")
    stored(grid(lambda b, w: 0.2 + b), "rtn", model="big")
    return database._engine.url.render_as_string()


def test_the_command_draws_and_lists(url, tmp_path, capsys):
    assert main(["layers", "1", "2", "--out", str(tmp_path / "out"), "--store", url]) == 0
    text = capsys.readouterr().out
    assert "block 3 self_attn.q_proj.weight" in text
    assert "wrote" in text
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert main(["layers", "1", "--metric", "output_error", "--out", str(tmp_path), "--json", "--store", url]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["worst"]["output_error"][0]["value"] == 3.1
    assert [name.rpartition("/")[2] for name in found["files"]] == [
        f"layers-1-output_error.{kind}" for kind in ("pdf", "png", "csv")
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["9"], ["run=9"]),
        (["3"], ["run=3", "full precision has none"]),
        (["1", "2", "3"], ["two to be compared"]),
        (["1", "4"], ["run=4", "same model", "tiny and big"]),
        (["1", "--metric", "nope"], ["metric=nope", "output_error"]),
        (["1", "--worst", "0"], ["worst=0"]),
    ],
)
def test_bad_input_is_one_line(url, tmp_path, capsys, arguments, words):
    assert main(["layers", *arguments, "--out", str(tmp_path), "--store", url]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert len(found.err.splitlines()) == 1
    for word in words:
        assert word in found.err


def test_drawing_needs_no_display_and_no_torch():
    script = (
        "import sys, analysis.layer_figures, analysis.why, analysis.tables.explanation;"
        "print(*({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_unknown_metrics_say_what_their_names_say():
    assert layer_info("hqq_error_vs_rtn").higher_is_better is False
    assert layer_info("gptq_solve_s").unit == "s"
    assert layer_info("awq_scale_function_error").ratio
    assert layer_info("awq_ratio").higher_is_better is None
    assert layer_info("awq_ratio").label == "awq ratio"
