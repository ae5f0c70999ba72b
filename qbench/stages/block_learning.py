"""What stages that learn at one block share: learned weights in the block's parameters, and losses of its output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qbench.errors import NumericsError
from qbench.stages.base import BlockData, BlockView
from qbench.stages.training import gather
from qbench.structure.float64 import LinearReplacement
from qbench.structure.operations import LinearOperations, LinearUse
from qbench.structure.weights import WeightRef

Loss = Callable[[list[int]], Tensor]


def replaced_parameters(block: nn.Module, refs: Iterable[WeightRef], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The block's parameters, by path, in which `values` [out, in], by weight name, take the place of the weights
    `refs`: as the block stores them, in its dtype, with gradients to the values. Experts that are not among `refs`
    stay as they are."""
    whole: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for ref in refs:
        parameter = block.get_parameter(ref.parameter).detach()
        value = values[ref.name].to(parameter.dtype)
        value = value.mT if ref.transposed else value
        if ref.index is None:
            whole[ref.parameter] = value
        else:
            experts.setdefault(ref.parameter, list(parameter.unbind(0)))[ref.index] = value
    return whole | {path: torch.stack(slices) for path, slices in experts.items()}


def count_sequences(data: BlockData) -> int:
    """Calibration sequences at the block."""
    return sum(len(chunk) for chunk in data.inputs)


def block_loss(
    data: BlockData, parameters: Callable[[], Mapping[str, Tensor]], distance: Callable[[Tensor, Tensor], Tensor]
) -> Loss:
    """Loss of some sequences: `distance` between what the block with `parameters()`, by path, makes of them on the
    quantized stream and what the untouched one makes of them on the full-precision stream, both float32 [sequences,
    length, hidden]."""

    def loss(sequences: list[int]) -> Tensor:
        output = data.student(parameters(), gather(data.inputs, sequences))
        return distance(output.float(), gather(data.targets, sequences).float())

    return loss


def weights_loss(
    view: BlockView,
    refs: Iterable[WeightRef],
    value: Callable[[str], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
) -> Loss:
    """`block_loss` of the block whose weights `refs` are `value(name)`, float [out, in], with gradients to what they
    are computed from: not before a weight is used, once per use, and once more going backwards, so that never more than
    one of them exists. As the block stores them, in its dtype."""
    names = {(ref.parameter, ref.index): ref.name for ref in refs}
    own = {path: parameter.detach() for path, parameter in view.block.named_parameters()}

    def compute(use: LinearUse) -> Tensor:
        name = names.get((use.parameter, use.index))
        stored = own[use.parameter] if use.index is None else own[use.parameter][use.index]
        bias = None if use.bias is None else own[use.bias]

        def product(x: Tensor) -> Tensor:
            if name is not None:
                return F.linear(x, value(name).to(stored.dtype), bias)
            return F.linear(x, stored.mT if use.transposed else stored, bias)

        # Keeps x, and stops computing again where the product would be.
        return checkpoint(product, use.x, use_reentrant=False, preserve_rng_state=False)

    def loss(sequences: list[int]) -> Tensor:
        hidden, target = gather(view.data.inputs, sequences), gather(view.data.targets, sequences)
        with LinearReplacement(LinearOperations(view.block), compute):
            output = view.data.student({}, hidden)
        return distance(output.float(), target.float())

    return loss


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean of the squared differences over all elements."""
    return (output - target).square().mean()


@torch.no_grad()
def mean_loss(loss: Loss, data: BlockData, batch_size: int, where: str) -> float:
    """Mean loss per sequence over all of them, in minibatches. NumericsError where it is not finite."""
    count = count_sequences(data)
    batches = [list(range(k, min(k + batch_size, count))) for k in range(0, count, batch_size)]
    found = math.fsum(len(batch) * loss(batch).item() for batch in batches) / count
    if not math.isfinite(found):
        raise NumericsError(f"{where}: the loss of the quantized block's output is {found}")
    return found


def gain(after: float, before: float) -> float:
    """Loss relative to what it was; 1 where there was nothing to gain."""
    return after / before if before > 0 else 1.0
