"""Half-quadratic quantization (HQQ; Badri and Shaji, Mobius Labs blog, 2023): data-free fitting of the zero point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qbench.formats import Int, QParams, QTensor, Range, TensorFormat, fit, quantize
from qbench.formats.tensor import encode
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, require

#: Rows that are swept at once: bounds the temporaries of an iteration.
ROWS = 4096


@dataclass(frozen=True)
class HqqResult:
    """The quantized weight; mean |W - Q(W)| over mean |W - RTN(W)|, RTN on the same range; and the largest share of
    the residuals that the shrinkage of an iteration left other than 0."""

    weight: QTensor
    gain: float
    kept: float


def shrink(residual: Tensor, beta: float, p: float) -> Tensor:
    """sign(x) max(|x| - |x|^(p-1) / beta, 0): the generalized soft threshold that stands for argmin_e |e|^p +
    (beta/2)(e - x)² (HQQ, "sparsity-promoting" step; the plain soft threshold at p = 1). Any shape, as `residual`.

    It is 0 where |x| <= beta^(-1/(2-p)): 0.17 at the authors' beta = 10, p = 0.7.
    """
    size = residual.abs()
    if not bool((size > beta ** (-1 / (2 - p))).any()):  # the common case: a power per element is the costliest part
        return torch.zeros_like(residual)
    return residual.sign() * (size - size.pow(p - 1) / beta).clamp_min_(0)


def hqq(
    weight: Tensor,
    fmt: TensorFormat,
    *,
    iterations: int = 20,
    beta: float = 10.0,
    kappa: float = 1.01,
    p: float = 0.7,
    round_zero: bool = False,
    clip: Range | None = None,
) -> HqqResult:
    """Quantize `weight` (float32 [out, in]) with the zero point of every block chosen to make ||W - Q(W)||_p small;
    scales stay those of the range. `fmt` needs float zero points.

    Half-quadratic splitting: E = shrink(W - Q(W)), then z = mean over the block of (code - (W - E)/s), then beta grows
    by the factor kappa. The residual is in the units of the weight, as in the authors' code, so E is 0 unless some
    residual exceeds `shrink`'s threshold; then beta, kappa and p change nothing and the iteration makes the mean
    residual of every block 0. round_zero: start from the rounded zero point (the authors do at 4 bits). clip: ranges
    fitted earlier.

    Ends, like the authors' code, after `iterations` or when mean |W - Q(W)| of the whole weight has stopped falling.
    Departures: zero points are rounded to their storage (float16) before they are judged, and the best of them are
    kept (the authors return those after the last judged), so that the result is never worse than its start.
    """
    params = fit(weight, fmt, clip)
    nearest = _Sweep(weight, fmt, params).error(params.zero)
    if round_zero:
        params = replace(params, zero=params.zero.round())
    sweep, zero, best, found, kept = _Sweep(weight, fmt, params), params.zero, None, params.zero, 0.0
    for _ in range(iterations + 1):
        following, error, share = sweep.step(zero, beta, p)
        if best is not None and not error < best:
            break
        best, found, zero = error, zero, following
        kept = max(kept, share) if iterations else 0.0
        beta *= kappa
    gain = best / nearest if nearest > 0 else 1.0
    return HqqResult(quantize(weight, fmt, replace(params, zero=found)), gain, kept)


class _Sweep:
    """One weight with its scales, looked at in runs of rows that share nothing with the others."""

    def __init__(self, weight: Tensor, fmt: TensorFormat, params: QParams) -> None:
        self.fmt, self.params = fmt, params
        self.weights = weight.split(ROWS) if fmt.by_row else (weight,)

    def error(self, zero: Tensor) -> float:
        """Sum of |W - Q(W)|."""
        return sum(self._residual(*part)[1].abs().sum(dtype=torch.float64).item() for part in self._parts(zero))

    def step(self, zero: Tensor, beta: float, p: float) -> tuple[Tensor, float, float]:
        """The next zero points, the error of the given ones, and the share of residuals that survived shrinking."""
        following, error, survived, count = [], 0.0, 0, 0
        for part in self._parts(zero):
            blocks, params, inside = part
            levels, residual = self._residual(*part)
            error += residual.abs().sum(dtype=torch.float64).item()
            count += residual.numel()
            sparse = shrink(residual, beta, p)
            survived += int(torch.count_nonzero(sparse))
            target = levels.sub_((blocks - sparse).div_(params.scale[..., None])).mul_(inside)
            mean = target.sum(dim=-1) / inside.sum(dim=-1)
            following.append(mean.to(torch.float16).float())
        return torch.cat(following), error, survived / max(count, 1)

    def _parts(self, zero: Tensor) -> Iterator[tuple[Tensor, QParams, Tensor]]:
        """Blocks [rows, groups, elements], their parameters, and 1 or (where a block is padded) 0 per element."""
        scales, zeros = ((v,) if len(self.weights) == 1 else v.split(ROWS) for v in (self.params.scale, zero))
        for w, s, z in zip(self.weights, scales, zeros, strict=True):
            yield self.fmt.blocks(w), QParams(s, z), self.fmt.blocks(torch.ones_like(w))

    def _residual(self, blocks: Tensor, params: QParams, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and W - Q(W), 0 where padded."""
        levels = encode(blocks, self.fmt, params)
        decoded = (levels - params.zero[..., None]).mul_(params.scale[..., None])
        return levels, (blocks - decoded).mul_(inside)


RoundZero = Literal["auto", True, False]


@dataclass(frozen=True, kw_only=True)
class Hqq(Stage):
    """HQQ on the range that an earlier stage chose, or on the format's own. round_zero "auto": at 4 bits, as the
    authors' ready-made configurations do."""

    name: ClassVar[str] = "hqq"
    kind: ClassVar[Kind] = Kind.ROUND
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Need]] = frozenset()
    zero_point: ClassVar[str | None] = "float"

    iterations: int = 20
    beta: float = 10.0
    kappa: float = 1.01
    p: float = 0.7
    round_zero: RoundZero = "auto"

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(0 <= self.iterations <= 10_000, "algo.iterations", self.iterations, "0 to 10000 (authors: 20)")
        require(0 < self.beta <= 1e6, "algo.beta", self.beta, "a number above 0, at most 1e6 (authors: 10)")
        require(1 <= self.kappa <= 10, "algo.kappa", self.kappa, "a factor from 1 to 10 (authors: 1.01)")
        require(0 < self.p <= 1, "algo.p", self.p, "a norm above 0, at most 1 (authors: 0.7)")
        for fmt in formats:
            accepted = "int, of 2 to 8 bits with zero points: those are what hqq fits"
            require(isinstance(fmt.element, Int), "format", fmt.element.name, accepted)
            require(
                fmt.zero == "float",
                "zero_point",
                fmt.zero,
                f"float, with symmetric=false (now {fmt.label}): hqq fits the zero points of asymmetric integers",
            )

    def apply(self, view: BlockView) -> Outcome:
        options = {name: getattr(self, name) for name in self.options()}
        codes, metrics = {}, []
        for group in view.groups:
            for ref in group.weights:
                fmt = view.format(ref)
                options["round_zero"] = fmt.bits == 4 if self.round_zero == "auto" else self.round_zero
                found = hqq(view.weight(ref).float(), fmt, clip=view.ranges.get(ref.name), **options)
                codes[ref.name] = found.weight
                metrics += [(ref.name, "hqq_error_vs_rtn", found.gain), (ref.name, "hqq_kept", found.kept)]
        return Outcome(codes=codes, metrics=tuple(metrics))
