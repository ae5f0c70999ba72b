"""Fidelity: how far a quantized model's next-token distributions are from those of full precision.

Perplexity looks at the probability of one token; a model may lose on some what it gains on others and show nothing.
These measures look at the whole distribution, at every position of the windows of a text:

  kl_*            Kullback-Leibler divergence KL(full ‖ quantized) in nats: mean, median, tails, maximum
  top1_agreement  share of positions at which both prefer the same token
  rms_dp, mean_dp root mean square and mean of the change of the true token's probability, in percentage points, as
                  llama.cpp's `perplexity` tool defines them
  nll_difference  mean change of the true token's negative log-likelihood: the logarithm of the ratio of perplexities

Full precision against itself gives exactly 0 (agreement: exactly 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbench.calibration.corpora import Corpus
from qbench.calibration.documents import window_clusters
from qbench.calibration.samplers import evaluation_windows
from qbench.checks import integer
from qbench.errors import EvaluationError, SpecError
from qbench.evaluation.base import Context, Evaluation, Report, Subject
from qbench.evaluation.greedy import continuations, last_only
from qbench.evaluation.logit_cache import LIMIT_BYTES, TensorCache, cache_key, full_precision_cache
from qbench.evaluation.perplexity import BATCH_TOKENS, texts
from qbench.evaluation.recorder import Recorder
from qbench.spec import EvaluationSpec
from qbench.store.records import Measurement
from qbench.structure.blocks import find_blocks, finish, output_of

#: Raise when the same windows give another number.
VERSION = 1

#: Positions whose distributions are compared at once: few enough for a processor's cache.
ROWS = 64

#: Logarithm of the smallest probability whose terms float32 holds with room to spare.
SMALLEST = -80.0

QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999}


@dataclass(frozen=True)
class TokenFidelity:
    """Per predicted token, float64 [windows, length - 1]: divergence in nats, agreement 0 or 1, change of the true
    token's probability, and of its negative log-likelihood in nats."""

    kl: Tensor
    agrees: Tensor
    dp: Tensor
    dnll: Tensor


@torch.inference_mode()
def compare_logits(full: Tensor, quantized: Tensor, targets: Tensor) -> TokenFidelity:
    """Fidelity [tokens] of logits [tokens, vocabulary] against those of full precision, for true tokens [tokens]."""
    pieces = zip(full.split(ROWS), quantized.split(ROWS), targets.split(ROWS), strict=True)
    parts = [_compare(*piece) for piece in pieces]
    return TokenFidelity(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TokenFidelity)))


def _compare(full: Tensor, quantized: Tensor, targets: Tensor) -> TokenFidelity:
    logp, logq = full.float().log_softmax(-1), quantized.float().log_softmax(-1)
    index = targets[:, None]
    true_p, true_q = logp.gather(1, index)[:, 0], logq.gather(1, index)[:, 0]
    # Both distributions sum to 1, so KL = Σ p·d = Σ (p·d + q - p) with d = log p - log q, whose terms are never
    # negative: p·(d + expm1(-d)), about p·d²/2 near d = 0. Σ p·d itself would cancel: it is lost in rounding where
    # models are nearly the same.
    d = logp - logq
    if logp.min() > SMALLEST:
        kl = d.neg().expm1_().add_(d).mul_(logp.exp()).sum(-1)
    else:  # where p is 0 in float32, what is left of the term is q
        p, q = logp.double().exp(), logq.double().exp()
        near = d.abs() < 0.5
        kl = torch.where(near, p * (d + torch.expm1(-d)), torch.where(p > 0, p * d, 0) + (q - p)).sum(-1)
    return TokenFidelity(
        kl=kl.double().clamp_min_(0).cpu(),
        agrees=(full.argmax(-1) == quantized.argmax(-1)).double().cpu(),
        dp=(true_q.double().exp() - true_p.double().exp()).cpu(),
        dnll=(true_p.double() - true_q.double()).cpu(),
    )


@torch.inference_mode()
def last_hidden(model: nn.Module, tokens: Tensor) -> Tensor:
    """Hidden states [batch, length, features] that leave the last block in the model's own forward."""
    seen: list[Tensor] = []
    block = find_blocks(model)[1][-1]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output_of(output)))
    try:
        model(input_ids=tokens, use_cache=False, **last_only(model))
    finally:
        handle.remove()
    return seen[0]


def window_fidelity(
    subject: Subject, windows: Tensor, cache: TensorCache, batch: int | None = None, report: Report = lambda d, t: None
) -> TokenFidelity:
    """Fidelity of the subject on token windows [n, length], against its own checkpoint in full precision.

    Both models go through the same forwards of `batch` windows in turn; what full precision gives comes from `cache`
    if it was computed before.
    """
    found: list[TokenFidelity] = []
    done = 0
    for tokens, full, quantized in _logits(subject, windows, cache, batch or max(1, BATCH_TOKENS // windows.shape[1])):
        for ids, row, other in zip(tokens, full, quantized, strict=True):
            found.append(compare_logits(row[:-1], other[:-1], ids[1:]))
        done += len(tokens)
        report(done, len(windows))
    return TokenFidelity(*(torch.stack([getattr(one, f.name) for one in found]) for f in fields(TokenFidelity)))


@torch.inference_mode()
def _logits(
    subject: Subject, windows: Tensor, cache: TensorCache, batch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens [batch, length] and logits [batch, length, vocabulary] of full precision and of the quantized model."""
    device = next(subject.model.parameters()).device
    for chunk in windows.split(batch):
        tokens = chunk.to(device)
        model = subject.full_precision()
        key = cache_key(subject.full_precision_key, chunk, device, "hidden")
        hidden = cache.get(key, lambda model=model, tokens=tokens: last_hidden(model, tokens)).to(device)
        full = finish(model, hidden, tokens)
        with subject.quantized() as model:
            quantized = model(input_ids=tokens, use_cache=False).logits
        yield tokens, full, quantized


def fidelity(tokens: TokenFidelity, spec: EvaluationSpec, clusters: np.ndarray | None = None) -> list[Measurement]:
    """The measurements of per-token values, with standard errors over windows or their documents (`clusters` [n]).

    `samples` are per window: means of what is averaged, for `rms_dp` the mean square. EvaluationError where a model's
    output is no distribution.
    """
    for name in ("kl", "dp", "dnll"):
        bad = (~torch.isfinite(getattr(tokens, name))).nonzero()
        if len(bad):
            window, position = bad[0].tolist()
            value = getattr(tokens, name)[window, position].item()
            raise EvaluationError(
                f"{spec.task} ({spec.protocol}): {name} at token {position} of window {window} is {value}"
            )
    kl, dp = tokens.kl.numpy(), 100 * tokens.dp.numpy()
    squares = (dp**2).mean(1)
    rms = math.sqrt(squares.mean())
    record = Recorder(spec, len(kl), clusters)
    rms_error = record.stderr(squares)
    if rms_error:  # d√x = dx / 2√x; no spread is none of the root either
        rms_error /= 2 * rms
    return [
        record.mean("kl_mean", "nats", kl.mean(1)),
        *(record.quantile(name, "nats", kl, share) for name, share in QUANTILES.items()),
        record("kl_max", "nats", float(kl.max())),
        record.mean("top1_agreement", "share", tokens.agrees.numpy().mean(1)),
        record("rms_dp", "%", rms, rms_error, squares),
        record.mean("mean_dp", "%", dp.mean(1)),
        record.mean("nll_difference", "nats", tokens.dnll.numpy().mean(1)),
    ]


@dataclass(frozen=True, kw_only=True)
class WindowFidelity(Evaluation):
    """Fidelity on a text's first windows."""

    metrics = ("kl_mean", *QUANTILES, "kl_max", "top1_agreement", "rms_dp", "mean_dp", "nll_difference")

    corpus: Corpus
    cache_bytes: int = field(default=LIMIT_BYTES, compare=False)

    def preflight(self, context: Context) -> None:
        self._windows(context)

    def _windows(self, context: Context) -> Tensor:
        return evaluation_windows(context.tokens(self.corpus), self.spec.length, self.spec.n)

    def measure(self, subject: Subject, report: Report) -> list[Measurement]:
        windows = self._windows(subject.context)
        cache = full_precision_cache(subject.cache_folder, self.cache_bytes)
        clusters = window_clusters(subject.tokenizer, self.corpus, self.spec.length, len(windows))
        return fidelity(window_fidelity(subject, windows, cache, self.batch, report), self.spec, clusters)


def build(options: Mapping[str, Any], source: str) -> tuple[Evaluation, ...]:
    """The evaluations that `conf/eval/fidelity.yaml` describes: distributions and greedy continuations of every text.

    Raises SpecError and AssetError.
    """
    length = integer("eval.length", options["length"], 2)
    n = None if options["n"] is None else integer("eval.n", options["n"], 1)
    cache_bytes = _gigabytes(options["cache_gb"])
    found: list[Evaluation] = []
    for corpus in texts(options):
        spec = EvaluationSpec(
            evaluator="fidelity",
            version=VERSION,
            task=corpus.name,
            fingerprint=corpus.fingerprint,
            length=length,
            n=n,
            mode="kl",
        )
        found.append(WindowFidelity(spec=spec, corpus=corpus, cache_bytes=cache_bytes))
        if options["greedy"] is not None:
            found.append(continuations(options["greedy"], corpus, length, cache_bytes))
    return tuple(found)


def _gigabytes(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise SpecError("eval.cache_gb", value, "a size in gigabytes, 0 or more")
    return int(value * 1e9)
