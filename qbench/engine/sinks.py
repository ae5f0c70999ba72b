"""What receives finished blocks: a ledger of what was done, and the decoded weights for a model in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qbench.engine.loop import FinishedBlock


@dataclass
class Ledger:
    """Bits, digest and layer metrics of all finished blocks. Equal digests are equal codes, scales and zero points."""

    weight_bits: int = 0
    weight_count: int = 0
    digests: list[str] = field(default_factory=list)
    metrics: list[tuple[int, str, str, float]] = field(default_factory=list)

    def receive(self, finished: FinishedBlock) -> None:
        for name in sorted(finished.codes):
            codes = finished.codes[name]
            self.weight_bits += codes.storage_bits()
            self.weight_count += codes.codes.numel()
            self.digests.append(f"{finished.index} {name} {codes.sha256()}")
        self.metrics += [(finished.index, *metric) for metric in finished.metrics]

    @property
    def codes_sha256(self) -> str:
        return hashlib.sha256("\n".join(self.digests).encode()).hexdigest()


@dataclass
class Weights:
    """Decoded parameters of finished blocks by their names in the model: what quantization changed, and no more."""

    prefix: str
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def receive(self, finished: FinishedBlock) -> None:
        for name, parameter in finished.block.named_parameters():
            self.tensors[f"{self.prefix}.{finished.index}.{name}"] = parameter.detach()

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[nn.Module]:
        """`model` with these weights, in place; its own come back on leaving."""
        originals = {name: model.get_parameter(name).data for name in self.tensors}
        try:
            for name, value in self.tensors.items():
                model.get_parameter(name).data = value
            yield model
        finally:
            for name, value in originals.items():
                model.get_parameter(name).data = value


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
