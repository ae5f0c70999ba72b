"""A source whose model is another one's after a rotation: the full-precision model of all that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from qbench.engine.fingerprints import rotation_fingerprint
from qbench.engine.loop import Recipe
from qbench.engine.source import Source, signature_of
from qbench.engine.spinquant import learned_rotation
from qbench.errors import SpecError, StructureError
from qbench.stages.rotation import RotateStage, quantizes_cache
from qbench.structure.blocks import BlockCall, capture_calls, find_blocks
from qbench.structure.ends import copy_with, find_ends, prove_ends, rotate_ends
from qbench.structure.online import HadamardTransform, InputTransform, MatrixTransform
from qbench.structure.rotation import BlockRotation, Rotation
from qbench.structure.stream import StreamSites, ValuePath, find_stream_sites, require_addition

#: Largest relative difference, in float64, between a rotated block and the block: norms that compute in float32 err by
#: 1e-7.
TOLERANCE = 1e-6


class RotatedSource:
    """`inner` after `rotation`. Blocks are rotated when they are asked for; `inner` and its model are never changed.

    `model` has the rotated model's modules; what lies outside the blocks holds rotated weights where `inner`'s holds
    weights (in memory always, else inside `shell`). Its blocks hold none: finished blocks are put there, and until then
    a forward gives NaN or fails. Raises StructureError, in one line with the reason, for a model that cannot be rotated
    so: everything is proved in float64 on every shape of block before the first is handed out.
    """

    def __init__(self, inner: Source, rotation: Rotation) -> None:
        self._inner, self._rotation = inner, rotation
        self.prefix, self.device, self.dtype, self.resident = inner.prefix, inner.device, inner.dtype, inner.resident
        self.metrics: tuple[tuple[int, str, str, float], ...] = ()
        _, blocks = find_blocks(inner.model)
        self._signatures = [signature_of(block) for block in blocks]
        with inner.shell() as raw, torch.no_grad():
            vocabulary = raw.config.get_text_config().vocab_size
            ids = torch.arange(16).remainder(vocabulary).view(2, 8).to(inner.device)
            hidden, calls = capture_calls(raw, ids)
            self._width = hidden.shape[-1]
            self._stream = self._of_stream()
            self._ends = find_ends(raw, ids) if self._stream is not None else None
            self._shapes = self._discover(calls)
            self._centre = self._stream is not None and any(shape.sites.centred for shape in self._shapes.values())
            self._shapes = {key: replace(shape, centre=self._centre) for key, shape in self._shapes.items()}
            if self._ends is not None:
                prove_ends(raw, self._ends, self._stream, ids, width=self._width, centre=self._centre)
            self._prove(calls)
            self.model = self._reshaped(raw)
        if not self.resident:
            self._empty()

    @property
    def count(self) -> int:
        return self._inner.count

    @property
    def sites(self) -> tuple[StreamSites, ...]:
        """What every block does with the residual stream."""
        return tuple(self._shapes[signature].sites for signature in self._signatures)

    @property
    def loadable(self) -> bool:
        norms = [norm for shape in self._shapes.values() for norm in shape.sites.norms.values()]
        plain = self._stream is None or not any(norm.centred or norm.shift for norm in norms)
        return plain and not any(shape.online for shape in self._shapes.values()) and self._inner.loadable

    @contextmanager
    def shell(self) -> Iterator[nn.Module]:
        if self.resident:
            yield self.model
            return
        with self._inner.shell() as raw, torch.no_grad():
            self._fill(self.model, self._rotated_outside(raw))
        try:
            yield self.model
        finally:
            self._empty()

    def block(self, index: int) -> nn.Module:
        block = self._inner.block(index)
        with torch.no_grad():
            self._of_block(index).apply(block)
        return block

    def _of_block(self, index: int) -> BlockRotation:
        shape, matrix = self._shapes[self._signatures[index]], self._rotation.value_matrices.get(index)
        if matrix is None or shape.sites.values is None:
            return shape
        return replace(shape, value=MatrixTransform(matrix.to(self.device, torch.float64)))

    def _of_stream(self) -> InputTransform | None:
        try:
            return self._rotation.of_stream(self._width, self.device)
        except SpecError as error:
            raise StructureError(f"residual stream: {error}; algo.rotate_mode=random takes any width") from error

    def _discover(self, calls: tuple[BlockCall, ...]) -> dict[tuple, BlockRotation]:
        shapes: dict[tuple, BlockRotation] = {}
        for index, signature in enumerate(self._signatures):
            if signature not in shapes:
                with _named(index):
                    block, hidden = self._inner.block(index), self._sample()
                    sites = find_stream_sites(block, calls[index], hidden)
                    if self._stream is not None:
                        require_addition(block, calls[index], hidden, sites)
                    shapes[signature] = self._shape(sites)
        return shapes

    def _sample(self) -> Tensor:
        """Hidden states `[2, 8, width]` to look at a block with."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, 8, self._width, generator=generator).to(self.device, self.dtype)

    def _shape(self, sites: StreamSites) -> BlockRotation:
        rotation, values = self._rotation, sites.values
        if values is None and (rotation.values or rotation.online_o != "none"):
            raise StructureError(
                "no path from values to an output weight that a rotation could follow; algo.values=false and "
                "algo.online_o=none leave both as they are"
            )
        online: dict[str, InputTransform] = {}
        if rotation.online_o == "full":
            online[values.output.name] = _hadamard("online_o=none", values.output.in_features)
        elif rotation.online_o == "heads" and (across := _across_heads(values)) is not None:
            online[values.output.name] = across
        if rotation.online_down:
            online |= {ref.name: _hadamard("online_down=false", ref.in_features) for ref in sites.downs}
        if rotation.keys and sites.key_dim is None:
            raise StructureError("attention is not computed by scaled_dot_product_attention: algo.rotate_keys=false")
        return BlockRotation(
            sites=sites,
            stream=self._stream,
            centre=False,
            value=_hadamard("values=false", values.head_dim) if rotation.values else None,
            online=online,
            keys=_hadamard("rotate_keys=false", sites.key_dim) if rotation.keys else None,
        )

    def _prove(self, calls: tuple[BlockCall, ...]) -> None:
        """One block of every shape in float64; notes errors, and where the cross-head transform is left out."""
        metrics, proved = [], set()
        for index, signature in enumerate(self._signatures):
            shape = self._shapes[signature]
            if signature not in proved:
                proved.add(signature)
                with _named(index), torch.no_grad():
                    error = self._of_block(index).error(self._inner.block(index), calls[index], self._sample())
                    if not error <= TOLERANCE:
                        raise StructureError(f"rotated, it computes another function (by {error:.2g} relative)")
                metrics.append((index, "", "rotation_error", error))
            if self._rotation.online_o == "heads":
                name = shape.sites.values.output.name
                metrics.append((index, name, "cross_heads", float(name in shape.online)))
        self.metrics = tuple(metrics)

    def _rotated_outside(self, raw: nn.Module) -> nn.Module:
        """A copy of `raw` whose ends are rotated; everything else shares its memory."""
        model = copy_with(raw, lambda _, parameter: parameter.detach())
        if self._ends is not None:
            rotate_ends(model, self._ends, self._stream, centre=self._centre)
        return model

    def _reshaped(self, raw: nn.Module) -> nn.Module:
        """The rotated model, its blocks without weights."""
        model = self._rotated_outside(raw)
        _, blocks = find_blocks(model)
        for index, block in enumerate(blocks):
            for name, parameter in list(block.named_parameters()):
                _put(block, name, torch.empty_like(parameter, device="meta"))
            self._of_block(index).reshape(block)
            for name, parameter in list(block.named_parameters()) if self.resident else ():
                nothing = torch.full((), torch.nan, dtype=parameter.dtype, device=self.device)
                _put(block, name, nothing.expand(parameter.shape))
        return model

    def _outside(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters outside the blocks by name, shared ones by every name."""
        named = model.named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in named if not name.startswith(f"{self.prefix}.")}

    def _fill(self, model: nn.Module, other: nn.Module) -> None:
        for name, parameter in self._outside(other).items():
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, parameter)

    def _empty(self) -> None:
        for name, parameter in self._outside(self.model).items():
            _put(self.model, name, torch.empty_like(parameter, device="meta"))


def rotated(
    source: Source,
    recipe: Recipe | None,
    calibration: Tensor | None = None,
    report: Callable[[int, int], None] = lambda step, steps: None,
) -> Source:
    """`source` after the stages of the recipe that rotate; `source` itself where none does. calibration: token windows
    [n, length] for rotations that are learned; report(step, steps) is called while they are."""
    for stage in recipe.pipeline.stages if recipe is not None else ():
        if not isinstance(stage, RotateStage):
            continue
        if stage.learned:
            rotate = partial(RotatedSource, source)
            rotation, metrics = learned_rotation(stage, source, rotate, recipe.scheme, calibration, recipe.seed, report)
        else:
            rotation, metrics = stage.rotation(recipe.seed, cache=quantizes_cache(recipe.scheme)), ()
        source = RotatedSource(source, rotation)
        source.metrics += (*metrics, rotation_fingerprint(stage, rotation))
    return source


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))


def _hadamard(without: str, order: int) -> HadamardTransform:
    try:
        return HadamardTransform(order)
    except SpecError as error:
        raise StructureError(f"{error}; algo.{without} does without") from error


def _across_heads(values: ValuePath) -> HadamardTransform | None:
    """None where no Hadamard matrix mixes so many heads, and for one head."""
    try:
        return HadamardTransform(values.heads, values.head_dim) if values.heads > 1 else None
    except SpecError:
        return None


@contextmanager
def _named(index: int) -> Iterator[None]:
    try:
        yield
    except StructureError as error:
        raise StructureError(f"block {index}: {error}") from error
