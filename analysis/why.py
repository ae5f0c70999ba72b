"""Why two runs differ: their settings and environments, where their states part, which layers err more, and what that
did to the metrics."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from analysis.compare import Comparison, compare
from analysis.divergence import Parting, part
from analysis.layers import Layer, LayerInfo, layer_info, layers_of, metric_names, module_kind
from analysis.tables.labels import point_labels, setting_differences
from qbench.errors import SpecError
from qbench.spec import difference
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.records import LayerMetric, RunRow

#: Errors that are contrasted wherever both runs have them; layers are listed by the first one.
ERRORS = ("output_error", "weight_error", "sqnr_db", "stream_error")
#: Curves have parted where they stay further apart than this, relative to the smaller one.
PARTED = 0.05


@dataclass(frozen=True, kw_only=True)
class KindContrast:
    """One kind of module: how many weights, the means of both runs, A / B or A - B of a typical one (see
    `ErrorContrast`), and its share of all absolute differences."""

    kind: str
    n: int
    mean_a: float
    mean_b: float
    typical: float | None
    share: float


@dataclass(frozen=True, kw_only=True)
class ErrorContrast:
    """One error of all layers that both runs have it of. typical: the geometric mean of A / B, or for metrics compared
    by their difference the mean of A - B. by_ratio, by_difference: layers in which they are furthest apart. parted: the
    first block from which A and B stay apart by more than `PARTED` in one direction, for errors of whole blocks."""

    info: LayerInfo
    n: int
    a_better: int
    b_better: int
    typical: float | None
    kinds: tuple[KindContrast, ...]
    by_ratio: tuple[Layer, ...]
    by_difference: tuple[Layer, ...]
    parted: int | None = None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """All that `qbench why` shows. settings leave out the pipeline, which `parting` has; notes say what could not be
    looked at, and why. same_codes: None where a run has no digest of its codes."""

    a: RunRow
    b: RunRow
    labels: tuple[str, str]
    same_codes: bool | None
    settings: tuple[tuple[str, object, object], ...]
    environment: tuple[tuple[str, object, object], ...]
    parting: Parting
    errors: tuple[ErrorContrast, ...]
    comparison: Comparison | None
    notes: tuple[str, ...]

    @property
    def same_experiment(self) -> bool:
        return self.a.key == self.b.key

    @property
    def seeds_alone(self) -> bool:
        """Whether the settings differ in nothing but seeds."""
        return not self.same_experiment and self.a.family is not None and self.a.family == self.b.family

    def as_json(self) -> dict[str, object]:
        """Plain values for JSON."""
        differences = {
            name: [{"setting": path, "a": here, "b": there} for path, here, there in values]
            for name, values in (("settings", self.settings), ("environment", self.environment))
        }
        compared = self.comparison.as_json() if self.comparison is not None else None
        return {
            **{side: {"id": run.id, "key": run.key, "label": label, "codes_sha256": run.codes_sha256}
               for side, run, label in zip("ab", (self.a, self.b), self.labels, strict=True)},
            **{"same_experiment": self.same_experiment, "seeds_alone": self.seeds_alone, "same_codes": self.same_codes},
            **differences,
            "parting": asdict(self.parting),
            "errors": [asdict(each) for each in self.errors],
            "notes": list(self.notes),
            "comparison": compared,
        }  # fmt: skip


def explain(database: Database, a: RunRow, b: RunRow, *, top: int = 5, **options: Any) -> Explanation:
    """Compare two runs in all that could make their numbers differ.

    top: layers to list by ratio and by difference. options: as `compare` takes them. What does not apply (layers of
    different models, metrics of a run that is not finished) is left out with a note. SpecError for one run twice.
    """
    if a.id == b.id:
        raise SpecError("run", f"{a.id} {b.id}", "two runs: these are one and the same")
    if top < 1:
        raise SpecError("top", top, "at least 1 layer")
    notes, comparison, errors = [], None, ()
    rows: list[list[LayerMetric]] = [[], []]
    if unfinished := [run for run in (a, b) if run.status != "done"]:
        which = " and ".join(f"run {run.id} is {run.status}" for run in unfinished)
        notes.append(f"{which}: settings and environments alone are compared")
    else:
        comparison = compare(database, a, b, **options)
        rows = [queries.layer_metrics(database, run.id) for run in (a, b)]
        if (reason := _no_layers(a, b, rows)) is not None:
            notes.append(reason)
            rows = [[], []]
        else:
            errors = tuple(found for name in ERRORS if (found := _contrast(name, *rows, top=top)) is not None)
            notes += _lacking(rows)
    labels = point_labels([a, b])
    return Explanation(
        a=a,
        b=b,
        labels=(labels[0], labels[-1]),
        same_codes=None if None in (a.codes_sha256, b.codes_sha256) else a.codes_sha256 == b.codes_sha256,
        settings=tuple(setting_differences(*(_settings(run.spec) for run in (a, b)))),
        environment=_environments(database, a, b),
        parting=part(a, b, *rows),
        errors=errors,
        comparison=comparison and replace(comparison, settings=()),  # shown with the pipeline, above
        notes=tuple(notes),
    )


def _settings(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """The spec without its pipeline, overrides by their labels."""
    rest = {name: value for name, value in spec.items() if name != "pipeline"}
    scheme = rest.get("scheme")
    if isinstance(scheme, Mapping) and scheme.get("overrides"):
        overrides = {each.get("label") or f"override {i + 1}": each for i, each in enumerate(scheme["overrides"])}
        rest["scheme"] = {**scheme, "overrides": overrides}
    elif isinstance(scheme, Mapping) and "overrides" in scheme:
        rest["scheme"] = {**scheme, "overrides": {}}
    return rest


def _environments(database: Database, a: RunRow, b: RunRow) -> tuple[tuple[str, object, object], ...]:
    """Wherever machines, software, device and source differ."""
    sides = [
        {**asdict(queries.environment(database, run.environment_id)), "device": run.device, "source": run.source}
        for run in (a, b)
    ]
    return tuple(difference(*sides))


def _no_layers(a: RunRow, b: RunRow, rows: Sequence[Sequence[LayerMetric]]) -> str | None:
    """Why layers cannot be compared; None if they can."""
    fingerprints = [run.spec.get("model", {}).get("fingerprint", run.model) for run in (a, b)]
    if fingerprints[0] != fingerprints[1]:
        return (
            f"different models ({a.model}, {b.model}): their layers are not the same weights; settings, costs and "
            "metrics on tasks can still be compared"
        )
    for run, mine in zip((a, b), rows, strict=True):
        if not mine:
            why = "full precision has no quantized layers" if run.algo == "none" else "none are stored"
            return f"run {run.id} has no layer metrics ({why}): where the runs part cannot be seen"
    return None


_WITHOUT_INPUTS = ": the other's method collected no input statistics for it"


def _lacking(rows: Sequence[Sequence[LayerMetric]]) -> list[str]:
    """What only one run has of the errors."""
    names = [set(metric_names(mine)) for mine in rows]
    return [
        f"only {'A' if name in names[0] else 'B'} has {name}{_WITHOUT_INPUTS if name == 'output_error' else ''}"
        for name in ERRORS
        if (name in names[0]) != (name in names[1])
    ]


def _contrast(name: str, of_a: Sequence[LayerMetric], of_b: Sequence[LayerMetric], *, top: int) -> ErrorContrast | None:
    """The error of all layers that both have, None where there is none."""
    layers = [each for each in layers_of((of_a, of_b), name) if None not in each.values]
    if not layers:
        return None
    info = layer_info(name)
    differing = [each for each in layers if each.values[0] != each.values[1]]
    a_better = sum((each.values[0] > each.values[1]) == bool(info.higher_is_better) for each in differing)
    kinds: dict[str, list[Layer]] = defaultdict(list)
    for each in layers:
        kinds[module_kind(each.module)].append(each)
    total = math.fsum(_apart(each) for each in layers)
    by_ratio = sorted(differing, key=lambda each: -_factor(each)) if info.ratio else []
    return ErrorContrast(
        info=info,
        n=len(layers),
        a_better=a_better,
        b_better=len(differing) - a_better,
        typical=_typical(layers, info),
        kinds=tuple(
            KindContrast(
                kind=kind,
                n=len(mine),
                mean_a=math.fsum(each.values[0] for each in mine) / len(mine),
                mean_b=math.fsum(each.values[1] for each in mine) / len(mine),
                typical=_typical(mine, info),
                share=math.fsum(_apart(each) for each in mine) / total if total else 0.0,
            )
            for kind, mine in kinds.items()
        ),
        by_ratio=tuple(by_ratio[:top]),
        by_difference=tuple(sorted(differing, key=lambda each: -_apart(each))[:top]),
        parted=_parted(layers) if info.ratio and set(kinds) == {module_kind("")} else None,
    )


def _apart(layer: Layer) -> float:
    return abs(layer.values[0] - layer.values[1])


def _factor(layer: Layer) -> float:
    """By how much the larger one is more; infinite against 0."""
    small, large = sorted(map(abs, layer.values))
    return large / small if small else math.inf


def _typical(layers: Sequence[Layer], info: LayerInfo) -> float | None:
    if not info.ratio:
        return math.fsum(each.values[0] - each.values[1] for each in layers) / len(layers)
    logs = [math.log(each.values[0] / each.values[1]) for each in layers if min(each.values) > 0]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def _parted(layers: Sequence[Layer]) -> int | None:
    """The first block from which the values stay apart in one direction, None if they don't in the last one."""
    found, direction = None, 0
    for each in sorted(layers, key=lambda layer: -layer.block):
        first, second = each.values
        side = (first > second) - (first < second) if _factor(each) > 1 + PARTED else 0
        if side == 0 or direction not in (0, side):
            break
        found, direction = each.block, side
    return found
