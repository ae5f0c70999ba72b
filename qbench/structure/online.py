"""Transforms of what weights read while their block runs: kept by the block, so that its copies have them too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qbench.errors import StructureError
from qbench.hadamard import decompose
from qbench.hadamard import hadamard as hadamard_matrix
from qbench.kernels.hadamard import hadamard
from qbench.structure.operations import LinearOperations


@runtime_checkable
class InputTransform(Protocol):
    """x `[..., features]` -> x T, in x's shape and dtype, computed in float32 at least; a frozen value."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class HadamardTransform:
    """x T with T = I (x) diag(signs) Hᵀ / sqrt(order) (x) I_inner, H = `qbench.hadamard.hadamard(order)`: orthogonal.

    Features count as [any, order, inner]: order = features is the whole width, order = head_dim every head by itself,
    order = heads with inner = head_dim the same channel of all heads. signs: ±1 `[order]`, None for all 1. Raises
    SpecError for an order without a Hadamard matrix.
    """

    order: int
    inner: int = 1
    signs: Tensor | None = None
    _bases: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)
    """The base matrix by device: it is small, and moving it for every forward is not."""

    def __post_init__(self) -> None:
        self._bases[torch.device("cpu")] = hadamard_matrix(decompose(self.order)[0])

    def __call__(self, x: Tensor) -> Tensor:
        y = self._outermost(x)
        if self.signs is not None:
            y = y * self.signs.to(y)
        return self._restored(hadamard(y, self._base(x.device)), x)

    def inverse(self, y: Tensor) -> Tensor:
        """x of y = x T."""
        x = hadamard(self._outermost(y), self._base(y.device).mT)
        if self.signs is not None:
            x = x * self.signs.to(x)
        return self._restored(x, y)

    def _base(self, device: torch.device) -> Tensor:
        if device not in self._bases:
            self._bases[device] = next(iter(self._bases.values())).to(device)
        return self._bases[device]

    def _outermost(self, x: Tensor) -> Tensor:
        y = x.unflatten(-1, (-1, self.order, self.inner))
        return y.squeeze(-1) if self.inner == 1 else y.mT

    def _restored(self, y: Tensor, like: Tensor) -> Tensor:
        return (y if self.inner == 1 else y.mT).reshape(like.shape)


@dataclass(frozen=True, eq=False)
class MatrixTransform:
    """x T with T = P diag(M_1 … M_k): features are permuted (y_j = x_permutation[j]), then each b of them multiply a
    matrix.

    matrix: `[b, b]`, the same for all blocks (b = features: one dense matrix), or `[k, b, b]`. permutation: int64
    `[features]`, None for none.
    """

    matrix: Tensor
    permutation: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = x if self.permutation is None else x[..., self.permutation.to(x.device)]
        y = y.to(dtype).unflatten(-1, (-1, self.matrix.shape[-1]))
        matrix = self.matrix.to(x.device, dtype)
        y = y @ matrix if matrix.ndim == 2 else (y.unsqueeze(-2) @ matrix).squeeze(-2)
        return y.reshape(x.shape).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Chain:
    """One transform after the other."""

    parts: tuple[InputTransform, ...]

    def __call__(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def plain(transform: InputTransform) -> dict[str, object]:
    """Plain values and tensors, for a file; `from_plain` reads them. StructureError for a type of another module."""
    kind = type(transform).__name__
    if kind not in _kinds():
        raise StructureError(f"online transform {kind}: one of {', '.join(_kinds())} can be stored")
    if isinstance(transform, Chain):
        return {"kind": kind, "parts": [plain(part) for part in transform.parts]}
    return {"kind": kind} | {f.name: getattr(transform, f.name) for f in fields(transform) if f.init}


def from_plain(values: Mapping[str, object]) -> InputTransform:
    """Inverse of `plain`."""
    own = dict(values)
    kind = own.pop("kind")
    return Chain(tuple(map(from_plain, own["parts"]))) if kind == "Chain" else _kinds()[kind](**own)


def _kinds() -> dict[str, type]:
    return {kind.__name__: kind for kind in (HadamardTransform, MatrixTransform, Chain)}


def attach(block: nn.Module, name: str, transform: InputTransform) -> Callable[[], None]:
    """From now on the weight called `name` multiplies transform(x) where it multiplied x; returns what undoes it.

    name: `WeightRef.name`, or the path of the module that owns a weight alone. On top of an earlier transform: then x
    passes that first. Deep copies of the block have it too, and whoever intercepts linear operations (traces, taps,
    run-time quantization) sees the transformed input. The weight itself stays as it is. Raises StructureError for a
    name that is no weight's; a forward that reads all experts in one operation raises it later.
    """
    module, key = _weight(block, name)
    old = _online(module)
    inputs = dict(old.inputs) if old is not None else {}
    inputs[key] = Chain((inputs[key], transform)) if key in inputs else transform
    return _replace(module, inputs, old.attention if old is not None else None)


def attach_to_attention(block: nn.Module, transform: HadamardTransform) -> Callable[[], None]:
    """From now on attention in `block` sees queries and keys transformed, behind the rotary embedding: an orthogonal T
    leaves every score as it is. Returns what undoes it."""
    old = _online(block)
    return _replace(block, dict(old.inputs) if old is not None else {}, transform)


def attached(block: nn.Module) -> dict[str, InputTransform]:
    """Transforms of inputs by weight name."""
    found: dict[str, InputTransform] = {}
    for path, module in block.named_modules():
        online = _online(module)
        for (name, index), transform in online.inputs.items() if online is not None else ():
            parameter = f"{path}.{name}" if path else name
            found[parameter if index is None else f"{parameter}[{index}]"] = transform
    return found


def attached_to_attention(block: nn.Module) -> HadamardTransform | None:
    """The transform of queries and keys."""
    online = _online(block)
    return online.attention if online is not None else None


@contextmanager
def attached_instead(block: nn.Module, transforms: Mapping[str, InputTransform]) -> Iterator[None]:
    """`block` with exactly these transforms of inputs, by weight name, in place of its own; undone on leaving."""
    with ExitStack() as stack:
        for module in block.modules():
            online = _online(module)
            if online is not None:
                stack.callback(_replace(module, {}, online.attention))
        for name, transform in transforms.items():
            stack.callback(attach(block, name, transform))
        yield


def _weight(block: nn.Module, name: str) -> tuple[nn.Module, tuple[str, int | None]]:
    """The owner of a weight, and the weight's key in it."""
    parameter, _, index = name.removesuffix("]").partition("[")
    owner, _, own = parameter.rpartition(".")
    for path, candidate in ((owner, own), (parameter, "weight")):
        try:
            module = block.get_submodule(path)
        except AttributeError:
            continue
        value = module._parameters.get(candidate)
        if value is not None and value.ndim == (3 if index else 2):
            return module, (candidate, int(index) if index else None)
    raise StructureError(f"{name}: not a linear weight of {type(block).__name__}, so its input cannot be transformed")


class _Online:
    """A module's forward with transforms, called in place of its class's own.

    It holds the module by reference and not by a closure: deep copies then hold the copied module.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: dict[tuple[str, int | None], InputTransform],
        attention: HadamardTransform | None,
    ) -> None:
        self.module, self.inputs, self.attention = module, inputs, attention
        functools.update_wrapper(self, type(module).forward.__get__(module))  # models inspect the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Interception(self):
            return type(self.module).forward(self.module, *args, **kwargs)


class _Interception(TorchFunctionMode):
    """Replaces what linear operations and attention read during one forward.

    Weights are known by their addresses during this forward: they may have been replaced since the last.
    """

    def __init__(self, online: _Online) -> None:
        super().__init__()
        self._online = online
        self._operations = LinearOperations(online.module) if online.inputs else None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._online.attention is not None:
            args, kwargs = _with_rotated_scores(args, kwargs, self._online.attention)
        for use in self._operations.uses(func, args, kwargs) if self._operations is not None else ():
            transform = self._online.inputs.get((use.parameter, use.index))
            if transform is not None:
                if use.batched:
                    raise StructureError(f"{use.parameter}: all experts in one operation, whose inputs cannot differ")
                x, y = use.x, transform(use.x)
                args = tuple(y if value is x else value for value in args)
                kwargs = {name: y if value is x else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _with_rotated_scores(
    args: tuple[Any, ...], kwargs: dict[str, Any], transform: HadamardTransform
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    positional = [transform(value) if position < 2 else value for position, value in enumerate(args)]
    named = {name: transform(value) if name in ("query", "key") else value for name, value in kwargs.items()}
    return tuple(positional), named


def _online(module: nn.Module) -> _Online | None:
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, _Online) else None


def _replace(
    module: nn.Module, inputs: dict[tuple[str, int | None], InputTransform], attention: HadamardTransform | None
) -> Callable[[], None]:
    """Gives the module this forward, or its own where nothing is transformed; returns what undoes it."""
    old = module.__dict__.pop("forward", None)
    if inputs or attention is not None:
        module.forward = _Online(module, inputs, attention)

    def undo() -> None:
        module.__dict__.pop("forward", None)
        if old is not None:
            module.forward = old

    return undo
