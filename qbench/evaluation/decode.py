"""The protocol `window-<length>` token by token, through a cache that holds codes: what a deployment computes.

Slow: one forward per token. It is the reference for the emulation in one forward per window (`qbench.engine.kv`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.errors import EvaluationError, StructureError
from qbench.formats.scheme import CacheFormat
from qbench.models.kv_cache import QuantizedCache, StaticParams
from qbench.structure.blocks import find_blocks
from qbench.structure.online import attached_to_attention

#: Windows per forward where no batch size is given.
BATCH = 16

Progress = Callable[[int, int], None]


@torch.inference_mode()
def decode_nll(
    model: nn.Module,
    windows: Tensor,
    layers: Sequence[CacheFormat | None],
    params: Sequence[StaticParams | None] | None = None,
    batch: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Tensor:
    """Mean NLL (nats) of every token window [n, length] → float64 [n], as `perplexity.window_nll` defines it.

    `layers` are the cache formats of the model's layers in order, `params` the static ones' parameters; `batch` windows
    go through the cache together. StructureError where a format is for a layer that keeps nothing in its cache,
    EvaluationError for windows of fewer than two tokens.
    """
    if windows.shape[1] < 2:
        raise EvaluationError(f"decode: windows of {windows.shape[1]} tokens predict nothing, 2 or more needed")
    count = model.config.get_text_config().num_hidden_layers
    if len(layers) != count:
        raise StructureError(f"decode: cache formats of {len(layers)} layers for a model of {count}")
    rotations = [attached_to_attention(block) for block in find_blocks(model)[1]]
    device = next(model.parameters()).device
    values: list[Tensor] = []
    for tokens in windows.split(batch or BATCH):
        values.append(_decode(model, tokens.to(device), QuantizedCache(layers, params, rotations)))
        progress(sum(map(len, values)), len(windows))
    return torch.cat(values)


def _decode(model: nn.Module, tokens: Tensor, cache: QuantizedCache) -> Tensor:
    """float64 [batch] from windows [batch, length] and an empty cache."""
    losses = []
    for position in range(tokens.shape[1] - 1):
        step = tokens[:, position : position + 1]
        logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
        held = [cache.get_seq_length(index) for index in range(len(cache))]
        if set(held) != {position + 1}:
            # The formats of such layers would silently apply to nothing.
            layer = next(index for index, length in enumerate(held) if length != position + 1)
            raise StructureError(f"decode: layer {layer} holds {held[layer]} tokens after {position + 1}")
        losses.append(F.cross_entropy(logits.float(), tokens[:, position + 1], reduction="none"))
    return torch.stack(losses, dim=1).double().mean(dim=1)
