"""Scales and shifts of folds as something to learn: a block's parameters under them, with gradients.

The same arithmetic as `Fold.apply_shift` and `Fold.apply`, fold by fold, so that what training sees is, bit for bit,
what is folded in afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.stages.base import BlockView
from qbench.structure.folds import Fold
from qbench.structure.weights import WeightRef

#: Scales stay above this (OmniQuant's code truncates |s|; a fold has no negative scales).
SMALLEST_SCALE = 1e-2


@dataclass(frozen=True)
class LearnedFold:
    """A fold, its free scales s and shifts d (None: none), float32 [n_free] each: input x becomes (x - d) / s."""

    fold: Fold
    scale: Tensor
    shift: Tensor | None = None

    @classmethod
    def start(cls, fold: Fold, scale: Tensor, shift: Tensor | None) -> LearnedFold:
        """From these values, as leaves of their own."""
        leaf = None if shift is None else shift.detach().clone().requires_grad_()
        return cls(fold, scale.detach().clamp_min(SMALLEST_SCALE).clone().requires_grad_(), leaf)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.scale] if self.shift is None else [self.scale, self.shift]

    def confine(self) -> None:
        """Lifts the scales to SMALLEST_SCALE, in place."""
        self.scale.clamp_(min=SMALLEST_SCALE)


def touched(folds: Iterable[LearnedFold]) -> dict[str, WeightRef]:
    """The linear weights that these folds change, by name."""
    refs = [
        ref
        for learned in folds
        for ref in (
            *(part.weight for part in learned.fold.producer if part.weight is not None),
            *learned.fold.consumers,
        )
    ]
    return {ref.name: ref for ref in refs}


def fold_in(
    block: nn.Module, folds: Iterable[LearnedFold], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights [out, in], by name, and vectors [n], by path, of the block with the folds in, in its dtype; only what
    they change of the latter. Gradients to scales and shifts. weights: those of the block, all that folds touch."""
    weights, vectors = dict(weights), {}

    def vector(path: str) -> Tensor:
        return vectors[path] if path in vectors else block.get_parameter(path).detach()

    for learned in folds:
        fold, scale = learned.fold, learned.scale
        if learned.shift is not None:
            for ref in fold.consumers:
                weight = weights[ref.name].double()
                moved = weight @ learned.shift.to(weight)[fold.channels.to(weight.device)]
                bias = vector(ref.bias)
                vectors[ref.bias] = (bias.double() + moved).to(bias.dtype)
            rows = next(part.rows for part in fold.producer if part.parameter == fold.bias)
            bias = vector(fold.bias)
            rows = rows.to(bias.device)
            vectors[fold.bias] = bias.index_copy(0, rows, bias[rows] - learned.shift.to(bias))
        for part in fold.producer:
            if part.weight is None:
                value = vector(part.parameter)
                rows = part.rows.to(value.device)
                divided = (value[rows] + part.offset) / scale.to(value) - part.offset
                vectors[part.parameter] = value.index_copy(0, rows, divided)
        for name, ref in touched([learned]).items():
            weights[name] = fold.matrix(ref, weights[name], scale)
    return weights, vectors


@torch.no_grad()
def apply_folds(block: nn.Module, folds: Iterable[LearnedFold]) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """What folding in changes: parameters by path, and by group the vector [in] that now divides its input."""
    parameters = dict(block.named_parameters())
    changed: dict[str, Tensor] = {}
    scales: dict[int, Tensor] = {}
    for learned in folds:
        if learned.shift is not None:
            changed |= learned.fold.apply_shift(parameters | changed, learned.shift.detach())
        changed |= learned.fold.apply(parameters | changed, learned.scale.detach())
        for index in (learned.fold.group, *learned.fold.extra_groups):
            scales[index] = learned.scale.detach()[learned.fold.channels.to(learned.scale.device)]
    return changed, scales


def letable_folds(view: BlockView, grouped_heads: bool) -> list[Fold]:
    """The folds at OmniQuant's sites: behind norms, and between values and the output projection; of the latter those
    whose channels are tied (grouped-query attention) only with `grouped_heads`. Folds behind which nothing is quantized
    are left out."""
    groups = view.structure.groups
    makes_keys = {
        ref.name
        for group in groups
        for ref in group.weights
        if any(bool(rows.any()) for rows in group.query_key_rows.values())
    }

    def serves(fold: Fold) -> bool:
        if not any(groups[index].weights for index in (fold.group, *fold.extra_groups)):
            return False
        if fold.kind == "norm":
            return True
        of_values = any(part.weight is not None and part.weight.name in makes_keys for part in fold.producer)
        return of_values and (grouped_heads or not fold.grouped)

    return [fold for fold in view.structure.folds if serves(fold)]
