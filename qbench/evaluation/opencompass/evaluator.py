"""Scores of OpenCompass: its datasets, prompts and metrics, on a checkpoint with the decoded weights.

What a checkpoint cannot say, quantized inputs and caches and transformed inputs, cannot be measured this way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qbench.assets import scratch_dir
from qbench.checks import integer
from qbench.errors import EvaluationError, SpecError
from qbench.evaluation.base import Context, Evaluation, Report, Subject
from qbench.evaluation.opencompass.catalog import Catalog, Dataset
from qbench.evaluation.opencompass.data import Located, locate
from qbench.evaluation.opencompass.driver import Task, score
from qbench.evaluation.opencompass.environment import VERSION as OPENCOMPASS_VERSION
from qbench.evaluation.opencompass.environment import Environment, require_environment
from qbench.evaluation.opencompass.summary import Score
from qbench.spec import EvaluationSpec, digest
from qbench.store.records import Measurement

#: Raise when the same items give another number.
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class OpenCompass(Evaluation):
    """One dataset file of OpenCompass."""

    dataset: Dataset = field(compare=False)
    located: Located = field(compare=False)
    environment: Environment = field(compare=False)

    def preflight(self, context: Context) -> None:
        """SpecError for a model that quantizes while it runs, or cannot generate; AssetError for rows that are not in
        the schema."""
        if (what := context.quantizes_at_run_time()) is not None:
            reason = f"only weights quantized: a checkpoint, which OpenCompass reads, cannot say {what}"
            raise SpecError("eval", "opencompass", reason)
        if any(part.mode == "gen" for part in self.dataset.parts) and not context.skeleton.can_generate():
            raise SpecError("eval.datasets", self.dataset.name, f"a model that generates; {context.name} does not")
        with scratch_dir() as scratch:
            self.located.prepared(scratch)

    def measure(self, subject: Subject, report: Report) -> list[Measurement]:
        """Scores of all parts, with samples where items are right or wrong; over several parts also their mean.

        Raises TaskFailed, which names the log, if OpenCompass does not score the dataset.
        """
        if subject.weights.running or subject.weights.online:
            raise EvaluationError(f"opencompass {self.dataset.name}: the model quantizes or transforms while it runs")
        with scratch_dir() as scratch:
            checkpoint = scratch / "checkpoint"
            with subject.quantized() as model, _without_bars():
                model.save_pretrained(checkpoint)
                parameter = next(model.parameters())
                longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            subject.tokenizer.save_pretrained(checkpoint)
            task = Task(
                environment=self.environment,
                dataset=self.dataset,
                checkpoint=checkpoint,
                dtype=str(parameter.dtype).removeprefix("torch."),
                device=str(parameter.device),
                data=self.located.prepared(scratch / "data-cache"),
                limit=self.spec.n,
                batch=subject.batch,
                max_seq_len=longest,
                threads=torch.get_num_threads(),
            )
            scores = score(task, scratch, subject.cache_folder / "opencompass-logs", report)
        found = [self._measurement(each) for each in scores]
        return found + _mean(self.spec, scores)

    def _measurement(self, score: Score) -> Measurement:
        return Measurement(
            evaluator=self.spec.evaluator,
            protocol=f"{score.mode}-{score.version}",
            task=score.dataset,
            name=score.metric,
            value=score.value,
            stderr=_stderr(score.samples),
            n=score.n,
            unit=score.unit,
            spec_key=self.spec.key(),
            samples=score.samples,
            whole=self.spec.n is None,
        )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without transformers' progress bars, which would write over qbench's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _stderr(samples: np.ndarray | None) -> float | None:
    if samples is None or len(samples) < 2:
        return None
    return float(samples.std(ddof=1)) / math.sqrt(len(samples))


def _mean(spec: EvaluationSpec, scores: Sequence[Score]) -> list[Measurement]:
    """The unweighted mean over parts of what they all measure as a share, as OpenCompass summarizes MMLU and others;
    nothing for one part."""
    datasets = {each.dataset for each in scores}
    for metric in {each.metric: None for each in scores if each.unit == "fraction"}:
        of_parts = [each for each in scores if each.metric == metric]
        if len(datasets) > 1 and {each.dataset for each in of_parts} == datasets:
            errors = [_stderr(each.samples) for each in of_parts]
            known = None if None in errors else math.sqrt(sum(error * error for error in errors)) / len(errors)
            return [
                Measurement(
                    evaluator=spec.evaluator,
                    protocol=spec.protocol,
                    task=spec.task,
                    name="naive_average",
                    value=float(np.mean([each.value for each in of_parts])),
                    stderr=known,
                    n=sum(each.n for each in of_parts),
                    unit="fraction",
                    spec_key=spec.key(),
                    whole=spec.n is None,
                )
            ]
    return []


def build_evaluations(options: Mapping[str, Any], source: str) -> tuple[OpenCompass, ...]:
    """`eval.datasets`, `eval.limit` and `eval.data_dir` as evaluations.

    Refuses, before anything is loaded: AssetError where OpenCompass or the data are missing, SpecError for an unknown
    dataset or a limit that is no positive number.
    """
    names = options["datasets"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SpecError("eval.datasets", names, "a list of datasets of OpenCompass such as [piqa,winogrande]")
    limit = None if options["limit"] is None else integer("eval.limit", options["limit"], 1)
    folder = None if options["data_dir"] is None else Path(str(options["data_dir"]))
    environment = require_environment()
    found = []
    for dataset in Catalog(environment).resolve(list(dict.fromkeys(names))):
        located = locate(dataset.name, dataset.data, folder)
        definitions = [[part.abbr, part.definition] for part in dataset.parts]
        spec = EvaluationSpec(
            evaluator="opencompass",
            version=VERSION,
            task=dataset.name,
            fingerprint=digest([definitions, located.fingerprint()]),
            length=None,
            n=limit,
            mode=dataset.mode,
            options=(("opencompass", OPENCOMPASS_VERSION),),
        )
        found.append(OpenCompass(spec=spec, dataset=dataset, located=located, environment=environment))
    return tuple(found)
