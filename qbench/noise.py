"""How far a measurement differs between runs that mean the same: the floor below which a difference is chance.

What is varied, one thing at a time, is the components: calibration windows (`calib_seed`), draws of the stages such as
random rotations (`seed`), windows per forward (`batch`) and threads of the machine (`threads`). The first two are runs
of their own; the last two do not belong to a run's meaning, so that their values are kept with the component alone.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev

import torch

from qbench.compose import Point, SweepOptions
from qbench.engine.threads import threads
from qbench.errors import SpecError
from qbench.measure import PeakMemory, Phases
from qbench.run import compute
from qbench.session import Session
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.records import Measurement, Noise
from qbench.sweep import run_points, with_baselines


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How often to repeat: runs per seed, and the batch sizes and thread counts to compare (fewer than two: none)."""

    repeats: int = 5
    batches: tuple[int, ...] = (1, 4)
    threads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.repeats < 2:
            raise SpecError("repeats", self.repeats, "2 or more runs: one shows no spread")
        for option, values in (("batches", self.batches), ("threads", self.threads)):
            if any(value < 1 for value in values) or len(set(values)) < len(values):
                raise SpecError(option, ",".join(map(str, values)), "different integers, 1 or more")


def noise_floor(point: Point, plan: Plan, options: SweepOptions, say: Callable[[str], None] = print) -> list[Noise]:
    """Measure and store the components of `point`'s noise; what was varied although it is none of the point's is said.

    Raises what a failed run raises.
    """
    seeded = _seeded(point, plan.repeats)
    for component in ("calib_seed", "seed"):
        if component not in seeded:
            say(f"  {component}: {point.label} does not depend on it")
    code = run_points(with_baselines([each for variants in seeded.values() for each in variants]), options)
    if code:
        raise SpecError("point", point.label, "runs that succeed: see the failure above")
    session, components = Session(), []
    with Database(options.store_url) as database:
        for component, variants in seeded.items():
            components += _of_runs(database, component, variants)
        for component, settings in (("batch", plan.batches), ("threads", plan.threads)):
            if len(settings) > 1:
                found = [_measured(point, session, component, setting) for setting in settings]
                components += _components(point, component, settings, found)
        database.add_noise(components, session.environment(point))
    return components


def floor(components: Sequence[Noise]) -> float:
    """Standard deviation of all components together, which are independent: the root of the sum of their variances."""
    return math.sqrt(sum(component.sd**2 for component in components))


def _seeded(point: Point, repeats: int) -> dict[str, list[Point]]:
    """The point under other seeds, by component; without those that change nothing."""
    spec, found = point.spec, {}
    if spec.calibration is not None and spec.calibration.seed is not None:
        seeds = [replace(spec.calibration, seed=spec.calibration.seed + k) for k in range(repeats)]
        found["calib_seed"] = [replace(point, spec=replace(spec, calibration=calibration)) for calibration in seeds]
    if spec.seed is not None:
        found["seed"] = [replace(point, spec=replace(spec, seed=spec.seed + k)) for k in range(repeats)]
    return found


def _of_runs(database: Database, component: str, variants: Sequence[Point]) -> list[Noise]:
    rows = database.find([variant.spec.key() for variant in variants])
    ordered = [rows[variant.spec.key()] for variant in variants]
    wanted = {evaluation.spec.key() for evaluation in variants[0].evaluations}
    values: dict[int, dict[tuple[str, str, str], float]] = {row.id: {} for row in ordered}
    for metric in queries.metrics(database, values):
        if metric.spec_key in wanted:
            values[metric.run_id][metric.spec_key, metric.name, metric.unit] = metric.value
    if component == "seed":
        settings = [variant.spec.seed for variant in variants]
    else:
        settings = [variant.spec.calibration.seed for variant in variants]
    return _noise(variants[0], component, settings, [values[row.id] for row in ordered])


def _measured(point: Point, session: Session, component: str, setting: int) -> tuple[Measurement, ...]:
    """The point's measurements with another batch size or number of threads."""
    used = torch.get_num_threads()
    if component == "batch":
        point = replace(point, evaluations=tuple(replace(each, batch=setting) for each in point.evaluations))
    else:
        used = setting
    with threads(used), tempfile.TemporaryDirectory() as folder:
        memory = PeakMemory(point.device)
        quiet = lambda *_: None  # noqa: E731
        computed = compute(point, point.evaluations, session, Phases(), memory, Path(folder), quiet)
    if computed.failed:
        raise computed.failed[0].error
    return computed.measurements


def _components(
    point: Point, component: str, settings: Sequence[int], found: Sequence[Sequence[Measurement]]
) -> list[Noise]:
    return _noise(point, component, settings, [{(m.spec_key, m.name, m.unit): m.value for m in each} for each in found])


def _noise(
    point: Point, component: str, settings: Sequence[int], found: Sequence[dict[tuple[str, str, str], float]]
) -> list[Noise]:
    """A component per metric that all of `found` have."""
    common = [identity for identity in found[0] if all(identity in each for each in found)]
    return [
        Noise(
            family=point.spec.family(),
            spec_key=spec_key,
            name=name,
            component=component,
            sd=stdev(each[spec_key, name, unit] for each in found),
            n=len(found),
            unit=unit,
            settings=list(settings),
            values=[each[spec_key, name, unit] for each in found],
        )
        for spec_key, name, unit in common
    ]
