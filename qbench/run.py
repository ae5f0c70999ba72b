"""One run, start to end: claim its key, quantize, measure, export, and store everything in one transaction."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from qbench.compose import DTYPES, Point
from qbench.engine.passes import PassResult, run_pass
from qbench.engine.resume import ResumePoint
from qbench.engine.rotated import rotated
from qbench.engine.sinks import Ledger, Weights, parameter_bytes
from qbench.engine.source import Source
from qbench.engine.threads import threads
from qbench.errors import NumericsError, SpecError
from qbench.evaluation.base import CalibrationEvaluation, Evaluation, Subject, WindowEvaluation
from qbench.evaluation.perplexity import stream_nll
from qbench.export.hf import StreamExport, export_memory
from qbench.formats.scheme import Scheme
from qbench.measure import PeakMemory, Phases, release_free_memory
from qbench.scheme_weights import nominal_bits
from qbench.session import Session
from qbench.spec import digest
from qbench.store import queries
from qbench.store.database import Database, Heartbeat
from qbench.store.records import Artifact, Environment, Failure, LayerMetric, Measurement, Outcome, RunColumns, RunRow

#: Called with (phase, done, total) and, while a stage learns, how far it has come.
Progress = Callable[..., None]

Result = Literal["done", "failed", "busy"]


@dataclass(frozen=True)
class Failed:
    """A measurement that did not succeed: its record, and the exception itself."""

    record: Failure
    error: Exception


@dataclass(frozen=True)
class Computed:
    """What carrying out a point gave."""

    outcome: Outcome
    measurements: tuple[Measurement, ...]
    layer_metrics: tuple[LayerMetric, ...]
    artifacts: tuple[Artifact, ...]
    failed: tuple[Failed, ...] = ()


def execute(
    point: Point, session: Session, database: Database, resume_root: Path, progress: Progress
) -> tuple[Result, BaseException | None]:
    """Carry out a point that has no finished row. "busy" if another process holds it (or has just finished it).

    Where some measurements fail and others do not, the run is done, the failures are stored beside it and the first is
    returned. Any other exception becomes a `failed` row with its trace and is returned; KeyboardInterrupt leaves the
    row running, to be taken over by the next invocation.
    """
    key = point.spec.key()
    claim = database.begin(columns(point), key, session.environment(point))
    if claim is None:
        return "busy", None
    phases, started, memory = Phases(), time.perf_counter(), PeakMemory(point.device)
    with Heartbeat(database, claim):
        try:
            folder = _resume_folder(resume_root, point)
            computed = compute(point, point.evaluations, session, phases, memory, folder, progress)
            if computed.failed and not computed.measurements:
                raise computed.failed[0].error
            found = computed.measurements, computed.layer_metrics, computed.artifacts
            failures = [each.record for each in computed.failed]
            database.finish(claim, computed.outcome, *found, failures)
        except Exception as error:
            spent = Outcome(
                phases=phases.seconds,
                total_s=time.perf_counter() - started,
                peak_host_bytes=memory.host_bytes(),
                peak_device_bytes=memory.device_bytes(),
            )
            trace = "".join(traceback.format_exception(error))
            database.fail(claim, type(error).__name__, _one_line(error), trace, spent)
            return "failed", error
    return "done", computed.failed[0].error if computed.failed else None


def measure_again(
    point: Point,
    row: RunRow,
    missing: tuple[Evaluation, ...],
    session: Session,
    database: Database,
    resume_root: Path,
    progress: Progress,
) -> None:
    """Append the measurements (and the export) that a finished run lacks. What reads its texts alone is taken at once;
    for everything else the run is rebuilt, on as many threads as it ran on.

    Raises NumericsError if the rebuilt codes are not the run's: then the number would belong to another model.
    """
    of_texts, others = _split(missing)
    found, failed = _measure_texts(point, of_texts, session)
    count = queries.environment(database, row.environment_id).threads
    here = replace(session.environment(point), threads=count)
    database.append(row.id, found, failures=[each.record for each in failed], environment=here)
    if others or point.export is not None:
        failed += _rebuild(point, row, others, session, database, resume_root, progress, here)
    if failed:
        raise failed[0].error


def _rebuild(
    point: Point,
    row: RunRow,
    missing: tuple[Evaluation, ...],
    session: Session,
    database: Database,
    resume_root: Path,
    progress: Progress,
    here: Environment,
) -> tuple[Failed, ...]:
    """Carry the run out once more for these measurements (and the export), and append them; those that failed. `here`
    is where that happens, on the run's number of threads."""
    memory, folder = PeakMemory(point.device), _resume_folder(resume_root, point)
    with threads(here.threads):
        computed = compute(point, missing, session, Phases(), memory, folder, progress)
    if computed.outcome.codes_sha256 != row.codes_sha256:
        raise NumericsError(
            f"run {row.id} ({point.label}): rebuilding it here gives other codes than the stored run (other machine or "
            "library versions); use another store.url for this environment"
        )
    failures = [each.record for each in computed.failed]
    database.append(row.id, computed.measurements, computed.artifacts, failures, here)
    return computed.failed


def _resume_folder(root: Path, point: Point) -> Path:
    """Where the point leaves resume points: apart for every source and export, which a pass cannot change halfway."""
    target = str(point.export.absolute()) if point.export is not None else None
    return root / f"{point.spec.key()}-{digest([point.source, target])[:12]}"


def columns(point: Point) -> RunColumns:
    """What the row says before the run starts."""
    spec = point.spec
    scheme, calibration = point.scheme or Scheme(), spec.calibration
    weight, inputs, cache = scheme.weight, scheme.input, scheme.cache
    return RunColumns(
        model=spec.model.name,
        algo=spec.algo,
        spec=spec.describe(),
        weight_format=(weight.label if weight else spec.model.dtype) + ("+mixed" if scheme.overrides else ""),
        act_format=inputs.label if inputs else None,
        kv_format=cache.label if cache else None,
        bits=nominal_bits(weight),
        act_bits=nominal_bits(inputs.format) if inputs else None,
        kv_bits=nominal_bits(cache.key) if cache else None,
        group_size=weight.group_size if weight and not weight.tiled else None,
        symmetric=weight.symmetric if weight else None,
        calib=calibration.label if calibration else None,
        calib_n=calibration.n if calibration else None,
        calib_length=calibration.length if calibration else None,
        calib_seed=calibration.seed if calibration else None,
        device=str(point.device),
        dtype=spec.model.dtype,
        source=point.source,
        family=spec.family(),
    )


def compute(
    point: Point,
    evaluations: tuple[Evaluation, ...],
    session: Session,
    phases: Phases,
    memory: PeakMemory,
    resume_folder: Path,
    progress: Progress,
) -> Computed:
    """Quantize, measure and export; touches no database."""
    started = time.perf_counter()
    of_texts, evaluations = _split(evaluations)
    with phases("load"):
        loaded = session.source(point)
        calibration = session.calibration(point)
    with phases("rotate"):
        source = rotated(loaded, point.recipe, calibration, partial(progress, "rotate"))
    if point.export is not None and not source.loadable:
        raise SpecError("export", "hf", f"{point.spec.algo} leaves no checkpoint that the model's own class could load")
    resume = ResumePoint(resume_folder, point.resume_s)
    job = _Job(point, evaluations, calibration, source, session, phases, resume)
    carry_out = job.in_memory if point.source == "memory" else job.streamed
    ledger, measurements, artifacts = carry_out(progress)
    with phases("evaluate"):
        found, failed = _measure_texts(point, of_texts, session)
    measurements, failed = [*measurements, *found], (*job.failed, *failed)
    sizes = _sizes(source, ledger, DTYPES[point.spec.model.dtype])
    outcome = Outcome(
        **sizes,
        quantize_s=phases.seconds.get("quantize", 0.0),
        evaluate_s=phases.seconds.get("evaluate", 0.0),
        load_s=phases.seconds["load"],
        total_s=time.perf_counter() - started,
        phases=phases.seconds | _stage_seconds(ledger),
        peak_host_bytes=memory.host_bytes(),
        peak_device_bytes=memory.device_bytes(),
        codes_sha256=ledger.codes_sha256,
    )
    layers = tuple(LayerMetric(block=b, module=m, name=n, value=v) for b, m, n, v in (*source.metrics, *ledger.metrics))
    return Computed(outcome, tuple(measurements), layers, tuple(artifacts), failed)


def _split(
    evaluations: Sequence[Evaluation],
) -> tuple[tuple[CalibrationEvaluation, ...], tuple[Evaluation, ...]]:
    """Those that read the run's texts alone, and those that need its model."""
    of_texts = tuple(each for each in evaluations if isinstance(each, CalibrationEvaluation))
    return of_texts, tuple(each for each in evaluations if not isinstance(each, CalibrationEvaluation))


def _measure_texts(
    point: Point, evaluations: Sequence[CalibrationEvaluation], session: Session
) -> tuple[list[Measurement], list[Failed]]:
    """What evaluations that need no model give, and those that fail."""
    context, failed = session.context(point), []
    each = (_guarded(evaluation, partial(evaluation.of_texts, context), failed) for evaluation in evaluations)
    return [measurement for found in each for measurement in found], failed


def _guarded(
    evaluation: Evaluation, measure: Callable[[], list[Measurement]], failed: list[Failed]
) -> list[Measurement]:
    """What `measure` gives; nothing if it fails, which must not cost the run its other measurements: it is added to
    `failed`."""
    try:
        return measure()
    except Exception as error:
        spec = evaluation.spec
        record = Failure(
            evaluator=spec.evaluator,
            protocol=spec.protocol,
            task=spec.task,
            spec_key=spec.key(),
            error_type=type(error).__name__,
            message=_one_line(error),
            trace=traceback.format_exc(),
        )
        failed.append(Failed(record, error))
        return []


@dataclass(frozen=True)
class _Job:
    """All that carrying out one point takes, gathered."""

    point: Point
    evaluations: tuple[Evaluation, ...]
    calibration: torch.Tensor | None
    source: Source
    session: Session
    phases: Phases
    resume: ResumePoint
    failed: list[Failed] = field(default_factory=list)

    def in_memory(self, progress: Progress) -> tuple[Ledger, list[Measurement], list[Artifact]]:
        """Quantize all blocks, then evaluate token-major on the model that holds the decoded weights."""
        ledger, weights, before = Ledger(), Weights(self.source.prefix), None
        if self.point.recipe is not None:
            with self.phases("quantize"):
                result = self._pass(progress)
            ledger, weights, before = result.ledger, result.weights, result.unrounded
            release_free_memory()
        measurements, artifacts = [], []
        with self.phases("evaluate"):
            subject = self.session.subject(self.point, self.source, weights, before)
            for evaluation in self.evaluations:
                measure = partial(self._measured, evaluation, subject, progress)
                measurements += _guarded(evaluation, measure, self.failed)
        if self.point.export is not None:
            with self.phases("export"), weights.inside(self.source.model) as model:
                artifacts.append(export_memory(self.point.export, model, self.point.model))
        return ledger, measurements, artifacts

    def _measured(self, evaluation: Evaluation, subject: Subject, progress: Progress) -> list[Measurement]:
        report = partial(progress, f"evaluate {evaluation.spec.task}")
        return evaluation.measure(replace(subject, batch=evaluation.batch), report)

    def streamed(self, progress: Progress) -> tuple[Ledger, list[Measurement], list[Artifact]]:
        """One pass over the blocks on disk: quantize one, push evaluation streams through it, export it, drop it."""
        target, model = self.point.export, self.point.model
        export = StreamExport(target, self.source, model) if target is not None else None
        context = self.session.context(self.point)
        evaluations = [each for each in self.evaluations if isinstance(each, WindowEvaluation)]
        windows = tuple(each.windows(context) for each in evaluations)
        with self.phases("quantize"):  # the evaluation streams' forwards are inside: one trip serves both
            result = self._pass(progress, windows, export)
        measurements = []
        with self.phases("evaluate"):
            for evaluation, tokens, stream in zip(evaluations, windows, result.evaluations, strict=True):
                named = partial(progress, f"evaluate {evaluation.spec.task}")
                nll = stream_nll(self.source, stream, tokens, named, result.weights.head)
                measurements += _guarded(evaluation, partial(evaluation.measurements, nll, context), self.failed)
        with self.phases("export"):
            artifacts = [export.close(result.weights.head)] if export is not None else []
        return result.ledger, measurements, artifacts

    def _pass(
        self, progress: Progress, windows: tuple[torch.Tensor, ...] = (), export: StreamExport | None = None
    ) -> PassResult:
        return run_pass(
            self.source,
            self.point.recipe,
            self.calibration,
            evaluations=windows,
            keep_weights=self.point.source == "memory",
            keep_unrounded=any(each.keeps_unrounded for each in self.evaluations),
            structures=self.session.structure_cache(self.point.model),
            receive=export.receive if export is not None else lambda finished: None,
            resume=self.resume,
            progress=partial(progress, "quantize"),
            learning=partial(progress, "quantize"),
        )


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _sizes(source: Source, ledger: Ledger, dtype: torch.dtype) -> dict[str, float | int]:
    """True bits: codes, scales and zero points of the quantized weights; everything else at the width of `dtype`."""
    other = parameter_bytes(source.model, source.prefix, dtype)
    count = sum(p.numel() for p in source.model.parameters())
    width = dtype.itemsize * 8
    if ledger.head_bits is not None:  # a head that was the embedding is now a tensor of its own
        other["head"] = -(-ledger.head_bits // 8)
    kept_bytes = sum(other.values()) - ledger.weight_count * dtype.itemsize
    model_bytes = kept_bytes + -(-ledger.weight_bits // 8)
    return {
        "bits_per_weight": ledger.weight_bits / ledger.weight_count if ledger.weight_count else float(width),
        "bits_per_weight_model": model_bytes * 8 / count,
        "embedding_bytes": other["embedding"],
        "head_bytes": other["head"],
        "model_bytes": model_bytes,
    }


def _stage_seconds(ledger: Ledger) -> dict[str, float]:
    """Seconds per stage over all blocks, from the layer metrics."""
    seconds: dict[str, float] = {}
    for _, module, name, value in ledger.metrics:
        if module == "" and name.endswith("_s"):
            seconds[f"stage {name.removesuffix('_s')}"] = seconds.get(f"stage {name.removesuffix('_s')}", 0.0) + value
    return seconds
