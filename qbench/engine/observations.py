"""What the groups of one block have been seen to read, on either stream, as it changes along with the block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from qbench.calibration.statistics import Hessian, Statistic
from qbench.engine.partners import Partners
from qbench.structure.online import InputTransform
from qbench.structure.trace import BlockStructure, LinearGroup


class Observations:
    """Statistics of every group's input, by group index, then type; of groups without weights there are none.

    pairs: also keep the inputs on the full-precision stream, for statistics that compare both streams. `where` names
    the block in errors. seconds: spent on updates.
    """

    def __init__(self, block: nn.Module, structure: BlockStructure, where: str, *, pairs: bool) -> None:
        self._device = next(block.parameters()).device
        self._groups = [group for group in structure.groups if group.weights]
        self._where, self._pairs = where, pairs
        self._partners: Partners | None = None
        self.statistics: dict[int, dict[type, Statistic]] = {}
        self.seconds = 0.0

    def start_full(self, kinds: frozenset[type]) -> None:
        """Forget everything; collect `kinds` on a trip of the full-precision stream."""
        self._partners = Partners() if self._pairs else None
        self._start(kinds)

    def start_quantized(self, kinds: frozenset[type]) -> None:
        """Collect `kinds` on a trip of the quantized stream, with the kept inputs of the other one as partners."""
        self._start(kinds)

    def _start(self, kinds: frozenset[type]) -> None:
        self.statistics = {
            group.index: {kind: kind(group.in_features, self._device) for kind in kinds} for group in self._groups
        }

    def see_full(self, group: LinearGroup, x: Tensor) -> None:
        """A group's input x [..., in] on the full-precision stream."""
        if self._partners is not None and group.weights:
            self._partners.keep(group.index, x)
        self._update(group, x, None)

    def see_quantized(self, group: LinearGroup, x: Tensor) -> None:
        """A group's input x [..., in] on the quantized stream. StructureError where it has no partner."""
        partner = None
        if self._partners is not None and group.weights:
            partner = self._partners.take(group.index, x, f"{self._where}, {group.weights[0].name}")
        self._update(group, x, partner)

    def _update(self, group: LinearGroup, x: Tensor, partner: Tensor | None) -> None:
        started = time.perf_counter()
        for statistic in self.statistics.get(group.index, {}).values():
            if statistic.paired:
                statistic.update(x, partner)
            else:
                statistic.update(x)
        self.seconds += time.perf_counter() - started

    def finish(self, groups: Iterable[LinearGroup]) -> None:
        """No more tokens come for these groups."""
        for group in groups:
            for statistic in self.statistics.get(group.index, {}).values():
                statistic.finish()

    def rescale(self, group: int, scale: Tensor) -> None:
        """The group's input x is x / scale from now on."""
        self.statistics[group] = {kind: s.rescaled(scale) for kind, s in self.statistics.get(group, {}).items()}
        self._change_partners(group, lambda x: x / scale)

    def transform(self, group: int, transform: InputTransform) -> None:
        """The group's input x is transform(x) from now on. Only the Hessian follows: the pipeline has seen to it that
        no later stage looks at others."""
        kept = self.statistics.get(group, {})
        self.statistics[group] = {Hessian: kept[Hessian].transformed(transform)} if Hessian in kept else {}
        self._change_partners(group, transform)

    def _change_partners(self, group: int, change: Callable[[Tensor], Tensor]) -> None:
        if self._partners is not None:
            self._partners.change(group, change)

    def forget(self, groups: Iterable[LinearGroup]) -> None:
        """Nobody needs these groups' statistics any more."""
        for group in groups:
            self.statistics.pop(group.index, None)

    def forget_all(self) -> None:
        """Inputs have changed so that no statistic holds."""
        self.statistics = {}
