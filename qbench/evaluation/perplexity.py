"""Perplexity under the protocol `window-<length>`: non-overlapping windows, remainder dropped, no overlap of context.

The mean negative log-likelihood of the length - 1 predicted tokens of every window, from a float32 log-softmax; the
perplexity is exp of the mean over windows. This is the protocol of the GPTQ papers, not lm-eval's rolling one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.calibration.corpora import Corpus, resolve_corpus
from qbench.calibration.documents import SEPARATOR, window_clusters
from qbench.calibration.samplers import evaluation_windows
from qbench.checks import choice, integer
from qbench.engine.sinks import with_head
from qbench.engine.source import Source
from qbench.engine.streams import Stream
from qbench.errors import EvaluationError, SpecError
from qbench.evaluation.base import Context, Evaluation, Report, Subject, WindowEvaluation
from qbench.evaluation.recorder import Recorder
from qbench.spec import EvaluationSpec
from qbench.store.records import Measurement
from qbench.structure.blocks import finish

#: Raise when the same windows give another number.
VERSION = 1

MODES = ("prefill", "decode")

#: Tokens per forward where no batch size is given: one long window, or a few short ones.
BATCH_TOKENS = 1024

Progress = Callable[[int, int], None]


@torch.inference_mode()
def window_nll(
    model: nn.Module, windows: Tensor, batch: int | None = None, progress: Progress = lambda done, total: None
) -> Tensor:
    """Mean NLL (nats) of every token window [n, length] → float64 [n]; `batch` windows per forward."""
    device = next(model.parameters()).device
    values = []
    for tokens in windows.split(batch or max(1, BATCH_TOKENS // windows.shape[1])):
        tokens = tokens.to(device)
        values.append(_nll(model(input_ids=tokens, use_cache=False).logits, tokens))
        progress(sum(map(len, values)), len(windows))
    return torch.cat(values)


@torch.inference_mode()
def stream_nll(
    source: Source,
    stream: Stream,
    windows: Tensor,
    progress: Progress = lambda done, total: None,
    head: Tensor | None = None,
) -> Tensor:
    """The same from hidden states behind the last block, window by window; `head` in place of the model's own."""
    values, tokens = [], iter(windows.split(1))
    with source.shell() as model, with_head(model, head):
        for chunk in stream.chunks:
            for hidden in chunk.split(1):
                window = next(tokens).to(source.device)
                values.append(_nll(finish(model, hidden, window), window))
                progress(len(values), len(windows))
    return torch.cat(values)


def perplexity(nll: Tensor, spec: EvaluationSpec, clusters: np.ndarray | None = None) -> Measurement:
    """Perplexity of per-window NLLs [n], with its standard error by the delta method (none for a single window).

    `clusters`, int64 [n]: the windows' documents, within which they do not count as independent.
    """
    if not torch.isfinite(nll).all():
        bad = int((~torch.isfinite(nll)).nonzero()[0])
        raise EvaluationError(f"{spec.task} ({spec.protocol}): the loss of window {bad} is {nll[bad].item()}")
    values = nll.cpu().numpy().astype(np.float64)
    mean = float(values.mean())
    if mean > math.log(np.finfo(np.float64).max):
        raise EvaluationError(f"{spec.task} ({spec.protocol}): perplexity exp({mean:.4g}) overflows")
    value = math.exp(mean)
    record = Recorder(spec, len(values), clusters)
    stderr = record.stderr(values)
    return record("ppl", "ppl", value, None if stderr is None else value * stderr, values)


def _nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """float64 [batch] from logits [batch, length, vocabulary]; one window at a time bounds the float32 log-softmax."""
    means = [
        F.cross_entropy(row[:-1].float(), ids[1:], reduction="none").double().mean()
        for row, ids in zip(logits, tokens, strict=True)
    ]
    return torch.stack(means)


@dataclass(frozen=True, kw_only=True)
class WindowPerplexity(WindowEvaluation):
    """Perplexity of a text's first windows, each read in one forward."""

    metrics = ("ppl",)

    corpus: Corpus
    separator: str = SEPARATOR

    def preflight(self, context: Context) -> None:
        self.windows(context)

    def windows(self, context: Context) -> Tensor:
        return evaluation_windows(context.tokens(self.corpus), self.spec.length, self.spec.n)

    def measure(self, subject: Subject, report: Report) -> list[Measurement]:
        windows = self.windows(subject.context)
        with subject.quantized() as model:
            return self.measurements(window_nll(model, windows, self.batch, report), subject.context)

    def measurements(self, nll: Tensor, context: Context) -> list[Measurement]:
        return [perplexity(nll, self.spec, self.clusters(context, len(nll)))]

    def clusters(self, context: Context, n: int) -> np.ndarray | None:
        return window_clusters(context.tokenizer(), self.corpus, self.spec.length, n, self.separator)


@dataclass(frozen=True, kw_only=True)
class DecodePerplexity(Evaluation):
    """The same token by token through the cache."""

    metrics = ("ppl",)

    corpus: Corpus

    def preflight(self, context: Context) -> None:
        self._windows(context)

    def _windows(self, context: Context) -> Tensor:
        return evaluation_windows(context.tokens(self.corpus), self.spec.length, self.spec.n)

    def measure(self, subject: Subject, report: Report) -> list[Measurement]:
        from qbench.evaluation.decode import decode_nll  # imports transformers, which a plan does not need

        windows = self._windows(subject.context)
        formats, params = subject.weights.caches(subject.model.config.get_text_config().num_hidden_layers)
        with subject.weights.inside(subject.model, cache=False) as model:
            nll = decode_nll(model, windows, formats, params, self.batch, report)
        clusters = window_clusters(subject.tokenizer, self.corpus, self.spec.length, len(windows))
        return [perplexity(nll, self.spec, clusters)]


def build(options: Mapping[str, Any], source: str) -> tuple[Evaluation, ...]:
    """The evaluations that `conf/eval/perplexity.yaml` describes: one per text. Raises SpecError and AssetError."""
    length = integer("eval.length", options["length"], 2)
    n = None if options["n"] is None else integer("eval.n", options["n"], 1)
    mode = choice("eval.mode", options["mode"], MODES)
    if mode == "decode" and source != "memory":
        remedy = "source=memory: a model that is read block by block decodes no single tokens"
        raise SpecError("eval.mode", mode, remedy)
    kind = WindowPerplexity if mode == "prefill" else DecodePerplexity
    return tuple(
        kind(
            spec=EvaluationSpec(
                evaluator="perplexity",
                version=VERSION,
                task=corpus.name,
                fingerprint=corpus.fingerprint,
                length=length,
                n=n,
                mode=mode,
            ),
            corpus=corpus,
        )
        for corpus in texts(options)
    )


def texts(options: Mapping[str, Any]) -> list[Corpus]:
    """The texts that `eval.corpora`, or in their place `eval.path`, name."""
    if options["path"] is not None:
        path = str(options["path"])
        return [resolve_corpus(Path(path).stem, path, option="eval.path")]
    names = options["corpora"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SpecError("eval.corpora", names, "a list of corpora such as [wikipedia-sample,c4-sample]")
    return [resolve_corpus(name, option="eval.corpora") for name in dict.fromkeys(names)]
