"""DGQ's percentile clip smoothing (arXiv 2310.04836): scale down the few loudest inputs of an MLP's last layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.calibration.statistics import AbsMax
from qbench.formats import TensorFormat
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require
from qbench.stages.scope_loss import fold_groups
from qbench.structure.folds import Fold
from qbench.structure.trace import BlockStructure


def percentile_scale(inputs: Tensor, percentile: float) -> Tensor:
    """s_j = max(1, max|x_j| / p), float32 [n], with p the `percentile` (interpolated) of `inputs`, the maxima [n].

    A percentile of 0 (nearly all channels dead) scales nothing: there is no loudness to compare with.
    """
    baseline = torch.quantile(inputs.double(), percentile / 100).float()  # in float32 its place would be inexact
    return torch.where(baseline > 0, inputs / baseline, torch.ones_like(inputs)).clamp_min(1.0)


@dataclass(frozen=True, kw_only=True)
class PercentileSmooth(Stage):
    """Smoothing of every fold between linear layers outside attention: up → down of a gated MLP (the authors', for
    Llama), ReLU fc1 → fc2. A block without one is left alone."""

    name: ClassVar[str] = "percentile_smooth"
    kind: ClassVar[Kind] = Kind.TRANSFORM
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need(AbsMax, "full")})

    percentile: float = 99.5

    def check(self, formats: frozenset[TensorFormat]) -> None:
        accepted = "a percentile of the channels from 0 to 100 (authors: 99.5; 100 scales nothing)"
        require(0 <= self.percentile <= 100, "algo.percentile", self.percentile, accepted)

    def apply(self, view: BlockView) -> Outcome:
        parameters = dict(view.block.named_parameters())
        changed: dict[str, Tensor] = {}
        scales: dict[int, Tensor] = {}
        metrics = []
        for fold in view.structure.folds:
            groups = fold_groups(view, fold)
            if fold.kind != "linear" or not groups or in_attention(view.structure, fold):
                continue
            inputs = torch.stack([view.statistic(group, AbsMax).value() for group in groups]).amax(dim=0)
            channels = fold.channels.to(inputs.device)
            largest = inputs.new_zeros(fold.n_free).scatter_reduce_(0, channels, inputs, "amax")
            free = percentile_scale(largest, self.percentile)
            changed |= fold.apply(parameters | changed, free)
            for index in (fold.group, *fold.extra_groups):
                scales[index] = free[fold.channels]
            metrics.append((fold.consumers[0].name, "percentile_largest_scale", free.max().item()))
        return Outcome(parameters=changed, input_scales=scales, metrics=tuple(metrics))


def in_attention(structure: BlockStructure, fold: Fold) -> bool:
    """Whether the fold's producer lies in a module that also makes queries or keys: values feeding the output layer."""
    made = {name: rows for group in structure.groups for name, rows in group.query_key_rows.items()}
    for part in fold.producer:
        if part.weight is None:
            continue
        group = next(group for group in structure.groups if part.weight.name in group.query_key_rows)
        scopes = [scope for scope in group.scopes if part.weight.parameter.startswith(f"{scope}.")]
        if any(name.startswith(f"{scope}.") and bool(rows.any()) for scope in scopes for name, rows in made.items()):
            return True
    return False
