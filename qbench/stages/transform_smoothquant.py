"""SmoothQuant (arXiv 2211.10438): move the difficulty of quantization from inputs to the weights they meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.calibration.statistics import AbsMax
from qbench.errors import NumericsError, StructureError
from qbench.formats import TensorFormat
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require
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
    """

    name: ClassVar[str] = "smoothquant"
    kind: ClassVar[Kind] = Kind.TRANSFORM
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need(AbsMax, "full")})

    alpha: float = 0.5
    all_folds: bool = False

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(0 <= self.alpha <= 1, "algo.alpha", self.alpha, "a share from 0 to 1 (authors: 0.5; Llama 0.85)")

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
        for fold, free in [(fold, found) for fold in folds if (found := self._scale(view, fold)) is not None]:
            changed |= fold.apply(parameters | changed, free)
            for index in (fold.group, *fold.extra_groups):
                scales[index] = free[fold.channels]
            metrics.append((fold.consumers[0].name, "smooth_spread", (free.max() / free.min()).item()))
        return Outcome(parameters=changed, input_scales=scales, metrics=tuple(metrics))

    def _scale(self, view: BlockView, fold: Fold) -> Tensor | None:
        """Free scales [n_free]; None where nothing behind the fold is quantized."""
        groups = [view.structure.groups[index] for index in (fold.group, *fold.extra_groups)]
        seen = [view.statistics[group.index][AbsMax].value() for group in groups if group.weights]
        if not seen:
            return None
        inputs = torch.stack(seen).amax(dim=0)
        if not torch.isfinite(inputs).all():
            raise NumericsError(f"{view.where}, {fold.consumers[0].name}: input of the layer is not finite")
        weights = torch.stack([view.weight(ref).float().abs().amax(dim=0) for ref in fold.consumers]).amax(dim=0)
        return smooth_scale(_largest(inputs, fold), _largest(weights, fold), self.alpha)


def _largest(values: Tensor, fold: Fold) -> Tensor:
    """Largest of the values >= 0 [in] of the channels that share a free scale, [n_free]."""
    channels = fold.channels.to(values.device)
    return values.new_zeros(fold.n_free).scatter_reduce_(0, channels, values, "amax")
