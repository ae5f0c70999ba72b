"""What rounding did to each linear weight: the layer metrics of every run."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from qbench.calibration.statistics import Hessian, Statistic
from qbench.formats import QTensor
from qbench.formats.ranges import extrema
from qbench.stages.base import Outcome
from qbench.structure.trace import LinearGroup

#: SQNR of a weight that its format holds exactly, in dB: a number that a database can keep.
EXACT_DB = 300.0


def layer_metrics(
    block: nn.Module,
    groups: tuple[LinearGroup, ...],
    outcome: Outcome,
    statistics: Mapping[int, Mapping[type, Statistic]],
    seconds: float,
) -> list[tuple[str, str, float]]:
    """(weight, metric, value) for every weight of `groups`, whose float values `block` still holds.

    weight_error: ‖ΔW‖² / ‖W‖², and the same as sqnr in dB. output_error: E‖ΔW x‖² / E‖W x‖² where the stage collected
    a Hessian. clip_ratio: length of the range that codes cover as a share of the weights' own, mean over blocks, at
    most 1. solve_s: the stage's seconds, shared out by the weights' sizes.
    """
    found: list[tuple[str, str, float]] = []
    total = sum(ref.out_features * ref.in_features for group in groups for ref in group.weights)
    for group in groups:
        statistic = statistics.get(group.index, {}).get(Hessian)
        hessian = statistic.value() if statistic is not None and statistic.tokens else None
        for ref in group.weights:
            weight, codes = ref.read(block).float(), outcome.codes[ref.name]
            delta = codes.dequantize() - weight
            error = ratio(delta.square().sum(), weight.square().sum())
            found.append((ref.name, "weight_error", error))
            found.append((ref.name, "sqnr_db", -10 * math.log10(error) if error > 10 ** (-EXACT_DB / 10) else EXACT_DB))
            if hessian is not None:
                changed, whole = (delta @ hessian * delta).sum(), (weight @ hessian * weight).sum()
                found.append((ref.name, "output_error", ratio(changed, whole)))
            if (clip := clip_ratio(weight, codes)) is not None:
                found.append((ref.name, "clip_ratio", clip))
            found.append((ref.name, "solve_s", seconds * ref.out_features * ref.in_features / total))
    return found


def clip_ratio(weight: Tensor, codes: QTensor) -> float | None:
    """Mean over blocks of min(1, range of the codes / range of the weights); None where codes and weights don't live
    in the same basis."""
    if codes.basis is not None:
        return None
    if codes.order is not None:
        weight = weight[:, codes.order]
    whole = extrema(weight, codes.format)
    levels = codes.format.element.codebook
    covered = (levels.max() - levels.min()).to(weight) * codes.scale.abs()
    length = whole.upper - whole.lower
    inside = length > 0
    if not bool(inside.any()):
        return 1.0
    return (covered[inside] / length[inside]).clamp_max(1).mean().item()


def ratio(part: Tensor, whole: Tensor) -> float:
    """part / whole as a number; 0 for 0 / 0."""
    return (part / whole.clamp_min(1e-38)).item()
