"""AWQ's activation-aware scaling (arXiv 2306.00978, section 3.2): protect the channels that carry large inputs.

A weight's columns are multiplied by s and its input is divided by s, which a fold moves into the producer of the
input. s = E|x|^r with r from a grid; the r that changes the output of the module around the weights least wins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from qbench.calibration.statistics import AbsMean, Hessian
from qbench.errors import NumericsError
from qbench.formats import RangeFit, TensorFormat, fake_quantize
from qbench.stages.base import BlockView, Kind, Need, Outcome, ScopeCall, Stage, require
from qbench.structure.folds import Fold
from qbench.structure.trace import LinearGroup
from qbench.structure.weights import WeightRef

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
    """

    name: ClassVar[str] = "awq_scale"
    kind: ClassVar[Kind] = Kind.TRANSFORM
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need(AbsMean, "full"), Need(Hessian, "full")})

    n_grid: int = 20
    duo: bool = False
    grouped_heads: bool = False
    search_tokens: int = 1024

    @property
    def scope_tokens(self) -> int:
        return self.search_tokens

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(self.n_grid >= 1, "algo.n_grid", self.n_grid, "a number of ratios >= 1 (authors: 20)")
        require(self.search_tokens >= 1, "algo.search_tokens", self.search_tokens, "a number of tokens >= 1")

    def apply(self, view: BlockView) -> Outcome:
        parameters = dict(view.block.named_parameters())
        changed: dict[str, Tensor] = {}
        scales: dict[int, Tensor] = {}
        metrics = []
        searched = [
            (fold, *self._search(view, fold))
            for fold in view.structure.folds
            if any(view.structure.groups[index].weights for index in _groups(fold))  # else nothing there is quantized
            and (self.grouped_heads or not fold.grouped)  # the authors skip v→o where heads share values
        ]
        for fold, free, ratio, gain in searched:
            changed |= fold.apply(parameters | changed, free)
            for index in _groups(fold):
                scales[index] = free[fold.channels]
            refs = [ref for index in _groups(fold) for ref in view.structure.groups[index].weights]
            metrics += [(refs[0].name, "awq_ratio", ratio), (refs[0].name, "awq_loss_vs_rtn", gain)]
        return Outcome(parameters=changed, input_scales=scales, metrics=tuple(metrics))

    def _search(self, view: BlockView, fold: Fold) -> tuple[Tensor, float, float]:
        """Free scales [n_free] of the best ratio, that ratio, and its loss relative to ratio 0's (plain rounding)."""
        every = [view.structure.groups[index] for index in _groups(fold)]
        groups = [group for group in every if group.weights]  # the others stay in full precision
        refs = [ref for group in groups for ref in group.weights]
        weights = {ref.name: view.weight(ref).float() for ref in refs}
        salience = _salience(view, groups)
        partner = (
            weight_salience([weights[ref.name] for ref in refs], [view.format(ref) for ref in refs])
            if self.duo
            else None
        )
        formats = {ref.name: _quick(view.format(ref)) for ref in refs}
        calls = _scope_calls(view, groups)
        linear = _is_linear(groups, calls)
        hessian = view.statistics[groups[0].index][Hessian].value() if linear else None
        losses, candidates = [], []
        for step in range(self.n_grid):
            free = _tie(awq_scale(salience, step / self.n_grid, partner), fold.channels)
            scale = free[fold.channels]
            rounded = {
                ref.name: fake_quantize(weights[ref.name] * scale, formats[ref.name]).div_(scale) for ref in refs
            }
            if linear:
                loss = sum(hessian_error(rounded[ref.name] - weights[ref.name], hessian) for ref in refs).item()
            else:
                loss = sum(_scope_error(view.block, call, refs, rounded) for call in calls)
            losses.append(loss if math.isfinite(loss) else math.inf)
            candidates.append(free)
        best = min(range(self.n_grid), key=losses.__getitem__)
        if math.isinf(losses[best]):
            raise NumericsError(f"{view.where}, {refs[0].name}: no scale of the AWQ search gives a finite output")
        gain = losses[best] / losses[0] if losses[0] > 0 else 1.0
        return candidates[best], best / self.n_grid, gain


def _groups(fold: Fold) -> tuple[int, ...]:
    return (fold.group, *fold.extra_groups)


def _quick(fmt: TensorFormat) -> TensorFormat:
    """The format with min-max ranges in place of an MSE search, which would multiply the cost of every ratio by 80."""
    return replace(fmt, range=RangeFit()) if fmt.range.method == "mse" else fmt


def _relative(weight: Tensor, fmt: TensorFormat) -> Tensor:
    blocks = fmt.blocks(weight.abs())
    return fmt.unblocks(blocks / blocks.amax(dim=-1, keepdim=True).clamp_min(1e-12), weight.shape)


def _salience(view: BlockView, groups: list[LinearGroup]) -> Tensor:
    """E|x_j| over the tokens of all groups: experts see disjoint shares of the same normalized stream."""
    statistics = [view.statistics[group.index][AbsMean] for group in groups]
    return sum(s.total for s in statistics) / max(sum(s.tokens for s in statistics), 1)


def _tie(scale: Tensor, channels: Tensor) -> Tensor:
    """Mean of the scales that a fold ties together, [n_free] from [in] (METHODS 0.5: grouped-query v→o)."""
    channels = channels.to(scale.device)
    free = scale.new_zeros(int(channels.max()) + 1)
    counts = torch.zeros_like(free)
    free.index_add_(0, channels, scale)
    counts.index_add_(0, channels, torch.ones_like(scale))
    return free / counts


def _scope_calls(view: BlockView, groups: list[LinearGroup]) -> tuple[ScopeCall, ...]:
    """The calls of the modules around all groups, without those inside another one."""
    found = {call.module: call for group in groups for call in view.scopes.get(group.index, ())}
    return tuple(call for path, call in found.items() if not any(path.startswith(f"{other}.") for other in found))


def _is_linear(groups: list[LinearGroup], calls: tuple[ScopeCall, ...]) -> bool:
    """Whether the searched module is just the linear layer: then its output error needs no forward.

    Several groups are the experts behind one norm: what is searched then is the module that weighs their outputs.
    """
    owners = {ref.parameter.rpartition(".")[0] for group in groups for ref in group.weights}
    one_weight = len(groups) == 1 and len(owners) == 1
    return not calls or (one_weight and {call.module for call in calls} <= owners)


def _scope_error(block: nn.Module, call: ScopeCall, refs: list[WeightRef], rounded: Mapping[str, Tensor]) -> float:
    """Mean squared change of a module's output when its weights are replaced; summed over features."""
    replaced = dict(_within(call.module, _parameters(block, refs, rounded)))
    output = torch.func.functional_call(block.get_submodule(call.module), replaced, call.args, dict(call.kwargs))
    output = output[0] if isinstance(output, tuple) else output
    return (output - call.output).float().square().sum(dim=-1).mean().item()


def _parameters(block: nn.Module, refs: list[WeightRef], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole parameters of the block with the given weights in them."""
    changed: dict[str, Tensor] = {}
    for ref in refs:
        parameter = block.get_parameter(ref.parameter)
        value = values[ref.name].to(parameter.dtype)
        value = value.t() if ref.transposed else value
        if ref.index is None:
            changed[ref.parameter] = value
        else:
            changed.setdefault(ref.parameter, parameter.detach().clone())[ref.index] = value
    return changed


def _within(module: str, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Those parameters that belong to `module`, by their names inside it."""
    for path, value in parameters.items():
        if path.startswith(module + "."):
            yield path[len(module) + 1 :], value
