"""One block as a differentiable function of its parameters, with everything quantized that is at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from qbench.engine.activations import InputQuantizer
from qbench.engine.kv import CacheHalf, CacheQuantizer
from qbench.engine.runtime import Runtime
from qbench.errors import StructureError
from qbench.structure.blocks import BlockCall
from qbench.structure.trace import BlockStructure

Student = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def make_student(
    block: nn.Module,
    structure: BlockStructure,
    inputs: Mapping[str, InputQuantizer],
    cache: CacheQuantizer | None,
    call_of: Callable[[Tensor], BlockCall],
) -> Student:
    """`student(parameters, hidden)`: what leaves `block` for hidden states [batch, length, features] when `parameters`
    (by path in the block; any tensors of the same shape) take the place of its own.

    inputs, by weight name, and cache are quantized as `Runtime` does, to the same values; their rounding has gradient
    1, saturation included. call_of(hidden) says how the block is called on them. Gradients reach `parameters` and
    `hidden` where they require them and nothing else: the block's own parameters count as constants, and neither they
    nor anything else of the block changes. It records gradients only where the caller lets it (`torch.enable_grad`).

    Raises StructureError for a path that is no parameter of the block, and what `Runtime` raises.
    """
    quantizers = {name: _Input(**_fields(quantizer)) for name, quantizer in inputs.items()}
    attention = None if cache is None else _Cache(cache)
    harness = _Harness(block)

    def student(parameters: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        own = {name: parameter.detach() for name, parameter in block.named_parameters()}
        if unknown := sorted(parameters.keys() - own.keys()):
            raise StructureError(f"{unknown[0]}: not a parameter of the block that could be replaced")
        replaced = {f"block.{name}": value for name, value in {**own, **parameters}.items()}

        def forward(current: nn.Module) -> Tensor:
            # A runtime knows weights by where they are stored: it is built on the parameters of this very forward.
            with Runtime(current, structure, quantizers, attention):
                return call_of(hidden)(current, hidden)

        return torch.func.functional_call(harness, replaced, (forward,))

    return student


class _Harness(nn.Module):
    """Runs any function of a block while `functional_call` has other parameters in the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.train(block.training)  # before the block is inside, whose modules keep the modes they have
        self.block = block

    def forward(self, function: Callable[[nn.Module], Tensor]) -> Tensor:
        return function(self.block)


class _Input(InputQuantizer):
    """The same values with the gradient of x."""

    def __call__(self, x: Tensor) -> Tensor:
        return _StraightThrough.apply(x, super().__call__) if x.numel() else x


class _Half(CacheHalf):
    """The same values with the gradient of x."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        return _StraightThrough.apply(x, super().fake_quantize) if x.numel() else x


class _Cache(CacheQuantizer):
    def __init__(self, cache: CacheQuantizer) -> None:
        self.format = cache.format
        self.keys, self.values = _Half(**_fields(cache.keys)), _Half(**_fields(cache.values))


class _StraightThrough(torch.autograd.Function):
    """quantize(x), exactly, with gradient 1; x itself isn't kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        return quantize(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _fields(value: InputQuantizer | CacheHalf) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}
