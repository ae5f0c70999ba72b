"""One block under one recipe with its streams: the engine's unit of work. Nothing here knows an algorithm:
stages say what they need and what they changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from qbench.engine.activations import InputQuantizer
from qbench.engine.fingerprints import fingerprints
from qbench.engine.kv import CacheQuantizer
from qbench.engine.layer_metrics import layer_metrics
from qbench.engine.observations import Observations
from qbench.engine.probe import Probe, evenly_spaced
from qbench.engine.runtime import Runtime, calibrate
from qbench.engine.streams import Stream
from qbench.engine.student import make_student
from qbench.errors import NumericsError
from qbench.formats import QTensor, Range, TensorFormat
from qbench.formats.scheme import Scheme
from qbench.stages.base import BlockData, BlockView, Kind, Outcome, Stage
from qbench.stages.pipeline import Pipeline
from qbench.structure.blocks import BlockCall
from qbench.structure.online import attach
from qbench.structure.trace import BlockStructure, LinearGroup

#: Largest relative change of a block's output that a transform may cause, by compute dtype.
FUNCTION_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

Metric = tuple[str, str, float]

#: Called with (step, steps, loss).
Report = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Recipe:
    """A pipeline, the formats of all roles, and where random numbers start."""

    pipeline: Pipeline
    scheme: Scheme
    seed: int = 0

    @property
    def needs_quantized(self) -> bool:
        """Whether it looks at the stream behind quantized blocks: to round, to learn, or to calibrate run-time
        ranges."""
        return bool(self.pipeline.needs("quantized")) or self.pipeline.trains or self.scheme.needs_data

    @property
    def needs_full(self) -> bool:
        pipeline = self.pipeline
        return bool(pipeline.needs("full")) or pipeline.scope_tokens > 0 or pipeline.trains or self.pairs

    @property
    def pairs(self) -> bool:
        """Whether a statistic of the quantized stream also looks at the full-precision one's inputs."""
        return any(statistic.paired for statistic in self.pipeline.needs("quantized"))


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
    block: nn.Module,
    structure: BlockStructure,
    index: int,
    count: int,
    recipe: Recipe,
    streams: Streams,
    report: Report = lambda step, steps, loss: None,
    before_rounding: Callable[[nn.Module], None] = lambda block: None,
) -> FinishedBlock:
    """Quantize `block`, number `index` of `count`, in place (it must be the caller's own copy); push the streams on.

    Full-precision stream first: one trip gives its statistics and its next hidden states. Then the stages in order;
    before the first that rounds, the ranges of what is quantized at run time are calibrated on the (transformed) block;
    a stage that needs the quantized stream settles group by group inside the one trip that also advances it; stages
    that learn see what enters the block on both streams. A stage after rounding makes the quantized stream take the
    block again. report: how far a stage that learns has come in this block, with its loss. before_rounding: called once
    with the block as all earlier stages have left it.
    """
    check_finite(block, f"block {index}")
    pipeline = recipe.pipeline
    work = _Work(block, structure, index, count, recipe, streams, report)
    if streams.full is not None:
        work.follow_full()
    again = any(stage.trains or stage.kind == Kind.RECONSTRUCT for stage in pipeline.stages)
    behind = streams.quantized.copy() if again else None
    advanced = False
    for stage in pipeline.stages:
        started = time.perf_counter()
        if stage.kind == Kind.ROTATE:  # the source hands out rotated blocks
            continue
        if stage.kind >= Kind.ROUND and work.run_time is None:
            work.run_time = work.calibrated()
            before_rounding(block)
        if stage.kind == Kind.ROUND and any(need.stream == "quantized" for need in stage.needs):
            work.observations.start_quantized(pipeline.needs("quantized"))
            streams.quantized.settle(
                block,
                index,
                work.structure,
                work.observations.see_quantized,
                lambda group, stage=stage: work.apply(stage, (group,)),
                work.run_time.runtime(),
            )
            advanced = True
        elif stage.kind == Kind.ROUND and not stage.trains:
            for group in work.structure.groups:
                work.apply(stage, (group,))
        else:
            work.apply(stage, work.structure.groups, behind)
            advanced = advanced and stage.kind != Kind.RECONSTRUCT
        work.metrics.append(("", f"{stage.name}_s", time.perf_counter() - started))
    if streams.quantized is not None and not advanced:
        if behind is not None:
            streams.quantized.chunks = list(behind.chunks)
        streams.quantized.advance(block, index, work.run_time.runtime())
    if streams.quantized is not None and streams.full is not None:
        work.metrics.append(("", "stream_error", _stream_error(streams.quantized, streams.full)))
    seconds = work.seconds | ({"statistics": work.observations.seconds} if work.observations.seconds else {})
    work.metrics += [("", f"{name}_s", spent) for name, spent in seconds.items()]
    refs = [ref for group in structure.groups for ref in group.weights]
    unquantized = sum(ref.out_features * ref.in_features for ref in refs if work.formats[ref.name] is None)
    return replace(work.run_time, codes=work.codes, metrics=tuple(work.metrics), unquantized=unquantized)


def _quantized_part(structure: BlockStructure, formats: Mapping[str, TensorFormat | None]) -> BlockStructure:
    """The structure without the weights that stay in full precision; groups keep their places, some are empty."""
    groups = tuple(
        replace(group, weights=tuple(ref for ref in group.weights if formats[ref.name] is not None))
        for group in structure.groups
    )
    return replace(structure, groups=groups)


def check_finite(block: nn.Module, where: str) -> None:
    """Raises NumericsError for a parameter with NaN or infinity."""
    for name, parameter in block.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NumericsError(f"{where}, {name}: weights contain NaN or infinity")


@dataclass
class _Work:
    """What accumulates while one block goes through its stages. structure: without the weights that stay in full
    precision; whole: with them. probes: by tokens, samples of the full-precision stream; `probe` is what transforms are
    proved on, the largest of them."""

    block: nn.Module
    whole: BlockStructure
    index: int
    count: int
    recipe: Recipe
    streams: Streams
    report: Report
    probes: Mapping[int, Probe] = field(default_factory=dict)
    probe: Probe | None = None
    run_time: FinishedBlock | None = None
    full_inputs: tuple[Tensor, ...] = ()
    ranges: dict[str, Range] = field(default_factory=dict)
    codes: dict[str, QTensor] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        scheme = self.recipe.scheme
        names = [ref.name for group in self.whole.groups for ref in group.weights]
        self.formats = {name: scheme.of_weight(name, self.index, self.count) for name in names}
        inputs = {name: scheme.of_input(name, self.index, self.count) for name in names}
        self.inputs = {name: fmt for name, fmt in inputs.items() if fmt is not None}
        self.structure = _quantized_part(self.whole, self.formats)
        self.observations = Observations(self.block, self.structure, f"block {self.index}", pairs=self.recipe.pairs)
        self.generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.index)

    def follow_full(self) -> None:
        """One trip of the full-precision stream: its statistics, samples to search on and to guard transforms."""
        pipeline, stream = self.recipe.pipeline, self.streams.full
        if pipeline.transforms or pipeline.scope_tokens > 0:
            length = stream.chunks[0].shape[1]
            total = sum(chunk.shape[0] for chunk in stream.chunks)
            self.probes = {
                tokens: Probe.observe(self.block, self.index, stream, evenly_spaced(tokens // length, total))
                for tokens in pipeline.samples
            }
            self.probe = self.probes[pipeline.scope_tokens]
        self.observations.start_full(pipeline.needs("full"))
        keep = pipeline.trains or any(stage.moves_inputs for stage in pipeline.stages)
        self.full_inputs = tuple(stream.chunks) if keep else ()
        started = time.perf_counter()
        stream.observe(self.block, self.index, self.structure, self.observations.see_full)
        self.metrics.append(("", "full_stream_s", time.perf_counter() - started))

    def observe_again(self) -> None:
        """Collect the full-precision stream's statistics anew, on the block as it is now."""
        stream = self.streams.full
        self.observations.start_full(self.recipe.pipeline.needs("full"))
        again = Stream(self.full_inputs, stream.calls)
        again.observe(self.block, self.index, self.structure, self.observations.see_full)

    def calibrated(self) -> FinishedBlock:
        """What is quantized while the block, as it is now, runs: the inputs of its weights, its cache."""
        cache = self.recipe.scheme.of_cache(self.index, self.count)
        stream = self.streams.quantized
        inputs, quantizer = calibrate(self.block, self.index, self.whole, stream, self.inputs, cache)
        return FinishedBlock(self.index, self.block, self.whole, inputs=inputs, cache=quantizer)

    def apply(self, stage: Stage, groups: tuple[LinearGroup, ...], behind: Stream | None = None) -> None:
        """Show the stage its groups, install what it decided, and measure what that did to each layer. behind: the
        quantized stream as it enters the block, for stages that learn."""
        groups = tuple(group for group in groups if group.weights)
        if not groups:
            return
        self.observations.finish(groups)
        view = BlockView(
            block=self.block,
            structure=self.structure,
            groups=groups,
            formats=self.formats,
            ranges=self.ranges,
            statistics=self.observations.statistics,
            scopes=self.probes[stage.scope_tokens].scopes(self.block, self.structure) if stage.scope_tokens else {},
            inputs=self.inputs,
            data=self._data(behind) if stage.trains else None,
            generator=self.generator,
            index=self.index,
            count=self.count,
            where=f"block {self.index}",
        )
        started = time.perf_counter()
        outcome = stage.apply(view)
        spent = self._spent(f"{stage.name}_solve", started)
        started = time.perf_counter()
        if stage.kind == Kind.ROUND:
            self.metrics += layer_metrics(self.block, groups, outcome, self.observations.statistics, spent)
        self._install(stage, outcome)
        if outcome.parameters and (stage.kind == Kind.TRANSFORM or stage.transforms):
            self._transformed(stage, outcome)
        elif outcome.parameters and stage.kind < Kind.ROUND and self.probe is not None:  # a change that is meant
            self.probe = replace(self.probe, expected=self.probe.call(self.block, self.probe.hidden))
        if stage.kind == Kind.ROUND:  # a settled group's statistics are needed by nobody
            self.observations.forget(groups)
        self._spent("install", started)

    def _data(self, behind: Stream) -> BlockData:
        run_time = self.run_time or self.calibrated()

        def call_of(hidden: Tensor) -> BlockCall:
            return behind.call(self.index, hidden)

        def teacher(hidden: Tensor) -> Tensor:
            with torch.no_grad():
                return call_of(hidden)(self.block, hidden)

        return BlockData(
            inputs=tuple(behind.chunks),
            full_inputs=self.full_inputs,
            targets=tuple(self.streams.full.chunks),
            student=make_student(self.block, self.whole, run_time.inputs, run_time.cache, call_of),
            teacher=teacher,
            report=self.report,
        )

    def _transformed(self, stage: Stage, outcome: Outcome) -> None:
        """Prove the transform, and see again what later stages look at where it cannot follow."""
        self.guard(stage)
        stages = self.recipe.pipeline.stages
        later = stages[stages.index(stage) + 1 :]
        full = any(need.stream == "full" for other in later for need in other.needs)
        if outcome.observe_again and (full or self.recipe.pairs):
            self.observe_again()
        elif outcome.observe_again:
            self.observations.forget_all()

    def _spent(self, name: str, started: float) -> float:
        spent = time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        return spent

    def _install(self, stage: Stage, outcome: Outcome) -> None:
        for path, value in outcome.parameters.items():
            self.block.get_parameter(path).data.copy_(value)
        groups = {group.index: group for group in self.structure.groups}
        for group, scale in outcome.input_scales.items():
            self.observations.rescale(group, scale)
        for group, transform in outcome.online.items():
            for ref in groups[group].weights:
                attach(self.block, ref.name, transform)
            self.observations.transform(group, transform)
        refs = {ref.name: ref for group in self.structure.groups for ref in group.weights}
        for name, codes in outcome.codes.items():
            refs[name].write(self.block, codes.dequantize())
        if self.recipe.pipeline.keeps_ranges(stage):
            self.ranges |= outcome.ranges
        self.codes |= outcome.codes
        self.metrics += (*outcome.metrics, *fingerprints(stage, outcome, groups))

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


def _stream_error(quantized: Stream, full: Stream) -> float:
    """Relative squared distance of the two streams behind the block, over all calibration tokens."""
    pairs = list(zip(quantized.chunks, full.chunks, strict=True))
    change = sum((q.float() - f.float()).square().sum(dtype=torch.float64).item() for q, f in pairs)
    return change / max(sum(f.float().square().sum(dtype=torch.float64).item() for _, f in pairs), 1e-38)
