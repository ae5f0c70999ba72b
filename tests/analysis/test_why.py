"""`qbench why` of planted rows, whose differences are known."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from analysis.divergence import FLOAT_NOISE, part
from analysis.tables.explanation import RenderedExplanation, in_short
from analysis.why import explain
from qbench.cli import main
from qbench.errors import SpecError
from qbench.store import queries
from qbench.store.records import LayerMetric, Outcome, RunColumns
from tests.analysis.conftest import HERE, losses, measured, sha

GPTQ = {"name": "gptq", "version": 1, "options": {"damp": 0.01, "act_order": False}}
AWQ = {"name": "awq_scale", "version": 1, "options": {"n_grid": 20}}
RTN = {"name": "rtn", "version": 1, "options": {}}
WEIGHTS = ("q.weight", "k.weight", "down.weight")


def rows(pipeline=("gptq",), blocks=3, prints=True, change=None, scale=1.0, stream=None):
    """The layer metrics of a run, as it records them. change(block, stage, module) -> None or what it adds to that
    number; `scale` multiplies all errors."""
    found = []

    def add(block, module, name, value):
        found.append(LayerMetric(block=block, module=module, name=name, value=float(value)))

    for block in range(blocks):
        for stage in pipeline:
            rounds = stage in ("gptq", "rtn")
            for k, module in enumerate(WEIGHTS):
                extra = (change(block, stage, module) if change else None) or 0.0
                if rounds:
                    add(block, module, "output_error", scale * (0.01 * (block + 1) + 0.001 * k) * (1 + extra))
                    add(block, module, "solve_s", np.random.default_rng().random())
                elif k == 0:
                    add(block, module, "awq_ratio", 0.5 + extra)
                if prints:
                    add(block, module, f"{stage}_fingerprint", hash((block, module, extra)) % 2**48)
            add(block, "", f"{stage}_s", np.random.default_rng().random())
        if stream is not None:
            add(block, "", "stream_error", stream[block])
        add(block, "", "install_s", 1.0)
    return found


@pytest.fixture
def run_of(database):
    """Stores a run and returns its row."""

    def store(
        layers,
        *stages,
        spec=None,
        codes="c",
        family=None,
        ppl=3.5,
        environment=HERE,
        error=None,
        model="tiny",
        **columns,
    ):
        whole = {"algo": stages[-1]["name"] if stages else "none", "pipeline": list(stages), "seed": None} | (
            spec or {}
        )
        columns = RunColumns(model=model, algo=whole["algo"], spec=whole, dtype="float32", family=family, **columns)
        key = sha(repr((whole, model, len(queries.runs(database)))))
        claim = database.begin(columns, key, environment)
        if error:
            database.fail(claim, "NumericsError", error, "trace")
        else:
            database.finish(claim, Outcome(codes_sha256=sha(codes)), [measured(losses(ppl))], layers)
        return database.find([key])[key]

    return store  # fmt: skip


def parting(database, a, b):
    return part(a, b, *(queries.layer_metrics(database, run.id) for run in (a, b)))


def shown(found, width=150):
    console = Console(file=io.StringIO(), width=width)
    console.print(RenderedExplanation(found))
    return console.file.getvalue()


@pytest.mark.parametrize("prints", [True, False])
def test_equal_rows_have_no_difference(database, run_of, prints):
    a, b = (run_of(rows(prints=prints), GPTQ) for _ in "ab")
    found = explain(database, a, b)
    assert found.parting.first is None
    assert found.parting.differing == 0 < found.parting.compared
    assert found.same_codes
    assert not found.settings
    assert not found.environment
    said = " ".join(in_short(found))
    assert "codes: the same to the bit" in said
    assert f"no {'state' if prints else 'layer metric'} of any stage differs" in said
    assert "output_error: the same in all 9 layers" in said


@pytest.mark.parametrize("prints", [True, False])
@pytest.mark.parametrize(
    ("where", "stage"),
    [((0, "gptq", "q.weight"), 1), ((1, "gptq", "down.weight"), 1), ((2, "awq_scale", "q.weight"), 0)],
)
def test_the_first_place_that_differs_is_found(database, run_of, prints, where, stage):
    def change(block, name, module):
        later = block > where[0] or (block == where[0] and (name, module) != ("awq_scale", "q.weight"))
        return 0.3 if (block, name, module) == where or (later and block > where[0]) else None

    pipeline = ("awq_scale", "gptq")
    a = run_of(rows(pipeline, prints=prints), AWQ, GPTQ)
    b = run_of(rows(pipeline, prints=prints, change=change), AWQ, GPTQ, codes="other")
    found = parting(database, a, b)
    assert found.evidence == ("fingerprints" if prints else "layer metrics")
    assert (found.first.block, found.first.stage, found.first.module) == (where[0], stage, where[2])
    backwards = parting(database, b, a)
    assert (backwards.first.block, backwards.first.stage, backwards.first.module) == (where[0], stage, where[2])
    assert found.first.a == backwards.first.b != found.first.b


def test_an_earlier_stage_comes_before_an_earlier_row(database, run_of):
    """Fingerprints decide by the order of work, not by the order of two runs' rows."""
    a = run_of(rows(("awq_scale", "gptq")), AWQ, GPTQ)
    change = {(1, "awq_scale", "k.weight"), (1, "gptq", "q.weight")}
    b = run_of(rows(("awq_scale", "gptq"), change=lambda *place: 1.0 if place in change else None), AWQ, GPTQ)
    found = parting(database, a, b)
    assert (found.first.block, found.first.stage, found.first.module) == (1, 0, "k.weight")
    assert [(pair.differ, pair.places) for pair in found.stages] == [(1, 9), (1, 9)]
    assert [pair.first for pair in found.stages] == [(1, "k.weight", "fingerprint"), (1, "q.weight", "fingerprint")]


def test_float_noise_is_told_from_a_difference(database, run_of):
    noise = {(0, "k.weight"): FLOAT_NOISE / 10, (1, "q.weight"): 100 * FLOAT_NOISE}
    a = run_of(rows(prints=False), GPTQ)
    b = run_of(rows(prints=False, change=lambda block, _, module: noise.get((block, module))), GPTQ, codes="other")
    found = parting(database, a, b)
    assert (found.first.block, found.first.module) == (0, "k.weight")
    assert (found.beyond_noise.block, found.beyond_noise.module) == (1, "q.weight")
    assert found.beyond_noise.relative == pytest.approx(100 * FLOAT_NOISE, rel=0.02)
    (line,) = (line for line in in_short(explain(database, a, b)) if line.startswith("first difference"))
    assert "beyond float noise: block 1" in line


def test_seconds_are_no_difference(database, run_of):
    a, b = (run_of(rows(prints=False), GPTQ) for _ in "ab")
    assert not any(each.info.name.endswith("_s") for each in explain(database, a, b).errors)
    assert parting(database, a, b).differing == 0


def test_one_run_without_fingerprints_is_compared_by_metrics(database, run_of):
    a, b = run_of(rows(), GPTQ), run_of(rows(prints=False), GPTQ)
    assert parting(database, a, b).evidence == "layer metrics"
    assert parting(database, a, b).first is None


def test_a_stage_of_one_run_alone_is_where_they_part(database, run_of):
    a = run_of(rows(("awq_scale", "gptq")), AWQ, GPTQ)
    b = run_of(rows(("gptq",), change=lambda *place: 0.2), GPTQ, codes="other")
    found = parting(database, a, b)
    assert [(pair.a, pair.b) for pair in found.stages] == [("awq_scale", None), ("gptq", "gptq")]
    assert (found.first.stage, found.first.block, found.first.b) == (0, 0, None)
    backwards = parting(database, b, a).first
    assert (backwards.stage, backwards.block, backwards.a) == (0, 0, None), "B's own rows come behind all of A's"
    assert "only in A" in " ".join(in_short(explain(database, a, b)))
    without = [row for row in rows(("awq_scale", "gptq")) if not row.name.startswith("awq_scale_f")]
    idle = run_of(without, AWQ, GPTQ)
    assert parting(database, idle, b).first.stage == 1, "a stage that decided nothing changed nothing"
    assert parting(database, idle, b).unseen is None


def test_without_numbers_the_settings_of_an_earlier_stage_count(database, run_of):
    """A stage whose layer metrics the other run has none of may be where they part, though only later numbers show."""
    smooth = {"name": "smoothquant", "version": 1, "options": {}}
    a = run_of(rows(("rtn",), prints=False), smooth, RTN)
    b = run_of(rows(("rtn",), prints=False, change=lambda *place: 0.2), AWQ, RTN, codes="other")
    found = parting(database, a, b)
    assert (found.unseen.a, found.unseen.b, found.first.stage) == ("smoothquant", "awq_scale", 1)
    (line,) = (each for each in in_short(explain(database, a, b)) if each.startswith("first difference"))
    assert line.startswith(
        "first difference, by settings alone: stage smoothquant / awq_scale; by layer metrics: block 0"
    )
    assert parting(database, a, run_of(rows(("rtn",), prints=False), smooth, RTN)).unseen is None


def test_other_rounding_takes_the_place_of_rounding(database, run_of):
    a = run_of(rows(("awq_scale", "rtn"), scale=2.0), AWQ, RTN)
    b = run_of(rows(("gptq",), change=lambda *place: 0.1), GPTQ, codes="other")
    found = parting(database, a, b)
    assert [(pair.a, pair.b) for pair in found.stages] == [("awq_scale", None), ("rtn", "gptq")]
    assert [(pair.a, pair.b) for pair in parting(database, b, a).stages] == [(None, "awq_scale"), ("gptq", "rtn")]
    text = shown(explain(database, a, b))
    assert "rtn / gptq" in text
    same = run_of(rows(("rtn",)), RTN)
    assert parting(database, same, run_of(rows(("gptq",)), GPTQ)).first is None, "equal codes, whoever made them"


def test_settings_are_listed_leaf_by_leaf_and_stages_by_option(database, run_of):
    scheme = {"weight": {"element": {"bits": 4}, "block": {"columns": 64}}, "overrides": []}
    other = {"weight": {"element": {"bits": 3}, "block": {"columns": 64}}, "overrides": [{"label": "blocks 2:int8"}]}
    damped = GPTQ | {"version": 2, "options": GPTQ["options"] | {"damp": 0.05}}
    a = run_of(rows(), GPTQ, spec={"scheme": scheme})
    b = run_of(rows(), damped, spec={"scheme": other})
    found = explain(database, a, b)
    paths = [path for path, _, _ in found.settings]
    assert paths == ["scheme.overrides.blocks 2:int8", "scheme.weight.element.bits"]
    assert found.parting.stages[0].settings == (("version", 1, 2), ("damp", 0.01, 0.05))
    assert not found.parting.stages[0].same_settings
    text = shown(found)
    assert "damp: 0.01 → 0.05" in text
    assert "4 differ" in text


def test_seeds_alone_are_called_so(database, run_of):
    runs = [run_of(rows(), GPTQ, spec={"calibration": {"seed": seed}}, family="f" * 64) for seed in (0, 1)]
    assert in_short(explain(database, *runs))[0] == "settings: seeds alone differ (calibration.seed)"


def test_environments_are_compared(database, run_of):
    there = replace(HERE, git_commit="abc", threads=4, versions={"torch": "2.0"})
    found = explain(database, run_of(rows(), GPTQ), run_of(rows(), GPTQ, environment=there, device="cuda"))
    assert [path for path, _, _ in found.environment] == ["device", "git_commit", "threads", "versions.torch"]
    assert "environment: device, git_commit, threads, versions.torch differ" in in_short(found)


def test_layers_are_ranked_by_ratio_and_by_difference(database, run_of):
    ratio, difference = (0, "q.weight"), (2, "down.weight")  # 0.010 -> 0.030 and 0.032 -> 0.064
    planted = {ratio: 2.0, difference: 1.0}
    a = run_of(rows(), GPTQ)
    b = run_of(rows(change=lambda block, _, module: planted.get((block, module))), GPTQ, codes="other")
    (found,) = explain(database, a, b, top=1).errors
    assert (found.n, found.a_better, found.b_better) == (9, 2, 0)
    assert [(each.block, each.module) for each in found.by_ratio] == [ratio]
    assert [(each.block, each.module) for each in found.by_difference] == [difference]
    assert found.typical == pytest.approx((3 * 2) ** (-1 / 9))
    shares = {each.kind: each.share for each in found.kinds}
    assert shares == pytest.approx({"q": 0.02 / 0.052, "k": 0.0, "down": 0.032 / 0.052})


@pytest.mark.parametrize(
    ("of_b", "block"),
    [((1.0, 1.2, 1.4), 1), ((1.2, 1.3, 1.4), 0), ((1.2, 1.0, 1.4), 2), ((1.3, 1.2, 1.0), None), ((1.2, 0.8, 1.2), 2)],
)
def test_streams_part_where_they_stay_apart(database, run_of, of_b, block):
    a, b = (run_of(rows(stream=stream), GPTQ) for stream in ((1.0, 1.0, 1.0), of_b))
    found = {each.info.name: each for each in explain(database, a, b).errors}
    assert found["stream_error"].parted == block
    assert found["output_error"].parted is None
    assert any(
        ("do not stay" if block is None else f"from block {block} on") in line
        for line in in_short(explain(database, a, b))
    )


def test_metrics_are_those_of_compare(database, run_of):
    found = explain(database, run_of(rows(), GPTQ, ppl=3.3), run_of(rows(), GPTQ, ppl=3.5))
    assert found.comparison.rows[0].outcome == "A better"
    assert any("c4-sample PPL: 27.11 against 33.12, A better" in line for line in in_short(found))


def test_runs_of_different_models_say_what_can_be_compared(database, run_of):
    found = explain(database, run_of(rows(), GPTQ), run_of(rows(), GPTQ, model="big"))
    assert not found.errors
    assert found.parting.evidence is None
    assert any("different models (tiny, big)" in note and "can still be compared" in note for note in found.notes)
    assert "different models" in shown(found)


def test_failed_runs_and_full_precision_are_compared_as_far_as_that_goes(database, run_of):
    done, failed, full = (
        run_of(rows(), GPTQ),
        run_of((), AWQ, GPTQ, error="singular"),
        run_of((), spec={"algo": "none"}),
    )
    found = explain(database, done, failed)
    assert found.comparison is None
    assert "is failed" in found.notes[0]
    assert "awq_scale" in shown(found)
    found = explain(database, full, done)
    assert "full precision has no quantized layers" in found.notes[0]
    assert found.comparison.rows
    assert shown(found)
    assert shown(explain(database, full, failed))


def test_one_layer_and_none_draw(database, run_of):
    one = [LayerMetric(block=0, module="q.weight", name="weight_error", value=0.0)]
    other = [LayerMetric(block=0, module="q.weight", name="weight_error", value=0.5)]
    a, b, empty = run_of(one, RTN), run_of(other, RTN, codes="other"), run_of((), RTN)
    assert "block 0, stage behind all stages" not in shown(explain(database, a, b))
    assert explain(database, a, b).errors[0].typical is None, "no ratio to nothing"
    assert "none are stored" in shown(explain(database, a, empty))


def test_the_whole_is_json(database, run_of):
    found = explain(database, run_of(rows(), GPTQ), run_of(rows(change=lambda *_: 1.0), AWQ, GPTQ))
    read = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert read["parting"]["stages"][0]["b"] == "awq_scale"
    assert read["comparison"]["metrics"]


def test_bad_input_is_one_line(database, run_of, capsys):
    run_of(rows(), GPTQ), run_of(rows(), GPTQ)
    url = database._engine.url.render_as_string()
    for arguments, word in (
        (["1", "1"], "one and the same"),
        (["1", "7"], "run=7"),
        (["1", "2", "--top", "0"], "top=0"),
        (["1", "2", "--alpha", "2"], "alpha=2"),
    ):
        assert main(["why", *arguments, "--store", url]) == 2
        found = capsys.readouterr()
        assert (found.out, len(found.err.splitlines())) == ("", 1)
        assert word in found.err
    assert main(["why", "1", "2", "--json", "--store", url]) == 0
    assert json.loads(capsys.readouterr().out)["same_codes"] is True
    with pytest.raises(SpecError, match="two runs"):
        explain(database, *[queries.run_named(database, "1")] * 2)
