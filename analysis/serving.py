"""Which runs a runtime can serve, by the data file `analysis/data/runtimes.yaml`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qbench.errors import SpecError
from qbench.store.records import RunRow

_FILE = Path(__file__).parent / "data" / "runtimes.yaml"
_ZEROS = ("sym", "asym", "asym-float")
_RANGES = ("mse", "percentile", "share", "absmean")  # how ranges were fitted is not stored
_REACHES = ("narrow",)  # leaves codes unused, which every kernel can read


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel of a runtime with what it takes: see the data file."""

    name: str
    weights: tuple[Mapping[str, Any], ...]
    inputs: tuple[str | None, ...]
    cache: tuple[str | None, ...]

    def refusal(self, run: RunRow) -> str | None:
        """Why this run cannot be served; None if it can."""
        label = run.weight_format or ""
        if label.endswith("+mixed"):
            return f"{self.name} takes one weight format, not {label}"
        if not any(_takes(each, label) for each in self.weights):
            return f"{self.name} does not take weights {label or 'in full precision'}"
        if run.act_format not in self.inputs:
            return f"{self.name} does not take inputs {run.act_format or 'in full precision'}"
        if run.kv_format not in self.cache:
            return f"{self.name} does not take a cache {run.kv_format or 'in full precision'}"
        online = [stage["name"] for stage in run.spec.get("pipeline") or () if _works_at_run_time(stage)]
        return f"{self.name} does not do what {online[0]} leaves for run time" if online else None


def kernel(name: str) -> Kernel:
    """The kernel that is called `<runtime>:<kernel>`; SpecError for one that is not in the data file."""
    runtime, _, which = name.partition(":")
    found = _data()["runtimes"].get(runtime, {}).get(which)
    if found is None:
        raise SpecError("kernel", name, f"one of {', '.join(kernel_names())}")
    return Kernel(
        name=name, weights=tuple(found["weights"]), inputs=tuple(found["inputs"]), cache=tuple(found["cache"])
    )


def kernel_names() -> tuple[str, ...]:
    """All kernels of the data file, such as "vllm:w4a16"."""
    return tuple(f"{runtime}:{name}" for runtime, kernels in _data()["runtimes"].items() for name in kernels)


def _takes(weights: Mapping[str, Any], label: str) -> bool:
    """Whether the label of a weight format is among those listed: element, block, then zero point and the like."""
    element, *words = label.split("_")
    words = [word for word in words if word not in _RANGES]
    if element not in weights["elements"]:
        return False
    if "blocks" not in weights:
        return not words
    if not words or words[0] not in weights["blocks"]:
        return False
    zeros = [word for word in words[1:] if word in _ZEROS]
    others = [word for word in words[1:] if word not in _ZEROS and word not in _REACHES]
    return not others and zeros == [zero for zero in zeros if zero in weights.get("zeros", ())]


def _works_at_run_time(stage: Mapping[str, Any]) -> bool:
    harmless = _data()["at_run_time"].get(stage["name"])
    if harmless is None:
        return False
    options = dict(stage.get("options") or {})
    return not harmless or not all(options.get(name) in values for name, values in harmless.items())


@cache
def _data() -> Mapping[str, Any]:
    import yaml  # here: only a wish for a runtime needs it

    return yaml.safe_load(_FILE.read_text(encoding="utf-8"))
