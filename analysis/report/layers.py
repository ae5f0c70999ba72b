"""What a report shows of each run's layers: maps of errors by block and module, packed small."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from qbench.store import queries
from qbench.store.database import Database

#: What gets a map, the most telling first, and its title and unit.
TITLES: Mapping[str, str] = {
    "output_error": "output error E‖ΔWx‖²/E‖Wx‖²",
    "weight_error": "weight error ‖ΔW‖²/‖W‖²",
    "output_cosine": "cosine of the outputs before and after rounding",
    "weight_kurtosis": "kurtosis of the weights before rounding",
    "stream_error": "stream error behind the block",
}
#: Numbers in one file: beyond it the oldest runs go without maps, and the page says so.
BUDGET = 3_000_000


def layers(database: Database, position: Mapping[int, int], budget: int = BUDGET) -> dict[str, Any]:
    """Maps by position of the run: block numbers, module names and values as base64 of little-endian float32
    [modules, blocks], NaN where there is none. `left_out` counts runs that had to go without."""
    found: dict[int, dict[str, Any]] = {}
    names: list[str] = []
    index: dict[str, int] = {}
    left_out = 0
    for run_id in sorted(position, reverse=True):
        maps = _maps(queries.layer_metrics_named(database, run_id, TITLES)) if budget > 0 else {}
        size = sum(values.size for _, _, values in maps.values())
        if size > budget or budget <= 0:
            left_out, budget = left_out + 1, 0
            continue
        budget -= size
        for name, (blocks, modules, values) in maps.items():
            for module in modules:
                if module not in index:
                    index[module] = len(names)
                    names.append(module)
            packed = base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
            of_run = found.setdefault(position[run_id], {})
            of_run[name] = {"blocks": blocks, "modules": [index[each] for each in modules], "values": packed}
    return {"titles": dict(TITLES), "modules": names, "runs": found, "left_out": left_out}


def _maps(rows: list[tuple[str, int, str, float]]) -> dict[str, tuple[list[int], list[str], np.ndarray]]:
    """name -> (blocks, modules in the order of recording, values [modules, blocks]) of rows (name, block, module,
    value)."""
    maps = {}
    for name in TITLES:
        mine = [row for row in rows if row[0] == name]
        if not mine:
            continue
        blocks = sorted({block for _, block, _, _ in mine})
        modules = list(dict.fromkeys(module for _, _, module, _ in mine))
        column = {block: i for i, block in enumerate(blocks)}
        line = {module: i for i, module in enumerate(modules)}
        values = np.full((len(modules), len(blocks)), np.nan)
        for _, block, module, value in mine:
            values[line[module], column[block]] = value
        maps[name] = (blocks, modules, values)
    return maps
