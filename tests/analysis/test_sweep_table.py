import io
import math
import re

import numpy as np
import pytest
from rich.console import Console

from analysis import stats
from analysis.tables.sweep import sweep_table
from analysis.tables.terminal import Rendered
from qbench.errors import EvaluationError
from qbench.store.records import Environment, Outcome, RunColumns
from tests.analysis.conftest import losses, measured, sha

C4, WIKI = sha("c4-sample window-512"), sha("wiki window-512")


def shown(table, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(Rendered(table))
    return console.file.getvalue()


def test_values_and_paired_differences_are_those_of_the_stored_losses(database, store):
    full, quantized = losses(3.36), losses(3.56)
    keys = [store("none", None, measured(full)), store("gptq", 4, measured(quantized))]
    table = sweep_table(database, keys, [C4])
    assert [each.label for each in table.evaluations] == ["c4-sample"]
    first, second = table.frame.iloc[0], table.frame.iloc[1]
    assert first["ppl c4-sample"] == stats.perplexity(full).value
    assert second["ppl_stderr c4-sample"] == pytest.approx(stats.perplexity(quantized).stderr, rel=1e-12)
    difference = stats.perplexity_difference(quantized, full)
    assert (second["ppl_delta c4-sample"], second["ppl_delta_stderr c4-sample"]) == (
        difference.value,
        difference.stderr,
    )
    assert math.isnan(first["ppl_delta c4-sample"])
    assert second["ppl_n c4-sample"] == 40
    assert second["bits_per_weight"] == 4.3125
    assert list(table.frame["key"]) == keys


def test_rows_keep_the_order_of_the_keys_and_unknown_keys_are_shown_as_missing(database, store):
    keys = [store("rtn", bits, measured(losses(3.0))) for bits in (2, 3, 4)]
    table = sweep_table(database, [keys[2], "f" * 64, keys[0], keys[2]], [C4])
    assert list(table.frame["key"]) == [keys[2], "f" * 64, keys[0]]
    assert list(table.frame["status"]) == ["done", "missing", "done"]


def test_the_baseline_is_that_of_the_same_model_and_dtype(database, store):
    keys = []
    for model, mean in (("tiny", 3.0), ("big", 2.0)):
        for dtype, more in (("float32", 0.0), ("bfloat16", 0.1)):
            for algo, bits, loss in (("none", None, 0.0), ("rtn", 4, 0.5)):
                values = losses(mean + more + loss)
                keys.append(store(algo, bits, measured(values), model=model, dtype=dtype))
    frame = sweep_table(database, keys, [C4]).frame
    for start in range(0, 8, 2):
        expected = frame["ppl c4-sample"][start + 1] - frame["ppl c4-sample"][start]
        assert frame["ppl_delta c4-sample"][start + 1] == pytest.approx(expected)


def test_without_a_finished_baseline_there_is_no_difference(database, store):
    keys = [store("none", None, error=("MemoryError", "")), store("rtn", 4, measured(losses(3.0)))]
    assert sweep_table(database, keys, [C4]).frame["ppl_delta c4-sample"].isna().all()


def test_differences_without_samples_have_no_standard_error(database, store):
    bare = {"samples": None}
    keys = [
        store("none", None, measured(losses(3.0), **bare)),
        store("rtn", 4, measured(losses(3.5), **bare)),
    ]
    row = sweep_table(database, keys, [C4]).frame.iloc[1]
    assert row["ppl_delta c4-sample"] == pytest.approx(np.exp(3.5) - np.exp(3.0))
    assert math.isnan(row["ppl_delta_stderr c4-sample"])


def test_one_window_is_shown_without_standard_errors(database, store):
    one = np.array([3.0])
    keys = [store("none", None, measured(one)), store("rtn", 4, measured(one + 0.5))]
    text = " ".join(shown(sweep_table(database, keys, [C4])).split())
    assert "rtn 4-bit 33.12 +13.03 4.312" in text
    assert text.endswith("1 window")


def test_different_windows_are_not_subtracted(database, store):
    keys = [store("none", None, measured(losses(3.0, n=40))), store("rtn", 4, measured(losses(3.5, n=39)))]
    with pytest.raises(EvaluationError, match="40"):
        sweep_table(database, keys, [C4])


def test_a_column_never_mixes_protocols(database, store):
    same = {"spec_key": C4}
    keys = [
        store("rtn", 3, measured(losses(3.0), protocol="window-512", **same)),
        store("rtn", 4, measured(losses(3.0), protocol="window-2048", **same)),
    ]
    with pytest.raises(EvaluationError, match="window-2048, window-512"):
        sweep_table(database, keys, [C4])


def test_evaluations_of_one_text_get_columns_of_their_own(database, store):
    protocols = ("window-512", "window-2048")
    values = [measured(losses(3.0 + i), protocol=protocol) for i, protocol in enumerate(protocols)]
    fewer = measured(losses(2.0, n=5), spec_key=sha("fewer"))
    key = store("rtn", 4, *values, fewer)
    asked = [*(value.spec_key for value in values), fewer.spec_key]
    table = sweep_table(database, [key], asked)
    labels = [each.label for each in table.evaluations]
    assert len(set(labels)) == 3
    assert labels[1] == "c4-sample window-2048"
    assert [table.frame[f"ppl {label}"][0] for label in labels] == [each.value for each in (*values, fewer)]
    assert [each.label for each in sweep_table(database, [key], asked[1:2]).evaluations] == ["c4-sample"]


def test_other_metrics_are_not_taken_for_perplexities(database, store):
    key = store("rtn", 4, measured(losses(3.0)), measured(losses(1.0), name="nll"))
    assert sweep_table(database, [key], [C4]).frame["ppl c4-sample"].tolist() == [measured(losses(3.0)).value]


def test_what_failed_is_named_with_its_error(database, store):
    keys = [
        store("none", None, measured(losses(3.0))),
        store("gptq", 2, error=("NumericsError", "block 3 q_proj: singular\nsecond line")),
        store("gptq", 3, error=("MemoryError", "")),
    ]
    claim = database.begin(RunColumns(model="tiny", algo="rtn", spec={}), sha("running"))
    dead = database.begin(RunColumns(model="tiny", algo="awq", spec={}), sha("dead"))
    with database.write() as connection:
        connection.exec_driver_sql(f"UPDATE run SET heartbeat = 0 WHERE id = {dead.run_id}")
    table = sweep_table(database, [*keys, claim.key, dead.key], [C4])
    assert list(table.frame["status"]) == ["done", "failed", "failed", "running", "interrupted"]
    text = shown(table)
    assert "failed: gptq 2-bit: NumericsError: block 3 q_proj: singular\n" in text
    assert "failed: gptq 3-bit: MemoryError\n" in text
    assert "second line" not in text


def test_with_nothing_measured_there_is_still_a_table(database, store):
    keys = [store("rtn", 4, error=("E", "m")), store("rtn", 3)]
    text = shown(sweep_table(database, keys, [C4]))
    assert "status" in text
    assert "failed: rtn 4-bit: E: m" in text
    assert "done" in text
    assert shown(sweep_table(database, [], [C4]))


def test_the_caption_says_what_all_rows_share(database, store):
    elsewhere = Environment(
        git_commit=None, git_dirty=None, versions={}, platform="q", cpu="c", threads=1, gpu=None, driver=None
    )
    keys = [store("rtn", bits, measured(losses(3.0)), symmetric=True) for bits in (3, 4)]
    caption = sweep_table(database, keys, [C4]).caption
    assert caption == "model tiny · g64 · sym · float32 · c4-sample: window-512, 40 windows"
    keys.append(store("rtn", 2, measured(losses(3.0)), symmetric=True, environment=elsewhere))
    assert "2 environments" in sweep_table(database, keys, [C4]).caption


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_number_is_cut_off_at_any_width(database, store, width):
    keys = [
        store("gptq", bits, measured(losses(mean)), measured(losses(mean + 0.1), "wiki"), calib=calib)
        for bits, mean, calib in (
            (2, 13.8, "c4-sample"),
            (3, 10.0, "multilingual-sample"),
            (4, 3.6, "code-sample"),
        )
    ]
    keys.insert(0, store("none", None, measured(losses(3.36)), measured(losses(3.4), "wiki")))
    text = shown(sweep_table(database, keys, [C4, WIKI]), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    numbers = ("28.79 ±", "985k ±", "1088k ±", "22026 ±", "+21998 ±", "24343 ±", "36.60 ±", "4.312", "1500")
    for expected in numbers:
        assert expected in text
    assert re.search(r" 985k ± 4\dk ", text)  # 0.3 / √40 of it


def test_device_memory_is_shown_where_there_was_a_device(database, store):
    outcome = Outcome(peak_device_bytes=2_000_000_000)
    key = store("rtn", 4, measured(losses(3.0)), outcome=outcome)
    assert "2000" in shown(sweep_table(database, [key], [C4]))
    assert "GPU" not in shown(sweep_table(database, [store("rtn", 3, measured(losses(3.0)))], [C4]))
