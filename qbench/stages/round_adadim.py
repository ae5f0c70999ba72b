"""AdaDim (arXiv 2309.15531): groups along the inputs or along the outputs, whichever suits the layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from qbench.calibration.statistics import Hessian
from qbench.errors import SpecError, numerics_at
from qbench.formats import Block, QTensor, Range, TensorFormat, fit, quantize
from qbench.stages.base import BlockView, Kind, Need, Outcome, Stage, WeightShape, require
from qbench.stages.gptq_core import gptq

Solver = Literal["rtn", "gptq"]

DAMP = 0.01


@dataclass(frozen=True)
class AdaDimResult:
    """The better of two quantized weights, and the output errors tr(Δ H Δᵀ) of both: with groups along the inputs
    (`per_output`: scales belong to output channels) and along the outputs (`per_input`)."""

    weight: QTensor
    per_output: float
    per_input: float


def along_outputs(fmt: TensorFormat) -> TensorFormat:
    """`fmt` with as many weights to a scale, all of one input channel instead of one output channel: groups of n
    outputs for groups of n inputs, one scale per input for one per output. Q(W) is fmt's Q(Wᵀ)ᵀ."""
    return replace(fmt, block=Block(fmt.block.columns, 1), name=None)


def adadim(
    weight: Tensor,
    hessian: Tensor,
    fmt: TensorFormat,
    *,
    solver: Solver = "rtn",
    damp: float = DAMP,
    clip: Range | None = None,
) -> AdaDimResult:
    """Quantize `weight` (float32 [out, in]) in `fmt`, whose scales belong to parts of rows, and in `along_outputs`, and
    keep what changes the layer's output least: E‖Δx‖² = tr(Δ H Δᵀ) with hessian = E[x xᵀ], float32 [in, in] (the
    paper's equation 3). Equal errors (no token seen) keep `fmt`.

    solver: how each is rounded, to nearest or by GPTQ with `damp`. clip: ranges fitted to fmt's blocks.
    """

    def rounded(candidate: TensorFormat, ranges: Range | None) -> tuple[QTensor, float]:
        if solver == "gptq":
            found = gptq(weight, hessian, candidate, damp=damp, clip=ranges).weight
        else:
            found = quantize(weight, candidate, fit(weight, candidate, ranges))
        delta = found.dequantize() - weight
        return found, (delta @ hessian * delta).sum().item()

    (rows, per_output), (columns, per_input) = rounded(fmt, clip), rounded(along_outputs(fmt), None)
    return AdaDimResult(columns if per_input < per_output else rows, per_output, per_input)


@dataclass(frozen=True, kw_only=True)
class AdaDim(Stage):
    """Each weight by itself, on the quantized stream's Hessian."""

    name: ClassVar[str] = "adadim"
    kind: ClassVar[Kind] = Kind.ROUND
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need(Hessian, "quantized")})

    solver: Solver = "rtn"
    damp: float = DAMP

    def check(self, formats: frozenset[TensorFormat]) -> None:
        require(0 <= self.damp <= 10, "algo.damp", self.damp, "a share of mean(diag H) from 0 to 10 (authors: 0.01)")
        require(
            self.solver == "gptq" or self.damp == DAMP,
            "algo.damp",
            self.damp,
            f"{DAMP} with solver=rtn, which does not use it",
        )
        for fmt in formats:
            require(
                fmt.block.rows == 1,
                "group_size",
                fmt.block.label,
                "groups (> 0) or channels (-1) with adadim: tensors and tiles have no inputs or outputs to choose",
            )
            require(
                fmt.scale.name != "int8",
                "scale_dtype",
                fmt.scale.name,
                "another with adadim: steps of a row's int8 grid have no meaning along the outputs",
            )
            require(
                not fmt.scale.whole or self.solver == "rtn",
                "algo.solver",
                self.solver,
                f"rtn with {fmt.label}: its scales are quantized together, so that none is known before all are",
            )

    def check_shapes(self, shapes: Sequence[WeightShape]) -> None:
        for shape in shapes:
            require_fit(shape.format, shape.out_features, shape.name)

    def apply(self, view: BlockView) -> Outcome:
        codes: dict[str, QTensor] = {}
        metrics = []
        for group in view.groups:
            statistic = view.statistic(group, Hessian)
            hessian = statistic.value()
            for ref in group.weights:
                fmt = view.format(ref)
                require_fit(fmt, ref.out_features, f"{view.where}, {ref.name}")
                options = {"solver": self.solver, "damp": self.damp, "clip": view.ranges.get(ref.name)}
                with numerics_at(f"{view.where}, {ref.name} ({statistic.tokens} tokens)"):
                    found = adadim(view.weight(ref).float(), hessian, fmt, **options)
                codes[ref.name] = found.weight
                metrics += [(ref.name, "damp", self.damp)] if self.solver == "gptq" else []
                metrics.append((ref.name, "adadim_per_input", float(found.per_input < found.per_output)))
                ratio = found.per_input / found.per_output if found.per_output > 0 else 1.0
                metrics.append((ref.name, "adadim_error_per_input", ratio))
        return Outcome(codes=codes, metrics=tuple(metrics))


def require_fit(fmt: TensorFormat, rows: int, where: str) -> None:
    """Raises SpecError unless fmt's groups, laid along the outputs, tile that many rows or may leave a rest."""
    if not along_outputs(fmt).fits(1, rows):
        raise SpecError(
            "group_size",
            fmt.group_size,
            f"with algo=adadim a divisor of the {rows} outputs of {where} too, or partial_group=true",
        )
