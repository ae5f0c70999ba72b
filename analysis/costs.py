"""What accuracy is weighed against: bits, bytes, seconds, memory, or any stored metric (latency, tokens per second)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis.pairing import info_of
from qbench.errors import SpecError
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.records import RunRow


@dataclass(frozen=True, kw_only=True)
class Cost:
    """How to read one cost: `label` stands on axes, `unit` behind a single value. Stored values are divided by
    `divisor`. `of_weights`: a size that full-precision weights have, too, far from that of quantized ones;
    `of_machine`: holds for the machine that measured."""

    name: str
    label: str
    unit: str
    divisor: float = 1.0
    higher_is_better: bool = False
    of_weights: bool = False
    of_machine: bool = False

    @property
    def arrow(self) -> str:
        """Where on a horizontal axis the better values are."""
        return "→" if self.higher_is_better else "←"


BITS = Cost(name="bits_per_weight", label="bits per weight", unit="bits", of_weights=True)

#: Columns of a run that are costs.
RUN_COSTS: Mapping[str, Cost] = {
    each.name: each
    for each in (
        BITS,
        Cost(name="bits_per_weight_model", label="bits per parameter, whole model", unit="bits", of_weights=True),
        Cost(name="model_bytes", label="size of the whole model, MB", unit="MB", divisor=1e6, of_weights=True),
        Cost(name="quantize_s", label="seconds to quantize, calibration included", unit="s", of_machine=True),
        Cost(name="evaluate_s", label="seconds to measure", unit="s", of_machine=True),
        Cost(name="total_s", label="seconds in all", unit="s", of_machine=True),
        Cost(name="peak_host_bytes", label="peak memory, MB", unit="MB", divisor=1e6, of_machine=True),
        Cost(name="peak_device_bytes", label="peak GPU memory, MB", unit="MB", divisor=1e6, of_machine=True),
    )
}
#: What people call some of them.
ALIASES: Mapping[str, str] = {
    **{"bits": "bits_per_weight", "bytes": "model_bytes", "size": "model_bytes"},
    **{"seconds": "quantize_s", "time": "quantize_s", "memory": "peak_host_bytes", "vram": "peak_device_bytes"},
}


def cost_of(database: Database, runs: Sequence[RunRow], name: str) -> tuple[Cost, dict[str, float]]:
    """The cost called `name` and, by run key, its values in the cost's unit where they are known.

    `name` is a column of `RUN_COSTS`, an alias, or a stored metric with a better direction, as "name" or "name@task".
    Raises SpecError for anything else, and where a metric was measured in several ways.
    """
    name = ALIASES.get(name, name)
    if name in RUN_COSTS:
        cost = RUN_COSTS[name]
        stored = {run.key: getattr(run, name) for run in runs}
        return cost, {key: value / cost.divisor for key, value in stored.items() if value is not None}
    metric, _, task = name.partition("@")
    keys = {run.id: run.key for run in runs}
    measured = [each for each in queries.metrics(database, keys) if info_of(each).higher_is_better is not None]
    mine = [each for each in measured if each.name == metric and task in ("", each.task)]
    if not mine:
        others = sorted({each.name for each in measured})
        known = f"{', '.join(RUN_COSTS)}, or a stored metric" + (f": {', '.join(others)}" if others else "")
        raise SpecError("x", name, f"no run stores it; one of {known}")
    ways = dict.fromkeys((each.spec_key, each.task, each.protocol) for each in mine)
    if len(ways) > 1:
        tasks = list(dict.fromkeys(each[1] for each in ways))
        accepted = " or ".join(f"{metric}@{each}" for each in tasks) if len(tasks) > 1 else "a metric of one protocol"
        raise SpecError("x", name, f"it was measured in {len(ways)} ways; {accepted}")
    info = info_of(mine[0])
    label = f"{info.quantity}, {mine[0].task}" + (f", {info.unit}" if info.unit else "")
    cost = Cost(name=metric, label=label, unit=info.unit, higher_is_better=bool(info.higher_is_better))
    return cost, {keys[each.run_id]: each.value for each in mine}
