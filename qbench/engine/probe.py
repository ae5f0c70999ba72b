"""A sample of the full-precision stream at one block: what searches evaluate on and what guards transforms."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.engine.streams import Stream
from qbench.stages.base import ScopeCall
from qbench.structure.blocks import BlockCall
from qbench.structure.trace import BlockStructure


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` (at most `total`) indices spread over range(total)."""
    count = max(1, min(count, total))
    return [(2 * k + 1) * total // (2 * count) for k in range(count)]


@dataclass(frozen=True)
class Probe:
    """`hidden` [sequences, length, hidden] entering a block, its call, and the untouched block's output."""

    call: BlockCall
    hidden: Tensor
    expected: Tensor

    @classmethod
    def observe(cls, block: nn.Module, index: int, stream: Stream, sequences: list[int]) -> Probe:
        hidden = stream.sequences(sequences)
        call = stream.call(index, hidden)
        return cls(call, hidden, call(block, hidden))

    def function_error(self, block: nn.Module) -> float:
        """Largest change of the block's output on the sample, relative to the largest output."""
        change = (self.call(block, self.hidden) - self.expected).abs().max()
        return (change / self.expected.abs().max()).item()

    def scopes(self, block: nn.Module, structure: BlockStructure) -> dict[int, tuple[ScopeCall, ...]]:
        """Every group's scope modules as they are called on the sample (DESIGN §7), by group index."""
        captured: dict[str, ScopeCall] = {}

        def record(name: str, args: tuple, kwargs: dict, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            captured[name] = ScopeCall(name, args, kwargs, tensor)

        with ExitStack() as hooks:
            for name in {scope for group in structure.groups for scope in group.scopes}:
                handle = block.get_submodule(name).register_forward_hook(
                    lambda _, args, kwargs, output, name=name: record(name, args, kwargs, output), with_kwargs=True
                )
                hooks.callback(handle.remove)
            with torch.no_grad():
                self.call(block, self.hidden)
        return {
            group.index: tuple(captured[name] for name in group.scopes if name in captured)
            for group in structure.groups
        }
