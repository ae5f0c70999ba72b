"""What OpenCompass leaves behind: scores from its summary, right and wrong items from its results.

Does not import torch.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qbench.errors import EvaluationError

#: Metrics that OpenCompass gives in percent of the items; stored as shares, as other evaluators give them.
PERCENT = ("accuracy", "exact_match", "humaneval_pass@1")


@dataclass(frozen=True)
class Score:
    """One number of the summary. `version` is OpenCompass's hash of the prompt, `n` the items that were predicted.

    `value` is a share where `unit` is "fraction", else as OpenCompass prints it; `samples` float64 [n] are 1 for items
    that were answered rightly, where that is known and gives `value`.
    """

    dataset: str
    version: str
    metric: str
    mode: str
    value: float
    unit: str
    n: int
    samples: np.ndarray | None = field(default=None, compare=False)


def read_scores(work: Path, datasets: Sequence[str], model: str) -> list[Score]:
    """The scores of all `datasets` from OpenCompass's working folder `work` (the newest of its timed folders).

    EvaluationError for the first dataset that has none: OpenCompass writes a dash there and ends well.
    """
    folders = sorted(work.glob("*/summary"))
    tables = sorted(folders[-1].glob("summary_*.csv")) if folders else []
    if not tables:
        raise EvaluationError("no summary was written")
    run = folders[-1].parent
    with tables[-1].open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    scores: list[Score] = []
    for dataset in datasets:
        result_file = run / "results" / model / f"{dataset}.json"
        if not result_file.is_file():
            raise EvaluationError(f"{dataset} has no results")
        result = json.loads(result_file.read_text(encoding="utf-8"))
        found = [row for row in rows if row["dataset"] == dataset and _number(row[model]) is not None]
        if not found:
            raise EvaluationError(f"{dataset} has no score{': ' + str(result['error']) if 'error' in result else ''}")
        n = _predictions(run / "predictions" / model, dataset)
        correct = _correct(result.get("details"), n)
        scores += [_score(row, result, n, correct) for row in found]
    return scores


def _score(row: Mapping[str, str], result: Mapping[str, Any], n: int, correct: np.ndarray | None) -> Score:
    """A row of the summary, which rounds, with the full digits of the result file."""
    percent = row["metric"] in PERCENT
    value = float(result[row["metric"]]) / (100 if percent else 1)
    if not math.isfinite(value):
        raise EvaluationError(f"{row['dataset']}: {row['metric']} is {value}")
    fits = percent and correct is not None and math.isclose(correct.mean(), value, rel_tol=1e-9, abs_tol=1e-12)
    return Score(
        dataset=row["dataset"],
        version=row["version"],
        metric=row["metric"],
        mode=row["mode"],
        value=value,
        unit="fraction" if percent else "score",
        n=n,
        samples=correct if fits else None,
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _predictions(folder: Path, dataset: str) -> int:
    """How many items were predicted; a large dataset's predictions may lie in several files."""
    whole = folder / f"{dataset}.json"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{dataset}_[0-9]*.json"))
    n = sum(len(json.loads(file.read_text(encoding="utf-8"))) for file in files)
    if n < 1:
        raise EvaluationError(f"{dataset} has no predictions")
    return n


def _correct(details: object, n: int) -> np.ndarray | None:
    """Right (1) or wrong (0) for each of n items, as the evaluator says or by comparing prediction and reference."""
    if isinstance(details, Mapping):
        items = [details.get(str(index)) for index in range(n)]
    elif isinstance(details, list) and len(details) == n:
        items = details
    else:
        return None
    flags = [_right(item) for item in items]
    return None if any(flag is None for flag in flags) else np.array(flags, dtype=np.float64)


def _right(item: object) -> bool | None:
    if not isinstance(item, Mapping):
        return None
    flag = item.get("correct", item.get("is_correct"))
    if flag is None and "predictions" in item and "references" in item:
        return item["predictions"] == item["references"]
    return flag if isinstance(flag, bool) else None
