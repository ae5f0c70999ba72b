"""Log-likelihoods of continuations: what every multiple-choice task asks of a model. Tensors and token ids only.

An input is context + continuation without its last token, as in lm-eval; from the left at most `max_length` tokens of
it are read. Three savings, exact up to the rounding of differently shaped matrix products: inputs that are equal are
read once (all one-token continuations of a context), logits are computed only where a continuation is predicted, and
neighbours that begin alike (the choices of a question) share one forward over what they have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.errors import EvaluationError

#: Tokens per forward where no batch size is given.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
#: A common beginning shorter than this is not worth a forward of its own.
_WORTH_SHARING = 8
#: Common beginnings go through one forward as long as the shortest: up to so many tokens apart, longer ones relatively.
_SLACK_TOKENS, _SLACK = 8, 1.15

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of context and continuation, neither empty."""


@dataclass
class _Input:
    """Token ids that are read, and which continuations are predicted by their end."""

    tokens: tuple[int, ...]
    asked: list[tuple[int, tuple[int, ...]]]

    @property
    def first(self) -> int:
        """The earliest position whose logits are wanted."""
        return len(self.tokens) - max(len(wanted) for _, wanted in self.asked)


@dataclass
class _Family:
    """Inputs whose first `shared` tokens are the same."""

    members: list[_Input]
    shared: int

    @property
    def rest(self) -> int:
        """Tokens of the longest member behind the shared ones."""
        return max(len(each.tokens) for each in self.members) - self.shared

    @property
    def kind(self) -> int:
        """Families of one kind share about equally many tokens; 0: none."""
        turn = _SLACK_TOKENS / (_SLACK - 1)
        if self.shared <= turn:
            return self.shared // _SLACK_TOKENS
        return int(turn / _SLACK_TOKENS + math.log(self.shared / turn, _SLACK))


@torch.inference_mode()
def score(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    share: bool = False,
    batch: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, bool]]:
    """For every pair the sum of its continuation's log-probabilities (nats, float32 log-softmax), and whether greedy
    decoding would give this continuation.

    `share` allows forwards that go on from a cache of common tokens: right unless the model's cache changes what it
    holds. `batch` inputs go through one forward, or as many as make up a fixed number of tokens. EvaluationError for
    an empty context or a continuation that is empty or longer than `max_length`.
    """
    inputs = _inputs(pairs, max_length)
    device = next(model.parameters()).device
    budget = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
    families = _families(inputs, budget) if share and can_share(model) else [_Family([each], 0) for each in inputs]
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    done = 0
    for together in _batches(families, budget, batch):
        for each, logits in _forward(model, together, device):
            for place, wanted in each.asked:
                found[place] = _read(logits, torch.tensor(wanted, device=device))
                done += 1
        progress(done, len(pairs))
    return found


def can_share(model: nn.Module) -> bool:
    """Whether a forward can go on from a cache of other tokens' keys and values: not with recurrent states."""
    return not getattr(model, "_is_stateful", False) and "past_key_values" in signature(model.forward).parameters


def _inputs(pairs: Sequence[Pair], max_length: int) -> list[_Input]:
    """Distinct inputs in order of their first appearance."""
    found: dict[tuple[int, ...], _Input] = {}
    for place, (context, continuation) in enumerate(pairs):
        if not context or not continuation or len(continuation) > max_length:
            sizes = f"{len(context)} tokens of context, {len(continuation)} of continuation"
            raise EvaluationError(f"request {place}: {sizes}; 1 or more and 1 to {max_length} needed")
        tokens = (*context, *continuation)[-(max_length + 1) : -1]
        found.setdefault(tokens, _Input(tokens, [])).asked.append((place, tuple(continuation)))
    return list(found.values())


def _families(inputs: Iterable[_Input], budget: int) -> list[_Family]:
    """Neighbours put together for as long as that saves tokens."""
    families: list[_Family] = []
    for each in inputs:
        if families:
            last = families[-1]
            bound = last.shared if len(last.members) > 1 else last.members[0].first
            shared = min(_common(last.members[0].tokens, each.tokens), each.first, bound)
            # Together: `shared` once. Apart: what the family shares now, and all of this one.
            before = (len(last.members) - 1) * last.shared
            longest = max(last.rest + last.shared, len(each.tokens)) - shared
            fits = (len(last.members) + 1) * longest <= budget
            if shared >= _WORTH_SHARING and len(last.members) * shared > before and fits:
                last.members.append(each)
                last.shared = shared
                continue
        families.append(_Family([each], 0))
    return families


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two inputs begin alike with."""
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count


def _batches(families: Sequence[_Family], budget: int, batch: int | None) -> Iterable[list[_Family]]:
    """Families of about the same lengths, longest first: too little memory shows at once, and the remaining time is
    not estimated too low."""
    together: list[_Family] = []
    for family in sorted(families, key=lambda each: (-each.kind, -each.rest)):
        if together and not _fits([*together, family], budget, batch):
            yield together
            together = []
        together.append(family)
    if together:
        yield together


def _fits(families: list[_Family], budget: int, batch: int | None) -> bool:
    if families[0].kind != families[-1].kind:
        return False
    rows = sum(len(each.members) for each in families)
    if batch is not None:
        return rows <= batch
    shared = min(each.shared for each in families)
    longest = max(each.rest + each.shared for each in families) - shared
    return max(rows * longest, len(families) * shared) <= budget


def _forward(model: nn.Module, families: list[_Family], device: torch.device) -> Iterable[tuple[_Input, Tensor]]:
    """Every input with its logits [positions, vocabulary] from its first wanted position to its end.

    Padding is on the right, where no token of a causal model sees it: no mask is needed.
    """
    members = [each for family in families for each in family.members]
    shared = min(family.shared for family in families)
    past = {"use_cache": False}
    if shared:
        owner = [place for place, family in enumerate(families) for _ in family.members]
        past = {"use_cache": True, "past_key_values": _prefix_cache(model, families, shared, owner, device)}
    rest = [each.tokens[shared:] for each in members]
    longest = max(map(len, rest))
    ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in rest], device=device)
    start = min(each.first for each in members) - shared
    if "logits_to_keep" in signature(model.forward).parameters:
        past["logits_to_keep"] = torch.arange(start, longest, device=device)
        logits = model(input_ids=ids, **past).logits
    else:
        logits = model(input_ids=ids, **past).logits[:, start:]
    for each, row in zip(members, logits, strict=True):
        yield each, row[each.first - shared - start : len(each.tokens) - shared - start]


def _prefix_cache(
    model: nn.Module, families: list[_Family], shared: int, owner: list[int], device: torch.device
) -> object:
    """Keys and values of every family's first `shared` tokens, once per member."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.tensor([family.members[0].tokens[:shared] for family in families], device=device)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    model(input_ids=ids, past_key_values=cache, use_cache=True, **keep)
    cache.reorder_cache(torch.tensor(owner, device=device))
    return cache


def _read(logits: Tensor, wanted: Tensor) -> tuple[float, bool]:
    """Log-probability of the tokens `wanted` [k] from the last k rows of `logits`, and whether each is the argmax."""
    probabilities = F.log_softmax(logits[-len(wanted) :].float(), dim=-1)
    chosen = probabilities.gather(1, wanted[:, None])
    return float(chosen.sum()), bool((probabilities.argmax(dim=-1) == wanted).all())
