"""The residual stream of a block: which weights read it, which write into it, and how values reach the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qbench.errors import StructureError
from qbench.structure.blocks import BlockCall
from qbench.structure.float64 import LinearReplacement, call_with, float64_values
from qbench.structure.folds import Fold, find_folds
from qbench.structure.norms import Norm, recognize_norm
from qbench.structure.operations import LinearOperations, LinearUse
from qbench.structure.trace import BlockStructure, trace_block
from qbench.structure.weights import WeightRef

# What is not rounding, relative: blocks may compute in float32 along the way.
_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class ValuePath:
    """Values to output: attention mixes tokens with the same factors for all channels of a head."""

    value: WeightRef
    rows: Tensor = field(compare=False)
    """int64 `[kv heads * head_dim]`: rows of `value`'s weight, head by head."""
    output: WeightRef
    head_dim: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.output.in_features // self.head_dim


@dataclass(frozen=True, kw_only=True)
class StreamSites:
    """What one block does with the residual stream; the same for every block of its shape."""

    structure: BlockStructure
    width: int
    readers: tuple[WeightRef, ...]
    """Weights whose input follows from the stream without other weights in between, routers included."""
    writers: tuple[WeightRef, ...]
    """Weights whose output is added to the stream."""
    norms: Mapping[str, Norm]
    """By reader: the norm behind which it reads the stream; absent for a reader without one."""
    values: ValuePath | None
    key_dim: int | None
    """Channels of a query and key head; None where attention is not computed by torch's function."""

    @property
    def centred(self) -> bool:
        """Whether norms subtract the mean of the stream."""
        return any(norm.centred for norm in self.norms.values())

    @property
    def downs(self) -> tuple[WeightRef, ...]:
        """Writers other than the attention's output."""
        output = self.values.output if self.values is not None else None
        groups = {ref: group for group in self.structure.groups for ref in group.weights}
        return tuple(ref for ref in self.writers if ref != output and ref not in self.readers and ref in groups)


def find_stream_sites(block: nn.Module, call: BlockCall, hidden: Tensor) -> StreamSites:
    """The sites of `block`, from forwards on `hidden` `[batch, tokens, width]` with noise in place of linear outputs.

    StructureError where the block's structure cannot be found.
    """
    structure = trace_block(block, call, hidden)
    folds = find_folds(block, call, hidden, structure)
    noise = _Noise(block, call, hidden, structure)
    readers = noise.readers()
    norms = {}
    for fold in folds:
        if fold.kind == "norm" and all(ref in readers for ref in fold.consumers):
            norm = recognize_norm(block, fold.producer[0].parameter.rpartition(".")[0])
            norms |= {ref.name: norm for ref in fold.consumers}
    key_dim, value_dim = _head_dims(block, call, hidden)
    return StreamSites(
        structure=structure,
        width=hidden.shape[-1],
        readers=readers,
        writers=noise.writers(),
        norms=norms,
        values=_value_path(folds, noise, value_dim),
        key_dim=key_dim,
    )


def require_addition(block: nn.Module, call: BlockCall, hidden: Tensor, sites: StreamSites) -> None:
    """StructureError, naming the weight, where what a writer writes is not merely added to the stream."""
    noise = _Noise(block, call, hidden, sites.structure)
    for ref in sites.writers:
        if not noise.is_additive(ref.parameter):
            raise StructureError(
                f"the output of {ref.name} passes a norm before it joins the residual stream, so the stream cannot be "
                "rotated"
            )


class _Noise:
    """Float64 forwards of a block whose linear weights answer noise: what they read no longer matters."""

    def __init__(self, block: nn.Module, call: BlockCall, hidden: Tensor, structure: BlockStructure) -> None:
        self._block, self._call = block, call.to(dtype=torch.float64)
        self._hidden, self._width = hidden.detach().double(), hidden.shape[-1]
        weights = [ref for group in structure.groups for ref in group.weights]
        self._weights, self._routers = weights, structure.routers
        self._refs = {(ref.parameter, ref.index): ref for ref in (*weights, *structure.routers)}
        self._ordinals = {key: ordinal for ordinal, key in enumerate(self._refs)}
        self._operations = LinearOperations(block)
        self._fixed = float64_values(block, {ref.parameter for ref in self._refs.values()})

    def readers(self) -> tuple[WeightRef, ...]:
        """Weights whose input another stream changes; slices of one parameter read alike."""
        _, before = self._run(self._hidden, {})
        _, after = self._run(self._hidden.flip(-1), {})
        read = {key[0] for key, x in before.items() if key in after and not torch.equal(x, after[key])}
        return tuple(ref for ref in self._refs.values() if ref.parameter in read)

    def writers(self) -> tuple[WeightRef, ...]:
        """Weights as wide as the stream whose output changes what leaves the block."""
        base, _ = self._run(self._hidden, {})
        wide = {ref.parameter for ref in self._weights if ref.out_features == self._width}
        written = {name for name in wide if not torch.equal(self._run(self._hidden, {name: (1,)})[0], base)}
        return tuple(ref for ref in self._weights if ref.parameter in written)

    def is_additive(self, parameter: str) -> bool:
        """Whether the block's output is linear in what the weights of one parameter write."""
        nothing, one, other, both = (
            self._run(self._hidden, {parameter: seeds})[0] for seeds in ((), (0,), (1,), (0, 1))
        )
        size = (both - nothing).abs().max()
        return bool(((both - one) - (other - nothing)).abs().max() <= _TOLERANCE * size)

    def mixes_heads(self, path: ValuePath) -> bool:
        """Whether a rotation of every head of values is the same rotation of every head of the output's input."""
        generator = torch.Generator().manual_seed(0)
        square = torch.randn(path.head_dim, path.head_dim, generator=generator, dtype=torch.float64)
        rotation = torch.linalg.qr(square)[0].to(self._hidden.device)

        def rotated(x: Tensor) -> Tensor:
            return (x.unflatten(-1, (-1, path.head_dim)) @ rotation).flatten(-2)

        def change(y: Tensor) -> Tensor:
            rows = path.rows.to(y.device)
            y = y.clone()
            y[..., rows] = rotated(y[..., rows])
            return y

        key = (path.output.parameter, path.output.index)
        before = self._run(self._hidden, {})[1][key]
        after = self._run(self._hidden, {}, {path.value.parameter: change})[1][key]
        return bool((after - rotated(before)).abs().max() <= _TOLERANCE * before.abs().max())

    def _run(
        self,
        hidden: Tensor,
        seeds: Mapping[str, tuple[int, ...]],
        changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> tuple[Tensor, dict[tuple[str, int | None], Tensor]]:
        """Output, and each weight's input; `seeds`: which noises a parameter's weights answer in sum, (0,) elsewhere;
        `changes`: what is done to the sum."""
        inputs: dict[tuple[str, int | None], Tensor] = {}

        def compute(use: LinearUse) -> Tensor:
            key = (use.parameter, use.index)
            inputs[key] = use.x.detach()
            shape = (*use.x.shape[:-1], self._refs[key].out_features)
            total = torch.zeros(shape, dtype=torch.float64)
            for seed in seeds.get(use.parameter, (0,)):
                generator = torch.Generator().manual_seed(2 * self._ordinals[key] + seed)
                total += torch.randn(shape, generator=generator, dtype=torch.float64)
            total = total.to(use.x.device)
            return changes[use.parameter](total) if changes and use.parameter in changes else total

        with LinearReplacement(self._operations, compute):
            return call_with(self._block, self._call, hidden, self._fixed), inputs


class _HeadDims(TorchFunctionMode):
    """Notes the channels of a head of keys and of values in calls of torch's attention."""

    key: int | None = None
    value: int | None = None

    def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            tensors = [*args[:3], *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
            self.key, self.value = tensors[1].shape[-1], tensors[2].shape[-1]
        return func(*args, **kwargs)


def _head_dims(block: nn.Module, call: BlockCall, hidden: Tensor) -> tuple[int | None, int | None]:
    """Of keys and of values; where attention is computed otherwise, of values what a module says (to be proved)."""
    with torch.no_grad(), _HeadDims() as found:
        call(block, hidden)
    told = [module.head_dim for module in block.modules() if isinstance(getattr(module, "head_dim", None), int)]
    return found.key, found.value if found.value is not None else next(iter(told), None)


def _value_path(folds: tuple[Fold, ...], noise: _Noise, head_dim: int | None) -> ValuePath | None:
    """The fold whose channels, head by head, are one head of rows in order, and can be mixed within a head."""
    for fold in folds:
        if fold.kind != "linear" or head_dim is None or len(fold.consumers) != 1 or len(fold.channels) % head_dim:
            continue
        heads = fold.channels.view(-1, head_dim)
        part = next(part for part in fold.producer if part.weight is not None)
        in_order = torch.equal(heads, heads[:, :1] + torch.arange(head_dim)) and not bool(
            (heads[:, 0] % head_dim).any()
        )
        path = ValuePath(value=part.weight, rows=part.rows, output=fold.consumers[0], head_dim=head_dim)
        if in_order and noise.mixes_heads(path):
            return path
    return None
