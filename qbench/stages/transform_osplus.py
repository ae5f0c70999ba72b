"""Outlier Suppression+ (arXiv 2304.09145): center every input channel, then scale down only those that stick out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.calibration.extremes import Extremes
from qbench.errors import StructureError
from qbench.formats import TensorFormat
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require
from qbench.stages.scope_loss import OutputError, best, fold_groups, rounded
from qbench.structure.folds import Fold

#: The authors' largest distance of two thresholds.
WIDEST_STEP = 0.5


def channel_shift(ends: Tensor) -> Tensor:
    """z_j = (max x_j + min x_j) / 2 (section 4.1), float32 [n] from `ends` [2, n], the minima and maxima."""
    return (ends[0] + ends[1]) / 2


def outlier_scale(ends: Tensor, threshold: float) -> Tensor:
    """s_j = max(1, max x_j / t, min x_j / -t) (section 4.2), float32 [n]: every channel within ±t is left alone."""
    return (torch.maximum(-ends[0], ends[1]) / threshold).clamp_min(1.0)


def thresholds(largest: float, *, n_grid: int = 100, smallest: float = 1.0) -> list[float]:
    """Thresholds from `largest` (no channel is scaled) down to `smallest` in max(n_grid, largest / 0.5) equal steps;
    `largest` alone where it is not above `smallest`."""
    if not largest > smallest:
        return [largest]
    steps = max(n_grid, int(largest / WIDEST_STEP))
    return [largest - (largest - smallest) * step / steps for step in range(steps + 1)]


@dataclass(frozen=True, kw_only=True)
class OsPlus(Stage):
    """Shift and scale of every fold from a norm, or the scale of all folds; each is searched on the untouched weights,
    then all are applied.

    One threshold per fold is searched: the one whose scales change the output least when weights and inputs are rounded
    as the scheme does it. That output is softmax(Q Kᵀ) V for what makes queries and keys and the layers' own for the
    rest, on `search_tokens` tokens of whole, evenly spaced sequences of the full-precision stream.

    A shift is subtracted from the norm's bias and given back by the biases of all layers behind it; where one of these
    has none (RMSNorm models) there is only a scale, and the layer metric `osplus_shifted` is 0.
    """

    name: ClassVar[str] = "osplus"
    kind: ClassVar[Kind] = Kind.TRANSFORM
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need(Extremes, "full")})

    shift: bool = True
    all_folds: bool = False
    n_grid: int = 100
    smallest_threshold: float = 1.0
    search_tokens: int = 512

    @property
    def scope_tokens(self) -> int:
        return self.search_tokens

    @property
    def moves_inputs(self) -> bool:
        return self.shift

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(self.n_grid >= 1, "algo.n_grid", self.n_grid, "a number of steps >= 1 (authors: 100)")
        require(
            0 < self.smallest_threshold < float("inf"),
            "algo.smallest_threshold",
            self.smallest_threshold,
            "a magnitude of inputs > 0 (authors: 1.0)",
        )
        require(self.search_tokens >= 1, "algo.search_tokens", self.search_tokens, "a number of tokens >= 1")

    def apply(self, view: BlockView) -> Outcome:
        folds = [fold for fold in view.structure.folds if self.all_folds or fold.kind == "norm"]
        if not folds:
            others = len(view.structure.folds)
            remedy = f"; algo.all_folds=true uses {others} folds between linear layers" if others else ""
            raise StructureError(f"{view.where}: osplus has no norm whose output a scale could be moved to{remedy}")
        parameters = dict(view.block.named_parameters())
        changed: dict[str, Tensor] = {}
        scales: dict[int, Tensor] = {}
        shifted = False
        metrics = []
        for fold, (shift, free, found) in [(f, self._search(view, f)) for f in folds if fold_groups(view, f)]:
            if shift is not None:
                # Before the scale: what the biases take back is W z with the columns as they were.
                changed |= fold.apply_shift(parameters | changed, shift)
                shifted = True
            changed |= fold.apply(parameters | changed, free)
            for index in (fold.group, *fold.extra_groups):
                scales[index] = free[fold.channels]
            metrics += [(fold.consumers[0].name, *metric) for metric in found]
        return Outcome(parameters=changed, input_scales=scales, metrics=tuple(metrics), observe_again=shifted)

    def _search(self, view: BlockView, fold: Fold) -> tuple[Tensor | None, Tensor, list[tuple[str, float]]]:
        """Free shift (None: there is none) and scale [n_free] of one fold, and the metrics of the search."""
        groups = fold_groups(view, fold)
        refs = [ref for group in groups for ref in group.weights]
        seen = [view.statistic(group, Extremes) for group in groups]
        seen = [statistic for statistic in seen if statistic.tokens] or seen[:1]
        ends = _tied(torch.stack([statistic.value() for statistic in seen]), fold)
        shift = channel_shift(ends) if self.shift and fold.bias is not None else None
        if shift is not None:
            ends = ends - shift
        grid = thresholds(ends.abs().max().item(), n_grid=self.n_grid, smallest=self.smallest_threshold)
        error = OutputError(view, groups, "attention")
        of_inputs = None if shift is None else shift[fold.channels]
        losses = []
        for threshold in grid:
            scale = outlier_scale(ends, threshold) if threshold < grid[0] else torch.ones_like(ends[0])
            losses.append(error(rounded(view, refs, scale[fold.channels], shift=of_inputs)))
        chosen = best(losses, f"{view.where}, {refs[0].name}: osplus")
        scale = outlier_scale(ends, grid[chosen]) if chosen else torch.ones_like(ends[0])
        metrics = [
            ("osplus_shifted", float(shift is not None)),
            ("osplus_threshold", grid[chosen]),
            ("osplus_scaled", (scale > 1).float().mean().item()),
            ("osplus_loss_vs_none", losses[chosen] / losses[0] if losses[0] > 0 else 1.0),
        ]
        return shift, scale, metrics


def _tied(ends: Tensor, fold: Fold) -> Tensor:
    """Minima and maxima [2, n_free] of `ends` [groups, 2, in] over groups and over channels that share a free scale."""
    channels = fold.channels.to(ends.device)
    lower, upper = ends[:, 0].amin(dim=0), ends[:, 1].amax(dim=0)
    free = lower.new_zeros(fold.n_free)
    lower = free.scatter_reduce(0, channels, lower, "amin", include_self=False)
    return torch.stack([lower, free.scatter_reduce(0, channels, upper, "amax", include_self=False)])
