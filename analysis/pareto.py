"""Pareto figures: a metric against a cost, bits per weight unless told otherwise; one figure per model, evaluation
and metric.

Full precision is a line: its cost, far from that of quantized weights, would press them into a corner. Points whose
weights stay in full precision (only inputs or the cache are quantized) stand behind a break of the axis.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.costs import BITS, RUN_COSTS, Cost
from analysis.front import knee, pareto_front
from analysis.pareto_axes import draw, is_logarithmic
from analysis.style import house_style, wrapped
from analysis.tables.sweep import Evaluation, SweepTable
from qbench.metrics import MetricInfo

_LEGEND_LINE = 0.19  # inches
_CAPTION_POINTS = 6.5


def pareto_figures(table: SweepTable, folder: Path, stem: str = "pareto") -> list[Path]:
    """Draw the figures of a sweep; the files written: a PDF, a PNG and a CSV of the plotted rows for each.

    Files are named after stem, task, metric (but for perplexity) and, where there are several, model. Metrics
    without a better direction, and those that only add detail to another, get none. Points without a value or
    bits per weight are left out; where no point is left there is no figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    several = table.frame["model"].nunique() > 1
    written: list[Path] = []
    for evaluation, points in figure_points(table):
        first = points.iloc[0]
        parts = [stem, *([first["model"]] if several else []), evaluation.label]
        parts += [evaluation.metric.name] if evaluation.metric.name != "ppl" else []
        name = re.sub(r"[^\w.=+-]+", "_", "-".join(parts))
        written += write_figure(points, evaluation, folder / name)
    return written


def figure_points(
    table: SweepTable, cost: Cost = BITS, values: Mapping[str, float] | None = None, *, headline: bool = True
) -> Iterator[tuple[Evaluation, pd.DataFrame]]:
    """(evaluation, its `plotted_rows`) of every figure that the table gives: by model, for every (headline) metric with
    a better direction, where a quantized point has both the metric and the cost."""
    for model in dict.fromkeys(table.frame["model"].dropna()):
        for evaluation in table.evaluations:
            if evaluation.metric.higher_is_better is None or (headline and not evaluation.metric.headline):
                continue
            points = plotted_rows(table, model, evaluation, cost, values)
            if points["algo"].ne("none").any():
                yield evaluation, points


def plotted_rows(
    table: SweepTable,
    model: str,
    evaluation: Evaluation,
    cost: Cost = BITS,
    values: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """The rows of one figure, baseline included: label, algorithm, `x` (the cost, by `values` of each run's key; None:
    the column of the table that has the cost's name), value, whether on the front and its knee, keys.

    `beyond`: weights in full precision, so far from the others that the axis breaks before them.
    """
    frame = table.frame
    rows = frame[(frame["model"] == model) & frame[evaluation.value].notna()]
    x = rows[cost.name] if values is None else rows["key"].map(values).astype("float64")
    rows = rows[x.notna() | (rows["algo"] == "none")]
    names = ["label", "model", "algo", "bits", "group_size", "weight_format", "act_format", "kv_format"]
    points = rows[[*names, "bits_per_weight"]].copy()
    points["series"] = _series(points)
    points["cost"], points["x"] = cost.name, x.loc[rows.index]  # an empty frame would take over the index of x
    points["metric"], points["value"] = evaluation.metric.name, rows[evaluation.value]
    points["stderr"], points["n"] = rows[evaluation.stderr], rows[evaluation.n]
    points["task"], points["protocol"] = evaluation.task, evaluation.protocol
    points["beyond"] = _beyond(points, cost)
    candidates = points["algo"] != "none"
    costs = points.loc[candidates, "x"].to_numpy() * (-1 if cost.higher_is_better else 1)
    losses = points.loc[candidates, "value"].to_numpy() * (-1 if evaluation.metric.higher_is_better else 1)
    points["on_front"] = points["knee"] = False
    points.loc[candidates, "on_front"] = pareto_front(costs, losses)
    points["run_id"], points["key"], points["spec_key"] = rows["run_id"], rows["key"], evaluation.spec_key
    points = points.reset_index(drop=True)
    bend = _bend(points, evaluation.metric, cost)
    if bend is not None:
        points.loc[bend, "knee"] = True
    return points


def _beyond(points: pd.DataFrame, cost: Cost) -> pd.Series:
    """Which quantized points have their weights in full precision, where others have not, and cost far more for it."""
    quantized = points["algo"] != "none"
    full = quantized & points["weight_format"].isna() & points["bits"].isna()
    near = points.loc[quantized & ~full, "x"]
    if not cost.of_weights or near.empty:
        return pd.Series(False, index=points.index)
    return full & (points["x"] > 1.5 * near.max())


def _bend(points: pd.DataFrame, metric: MetricInfo, cost: Cost) -> int | None:
    """Index of the knee of the front before the axis breaks."""
    front = points[points["on_front"] & ~points["beyond"]]
    costs = front["x"].to_numpy() * (-1 if cost.higher_is_better else 1)
    losses = front["value"].to_numpy() * (-1 if metric.higher_is_better else 1)
    order = np.argsort(costs, kind="stable")
    found = knee(costs[order], losses[order], logarithmic=is_logarithmic(points, metric))
    return None if found is None else int(front.index[order[found]])


def _series(points: pd.DataFrame) -> pd.Series:
    """What gets a mark of its own: the algorithm and, where that varies, what is quantized beside the weights."""
    quantized = points[points["algo"] != "none"]
    if quantized[["act_format", "kv_format"]].drop_duplicates().shape[0] <= 1:
        return points["algo"]
    parts = {"act_format": "inputs", "kv_format": "cache"}
    series = []
    for _, row in points.iterrows():
        beside = [f"{word} {row[name]}" for name, word in parts.items() if isinstance(row[name], str)]
        series.append("none" if row["algo"] == "none" else ", ".join([row["algo"], *(beside or ["weights only"])]))
    return pd.Series(series, index=points.index)


def caption(points: pd.DataFrame, evaluation: Evaluation, notes: str = "") -> str:
    """What a reader has to know to judge and recompute the figure; `notes` come last."""
    first = points.iloc[0]
    counts = " or ".join(str(n) for n in sorted(points["n"].unique()))
    quantity = evaluation.metric.quantity
    bits = "; bits counted with scales and zeros, without embeddings and head" if first["cost"] == BITS.name else ""
    own = RUN_COSTS.get(first["cost"])
    seconds = "Seconds and memory are those of the machine that measured. " if own and own.of_machine else ""
    broken = "Behind the break of the axis: weights in full precision. " if points["beyond"].any() else ""
    return (
        f"{first['model']}, {first['task']}: {quantity} by protocol {first['protocol']}, {counts} {evaluation.items}, "
        f"bars ±1 standard error{bits}. "
        f"Faded: dominated. Points of equal cost that would hide each other are drawn side by side. {broken}{seconds}"
        f"Evaluation {first['spec_key'][:12]}.{notes and f' {notes}'}"
    )


def figure(points: pd.DataFrame, evaluation: Evaluation, cost: Cost = BITS, text: str = "") -> Figure:
    """The figure of rows of `plotted_rows`, with `text` below it."""
    with house_style():
        drawn = Figure(layout="constrained")
        draw(points, evaluation.metric, drawn.add_subplot(), cost)
        legend = drawn.legend(loc="outside right upper")  # outside: it can hide no point
        lines = sum(text.get_text().count("\n") + 1 for text in legend.get_texts())
        drawn.set_figheight(max(drawn.get_figheight(), _LEGEND_LINE * lines + 1))  # and has room above the text
        if text:
            text = wrapped(text, drawn.get_figwidth() - 0.2, _CAPTION_POINTS)
            drawn.supxlabel(text, fontsize=_CAPTION_POINTS, color="#444444", x=0.01, ha="left")
    return drawn


def write_figure(
    points: pd.DataFrame, evaluation: Evaluation, base: Path, cost: Cost = BITS, notes: str = ""
) -> list[Path]:
    """`<base>.pdf`, `.png` and `.csv` (the plotted rows), in a folder that is there."""
    paths = [base.with_name(f"{base.name}.{suffix}") for suffix in ("pdf", "png", "csv")]
    text = caption(points, evaluation, f"Run keys in the CSV. {notes}".rstrip())
    drawn = figure(points, evaluation, cost, text)
    with house_style():
        drawn.savefig(paths[0], metadata={"CreationDate": None})  # without a date, equal rows give equal files
        drawn.savefig(paths[1])
    points.to_csv(paths[2], index=False)
    return paths
