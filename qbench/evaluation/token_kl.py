"""How far the tokens of a test text are from those that a run was calibrated with, as distributions of single tokens.

No model is asked: the numbers are of the two texts, as the run's windows and a perplexity's windows cut them. With
counts c of the N calibration tokens, a vocabulary of V tokens and p the shares of the test tokens,

    q(t) = (c(t) + alpha) / (N + alpha V)        token_kl = sum over t of p(t) ln(p(t) / q(t))    [nats]

Only q is smoothed (a test token that calibration never saw would make the divergence infinite), so that the divergence
is a mean over test tokens: every window has its share, windows can be compared in pairs, and the standard error is that
over windows (by documents, where these are known). It says nothing of the scatter between draws of calibration windows,
nor that both texts are samples: of two samples of one text the divergence is above 0. Texts are therefore compared at
equal numbers of tokens. `unseen_tokens` is the share of test tokens with c(t) = 0, `token_overlap` that of test tokens
in a run of 16 tokens that a calibration window has too: whether a text is tested on what it was calibrated with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from qbench.errors import SpecError
from qbench.evaluation import literature, perplexity
from qbench.evaluation.base import CalibrationEvaluation, Context, Evaluation, WindowEvaluation
from qbench.evaluation.recorder import Recorder
from qbench.spec import EvaluationSpec
from qbench.store.records import Measurement

#: Raise when the same windows give another number.
VERSION = 1

#: Tokens in a row that two texts do not share by chance.
RUN = 16


def token_distance(test: Tensor, calibration: Tensor, vocabulary: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Per test window, float64 [n] each: the mean over its tokens of ln(p / q), and the share of its tokens that
    calibration has not seen. The means over windows are the divergence and the share of all test tokens.

    test: int64 [n, length]; calibration: int64, any shape; ids are below `vocabulary`.
    """
    tokens = test.cpu().numpy()
    seen = np.bincount(calibration.cpu().numpy().ravel(), minlength=vocabulary)
    counts = np.bincount(tokens.ravel(), minlength=vocabulary)
    smoothed = (seen + alpha) / (seen.sum() + alpha * vocabulary)
    present = counts > 0
    distance = np.zeros(vocabulary)
    distance[present] = np.log(counts[present] / counts.sum()) - np.log(smoothed[present])
    return distance[tokens].mean(1), (seen == 0)[tokens].mean(1)


def shared_runs(test: Tensor, calibration: Tensor, run: int = RUN) -> np.ndarray:
    """Per test window the share of its tokens that are part of `run` tokens in a row that a calibration window has
    too, float64 [n]. test: int64 [n, length]; calibration: int64 [windows, length]."""
    covered = np.zeros(test.shape, dtype=bool)
    if min(test.shape[1], calibration.shape[1]) >= run:
        known = {piece.tobytes() for window in _runs(calibration, run) for piece in window}
        for row, window in zip(covered, _runs(test, run), strict=True):
            for place, piece in enumerate(window):
                if piece.tobytes() in known:
                    row[place : place + run] = True
    return covered.mean(1)


def _runs(windows: Tensor, run: int) -> np.ndarray:
    """All `run` tokens in a row, int64 [n, length - run + 1, run], without a copy."""
    return np.lib.stride_tricks.sliding_window_view(windows.cpu().numpy(), run, axis=1)


@dataclass(frozen=True, kw_only=True)
class TokenDistance(CalibrationEvaluation):
    """Distance of the tokens of a perplexity's windows from the calibration's."""

    metrics = ("token_kl", "unseen_tokens", "token_overlap")

    of: WindowEvaluation
    alpha: float

    def preflight(self, context: Context) -> None:
        if context.calibration() is None:
            raise SpecError("eval", "token_kl", f"a run that is calibrated; {context.pipeline} looks at no text")
        self.of.windows(context)

    def of_texts(self, context: Context) -> list[Measurement]:
        windows = self.of.windows(context)
        calibration = context.calibration()
        vocabulary = context.skeleton.config.get_text_config().vocab_size
        distance, unseen = token_distance(windows, calibration, vocabulary, self.alpha)
        record = Recorder(self.spec, len(windows), self.of.clusters(context, len(windows)))
        return [
            record.mean("token_kl", "nats", distance),
            record.mean("unseen_tokens", "share", unseen),
            record.mean("token_overlap", "share", shared_runs(windows, calibration)),
        ]


def build(options: Mapping[str, Any], source: str) -> tuple[Evaluation, ...]:
    """The evaluations that `conf/eval/token_kl.yaml` describes: one per text. Raises SpecError and AssetError."""
    alpha = options["alpha"]
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise SpecError("eval.alpha", alpha, "a number > 0, added to the count of every token of the vocabulary")
    measured = literature if options["definition"] is not None else perplexity
    found = measured.build({**options, "mode": "prefill"}, source)
    return tuple(TokenDistance(spec=_spec(each.spec, float(alpha)), of=each, alpha=float(alpha)) for each in found)


def _spec(of: EvaluationSpec, alpha: float) -> EvaluationSpec:
    return EvaluationSpec(
        evaluator="token_kl",
        version=VERSION,
        task=of.task,
        fingerprint=of.fingerprint,
        length=of.length,
        n=of.n,
        mode="unigram",
        options=tuple(sorted((*of.options, ("alpha", alpha)))),
    )
