import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from qbench.store.database import Database
from qbench.store.records import Environment, Measurement, Outcome, RunColumns

HERE = Environment(
    git_commit=None, git_dirty=None, versions={}, platform="p", cpu="c", threads=1, gpu=None, driver=None
)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def measured(nlls: np.ndarray, task: str = "c4-sample", protocol: str = "window-512", **changes) -> Measurement:
    """A perplexity of per-window losses, in the form in which an evaluator stores it."""
    value = float(np.exp(nlls.mean()))
    stderr = value * float(nlls.std(ddof=1)) / len(nlls) ** 0.5 if len(nlls) > 1 else None
    fields = {
        "evaluator": "perplexity",
        "protocol": protocol,
        "task": task,
        "name": "ppl",
        "value": value,
        "stderr": stderr,
        "n": len(nlls),
        "unit": "ppl",
        "spec_key": sha(f"{task} {protocol}"),
        "samples": nlls,
    }
    return Measurement(**(fields | changes))


def losses(mean: float, n: int = 40) -> np.ndarray:
    """Per-window losses around `mean`: the same windows are hard for every model."""
    hardness = np.random.default_rng(1).normal(0.0, 0.3, n)
    own = np.random.default_rng(int(mean * 1e6)).normal(0.0, 0.03, n)
    return mean + hardness - hardness.mean() + own - own.mean()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(f"sqlite:///{tmp_path}/results.db") as opened:
        yield opened


@pytest.fixture
def store(database: Database) -> Callable[..., str]:
    """Stores a run (done, or failed where an error is given) and returns its key."""

    def store_run(
        algo: str,
        bits: int | None = None,
        *measurements: Measurement,
        error: tuple[str, str] | None = None,
        outcome: Outcome | None = None,
        environment: Environment = HERE,
        spec: dict | None = None,
        **columns,
    ) -> str:
        settings = {"model": "tiny", "dtype": "float32"} | columns
        if bits is not None:
            settings = {"group_size": 64, "symmetric": False} | settings
        spec = spec or {"algo": algo, "bits": bits}
        key = sha(repr((algo, bits, spec, sorted(settings.items()))))
        claim = database.begin(RunColumns(algo=algo, bits=bits, spec=spec, **settings), key, environment)
        if error:
            database.fail(claim, *error, "trace")
        else:
            per_weight = 16.0 if bits is None else bits + 0.3125
            default = Outcome(bits_per_weight=per_weight, quantize_s=12.34, peak_host_bytes=1_500_000_000)
            database.finish(claim, outcome or default, measurements)
        return key

    return store_run
