"""What receives finished blocks: a ledger of what was done, and the decoded weights for a model in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from qbench.engine.loop import FinishedBlock
from qbench.engine.runtime import Runtime, install
from qbench.formats import QParams, QTensor
from qbench.formats.scheme import CacheFormat
from qbench.structure.blocks import find_blocks
from qbench.structure.online import InputTransform, attached, attached_instead


@dataclass
class Ledger:
    """Bits, digest and layer metrics of all finished blocks. Equal digests are equal codes, scales and zero points.

    Linear weights that stay in full precision count at the width of the model's dtype."""

    weight_bits: int = 0
    weight_count: int = 0
    head_bits: int | None = None
    digests: list[str] = field(default_factory=list)
    metrics: list[tuple[int, str, str, float]] = field(default_factory=list)

    def receive(self, finished: FinishedBlock, dtype: torch.dtype) -> None:
        self.weight_bits += finished.unquantized * dtype.itemsize * 8
        self.weight_count += finished.unquantized
        for name in sorted(finished.codes):
            codes = finished.codes[name]
            self.weight_bits += codes.storage_bits()
            self.weight_count += codes.codes.numel()
            self.digests.append(f"{finished.index} {name} {codes.sha256()}")
        self.metrics += [(finished.index, *metric) for metric in finished.metrics]

    def receive_head(self, codes: QTensor) -> None:
        self.head_bits = codes.storage_bits()
        self.digests.append(f"head {codes.sha256()}")

    @property
    def codes_sha256(self) -> str:
        return hashlib.sha256("\n".join(self.digests).encode()).hexdigest()


@dataclass
class Weights:
    """Decoded parameters of finished blocks by their names in the model, what is quantized while each runs, and what
    its inputs go through: what quantization changed, and no more. head: the decoded head, where it is quantized too.
    online: transforms of inputs by block number and weight name."""

    prefix: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    running: dict[int, FinishedBlock] = field(default_factory=dict)
    head: Tensor | None = None
    online: dict[int, dict[str, InputTransform]] = field(default_factory=dict)

    def receive(self, finished: FinishedBlock) -> None:
        for name, parameter in finished.block.named_parameters():
            self.tensors[f"{self.prefix}.{finished.index}.{name}"] = parameter.detach()
        if transforms := attached(finished.block):
            self.online[finished.index] = transforms
        self.receive_running(finished)

    def receive_running(self, finished: FinishedBlock) -> None:
        """Only what is quantized while the block runs."""
        if finished.inputs or finished.cache is not None:
            self.running[finished.index] = replace(finished, codes={}, metrics=())

    def caches(self, count: int) -> tuple[list[CacheFormat | None], list[tuple[QParams, QParams] | None]]:
        """Cache format and, where it is static, scales of keys and values of each of `count` blocks."""
        found = [self.running[index].cache if index in self.running else None for index in range(count)]
        formats = [cache.format if cache is not None else None for cache in found]
        static = [cache if cache is not None and cache.format.static else None for cache in found]
        return formats, [None if c is None else (c.keys.params, c.values.params) for c in static]

    @contextmanager
    def inside(self, model: nn.Module, *, cache: bool = True) -> Iterator[nn.Module]:
        """`model` with these weights and its blocks transforming and quantizing what they should, in place; undone on
        leaving.

        cache=False leaves keys and values alone, for a model that is given a quantized cache of its own.
        """
        originals = {name: model.get_parameter(name).data for name in self.tensors}
        with ExitStack() as stack:
            stack.callback(_assign, model, originals)
            _assign(model, self.tensors)
            stack.enter_context(with_head(model, self.head))
            _, blocks = find_blocks(model)
            for index, transforms in self.online.items():
                stack.enter_context(attached_instead(blocks[index], transforms))
            for index, finished in self.running.items():
                kept = replace(finished, block=blocks[index], cache=finished.cache if cache else None)
                runtime = kept.runtime()
                if isinstance(runtime, Runtime):
                    stack.enter_context(install(blocks[index], runtime))
            yield model


def _assign(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).data = value


@contextmanager
def with_head(model: nn.Module, weight: Tensor | None) -> Iterator[nn.Module]:
    """`model` with another head (None: its own), apart from an embedding that it shared; undone on leaving."""
    if weight is None:
        yield model
        return
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    original, tied = head.weight, config.tie_word_embeddings
    head.weight = nn.Parameter(weight.to(original), requires_grad=False)
    config.tie_word_embeddings = False  # what is saved must not be tied again when it is loaded
    try:
        yield model
    finally:
        head.weight, config.tie_word_embeddings = original, tied


def parameter_bytes(model: nn.Module, prefix: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the embedding, the head (0 where it is the embedding) and everything else that is not a weight of a
    block, at the width of `dtype`; a tied parameter counts once."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    sizes = {"embedding": 0, "head": 0, "blocks": 0, "other": 0}
    for name, parameter in model.named_parameters(remove_duplicate=True):
        if parameter is embedding:
            kind = "embedding"
        elif head is not None and parameter is head.weight:
            kind = "head"
        else:
            kind = "blocks" if name.startswith(f"{prefix}.") else "other"
        sizes[kind] += parameter.numel() * dtype.itemsize
    return sizes
