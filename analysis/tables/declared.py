"""Records of a declared table: what it wants, as run keys and spec keys, and what was found for it.

`analysis.tables.filled` fills it from the database; nothing here knows how a run is composed or carried out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qbench.metrics import MetricInfo, metric_info

State = Literal["done", "missing", "stale", "failed", "running", "undefined"]


def _cost(name: str, label: str, quantity: str, unit: str = "") -> MetricInfo:
    return MetricInfo(name=name, label=label, quantity=quantity, unit=unit, higher_is_better=False)


#: Columns of a run that a table may show like a metric, and the divisor to their unit.
RUN_COLUMNS: dict[str, tuple[MetricInfo, float]] = {
    "quantize_s": (_cost("quantize_s", "quantize", "seconds to quantize", "s"), 1.0),
    "peak_host_bytes": (_cost("peak_host_bytes", "peak memory", "largest resident set", "MB"), 1e6),
    "peak_device_bytes": (_cost("peak_device_bytes", "GPU memory", "largest memory on the device", "MB"), 1e6),
    "model_bytes": (_cost("model_bytes", "model", "bytes of the whole model", "MB"), 1e6),
    "bits_per_weight": (_cost("bits_per_weight", "bits/weight", "bits per quantized weight"), 1.0),
    "bits_per_weight_model": (_cost("bits_per_weight_model", "bits/parameter", "bits per parameter"), 1.0),
}
#: Those of them that say something of the full-precision run.
OF_FULL_PRECISION = ("model_bytes", "bits_per_weight", "bits_per_weight_model")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A run and the measurements of it that a cell needs; `baseline` is the key of the full-precision run that it is
    compared with, `spec` what `RunSpec.describe` says of it."""

    key: str
    baseline: str
    spec_keys: tuple[str, ...]
    spec: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a cell shows: the mean over `wanted` and their measurements of the first of the metrics that there is.
    `reason`: why there is none."""

    metric: tuple[str, ...]
    wanted: tuple[Wanted, ...] = ()
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A table without its values: labels of rows and columns (one per axis), and cells [rows][columns].

    `aggregate` "none" refuses cells of several values. `best` says among which cells the best are marked: those of a
    column, of a group (a column, where all row labels but the last agree), of a row, or "none".
    """

    name: str
    size: str
    title: str
    caption: str
    row_axes: tuple[str, ...]
    column_axes: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    columns: tuple[tuple[str, ...], ...]
    cells: tuple[tuple[Cell, ...], ...]
    aggregate: str = "none"
    best: str = "column"


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A cell with its values. `delta` is the difference from full precision, its stderr paired; of a mean of repeats
    `spread` is their standard deviation. `spec_keys` are of the measurements, `notes` footnotes."""

    state: State
    info: MetricInfo | None = None
    value: float | None = None
    stderr: float | None = None
    delta: float | None = None
    delta_stderr: float | None = None
    spread: float | None = None
    n: int | None = None
    protocol: str = ""
    run_ids: tuple[int, ...] = ()
    best: bool = False
    spec_keys: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row as it is drawn; `full_precision` ones stand above those that are compared with them."""

    labels: tuple[str, ...]
    cells: tuple[Filled, ...]
    full_precision: bool = False


@dataclass(frozen=True, kw_only=True)
class FilledTable:
    """`counts` are of the cells, by state; `notes` hold for all of them."""

    declared: Declared
    rows: tuple[Row, ...]
    caption: str
    counts: Mapping[str, int]
    run_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()


def infos_of(table: FilledTable, column: int) -> list[MetricInfo]:
    """What the cells of a column show; of a column without any value what is known of the metrics it was declared
    with."""
    shown = [row.cells[column].info for row in table.rows if row.cells[column].info is not None]
    wanted = (row[column].metric[0] for row in table.declared.cells)
    return shown or [RUN_COLUMNS[name][0] if name in RUN_COLUMNS else metric_info(name) for name in wanted]
