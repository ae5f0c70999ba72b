"""Scores come from the summary with all their digits; items count where they give the score; a dash is a failure."""

import json

import numpy as np
import pytest

from qbench.errors import EvaluationError
from qbench.evaluation.opencompass.summary import read_scores
from tests.evaluation.opencompass.fakes import outputs

FLAGS = [True, False, True]


def _write(folder, files, stamp="20260101_000000"):
    for name, text in files.items():
        path = folder / stamp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_percent_becomes_a_share_with_its_items(tmp_path):
    _write(tmp_path, outputs({"piqa": FLAGS, "other": [False]}))
    (score,) = read_scores(tmp_path, ["piqa"], "model")
    assert (score.dataset, score.version, score.metric, score.mode) == ("piqa", "1cf9f0", "accuracy", "ppl")
    assert score.value == pytest.approx(2 / 3, rel=1e-12)  # the table has two decimals
    assert (score.unit, score.n) == ("fraction", 3)
    np.testing.assert_array_equal(score.samples, [1, 0, 1])


def test_the_newest_run_counts(tmp_path):
    _write(tmp_path, outputs({"piqa": [False]}))
    _write(tmp_path, outputs({"piqa": [True]}), "20260102_000000")
    assert read_scores(tmp_path, ["piqa"], "model")[0].value == 1


def test_items_that_do_not_give_the_score_are_left_out(tmp_path):
    files = outputs({"piqa": FLAGS})
    result = json.loads(files["results/model/piqa.json"])
    result["details"]["1"]["correct"] = True
    _write(tmp_path, files | {"results/model/piqa.json": json.dumps(result)})
    score = read_scores(tmp_path, ["piqa"], "model")[0]
    assert score.samples is None
    assert score.value == pytest.approx(2 / 3)


@pytest.mark.parametrize("key", ["correct", "is_correct", None])
def test_generated_answers_count_by_flag_or_by_comparison(tmp_path, key):
    files = outputs({"gsm8k": FLAGS}, mode="gen")
    details = [{key: flag} if key else {"predictions": "4", "references": "4" if flag else "5"} for flag in FLAGS]
    files["results/model/gsm8k.json"] = json.dumps({"accuracy": 200 / 3, "details": details})
    _write(tmp_path, files)
    np.testing.assert_array_equal(read_scores(tmp_path, ["gsm8k"], "model")[0].samples, [1, 0, 1])


def test_other_metrics_stay_as_they_are(tmp_path):
    _write(tmp_path, outputs({"nq": FLAGS}, metric="score"))
    score = read_scores(tmp_path, ["nq"], "model")[0]
    assert (score.value, score.unit, score.samples) == (pytest.approx(200 / 3), "score", None)


def test_predictions_may_lie_in_parts(tmp_path):
    files = outputs({"piqa": FLAGS})
    whole = json.loads(files.pop("predictions/model/piqa.json"))
    files["predictions/model/piqa_0.json"] = json.dumps({"0": whole["0"], "1": whole["1"]})
    files["predictions/model/piqa_1.json"] = json.dumps({"0": whole["2"]})
    _write(tmp_path, files)
    assert read_scores(tmp_path, ["piqa"], "model")[0].n == 3


def test_a_gap_is_a_failure(tmp_path):
    with pytest.raises(EvaluationError, match="no summary"):
        read_scores(tmp_path, ["piqa"], "model")
    files = outputs({"piqa": FLAGS})
    _write(tmp_path, files)
    with pytest.raises(EvaluationError, match="winogrande has no results"):
        read_scores(tmp_path, ["piqa", "winogrande"], "model")
    dash = "dataset,version,metric,mode,model\npiqa,1cf9f0,-,-,-\n"
    _write(tmp_path, {"summary/summary_20260101_000000.csv": dash})
    with pytest.raises(EvaluationError, match="piqa has no score"):
        read_scores(tmp_path, ["piqa"], "model")
    _write(tmp_path, {"results/model/piqa.json": '{"error": "lengths differ"}'})
    with pytest.raises(EvaluationError, match="piqa has no score: lengths differ"):
        read_scores(tmp_path, ["piqa"], "model")


def test_what_is_no_number_is_refused(tmp_path):
    files = outputs({"piqa": FLAGS})
    files["results/model/piqa.json"] = '{"accuracy": NaN}'
    _write(tmp_path, files)
    with pytest.raises(EvaluationError, match="accuracy is nan"):
        read_scores(tmp_path, ["piqa"], "model")
