"""QuIP (arXiv 2307.13304): LDLQ rounding of weights that random rotations have made incoherent."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qbench.calibration.statistics import Hessian
from qbench.errors import SpecError, numerics_at, written
from qbench.formats import QTensor, Range, TensorFormat, fit
from qbench.formats.basis import Basis
from qbench.formats.scale import PowerOfTwo
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require
from qbench.stages.gptq_core import excited
from qbench.stages.ldlq_core import ldlq

#: The authors' range, in units of the weights' root mean square.
RHO = 2.4
#: The authors' floor of H_jj and (WᵀW)_jj, here as a share of the largest.
SMALLEST = 1e-8


def diagonal_scale(weight: Tensor, hessian: Tensor) -> Tensor:
    """D_j = (H_jj / (WᵀW)_jj)^(1/4), which makes tr(D⁻¹ H D⁻¹) ‖W D‖² smallest among diagonal matrices, as float16
    stores it; float32 [in] (QuIP, section 4.1, "diagonal rescaling").

    Its overall factor cancels; the geometric mean is 1, which float16 holds best.
    """
    power, energy = hessian.diagonal().double(), weight.double().square().sum(dim=0)
    if not bool(power.max() > 0) or not bool(energy.max() > 0):
        return torch.ones_like(hessian.diagonal())
    logs = (power / power.max()).clamp_min(SMALLEST).log() - (energy / energy.max()).clamp_min(SMALLEST).log()
    return ((logs - logs.mean()) / 4).exp().half().float()


def spread_range(weight: Tensor, fmt: TensorFormat, rho: float) -> Range:
    """± rho times the root mean square of every block of `weight` (float32 [out, in])."""
    blocks = fmt.blocks(weight.square()).sum(dim=-1)  # padded with zeros
    bound = rho * (blocks / fmt.block_sizes(weight.shape, weight.device)).sqrt()
    return Range(-bound, bound)


def quip(
    weight: Tensor,
    hessian: Tensor,
    fmt: TensorFormat,
    seed: int,
    *,
    rescale: bool = True,
    rho: float = RHO,
    damp: float = 0.01,
    act_order: bool = False,
    greedy_passes: int = 0,
) -> QTensor:
    """Quantize W (float32 [out, in]) as U W D Vᵀ, in which no entry stands out: Algorithms 1 to 3 of QuIP.

    hessian: E[x xᵀ], float32 [in, in]. D is `diagonal_scale` or, without `rescale`, I; U and V are random Kronecker
    rotations from `seed`; the codes cover ± rho times the root mean square of what shares a scale, and LDLQ rounds with
    V D⁻¹ H D⁻¹ Vᵀ. The result decodes to Uᵀ Q V D⁻¹. The authors' grid is one half-integer zero point and one scale
    for the whole tensor: asymmetric integers with group_size=0 and zero_point=float.
    """
    hessian = excited(hessian)
    basis = Basis.random(tuple(weight.shape), seed, diagonal_scale(weight, hessian) if rescale else None)
    rotated = basis.enter(weight)
    params = fit(rotated, fmt, spread_range(rotated, fmt, rho))
    options = {"damp": damp, "act_order": act_order, "greedy_passes": greedy_passes}
    found = ldlq(rotated, basis.moment(hessian), fmt, params, **options)
    return replace(found, basis=basis)


def coherence(weight: Tensor) -> float:
    """max|W| over its root mean square (the paper's μ): at most sqrt(out in), some sqrt(2 log(out in)) at random."""
    rms = weight.double().square().mean().sqrt().item()
    return weight.abs().max().item() / rms if rms > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class Quip(Stage):
    """LDLQ on the quantized stream's Hessian, in a basis of each weight's own. incoherence=false leaves the weight as
    it is: plain LDLQ on the ranges that an earlier stage chose, or on the format's own. LDLQ-RG is act_order=true with
    some ten greedy_passes."""

    name: ClassVar[str] = "quip"
    kind: ClassVar[Kind] = Kind.ROUND
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need(Hessian, "quantized")})

    incoherence: bool = True
    rescale: bool = True
    rho: float = RHO
    damp: float = 0.01
    act_order: bool = False
    greedy_passes: int = 0

    @property
    def uses_random(self) -> bool:
        return self.incoherence

    @property
    def uses_ranges(self) -> bool:
        return not self.incoherence

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(0 <= self.damp <= 10, "algo.damp", self.damp, "a share of mean(diag H) from 0 to 10 (authors: 0.01)")
        require(0 < self.rho <= 100, "algo.rho", self.rho, "a factor above 0, at most 100 (authors: 2.4)")
        require(0 <= self.greedy_passes <= 100, "algo.greedy_passes", self.greedy_passes, "0 to 100 (LDLQ-RG: 10)")
        if not self.incoherence:
            for option, value, default in (("rescale", self.rescale, True), ("rho", self.rho, RHO)):
                accepted = f"{written(default)} with incoherence=false, which ignores it"
                require(value == default, f"algo.{option}", value, accepted)
            return
        for fmt in formats:
            require(
                fmt.range.method == "minmax",
                "range.method",
                fmt.range.method,
                "minmax with quip, whose ranges are algo.rho times the root mean square (incoherence=false: any)",
            )
            require(
                not isinstance(fmt.scale, PowerOfTwo),
                "format",
                fmt.label,
                "one with scales of any size, or algo.incoherence=false: powers of two cannot follow algo.rho",
            )

    def apply(self, view: BlockView) -> Outcome:
        codes: dict[str, QTensor] = {}
        metrics = []
        for group in view.groups:
            statistic = view.statistic(group, Hessian)
            hessian = statistic.value()
            for ref in group.weights:
                weight, fmt, clip = view.weight(ref).float(), view.format(ref), view.ranges.get(ref.name)
                with numerics_at(f"{view.where}, {ref.name} ({statistic.tokens} tokens)"):
                    found = self._solve(weight, hessian, fmt, clip, weight_seed(view.generator, ref.name))
                codes[ref.name] = found
                metrics.append((ref.name, "damp", self.damp))
                if found.basis is not None:
                    metrics += [(ref.name, "coherence", coherence(weight))]
                    metrics += [(ref.name, "coherence_rotated", coherence(found.basis.enter(weight)))]
        return Outcome(codes=codes, metrics=tuple(metrics))

    def _solve(self, weight: Tensor, hessian: Tensor, fmt: TensorFormat, clip: Range | None, seed: int) -> QTensor:
        options = {"damp": self.damp, "act_order": self.act_order, "greedy_passes": self.greedy_passes}
        if not self.incoherence:
            return ldlq(weight, hessian, fmt, fit(weight, fmt, clip), **options)
        if clip is not None:
            raise SpecError(
                "algo.pipeline", "quip", "no clipping before it (or algo.incoherence=false): it rounds in another basis"
            )
        return quip(weight, hessian, fmt, seed, rescale=self.rescale, rho=self.rho, **options)


def weight_seed(generator: torch.Generator | None, name: str) -> int:
    """A seed below 2^63 of one weight of a block: from the block's generator, which is left as it is, and the weight's
    name, so that it depends neither on the order of the weights nor on what other stages draw."""
    base = generator.initial_seed() if generator is not None else 0
    digest = hashlib.sha256(f"{base} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % (1 << 63)
