"""Recognizes the linear operations of a forward and which weights of a block they read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LinearUse:
    """One weight read by one linear operation: `x @ weight.T`."""

    parameter: str
    """Path of the weight's parameter in the block."""
    index: int | None
    """Expert slice of a 3-D parameter, or None."""
    transposed: bool
    """Whether the parameter stores `[in, out]`."""
    x: Tensor
    """The input, `[..., in_features]`."""
    bias: str | None
    """Path of the bias that the same operation adds, or None."""
    batched: bool = False
    """Whether the operation reads a whole expert parameter: its result stacks one output per expert."""


@dataclass(frozen=True)
class _Signature:
    """Where a linear function takes its input, weight and bias: (position, keyword) each."""

    x: tuple[int, str]
    weight: tuple[int, str]
    bias: tuple[int, str] | None = None
    transposed: bool = True
    """Whether the function expects the weight as `[in, out]`."""


# Functions and not module types: what a module is called says nothing about what it computes.
_SIGNATURES: Mapping[Callable[..., Any], _Signature] = {
    F.linear: _Signature((0, "input"), (1, "weight"), (2, "bias"), transposed=False),
    torch.addmm: _Signature((1, "mat1"), (2, "mat2"), (0, "input")),
    Tensor.addmm: _Signature((1, "mat1"), (2, "mat2"), (0, "input")),
    torch.mm: _Signature((0, "input"), (1, "mat2")),
    Tensor.mm: _Signature((0, "input"), (1, "mat2")),
    torch.matmul: _Signature((0, "input"), (1, "other")),
    Tensor.matmul: _Signature((0, "input"), (1, "other")),
    Tensor.__matmul__: _Signature((0, "input"), (1, "other")),
    torch.bmm: _Signature((0, "input"), (1, "mat2")),
    Tensor.bmm: _Signature((0, "input"), (1, "mat2")),
}


@dataclass(frozen=True)
class _Stored:
    """A matrix or 3-D parameter of the block, or one slice of the latter."""

    parameter: str
    index: int | None
    value: Tensor


class LinearOperations:
    """Finds the weights of one block among the operands of functions, by where they are stored.

    The views that modules make on the way to an operation (a transpose, one expert's slice) keep the address,
    so address, shape and strides say which weight is meant. Addresses are taken once, at construction:
    parameters may be rewritten in place afterwards, but not replaced or moved. Where a call replaces vectors of the
    block by others, `vectors` are those, by path: else a bias among them would be nobody's.
    """

    def __init__(self, block: nn.Module, vectors: Mapping[str, Tensor] | None = None) -> None:
        self._stored: dict[int, list[_Stored]] = {}
        self._biases: dict[int, str] = {}
        for name, parameter in block.named_parameters():
            value = parameter.detach()
            if not value.is_floating_point():
                continue
            if value.ndim == 1:
                self._biases[value.data_ptr()] = name
            elif value.ndim in (2, 3):
                self._store(_Stored(name, None, value))
                if value.ndim == 3:
                    for index, matrix in enumerate(value.unbind(0)):
                        self._store(_Stored(name, index, matrix))
        self._biases |= {value.data_ptr(): name for name, value in (vectors or {}).items()}

    def _store(self, stored: _Stored) -> None:
        self._stored.setdefault(stored.value.data_ptr(), []).append(stored)

    def uses(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[LinearUse]:
        """The block's weights that the call `func(*args, **kwargs)` reads as linear weights: mostly none.

        A batched product with a whole `[experts, ...]` parameter reads one weight per expert, in order.
        """
        signature = _SIGNATURES.get(func)
        if signature is None:
            return []
        operand = _argument(signature.weight, args, kwargs)
        found = self._find(operand, signature.transposed)
        if found is None:
            return []
        stored, transposed = found
        x = _argument(signature.x, args, kwargs)
        bias = None if signature.bias is None else _argument(signature.bias, args, kwargs)
        bias_name = None if bias is None else self._biases.get(bias.data_ptr())
        if stored.value.ndim == 2:
            return [
                LinearUse(parameter=stored.parameter, index=stored.index, transposed=transposed, x=x, bias=bias_name)
            ]
        return [
            LinearUse(
                parameter=stored.parameter,
                index=index,
                transposed=transposed,
                x=part,
                bias=None,
                batched=True,
            )
            for index, part in enumerate(x.unbind(0))
        ]

    def _find(self, operand: Tensor, function_transposed: bool) -> tuple[_Stored, bool] | None:
        """What is stored at the operand's address with its shape, and whether it is stored as `[in, out]`."""
        for stored in self._stored.get(operand.data_ptr(), ()):
            for flipped, view in ((False, stored.value), (True, stored.value.mT)):
                if view.shape == operand.shape and view.stride() == operand.stride():
                    return stored, flipped != function_transposed
        return None


def _argument(where: tuple[int, str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    position, keyword = where
    return args[position] if position < len(args) else kwargs.get(keyword)
