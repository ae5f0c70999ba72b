"""The worst layers of a run, or of two."""

from collections.abc import Sequence

import pandas as pd

from analysis.layers import Layer, layer_info, layers_of, worst_first
from analysis.tables.labels import point_labels
from analysis.tables.render import Entry, Plain, number
from qbench.errors import SpecError
from qbench.store.records import LayerMetric, RunRow


def worst_layers(
    runs: Sequence[RunRow], rows: Sequence[Sequence[LayerMetric]], names: Sequence[str], count: int
) -> dict[str, Plain]:
    """By metric the `count` layers that are worst in any of the runs, the worst first; of metrics without a better
    direction the largest. rows: the layer metrics of each run."""
    if count < 1:
        raise SpecError("worst", count, "at least 1 layer")
    labels = point_labels(runs)
    return {name: _table(runs, labels, layers_of(rows, name), name, count) for name in names}


def _table(runs: Sequence[RunRow], labels: Sequence[str], layers: Sequence[Layer], name: str, count: int) -> Plain:
    info, two = layer_info(name), len(runs) == 2
    heads = ("A", "B") if two else (info.name,)
    last = ("A / B" if info.ratio else "A − B",) if two else ()
    chosen = worst_first(layers, info)[:count]
    cells = []
    for each in chosen:
        texts = [each.where, *(number(value) for value in each.values)]
        if two:
            found = _against(each, ratio=info.ratio)
            texts.append(number(found, 3, sign=not info.ratio))
        cells.append(tuple(map(Entry, texts)))
    which = "largest" if info.higher_is_better is None else "worst"
    sides = [f"{side}: " if two else "" for side in "AB"]
    named = "; ".join(f"{side}run {run.id}, {label}" for side, run, label in zip(sides, runs, labels, strict=False))
    frame = pd.DataFrame(
        [
            {"metric": name, "block": each.block, "module": each.module}
            | dict(zip(("a", "b") if two else ("value",), each.values, strict=True))
            for each in chosen
        ]
    )
    return Plain(
        title=f"{info.label}: {which} layers",
        columns=("layer", *heads, *last),
        rows=tuple(cells),
        numeric=(False, *(True for _ in (*heads, *last))),
        caption=f"{len(chosen)} of {len(layers)} layers; {named} ({runs[0].model})" if layers else "no values",
        frame=frame,
    )


def _against(layer: Layer, *, ratio: bool) -> float | None:
    first, second = layer.values
    if first is None or second is None or (ratio and not second):
        return None
    return first / second if ratio else first - second
