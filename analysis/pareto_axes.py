"""A Pareto figure's axes: marks with their errors, the front, its knee, full precision, and a break where the axis
would be stretched."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from analysis.costs import BITS, Cost
from analysis.style import Mark, marks, wrapped
from qbench.metrics import MetricInfo

# Ratio of the largest to the smallest value beyond which a linear axis hides the differences at its foot.
LOG_BEYOND = 20.0
_FADED = 0.4
_SLOT_POINTS = 8.0  # how far points that would hide each other are drawn from their place at most, in 1/72 inch
_LONGEST = 48  # letters of a name
_MANY = 200  # points beyond which they are drawn where they are, the dominated ones as an image
_LABEL_HEIGHT = 0.7  # of the figure: what is left of it above the caption
_BREAK, _BEHIND, _STEP = 0.08, 0.16, 0.1  # of the axis: where it breaks, what stands behind it, and how far apart


def is_logarithmic(points: pd.DataFrame, metric: MetricInfo) -> bool:
    """Whether the metric gets a logarithmic axis: where a linear one would hide the differences at its foot."""
    values = points.loc[points["algo"] != "none", "value"] if metric.against_full else points["value"]
    return bool(not metric.higher_is_better and values.min() > 0 and values.max() > LOG_BEYOND * values.min())


def draw(points: pd.DataFrame, metric: MetricInfo, axes: Axes, cost: Cost = BITS) -> None:
    """Draw rows of `plotted_rows` (of one model, evaluation, metric and cost) into `axes`."""
    logarithmic = is_logarithmic(points, metric)
    baselines, candidates = points[points["algo"] == "none"], points[points["algo"] != "none"]
    if metric.against_full:  # full precision is at its own ideal by definition; on a logarithmic axis nowhere
        baselines = baselines.iloc[:0]
    for _, row in baselines.iterrows():
        price = "" if np.isnan(row["x"]) else f"\nat {row['x']:,.5g} {cost.unit}".rstrip()
        words = f"{_cut(row['label'])}\n{row['value']:.4g}{price}"
        axes.axhline(row["value"], color="black", linestyle="--", linewidth=1.0, label=words)
    candidates = candidates.assign(x=_places(candidates))
    front = candidates[candidates["on_front"] & ~candidates["beyond"]].sort_values("x")
    if len(front) > 1:
        step = "pre" if cost.higher_is_better else "post"
        axes.step(front["x"], front["value"], "-", where=step, color="#777777", linewidth=1.0, label="front")
    style = marks(candidates["series"])
    if len(candidates) > _MANY:
        _draw_many(candidates, style, axes)
    else:
        slots = sideways_slots(candidates, logarithmic)
        _draw_each(candidates, slots, style, axes)
    for _, row in candidates[candidates["knee"]].iterrows():
        circle = {"markersize": 15, "markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 0.8}
        axes.plot([row["x"]], [row["value"]], "o", zorder=4, **circle)
        axes.annotate("knee", (row["x"], row["value"]), xytext=(8, 8), textcoords="offset points", fontsize=8)
    # Markers drawn aside do not count when the axes are scaled: their data has to be announced.
    for ends in _bars(candidates, logarithmic):
        axes.update_datalim(np.column_stack([candidates["x"], ends]))
    axes.margins(x=0.08, y=0.05)
    for series, mark in style.items():
        axes.plot([], [], mark.marker, color=mark.colour, label=_cut(series))
    axes.set_xlabel(f"{_cut(cost.label)} (better {cost.arrow})")
    unit = f", {metric.unit}," if metric.unit else ""
    name = f"{metric.quantity} on {_cut(points['task'].iloc[0])}{unit} (better {metric.arrow})"
    size = axes.yaxis.label.get_fontsize()
    axes.set_ylabel(wrapped(name, _LABEL_HEIGHT * axes.figure.get_figheight(), size))
    if logarithmic:
        values = candidates["value"] if metric.against_full else points["value"]
        _use_log_scale(axes, values.max() / values.min())
    quantized = points[points["algo"] != "none"]
    if candidates["beyond"].any():
        _break_axis(quantized, candidates, axes)
    elif candidates["x"].min() > 0 and candidates["x"].max() > LOG_BEYOND * candidates["x"].min():
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    for _, row in baselines[baselines["x"].notna()].iterrows():
        _mark_baseline(row["x"], row["value"], quantized["x"], candidates["x"], axes)


def _mark_baseline(x: float, value: float, costs: pd.Series, places: pd.Series, axes: Axes) -> None:
    """A mark on full precision's line: at its cost where the axis has it, an arrow towards it where not.

    costs, places: what the quantized points cost and where they stand.
    """
    look = {"color": "black", "markersize": 5, "clip_on": False, "zorder": 4}
    left, right = axes.get_xlim()
    same, unbroken = places[np.isclose(costs, x)], places[places == costs]
    place = x if same.empty else same.iloc[0]
    if left <= place <= right and (not same.empty or len(unbroken) == len(places) or x <= unbroken.max()):
        axes.plot([place], [value], "D", **look | {"markersize": 9, "markerfacecolor": "none"})  # hides no point
        axes.set_xlim(left, right)
    else:
        end, arrow = (1.0, ">") if place > left else (0.0, "<")
        axes.plot([end], [value], arrow, transform=axes.get_yaxis_transform(), **look)


def _cut(name: str) -> str:
    """A name as it is, but for what would leave no room for the figure."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _places(candidates: pd.DataFrame) -> pd.Series:
    """Where each point stands on the horizontal axis: those beyond the break close behind it, dearer ones farther."""
    near, far = candidates.loc[~candidates["beyond"], "x"], candidates.loc[candidates["beyond"], "x"]
    width = _width(near)
    place = {x: near.max() + width * (_BEHIND + _STEP * i) for i, x in enumerate(sorted(far.unique()))}
    return candidates["x"].where(~candidates["beyond"], candidates["x"].map(place))


def _width(near: pd.Series) -> float:
    """How wide the axis is before it breaks; of a single cost a share of it."""
    return float(near.max() - near.min()) or 0.25 * float(near.max())


def _break_axis(candidates: pd.DataFrame, placed: pd.DataFrame, axes: Axes) -> None:
    """Ticks before the break, the true costs behind it, and the break itself."""
    near = candidates.loc[~candidates["beyond"], "x"]
    width = _width(near)
    ticks = MaxNLocator(6).tick_values(near.min(), near.max())
    ticks = [tick for tick in ticks if near.min() - 0.05 * width <= tick <= near.max() + 0.05 * width]
    behind = dict(zip(placed.loc[placed["beyond"], "x"], candidates.loc[candidates["beyond"], "x"], strict=True))
    axes.xaxis.set_major_locator(FixedLocator([*ticks, *behind]))
    axes.xaxis.set_major_formatter(
        FixedFormatter([*(f"{tick:g}" for tick in ticks), *(f"{x:,.4g}" for x in behind.values())])
    )
    place = near.max() + _BREAK * width
    axes.axvline(place, color="#999999", linestyle=":", linewidth=0.8)
    gap = {"ha": "center", "va": "center", "transform": axes.get_xaxis_transform(), "clip_on": False}
    axes.text(place, 0, "//", fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5}, **gap)


def _draw_each(points: pd.DataFrame, slots: Sequence[int], style: Mapping[str, Mark], axes: Axes) -> None:
    step = _SLOT_POINTS / max(1, *map(abs, slots))  # many share it: what is drawn aside must not look like another cost
    for (_, row), slot in zip(points.iterrows(), slots, strict=True):
        mark, alpha = style[row["series"]], 1.0 if row["on_front"] else _FADED
        aside = ScaledTranslation(slot * step / 72, 0, axes.figure.dpi_scale_trans)
        axes.errorbar(
            row["x"],
            row["value"],
            yerr=None if np.isnan(row["stderr"]) else row["stderr"],
            fmt=mark.marker,
            color=mark.colour,
            alpha=alpha,
            capsize=2,
            zorder=3 if row["on_front"] else 2,
            transform=axes.transData + aside,
        )


def _draw_many(points: pd.DataFrame, style: Mapping[str, Mark], axes: Axes) -> None:
    """Thousands of points: smaller, the dominated ones as an image, so that the file stays small."""
    for (series, on_front), some in points.groupby(["series", "on_front"], sort=False):
        mark = style[series]
        drawn = axes.errorbar(
            some["x"],
            some["value"],
            yerr=some["stderr"].fillna(0.0),
            fmt=mark.marker,
            markersize=6 if on_front else 3,
            color=mark.colour,
            alpha=1.0 if on_front else _FADED,
            capsize=1,
            elinewidth=0.8,
            zorder=3 if on_front else 2,
        )
        for artist in (drawn.lines[0], *drawn.lines[1], *drawn.lines[2]):
            artist.set_rasterized(not on_front)


def _bars(points: pd.DataFrame, logarithmic: bool) -> tuple[np.ndarray, np.ndarray]:
    """(tops, feet) of the error bars; on a logarithmic axis no foot is below half of its value."""
    values, spread = points["value"].to_numpy(), points["stderr"].fillna(0.0).to_numpy()
    feet = values - spread
    return values + spread, np.maximum(feet, values / 2) if logarithmic else feet


def sideways_slots(points: pd.DataFrame, logarithmic: bool) -> list[int]:
    """For each row 0, or by how many steps to draw it aside so that it hides none of equal cost.

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
            if points["x"].iloc[other] == points["x"].iloc[index]
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
