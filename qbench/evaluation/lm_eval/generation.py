"""Greedy continuations token by token through the (quantized) cache. Tensors and token ids only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from transformers import Cache

#: Tokens of prompts that are decoded together where no batch size is given.
BATCH_TOKENS = 4096


@torch.inference_mode()
def generate(
    model: nn.Module,
    empty_cache: Callable[[], Cache],
    prompts: Sequence[Sequence[int]],
    most: int,
    stopped: Callable[[list[int]], bool],
    batch: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """The greedy continuation of every prompt: `most` tokens, or up to and with the one after which `stopped(tokens)`.

    Only prompts of equal length are decoded together, because what a quantized cache holds would depend on padding.
    """
    found: list[list[int]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    done = 0
    for places in _batches(prompts, batch):
        ids = torch.tensor([list(prompts[place]) for place in places], device=device)
        cache = empty_cache()
        while True:
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
            chosen = logits.float().argmax(dim=-1)
            for place, token in zip(places, chosen.tolist(), strict=True):
                found[place].append(token)
            going = [row for row, place in enumerate(places) if len(found[place]) < most and not stopped(found[place])]
            if len(going) < len(places):
                done += len(places) - len(going)
                progress(done, len(prompts))
                if not going:
                    break
                rows = torch.tensor(going, device=device)
                cache.reorder_cache(rows)
                places, chosen = [places[row] for row in going], chosen[rows]
            ids = chosen[:, None]
    return found


def _batches(prompts: Sequence[Sequence[int]], batch: int | None) -> Iterable[list[int]]:
    """Indices of prompts of equal length, the longest first."""
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(place)
    for length in sorted(by_length, reverse=True):
        size = batch or max(1, BATCH_TOKENS // length)
        for start in range(0, len(by_length[length]), size):
            yield by_length[length][start : start + size]
