"""Runs a block in float64 without copying it: what its linear operations answer is up to the caller."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qbench.structure.blocks import BlockCall, output_of
from qbench.structure.operations import LinearOperations, LinearUse
from qbench.structure.trace import BlockStructure
from qbench.structure.weights import WeightRef


def run_exactly(
    block: nn.Module,
    call: BlockCall,
    hidden: Tensor,
    structure: BlockStructure,
    *,
    matrix: Callable[[WeightRef, Tensor], Tensor],
    vector: Callable[[str, Tensor], Tensor],
) -> Tensor:
    """Hidden states that leave `block` when it computes in float64, `[batch, tokens, features]`.

    `matrix(ref, weight)` and `vector(path, value)` may give changed values of the float64 weight `[out, in]`
    and of the parameters with one dimension; they must leave their arguments alone. One weight is widened at
    a time, so that a block of any size fits.
    """
    weights = [ref for group in structure.groups for ref in group.weights] + list(structure.routers)
    refs = {(ref.parameter, ref.index): ref for ref in weights}
    fixed = float64_values(block, {ref.parameter for ref in weights})
    vectors = {name for name, value in block.named_parameters() if value.ndim == 1}
    values = {name: vector(name, value) if name in vectors else value for name, value in fixed.items()}

    def compute(use: LinearUse) -> Tensor:
        ref = refs[use.parameter, use.index]
        y = use.x.double() @ matrix(ref, ref.read(block).double()).mT
        return y if use.bias is None else y + values[use.bias]

    operations = LinearOperations(block, {name: value for name, value in values.items() if name in vectors})
    with LinearReplacement(operations, compute):
        return call_with(block, call.to(dtype=torch.float64), hidden.double(), values)


class LinearReplacement(TorchFunctionMode):
    """Answers the block's linear operations by `compute(use)`, `[..., out_features]`, bias included."""

    def __init__(self, operations: LinearOperations, compute: Callable[[LinearUse], Tensor]) -> None:
        super().__init__()
        self._operations, self._compute = operations, compute

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        uses = self._operations.uses(func, args, kwargs or {})
        if not uses:
            return func(*args, **(kwargs or {}))
        outputs = [self._compute(use) for use in uses]
        return torch.stack(outputs) if uses[0].batched else outputs[0]


def float64_values(block: nn.Module, linear: set[str]) -> dict[str, Tensor]:
    """Float64 values, by path, of floating-point buffers and parameters except those of linear weights."""
    named = [*block.named_parameters(), *block.named_buffers()]
    return {name: value.detach().double() for name, value in named if value.is_floating_point() and name not in linear}


def call_with(block: nn.Module, call: BlockCall, hidden: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Hidden states that leave `block` when `values` stand for its parameters and buffers of those paths."""
    args, kwargs = call.arguments(hidden)
    with torch.no_grad():
        return output_of(torch.func.functional_call(block, dict(values), args, kwargs))
