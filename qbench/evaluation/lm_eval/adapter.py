"""lm-eval's view of a model under test. Importing this module imports lm-eval: only the harness does.

What is asked is lm-eval's (how text becomes tokens, what is cut off, what ends a generation); how it is computed is
`scoring` and `generation`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qbench.errors import EvaluationError
from qbench.evaluation.base import Report, Subject
from qbench.evaluation.lm_eval.generation import generate
from qbench.evaluation.lm_eval.scoring import score

#: Tokens that a generation may have where its task says nothing: HFLM's.
MOST_TOKENS = 256
#: A stop sequence may be tokenized otherwise when generated: so many tokens more are looked at, as HFLM does.
_LOOK_BACK = 2


class SubjectLM(TemplateLM):
    """`subject` for lm-eval: text in, log-likelihoods and greedy continuations out."""

    def __init__(self, subject: Subject, batch: int | None, report: Report) -> None:
        super().__init__()
        self.subject, self.batch, self.report = subject, batch, report
        self.tokenizer = subject.tokenizer
        self.max_length = resolve_max_length(subject.model.config, subject.tokenizer)
        self._encoded: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None else self.tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        if add_special_tokens is None and string in self._encoded:
            return self._encoded[string]
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **special)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._encode_together([request.args for request in requests])
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._encoded = {}

    def _encode_together(self, pairs: Sequence[tuple[str, str]]) -> None:
        """What `_encode_pair` will ask for, in one call of the tokenizer: ten times faster."""
        prefix = self.tokenizer.decode(self.prefix_token_id)
        texts = {text for context, rest in pairs if context for text in (context.rstrip(), context + rest)}
        plain = [text for text in texts if not has_bos_prefix(text, prefix)]
        if plain:
            self._encoded = dict(zip(plain, self.tokenizer(plain, verbose=False)["input_ids"], strict=True))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        # A cache that changes what it holds depends on the whole sequence: nothing is shared then.
        formats, _ = self.subject.weights.caches(self.subject.model.config.get_text_config().num_hidden_layers)
        with self.subject.quantized() as model:
            return score(
                model,
                pairs,
                max_length=self.max_length,
                share=not any(formats),
                batch=self.batch,
                progress=self.report,
            )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        owner: list[int] = []
        for place, request in enumerate(requests):
            for context, continuation in map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            ):
                windows.append((("", ""), context, continuation))
                owner.append(place)
        totals = [0.0] * len(requests)
        for place, (value, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[place] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(place)
        before = 0
        for places in groups.values():
            prompts = [requests[place].args[0] for place in places]

            def report(done: int, total: int, before: int = before) -> None:
                self.report(before + done, len(requests))

            for place, text in zip(places, self._generate(prompts, requests[places[0]].args[1], report), strict=True):
                texts[place] = text
            before += len(places)
        return texts

    def _generate(self, prompts: Sequence[str], wishes: dict, report: Report) -> list[str]:
        """Continuations of prompts that share lm-eval's generation arguments, without what follows a stop sequence."""
        arguments = normalize_gen_kwargs(wishes, MOST_TOKENS)
        if arguments.get("do_sample"):
            raise EvaluationError("lm-eval asks for sampled continuations; here they are greedy")
        most = arguments["max_gen_toks"]
        if most >= self.max_length:
            raise EvaluationError(f"{most} tokens to generate, the model's context is {self.max_length}")
        until = handle_stop_sequences(
            arguments.get("until"), eos=self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        )
        look_back = {term: len(self.tokenizer.encode(term, add_special_tokens=False)) + _LOOK_BACK for term in until}
        ends = self._end_tokens()

        def stopped(tokens: list[int]) -> bool:
            if tokens[-1] in ends:
                return True
            return any(term in self.tokenizer.decode(tokens[-count:]) for term, count in look_back.items() if term)

        encoded = [self._prompt(text)[-(self.max_length - most) :] for text in prompts]
        with self.subject.decoding() as (model, empty_cache):
            found = generate(model, empty_cache, encoded, most, stopped, self.batch, report)
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found]
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _prompt(self, text: str) -> list[int]:
        special = {"add_special_tokens": False} if has_bos_prefix(text, self.tokenizer.bos_token) else {}
        return self.tokenizer.encode(text, **special)

    def _end_tokens(self) -> set[int]:
        """Tokens that end a generation, as the model's checkpoint says."""
        config = getattr(self.subject.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        own = set(ends) if isinstance(ends, (list, tuple)) else {ends}
        return (own | {self.tokenizer.eos_token_id}) - {None}
