"""What goes into the database and what comes out of it: plain frozen values, without SQLAlchemy.

Times are UTC. `created` and `finished` are ISO 8601 text with seconds ("2026-01-31T12:00:00Z"); `heartbeat`
is seconds since the epoch. Fields that end in `_s` are seconds, in `_bytes` bytes.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from qbench.errors import EvaluationError

Status = Literal["running", "done", "failed"]

# Beyond this a double is about to overflow; SQLite and PostgreSQL both enforce the same bound as a table
# constraint.
LARGEST_VALUE = 1e308


def _require_finite(what: str, value: float) -> None:
    if not abs(value) <= LARGEST_VALUE:  # NaN compares false
        raise EvaluationError(f"{what} is {value}: only finite numbers up to {LARGEST_VALUE:g} are stored")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number that an evaluator found, with what is needed to judge and to compare it.

    `protocol` is part of the number's identity ("window-2048"); `task` is what was evaluated (for perplexity
    the corpus); `stderr` is the standard error of `value` in the same unit, or None where it cannot be known
    (n = 1); `n` counts the items; `spec_key` is the sha256 of the evaluator's canonical spec. `samples`,
    float64 [n] or None, are the per-item values (per-window mean NLL in nats per token), which make paired
    comparison possible. `clusters`, int64 [n] or None, says which items belong together (the document of a
    window): equal numbers, one cluster. `higher_is_better` is the direction as the evaluator knows it; None leaves
    it to `qbench.metrics`. `whole` says whether the n items are all that the task has.

    Raises EvaluationError for a value, stderr or sample that is not finite, a negative stderr, n < 1, samples or
    clusters that are not n numbers, clusters that are not integers or come without samples.
    """

    evaluator: str
    protocol: str
    task: str
    name: str
    value: float
    stderr: float | None
    n: int
    unit: str
    spec_key: str
    samples: np.ndarray | None = field(default=None, repr=False, compare=False)
    clusters: np.ndarray | None = field(default=None, repr=False, compare=False)
    higher_is_better: bool | None = None
    whole: bool | None = None

    def __post_init__(self) -> None:
        where = f"{self.evaluator} {self.name} on {self.task} ({self.protocol})"
        _require_finite(where, self.value)
        if self.n < 1:
            raise EvaluationError(f"{where}: n={self.n}, at least 1 item is needed")
        if self.stderr is not None:
            _require_finite(f"stderr of {where}", self.stderr)
            if self.stderr < 0:
                raise EvaluationError(f"stderr of {where} is {self.stderr}: it must not be negative")
        if self.samples is not None:
            if self.samples.shape != (self.n,):
                raise EvaluationError(f"{where}: samples have shape {self.samples.shape}, expected ({self.n},)")
            bad = np.flatnonzero(~np.isfinite(self.samples))
            if bad.size:
                raise EvaluationError(f"{where}: sample {bad[0]} is {self.samples[bad[0]]}, not a finite number")
        if self.clusters is not None:
            if self.samples is None:
                raise EvaluationError(f"{where}: clusters without samples say nothing; give both or neither")
            if self.clusters.shape != (self.n,) or self.clusters.dtype.kind not in "iu":
                found = f"{self.clusters.dtype} {self.clusters.shape}"
                raise EvaluationError(f"{where}: clusters are {found}, expected integers ({self.n},)")


@dataclass(frozen=True, kw_only=True)
class LayerMetric:
    """One number about one weight or module of one block, for instance its relative output error.

    `block` counts decoder layers from 0; -1 stands for what lies outside them. Raises EvaluationError unless
    finite.
    """

    block: int
    module: str
    name: str
    value: float

    def __post_init__(self) -> None:
        _require_finite(f"{self.name} of block {self.block} {self.module}", self.value)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A measurement that was wanted of a run and did not succeed: whose it was, and what happened."""

    evaluator: str
    protocol: str
    task: str
    spec_key: str
    error_type: str
    message: str
    trace: str


@dataclass(frozen=True, kw_only=True)
class Noise:
    """One component of a metric's noise: how far runs that mean the same differ.

    `family` names runs that differ in their seeds alone (`spec.family`), `spec_key` and `name` the metric, `component`
    what was varied ("calib_seed", "seed", "batch", "threads"). `values` [n] were found under `settings` [n]; `sd` is
    their standard deviation (n - 1 degrees of freedom), in the metric's `unit`.
    """

    family: str
    spec_key: str
    name: str
    component: str
    sd: float
    n: int
    unit: str
    settings: Sequence[int]
    values: Sequence[float]

    def __post_init__(self) -> None:
        _require_finite(f"noise of {self.name} by {self.component}", self.sd)
        if self.n < 2 or not self.n == len(self.settings) == len(self.values):
            raise EvaluationError(f"noise of {self.name} by {self.component}: n={self.n}, 2 or more values are needed")


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A published value with its settings; what its source does not state is None.

    `weight_format` is a row's, or "full precision"; `stages` names those of the pipeline; `tolerance` is a share of the
    value. `n` counts items, None: all there are. `reading` says why no evaluation measures what the source did.
    """

    source: str
    url: str
    model: str
    task: str
    protocol: str
    metric: str
    value: float
    tolerance: float
    algo: str
    weight_format: str
    act_format: str | None = None
    n: int | None = None
    calib: str | None = None
    calib_n: int | None = None
    calib_length: int | None = None
    stages: tuple[str, ...] | None = None
    reading: str | None = None

    def __post_init__(self) -> None:
        _require_finite(f"{self.algo} {self.weight_format} on {self.task} in {self.source}", self.value)

    @property
    def formats(self) -> str:
        """Weights, and inputs where they are quantized."""
        return self.weight_format + (f", inputs {self.act_format}" if self.act_format else "")


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A file or folder that a run left behind. `sha256` is 64 hex digits, `bytes` its size."""

    kind: str
    path: str
    sha256: str | None
    bytes: int


@dataclass(frozen=True, kw_only=True)
class RunColumns:
    """What is known about a run before it starts: the columns that people filter, group and plot by.

    `bits` is a whole number but for ternary weights (1.58). The full-precision baseline has `algo="none"` and
    None in `bits`, `group_size` and `symmetric`.
    `group_size` is -1 for one group per output channel and 0 for one per tensor. `spec` is the canonical spec
    as JSON values.
    """

    model: str
    algo: str
    spec: Mapping[str, Any]
    weight_format: str | None = None
    act_format: str | None = None
    kv_format: str | None = None
    bits: float | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_bits: int | None = None
    kv_bits: int | None = None
    calib: str | None = None
    calib_n: int | None = None
    calib_length: int | None = None
    calib_seed: int | None = None
    device: str | None = None
    dtype: str | None = None
    source: str | None = None
    family: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is known about a run once it has ended, apart from its metrics; a failed run fills what it got to.

    `bits_per_weight` counts the quantized weights with their scales and zeros, `bits_per_weight_model` all
    parameters; `embedding_bytes` and `head_bytes` are part of `model_bytes`. `phases` maps a phase to seconds
    (or to a nested mapping). `codes_sha256` fingerprints all codes and parameters of the quantized weights.
    """

    bits_per_weight: float | None = None
    bits_per_weight_model: float | None = None
    embedding_bytes: int | None = None
    head_bytes: int | None = None
    model_bytes: int | None = None
    sparsity: float | None = None
    quantize_s: float | None = None
    evaluate_s: float | None = None
    load_s: float | None = None
    total_s: float | None = None
    phases: Mapping[str, Any] | None = None
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    codes_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunRow(RunColumns, Outcome):
    """A row of table `run`: the columns, the outcome and the book-keeping."""

    id: int
    key: str
    status: Status
    environment_id: int
    owner: str
    heartbeat: float
    created: str
    finished: str | None = None
    error_type: str | None = None
    error_message: str | None = None
    error_trace: str | None = None
    superseded_by: int | None = None


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """A row of table `metric`; its samples are read separately (`queries.samples`). `environment_id` is where it was
    measured; None in rows of earlier versions, which do not say: as the run. Nor do they say what is `whole`."""

    id: int
    run_id: int
    evaluator: str
    protocol: str
    task: str
    name: str
    value: float
    stderr: float | None
    n: int
    unit: str
    spec_key: str
    created: str
    higher_is_better: bool | None = None
    whole: bool | None = None
    environment_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The per-item values of a metric, float64 [n] in item order, and the cluster of each, int64 [n], where known."""

    values: np.ndarray
    clusters: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The machine and the software that made a number. `git_commit` and `git_dirty` are None outside a
    checkout."""

    git_commit: str | None
    git_dirty: bool | None
    versions: Mapping[str, str]
    platform: str
    cpu: str
    threads: int
    gpu: str | None
    driver: str | None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The right to finish one running row; lost when another process took the row over."""

    run_id: int
    key: str
    owner: str


def field_names(record: type) -> tuple[str, ...]:
    """The field names of a dataclass, in order: the columns that it stands for."""
    return tuple(each.name for each in fields(record))


def pack(values: np.ndarray) -> bytes:
    """`values` [n] as little-endian float64, zlib-compressed: exact, portable, and small for repeated
    values."""
    return _packed(values, "<f8")


def unpack(blob: bytes, n: int) -> np.ndarray:
    """The float64 array [n] that `pack` made `blob` from; EvaluationError if it does not hold n numbers."""
    return _unpacked(blob, n, "<f8", "samples").astype(np.float64)


def pack_clusters(clusters: np.ndarray) -> bytes:
    """`clusters` [n] as little-endian int64, zlib-compressed."""
    return _packed(clusters, "<i8")


def unpack_clusters(blob: bytes, n: int) -> np.ndarray:
    """The int64 array [n] that `pack_clusters` made `blob` from; EvaluationError if it does not hold n numbers."""
    return _unpacked(blob, n, "<i8", "clusters").astype(np.int64)


def _packed(values: np.ndarray, dtype: str) -> bytes:
    return zlib.compress(np.ascontiguousarray(values, dtype=dtype).tobytes())


def _unpacked(blob: bytes, n: int, dtype: str, what: str) -> np.ndarray:
    values = np.frombuffer(zlib.decompress(blob), dtype=dtype)
    if len(values) != n:
        raise EvaluationError(f"stored {what} hold {len(values)} numbers where n={n}")
    return values
