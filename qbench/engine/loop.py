"""One block under one recipe with its streams: the engine's unit of work. Nothing here knows an algorithm:
stages say what they need and what they changed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qbench.calibration.statistics import Hessian, Statistic
from qbench.engine.probe import Probe, evenly_spaced
from qbench.engine.streams import Stream
from qbench.errors import NumericsError
from qbench.formats import QTensor, Range, TensorFormat
from qbench.stages.base import BlockView, Kind, Outcome, ScopeCall, Stage
from qbench.stages.pipeline import Pipeline
from qbench.structure.trace import BlockStructure, LinearGroup

#: Largest relative change of a block's output that a transform may cause, by compute dtype.
FUNCTION_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

Metric = tuple[str, str, float]


@dataclass(frozen=True)
class Recipe:
    """A pipeline and the format of the weights it rounds."""

    pipeline: Pipeline
    format: TensorFormat
    seed: int = 0

    def formats(self, structure: BlockStructure) -> dict[str, TensorFormat]:
        return {ref.name: self.format for group in structure.groups for ref in group.weights}


@dataclass
class Streams:
    """Calibration streams of one recipe: None where its pipeline does not look at them."""

    full: Stream | None = None
    quantized: Stream | None = None


@dataclass(frozen=True)
class FinishedBlock:
    """A block after its recipe: `block` holds decoded weights, `codes` goes by weight name, metrics are (module, name,
    value)."""

    index: int
    block: nn.Module
    codes: Mapping[str, QTensor]
    metrics: tuple[Metric, ...]


def quantize_block(
    block: nn.Module, structure: BlockStructure, index: int, recipe: Recipe, streams: Streams
) -> FinishedBlock:
    """Quantize `block` in place (it must be the caller's own copy) and push the streams on.

    Full-precision stream first: one trip gives its statistics and its next hidden states. Then the stages in order;
    a stage that needs the quantized stream settles group by group inside the one trip that also advances it.
    """
    check_finite(block, f"block {index}")
    work = _Work(block, structure, index, recipe)
    pipeline = recipe.pipeline
    if streams.full is not None:
        probes = pipeline.stages[0].kind == Kind.TRANSFORM or pipeline.scope_tokens > 0
        if probes:
            length = streams.full.chunks[0].shape[1]
            total = sum(chunk.shape[0] for chunk in streams.full.chunks)
            sequences = evenly_spaced(pipeline.scope_tokens // length, total)
            work.probe = Probe.observe(block, index, streams.full, sequences)
            work.scopes = work.probe.scopes(block, structure) if pipeline.scope_tokens else {}
        work.collect(pipeline.needs("full"))
        started = time.perf_counter()
        streams.full.observe(block, index, structure, work.observe)
        work.metrics.append(("", "full_stream_s", time.perf_counter() - started))
    for stage in pipeline.stages:
        started = time.perf_counter()
        if any(need.stream == "quantized" for need in stage.needs):
            work.collect(pipeline.needs("quantized"))
            streams.quantized.settle(
                block, index, structure, work.observe, lambda group, stage=stage: work.apply(stage, (group,))
            )
        elif stage.kind == Kind.ROUND:
            for group in structure.groups:
                work.apply(stage, (group,))
        else:
            work.apply(stage, structure.groups)
            if stage.kind == Kind.TRANSFORM:
                work.guard(stage)
        work.metrics.append(("", f"{stage.name}_s", time.perf_counter() - started))
    work.metrics += [("", f"{name}_s", seconds) for name, seconds in work.seconds.items()]
    return FinishedBlock(index, block, work.codes, tuple(work.metrics))


def check_finite(block: nn.Module, where: str) -> None:
    """Raises NumericsError for a parameter with NaN or infinity."""
    for name, parameter in block.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NumericsError(f"{where}, {name}: weights contain NaN or infinity")


@dataclass
class _Work:
    """What accumulates while one block goes through its stages."""

    block: nn.Module
    structure: BlockStructure
    index: int
    recipe: Recipe
    probe: Probe | None = None
    scopes: Mapping[int, tuple[ScopeCall, ...]] = field(default_factory=dict)
    statistics: dict[int, dict[type, Statistic]] = field(default_factory=dict)
    ranges: dict[str, Range] = field(default_factory=dict)
    codes: dict[str, QTensor] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.formats = self.recipe.formats(self.structure)
        self.generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.index)

    def collect(self, wanted: frozenset[type]) -> None:
        """Start fresh statistics for every group."""
        device = next(self.block.parameters()).device
        self.statistics = {
            group.index: {kind: kind(group.in_features, device) for kind in wanted} for group in self.structure.groups
        }

    def observe(self, group: LinearGroup, x: Tensor) -> None:
        started = time.perf_counter()
        for statistic in self.statistics[group.index].values():
            statistic.update(x)
        self._spent("statistics", started)

    def apply(self, stage: Stage, groups: tuple[LinearGroup, ...]) -> None:
        """Show the stage its groups, install what it decided, and measure what rounding did to each layer."""
        for group in groups:
            for statistic in self.statistics.get(group.index, {}).values():
                statistic.finish()
        view = BlockView(
            block=self.block,
            structure=self.structure,
            groups=groups,
            formats=self.formats,
            ranges=self.ranges,
            statistics=self.statistics,
            scopes=self.scopes,
            generator=self.generator,
            where=f"block {self.index}",
        )
        started = time.perf_counter()
        outcome = stage.apply(view)
        self._spent(f"{stage.name}_solve", started)
        started = time.perf_counter()
        if stage.kind == Kind.ROUND:
            for group in groups:
                self._measure(group, outcome)
        self._install(outcome)
        if stage.kind == Kind.ROUND:  # a settled group's statistics are needed by nobody
            for group in groups:
                self.statistics.pop(group.index, None)
        self._spent("install", started)

    def _spent(self, name: str, started: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def _install(self, outcome: Outcome) -> None:
        for path, value in outcome.parameters.items():
            self.block.get_parameter(path).data.copy_(value)
        for group, scale in outcome.input_scales.items():
            self.statistics[group] = {k: s.rescaled(scale) for k, s in self.statistics[group].items()}
        refs = {ref.name: ref for group in self.structure.groups for ref in group.weights}
        for name, codes in outcome.codes.items():
            refs[name].write(self.block, codes.dequantize())
        self.ranges |= outcome.ranges
        self.codes |= outcome.codes
        self.metrics += outcome.metrics

    def _measure(self, group: LinearGroup, outcome: Outcome) -> None:
        """Relative squared errors of each weight and, with a Hessian, of its output E‖Δx‖² / E‖Wx‖²."""
        statistic = self.statistics.get(group.index, {}).get(Hessian)
        hessian = statistic.value() if statistic is not None and statistic.tokens else None
        for ref in group.weights:
            weight = ref.read(self.block).float()
            delta = outcome.codes[ref.name].dequantize() - weight
            self.metrics.append((ref.name, "weight_error", _ratio(delta.square().sum(), weight.square().sum())))
            if hessian is not None:
                changed, whole = (delta @ hessian * delta).sum(), (weight @ hessian * weight).sum()
                self.metrics.append((ref.name, "output_error", _ratio(changed, whole)))

    def guard(self, stage: Stage) -> None:
        """Raises NumericsError unless the transformed block still computes the full-precision function."""
        error = self.probe.function_error(self.block)
        tolerance = FUNCTION_TOLERANCE[next(self.block.parameters()).dtype]
        self.metrics.append(("", f"{stage.name}_function_error", error))
        if not error <= tolerance:
            raise NumericsError(
                f"block {self.index}: {stage.name} changed the full-precision output by {error:.2g} relative "
                f"(at most {tolerance:g}): a fold is wrong"
            )


def _ratio(part: Tensor, whole: Tensor) -> float:
    return (part / whole.clamp_min(torch.finfo(whole.dtype).tiny)).item()
