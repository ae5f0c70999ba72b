"""The same tokens' inputs on the full-precision stream, kept while one block is quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from qbench.errors import StructureError


@dataclass
class Partners:
    """Inputs of every group on the full-precision stream, chunk by chunk, for statistics that compare both streams.

    Both streams hold the same sequences in the same chunks, and each chunk shows a group its input once, in order. That
    pairs tokens only where a group sees all of them, which an expert does not.
    """

    kept: dict[int, list[Tensor]] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    def keep(self, group: int, x: Tensor) -> None:
        self.kept.setdefault(group, []).append(x.detach())
        self.tokens[group] = self.tokens.get(group, 0) + x.shape[:-1].numel()

    def change(self, group: int, transform: Callable[[Tensor], Tensor]) -> None:
        """What a transform of the block does to the group's input."""
        self.kept[group] = [transform(x) for x in self.kept.get(group, [])]

    def take(self, group: int, x: Tensor, where: str) -> Tensor:
        """The partner of the next chunk's input x; it is not needed again.

        Raises StructureError where tokens cannot be paired: an expert, whose tokens each stream routes by itself.
        """
        waiting = self.kept.get(group, [])
        whole = self.tokens.get(group) == max(self.tokens.values())
        if not whole or not waiting or waiting[0].shape != x.shape:
            raise StructureError(f"{where}: the streams bring it different tokens (experts), which cannot be paired")
        return waiting.pop(0)
