"""Figures of layer metrics: blocks against kinds of modules as heat maps, whole blocks as curves; of two runs side by
side on one scale, with what tells them apart."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from analysis.layers import LayerMap, contrast, layer_maps
from analysis.style import house_style, wrapped
from analysis.tables.labels import point_labels
from qbench.store.records import LayerMetric, RunRow

# Ratio of the largest to the smallest value beyond which a linear scale hides the differences at its foot.
LOG_BEYOND = 20.0
_MISSING = "#D9D9D9"
_LINES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"))
_CAPTION_POINTS = 6.5
_NAMED = 12  # kinds of modules beyond which not every name fits below a map


def layer_figures(
    runs: Sequence[RunRow], rows: Sequence[Sequence[LayerMetric]], names: Sequence[str], folder: Path
) -> list[Path]:
    """Draw one figure per metric of one run, or of two (of one model): a PDF, a PNG and a CSV of the drawn values.

    rows: the layer metrics of each run. A metric that no run has gives a figure that says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels = point_labels(runs)
    stem = "-".join(["layers", *(str(run.id) for run in runs)])
    written: list[Path] = []
    for name in names:
        maps = layer_maps(rows, name)
        base = folder / re.sub(r"[^\w.=+-]+", "_", f"{stem}-{name}")
        paths = [base.with_name(f"{base.name}.{suffix}") for suffix in ("pdf", "png", "csv")]
        with house_style():
            figure = draw(maps, labels)
            text = wrapped(caption(runs, labels, maps), figure.get_figwidth() - 0.2, _CAPTION_POINTS)
            figure.supxlabel(text, fontsize=_CAPTION_POINTS, color="#444444", x=0.01, ha="left")
            figure.savefig(paths[0], metadata={"CreationDate": None})  # without a date, equal rows give equal files
            figure.savefig(paths[1])
        drawn_rows(runs, maps).to_csv(paths[2], index=False)
        written += paths
    return written


def draw(maps: Sequence[LayerMap], labels: Sequence[str]) -> Figure:
    """The figure of one metric, of one run or of two on the same blocks and kinds."""
    if not maps[0].blocks:
        figure = Figure(figsize=(4.0, 2.0), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.text(0.5, 0.5, f"no values of {maps[0].info.name}", ha="center", va="center", transform=axes.transAxes)
        return figure
    return _curves(maps, labels) if maps[0].whole_blocks else _heat_maps(maps, labels)


def caption(runs: Sequence[RunRow], labels: Sequence[str], maps: Sequence[LayerMap]) -> str:
    """What a reader has to know to judge and to recompute the figure."""
    info = maps[0].info
    described = []
    for side, run, label, each in zip("AB", runs, labels, maps, strict=False):
        calibration = f", calibrated on {run.calib} ({run.calib_n} × {run.calib_length} tokens)" if run.calib else ""
        side = f"{side}: " if len(runs) > 1 else ""
        described.append(f"{side}run {run.id} ({run.key[:12]}), {label}{calibration}, n = {int(each.counts.sum())}")
    text = f"{runs[0].model}: {info.title} ({info.name}). {'; '.join(described)}. "
    if any((each.counts > 1).any() for each in maps):
        text += "Cells with several modules (experts) show their mean. "
    if not maps[0].whole_blocks and any(np.isnan(each.values).any() for each in maps):
        text += "Grey, hatched: no value (kept in full precision, or not collected by the method). "
    if len(maps) > 1 and not maps[0].whole_blocks:
        text += "Right: A / B, in steps of equal factors." if info.ratio else "Right: A − B."
    return text.strip()


def drawn_rows(runs: Sequence[RunRow], maps: Sequence[LayerMap]) -> pd.DataFrame:
    """The drawn values: run, key, block, module, n, metric, value, and in a figure of two runs how A differs from B."""
    ratio = maps[0].info.ratio
    against = contrast(*maps) if len(maps) == 2 else None
    found = []
    for run, each in zip(runs, maps, strict=True):
        for (i, j), n in np.ndenumerate(each.counts):
            if n:
                row = {"run_id": run.id, "key": run.key, "block": each.blocks[i], "module": each.kinds[j], "n": n}
                row |= {"metric": each.info.name, "value": each.values[i, j]}
                if against is not None:
                    row["a_over_b" if ratio else "a_minus_b"] = against[i, j]
                found.append(row)
    columns = ["run_id", "key", "block", "module", "n", "metric", "value"]
    return pd.DataFrame(found, columns=None if found else columns)


def _heat_maps(maps: Sequence[LayerMap], labels: Sequence[str]) -> Figure:
    kinds, blocks = len(maps[0].kinds), len(maps[0].blocks)
    panels = len(maps) + (len(maps) == 2)
    width = min(14.0, max(3.4, panels * (1.2 + 0.22 * min(kinds, _NAMED)) + 0.8))
    figure = Figure(figsize=(width, min(11.0, 2.2 + 0.13 * blocks)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, panels, sharey=True))
    values = np.concatenate([each.values.ravel() for each in maps])
    norm = _norm(values, ratio=maps[0].info.ratio)
    info = maps[0].info
    colours = "cividis" if info.higher_is_better else "cividis_r"  # dark is bad
    for each, one, title in zip(maps, axes, _titles(labels), strict=False):
        drawn = _map(one, each, each.values, norm, colours)
        one.set_title(textwrap.fill(title, 26), fontsize=8)
    bar = figure.colorbar(drawn, ax=list(axes[: len(maps)]), location="bottom", aspect=30, shrink=0.9)
    bar.set_label(info.label, fontsize=8)
    _plain_ticks(bar)
    axes[0].set_ylabel("block")
    if len(maps) == 2:
        against = contrast(*maps)
        colours = "PuOr" if info.higher_is_better else "PuOr_r"  # purple: A is better
        drawn = _map(axes[2], maps[0], against, _symmetric(against, ratio=info.ratio), colours)
        axes[2].set_title("A / B" if info.ratio else "A − B", fontsize=8)
        bar = figure.colorbar(drawn, ax=axes[2], location="bottom", aspect=15, shrink=0.9)
        bar.set_label(_contrast_label(maps[0]), fontsize=8)
        _plain_ticks(bar)
    return figure


def _map(axes: Axes, of: LayerMap, values: np.ndarray, norm: Normalize, colours: str) -> AxesImage:
    """One heat map [blocks, kinds]; cells without a value show the hatched ground."""
    ground = axes.axvspan(-0.5, len(of.kinds) - 0.5, facecolor=_MISSING, edgecolor="white", hatch="////", zorder=0)
    ground.set_linewidth(0)
    shown = np.ma.masked_invalid(values)
    if isinstance(norm, LogNorm):  # what is 0 has the colour of the smallest
        shown = np.ma.maximum(shown, norm.vmin)
    drawn = axes.imshow(
        shown, aspect="auto", interpolation="nearest", norm=norm, cmap=colormaps[colours], zorder=1, rasterized=True
    )
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    names = [kind.rsplit(".", 1)[-1] if not kind.endswith("*") else kind for kind in of.kinds]
    names = names if len(set(names)) == len(names) else list(of.kinds)
    step = -(-len(names) // (2 * _NAMED))
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=7)
    rows = MaxNLocator(nbins=12, integer=True).tick_values(0, max(1, len(of.blocks) - 1))
    rows = [int(each) for each in rows if 0 <= each < len(of.blocks)]
    axes.set_yticks(rows, [_block_name(of.blocks[each]) for each in rows], fontsize=7)
    return drawn


def _curves(maps: Sequence[LayerMap], labels: Sequence[str]) -> Figure:
    """One number per block: a curve per run."""
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    info = maps[0].info
    for each, (colour, marker, line), title in zip(maps, _LINES, _titles(labels), strict=False):
        axes.plot(each.blocks, each.values[:, 0], line, marker=marker, markersize=4, color=colour, label=title)
    every = np.concatenate([each.values.ravel() for each in maps])
    if isinstance(_norm(every, ratio=False), LogNorm):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block")
    axes.set_ylabel(info.label)
    figure.legend(loc="outside upper left", fontsize=8)
    return figure


def _titles(labels: Sequence[str]) -> list[str]:
    return list(labels) if len(labels) == 1 else [f"{side}: {label}" for side, label in zip("AB", labels, strict=True)]


def _block_name(block: int) -> str:
    return "outside" if block < 0 else str(block)


def _norm(values: np.ndarray, *, ratio: bool) -> Normalize:
    """One scale for all values: logarithmic for what is compared by ratios and for what spans orders of magnitude."""
    known = values[np.isfinite(values)]
    positive = known[known > 0]
    wide = positive.size > 0 and positive.max() > LOG_BEYOND * positive.min()
    if positive.size and (known >= 0).all() and (ratio or wide) and positive.max() > positive.min():
        return LogNorm(positive.min(), positive.max())
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    return Normalize(low, high if high > low else low + (abs(low) or 1.0))


def _symmetric(values: np.ndarray, *, ratio: bool) -> Normalize:
    """A scale with no difference in its middle."""
    known = values[np.isfinite(values)]
    if ratio:
        reach = float(np.exp(np.abs(np.log(known)).max())) if known.size else 1.0
        reach = max(reach, 1.1)
        return LogNorm(1 / reach, reach)
    reach = float(np.abs(known).max()) if known.size else 1.0
    return Normalize(-(reach or 1.0), reach or 1.0)


def _plain_ticks(bar: Colorbar) -> None:
    """Plain numbers; on a logarithmic scale five of them, equal factors apart."""
    bar.ax.tick_params(labelsize=7)
    if isinstance(bar.norm, LogNorm):
        bar.ax.minorticks_off()
        ticks = np.geomspace(bar.norm.vmin, bar.norm.vmax, 5)
        bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])


def _contrast_label(of: LayerMap) -> str:
    info = of.info
    word = "A / B" if info.ratio else "A − B" + (f", {info.unit}" if info.unit else "")
    if info.higher_is_better is None:
        return word
    side = ("< 1" if info.ratio else "< 0") if not info.higher_is_better else ("> 1" if info.ratio else "> 0")
    return f"{word} ({side}: A better)"
