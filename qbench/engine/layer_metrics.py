"""What rounding did to each linear weight: the layer metrics of every run."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from qbench.calibration.moments import kurtosis
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

    weight_error: ‖ΔW‖² / ‖W‖², and the same as sqnr in dB. weight_kurtosis: E[(w - μ)⁴] / σ⁴ over all elements of W
    before rounding. Where the stage collected a Hessian, output_error: E‖ΔW x‖² / E‖W x‖², and output_cosine: between
    W x and (W + ΔW) x over all tokens. clip_ratio: length of the range that codes cover as a share of the weights' own,
    mean over blocks, at most 1. solve_s: the stage's seconds, shared out by the weights' sizes.
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
            if (tails := kurtosis(weight)) is not None:
                found.append((ref.name, "weight_kurtosis", tails))
            if hessian is not None:
                seen = weight @ hessian
                changed, whole, cross = (delta @ hessian * delta).sum(), (seen * weight).sum(), (seen * delta).sum()
                found.append((ref.name, "output_error", ratio(changed, whole)))
                found.append((ref.name, "output_cosine", _cosine(changed, whole, cross)))
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


def _cosine(changed: Tensor, whole: Tensor, cross: Tensor) -> float:
    """Between y and y + e from E‖e‖², E‖y‖² and E⟨y, e⟩; 1 for 0 and 0."""
    rounded = whole + 2 * cross + changed
    if whole <= 0 and rounded <= 0:
        return 1.0
    return ratio(whole + cross, (whole.clamp_min(0) * rounded.clamp_min(0)).sqrt())


def ratio(part: Tensor, whole: Tensor) -> float:
    """part / whole as a number; 0 for 0 / 0."""
    return (part / whole.clamp_min(1e-38)).item()
