"""What is seen of a block's linear inputs, keys and values on calibration text, for quantizing them at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qbench.calibration.ranges import RANGES, InputRanges, MinMax
from qbench.engine.activations import InputQuantizer
from qbench.engine.kv import CacheRanges
from qbench.errors import NumericsError
from qbench.formats.ranges import Range
from qbench.formats.scheme import InputFormat
from qbench.formats.tensor import fit
from qbench.structure.trace import LinearGroup


class InputStatistics:
    """What one group's input in one format needs to be known of calibration text."""

    def __init__(self, group: LinearGroup, format: InputFormat, device: torch.device) -> None:
        self.group, self.format = group, format
        self.used: list[InputRanges] = []
        if format.static:
            self._clipped = RANGES[format.calibration](group.in_features, device, format.format)
            self.used.append(self._clipped)
        if format.format.scale.needs_outer:
            self._whole = MinMax(group.in_features, device, format.format)
            self.used.append(self._whole)

    def update(self, x: Tensor) -> None:
        for statistic in self.used:
            statistic.update(x)

    @cached_property
    def clipped(self) -> Range:
        """What static scales cover. A search, so it is made once, when all tokens have been seen."""
        return self._clipped.range()

    @cached_property
    def whole(self) -> Range:
        """All values: shared scales protect even those that block scales clip."""
        return self._whole.range()

    def quantizer(self, where: str, every: Iterable[InputStatistics]) -> InputQuantizer:
        """From this group's statistics or, where it saw no token, from those of the other experts among `every`."""
        fmt = self.format.format
        params = outer = None
        try:
            sources = self._sources(every)
            if fmt.scale.needs_outer:
                whole = _union([source.whole for source in sources])
                outer = fmt.scale.outer(torch.maximum(-whole.lower, whole.upper), fmt.element.extent)
            if self.format.static:
                clipped = _union([source.clipped for source in sources])
                params = fit(torch.empty(0), fmt, clipped, outer)  # the range says it all
        except NumericsError as error:
            raise NumericsError(f"{where}: {error}") from error
        return InputQuantizer(format=self.format, params=params, outer=outer, where=where)

    def _sources(self, every: Iterable[InputStatistics]) -> list[InputStatistics]:
        if all(statistic.tokens for statistic in self.used):
            return [self]
        parameters = self._parameters()
        others = [other for other in every if other.format == self.format and other._parameters() == parameters]
        return [other for other in others if all(statistic.tokens for statistic in other.used)] or [self]

    def _parameters(self) -> frozenset[str]:
        return frozenset(ref.parameter for ref in self.group.weights)


def _union(ranges: list[Range]) -> Range:
    lower, upper = (torch.stack(ends) for ends in zip(*((each.lower, each.upper) for each in ranges), strict=True))
    return Range(lower.amin(dim=0), upper.amax(dim=0))


def observer(
    inputs: Mapping[tuple[int, InputFormat], InputStatistics], chunk: Tensor
) -> Callable[[LinearGroup, Tensor], None]:
    """Shows every group's input to its statistics, by sequences where it holds all tokens of the chunk."""
    sequences, length = chunk.shape[:2]

    def observe(group: LinearGroup, x: Tensor) -> None:
        rows = x.flatten(0, -2)  # some models flatten their tokens
        whole = rows.view(sequences, length, -1) if len(rows) == sequences * length else rows
        for (position, _), statistics in inputs.items():
            if position == group.index:
                statistics.update(whole)

    return observe


class CacheTap(TorchFunctionMode):
    """Shows `ranges` the keys and values of every attention (None: does nothing)."""

    def __init__(self, ranges: CacheRanges | None) -> None:
        super().__init__()
        self._ranges = ranges

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._ranges is not None:
            key, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[1:3]
            self._ranges.update(key, value)
        return func(*args, **kwargs)
