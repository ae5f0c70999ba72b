"""What transformations do to weights and inputs, and quantization to outputs, layer by layer.

Of every linear weight, on the windows of a text:

  weight_kurtosis  E[(w - μ)⁴] / σ⁴ over all elements of the weight as it comes before rounding (transformed, unclipped)
  input_kurtosis   the same over all tokens and channels of its input, in the full-precision model after the run's
                   transformations; so it does not depend on the number format
  output_cosine    between its output there and in the quantized model, each behind its own model's earlier blocks:
                   of a window's outputs as one vector, the mean over windows

Both models see the same transformations, so that outputs which a rotation or scale has moved are compared in one
basis. Kurtosis is 3 for a normal distribution, and many times that where a few channels stick out.

LLMC (arXiv 2405.06001) measures the same three in `tools/quant_analysis.py`; departures: it averages inputs over
sequences before it takes their kurtosis, which leaves only what is systematic in them, and it compares outputs with
those of the untransformed model, which is another basis behind a rotation.

A measurement is of a type of layer, such as q_proj: the mean over the blocks, which are its items. Experts of one block
count together; tokens take other ways through them in the two models, so they have no cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qbench.calibration.corpora import Corpus
from qbench.calibration.moments import Moments, kurtosis
from qbench.calibration.samplers import evaluation_windows
from qbench.checks import integer
from qbench.engine.passes import StructureCache, embed
from qbench.engine.source import MemorySource
from qbench.engine.streams import Stream
from qbench.errors import EvaluationError
from qbench.evaluation.base import Context, Evaluation, Report, Subject
from qbench.evaluation.perplexity import BATCH_TOKENS, texts
from qbench.evaluation.recorder import Recorder
from qbench.spec import EvaluationSpec
from qbench.store.records import Measurement
from qbench.structure.blocks import capture_calls, find_blocks
from qbench.structure.operations import LinearOperations
from qbench.structure.trace import BlockStructure

#: Raise when the same windows give another number.
VERSION = 1

#: Values of one block: by metric, then type of layer.
BlockValues = dict[str, dict[str, float]]


@torch.no_grad()
def layer_values(
    subject: Subject, windows: Tensor, batch: int, report: Report = lambda d, t: None
) -> list[BlockValues]:
    """Values of every block in order, on token windows [n, length], `batch` of them per forward.

    Two streams of hidden states go through the blocks side by side; outputs exist for one block and one batch at a
    time.
    """
    source, structures = MemorySource(subject.model), StructureCache()
    sample, calls = capture_calls(source.model, windows[:1, :16].to(source.device))
    full = embed(source, source.model, windows, tokens=batch * windows.shape[1])
    quantized = full.copy()
    found = []
    for index in range(source.count):
        with subject.unrounded():
            before = source.block(index)
        structure = structures.structure(before, calls[index], sample, folds=False)
        with subject.quantized() as model:
            block = find_blocks(model)[1][index]
            found.append(_by_type(structure, before, *_observed(before, block, index, structure, full, quantized)))
        report(index + 1, source.count)
    return found


class _Operations(TorchFunctionMode):
    """During forwards of `block`: see(weight, x, y) for every linear operation, x as it is multiplied and y with its
    bias."""

    def __init__(self, block: nn.Module, structure: BlockStructure, see: Callable[[str, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._operations, self._see = LinearOperations(block), see
        self._names = {(ref.parameter, ref.index): ref.name for group in structure.groups for ref in group.weights}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for place, use in enumerate(self._operations.uses(func, args, kwargs or {})):
            name = self._names.get((use.parameter, use.index))
            if name is not None:
                self._see(name, use.x, result[place] if use.batched else result)
        return result


def _observed(
    before: nn.Module, block: nn.Module, index: int, structure: BlockStructure, full: Stream, quantized: Stream
) -> tuple[dict[str, Moments], dict[str, list[Tensor]]]:
    """Inputs' moments and windows' cosines by weight; both streams advance, each through its own model's block."""
    names = [ref.name for group in structure.groups for ref in group.weights]
    inputs, cosines = {name: Moments() for name in names}, {name: [] for name in names}
    for place, chunk in enumerate(full.chunks):
        outputs: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor, y: Tensor, outputs: dict[str, Tensor] = outputs) -> None:
            inputs[name].update(x)
            outputs[name] = y

        def compare(
            name: str, x: Tensor, y: Tensor, outputs: dict[str, Tensor] = outputs, like: Tensor = chunk
        ) -> None:
            own = outputs.get(name)
            if own is not None and own.shape == y.shape and y.shape[:-1].numel() == like.shape[:-1].numel():
                cosines[name].append(cosine(own, y, len(like)))

        call = full.call(index, chunk)
        with _Operations(before, structure, keep):
            full.chunks[place] = call(before, chunk)
        with _Operations(block, structure, compare):
            quantized.chunks[place] = call(block, quantized.chunks[place])
    return inputs, cosines


def cosine(first: Tensor, second: Tensor, sequences: int) -> Tensor:
    """Cosines float64 [sequences] of outputs [sequences, tokens, features] (or with the first two as one), each
    sequence's as one vector; 1 between zeros."""
    a, b = (each.reshape(sequences, -1).float() for each in (first, second))
    dot, aa, bb = ((x * y).sum(1, dtype=torch.float64) for x, y in ((a, b), (a, a), (b, b)))
    return torch.where((aa == 0) & (bb == 0), 1.0, dot / (aa * bb).sqrt().clamp_min(1e-300))


def _by_type(
    structure: BlockStructure,
    before: nn.Module,
    inputs: Mapping[str, Moments],
    cosines: Mapping[str, list[Tensor]],
) -> BlockValues:
    """Means over the weights of a type; a type without a value is left out."""
    values: dict[str, dict[str, list[float]]] = {}
    types = layer_types(structure)
    for ref in (ref for group in structure.groups for ref in group.weights):
        each = {
            "weight_kurtosis": kurtosis(ref.read(before)),
            "input_kurtosis": inputs[ref.name].kurtosis(),
            "output_cosine": torch.cat(cosines[ref.name]).mean().item() if cosines[ref.name] else None,
        }
        for metric, value in each.items():
            if value is not None:
                values.setdefault(metric, {}).setdefault(types[ref.name], []).append(value)
    return {metric: {kind: math.fsum(some) / len(some) for kind, some in of.items()} for metric, of in values.items()}


def layer_types(structure: BlockStructure) -> dict[str, str]:
    """A type for every weight by its name: what its module is called or, where several modules of the block are
    called so, the module's path."""
    refs = [ref for group in structure.groups for ref in group.weights]
    paths = {ref.name: ref.parameter.removesuffix(".weight") for ref in refs}
    last = {path: path.rpartition(".")[2] for path in paths.values()}
    shared = list(last.values())
    return {name: last[path] if shared.count(last[path]) == 1 else path for name, path in paths.items()}


def measurements(blocks: list[BlockValues], spec: EvaluationSpec) -> list[Measurement]:
    """The mean over blocks of every metric and type, with the blocks as samples. EvaluationError for what is no
    number."""
    return list(_measurements(blocks, spec))


def _measurements(blocks: list[BlockValues], spec: EvaluationSpec) -> Iterator[Measurement]:
    for metric in dict.fromkeys(metric for block in blocks for metric in block):
        for kind in dict.fromkeys(kind for block in blocks for kind in block.get(metric, {})):
            found = {k: of[metric][kind] for k, of in enumerate(blocks) if kind in of.get(metric, {})}
            for index, value in found.items():
                if not math.isfinite(value):
                    where = f"{spec.task} ({spec.protocol}): {metric} of {kind} in block {index}"
                    raise EvaluationError(f"{where} is {value}")
            samples = np.array(list(found.values()), np.float64)
            yield Recorder(spec, len(samples)).mean(f"{metric},{kind}", metric.rpartition("_")[2], samples)


@dataclass(frozen=True, kw_only=True)
class LayerEvaluation(Evaluation):
    """Kurtosis and cosines on a text's first windows."""

    metrics = ("weight_kurtosis", "input_kurtosis", "output_cosine")

    keeps_unrounded = True

    corpus: Corpus

    def preflight(self, context: Context) -> None:
        self._windows(context)

    def _windows(self, context: Context) -> Tensor:
        return evaluation_windows(context.tokens(self.corpus), self.spec.length, self.spec.n)

    def measure(self, subject: Subject, report: Report) -> list[Measurement]:
        batch = self.batch or max(1, BATCH_TOKENS // self.spec.length)
        return measurements(layer_values(subject, self._windows(subject.context), batch, report), self.spec)


def build(options: Mapping[str, Any], source: str) -> tuple[Evaluation, ...]:
    """The evaluations that `conf/eval/layers.yaml` describes: one per text. Raises SpecError and AssetError."""
    length = integer("eval.length", options["length"], 2)
    n = None if options["n"] is None else integer("eval.n", options["n"], 1)
    return tuple(
        LayerEvaluation(
            spec=EvaluationSpec(
                evaluator="layers",
                version=VERSION,
                task=corpus.name,
                fingerprint=corpus.fingerprint,
                length=length,
                n=n,
                mode="layers",
            ),
            corpus=corpus,
        )
        for corpus in texts(options)
    )
