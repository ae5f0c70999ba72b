"""Needle in context: whether a fact that stands once in a long text is found again through the (quantized) cache.

A text of exactly `length` tokens is made of a stretch of a corpus, a sentence that gives one place's code, put at a
given depth, such sentences of other places anywhere, and the beginning of the answer at the end. It is read in one
forward, which fills the cache; the code is then scored and generated token by token from what the cache holds.

  needle_choice  share of texts whose own code is likelier than every wrong one (summed log-likelihoods)
  needle_exact   share of texts after which the likeliest tokens, one by one, are the code

Choosing blindly scores 1 / codes. All depths of a number share stretch, place and codes, and so form a cluster.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from qbench.calibration.corpora import Corpus
from qbench.checks import integer
from qbench.errors import SpecError
from qbench.evaluation.base import Context, Evaluation, Report, Subject
from qbench.evaluation.greedy import last_only
from qbench.evaluation.perplexity import texts
from qbench.evaluation.recorder import Recorder
from qbench.spec import EvaluationSpec
from qbench.store.records import Measurement

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedTokenizerBase

#: Raise when the same texts give another number.
VERSION = 1

PLACES = (
    *("harbour", "museum", "bakery", "library", "castle", "theatre", "factory", "garden", "station", "market"),
    *("hospital", "chapel", "stadium", "prison", "airport", "school", "brewery", "lighthouse", "observatory", "mill"),
)
WORDS = (
    *("apple", "silver", "window", "mountain", "river", "candle", "winter", "yellow", "pencil", "dragon"),
    *("coffee", "orange", "island", "velvet", "thunder", "marble", "rabbit", "copper", "garlic", "violin"),
    *("purple", "feather", "desert", "bottle", "tiger", "crystal", "lemon", "shadow", "rocket", "honey"),
)
SENTENCE = "\n\nThe secret code of the {place} is {code}.\n\n"
QUESTION = "\n\nRemember: the secret code of the {place} is"


@dataclass(frozen=True)
class Needle:
    """One text: token ids of prompt [length] and codes, of which the first is the right one; `number` tells which
    stretch and place it shares with other depths."""

    prompt: tuple[int, ...]
    codes: tuple[tuple[int, ...], ...]
    depth: float
    number: int


def make_needles(
    tokenizer: PreTrainedTokenizerBase,
    haystack: Tensor,
    length: int,
    depths: tuple[float, ...],
    n: int,
    codes: int,
    facts: int,
    seed: int,
) -> list[Needle]:
    """`n` texts of `length` tokens for every depth, from the tokens of a corpus, int64 [total].

    Prompt and longest code together are `length` tokens. Depth 0 puts the fact at the start, 1 right before the end.
    A code is two words; the first `facts` of `codes` stand in the text, the others nowhere. SpecError where the corpus
    or the length does not hold such a text.
    """
    found = []
    ids = haystack.tolist()

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    start = [tokenizer.bos_token_id] if ids[:1] == [tokenizer.bos_token_id] else []
    for number in range(n):
        # Apart for every text, so that more texts leave the earlier ones as they are.
        generator = random.Random(f"{seed} {number}")
        places = generator.sample(PLACES, facts)
        chosen: list[str] = []
        while len(chosen) < codes:
            pair = " ".join(generator.sample(WORDS, 2))
            if pair not in chosen:
                chosen.append(pair)
        answers = tuple(tuple(encode(f" {code}")) for code in chosen)
        sentences = [encode(SENTENCE.format(place=place, code=code)) for place, code in zip(places, chosen)]
        question = encode(QUESTION.format(place=places[0]))
        room = length - len(start) - sum(map(len, sentences)) - len(question) - max(map(len, answers))
        if room < 2:
            raise SpecError(
                "eval.lengths", length, f"at least {length - room + 2} tokens for {facts} facts and a question"
            )
        if room > len(ids):
            raise SpecError("eval.lengths", length, f"at most {len(ids) + length - room}, what the corpus can fill")
        begin = generator.randint(0, len(ids) - room)
        hay = ids[begin : begin + room]
        others = [(generator.randint(1, room - 1), sentence) for sentence in sentences[1:]]
        for depth in depths:
            prompt, last = list(start), 0
            for at, sentence in sorted([(round(depth * room), sentences[0]), *others]):
                prompt += [*hay[last:at], *sentence]
                last = at
            prompt += [*hay[last:], *question]
            found.append(Needle(prompt=tuple(prompt), codes=answers, depth=depth, number=number))
    return found


@torch.inference_mode()
def find_needle(model: nn.Module, needle: Needle, cache: Cache) -> tuple[bool, bool]:
    """Whether the right code is likelier than all others, and whether it is what greedy decoding gives.

    The prompt goes through an empty cache in one forward; the codes are then decoded together, a token per forward,
    each from its own copy of the cache. Greedy decoding gives the right code if each of its tokens is the likeliest
    after those before it.
    """
    device = next(model.parameters()).device
    prompt = torch.tensor([needle.prompt], device=device)
    logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, **last_only(model)).logits[:, -1]
    rows, longest = len(needle.codes), max(map(len, needle.codes))
    # Shorter codes are filled up with token 0, which nothing that counts is predicted from.
    tokens = torch.tensor([[*code, *[0] * (longest - len(code))] for code in needle.codes], device=device)
    lengths = torch.tensor([len(code) for code in needle.codes], device=device)
    cache.batch_repeat_interleave(rows)
    logits = logits.expand(rows, -1)
    score, likeliest = torch.zeros(rows, dtype=torch.float64, device=device), True
    for place in range(longest):
        own = tokens[:, place : place + 1]
        logp = logits.float().log_softmax(-1)
        score += torch.where(place < lengths, logp.gather(1, own)[:, 0].double(), 0)
        if place < lengths[0]:
            likeliest &= bool(logits[0].argmax() == own[0])
        if place + 1 < longest:
            logits = model(input_ids=own, past_key_values=cache, use_cache=True).logits[:, -1]
    return bool((score[0] > score[1:]).all()), likeliest


def needle_measurements(
    needles: list[Needle], found: list[tuple[bool, bool]], spec: EvaluationSpec
) -> list[Measurement]:
    """Shares over all texts; samples are 0 or 1 in the order of `needles`, clustered by number."""
    clusters = np.array([needle.number for needle in needles], dtype=np.int64)
    record = Recorder(spec, len(needles), clusters)
    choice, exact = np.array(found, dtype=np.float64).T
    return [record.mean("needle_choice", "share", choice), record.mean("needle_exact", "share", exact)]


@dataclass(frozen=True, kw_only=True)
class NeedleInContext(Evaluation):
    """Needles in texts of one length."""

    metrics = ("needle_choice", "needle_exact")

    length_option: ClassVar[str] = "eval.lengths"

    corpus: Corpus
    depths: tuple[float, ...]
    texts: int
    codes: int
    facts: int
    seed: int

    def preflight(self, context: Context) -> None:
        limit = getattr(context.skeleton.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and self.spec.length > limit:
            raise SpecError("eval.lengths", self.spec.length, f"at most {limit}, the context of {context.name}")
        self._needles(context)

    def _needles(self, context: Context) -> list[Needle]:
        haystack, tokenizer = context.tokens(self.corpus), context.tokenizer()
        wanted = (self.spec.length, self.depths, self.texts, self.codes, self.facts, self.seed)
        return make_needles(tokenizer, haystack, *wanted)

    def measure(self, subject: Subject, report: Report) -> list[Measurement]:
        needles = self._needles(subject.context)
        found = []
        with subject.decoding() as (model, new_cache):
            for needle in needles:
                found.append(find_needle(model, needle, new_cache()))
                report(len(found), len(needles))
        return needle_measurements(needles, found, self.spec)


def build(options: Mapping[str, Any], source: str) -> tuple[Evaluation, ...]:
    """The evaluations that `conf/eval/needle.yaml` describes: one per text and length. SpecError, AssetError."""
    lengths = _list("eval.lengths", options["lengths"], lambda value: integer("eval.lengths", value, 2))
    depths = _list("eval.depths", options["depths"], _depth)
    n = integer("eval.n", options["n"], 1)
    codes = integer("eval.codes", options["codes"], 2, 100)
    facts = integer("eval.facts", options["facts"], 1, min(codes, len(PLACES)))
    seed = integer("eval.seed", options["seed"], 0)
    return tuple(
        NeedleInContext(
            spec=EvaluationSpec(
                evaluator="needle",
                version=VERSION,
                task=corpus.name,
                fingerprint=corpus.fingerprint,
                length=length,
                n=n * len(depths),
                mode="needle",
                options=(("codes", codes), ("depths", " ".join(map(str, depths))), ("facts", facts), ("seed", seed)),
            ),
            corpus=corpus,
            depths=depths,
            texts=n,
            codes=codes,
            facts=facts,
            seed=seed,
        )
        for corpus in texts(options)
        for length in lengths
    )


def _list(option: str, values: object, check: Callable[[object], Any]) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        raise SpecError(option, values, "a list with at least one number")
    found = tuple(check(value) for value in values)
    if len(set(found)) < len(found):
        raise SpecError(option, values, "numbers that differ")
    return found


def _depth(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise SpecError("eval.depths", value, "numbers from 0 (start of the text) to 1 (its end)")
    return float(value)
