"""One trip over all blocks of a model: embed, quantize block by block, let evaluation streams follow."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from qbench.engine.fingerprints import identity_of
from qbench.engine.loop import FinishedBlock, Recipe, Streams, quantize_block
from qbench.engine.probe import evenly_spaced
from qbench.engine.resume import ResumePoint
from qbench.engine.sinks import Ledger, Weights
from qbench.engine.source import Source, signature_of
from qbench.engine.streams import Stream, chunked
from qbench.formats import QTensor, quantize
from qbench.formats.scheme import Scheme
from qbench.structure.blocks import BlockCall, capture_calls
from qbench.structure.folds import find_folds
from qbench.structure.trace import BlockStructure, trace_block

#: Called with (finished blocks, all blocks) after every block.
Progress = Callable[[int, int], None]

#: Called with (blocks, all blocks, how far learning has come) after every step of a stage that learns.
Learning = Callable[[float, int, str], None]


@dataclass
class StructureCache:
    """Structures by `signature_of`: blocks of one shape are discovered once."""

    known: dict[tuple, BlockStructure] = field(default_factory=dict)

    def structure(self, block: nn.Module, call: BlockCall, hidden: Tensor, *, folds: bool) -> BlockStructure:
        """Groups of `block` and, if asked for, the folds that a numeric probe confirms."""
        signature = (folds, *signature_of(block))
        if signature not in self.known:
            found = trace_block(block, call, hidden)
            if folds:
                found = replace(found, folds=find_folds(block, call, hidden, found))
            self.known[signature] = found
        return self.known[signature]


@dataclass(frozen=True)
class PassResult:
    """Ledger of the pass, decoded weights and run-time quantization (empty unless kept), evaluation streams behind the
    last block. unrounded: the weights as they were before rounding, with what their inputs go through (None unless
    kept)."""

    ledger: Ledger
    weights: Weights
    evaluations: tuple[Stream, ...]
    unrounded: Weights | None = None


@torch.no_grad()
def run_pass(
    source: Source,
    recipe: Recipe | None,
    calibration: Tensor | None,
    *,
    evaluations: tuple[Tensor, ...] = (),
    keep_weights: bool = True,
    keep_unrounded: bool = False,
    structures: StructureCache | None = None,
    receive: Callable[[FinishedBlock], None] = lambda finished: None,
    resume: ResumePoint | None = None,
    progress: Progress = lambda done, total: None,
    learning: Learning = lambda done, total, note: None,
) -> PassResult:
    """Quantize every block of `source` under `recipe` (None: leave them as they are).

    calibration: token windows [n, length] for recipes that look at data. evaluations: token windows whose hidden
    states follow behind the quantized blocks. receive: called with each finished block (exporters). A pass that keeps
    unrounded weights starts at the first block: resume points have none.
    """
    if keep_unrounded and resume is not None:
        resume.discard()
        resume = None
    unrounded = Weights(source.prefix) if keep_unrounded and recipe is not None else None
    structures = structures or StructureCache()
    pipeline = recipe.pipeline if recipe is not None else None
    streams = Streams()
    with source.shell() as model:
        sample = torch.arange(16).remainder(model.config.get_text_config().vocab_size).view(2, 8).to(source.device)
        sample_hidden, sample_calls = capture_calls(model, sample)
        if recipe is not None and (recipe.needs_full or recipe.needs_quantized):
            n, length = calibration.shape
            probed = {len(evenly_spaced(tokens // length, n)) for tokens in pipeline.samples}
            batches = {min(size, n) for size in pipeline.batch_sizes}
            stream = embed(source, model, calibration, {*probed, *batches, *(n % size for size in batches)} - {0})
            streams.full = stream if recipe.needs_full else None
            streams.quantized = stream.copy() if recipe.needs_quantized else None
        followers = tuple(embed(source, model, windows) for windows in evaluations)

    transforms = pipeline is not None and pipeline.transforms
    ledger, weights = Ledger(), Weights(source.prefix)
    moving = [stream for stream in (streams.full, streams.quantized, *followers) if stream is not None]
    first = 0
    if resume is not None:
        setting = (torch.__version__, source.device, keep_weights, recipe, len(moving))
        identity = identity_of(*setting, calibration, *evaluations)
        first = resume.load(identity, moving, ledger, weights, source.device)
        for index in range(first) if keep_weights and recipe is not None and recipe.scheme.at_run_time else ():
            block = source.block(index)
            structure = structures.structure(block, sample_calls[index], sample_hidden, folds=transforms)
            weights.receive_running(resume.restore(block, structure, index, recipe.scheme, source.count))

    def report(index: int, step: int, steps: int, loss: float) -> None:
        learning(index + step / steps, source.count, f"step {step}/{steps}, loss {loss:.3g}")

    def keep(index: int, block: nn.Module) -> None:
        if unrounded is not None:
            unrounded.receive(FinishedBlock(index, copy.deepcopy(block)))

    for index in range(first, source.count):
        block = source.block(index)
        finished = FinishedBlock(index, block)
        if recipe is not None:
            structure = structures.structure(block, sample_calls[index], sample_hidden, folds=transforms)
            told = partial(report, index), partial(keep, index)
            finished = quantize_block(block, structure, index, source.count, recipe, streams, *told)
            ledger.receive(finished, source.dtype)
            if keep_weights:
                weights.receive(finished)
        receive(finished)
        for follower in followers:
            follower.advance(block, index, finished.runtime())
        if resume is not None:
            resume.save(index + 1, moving, ledger, weights)
        progress(index + 1, source.count)
    if resume is not None:
        resume.discard()
    head = quantized_head(source, recipe.scheme) if recipe is not None else None
    if head is not None:
        ledger.receive_head(head)
        weights.head = head.dequantize()
    return PassResult(ledger, weights, followers, unrounded)


def quantized_head(source: Source, scheme: Scheme) -> QTensor | None:
    """The head in the format that an override gives it, round to nearest (no block's algorithm reaches it)."""
    fmt = scheme.of_weight("lm_head.weight", None, source.count)
    if fmt is None:
        return None
    with source.shell() as model:
        return quantize(model.get_output_embeddings().weight.detach().float(), fmt)


def embed(
    source: Source, model: nn.Module, windows: Tensor, batches: Iterable[int] = (), *, tokens: int | None = None
) -> Stream:
    """Stream of token windows [n, length]; how blocks are called on so many windows at once is captured along. tokens:
    of a chunk."""
    chunks, calls = [], {}
    for ids in chunked(windows) if tokens is None else chunked(windows, tokens):
        hidden, of_blocks = capture_calls(model, ids.to(source.device))
        chunks.append(hidden)
        calls.setdefault(tuple(ids.shape), of_blocks)
    for ids in (windows[:size] for size in batches):
        if tuple(ids.shape) not in calls:
            calls[tuple(ids.shape)] = capture_calls(model, ids.to(source.device))[1]
    return Stream(chunks, calls)
