"""The noise floor of differences: how far two runs would differ by seeds, batch sizes and threads alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.tables.labels import is_baseline
from qbench.store import queries
from qbench.store.database import Database
from qbench.store.records import Noise, RunRow


@dataclass(frozen=True)
class NoiseFloors:
    """Stored components of noise, by (family, spec key, metric name)."""

    components: dict[tuple[str, str, str], list[Noise]]

    def of(self, run: RunRow, spec_key: str, name: str) -> float | None:
        """Standard deviation of all known components together, in the metric's unit; None where none is known.

        Components are independent, so their variances add. Full precision has neither calibration nor seeds: what is
        not known of it counts as 0.
        """
        known = self.components.get((run.family, spec_key, name), []) if run.family is not None else []
        if known:
            return math.sqrt(math.fsum(component.sd**2 for component in known))
        return 0.0 if is_baseline(run) else None

    def of_difference(self, a: RunRow, b: RunRow, spec_key: str, name: str) -> float | None:
        """Standard deviation of the difference of two such runs; None where the noise of either is unknown, or of
        neither above 0."""
        floors = [self.of(run, spec_key, name) for run in (a, b)]
        if None in floors:
            return None
        return math.hypot(*floors) or None


def noise_floors(database: Database, runs: Sequence[RunRow]) -> NoiseFloors:
    """What is stored about the families of these runs."""
    return NoiseFloors(queries.noise(database, {run.family for run in runs if run.family is not None}))
