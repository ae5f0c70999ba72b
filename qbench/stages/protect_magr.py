"""Weight magnitude reduction (MagR, arXiv 2406.00800): smaller maxima, nearly the same output of the layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qbench.calibration.statistics import Hessian
from qbench.formats import Block, Int, Range, RangeFit, TensorFormat
from qbench.formats.ranges import find_range
from qbench.formats.scale import FloatScale, PowerOfTwo
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require

#: The authors' penalties: one scale per row (or more), and groups of a row.
PER_CHANNEL, PER_GROUP = 1e-3, 1e-4
#: What their code keeps of ranges: by bits with one scale per channel, and in groups of 128 whatever the bits are.
BETA_PER_CHANNEL, BETA_GROUP_128 = {2: 0.8, 3: 0.9}, 0.95


def prox_max(values: Tensor, alpha: float) -> Tensor:
    """argmin_u (1/2) ||u - v||² + alpha max|u|, for every v along the last axis; float [..., n], a new tensor.

    It clips v at ±t with Σ_j (|v_j| - t)_+ = alpha, or gives 0 where Σ|v_j| <= alpha: what remains of v when its
    projection onto the l1 ball of radius alpha is taken off (Moreau; paper, alg. 1). The sum is convex and piecewise
    linear in t and max|v| - alpha lies left of the root, so Newton's steps climb to it and end exactly there.
    """
    size = values.abs()
    bound = (size.amax(dim=-1, keepdim=True) - alpha).clamp_min_(0)
    above = torch.full_like(bound, -1)
    while True:
        over = size > bound
        count = over.sum(dim=-1, keepdim=True).to(bound.dtype)
        if torch.equal(count, above):
            break
        above = count
        total = torch.where(over, size, 0).sum(dim=-1, keepdim=True)
        # Never back, whatever rounding does: then the counts fall, and the loop ends.
        bound = torch.maximum(bound, (total - alpha) / count.clamp_min(1))
    return torch.clamp(values, -bound, bound)


def magr(weight: Tensor, hessian: Tensor, fmt: TensorFormat, *, alpha: float, iterations: int = 200) -> Tensor:
    """U, float32 [out, in]: makes (1/2) tr((U - W) H (U - W)ᵀ) / λ + alpha Σ_blocks max|U| small (eq. 3).

    weight: W, float32 [out, in]. hessian: H = E[x xᵀ] float32 [in, in], λ its largest eigenvalue, so that its overall
    factor cancels. Blocks are those of `fmt` that share a scale (the authors: rows, or groups of a row). Proximal
    gradient from W with step 1, which never increases the objective. O(iterations · out · in² + in³).
    alpha 0, no iterations or inputs that are all 0 give W.
    """
    largest = torch.linalg.eigvalsh(hessian)[-1]
    if largest <= 0:
        return weight.clone()
    metric = hessian / largest
    found = weight
    for _ in range(iterations):
        step = torch.addmm(found, found - weight, metric, alpha=-1)
        found = fmt.unblocks(prox_max(fmt.blocks(step), alpha), weight.shape)
    return found.contiguous()


def authors_beta(fmt: TensorFormat) -> float:
    """Share of min-max ranges that the authors keep with `fmt`, above 0, at most 1; 1 for all that they do not have:
    floats, tables, other scales or zero points, and for ranges that the format finds by another method."""
    plain = isinstance(fmt.element, Int) and isinstance(fmt.scale, FloatScale) and fmt.zero != "float"
    if not plain or fmt.range.method != "minmax":
        return 1.0
    if _grouped(fmt):
        return BETA_GROUP_128 if fmt.block == Block(1, 128) else 1.0
    return BETA_PER_CHANNEL.get(fmt.element.bits, 1.0)


@dataclass(frozen=True, kw_only=True)
class Magr(Stage):
    """MagR on every weight, with the Hessian of the full-precision stream.

    Not a TRANSFORM: those leave the block's function exactly alone, which the engine verifies; this one changes it a
    little (`magr_output_change`) for smaller ranges. It comes before a SPARSIFY, whose zeros it would fill, and
    before a RANGE, which must see the weights that it leaves: so it is a PROTECT.

    What rounds next gets `beta` of the min-max range of U where that is below 1 (null: `authors_beta`), unless a stage
    in between chooses ranges by itself.
    """

    name: ClassVar[str] = "magr"
    kind: ClassVar[Kind] = Kind.PROTECT
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Need]] = frozenset({Need(Hessian, "full")})

    alpha: float = PER_CHANNEL
    alpha_group: float = PER_GROUP
    iterations: int = 200
    beta: float | None = None

    def kept(self, fmt: TensorFormat) -> float:
        """Share of min-max ranges that is left."""
        return authors_beta(fmt) if self.beta is None else self.beta

    def check_later(self, later: Sequence[Stage]) -> None:
        for stage in later:
            accepted = f"null or 1 before {stage.name}, which chooses ranges by itself"
            require(self.beta in (None, 1) or stage.uses_ranges, "algo.beta", self.beta, accepted)

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(0 <= self.iterations <= 10_000, "algo.iterations", self.iterations, "0 to 10000 (authors: 200)")
        kinds = {_grouped(fmt) for fmt in formats}
        for grouped, option, value, default, where in (
            (False, "alpha", self.alpha, PER_CHANNEL, "scales per channel or tensor; groups have algo.alpha_group"),
            (True, "alpha_group", self.alpha_group, PER_GROUP, "groups; scales per channel or tensor have algo.alpha"),
        ):
            require(0 <= value <= 10, f"algo.{option}", value, f"0 to 10 (authors: {default:g})")
            require(grouped in kinds or value == default or not kinds, f"algo.{option}", value, f"with {where}")
        accepted = "null (authors: 0.8 at 2 bits, 0.9 at 3, per channel) or a share above 0, at most 1"
        require(self.beta is None or 0 < self.beta <= 1, "algo.beta", self.beta, accepted)
        if self.beta not in (None, 1):
            for fmt in formats:
                self._check_shrinks(fmt)

    def _check_shrinks(self, fmt: TensorFormat) -> None:
        """Raises SpecError for a format whose ranges `beta` cannot shrink."""
        for possible, reason in (
            (fmt.range.method == "minmax", f"range.method={fmt.range.method}, which finds the ranges"),
            (fmt.zero != "float", "zero_point=float: beta shrinks ranges around 0"),
            (
                not isinstance(fmt.scale, PowerOfTwo) or fmt.name is None,
                f"{fmt.label}, whose standard fixes its scales",
            ),
        ):
            require(possible, "algo.beta", self.beta, f"null or 1 with {reason}")

    def apply(self, view: BlockView) -> Outcome:
        changed: dict[str, Tensor] = {}
        ranges: dict[str, Range] = {}
        metrics = []
        for group in view.groups:
            hessian = view.statistic(group, Hessian).value()
            for ref in group.weights:
                weight, fmt = view.weight(ref).float(), view.format(ref)
                alpha = self.alpha_group if _grouped(fmt) else self.alpha
                found = magr(weight, hessian, fmt, alpha=alpha, iterations=self.iterations)
                if ref.parameter not in changed:
                    changed[ref.parameter] = view.block.get_parameter(ref.parameter).detach().clone()
                ref.of(changed[ref.parameter]).copy_(found)
                if (beta := self.kept(fmt)) < 1:
                    stored = ref.of(changed[ref.parameter]).float()
                    shrunken = replace(fmt, range=RangeFit(method="share", share=beta))
                    ranges[ref.name] = find_range(stored, shrunken)
                delta = found - weight
                moved, whole = (delta @ hessian * delta).sum(), (weight @ hessian * weight).sum()
                before, after = (fmt.blocks(x).abs().amax(dim=-1).sum() for x in (weight, found))
                metrics += [(ref.name, "magr_output_change", _ratio(moved, whole, 0.0))]
                metrics += [(ref.name, "magr_range", _ratio(after, before, 1.0))]
        return Outcome(parameters=changed, ranges=ranges, metrics=tuple(metrics))


def _grouped(fmt: TensorFormat) -> bool:
    return fmt.block.columns > 0


def _ratio(part: Tensor, whole: Tensor, otherwise: float) -> float:
    return (part / whole).item() if whole > 0 else otherwise
