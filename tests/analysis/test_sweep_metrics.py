"""The sweep's table and figures with metrics other than perplexity."""

import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from analysis import stats
from analysis.pareto import pareto_figures, plotted_rows
from analysis.pareto_axes import draw
from analysis.rankings import rank_agreement
from analysis.tables.sweep import sweep_table
from analysis.tables.terminal import Rendered
from qbench.metrics import metric_info
from qbench.store.records import Measurement, Noise
from tests.analysis.conftest import HERE, losses, measured, sha

TASKS, KL = sha("arc 0-shot"), sha("kl")


def answers(share: float, n: int = 200) -> np.ndarray:
    """Right answers to the first questions: a better run is right wherever a worse one is."""
    return (np.arange(n) < round(share * n)).astype(np.float64)


def value_of(values: np.ndarray, name: str, spec_key: str, **changes) -> Measurement:
    found = stats.mean(values)
    fields = {"evaluator": "zeroshot", "protocol": "0-shot", "task": "arc_easy", "name": name, "unit": "share",
              "value": found.value, "stderr": found.stderr, "n": len(values), "samples": values}  # fmt: skip
    return Measurement(**(fields | {"spec_key": spec_key} | changes))


def task(share: float) -> tuple[Measurement, Measurement]:
    return value_of(answers(share), "acc", TASKS), value_of(answers(share + 0.05), "acc_norm", TASKS)


def fidelity(divergence: float) -> tuple[Measurement, ...]:
    rng = np.random.default_rng(3)
    kl = divergence * rng.uniform(0.5, 1.5, 20)
    fields = {"evaluator": "fidelity", "protocol": "kl-512", "task": "c4-sample"}
    squares = 1e4 * kl
    return (
        value_of(kl, "kl_mean", KL, **fields | {"unit": "nats"}),
        value_of(kl, "kl_p99", KL, **fields | {"unit": "nats", "value": 3 * divergence, "samples": None}),
        value_of(squares, "rms_dp", KL, **fields | {"unit": "%", "value": float(np.sqrt(squares.mean()))}),
    )


def sweep(store) -> list[str]:
    """Full precision, and three points of decreasing quality."""
    qualities = ((None, 0.7, 0.0, 3.3), (4, 0.68, 0.02, 3.35), (3, 0.6, 0.1, 3.6), (2, 0.3, 1.5, 6.0))
    return [
        store("none" if bits is None else "rtn", bits, *task(share), *fidelity(divergence), measured(losses(loss)))
        for bits, share, divergence, loss in qualities
    ]


ALL = (sha("c4-sample window-512"), TASKS, KL)


def shown(table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(Rendered(table))
    return console.file.getvalue()


def test_every_metric_of_the_evaluations_has_its_columns(database, store):
    table = sweep_table(database, sweep(store), ALL)
    assert [each.value for each in table.evaluations] == [
        "ppl c4-sample window-512", "acc arc_easy", "acc_norm arc_easy",
        "kl_mean c4-sample kl-512", "kl_p99 c4-sample kl-512", "rms_dp c4-sample kl-512",
    ]  # fmt: skip
    _, acc, norm, kl, p99, rms = table.evaluations
    assert table.frame[acc.value].tolist() == [0.7, 0.68, 0.6, 0.3]
    assert table.frame[acc.delta].tolist()[1:] == pytest.approx([-0.02, -0.1, -0.4])
    expected = stats.difference(answers(0.6), answers(0.7))
    assert table.frame[acc.delta_stderr][2] == pytest.approx(expected.stderr)
    assert table.frame[norm.value][0] == pytest.approx(0.75)
    assert table.frame[p99.delta_stderr].isna().all(), "a percentile is not paired"
    assert table.frame[rms.delta][3] == pytest.approx(table.frame[rms.value][3])
    squares = [fidelity(divergence)[2].samples for divergence in (1.5, 0.0)]
    expected = stats.difference(*squares, link="root_mean")
    assert table.frame[rms.delta_stderr][3] == pytest.approx(expected.stderr), "paired, on the squares"
    assert table.frame[kl.n].tolist() == [20] * 4
    assert "arc_easy: 0-shot, 200 items" in table.caption
    assert table.caption.count("kl-512: kl-512, 20 windows") == 1


def test_the_best_are_marked_by_the_metrics_direction(database, store):
    keys = [*sweep(store), store("gptq", 4, *task(0.675), *fidelity(0.0199), measured(losses(3.351)))]
    table = sweep_table(database, keys, ALL)
    ppl, acc, _, kl, p99, _ = table.evaluations
    assert table.frame[acc.best].tolist() == [False, True, False, False, True], "0.68 and 0.675: one item of 200"
    assert table.frame[ppl.best].tolist() == [False, True, False, False, True]
    assert table.frame[kl.best].tolist() == [False, False, False, False, True], "half a percent, on every window"
    assert not table.frame[p99.best].any()
    text = shown(table, 200)
    assert "0.680 ± 0.033*" in text
    assert "* best of the quantized points" in text
    assert "0.600 ± 0.035 " in text


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_many_metrics_are_shown_below_each_other_and_nothing_is_cut(database, store, width):
    table = sweep_table(database, sweep(store), ALL)
    text = shown(table, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for word in ("PPL ± SE ↓", "acc ± SE ↑", "acc_norm ± SE ↑", "KL, nats ± SE ↓", "KL p99, nats ± SE ↓",
                 "RMS Δp, % ± SE ↓", "-0.100 ± 0.021", "0.300 ± 0.032"):  # fmt: skip
        assert word in text, word
    assert text.count("bits/") == 1, "costs are in the first table alone"
    assert text.count("full precision") == {80: 3, 100: 3, 120: 2, 200: 2}[width], "tables; four metrics at most"


def test_differences_from_full_precision_are_not_repeated(database, store):
    table = sweep_table(database, sweep(store), [KL])
    assert "Δ ± paired SE" not in shown(table, 200)


def test_figures_of_headline_metrics_follow_their_direction(database, store, tmp_path):
    table = sweep_table(database, sweep(store), ALL)
    files = pareto_figures(table, tmp_path)
    assert [path.stem for path in files if path.suffix == ".csv"] == [
        "pareto-c4-sample_window-512", "pareto-arc_easy-acc", "pareto-arc_easy-acc_norm",
        "pareto-c4-sample_kl-512-kl_mean",
    ]  # fmt: skip
    rows = pd.read_csv(tmp_path / "pareto-arc_easy-acc.csv")
    assert rows["on_front"].tolist() == [False, True, True, True], "more bits, more right answers"
    assert set(rows["metric"]) == {"acc"}


def drawn(table, position: int):
    evaluation = table.evaluations[position]
    axes = Figure().add_subplot()
    draw(plotted_rows(table, "tiny", evaluation), evaluation.metric, axes)
    axes.figure.canvas.draw()
    return axes


def test_axes_say_quantity_unit_and_direction(database, store):
    table = sweep_table(database, sweep(store), ALL)
    accuracy, divergence = drawn(table, 1), drawn(table, 3)
    assert accuracy.get_ylabel() == "accuracy on arc_easy (better ↑)"
    assert accuracy.get_yscale() == "linear"
    words = divergence.get_ylabel().replace("\n", " ")
    assert words == "KL divergence from full precision on c4-sample, nats, (better ↓)"
    assert divergence.get_yscale() == "log", "0.02 to 1.5; the 0 of full precision is not drawn"
    labels = divergence.get_legend_handles_labels()[1]
    assert not any("full precision" in label for label in labels)
    assert any("full precision" in label for label in accuracy.get_legend_handles_labels()[1])


def test_a_metric_without_direction_has_neither_figure_nor_best(database, store, tmp_path):
    odd = [value_of(answers(share), "odd", TASKS) for share in (0.2, 0.4)]
    keys = [store("rtn", bits, each) for bits, each in zip((3, 4), odd, strict=True)]
    table = sweep_table(database, keys, [TASKS])
    assert not table.frame[table.evaluations[0].best].any()
    assert pareto_figures(table, tmp_path) == []
    told = [replace(each, higher_is_better=True) for each in odd]
    keys = [store("gptq", bits, each) for bits, each in zip((3, 4), told, strict=True)]
    assert len(pareto_figures(sweep_table(database, keys, [TASKS]), tmp_path)) == 3


def test_differences_are_given_in_units_of_the_noise_floor(database, store):
    def noise(family: str, component: str, sd: float) -> Noise:
        return Noise(family=family, spec_key=ALL[0], name="ppl", component=component, sd=sd, n=2, unit="ppl",
                     settings=[0, 1], values=[1.0, 2.0])  # fmt: skip

    keys = [
        store("none", None, measured(losses(3.3)), family="full"),
        store("rtn", 4, measured(losses(3.35)), family="four"),
        store("rtn", 3, measured(losses(3.6)), family="three"),
    ]
    database.add_noise([noise("four", "seed", 0.3), noise("four", "calib_seed", 0.4), noise("x", "seed", 9.0)], HERE)
    table = sweep_table(database, keys, ALL[:1])
    (ppl,) = table.evaluations
    assert table.frame[ppl.noise].tolist()[1] == pytest.approx(0.5), "variances add"
    assert table.frame[ppl.noise].isna().tolist() == [True, False, True]
    times = abs(table.frame[ppl.delta][1]) / 0.5
    assert f"({times:.1f}×)" in shown(table, 120)
    database.add_noise([noise("full", "batch", 1.2)], HERE)
    assert sweep_table(database, keys, ALL[:1]).frame[ppl.noise][1] == pytest.approx(1.3), "of both rows"


def test_the_root_of_mean_squares_has_the_errors_of_the_jackknife():
    rng = np.random.default_rng(4)
    a, b = rng.exponential(2.0, 300), rng.exponential(1.0, 300)
    found = stats.difference(a, b, link="root_mean")
    left_out = [np.sqrt(np.delete(a, i).mean()) - np.sqrt(np.delete(b, i).mean()) for i in range(300)]
    assert found.stderr == pytest.approx(np.sqrt(299 / 300 * np.square(left_out - np.mean(left_out)).sum()), rel=0.01)
    assert stats.difference(a, np.zeros(300), link="root_mean").value == pytest.approx(np.sqrt(a.mean()))
    assert metric_info("rms_dp").link == "root_mean"


def test_metrics_that_rank_alike_agree_whatever_their_directions(database, store):
    keys = [*sweep(store), store("gptq", 2, *task(0.5), measured(losses(7.0)))]  # worse perplexity than rtn 2-bit
    found = rank_agreement(sweep_table(database, keys, ALL)).set_index(["first", "second"])
    assert found.loc[("acc arc_easy", "acc_norm arc_easy"), "tau"] == pytest.approx(1.0)
    assert found.loc[("acc arc_easy", "kl_mean c4-sample kl-512"), "tau"] == pytest.approx(1.0)
    inverted = found.loc[("ppl c4-sample window-512", "acc arc_easy")]
    assert (inverted["tau"], inverted["points"]) == (pytest.approx(4 / 6), 4), "one of six pairs is the other way round"
    assert found["p_holm"].tolist() == stats.holm(found["p"].to_numpy()).tolist()
    assert rank_agreement(sweep_table(database, keys[:2], ALL)).empty
