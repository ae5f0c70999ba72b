"""Pareto figures: a metric against the counted bits per weight, one figure per model, evaluation and metric."""

import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from analysis.style import house_style, marks
from analysis.tables.sweep import Evaluation, SweepTable
from qbench.metrics import MetricInfo

# Ratio of the largest to the smallest value beyond which a linear axis hides the differences at its foot.
LOG_BEYOND = 20.0
_FADED = 0.4
_SLOT_POINTS = 8.0  # by which points that would hide each other are drawn apart, in 1/72 inch


def pareto_front(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Which of n points no other point dominates: bool [n] for costs [n] and losses [n], both better when
    smaller.

    A point dominates another if it is no worse in both and better in one; equal points do not dominate each
    other.
    """
    no_worse = (costs[:, None] <= costs[None, :]) & (losses[:, None] <= losses[None, :])
    better = (costs[:, None] < costs[None, :]) | (losses[:, None] < losses[None, :])
    return ~(no_worse & better).any(axis=0)


def pareto_figures(table: SweepTable, folder: Path, stem: str = "pareto") -> list[Path]:
    """Draw the figures of a sweep; the files written: a PDF, a PNG and a CSV of the plotted rows for each.

    Files are named after stem, task, metric (but for perplexity) and, where there are several, model. Metrics
    without a better direction, and those that only add detail to another, get none. Points without a value or
    bits per weight are left out; where no point is left there is no figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models = list(dict.fromkeys(table.frame["model"].dropna()))
    written: list[Path] = []
    for model in models:
        for evaluation in table.evaluations:
            metric = evaluation.metric
            if not metric.headline or metric.higher_is_better is None:
                continue
            points = plotted_rows(table, model, evaluation)
            if points["algo"].ne("none").any():
                parts = [stem, *([model] if len(models) > 1 else []), evaluation.label]
                parts += [metric.name] if metric.name != "ppl" else []
                name = re.sub(r"[^\w.=+-]+", "_", "-".join(parts))
                written += _write(points, metric, folder / name, caption(points, evaluation))
    return written


def plotted_rows(table: SweepTable, model: str, evaluation: Evaluation) -> pd.DataFrame:
    """The rows of one figure, baseline included: label, algorithm, bits, value, whether on the front, keys."""
    frame = table.frame
    rows = frame[(frame["model"] == model) & frame[evaluation.value].notna()]
    rows = rows[rows["bits_per_weight"].notna() | (rows["algo"] == "none")]
    names = ["label", "model", "algo", "bits", "group_size", "weight_format", "act_format", "kv_format"]
    points = rows[[*names, "bits_per_weight"]].copy()
    points["series"] = _series(points)
    points["metric"], points["value"] = evaluation.metric.name, rows[evaluation.value]
    points["stderr"], points["n"] = rows[evaluation.stderr], rows[evaluation.n]
    points["task"], points["protocol"] = evaluation.task, evaluation.protocol
    candidates = points["algo"] != "none"
    points["on_front"] = False
    losses = points.loc[candidates, "value"].to_numpy() * (-1 if evaluation.metric.higher_is_better else 1)
    points.loc[candidates, "on_front"] = pareto_front(points.loc[candidates, "bits_per_weight"].to_numpy(), losses)
    points["run_id"], points["key"], points["spec_key"] = rows["run_id"], rows["key"], evaluation.spec_key
    return points.reset_index(drop=True)


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


def caption(points: pd.DataFrame, evaluation: Evaluation) -> str:
    """What a reader has to know to judge and recompute the figure."""
    first = points.iloc[0]
    counts = " or ".join(str(n) for n in sorted(points["n"].unique()))
    quantity = evaluation.metric.quantity
    return (
        f"{first['model']}, {first['task']}: {quantity} by protocol {first['protocol']}, {counts} {evaluation.items}, "
        "bars ±1 standard error; bits counted with scales and zeros, without embeddings and head. "
        "Faded: dominated. Points of equal bits that would hide each other are drawn side by side. "
        f"Evaluation {first['spec_key'][:12]}; run keys in the CSV."
    )


def draw(points: pd.DataFrame, metric: MetricInfo, axes: Axes) -> None:
    """Draw rows of `plotted_rows` (of one model, evaluation and metric) into `axes`."""
    baselines, candidates = points[points["algo"] == "none"], points[points["algo"] != "none"]
    values = candidates["value"] if metric.against_full else points["value"]
    logarithmic = not metric.higher_is_better and values.min() > 0 and values.max() > LOG_BEYOND * values.min()
    if metric.against_full:  # full precision is at its own ideal by definition; on a logarithmic axis nowhere
        baselines = baselines.iloc[:0]
    for _, row in baselines.iterrows():
        axes.axhline(
            row["value"],
            color="black",
            linestyle="--",
            linewidth=1.0,
            label=f"{row['label']}\n{row['value']:.4g}",
        )
    front = candidates[candidates["on_front"]].sort_values("bits_per_weight")
    if len(front) > 1:
        axes.step(
            front["bits_per_weight"],
            front["value"],
            "-",
            where="post",
            color="#777777",
            linewidth=1.0,
            label="front",
        )
    style = marks(candidates["series"])
    slots = sideways_slots(candidates, logarithmic)
    for (_, row), slot in zip(candidates.iterrows(), slots, strict=True):
        mark, alpha = style[row["series"]], 1.0 if row["on_front"] else _FADED
        aside = ScaledTranslation(slot * _SLOT_POINTS / 72, 0, axes.figure.dpi_scale_trans)
        axes.errorbar(
            row["bits_per_weight"],
            row["value"],
            yerr=None if np.isnan(row["stderr"]) else row["stderr"],
            fmt=mark.marker,
            color=mark.colour,
            alpha=alpha,
            capsize=2,
            zorder=3 if row["on_front"] else 2,
            transform=axes.transData + aside,
        )
    # Markers drawn aside do not count when the axes are scaled: their data has to be announced.
    for ends in _bars(candidates, logarithmic):
        axes.update_datalim(np.column_stack([candidates["bits_per_weight"], ends]))
    axes.margins(x=0.05 + 0.03 * max(map(abs, slots)), y=0.05)
    for series, mark in style.items():
        axes.plot([], [], mark.marker, color=mark.colour, label=series)
    axes.set_xlabel("bits per weight (better ←)")
    unit = f", {metric.unit}," if metric.unit else ""
    axes.set_ylabel(f"{metric.quantity} on {points['task'].iloc[0]}{unit} (better {metric.arrow})")
    if logarithmic:
        _use_log_scale(axes, values.max() / values.min())


def _bars(points: pd.DataFrame, logarithmic: bool) -> tuple[np.ndarray, np.ndarray]:
    """(tops, feet) of the error bars; on a logarithmic axis no foot is below half of its value."""
    values, spread = points["value"].to_numpy(), points["stderr"].fillna(0.0).to_numpy()
    feet = values - spread
    return values + spread, np.maximum(feet, values / 2) if logarithmic else feet


def sideways_slots(points: pd.DataFrame, logarithmic: bool) -> list[int]:
    """For each row 0, or by how many marker widths to draw it aside so that it hides none of equal bits.

    Methods with one number format have the same bits to the last digit. Points on the front stay in place.
    """
    scale = np.log if logarithmic else np.asarray
    values = points["value"].to_numpy()
    tops, feet = map(scale, _bars(points, logarithmic))
    half_marker = 0.03 * np.ptp(scale(values))
    slots: dict[int, int] = {}
    for index in np.lexsort((values, ~points["on_front"].to_numpy(dtype=bool))):
        taken = {
            slot
            for other, slot in slots.items()
            if points["bits_per_weight"].iloc[other] == points["bits_per_weight"].iloc[index]
            and feet[other] - half_marker <= tops[index] + half_marker
            and feet[index] - half_marker <= tops[other] + half_marker
        }
        slots[index] = next(slot for slot in _slots() if slot not in taken)
    return [slots[index] for index in range(len(points))]


def _slots() -> Iterator[int]:
    """0, 1, -1, 2, -2, …"""
    yield 0
    for distance in itertools.count(1):
        yield distance
        yield -distance


def _use_log_scale(axes: Axes, ratio: float) -> None:
    """A logarithmic axis with plain numbers: a linear one would press most points to its foot."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 1000 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _write(points: pd.DataFrame, metric: MetricInfo, base: Path, text: str) -> list[Path]:
    paths = [base.with_name(f"{base.name}.{suffix}") for suffix in ("pdf", "png", "csv")]
    with house_style():
        figure = Figure(layout="constrained")
        draw(points, metric, figure.add_subplot())
        figure.legend(loc="outside right upper")  # outside: it can hide no point
        figure.supxlabel(textwrap.fill(text, 125), fontsize=6.5, color="#444444", x=0.01, ha="left")
        figure.savefig(paths[0], metadata={"CreationDate": None})  # without a date, equal rows give equal files
        figure.savefig(paths[1])
    points.to_csv(paths[2], index=False)
    return paths
