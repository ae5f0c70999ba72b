import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from analysis import stats
from analysis.compare import compare
from analysis.tables.comparison import RenderedComparison
from qbench.cli import main
from qbench.errors import SpecError
from qbench.store import queries
from qbench.store.records import Measurement, Noise
from tests.analysis.conftest import HERE, losses, measured, sha


def answers(n: int = 220, seed: int = 0, flip: float = 0.1) -> np.ndarray:
    """Right and wrong answers to the same n items; `flip` of them differ from the common ones."""
    common = np.random.default_rng(99).random(n) < 0.6
    return np.where(np.random.default_rng(seed).random(n) < flip, ~common, common).astype(np.float64)


def accuracy(values: np.ndarray, task: str = "arc_easy", name: str = "acc", **changes) -> Measurement:
    found = stats.mean(values)
    fields = {
        "evaluator": "zeroshot",
        "protocol": "0-shot",
        "task": task,
        "name": name,
        "value": found.value,
        "stderr": found.stderr,
        "n": len(values),
        "unit": name,
        "spec_key": sha(f"{task} 0-shot"),
        "samples": values,
    }
    return Measurement(**(fields | changes))


@pytest.fixture
def both(database, store):
    """Compares two runs that have these measurements."""

    def compared(of_a, of_b, *, specs=({}, {}), models=("tiny", "tiny"), **options):
        keys = [
            store(algo, 4, *found, spec={"x": algo} | spec, model=model)
            for algo, found, spec, model in zip(("gptq", "rtn"), (of_a, of_b), specs, models, strict=True)
        ]
        rows = database.find(keys)
        return compare(database, *(rows[key] for key in keys), **options)

    return compared


def shown(found, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(RenderedComparison(found))
    return console.file.getvalue()


def test_perplexities_are_compared_window_by_window(both):
    a, b = losses(3.4), losses(3.5)
    (row,) = both([measured(a)], [measured(b)]).rows
    expected = stats.perplexity_difference(a, b)
    assert (row.difference, row.stderr) == (pytest.approx(expected.value), expected.stderr)
    assert (row.low, row.high) == stats.interval(expected)
    assert (row.test, row.p, row.p_holm) == ("paired t", stats.paired_t(a, b).p, stats.paired_t(a, b).p)
    assert (row.outcome, row.verdict) == ("A better", "A better"), "lower is better"


def test_answers_are_compared_by_mcnemar_and_higher_is_better(both):
    a = answers(seed=1)
    b = a * (np.random.default_rng(2).random(220) > 0.25)  # a quarter of the right answers lost
    (row,) = both([accuracy(a)], [accuracy(b)]).rows
    assert (row.p, row.test) == (stats.mcnemar(a, b).p, stats.mcnemar(a, b).method)
    assert row.flips == stats.flips(a, b)
    assert row.outcome == "A better"


def test_clusters_stored_with_either_run_count(both):
    a, b, documents = losses(3.4), losses(3.405), np.arange(40) // 4
    for stored in ((documents, documents), (documents, None), (None, documents)):
        of_a, of_b = (measured(x, clusters=c) for x, c in zip((a, b), stored, strict=True))
        (row,) = both([of_a], [of_b], specs=({"s": str(stored)}, {"s": str(stored)})).rows
        assert (row.clusters, row.test) == (10, "clustered t")
        assert row.p == stats.paired_t(a, b, documents).p
    found = both([measured(a, clusters=documents)], [measured(b, clusters=documents[::-1].copy())])
    assert not found.rows
    assert "group their items differently" in found.refused[0][1]


def test_p_values_are_corrected_over_all_rows(both):
    pairs = [(answers(seed=s, flip=0.05), answers(seed=s + 50, flip=0.12)) for s in range(6)]
    of_a = [accuracy(a, f"task{i}") for i, (a, _) in enumerate(pairs)]
    of_b = [accuracy(b, f"task{i}") for i, (_, b) in enumerate(pairs)]
    rows = both(of_a, of_b).rows
    assert [row.p_holm for row in rows] == stats.holm([row.p for row in rows]).tolist()
    assert any(row.p < 0.05 <= row.p_holm and row.outcome == "open" for row in rows), "the seeds show the correction"


def test_what_n_cannot_show_is_said_with_what_it_would_take(both):
    rng = np.random.default_rng(5)
    a = losses(3.4, n=20)
    b = a + rng.normal(0.004, 0.02, 20)
    (row,) = both([measured(a)], [measured(b)]).rows
    assert row.outcome == "open"
    found = stats.perplexity_difference(a, b)
    assert row.smallest_effect == stats.smallest_effect(found)
    assert row.items_needed == stats.items_needed(found) > 20
    assert "not distinguishable at n = 20; smallest detectable effect 0." in row.verdict
    assert row.verdict.endswith(" windows needed for the observed one")


def test_equivalence_is_within_a_share_of_bs_value(both):
    a = losses(3.4)
    b = a + np.random.default_rng(6).normal(0.0, 0.002, 40)
    for margin, outcome in ((0.01, "equivalent"), (0.0001, "open")):
        (row,) = both([measured(a)], [measured(b)], specs=({"m": margin}, {"m": margin}), margin=margin).rows
        assert row.outcome == outcome
        assert row.margin == margin * row.b
        expected = stats.equivalence(stats.perplexity_difference(a, b), margin * row.b)
        assert row.p_equivalent == pytest.approx(expected.p)
    (row,) = both([measured(a)], [measured(a - 0.002)], margin=0.01).rows
    assert row.verdict.startswith("B better, within ±")


def test_equal_items_are_identical_and_one_window_tells_nothing(both):
    (row,) = both([measured(losses(3.4))], [measured(losses(3.4))]).rows
    assert (row.outcome, row.difference, row.p) == ("identical", 0.0, 1.0)
    one = np.array([3.0])
    (row,) = both([measured(one)], [measured(one + 0.1)], specs=({"n": 1}, {"n": 1})).rows
    assert (row.outcome, row.p, row.p_holm) == ("untested", None, None)


def test_values_that_are_not_means_of_their_items_are_not_paired(both):
    kl = {"evaluator": "fidelity", "name": "kl_p99", "unit": "nat", "protocol": "kl-512"}
    a, b = losses(3.4), losses(3.5)
    (row,) = both([measured(a, value=2.0, stderr=0.3, **kl)], [measured(b, value=1.0, stderr=0.4, **kl)]).rows
    assert (row.test, row.stderr) == ("unpaired z", pytest.approx(0.5))
    assert row.p == pytest.approx(0.0455, abs=1e-4), "two standard errors"
    bare = kl | {"stderr": None, "samples": None}
    (row,) = both([measured(a, value=2.0, **bare)], [measured(b, value=1.0, **bare)], specs=({"b": 1}, {"b": 1})).rows
    assert (row.outcome, row.verdict) == ("untested", "cannot be judged: no standard error")


def test_the_bootstrap_on_request(both):
    a, b = losses(3.4), losses(3.41)
    (row,) = both([measured(a)], [measured(b)], resamples=999).rows
    expected = stats.paired_bootstrap(a, b, link="exp_mean", resamples=999)
    assert (row.test, row.p, row.low, row.high) == ("bootstrap", expected.p, expected.low, expected.high)


def test_other_protocols_are_refused_with_the_reason(both):
    found = both([measured(losses(3.4))], [measured(losses(3.4, n=30), protocol="window-2048")])
    assert not found.rows
    assert found.refused == (
        (
            "ppl c4-sample window-512",
            "measured differently: A by window-512 with n = 40, B by window-2048 with n = 30",
        ),
    )
    assert not found.lacking
    found = both([measured(losses(3.4), spec_key=sha("x"))], [measured(losses(3.4))], specs=({"o": 1}, {"o": 1}))
    assert found.refused[0][1].endswith("of other data or options")


def test_windows_of_different_models_are_refused_but_questions_are_not(both):
    of_a, of_b = ([measured(losses(3.4)), accuracy(answers(seed=s))] for s in (1, 2))
    specs = ({"model": {"fingerprint": "1"}}, {"model": {"fingerprint": "2"}})
    found = both(of_a, of_b, specs=specs, models=("tiny", "big"))
    assert [row.metric.name for row in found.rows] == ["acc"]
    assert "different tokens" in found.refused[0][1]
    assert ("model.fingerprint", "1", "2") in found.settings
    assert found.labels == ("tiny: gptq 4-bit", "big: rtn 4-bit")


def test_what_only_one_run_has_comes_with_the_command_for_the_other(both):
    found = both([measured(losses(3.4)), accuracy(answers())], [measured(losses(3.5))])
    (lacking,) = found.lacking
    assert (lacking.has, lacking.what) == ("A", "acc arc_easy 0-shot")
    assert lacking.command == f"qbench eval {found.b.id} eval=zeroshot eval.tasks=[arc_easy]"


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, "eval=perplexity eval.corpora=[c4-sample] eval.length=512 eval.n=40"),
        ({"protocol": "decode-64"}, "eval=decode eval.corpora=[c4-sample] eval.length=64 eval.n=40"),
        ({"task": "ptb"}, "eval=ptb eval.path=<file> eval.length=512 eval.n=40"),
        ({"task": "c4-new"}, "eval=c4 eval.path=<file> eval.definition=c4-new eval.length=512 eval.n=40"),
        ({"evaluator": "fidelity", "protocol": "kl-512"},
         "eval=fidelity eval.corpora=[c4-sample] eval.length=512 eval.n=40"),
        ({"evaluator": "fidelity", "protocol": "greedy-128"}, "eval=fidelity eval.corpora=[c4-sample]"),
        ({"evaluator": "needle", "protocol": "needle-512"}, "eval=needle eval.corpora=[c4-sample] eval.lengths=[512]"),
        ({"evaluator": "zeroshot", "protocol": "5-shot", "task": "mmlu"},
         "eval=zeroshot eval.tasks=[mmlu] eval.num_fewshot=5"),
        ({"evaluator": "opencompass", "protocol": "gen", "task": "piqa"}, "eval=opencompass eval.datasets=[piqa]"),
    ],
)  # fmt: skip
def test_the_command_fits_the_protocol(both, changes, options):
    found = both([accuracy(answers())], [accuracy(answers()), measured(losses(3.4), **changes)])
    (lacking,) = found.lacking
    assert (lacking.has, lacking.command) == ("B", f"qbench eval {found.a.id} {options}")


def test_the_noise_floor_is_said_where_it_is_known(both, database):
    a, b = losses(3.4), losses(3.5)
    noise = Noise(family="f", spec_key=sha("c4-sample window-512"), name="ppl", component="seed", sd=0.3, n=2,
                  unit="ppl", settings=[0, 1], values=[1.0, 2.0])  # fmt: skip
    database.add_noise([noise], HERE)
    assert both([measured(a)], [measured(b)]).rows[0].noise is None
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE run SET family = 'f'")
    runs = [queries.run_named(database, name) for name in "12"]
    found = compare(database, *runs)
    assert found.rows[0].noise == pytest.approx(0.3 * np.sqrt(2)), "both runs have it"
    times = abs(found.rows[0].difference) / found.rows[0].noise
    assert f"{times:.1f} × the noise floor" in shown(found)


def test_settings_go_by_their_names(both):
    def spec(damp, stages=("gptq",)):
        return {"pipeline": [{"name": n, "version": 1, "options": [["damp", damp], ["order", 1]]} for n in stages]}

    found = both([accuracy(answers())], [accuracy(answers())], specs=(spec(0.1), spec(0.2)))
    assert ("pipeline.gptq.options.damp", 0.1, 0.2) in found.settings
    assert not any("order" in path for path, *_ in found.settings)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"alpha": 0.0}, "alpha=0.0"), ({"alpha": 1.5}, "alpha"), ({"margin": -0.1}, "margin=-0.1"),
     ({"margin": float("nan")}, "margin"), ({"resamples": 10}, "bootstrap=10")],
)  # fmt: skip
def test_values_out_of_range_are_refused(both, options, words):
    with pytest.raises(SpecError, match=words):
        both([measured(losses(3.4))], [measured(losses(3.5))], **options)


def test_unfinished_runs_are_refused(database, store):
    rows = database.find([store("rtn", 4, error=("E", "m")), store("rtn", 3, measured(losses(3.4)))])
    with pytest.raises(SpecError, match="is failed"):
        compare(database, *rows.values())


def test_an_unknown_metric_has_the_direction_its_evaluator_gave_it(both):
    wins, fails = np.ones(40), np.zeros(40)
    for direction, outcome in ((True, "A better"), (False, "B better"), (None, "A larger")):
        of_a, of_b = (accuracy(each, name="new", higher_is_better=direction) for each in (wins, fails))
        (row,) = both([of_a], [of_b], specs=({"d": direction}, {"d": direction})).rows
        assert row.outcome == outcome


@pytest.mark.parametrize("width", [100, 120])
def test_the_terminal_shows_everything_in_its_width(both, width):
    of_a = [measured(losses(3.4)), accuracy(answers(seed=1)), accuracy(answers(seed=3), name="acc_norm")]
    of_b = [measured(losses(3.41)), accuracy(answers(seed=2)), accuracy(answers(seed=4), name="acc_norm")]
    found = both([*of_a, accuracy(answers(), "piqa")], of_b, margin=0.1)
    text = shown(found, width)
    for word in ("gptq 4-bit", "rtn 4-bit", "McNemar", "paired t", "Holm", "bits/weight", "quantize s",
                 "acc_norm ↑", "PPL ↓", "eval.tasks=[piqa]", "right only in A"):  # fmt: skip
        assert word in text, word
    assert "…" not in text.replace(" … ", "")
    assert max(map(len, text.splitlines())) <= width


def test_the_command_prints_a_table_or_json(both, database, capsys):
    found = both([measured(losses(3.4)), accuracy(answers())], [measured(losses(3.5))])
    store = database._engine.url.render_as_string()
    assert main(["compare", "1", "2", "--store", store]) == 0
    assert "A better" in capsys.readouterr().out
    assert main(["compare", found.a.key[:9], "2", "--store", store, "--json", "--margin", "0.5"]) == 0
    parsed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert parsed["metrics"][0]["outcome"] == "A better"
    assert parsed["metrics"][0]["metric"]["name"] == "ppl"
    assert parsed["lacking"][0]["command"].startswith("qbench eval 2")
    for arguments in (["1", "9"], ["1", "2", "--alpha", "0"], ["1", "2", "--alpha", "x"], ["1"]):
        assert main(["compare", *arguments, "--store", store]) == 2
        error = capsys.readouterr().err
        assert error.startswith("qbench: ")
        assert error.count("\n") == 1


def test_swapping_the_runs_turns_signs_and_verdicts(both, database):
    of_a, of_b = [measured(losses(3.4)), accuracy(answers(seed=1))], [measured(losses(3.5)), accuracy(answers(seed=2))]
    there = both(of_a, of_b)
    back = compare(database, there.b, there.a)
    turned = {"A better": "B better", "B better": "A better"}
    for one, other in zip(there.rows, back.rows, strict=True):
        assert (one.difference, one.low) == (-other.difference, pytest.approx(-other.high))
        assert (one.p, one.outcome) == (pytest.approx(other.p), turned.get(other.outcome, other.outcome))
    assert queries.run_named(database, "1") == there.a
    assert replace(there, rows=()).as_json()["metrics"] == []
