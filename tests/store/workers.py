"""Processes that use a database at the same time as others: `python -m tests.store.workers <task> <url>
<arguments>`.

Run as a script because what is tested is separate processes; it prints what happened, a word per line.
"""

import hashlib
import sys
import time

import numpy as np

from qbench.store.database import Database
from qbench.store.records import Measurement, Outcome, RunColumns


def key_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def columns(name: str = "point") -> RunColumns:
    return RunColumns(model="tiny", algo="rtn", spec={"name": name}, bits=4, group_size=64, symmetric=False)


def measurement(value: float = 20.0, **changes) -> Measurement:
    fields = {
        "evaluator": "perplexity",
        "protocol": "window-512",
        "task": "c4-sample",
        "name": "ppl",
        "value": value,
        "stderr": 0.5,
        "n": 4,
        "unit": "ppl",
        "spec_key": key_of("evaluator"),
        "samples": np.array([1.0, 2.0, 3.0, np.pi]),
    }
    return Measurement(**(fields | changes))


def churn(url: str, first: str, count: str) -> None:
    """Begin and finish `count` keys, in an order of its own but the same keys as everybody else."""
    with Database(url) as database:
        for step in range(int(count)):
            name = str((int(first) + step) % int(count))
            claim = database.begin(columns(name), key_of(name))
            if claim is None:
                continue
            database.heartbeat(claim)
            database.finish(claim, Outcome(bits_per_weight=4.5), [measurement()])
            print(name, flush=True)


def hold(url: str, name: str) -> None:
    """Claim a key, then work on it for ever."""
    with Database(url) as database:
        print("held" if database.begin(columns(name), key_of(name)) else "refused", flush=True)
        while True:
            time.sleep(60)


def claim(url: str, name: str) -> None:
    """Try to claim a key when a line comes in, and stay alive with what came of it."""
    with Database(url) as database:
        print("ready", flush=True)
        input()
        print("held" if database.begin(columns(name), key_of(name)) else "refused", flush=True)
        input()


if __name__ == "__main__":
    {"churn": churn, "hold": hold, "claim": claim}[sys.argv[1]](*sys.argv[2:])
