"""Where blocks come from: a model in memory or a checkpoint on disk. What follows cannot tell them apart."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qbench.errors import AssetError, StructureError
from qbench.structure.blocks import find_blocks, use_single_experts
from qbench.structure.online import attached, attached_to_attention


class Source(Protocol):
    """A model as embeddings, blocks, and what comes after the blocks.

    `model` is the whole architecture. Its blocks may be on the meta device; everything else holds weights only
    inside `shell()`, where the model's own forward can embed tokens and turn hidden states into logits.
    """

    model: nn.Module
    prefix: str
    device: torch.device
    dtype: torch.dtype
    resident: bool
    """Whether what lies outside the blocks always holds weights."""
    loadable: bool
    """Whether the model's own class can load the weights: no transform while it runs, no other modules."""
    metrics: tuple[tuple[int, str, str, float], ...]
    """What was found out while the source was made: (block, module, name, value)."""

    @property
    def count(self) -> int: ...

    def shell(self) -> object: ...

    def block(self, index: int) -> nn.Module: ...


class MemorySource:
    """A model that is loaded already; it is never changed: every block is handed out as a copy.

    It computes its experts one by one from the start, so that it gives the same numbers before and after a pass.
    """

    resident = loadable = True
    metrics = ()

    def __init__(self, model: nn.Module) -> None:
        use_single_experts(model)
        self.model = model
        self.prefix, self._blocks = find_blocks(model)
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype

    @property
    def count(self) -> int:
        return len(self._blocks)

    @contextmanager
    def shell(self) -> Iterator[nn.Module]:
        yield self.model

    def block(self, index: int) -> nn.Module:
        return copy.deepcopy(self._blocks[index]).requires_grad_(False)


class StreamSource:
    """A safetensors checkpoint read block by block, with at most one block, or the shell, in memory.

    `skeleton` is the architecture with parameters on the meta device and real non-persistent buffers. Raises
    StructureError where the checkpoint's tensor names are not the model's own (checkpoints that transformers
    rewrites while loading, such as merged experts): `source=memory` loads those.
    """

    resident, loadable = False, True
    metrics = ()

    def __init__(self, folder: Path, skeleton: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.dtype, self.device = skeleton, dtype, device
        self.prefix, self._blocks = find_blocks(skeleton)
        for module in skeleton.modules():  # such as rotary frequencies, which no checkpoint holds
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        self.tensors = Checkpoint(folder)
        wanted = {name for name, _ in skeleton.named_parameters()}
        missing = sorted(wanted - self.tensors.names - set(_tied(skeleton)))
        if missing:
            raise StructureError(
                f"source=stream: {folder.name} has no tensor {missing[0]} ({len(missing)} missing); its names are not "
                "the model's, use source=memory"
            )

    @property
    def count(self) -> int:
        return len(self._blocks)

    @contextmanager
    def shell(self) -> Iterator[nn.Module]:
        outside = [name for name, _ in self.model.named_parameters() if not name.startswith(f"{self.prefix}.")]
        self._assign(self.model, {name: name for name in outside if name in self.tensors.names})
        self.model.tie_weights()
        try:
            yield self.model
        finally:
            for name in outside:
                _replace(self.model, name, torch.empty_like(self.model.get_parameter(name), device="meta"))
            self.model.tie_weights()

    def block(self, index: int) -> nn.Module:
        block = copy.deepcopy(self._blocks[index])
        self._assign(block, {name: f"{self.prefix}.{index}.{name}" for name, _ in block.named_parameters()})
        for name, _ in block.named_buffers():
            stored = f"{self.prefix}.{index}.{name}"
            if stored in self.tensors.names:
                block.get_buffer(name).copy_(self.tensors.read(stored))
        return block.to(self.device)

    def _assign(self, module: nn.Module, names: Mapping[str, str]) -> None:
        for name, stored in names.items():
            _replace(module, name, self.tensors.read(stored).to(device=self.device, dtype=self.dtype))


def signature_of(block: nn.Module) -> tuple:
    """Equal for blocks of one shape: names and shapes of parameters, and which inputs are transformed."""
    online = (*sorted(attached(block)), attached_to_attention(block) is not None)
    return (type(block), online, *((name, tuple(p.shape)) for name, p in block.named_parameters()))


class Checkpoint:
    """Tensors of a directory of safetensors files by name; one is read at a time."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.is_file():
            where: dict[str, str] = json.loads(index.read_text())["weight_map"]
            self._files = {name: folder / file for name, file in where.items()}
        elif single.is_file():
            with safe_open(single, framework="pt") as tensors:
                self._files = dict.fromkeys(tensors.keys(), single)
        else:
            raise AssetError(f"source=stream: no safetensors weights in {folder}; use source=memory")

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """A copy of one tensor; the file is closed again, so that its pages don't stay in memory."""
        try:
            with safe_open(self._files[name], framework="pt") as tensors:
                return tensors.get_tensor(name).clone()
        except Exception as error:  # safetensors raises its own type for every kind of damage
            raise AssetError(f"{self._files[name]}: cannot read {name}: {error}") from error


def _tied(model: nn.Module) -> list[str]:
    """Names of parameters that share another one's storage, as the model declares them."""
    return list(getattr(model, "all_tied_weights_keys", None) or [])


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
