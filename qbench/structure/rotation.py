"""Rotations of one block: of the residual stream, of values, of what the output and down weights read.

Row vectors: the stream h becomes h T with T orthogonal (behind norms that subtract the mean: of h - mean(h)), readers
W T, writers Tᵀ W. Everything is computed in float64 and cast once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from qbench.errors import StructureError
from qbench.structure.blocks import BlockCall
from qbench.structure.float64 import run_exactly
from qbench.structure.online import HadamardTransform, InputTransform, MatrixTransform, attach, attach_to_attention
from qbench.structure.stream import StreamSites
from qbench.structure.weights import WeightRef

OnlineOutput = Literal["heads", "full", "none"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotation:
    """What is to be rotated in a model.

    residual: the stream by "hadamard" (with random signs), "random" (uniform among orthogonal matrices) or an
    orthogonal matrix `[width, width]`. values: every head of values by a Hadamard matrix; `value_matrices`,
    orthogonal `[head_dim, head_dim]` by block number, take its place. online_down: a Hadamard transform in front of
    all writers but attention's output. online_o: in front of that one, across heads where a Hadamard matrix of as many
    exists ("heads") or over all channels ("full"). keys: queries and keys behind the rotary embedding.
    """

    residual: Literal["hadamard", "random"] | Tensor | None
    values: bool = True
    value_matrices: Mapping[int, Tensor] = field(default_factory=dict)
    online_down: bool = True
    online_o: OnlineOutput = "heads"
    keys: bool = False
    seed: int = 0

    def of_stream(self, width: int, device: torch.device) -> InputTransform | None:
        """T of the residual stream. SpecError for a width without a Hadamard matrix, StructureError for a matrix of
        another size."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.residual is None:
            return None
        if isinstance(self.residual, Tensor):
            if self.residual.shape != (width, width):
                raise StructureError(
                    f"rotation of {list(self.residual.shape)} for a residual stream of {width} channels"
                )
            return MatrixTransform(self.residual.to(device, torch.float64))
        if self.residual == "hadamard":
            signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
            return HadamardTransform(width, signs=signs.to(device))
        return MatrixTransform(random_orthogonal(width, generator).to(device))


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """float64 `[n, n]`, uniform (Haar): Q of a Gaussian matrix, each column with the sign that makes R's diagonal
    positive (Mezzadri, math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def on_rows(transform: InputTransform, weight: Tensor) -> Tensor:
    """Tᵀ W of W `[out, in]`: what is written is rotated."""
    return transform(weight.mT.contiguous()).mT


def centred(weight: Tensor) -> Tensor:
    """W `[out, ...]` whose outputs have mean 0."""
    return weight - weight.mean(dim=0, keepdim=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockRotation:
    """A rotation of all blocks of one shape. stream: T, None to leave the stream alone; value: of one head of values;
    online: by weight name; keys: of queries and keys; centre: whether the stream loses its mean."""

    sites: StreamSites
    stream: InputTransform | None
    centre: bool
    value: InputTransform | None
    online: Mapping[str, InputTransform]
    keys: HadamardTransform | None

    def reshape(self, block: nn.Module) -> None:
        """Give `block` the modules of a rotated one, in place: plain norms, biases where norms had shifts, transforms
        of inputs. Parameters may be on the meta device."""
        norms = self.sites.norms
        if self.stream is not None:
            for ref in self.sites.readers:
                if ref.bias is None and ref.name in norms and norms[ref.name].shift is not None:
                    add_bias(block, ref)
            for norm in {norm.path: norm for norm in norms.values()}.values():
                norm.make_plain(block)
        for name, transform in self.online.items():
            attach(block, name, transform)
        if self.keys is not None:
            attach_to_attention(block, self.keys)

    def apply(self, block: nn.Module) -> None:
        """Rotate `block`, in place; it must be the caller's own."""
        values = Values(self, block)
        self.reshape(block)
        for ref in self._all_weights():
            ref.write(block, values.matrix(ref, ref.read(block).double()))
        with torch.no_grad():
            for name, value in values.vectors.items():
                block.get_parameter(name).copy_(value)

    def error(self, block: nn.Module, call: BlockCall, hidden: Tensor) -> float:
        """Largest difference, in float64, of the rotated block's output and the rotated output of `block`, relative to
        the largest output; `hidden` `[batch, tokens, width]` enters. `block` is reshaped, its weights stay."""
        structure, hidden = self.sites.structure, hidden.double()
        values = Values(self, block)
        before = run_exactly(block, call, hidden, structure, matrix=lambda _, w: w, vector=lambda _, v: v)
        self.reshape(block)
        after = run_exactly(block, call, self.of_stream(hidden), structure, matrix=values.matrix, vector=values.vector)
        return ((after - self.of_stream(before)).abs().max() / before.abs().max()).item()

    def of_stream(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., width]` as the rotated model has them."""
        if self.stream is None:
            return hidden
        return self.stream(hidden - hidden.mean(dim=-1, keepdim=True) if self.centre else hidden)

    def _all_weights(self) -> tuple[WeightRef, ...]:
        groups = self.sites.structure.groups
        return (*(ref for group in groups for ref in group.weights), *self.sites.structure.routers)


class Values:
    """New parameters of one block, from its own old ones."""

    def __init__(self, rotation: BlockRotation, block: nn.Module) -> None:
        self._rotation, sites = rotation, rotation.sites
        self._gains: dict[str, Tensor] = {}
        self._writers = {ref.name for ref in sites.writers}
        self._readers = {ref.name for ref in sites.readers}
        self.vectors: dict[str, Tensor] = {}
        """Biases, float64, by path."""
        for ref in rotation._all_weights():
            bias_path = bias_of(ref)
            bias = block.get_parameter(ref.bias).detach().double() if ref.bias is not None else None
            if rotation.stream is not None and ref.name in self._readers and ref.name in sites.norms:
                norm = sites.norms[ref.name]
                self._gains[ref.name] = norm.gain_of(block)
                shift = norm.shift_of(block)
                if shift is not None:
                    moved = ref.read(block).double() @ shift
                    bias = moved if bias is None else bias + moved
            if bias is not None:
                self.vectors[bias_path] = self._outputs(ref, bias[:, None])[:, 0]

    def matrix(self, ref: WeightRef, weight: Tensor) -> Tensor:
        """New value `[out, in]` of a float64 weight."""
        rotation, values = self._rotation, self._rotation.sites.values
        if ref.name in self._gains:
            weight = weight * self._gains[ref.name]
        if rotation.stream is not None and ref.name in self._readers:
            weight = rotation.stream(weight)
        if values is not None and rotation.value is not None and ref == values.output:
            weight = rotation.value(weight)
        if ref.name in rotation.online:
            weight = rotation.online[ref.name](weight)
        return self._outputs(ref, weight)

    def vector(self, path: str, value: Tensor) -> Tensor:
        """New value of a parameter with one dimension."""
        return self.vectors.get(path, value)

    def _outputs(self, ref: WeightRef, weight: Tensor) -> Tensor:
        """What rotates the outputs of `weight` `[out, any]`."""
        rotation, values = self._rotation, self._rotation.sites.values
        if values is not None and rotation.value is not None and ref == values.value:
            rows = values.rows.to(weight.device)
            weight = weight.clone()
            weight[rows] = on_rows(rotation.value, weight[rows])
        if rotation.stream is not None and ref.name in self._writers:
            weight = on_rows(rotation.stream, centred(weight) if rotation.centre else weight)
        return weight


def bias_of(ref: WeightRef) -> str:
    """Path of the bias that a weight has or would be given."""
    return ref.bias or f"{ref.owner}.bias"


def add_bias(block: nn.Module, ref: WeightRef) -> None:
    """Give a linear layer a bias of zeros; StructureError where no layer could take one."""
    module = block.get_submodule(ref.owner)
    if not isinstance(module, nn.Linear) or ref.index is not None:
        raise StructureError(
            f"{ref.name}: the norm in front adds a shift, and {type(module).__name__} takes no bias for it"
        )
    zeros = torch.zeros(ref.out_features, device=module.weight.device, dtype=module.weight.dtype)
    module.bias = nn.Parameter(zeros, requires_grad=False)
