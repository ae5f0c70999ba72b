"""GPTAQ (arXiv 2504.02692): GPTQ towards the outputs that the full-precision model has on its own inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from qbench.calibration.statistics import CrossMoment, Hessian
from qbench.errors import StructureError
from qbench.formats import Range, TensorFormat
from qbench.stages.base import BlockView, Need, Outcome, WeightShape, require
from qbench.stages.gptq_core import GptqResult, toward_full
from qbench.stages.round_gptq import Gptq

#: Why quantized experts are refused.
EXPERTS = (
    "gptaq compares both streams token by token, which may bring an expert different ones; "
    "algo=gptq, or overrides that leave experts in full precision"
)


@dataclass(frozen=True, kw_only=True)
class Gptaq(Gptq):
    """GPTQ minimizes E‖Q x - W x‖² on inputs x behind quantized layers; this one E‖Q x - W x_full‖², x_full being the
    untouched model's input at the same token. `alpha` takes a share of the drift into account: 0 is GPTQ bit for bit,
    1 the paper's equations, 0.25 the authors' code.

    residual: "running" hands the drift's output on column by column between roundings (the paper); "upfront" moves the
    weight to the least-squares optimum first and rounds that with GPTQ.
    """

    name: ClassVar[str] = "gptaq"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need(Hessian, "quantized"), Need(CrossMoment, "quantized")})

    alpha: float = 0.25
    residual: Literal["running", "upfront"] = "running"

    def check(self, formats: frozenset[TensorFormat]) -> None:
        super().check(formats)
        require(0 <= self.alpha <= 1, "algo.alpha", self.alpha, "a share of the drift from 0 to 1 (authors: 0.25)")
        require(
            self.alpha > 0 or self.residual == "running",
            "algo.residual",
            self.residual,
            "running with alpha=0, which is GPTQ and makes up for nothing",
        )

    def check_shapes(self, shapes: Sequence[WeightShape]) -> None:
        for shape in shapes:
            require(not shape.experts, "algo", self.name, f"{shape.name}: {EXPERTS}")

    def apply(self, view: BlockView) -> Outcome:
        """Raises StructureError for experts: the streams may bring one as many tokens, and yet different ones."""
        experts = [ref.name for group in view.structure.groups for ref in group.weights if ref.index is not None]
        if experts:
            raise StructureError(f"{view.where}, {experts[0]}: {EXPERTS}")
        return super().apply(view)

    def _solve(
        self, weight: Tensor, values: Mapping[type, Tensor], fmt: TensorFormat, clip: Range | None
    ) -> GptqResult:
        hessian, drift = values[Hessian], self.alpha * values[CrossMoment]
        if self.residual == "running":
            return self._gptq(weight, hessian, fmt, clip, drift)
        return self._gptq(toward_full(weight, hessian, drift, self.damp), hessian, fmt, clip)
