"""Rolling perplexity as lm-eval defines it: every token of every document is predicted once, per word and per byte.

Not the protocol `window-<length>`: documents do not run into each other, the first token is predicted too (from the
beginning-of-text token), and the loss is shared out over words and bytes, which do not depend on the tokenizer:

  word_perplexity  exp(-Σ log p / Σ words)
  byte_perplexity  exp(-Σ log p / Σ bytes)
  bits_per_byte    -Σ log p / Σ bytes / ln 2

A document longer than the context is read in windows; each predicts what follows the one before, and the last takes as
much context as there is room for. Standard errors are those of ratios of sums over documents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.calibration.corpora import Corpus
from qbench.calibration.documents import documents, read_rows
from qbench.checks import choice, integer
from qbench.errors import EvaluationError, SpecError
from qbench.evaluation.base import Context, Evaluation, Report, Subject
from qbench.evaluation.perplexity import BATCH_TOKENS, texts
from qbench.evaluation.recorder import Recorder
from qbench.spec import EvaluationSpec, digest
from qbench.store.records import Measurement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Raise when the same documents give another number.
VERSION = 1

#: Context of models whose positions are not bounded, as lm-eval has it.
UNBOUNDED = 2048

DETOKENIZERS = ("none", "wikitext")


def rolling_windows(ids: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], int]]:
    """Windows over `ids`, each (input tokens, number of last tokens to predict); a window's input is at most `length`
    tokens, whose successors are ids.

    The first window starts with `prefix` in front of the text. The following ones predict the next `length` tokens,
    the last the rest, with as many tokens before it as fit.
    """
    padded = [prefix, *ids]
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        yield padded[max(0, end - length) : end + 1], end - start


@torch.inference_mode()
def rolling_nll(
    model: nn.Module,
    documents: Sequence[Sequence[int]],
    prefix: int,
    length: int,
    batch: int | None = None,
    report: Report = lambda done, total: None,
) -> Tensor:
    """Summed negative log-likelihood (nats) of every document of token ids, float64 [documents].

    Windows of equal length share a forward; nothing is padded. Logits are reduced in float32, sums are float64.
    """
    device = next(model.parameters()).device
    windows = [
        (tokens, count, number)
        for number, ids in enumerate(documents)
        for tokens, count in rolling_windows(ids, prefix, length)
    ]
    windows.sort(key=lambda window: -len(window[0]))
    total, done = torch.zeros(len(documents), dtype=torch.float64), 0
    while done < len(windows):
        size = len(windows[done][0])
        most = batch or max(1, BATCH_TOKENS // size)
        together = [window for window in windows[done : done + most] if len(window[0]) == size]
        tokens = torch.tensor([window[0] for window in together], device=device)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        for row, ids, (_, count, number) in zip(logits, tokens, together, strict=True):
            losses = F.cross_entropy(row[-count:].float(), ids[-count:], reduction="none")
            total[number] += losses.double().sum().item()
        done += len(together)
        report(done, len(windows))
    return total


def count_words(text: str) -> int:
    """Pieces between white space, as lm-eval counts them: empty ones at the ends included."""
    return len(re.split(r"\s+", text))


def rolling_perplexity(nll: Tensor, texts: Sequence[str], spec: EvaluationSpec) -> list[Measurement]:
    """The measurements of summed losses [documents] of `texts`. Samples are nats per word or byte of each document
    times the document's share: their mean is the logarithm of the perplexity (for bits per byte, the value)."""
    losses = nll.numpy()
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise EvaluationError(f"{spec.task} ({spec.protocol}): the loss of document {bad[0]} is {losses[bad[0]]}")
    record = Recorder(spec, len(losses))
    words = np.array([count_words(text) for text in texts], dtype=np.float64)
    sizes = np.array([len(text.encode()) for text in texts], dtype=np.float64)
    per_word, word_error, word_samples = _ratio(losses, words)
    per_byte, byte_error, byte_samples = _ratio(losses, sizes)
    if per_word > math.log(np.finfo(np.float64).max):
        raise EvaluationError(f"{spec.task} ({spec.protocol}): perplexity exp({per_word:.4g}) overflows")
    word, byte, bits = math.exp(per_word), math.exp(per_byte), 1 / math.log(2)
    return [
        record("word_perplexity", "ppl", word, word_error and word * word_error, word_samples),
        record("byte_perplexity", "ppl", byte, byte_error and byte * byte_error, byte_samples),
        record("bits_per_byte", "bits", per_byte * bits, byte_error and byte_error * bits, byte_samples * bits),
    ]


def _ratio(losses: np.ndarray, sizes: np.ndarray) -> tuple[float, float | None, np.ndarray]:
    """Σ losses / Σ sizes, its standard error over documents (linearized), and samples whose mean is the ratio."""
    n, value = len(losses), float(losses.sum() / sizes.sum())
    residuals = (losses - value * sizes) / sizes.mean()
    error = float(residuals.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return value, error, losses / sizes.mean()


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What the first token is predicted from: the beginning of a text, or the end of the one before."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids with the special tokens that the tokenizer adds by itself, unless the text begins with one."""
    start = tokenizer.decode(prefix_token(tokenizer))
    special = {"add_special_tokens": False} if start and text.startswith(start) else {}
    return tokenizer(text, verbose=False, **special)["input_ids"]


def detokenizer(name: str) -> Callable[[str], str]:
    """What a document goes through before it is read; words and bytes are counted before. `wikitext` is lm-eval's own
    function, which takes back the spaces around punctuation."""
    if name == "none":
        return lambda text: text
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return lambda text: wikitext_detokenizer({"page": text})


@dataclass(frozen=True, kw_only=True)
class RollingPerplexity(Evaluation):
    """Rolling perplexity of documents."""

    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")

    texts: Callable[[], list[str]] = field(compare=False)
    detokenize: str

    def preflight(self, context: Context) -> None:
        limit = _context(context)
        if self.spec.length is not None and limit is not None and self.spec.length > limit:
            raise SpecError("eval.length", self.spec.length, f"at most {limit}, the context of {context.name}")
        if prefix_token(context.tokenizer()) is None:
            raise SpecError(
                "eval", "rolling", f"a tokenizer that marks where texts begin or end; {context.name} doesn't"
            )
        self._chosen()

    def _chosen(self) -> list[str]:
        found = self.texts()
        if self.spec.n is not None and self.spec.n > len(found):
            raise SpecError("eval.n", self.spec.n, f"1 to {len(found)} (null: all), the documents of {self.spec.task}")
        return found[: self.spec.n]

    def measure(self, subject: Subject, report: Report) -> list[Measurement]:
        chosen, tokenizer = self._chosen(), subject.tokenizer
        change = detokenizer(self.detokenize)
        ids = [encode(tokenizer, change(text)) for text in chosen]
        length = self.spec.length or _context(subject.context) or UNBOUNDED
        with subject.quantized() as model:
            nll = rolling_nll(model, ids, prefix_token(tokenizer), length, self.batch, report)
        return rolling_perplexity(nll, chosen, self.spec)


def _context(context: Context) -> int | None:
    return getattr(context.skeleton.config.get_text_config(), "max_position_embeddings", None)


def build(options: Mapping[str, Any], source: str) -> tuple[Evaluation, ...]:
    """The evaluations that `conf/eval/rolling.yaml` describes: one per text. Raises SpecError and AssetError."""
    length = None if options["length"] is None else integer("eval.length", options["length"], 1)
    n = None if options["n"] is None else integer("eval.n", options["n"], 1)
    detokenize = choice("eval.detokenize", options["detokenize"], DETOKENIZERS)
    return tuple(
        RollingPerplexity(
            spec=EvaluationSpec(
                evaluator="rolling",
                version=VERSION,
                task=corpus.name,
                fingerprint=fingerprint,
                length=length,
                n=n,
                mode="rolling",
                options=(("detokenize", detokenize),),
            ),
            texts=read,
            detokenize=detokenize,
        )
        for corpus, fingerprint, read in _sources(options)
    )


def _sources(options: Mapping[str, Any]) -> Iterator[tuple[Corpus, str, Callable[[], list[str]]]]:
    """Every text with the fingerprint of its documents and a function that reads them: the rows of a `.jsonl` (of
    WikiText, its articles), otherwise the whole text as one."""
    for corpus in texts(options):
        if corpus.path is None or corpus.path.suffix != ".jsonl":
            yield corpus, corpus.fingerprint, lambda corpus=corpus: [corpus.text()]
            continue
        found = documents(read_rows(corpus.path, "eval.path"))
        yield corpus, digest(found), lambda found=found: found
