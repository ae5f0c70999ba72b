"""Perplexity under the protocol `window-<length>`: non-overlapping windows, remainder dropped, no overlap of context.

The mean negative log-likelihood of the length - 1 predicted tokens of every window, from a float32 log-softmax; the
perplexity is exp of the mean over windows. This is the protocol of the GPTQ papers, not lm-eval's rolling one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.engine.sinks import with_head
from qbench.engine.source import Source
from qbench.engine.streams import Stream
from qbench.errors import EvaluationError
from qbench.spec import EvaluationSpec
from qbench.store.records import Measurement
from qbench.structure.blocks import finish

#: Raise when the same windows give another number.
VERSION = 1

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


def perplexity(nll: Tensor, spec: EvaluationSpec) -> Measurement:
    """Perplexity of per-window NLLs [n], with its standard error by the delta method (none for a single window)."""
    if not torch.isfinite(nll).all():
        bad = int((~torch.isfinite(nll)).nonzero()[0])
        raise EvaluationError(f"{spec.task} ({spec.protocol}): the loss of window {bad} is {nll[bad].item()}")
    values = nll.cpu().numpy().astype(np.float64)
    mean = float(values.mean())
    if mean > math.log(np.finfo(np.float64).max):
        raise EvaluationError(f"{spec.task} ({spec.protocol}): perplexity exp({mean:.4g}) overflows")
    value = math.exp(mean)
    stderr = value * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Measurement(
        evaluator=spec.evaluator,
        protocol=spec.protocol,
        task=spec.task,
        name="ppl",
        value=value,
        stderr=stderr,
        n=len(values),
        unit="ppl",
        spec_key=spec.key(),
        samples=values,
    )


def _nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """float64 [batch] from logits [batch, length, vocabulary]; one window at a time bounds the float32 log-softmax."""
    means = [
        F.cross_entropy(row[:-1].float(), ids[1:], reduction="none").double().mean()
        for row, ids in zip(logits, tokens, strict=True)
    ]
    return torch.stack(means)
