"""How much of a difference is chance: one point again and again, under other seeds, batch sizes and thread counts.

    python experiments/noise_floor.py algo=gptq bits=3 repeats=5 batches=1,4 threads=1,2

All other keys are those of `python -m qbench`. Seeds give runs of their own in the database; the components of the
variance go to its table `noise`, and from then on tables and `qbench compare` give differences in units of that floor.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qbench.command import compose_one
from qbench.compose import freeze, sweep_options
from qbench.errors import QbenchError, SpecError
from qbench.noise import Plan, floor, noise_floor

OWN = ("repeats", "batches", "threads")


def main(arguments: list[str]) -> int:
    own = dict(each.split("=", 1) for each in arguments if each.partition("=")[0] in OWN)
    config = compose_one([each for each in arguments if each.partition("=")[0] not in OWN])
    options = sweep_options(config)
    plan = Plan(**{name: _numbers(name, text) for name, text in own.items()})
    point = freeze(config)
    components = noise_floor(point, plan, options)
    table = Table(title=f"Noise of {point.label}", title_justify="left")
    for column in ("task", "metric", "component", "n", "mean", "sd", "smallest", "largest"):
        table.add_column(column, justify="right" if column not in ("task", "metric", "component") else "left")
    tasks = {evaluation.spec.key(): evaluation.spec.task for evaluation in point.evaluations}
    ordered = sorted(components, key=lambda each: (each.spec_key, each.name))
    for (spec_key, name), group in groupby(ordered, key=lambda each: (each.spec_key, each.name)):
        found = list(group)
        for each in found:
            mean = sum(each.values) / each.n
            numbers = (mean, each.sd, min(each.values), max(each.values))
            table.add_row(tasks[spec_key], name, each.component, str(each.n), *(f"{number:.6g}" for number in numbers))
        table.add_row(tasks[spec_key], name, "[bold]floor", "", "", f"[bold]{floor(found):.6g}", "", "")
    Console(width=120).print(table)
    return 0


def _numbers(name: str, text: str) -> int | tuple[int, ...]:
    try:
        numbers = tuple(int(each) for each in text.split(","))
    except ValueError:
        raise SpecError(name, text, "integers such as 5, or 1,2,4") from None
    if name != "repeats":
        return numbers
    if len(numbers) != 1:
        raise SpecError(name, text, "one integer")
    return numbers[0]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except QbenchError as error:
        print(f"noise_floor: error: {error}", file=sys.stderr)
        sys.exit(2)
