"""What a run's layer metrics say, by block and kind of module: maps, the worst layers, and two runs on one grid."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qbench.errors import SpecError
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.records import LayerMetric, RunRow

#: Ends the names of digests of states, which are no quantities.
FINGERPRINT = "_fingerprint"
#: The row of a map for what belongs to a block as a whole.
WHOLE_BLOCK = "block"


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """How to read one layer metric. `ratio`: two values are compared by their ratio (errors, which span orders of
    magnitude), else by their difference. higher_is_better: None where neither direction is better."""

    name: str
    title: str
    unit: str = ""
    higher_is_better: bool | None = None
    ratio: bool = False

    @property
    def label(self) -> str:
        """Title, unit and better direction, for an axis."""
        better = {True: " (better ↑)", False: " (better ↓)", None: ""}[self.higher_is_better]
        return self.title + (f", {self.unit}" if self.unit else "") + better


def _error(name: str, title: str) -> LayerInfo:
    return LayerInfo(name=name, title=title, higher_is_better=False, ratio=True)


_KNOWN = (
    _error("output_error", "output error E‖ΔWx‖²/E‖Wx‖²"),
    _error("weight_error", "weight error ‖ΔW‖²/‖W‖²"),
    LayerInfo(name="sqnr_db", title="SQNR of the weights", unit="dB", higher_is_better=True),
    _error("stream_error", "stream error behind the block"),
    LayerInfo(name="output_cosine", title="cosine of the outputs", higher_is_better=True),
    LayerInfo(name="weight_kurtosis", title="kurtosis of the weights before rounding", ratio=True),
    LayerInfo(name="input_kurtosis", title="kurtosis of the inputs before quantization", ratio=True),
)
_BY_NAME = {each.name: each for each in _KNOWN}
_ORDER = tuple(_BY_NAME)


def layer_info(name: str) -> LayerInfo:
    """What is known of a layer metric; of others what their names say."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    words = name.replace("_", " ")
    if name.endswith("_s"):
        return LayerInfo(name=name, title=words.removesuffix(" s"), unit="s", higher_is_better=False, ratio=True)
    if name.endswith(("_error", "_loss", "_vs_rtn", "_vs_none")):
        return _error(name, words)
    return LayerInfo(name=name, title=words)


def module_kind(module: str) -> str:
    """The type of a module: experts of one parameter are one; "block" for what belongs to no module."""
    if not module:
        return WHOLE_BLOCK
    return re.sub(r"\.\d+(?=\.|$)", ".*", re.sub(r"\[\d+\]", ".*", module)).removesuffix(".weight")


def metric_names(rows: Iterable[LayerMetric]) -> list[str]:
    """The names of what can be drawn, the most telling first, seconds last."""
    names = {row.name for row in rows if not row.name.endswith(FINGERPRINT) and not re.search(r"_loss\d+$", row.name)}
    known = [name for name in _ORDER if name in names]
    return known + sorted(names - set(known), key=lambda name: (name.endswith("_s"), name))


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """One metric of one run. values: float64 [blocks, kinds], the mean of the modules of a kind, NaN where there is no
    value; counts: how many modules that is. Block -1 is what lies outside the blocks."""

    info: LayerInfo
    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    values: np.ndarray
    counts: np.ndarray

    @property
    def whole_blocks(self) -> bool:
        """Whether there is one number per block, and none of modules."""
        return self.kinds in ((), (WHOLE_BLOCK,))


def layer_maps(runs: Sequence[Sequence[LayerMetric]], name: str) -> list[LayerMap]:
    """The metric of each run's rows, all on the same blocks and kinds, kinds in the order of recording."""
    found = []
    for rows in runs:
        cells: dict[tuple[int, str], list[float]] = defaultdict(list)
        for row in rows:
            if row.name == name:
                cells[row.block, module_kind(row.module)].append(row.value)
        found.append(cells)
    blocks = tuple(sorted({block for cells in found for block, _ in cells}))
    kinds = tuple(dict.fromkeys(kind for cells in found for _, kind in cells))
    maps = []
    for cells in found:
        values, counts = np.full((len(blocks), len(kinds)), np.nan), np.zeros((len(blocks), len(kinds)), dtype=int)
        for (block, kind), numbers in cells.items():
            place = blocks.index(block), kinds.index(kind)
            values[place], counts[place] = math.fsum(numbers) / len(numbers), len(numbers)
        maps.append(LayerMap(info=layer_info(name), blocks=blocks, kinds=kinds, values=values, counts=counts))
    return maps


def contrast(first: LayerMap, second: LayerMap) -> np.ndarray:
    """How the first differs from the second: their ratio or difference, by the metric; NaN where either has none (or a
    ratio does not exist). [blocks, kinds]."""
    if not first.info.ratio:
        return first.values - second.values
    whole = np.where(second.values > 0, second.values, np.nan)
    return np.where(first.values > 0, first.values, np.nan) / whole


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer in one or two runs: values by run, None where a run has none."""

    block: int
    module: str
    values: tuple[float | None, ...]

    @property
    def where(self) -> str:
        return f"block {self.block} {self.module}".strip()


def layers_of(runs: Sequence[Sequence[LayerMetric]], name: str) -> list[Layer]:
    """Every layer that any of the runs has the metric of, in the order of recording."""
    found = [{(row.block, row.module): row.value for row in rows if row.name == name} for rows in runs]
    places = dict.fromkeys(place for each in found for place in each)
    return [
        Layer(block=block, module=module, values=tuple(each.get((block, module)) for each in found))
        for block, module in places
    ]


def worst_first(layers: Sequence[Layer], info: LayerInfo) -> list[Layer]:
    """The worst in any run first: the smallest where more is better, else the largest."""
    sign = 1 if info.higher_is_better else -1

    def badness(layer: Layer) -> float:
        return min(sign * value for value in layer.values if value is not None)

    return sorted(layers, key=badness)


def layers_to_draw(database: Database, runs: Sequence[RunRow]) -> list[list[LayerMetric]]:
    """The layer metrics of each run. SpecError for a run without any, and for runs of different models."""
    fingerprints = [run.spec.get("model", {}).get("fingerprint", run.model) for run in runs]
    if len(set(fingerprints)) > 1:
        models = " and ".join(run.model for run in runs)
        raise SpecError("run", runs[1].id, f"of the same model as run {runs[0].id}: the layers of {models} are others")
    found = [queries.layer_metrics(database, run.id) for run in runs]
    for run, rows in zip(runs, found, strict=True):
        if not metric_names(rows):
            ended = "it stored none" if run.status == "done" else f"it is {run.status}"
            why = "full precision has none" if run.algo == "none" else ended
            raise SpecError("run", run.id, f"a run with layer metrics; {why}")
    return found


def chosen_metrics(runs: Sequence[Sequence[LayerMetric]], wanted: Sequence[str]) -> list[str]:
    """The metrics to draw: those wanted, or by default the most telling ones. SpecError for one that no run has."""
    names = metric_names(row for rows in runs for row in rows)
    for name in wanted:
        if name not in names:
            raise SpecError("metric", name, f"what the run has: {', '.join(names)}")
    left_out = {"weight_error"} if "output_error" in names else set()  # SQNR says the same in dB
    return list(wanted) or [name for name in names if name in _BY_NAME and name not in left_out] or names[:1]
