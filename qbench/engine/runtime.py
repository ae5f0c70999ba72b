"""Quantization that happens while a block runs: inputs of its linear operations, keys and values of its attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qbench.engine.activations import InputQuantizer
from qbench.engine.input_statistics import CacheTap, InputStatistics, observer
from qbench.engine.kv import CacheQuantizer, CacheRanges
from qbench.engine.streams import Stream
from qbench.errors import StructureError
from qbench.formats.scheme import CacheFormat, InputFormat
from qbench.structure.online import attached
from qbench.structure.operations import LinearOperations, LinearUse
from qbench.structure.trace import BlockStructure, LinearGroup, LinearTap
from qbench.structure.weights import WeightRef

NO_ATTENTION = (
    "the block does not call scaled_dot_product_attention, so its keys and values cannot be quantized; "
    "a model that computes attention otherwise takes kv_bits=16 only"
)


@dataclass(frozen=True)
class _Memo:
    """The last quantized input. `x` is kept so that no other tensor gets its address."""

    key: tuple[object, ...]
    quantizer: InputQuantizer
    x: Tensor
    result: Tensor


class Runtime(TorchFunctionMode):
    """One block with quantized linear inputs and a quantized cache, usable for any number of forwards.

    It is entered around each forward, outside a `LinearTap`, which then sees the inputs as they are before
    quantization: `with runtime, LinearTap(...)`. `inputs` goes by weight name; weights without one (routers always)
    multiply what they are given. It knows weights by their addresses: built after they are in place, useless once they
    are moved. Entered by several threads at once it is still right, as long as one of them runs at a time.

    Raises StructureError for an input of a weight that the structure doesn't quantize and, on leaving a forward, where
    something it should have quantized was never used: no result looks quantized without being so.
    """

    def __init__(
        self,
        block: nn.Module,
        structure: BlockStructure,
        inputs: Mapping[str, InputQuantizer],
        cache: CacheQuantizer | None = None,
    ) -> None:
        super().__init__()
        _groups_of(structure, inputs)
        refs = {ref.name: ref for group in structure.groups for ref in group.weights}
        self._operations = LinearOperations(block)
        self._quantizers = {(refs[name].parameter, refs[name].index): q for name, q in _shared(inputs).items()}
        self._cache = cache
        self._memo: _Memo | None = None
        # Experts may go without tokens; everything else is used by every forward.
        self._unused = {key[0] for key in self._quantizers if key[1] is None}
        self._attended = False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        self._memo = None
        if kind is not None:
            return
        if self._unused:
            raise StructureError(
                f"{min(self._unused)}: this forward used it at another address, so its input was not quantized; "
                "weights must not be replaced or moved once the block is set up"
            )
        if self._cache is not None and not self._attended:
            raise StructureError(NO_ATTENTION)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._cache is not None:
            self._attended = True
            return self._cache.attention(*args, **kwargs)
        if self._memo is not None and _writes(func, kwargs):
            self._memo = None
        uses = self._operations.uses(func, args, kwargs)
        if any((use.parameter, use.index) in self._quantizers for use in uses):
            x, quantized = self._quantized(uses, args, kwargs)
            args = tuple(quantized if value is x else value for value in args)
            kwargs = {name: quantized if value is x else value for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _quantized(self, uses: list[LinearUse], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The operation's input operand and what takes its place."""
        self._unused -= {use.parameter for use in uses}
        if not uses[0].batched:
            return uses[0].x, self._remembered(self._quantizers[uses[0].parameter, uses[0].index], uses[0].x)
        parts = []
        for use in uses:  # experts in one operation: every part by its own expert's quantizer
            quantizer = self._quantizers.get((use.parameter, use.index))
            parts.append(use.x if quantizer is None else quantizer(use.x))
        shape, address = (len(uses), *uses[0].x.shape), uses[0].x.data_ptr()
        operands = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        x = next(value for value in operands if value.shape == shape and value.data_ptr() == address)
        return x, torch.stack(parts)

    def _remembered(self, quantizer: InputQuantizer, x: Tensor) -> Tensor:
        """quantizer(x), computed once for consecutive reads of one input: query, key and value; gate and up."""
        key, memo = _reading(x), self._memo
        if memo is None or memo.quantizer is not quantizer or memo.key != key:
            memo = self._memo = _Memo(key, quantizer, x, quantizer(x))
        return memo.result.reshape(x.shape)


@contextmanager
def install(block: nn.Module, runtime: Runtime) -> Iterator[None]:
    """Every forward of `block` runs inside `runtime`, whoever calls it and however; undone on leaving."""
    own = block.__dict__.get("forward")
    original = block.forward

    @functools.wraps(original)  # whoever inspects the signature finds the block's
    def forward(*args: Any, **kwargs: Any) -> Any:
        with runtime:
            return original(*args, **kwargs)

    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


@torch.no_grad()
def calibrate(
    block: nn.Module,
    index: int,
    structure: BlockStructure,
    stream: Stream | None,
    formats: Mapping[str, InputFormat],
    cache: CacheFormat | None,
) -> tuple[dict[str, InputQuantizer], CacheQuantizer | None]:
    """Quantizers of block number `index`: of linear inputs by weight name, as `formats`, and of the cache.

    What depends on calibration text (static ranges; the tensor scale of NVFP4, from the largest magnitude) is taken
    from one trip of the stream's chunks through the block as it is, with nothing quantized at run time in this block;
    the stream stays where it is. Where nothing depends on it nothing runs, and `stream` may be None. Weights that read
    the same input in the same format get the same quantizer.

    The sequences of a moving average are those of the stream; where an input does not hold all tokens (an expert's),
    what one chunk gives counts as a sequence. An expert that gets no calibration token takes the union of the ranges of
    the others. Raises NumericsError where none gets any and where inputs are not finite.
    """
    structure = _divided(block, structure)
    groups = _groups_of(structure, formats)
    device = next(block.parameters()).device
    pairs = {(groups[name].index, fmt): groups[name] for name, fmt in formats.items()}
    inputs = {pair: InputStatistics(group, pair[1], device) for pair, group in pairs.items()}
    kv = CacheRanges(cache) if cache is not None and cache.needs_data else None
    if kv is not None or any(fmt.needs_data for fmt in formats.values()):
        assert stream is not None, "the scheme needs calibration text"
        for chunk in stream.chunks:
            with LinearTap(block, structure, observer(inputs, chunk)), CacheTap(kv):
                stream.call(index, chunk)(block, chunk)
    found = {
        pair: statistics.quantizer(f"block {index}, input of {statistics.group.weights[0].name}", inputs.values())
        for pair, statistics in inputs.items()
    }
    quantizers = {name: found[groups[name].index, fmt] for name, fmt in formats.items()}
    if cache is None:
        return quantizers, None
    return quantizers, CacheQuantizer(cache, *(kv.params() if kv is not None else ()))


def _divided(block: nn.Module, structure: BlockStructure) -> BlockStructure:
    """The structure with a group for each transform that the block puts before some of a group's weights: those that
    stay in full precision may read the plain input beside quantized ones that read a rotated one."""
    online = attached(block)
    groups: list[LinearGroup] = []
    for group in structure.groups:
        parts: dict[int, list[WeightRef]] = {}
        for ref in group.weights:
            parts.setdefault(id(online.get(ref.name)), []).append(ref)
        groups += [replace(group, weights=tuple(refs)) for refs in parts.values()]
    return replace(structure, groups=tuple(replace(group, index=k) for k, group in enumerate(groups)))


def _groups_of(structure: BlockStructure, names: Iterable[str]) -> dict[str, LinearGroup]:
    """The groups of the weights with these names; StructureError for a weight that is never quantized (a router) or
    does not exist."""
    groups = {ref.name: group for group in structure.groups for ref in group.weights}
    if unknown := sorted(set(names) - groups.keys()):
        raise StructureError(f"{unknown[0]}: not a linear weight of this block that can be quantized, nor its input")
    return {name: groups[name] for name in names}


def _shared(inputs: Mapping[str, InputQuantizer]) -> dict[str, InputQuantizer]:
    """The same with one object for all quantizers that do the same, so that their results can be shared."""
    first: dict[tuple[object, ...], InputQuantizer] = {}
    return {
        name: first.setdefault((q.format, id(q.params), id(q.outer)), q)  # None is one object too
        for name, q in inputs.items()
    }


def _reading(x: Tensor) -> tuple[object, ...]:
    """Equal for two reshapings of the same values while both are alive, and different after a change in place.

    Inference tensors count no changes: see `_writes`.
    """
    layout = x.shape[-1] if x.is_contiguous() else (x.shape, x.stride())
    return x.data_ptr(), x.dtype, x.numel(), layout, 0 if x.is_inference() else x._version


def _writes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the function may change one of its arguments in place, by torch's naming."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    operator = name.startswith("__i") or name in ("__set__", "__setitem__")
    return in_place or operator or kwargs.get("out") is not None or bool(kwargs.get("inplace"))
