"""SmoothQuant (arXiv 2211.10438): move the difficulty of quantization from inputs to the weights they meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.calibration.statistics import AbsMax
from qbench.errors import StructureError, written
from qbench.formats import TensorFormat
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require
from qbench.stages.scope_loss import OutputError, best, fold_groups, rounded
from qbench.structure.folds import Fold

#: The authors' floor of a column's largest weight, and of a scale.
SMALLEST = 1e-5


def smooth_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s_j = max|x_j|^alpha / max|W_:j|^(1-alpha) (eq. 4), float32 [n] from the maxima of n channels, float32 [n] each.

    The input is divided by s, the weight's columns are multiplied by it: alpha 1 makes all inputs' maxima 1, alpha 0
    the weights', 0.5 makes both equal. Departure: a channel that no token excites keeps s = 1; the authors' floor of
    1e-5 would multiply what an evaluation finds there by 100,000.
    """
    scale = inputs.pow(alpha) / weights.clamp_min(SMALLEST).pow(1 - alpha)
    return torch.where(inputs > 0, scale.clamp_min(SMALLEST), torch.ones_like(scale))


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Stage):
    """Scales of all folds from a norm, or of all folds; each from the untouched weights, then all are applied.

    Maxima run over whatever shares a scale: all weights that read the channel, a router included, and with tied
    channels (grouped-query attention) all of them.

    search: every fold gets its own alpha out of 0, 1/n_grid … 1, or no scale at all: what moves the output of the
    module behind it least when its weights and inputs are rounded (on `search_tokens` tokens of whole, evenly spaced
    sequences of the full-precision stream). The authors choose one alpha per model.
    """

    name: ClassVar[str] = "smoothquant"
    kind: ClassVar[Kind] = Kind.TRANSFORM
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need(AbsMax, "full")})

    alpha: float = 0.5
    all_folds: bool = False
    search: bool = False
    n_grid: int = 20
    search_tokens: int = 1024

    @property
    def scope_tokens(self) -> int:
        return self.search_tokens if self.search else 0

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(0 <= self.alpha <= 1, "algo.alpha", self.alpha, "a share from 0 to 1 (authors: 0.5; Llama 0.85)")
        require(self.n_grid >= 1, "algo.n_grid", self.n_grid, "a number of steps from alpha 0 to 1, >= 1")
        require(self.search_tokens >= 1, "algo.search_tokens", self.search_tokens, "a number of tokens >= 1")
        defaults = self.options()
        for option in ("alpha",) if self.search else ("n_grid", "search_tokens"):
            value = getattr(self, option)
            without = f"algo.search={written(not self.search)}: only then it has an effect"
            require(value == defaults[option], f"algo.{option}", value, without)

    def apply(self, view: BlockView) -> Outcome:
        folds = [fold for fold in view.structure.folds if self.all_folds or fold.kind == "norm"]
        if not folds:
            others = len(view.structure.folds)
            remedy = f"; algo.all_folds=true uses {others} folds between linear layers" if others else ""
            raise StructureError(
                f"{view.where}: smoothquant has no norm whose output a scale could be moved to{remedy}"
            )
        parameters = dict(view.block.named_parameters())
        changed: dict[str, Tensor] = {}
        scales: dict[int, Tensor] = {}
        metrics = []
        for fold, (free, searched) in [(fold, self._scale(view, fold)) for fold in folds if fold_groups(view, fold)]:
            changed |= fold.apply(parameters | changed, free)
            for index in (fold.group, *fold.extra_groups):
                scales[index] = free[fold.channels]
            spread = ("smooth_spread", (free.max() / free.min()).item())
            metrics += [(fold.consumers[0].name, *metric) for metric in (spread, *searched)]
        return Outcome(parameters=changed, input_scales=scales, metrics=tuple(metrics))

    def _scale(self, view: BlockView, fold: Fold) -> tuple[Tensor, list[tuple[str, float]]]:
        """Free scales [n_free] of one fold, and the metrics of its search."""
        groups = fold_groups(view, fold)
        inputs = torch.stack([view.statistic(group, AbsMax).value() for group in groups]).amax(dim=0)
        weights = torch.stack([view.weight(ref).float().abs().amax(dim=0) for ref in fold.consumers]).amax(dim=0)
        inputs, weights = _largest(inputs, fold), _largest(weights, fold)
        if not self.search:
            return smooth_scale(inputs, weights, self.alpha), []
        alphas = [step / self.n_grid for step in range(self.n_grid + 1)]
        candidates = [torch.ones_like(inputs), *(smooth_scale(inputs, weights, alpha) for alpha in alphas)]
        refs = [ref for group in groups for ref in group.weights]
        error = OutputError(view, groups)
        losses = [error(rounded(view, refs, free[fold.channels])) for free in candidates]
        chosen = best(losses, f"{view.where}, {refs[0].name}: smoothquant")
        metrics = [("smooth_loss_vs_none", losses[chosen] / losses[0] if losses[0] > 0 else 1.0)]
        # No alpha means no scale: the metric is absent where leaving the input alone was best.
        return candidates[chosen], [*metrics, *([("smooth_alpha", alphas[chosen - 1])] if chosen else [])]


def _largest(values: Tensor, fold: Fold) -> Tensor:
    """Largest of the values >= 0 [in] of the channels that share a free scale, [n_free]."""
    channels = fold.channels.to(values.device)
    return values.new_zeros(fold.n_free).scatter_reduce_(0, channels, values, "amax")
