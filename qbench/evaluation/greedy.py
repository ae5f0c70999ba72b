"""Greedy continuations: where a quantized model leaves the path of full precision, and whether it falls into loops.

Both models continue the same prompts, token by token through a key/value cache (the quantized one where the scheme
has one), always taking the likeliest token, for a fixed number of tokens: an end-of-text token does not stop them, so
that all continuations have the same length.

  greedy_divergence   number of tokens until the first difference, at most the continuation's length (no difference)
  greedy_agreement    share of positions with the same token
  greedy_repetition   share of 4-grams of the continuation that occurred in it before
  greedy_distinct     share of distinct tokens
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qbench.calibration.corpora import Corpus
from qbench.calibration.documents import window_clusters
from qbench.calibration.samplers import evaluation_windows
from qbench.checks import integer
from qbench.errors import SpecError
from qbench.evaluation.base import Context, Evaluation, Report, Subject
from qbench.evaluation.logit_cache import LIMIT_BYTES, cache_key, full_precision_cache
from qbench.evaluation.recorder import Recorder
from qbench.spec import EvaluationSpec
from qbench.store.records import Measurement

if TYPE_CHECKING:
    from transformers import Cache

#: Raise when the same prompts give another number.
VERSION = 1

#: Prompts continued together where no batch size is given.
BATCH = 16

#: Length of the word sequences whose repetition is counted.
NGRAM = 4


def last_only(model: nn.Module) -> dict[str, int]:
    """Keeps a forward from computing logits that nobody reads, where the model can be told so."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@torch.inference_mode()
def continue_greedily(
    model: nn.Module, prompts: Tensor, count: int, cache: Cache, report: Callable[[int], None] = lambda done: None
) -> Tensor:
    """The `count` likeliest tokens, int64 [batch, count], after prompts [batch, length], through an empty cache."""
    step, found = prompts.to(next(model.parameters()).device), []
    only_last = last_only(model)
    for place in range(count):
        logits = model(input_ids=step, past_key_values=cache, use_cache=True, **only_last).logits
        step = logits[:, -1:].argmax(-1)
        found.append(step)
        report(place + 1)
    return torch.cat(found, dim=1).cpu()


def first_divergence(one: Tensor, other: Tensor) -> Tensor:
    """Number of equal tokens before the first difference, float64 [batch], of tokens [batch, count] each."""
    return (one == other).cumprod(1).sum(1).double()


def repetition(tokens: Tensor, size: int = NGRAM) -> Tensor:
    """Share of `size`-grams that occurred before in their row, float64 [batch], of tokens [batch, count]."""
    grams = tokens.unfold(1, size, 1).tolist()
    return torch.tensor([1 - len(set(map(tuple, row))) / len(row) for row in grams], dtype=torch.float64)


def degeneration(
    full: Tensor, quantized: Tensor, spec: EvaluationSpec, clusters: np.ndarray | None = None
) -> list[Measurement]:
    """Measurements of continuations [prompts, count] against those of full precision; samples are per prompt, which
    `clusters` [prompts] says the document of."""
    record = Recorder(spec, len(full), clusters)
    divergence = first_divergence(full, quantized).numpy()
    return [
        record.mean("greedy_divergence", "tokens", divergence),
        record.quantile("greedy_divergence_median", "tokens", divergence[:, None], 0.5),
        record.mean("greedy_agreement", "share", (full == quantized).double().mean(1).numpy()),
        record.mean("greedy_repetition", "share", repetition(quantized).numpy()),
        record.mean("greedy_distinct", "share", 1 - repetition(quantized, 1).numpy()),
    ]


@dataclass(frozen=True, kw_only=True)
class Continuations(Evaluation):
    """Greedy continuations of the first tokens of a text's windows of `stride` tokens."""

    metrics = (
        *("greedy_divergence", "greedy_divergence_median", "greedy_agreement"),
        *("greedy_repetition", "greedy_distinct"),
    )

    corpus: Corpus
    prompt: int
    tokens: int
    stride: int
    cache_bytes: int = field(default=LIMIT_BYTES, compare=False)

    def preflight(self, context: Context) -> None:
        self._prompts(context)

    def _prompts(self, context: Context) -> Tensor:
        return evaluation_windows(context.tokens(self.corpus), self.stride, self.spec.n)[:, : self.prompt]

    def measure(self, subject: Subject, report: Report) -> list[Measurement]:
        prompts = self._prompts(subject.context)
        cache = full_precision_cache(subject.cache_folder, self.cache_bytes)
        device = next(subject.model.parameters()).device
        total = 2 * len(prompts) * self.tokens
        full, quantized = [], []
        for place, chunk in enumerate(prompts.split(self.batch or BATCH)):
            before = 2 * place * (self.batch or BATCH) * self.tokens
            key = cache_key(subject.full_precision_key, chunk, device, "greedy", VERSION, self.tokens)

            def told(done: int, before: int = before, size: int = len(chunk)) -> None:
                report(before + done * size, total)

            full.append(cache.get(key, lambda chunk=chunk, told=told: _full(subject, chunk, self.tokens, told)))
            with subject.decoding() as (model, new_cache):
                quantized.append(
                    continue_greedily(
                        model, chunk, self.tokens, new_cache(), lambda done, told=told: told(self.tokens + done)
                    )
                )
        clusters = window_clusters(subject.tokenizer, self.corpus, self.stride, len(prompts))
        return degeneration(torch.cat(full), torch.cat(quantized), self.spec, clusters)


def _full(subject: Subject, prompts: Tensor, count: int, report: Callable[[int], None]) -> Tensor:
    from transformers import DynamicCache

    model = subject.full_precision()
    return continue_greedily(model, prompts, count, DynamicCache(config=model.config), report)


def continuations(options: Mapping[str, Any], corpus: Corpus, stride: int, cache_bytes: int) -> Continuations:
    """The evaluation that `eval.greedy` describes; prompts begin every `stride` tokens. Raises SpecError."""
    n = integer("eval.greedy.n", options["n"], 1)
    prompt = integer("eval.greedy.prompt", options["prompt"], 1)
    tokens = integer("eval.greedy.tokens", options["tokens"], NGRAM)
    if prompt > stride:
        raise SpecError("eval.greedy.prompt", prompt, f"at most eval.length={stride}, from which prompts are taken")
    spec = EvaluationSpec(
        evaluator="fidelity",
        version=VERSION,
        task=corpus.name,
        fingerprint=corpus.fingerprint,
        length=prompt + tokens,
        n=n,
        mode="greedy",
        options=(("prompt", prompt), ("stride", stride)),
    )
    return Continuations(spec=spec, corpus=corpus, prompt=prompt, tokens=tokens, stride=stride, cache_bytes=cache_bytes)
