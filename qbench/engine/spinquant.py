"""A quantized network as a differentiable function of its rotations: what SpinQuant learns on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qbench.engine.activations import InputQuantizer
from qbench.engine.kv import CacheQuantizer
from qbench.engine.source import Source
from qbench.engine.student import Student, make_student
from qbench.errors import SpecError
from qbench.formats import RangeFit, TensorFormat, fake_quantize
from qbench.formats.differentiable import straight_through
from qbench.formats.scheme import Scheme
from qbench.stages.block_learning import replaced_parameters
from qbench.stages.rotate_spinquant import SpinQuant
from qbench.stages.rotation import quantizes_cache
from qbench.structure.blocks import BlockCall, capture_calls, finish
from qbench.structure.rotation import Rotation, bias_of
from qbench.structure.stream import StreamSites


class RotatedLike(Source, Protocol):
    """A source that knows what its blocks do with the residual stream."""

    @property
    def sites(self) -> tuple[StreamSites, ...]: ...


def learned_rotation(
    stage: SpinQuant,
    source: Source,
    rotate: Callable[[Rotation], RotatedLike],
    scheme: Scheme,
    tokens: Tensor,
    seed: int,
    report: Callable[[int, int], None] = lambda step, steps: None,
) -> tuple[Rotation, tuple[tuple[int, str, str, float], ...]]:
    """The rotation that `stage` learns on calibration windows int64 [n, length] of `source`'s model, and metrics.

    rotate: the source after a rotation. The model is held a second time meanwhile. SpecError for a source that does not
    hold the model in memory.
    """
    if not source.resident:
        raise SpecError("source", "stream", f"memory with {stage.name}, which learns on the whole model at once")
    started, cache = time.perf_counter(), quantizes_cache(scheme)
    width = source.model.get_input_embeddings().weight.shape[1]
    plain = rotate(stage.before(seed, width, cache=cache))
    network = RotatedNetwork(plain, plain.sites, scheme, tokens, stage.quantize_weights)
    with torch.inference_mode(False):
        rotation, losses = stage.learn(
            network.loss,
            len(tokens),
            seed=seed,
            width=width,
            blocks=source.count,
            head_dim=network.head_dim,
            cache=cache,
            device=source.device,
            report=report,
        )
    metrics = [(0, "", f"{stage.name}_loss{step:03d}", loss) for step, loss in enumerate(losses)]
    return rotation, (*metrics, (0, "", f"{stage.name}_s", time.perf_counter() - started))


class RotatedNetwork:
    """Next-token cross-entropy of calibration windows under rotations, with everything quantized that will be.

    source: a model whose norms have no gain of their own any more, so that its stream can be rotated; sites: of every
    block. tokens: int64 [n, length]. Inputs are quantized with ranges of their own in every forward, and so is the
    cache; weights where `quantize_weights`, with min-max ranges. Rounding has gradient 1. Embedding and head count as
    rotated: the stream is, where it begins and ends. A head that the scheme quantizes is in full precision here.

    Blocks are computed again going backwards, so that besides the model and the hidden states between blocks only one
    block's activations exist at a time.
    """

    def __init__(
        self, source: Source, sites: tuple[StreamSites, ...], scheme: Scheme, tokens: Tensor, quantize_weights: bool
    ) -> None:
        self._source, self._sites, self._tokens = source, sites, tokens.to(source.device)
        self._calls: dict[tuple[int, ...], tuple[BlockCall, ...]] = {}
        self._blocks = [source.block(index).requires_grad_(False) for index in range(source.count)]
        self._formats: list[Mapping[str, TensorFormat]] = []
        self._students: list[Student] = []
        for index, (block, found) in enumerate(zip(self._blocks, sites, strict=True)):
            self._formats.append(_weight_formats(scheme, found, index, source.count) if quantize_weights else {})
            self._students.append(self._student(block, found, scheme, index))

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self._sites[0].width

    @property
    def head_dim(self) -> int | None:
        """Channels of a head of values; None where the blocks have no values to rotate, or differ."""
        sizes = {sites.values.head_dim if sites.values is not None else None for sites in self._sites}
        return sizes.pop() if len(sizes) == 1 else None

    def loss(self, r1: Tensor, r2: Tensor | None, sequences: list[int]) -> Tensor:
        """Mean loss of the given windows under r1 [width, width] and r2 [blocks, head_dim, head_dim], both orthogonal;
        a scalar with gradients to both."""
        ids = self._tokens[sequences]
        with self._source.shell() as model:
            with torch.no_grad():
                hidden, calls = capture_calls(model, ids)
            self._calls[tuple(ids.shape)] = calls
            hidden = _times(hidden, r1)
            for index in range(len(self._blocks)):
                turn = None if r2 is None else r2[index]
                hidden = checkpoint(self._block, index, r1, turn, hidden, use_reentrant=False, preserve_rng_state=False)
            hidden = _times(hidden, r1.mT)
            losses = [
                checkpoint(_next_token_loss, model, part, tokens, use_reentrant=False, preserve_rng_state=False)
                for part, tokens in zip(hidden.split(1), ids.split(1), strict=True)
            ]
            return torch.stack(losses).mean()

    def _block(self, index: int, r1: Tensor, r2: Tensor | None, hidden: Tensor) -> Tensor:
        parameters = rotated_parameters(self._blocks[index], self._sites[index], r1, r2, self._formats[index])
        return self._students[index](parameters, hidden)

    def _student(self, block: nn.Module, sites: StreamSites, scheme: Scheme, index: int) -> Student:
        count = self._source.count
        names = [ref.name for group in sites.structure.groups for ref in group.weights]
        formats = {name: scheme.of_input(name, index, count) for name in names}
        inputs = {
            name: InputQuantizer(format=replace(fmt, static=False), where=f"block {index}, input of {name}")
            for name, fmt in formats.items()
            if fmt is not None
        }
        cache = scheme.of_cache(index, count)
        return make_student(
            block,
            sites.structure,
            inputs,
            CacheQuantizer(cache) if cache is not None else None,
            lambda hidden: self._calls[tuple(hidden.shape[:2])][index],
        )


def rotated_parameters(
    block: nn.Module, sites: StreamSites, r1: Tensor, r2: Tensor | None, formats: Mapping[str, TensorFormat]
) -> dict[str, Tensor]:
    """Parameters of `block`, by path, when its stream is rotated by r1 [width, width] and its values, head by head, by
    r2 [head_dim, head_dim] (None: not at all): readers W r1, writers r1ᵀ W. With gradients to both.

    Weights with a format, by name, are quantized afterwards, with gradient 1. Norms must have no gain.
    """
    refs = [*(ref for group in sites.structure.groups for ref in group.weights), *sites.structure.routers]
    readers, writers = {ref.name for ref in sites.readers}, {ref.name for ref in sites.writers}
    path = sites.values if r2 is not None else None
    parameters = dict(block.named_parameters())
    weights: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    for ref in refs:
        weight = ref.read(block)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        bias_path = bias_of(ref)  # a norm's shift may have become a bias that the weight did not have
        bias = parameters[bias_path].detach().to(weight) if bias_path in parameters else None
        if ref.name in readers:
            weight = weight @ r1.to(weight)
        if path is not None and ref == path.output:
            weight = _by_head(weight, r2.to(weight))
        if path is not None and ref == path.value:
            rows = path.rows.to(weight.device)
            weight = weight.index_copy(0, rows, _by_head(weight[rows].mT, r2.to(weight)).mT)
            bias = None if bias is None else bias.index_copy(0, rows, _by_head(bias[rows], r2.to(weight)))
        if ref.name in writers:
            weight = r1.mT.to(weight) @ weight
            bias = None if bias is None else bias @ r1.to(weight)
        if ref.name in formats:
            weight = straight_through(fake_quantize(weight.detach().float(), formats[ref.name]).to(weight), weight)
        weights[ref.name] = weight
        if bias is not None and (ref.name in writers or (path is not None and ref == path.value)):
            vectors[bias_path] = bias.to(parameters[bias_path].dtype)
    return replaced_parameters(block, refs, weights) | vectors


def _by_head(x: Tensor, r2: Tensor) -> Tensor:
    """x [..., heads * head_dim] with every head times r2 [head_dim, head_dim]."""
    return (x.unflatten(-1, (-1, r2.shape[0])) @ r2).flatten(-2)


def _times(hidden: Tensor, rotation: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(dtype) @ rotation.to(dtype)).to(hidden.dtype)


def _next_token_loss(model: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
    logits = finish(model, hidden, ids)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).to(dtype), ids[:, 1:].flatten())


def _weight_formats(scheme: Scheme, sites: StreamSites, index: int, count: int) -> dict[str, TensorFormat]:
    """Formats by weight name, with min-max ranges in place of a search in every forward."""
    names = [ref.name for group in sites.structure.groups for ref in group.weights]
    formats = {name: scheme.of_weight(name, index, count) for name in names}
    return {
        name: replace(fmt, range=RangeFit()) if fmt.range.method == "mse" else fmt
        for name, fmt in formats.items()
        if fmt is not None
    }
