"""lm-eval driven in process: its tasks on our data, its metrics and standard errors on our log-likelihoods.

lm-eval is imported inside the functions: seconds that a plan should not pay.
"""

from __future__ import annotations

import io
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from qbench.errors import AssetError, EvaluationError
from qbench.evaluation.base import Report, Subject
from qbench.evaluation.lm_eval.data import Source
from qbench.evaluation.lm_eval.definitions import Group, Leaf

if TYPE_CHECKING:
    from lm_eval.api.task import Task

#: lm-eval's own seeds and number of bootstrap draws: its standard errors and examples are reproduced.
FEWSHOT_SEED = 1234
_BOOTSTRAP_DRAWS = 100_000
_SLOW_BOOTSTRAP = {"bleu", "chrf", "chrf++", "ter"}
_SLOW_DRAWS = 100

_NOISY = ("lm_eval", "datasets", "huggingface_hub", "transformers", "evaluate", "fsspec", "httpx")


@dataclass(frozen=True)
class Wanted:
    """A task, its items and how many of its examples go before each."""

    leaf: Leaf
    source: Source
    shots: int


@dataclass(frozen=True)
class Score:
    """One metric of one task or group: lm-eval's value and standard error (None: it gives none). `samples` are the
    items' values, where the value is their mean."""

    name: str
    value: float
    stderr: float | None
    n: int
    samples: np.ndarray | None
    higher_is_better: bool

    @property
    def parts(self) -> tuple[str, str]:
        """Metric and filter."""
        metric, comma, filtered = self.name.partition(",")
        return metric, filtered if comma else "none"


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and what it uses without their logs, warnings and progress bars; undone on leaving."""
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    bar = tqdm.__init__
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    tqdm.__init__ = partialmethod(bar, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def loaded(wanted: Sequence[Wanted]) -> Iterator[dict[str, Task]]:
    """lm-eval's task objects by name, their items read; what that takes on disk is gone on leaving.

    AssetError in one line for items that cannot be read.
    """
    with quiet(), tempfile.TemporaryDirectory(prefix="qbench-lm-eval-") as folder:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=False)
        found: dict[str, Task] = {}
        for place, each in enumerate(wanted):
            file = Path(folder) / f"{place}.yaml"
            try:
                file.write_text(yaml.safe_dump(_definition(each, file)))
                (task,) = manager.load([str(file)])["tasks"].values()
            # Its files, the hub, a metric's library: whatever is wrong, it is this task that cannot be had.
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                raise AssetError(
                    f"task {each.leaf.name} from {each.source.where}: {type(error).__name__}: {reason}"
                ) from error
            task.set_config("num_fewshot", each.shots)
            task.set_fewshot_seed(FEWSHOT_SEED)
            found[each.leaf.name] = task
        yield found


def _definition(wanted: Wanted, file: Path) -> dict[str, Any]:
    """Fields of a YAML file that includes the built-in one, whose own functions stay relative to where it is."""
    leaf, source = wanted.leaf, wanted.source
    fields = {**leaf.overrides, **source.fields, "task": leaf.name}
    if leaf.path is not None:
        fields["include"] = str(leaf.path)
    if source.files is not None:
        files = {split: str(path) for split, path in source.files.items()}
        # lm-eval reads and prepares every split that a definition names; an item stands in for those not needed.
        stand_in = file.with_suffix(".jsonl")
        with source.files[leaf.evaluated_split].open("rb") as stream:
            stand_in.write_bytes(stream.readline())
        files |= {split: str(stand_in) for split in leaf.splits - files.keys()}
        # Not the user's cache: nothing is left behind, and nothing old is found.
        fields["dataset_kwargs"] = {"data_files": files, "cache_dir": str(file.parent)}
    return fields


def evaluate(
    wanted: Sequence[Wanted],
    groups: Sequence[Group],
    limit: int | None,
    subject: Subject,
    batch: int | None,
    report: Report,
) -> dict[str, list[Score]]:
    """All metrics of each task's first `limit` items (None: all), and of groups of these tasks, by name.

    Raises AssetError for items that cannot be read, EvaluationError for what is no number.
    """
    with loaded(wanted) as tasks:
        from lm_eval.evaluator import evaluate as lm_eval_evaluate

        from qbench.evaluation.lm_eval.adapter import SubjectLM

        results = lm_eval_evaluate(
            lm=SubjectLM(subject, batch, report),
            task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
        )
        found = {
            name: _scores(task, results["results"][name], results["samples"][name]) for name, task in tasks.items()
        }
        return found | {group.name: _aggregate(group, tasks, found) for group in groups}


def _scores(task: Task, values: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> list[Score]:
    from lm_eval.api.metrics import mean

    found = []
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise EvaluationError(f"{task.task_name}: lm-eval's {key} is {value}, not a finite number")
        own = [item[metric] for item in items if item["filter"] == filtered and metric in item["metrics"]]
        aggregate = task.aggregation().get(metric, mean)
        found.append(
            Score(
                name=metric if filtered == "none" else key,
                value=float(value),
                stderr=_stderr(metric, aggregate, own),
                n=len(own),
                samples=_samples(own, float(value)),
                higher_is_better=bool(task.higher_is_better().get(metric, True)),
            )
        )
    return found


def _stderr(metric: str, aggregate: object, items: list[Any]) -> float | None:
    """lm-eval's own standard error: a formula for means, a bootstrap for a few other metrics."""
    from lm_eval.api.metrics import stderr_for_metric

    draws = _SLOW_DRAWS if metric in _SLOW_BOOTSTRAP else _BOOTSTRAP_DRAWS
    function = stderr_for_metric(metric=aggregate, bootstrap_iters=draws)
    if function is None or len(items) < 2:
        return None
    with redirect_stdout(io.StringIO()):  # it announces itself
        return float(function(items))


def _samples(items: Sequence[Any], value: float) -> np.ndarray | None:
    """The items' values float64 [n], if they are numbers whose mean is `value`."""
    if not all(isinstance(item, (bool, int, float, np.number)) for item in items):
        return None
    samples = np.array(items, dtype=np.float64)
    return samples if math.isclose(samples.mean(), value, rel_tol=1e-12, abs_tol=1e-15) else None


def _aggregate(group: Group, tasks: Mapping[str, Task], scores: Mapping[str, list[Score]]) -> list[Score]:
    """A group's own scores, as lm-eval computes them from those of its tasks."""
    from lm_eval.api.group import Group as LmEvalGroup

    shell = LmEvalGroup.from_config({"group": group.name, "aggregate_metric_list": list(map(dict, group.aggregates))})
    names = [leaf.name for leaf in group.leaves]
    metrics: dict[str, dict[str, Any]] = {}
    for name in names:
        shell.add(tasks[name])
        metrics[name] = {"sample_len": max(score.n for score in scores[name])}
        for score in scores[name]:
            metric, filtered = score.parts
            metrics[name][f"{metric},{filtered}"] = score.value
            metrics[name][f"{metric}_stderr,{filtered}"] = "N/A" if score.stderr is None else score.stderr
    values = shell.aggregate(metrics)
    found = []
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        members = [score for name in names for score in scores[name] if score.parts == (metric, filtered)]
        stderr = values[f"{metric}_stderr,{filtered}"]
        items = [score.samples for score in members]
        found.append(
            Score(
                name=members[0].name,
                value=float(value),
                stderr=None if stderr == "N/A" else float(stderr),
                n=sum(score.n for score in members),
                samples=None if any(each is None for each in items) else _samples(np.concatenate(items), float(value)),
                higher_is_better=members[0].higher_is_better,
            )
        )
    return found
