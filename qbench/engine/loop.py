"""One block under one recipe with its streams: the engine's unit of work. Nothing here knows an algorithm:
stages say what they need and what they changed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from qbench.calibration.statistics import Hessian, Statistic
from qbench.engine.activations import InputQuantizer
from qbench.engine.kv import CacheQuantizer
from qbench.engine.probe import Probe, evenly_spaced
from qbench.engine.runtime import Runtime, calibrate
from qbench.engine.streams import Stream
from qbench.errors import NumericsError
from qbench.formats import QTensor, Range, TensorFormat
from qbench.formats.scheme import Scheme
from qbench.stages.base import BlockView, Kind, Outcome, ScopeCall, Stage
from qbench.stages.pipeline import Pipeline
from qbench.structure.trace import BlockStructure, LinearGroup

#: Largest relative change of a block's output that a transform may cause, by compute dtype.
FUNCTION_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

Metric = tuple[str, str, float]


@dataclass(frozen=True)
class Recipe:
    """A pipeline and the formats of all roles. `needs_data`: whether calibration text changes the result."""

    pipeline: Pipeline
    scheme: Scheme
    seed: int = 0

    @property
    def needs_quantized(self) -> bool:
        """Whether it looks at the stream behind quantized blocks: to round, or to calibrate run-time ranges."""
        return bool(self.pipeline.needs("quantized")) or self.scheme.needs_data

    @property
    def needs_full(self) -> bool:
        return bool(self.pipeline.needs("full")) or self.pipeline.scope_tokens > 0


@dataclass
class Streams:
    """Calibration streams of one recipe: None where its pipeline does not look at them."""

    full: Stream | None = None
    quantized: Stream | None = None


@dataclass(frozen=True)
class FinishedBlock:
    """A block after its recipe: `block` holds decoded weights, `codes` goes by weight name, metrics are (module, name,
    value). unquantized: elements of its linear weights that stay in full precision. inputs, by weight name, and cache:
    what is quantized while it runs."""

    index: int
    block: nn.Module
    structure: BlockStructure | None = None
    codes: Mapping[str, QTensor] = field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()
    unquantized: int = 0
    inputs: Mapping[str, InputQuantizer] = field(default_factory=dict)
    cache: CacheQuantizer | None = None

    def runtime(self) -> AbstractContextManager:
        """What its forwards run in."""
        if not self.inputs and self.cache is None:
            return nullcontext()
        return Runtime(self.block, self.structure, self.inputs, self.cache)


def quantize_block(
    block: nn.Module, structure: BlockStructure, index: int, count: int, recipe: Recipe, streams: Streams
) -> FinishedBlock:
    """Quantize `block`, number `index` of `count`, in place (it must be the caller's own copy); push the streams on.

    Full-precision stream first: one trip gives its statistics and its next hidden states. Then the stages in order;
    before the first that rounds, the ranges of what is quantized at run time are calibrated on the (transformed) block;
    a stage that needs the quantized stream settles group by group inside the one trip that also advances it.
    """
    check_finite(block, f"block {index}")
    scheme, pipeline = recipe.scheme, recipe.pipeline
    refs = [ref for group in structure.groups for ref in group.weights]
    formats = {ref.name: scheme.of_weight(ref.name, index, count) for ref in refs}
    work = _Work(block, _quantized_part(structure, formats), index, recipe, formats)
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
    run_time, advanced = None, False
    for stage in pipeline.stages:
        started = time.perf_counter()
        if stage.kind >= Kind.ROUND and run_time is None:
            run_time = _calibrate(block, structure, index, count, scheme, formats, streams.quantized)
        if any(need.stream == "quantized" for need in stage.needs):
            work.collect(pipeline.needs("quantized"))
            streams.quantized.settle(
                block,
                index,
                work.structure,
                work.observe,
                lambda group, stage=stage: work.apply(stage, (group,)),
                run_time.runtime(),
            )
            advanced = True
        elif stage.kind == Kind.ROUND:
            for group in work.structure.groups:
                work.apply(stage, (group,))
        else:
            work.apply(stage, work.structure.groups)
            if stage.kind == Kind.TRANSFORM:
                work.guard(stage)
        work.metrics.append(("", f"{stage.name}_s", time.perf_counter() - started))
    if streams.quantized is not None and not advanced:
        streams.quantized.advance(block, index, run_time.runtime())
    work.metrics += [("", f"{name}_s", seconds) for name, seconds in work.seconds.items()]
    unquantized = sum(ref.out_features * ref.in_features for ref in refs if formats[ref.name] is None)
    return replace(run_time, codes=work.codes, metrics=tuple(work.metrics), unquantized=unquantized)


def _quantized_part(structure: BlockStructure, formats: Mapping[str, TensorFormat | None]) -> BlockStructure:
    """The structure without the weights that stay in full precision; groups keep their places, some are empty."""
    groups = tuple(
        replace(group, weights=tuple(ref for ref in group.weights if formats[ref.name] is not None))
        for group in structure.groups
    )
    return replace(structure, groups=groups)


def _calibrate(
    block: nn.Module,
    structure: BlockStructure,
    index: int,
    count: int,
    scheme: Scheme,
    names: Iterable[str],
    stream: Stream | None,
) -> FinishedBlock:
    """What is quantized while the block runs: the inputs of its weights `names`, its cache."""
    wanted = {name: scheme.of_input(name, index, count) for name in names}
    wanted = {name: fmt for name, fmt in wanted.items() if fmt is not None}
    cache = scheme.of_cache(index, count)
    inputs, quantizer = calibrate(block, index, structure, stream, wanted, cache)
    return FinishedBlock(index, block, structure, inputs=inputs, cache=quantizer)


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
    formats: Mapping[str, TensorFormat | None]
    probe: Probe | None = None
    scopes: Mapping[int, tuple[ScopeCall, ...]] = field(default_factory=dict)
    statistics: dict[int, dict[type, Statistic]] = field(default_factory=dict)
    ranges: dict[str, Range] = field(default_factory=dict)
    codes: dict[str, QTensor] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.index)

    def collect(self, wanted: frozenset[type]) -> None:
        """Start fresh statistics for every group."""
        device = next(self.block.parameters()).device
        self.statistics = {
            group.index: {kind: kind(group.in_features, device) for kind in wanted}
            for group in self.structure.groups
            if group.weights
        }

    def observe(self, group: LinearGroup, x: Tensor) -> None:
        started = time.perf_counter()
        for statistic in self.statistics.get(group.index, {}).values():
            statistic.update(x)
        self._spent("statistics", started)

    def apply(self, stage: Stage, groups: tuple[LinearGroup, ...]) -> None:
        """Show the stage its groups, install what it decided, and measure what rounding did to each layer."""
        groups = tuple(group for group in groups if group.weights)
        if not groups:
            return
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
            kept = self.statistics.get(group, {})
            self.statistics[group] = {k: s.rescaled(scale) for k, s in kept.items()}
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
