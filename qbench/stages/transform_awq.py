"""AWQ's activation-aware scaling (arXiv 2306.00978, section 3.2): protect the channels that carry large inputs.

A weight's columns are multiplied by s and its input is divided by s, which a fold moves into the producer of the
input. s = E|x|^r with r from a grid; the r that changes the output of the module around the weights least wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.calibration.statistics import AbsMean, Hessian
from qbench.formats import TensorFormat
from qbench.formats.scheme import Scheme
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require
from qbench.stages.scope_loss import (
    OutputError,
    best,
    fold_groups,
    is_linear,
    quantizes_inputs,
    rounded,
    scope_calls,
)
from qbench.structure.folds import Fold
from qbench.structure.trace import LinearGroup

#: The authors' floor of a scale before normalization.
SMALLEST = 1e-4


def awq_scale(salience: Tensor, ratio: float, weight_salience: Tensor | None = None) -> Tensor:
    """s = a^ratio, normalized by sqrt(max s · min s); float32 [in] from a = E|x| [in].

    With weight_salience w [in] ("duo scaling" of AutoAWQ): s = a^ratio / w^(1 - ratio). ratio 0 gives s = 1.
    """
    scale = salience.clamp_min(SMALLEST).pow(ratio)
    if weight_salience is not None and ratio > 0:
        scale = scale / weight_salience.clamp_min(SMALLEST).pow(1 - ratio)
    scale = scale.clamp_min(SMALLEST)
    return scale / (scale.max() * scale.min()).sqrt()


def weight_salience(weights: list[Tensor], formats: list[TensorFormat]) -> Tensor:
    """Mean over all rows of |W_ij| relative to its group's maximum, float32 [in] (AutoAWQ's w_mean)."""
    total = sum(_relative(weight, fmt).sum(dim=0) for weight, fmt in zip(weights, formats, strict=True))
    return total / sum(weight.shape[0] for weight in weights)


def hessian_error(delta: Tensor, hessian: Tensor) -> Tensor:
    """Mean over tokens of the squared norm of delta x: tr(Δ H Δᵀ); delta [out, in], H = E[x xᵀ] [in, in]."""
    return (delta @ hessian * delta).sum()


@dataclass(frozen=True, kw_only=True)
class AwqScale(Stage):
    """Scale search on every fold of the block; all are searched on the untouched weights, then applied (as the
    authors do).

    Where the searched module is the linear layer itself (o, down) its output error is tr(Δ H Δᵀ), exact over all
    calibration tokens; where it is attention or an MLP, it is evaluated on `search_tokens` tokens of whole, evenly
    spaced sequences. (The authors run all sequences through both, 20 times; the result differs by the sampling only.)
    With `weight_act` the inputs are rounded as the scheme does it, and every output is evaluated on those tokens.
    """

    name: ClassVar[str] = "awq_scale"
    kind: ClassVar[Kind] = Kind.TRANSFORM
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need(AbsMean, "full"), Need(Hessian, "full")})

    n_grid: int = 20
    duo: bool = False
    grouped_heads: bool = False
    search_tokens: int = 1024
    weight_act: bool = False

    @property
    def scope_tokens(self) -> int:
        return self.search_tokens

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(self.n_grid >= 1, "algo.n_grid", self.n_grid, "a number of ratios >= 1 (authors: 20)")
        require(self.search_tokens >= 1, "algo.search_tokens", self.search_tokens, "a number of tokens >= 1")

    def check_scheme(self, scheme: Scheme) -> None:
        require(
            not self.weight_act or quantizes_inputs(scheme),
            "algo.weight_act",
            self.weight_act,
            "false, or quantized inputs (act_bits): there are none to round in the search",
        )

    def apply(self, view: BlockView) -> Outcome:
        parameters = dict(view.block.named_parameters())
        changed: dict[str, Tensor] = {}
        scales: dict[int, Tensor] = {}
        metrics = []
        searched = [
            (fold, *self._search(view, fold))
            for fold in view.structure.folds
            if fold_groups(view, fold)  # else nothing there is quantized
            and (self.grouped_heads or not fold.grouped)  # the authors skip v→o where heads share values
        ]
        for fold, free, ratio, gain in searched:
            changed |= fold.apply(parameters | changed, free)
            for index in (fold.group, *fold.extra_groups):
                scales[index] = free[fold.channels]
            first = fold_groups(view, fold)[0].weights[0].name
            metrics += [(first, "awq_ratio", ratio), (first, "awq_loss_vs_rtn", gain)]
        return Outcome(parameters=changed, input_scales=scales, metrics=tuple(metrics))

    def _search(self, view: BlockView, fold: Fold) -> tuple[Tensor, float, float]:
        """Free scales [n_free] of the best ratio, that ratio, and its loss relative to ratio 0's (plain rounding)."""
        groups = fold_groups(view, fold)
        refs = [ref for group in groups for ref in group.weights]
        weights = {ref.name: view.weight(ref).float() for ref in refs}
        salience = _salience(view, groups)
        partner = (
            weight_salience([weights[ref.name] for ref in refs], [view.format(ref) for ref in refs])
            if self.duo
            else None
        )
        candidates = [
            _tie(awq_scale(salience, step / self.n_grid, partner), fold.channels) for step in range(self.n_grid)
        ]
        exact = not self.weight_act and is_linear(groups, scope_calls(view, groups))
        hessian = view.statistic(groups[0], Hessian).value() if exact else None
        error = None if exact else OutputError(view, groups)
        losses = []
        for free in candidates:
            found = rounded(view, refs, free[fold.channels], inputs=self.weight_act)
            if exact:
                deltas = (found[ref.name].weight - weights[ref.name] for ref in refs)
                loss = sum(hessian_error(delta, hessian) for delta in deltas).item()
            else:
                loss = error(found)
            losses.append(loss)
        chosen = best(losses, f"{view.where}, {refs[0].name}: AWQ")
        gain = losses[chosen] / losses[0] if losses[0] > 0 else 1.0
        return candidates[chosen], chosen / self.n_grid, gain


def _relative(weight: Tensor, fmt: TensorFormat) -> Tensor:
    blocks = fmt.blocks(weight.abs())
    return fmt.unblocks(blocks / blocks.amax(dim=-1, keepdim=True).clamp_min(1e-12), weight.shape)


def _salience(view: BlockView, groups: list[LinearGroup]) -> Tensor:
    """E|x_j| over the tokens of all groups: experts see disjoint shares of the same normalized stream."""
    statistics = [view.statistic(group, AbsMean) for group in groups]
    return sum(s.total for s in statistics) / max(sum(s.tokens for s in statistics), 1)


def _tie(scale: Tensor, channels: Tensor) -> Tensor:
    """Mean of the scales that a fold ties together, [n_free] from [in] (METHODS 0.5: grouped-query v→o)."""
    channels = channels.to(scale.device)
    free = scale.new_zeros(int(channels.max()) + 1)
    counts = torch.zeros_like(free)
    free.index_add_(0, channels, scale)
    counts.index_add_(0, channels, torch.ones_like(scale))
    return free / counts
