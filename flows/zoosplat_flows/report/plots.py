"""Plots of the report as inline SVG.

They are transparent and have the font and text colour of the page, so that they fit light and dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

INK = "#010203"  # is replaced by the text colour of the page when the SVG is finished
COLOURS = ("#3b82d0", "#e0813a", "#3f9d63", "#b45fc4", "#c8a02c", "#48a9b5")
RED = "#d9534f"  # marks frames without a hull
MAX_POINTS = 2000  # about the most points of a curve: more are not seen and make the page large
FEW_POINTS = 40  # below so many points of a curve each gets a marker
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "zoosplat",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "axes.prop_cycle": cycler(color=COLOURS),
    "lines.linewidth": 1.3,
    "legend.frameon": False,
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)

Floats = npt.NDArray[np.floating[Any]]


class Plot:
    """A figure, and its SVG once the `with` block of `_plot` has ended."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.svg = ""


@contextmanager
def _plot(width: float, height: float) -> Iterator[Plot]:
    """A figure of a size in inches to draw in; it becomes SVG when the block ends."""
    with mpl.rc_context(STYLE):
        plot = Plot(Figure(figsize=(width, height), layout="constrained"))
        yield plot
        buffer = io.StringIO()
        plot.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    plot.svg = text.replace("'DejaVu Sans', ", "").replace("<svg ", '<svg role="img" ', 1)


def _thin(n: int) -> slice:
    """Every k-th of n points, so that about `MAX_POINTS` are left."""
    return slice(None, None, max(1, n // MAX_POINTS))


def _shade(axes: Axes, x: Floats, wrong: npt.NDArray[np.bool_]) -> None:
    """Shade the spans of x in which `wrong` holds."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], wrong, [False])).astype(int)))
    half = (x[1] - x[0]) / 2 if len(x) > 1 else 0.5
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        axes.axvspan(x[start] - half, x[stop - 1] + half, color=RED, alpha=0.25, linewidth=0)


def plot_tracking(
    time_s: Floats, centers_m: Floats, angles_rad: Floats, n_voxels: Floats, valid: npt.NDArray[np.bool_]
) -> str:
    """Position, heading and hull size over time, frames without a hull shaded.

    Args:
        time_s: [T].
        centers_m: [T, 3].
        angles_rad: [T], continuous.
        n_voxels: [T].
        valid: [T].
    """
    every = _thin(len(time_s))
    with _plot(7.6, 4.6) as plot:
        rows = plot.figure.subplots(3, 1, sharex=True)
        for axis, name in enumerate("xyz"):
            rows[0].plot(time_s[every], 100 * centers_m[every, axis], label=name)
        rows[0].legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1.0), borderaxespad=0)
        rows[1].plot(time_s[every], np.degrees(angles_rad[every]), color=COLOURS[3])
        rows[2].plot(time_s[every], n_voxels[every], color=COLOURS[5])
        rows[2].set_ylim(bottom=0)
        for row, label in zip(rows, ("centre (cm)", "heading (deg)", "hull voxels"), strict=True):
            row.set_ylabel(label)
            _shade(row, time_s, ~valid)
        rows[2].set_xlabel("time (s)")
        plot.figure.align_ylabels(rows)
    return plot.svg


def plot_top_view(time_s: Floats, centers_m: Floats, angles_rad: Floats) -> str:
    """The path seen from above, coloured by time, with the heading at a few moments. Shapes as `tracking`."""
    every = _thin(len(time_s))
    path_cm = 100 * centers_m[every, :2]
    with _plot(4.4, 4.6) as plot:
        axes = plot.figure.subplots()
        lines = LineCollection(np.stack([path_cm[:-1], path_cm[1:]], 1).tolist(), cmap="viridis", linewidths=3)
        lines.set_array(time_s[every][:-1])
        axes.add_collection(lines)
        some = np.linspace(0, len(time_s) - 1, min(9, len(time_s))).astype(int)
        extent = max(float(np.ptp(path_cm, axis=0).max()), 1.0)
        arrows = extent / 10 * np.stack([np.cos(angles_rad[some]), np.sin(angles_rad[some])], 1)
        axes.quiver(
            *(100 * centers_m[some, :2]).T,
            *arrows.T,
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.005,
            color=INK,
            zorder=3,
        )
        middle = (path_cm.max(axis=0) + path_cm.min(axis=0)) / 2
        axes.set(xlim=middle[0] + np.array([-0.6, 0.6]) * extent, ylim=middle[1] + np.array([-0.6, 0.6]) * extent)
        axes.set_aspect("equal")
        axes.set(xlabel="x (cm)", ylabel="y (cm)")
        plot.figure.colorbar(lines, ax=axes, label="time (s)", shrink=0.7, aspect=30)
    return plot.svg


def plot_marginals(counts: npt.NDArray[np.int64], ranges: npt.NDArray[np.int64]) -> str:
    """Hull voxels per grid index with the kept range.

    Args:
        counts: [3, n].
        ranges: [3, 2], half-open.
    """
    with _plot(10, 2.4) as plot:
        for i, axes in enumerate(plot.figure.subplots(1, 3)):
            start, stop = (int(r) for r in ranges[i])
            axes.axvspan(start - 0.5, stop - 0.5, color=COLOURS[2], alpha=0.18, linewidth=0)
            axes.fill_between(np.arange(counts.shape[1]), counts[i], step="mid", color=COLOURS[0], linewidth=0)
            axes.set(title=f"{'xyz'[i]}: {start} to {stop}", xlabel="grid index", xlim=(-0.5, counts.shape[1] - 0.5))
            axes.set_ylim(bottom=0)
        plot.figure.axes[0].set_ylabel("hull voxels")
    return plot.svg


def plot_curves(x: Floats, x_label: str, panels: Mapping[str, Mapping[str, Floats]]) -> str:
    """Curves: a panel for each quantity, a line for each of its series.

    Args:
        x: [N].
        x_label: label of the x axis.
        panels: quantity -> series name -> [N], NaN where nothing was measured.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with _plot(3.4 * columns, 2.4 * rows) as plot:
        grid = plot.figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes, (title, series) in zip(grid, panels.items(), strict=False):
            for name, values in series.items():
                there = np.isfinite(values)
                mark = "o" if there.sum() < FEW_POINTS else ""
                axes.plot(x[there], values[there], label=name, marker=mark, markersize=2.5)
            axes.set(title=title, xlabel=x_label)
            if len(series) > 1:
                axes.legend()
    return plot.svg


def plot_maps(places: Floats, colourings: Mapping[str, Floats]) -> str:
    """The map of an embedding, once for each quantity, in its colours.

    Args:
        places: [N, 2].
        colourings: label of a quantity, with its unit -> [N].
    """
    with _plot(3.4 * len(colourings), 3.2) as plot:
        for axes, (name, values) in zip(plot.figure.subplots(1, len(colourings)), colourings.items(), strict=True):
            # Outliers are left out of the range of colours, or all others would have one colour. The points become a
            # picture, which is smaller than as many SVG elements.
            low, high = np.percentile(values, [1, 99]) if len(values) else (0, 1)
            limits = {"vmin": low, "vmax": high} if high > low else {}
            points = axes.scatter(*places.T, c=values, s=4, linewidths=0, cmap="viridis", rasterized=True, **limits)
            axes.set(xticks=[], yticks=[], aspect="equal")
            axes.grid(False)
            for spine in axes.spines.values():
                spine.set_visible(False)
            plot.figure.colorbar(points, ax=axes, label=name, shrink=0.8, aspect=30)
    return plot.svg


def plot_explained_variance(shares: Floats) -> str:
    """The share of the variance that the first dimensions of an embedding explain together.

    Args:
        shares: [E] share of each dimension, falling.
    """
    with _plot(4.2, 2.6) as plot:
        axes = plot.figure.subplots()
        axes.plot(np.arange(1, len(shares) + 1), 100 * np.cumsum(shares), marker="o", markersize=2.5)
        axes.set(xlabel="dimensions", ylabel="explained variance (%)", ylim=(0, 103), xlim=(0, len(shares) + 1))
    return plot.svg


def plot_ethogram(time_s: Floats, states: npt.NDArray[np.int32]) -> str:
    """States over time, a row each, the most frequent one on top.

    Args:
        time_s: [T].
        states: [T] number of the state; -1 where a frame has none.
    """
    count = int(states.max(initial=0)) + 1
    with _plot(10, 0.9 + 0.22 * count) as plot:
        axes = plot.figure.subplots()
        present = states == np.arange(count)[:, None]
        colours = np.array([mpl.colors.to_rgba(COLOURS[i % len(COLOURS)]) for i in range(count)])
        picture = np.where(present[..., None], colours[:, None], 0.0)
        step = float(time_s[1] - time_s[0]) if len(time_s) > 1 else 1.0
        extent = (float(time_s[0]), float(time_s[-1]) + step, count - 0.5, -0.5)
        axes.imshow(picture, aspect="auto", interpolation="nearest", extent=extent)
        axes.set(xlabel="time (s)", ylabel="state", yticks=range(count))
        axes.grid(False)
    return plot.svg
