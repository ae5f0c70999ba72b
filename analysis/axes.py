"""What a run's settings are on the axes along which quantization is studied: calibration, transformation, clipping,
reconstruction, format.

Transformations change what is to be rounded without changing the function in full precision, clipping chooses the
ranges that codes cover, reconstruction is how weights are rounded or repaired beyond rounding to nearest, and the
format is what is stored. A stage of two parts (OmniQuant's clipping and scales) counts on both axes where both are on.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qbench.store.records import RunRow

AXES = ("calibration", "transformation", "clipping", "reconstruction", "format")
NOTHING = "none"

#: The axis of each stage; of those that also act on another one see `_also`.
AXIS_OF: Mapping[str, str] = {
    **dict.fromkeys(("quarot", "spinquant"), "transformation"),
    **dict.fromkeys(("awq_scale", "smoothquant", "osplus", "percentile_smooth", "duquant", "magr"), "transformation"),
    **dict.fromkeys(("awq_clip", "mse_clip", "percentile_clip", "omniquant"), "clipping"),
    **dict.fromkeys(("gptq", "gptaq", "quip", "hqq", "adadim", "autoround", "tesseraq", "dgq"), "reconstruction"),
    "normtweaking": "reconstruction",
    "rtn": NOTHING,
}

_RANGES = re.compile(r"_(mse|percentile|share)\b")


def scheme_of(run: RunRow) -> str:
    """What is stored and computed with: formats of weights, inputs and cache, without how ranges were fitted.

    Such as "int4_g64_asym" or "int8_channel_sym, inputs int8_token"; full precision has its dtype.
    """
    weight = _RANGES.sub("", run.weight_format or _integers(run))
    overrides = [str(each.get("label", "")) for each in (_scheme(run).get("overrides") or ())]
    words = [weight + (f" ({'; '.join(overrides)})" if any(overrides) else "")]
    words += [f"inputs {run.act_format}"] if run.act_format else []
    words += [f"cache {run.kv_format}"] if run.kv_format else []
    return ", ".join(words)


def axis_levels(runs: Sequence[RunRow]) -> list[dict[str, str]]:
    """For each run its level on every axis of `AXES`.

    Options of a stage are named where they differ between runs that have the stage. Seeds are no level: runs that
    differ in nothing else are repetitions.
    """
    seen: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        for stage in _pipeline(run):
            for option, value in _options(stage).items():
                seen.setdefault((stage["name"], option), set()).add(str(value))
    varying = {key for key, values in seen.items() if len(values) > 1}
    lengths = {(run.calib_n, run.calib_length) for run in runs if run.calib is not None}
    return [_levels(run, varying, sizes=len(lengths) > 1) for run in runs]


def _levels(run: RunRow, varying: set[tuple[str, str]], *, sizes: bool) -> dict[str, str]:
    parts: dict[str, list[str]] = {axis: [] for axis in AXES}
    for stage in _pipeline(run):
        name, options = stage["name"], _options(stage)
        chosen = [f"{option}={value}" for option, value in options.items() if (name, option) in varying]
        word = f"{name} ({', '.join(chosen)})" if chosen else name
        for axis in {AXIS_OF.get(name, "reconstruction"), *_also(name, options)} - {NOTHING}:
            parts[axis].append(word)
    if (found := _RANGES.findall(run.weight_format or "")) and not parts["clipping"]:
        parts["clipping"] += found
    if run.calib is not None:
        parts["calibration"].append(f"{run.calib} {run.calib_n}×{run.calib_length}" if sizes else run.calib)
    parts["format"].append(scheme_of(run))
    return {axis: " + ".join(words) or NOTHING for axis, words in parts.items()}


def _also(name: str, options: Mapping[str, Any]) -> set[str]:
    """Axes on which a stage acts beside its own, by its options."""
    if name == "omniquant" and options.get("let") not in (False, None, "false"):
        return {"transformation"}
    if name == "quip" and options.get("incoherence"):
        return {"transformation"}
    return set()


def _pipeline(run: RunRow) -> Sequence[Mapping[str, Any]]:
    """The stages of the spec; of a spec without any the algorithm's name as the only one."""
    found = run.spec.get("pipeline")
    return found if found else [{"name": run.algo}]


def _options(stage: Mapping[str, Any]) -> Mapping[str, Any]:
    return dict(stage.get("options") or {})


def _scheme(run: RunRow) -> Mapping[str, Any]:
    return run.spec.get("scheme") or {}


def _integers(run: RunRow) -> str:
    """The format by the columns of integers, for rows without its name."""
    if run.bits is None:
        return run.dtype or "full precision"
    block = {-1: "channel", 0: "tensor", None: "g?"}.get(run.group_size, f"g{run.group_size}")
    return f"int{run.bits:g}_{block}_{'sym' if run.symmetric else 'asym'}"
