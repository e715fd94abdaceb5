"""Figures of curves, legible in print, with shaded intervals and the same colour for a method on every page."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Band", "draw_aggregates", "draw_curves", "draw_intervals", "frames_axis", "method_styles", "subplots"]

# Distinct for readers with colour vision deficiency; many colours are from Okabe and Ito.
_COLORS = {
    "mars": "#d55e00",
    "mappo": "#0072b2",
    "maspo": "#009e73",
    "marpo": "#cc79a7",
    "rpo": "#66a61e",
    "ippo": "#56b4e9",
    "happo": "#e69f00",
    "ctds": "#7f7f7f",
    "mat": "#222222",
    "magpo": "#6a3d9a",
    "sable": "#882255",
    "hatrpo": "#999933",
    "oappo": "#8c510a",
    "oatrpo": "#117733",
    "seac": "#44aa99",
}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (5, 1.4, 1.2, 1.4)))
_TITLE: dict[str, Any] = {"fontsize": 10, "loc": "left"}
_WIDTH = 7.0  # inches, the text width of a printed page


class Band(NamedTuple):
    """A line with its interval, arrays of the same length."""

    x: ArrayLike
    center: ArrayLike
    low: ArrayLike
    high: ArrayLike


def method_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Line styles: a method has one colour everywhere, and its variants (``mars_additive``) differ in dashes.

    If all methods are variants of one, such as ``mars lr=0.001`` and ``mars lr=0.01``, their colours differ as well.

    Example:
        >>> styles = method_styles(["mars", "mappo", "mars_additive"])
        >>> styles["mars"]["color"] == styles["mars_additive"]["color"] != styles["mappo"]["color"]
        True
    """
    palette, variants, styles = list(_COLORS.values()), dict[str, int](), {}
    families = {method: method.lower().split()[0].split("_")[0] for method in sorted(methods)}
    alone = len(set(families.values())) == 1
    for method, family in families.items():
        color = _COLORS.get(family) or palette[zlib.crc32(family.encode()) % len(palette)]
        variant = variants[family] = variants.get(family, -1) + 1
        if alone:
            color = palette[(palette.index(color) + variant) % len(palette)]
        styles[method] = {"color": color, "linestyle": _DASHES[variant % len(_DASHES)]}
    return styles


def draw_curves(tasks: Mapping[str, Mapping[str, Band]], *, ylabel: str) -> Figure:
    """Draw a panel for each task and a line with its interval for each method.

    Args:
        tasks: curves over frames, by task and method.
        ylabel: label of the vertical axes.

    Returns:
        Figure.

    Raises:
        ImportError: without matplotlib (``pip install "torchrl_marl[plot]"``).
    """
    columns = 2 if len(tasks) == 4 else min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, panels = subplots(_WIDTH if columns > 1 else 0.6 * _WIDTH, 2.35 * rows + 0.3, rows, columns)
    styles = method_styles({method for curves in tasks.values() for method in curves})
    for axes, (task, curves) in zip(panels, tasks.items(), strict=False):
        for method, band in sorted(curves.items()):
            _draw_band(axes, band, method, styles)
        axes.set_title(_plain(task), **_TITLE)
        frames_axis(axes, max(np.max(band.x) for band in curves.values()))
    for axes in panels[len(tasks) :]:
        axes.remove()
    for axes in panels[: len(tasks) : columns]:
        axes.set_ylabel(ylabel)
    _legend(figure, styles)
    return figure


def draw_aggregates(efficiency: Mapping[str, Band], profiles: Mapping[str, Band]) -> Figure:
    """Draw sample efficiency and performance profiles side by side.

    Args:
        efficiency: normalised return over the fraction of the budget, by method.
        profiles: fraction of runs over the threshold on the normalised score, by method.

    Returns:
        Figure.

    Raises:
        ImportError: without matplotlib (``pip install "torchrl_marl[plot]"``).
    """
    figure, (left, right) = subplots(_WIDTH, 2.75, 1, 2)
    styles = method_styles(efficiency)
    for method in sorted(efficiency):
        _draw_band(left, efficiency[method], method, styles)
        _draw_band(right, profiles[method], method, styles)
    left.set_title("sample efficiency", **_TITLE)
    left.set(xlabel="share of the budget (%)", ylabel="normalised return (IQM)", xlim=(0, 100))
    right.set_title("performance profile", **_TITLE)
    right.set(xlabel="normalised score τ", ylabel="runs with score > τ (%)", xlim=(0, 1), ylim=(-2, 102))
    _legend(figure, styles)
    return figure


def draw_intervals(
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    baseline: str,
    xlabel: str,
    at: float,
    ticks: Mapping[float, str] | None = None,
) -> Figure:
    """Draw how methods compare with a baseline, estimates with intervals, one panel per task.

    Args:
        panels: ``(estimate, low, high)`` by panel title and method.
        baseline: name of the baseline.
        xlabel: what is compared.
        at: value of no difference, with a line.
        ticks: labels by their places, from the lowest to the highest value that can be.

    Returns:
        Figure.

    Raises:
        ImportError: without matplotlib (``pip install "torchrl_marl[plot]"``).
    """
    methods = sorted({method for panel in panels.values() for method in panel}, reverse=True)
    styles = method_styles([baseline, *methods])
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    height = rows * (0.21 * len(methods) + 0.55) + 0.35
    labels = [_plain(method) for method in methods]
    names = max(0.35 * _WIDTH, 0.07 * max(map(len, methods)))
    figure, axes_of = subplots(names + 0.65 * columns / 3 * _WIDTH, height, rows, columns)
    for index, (axes, (title, panel)) in enumerate(zip(axes_of, panels.items(), strict=False)):
        axes.axvline(at, color="0.45", linewidth=0.9, zorder=0)
        for method, (center, low, high) in panel.items():
            row, color = methods.index(method), styles[method]["color"]
            axes.plot([low, high], [row, row], color=color, linewidth=2.2, solid_capstyle="butt")
            axes.plot(center, row, "o", color=color, markersize=4.5, clip_on=False)
        axes.set_title(_plain(title), **_TITLE)
        axes.set_yticks(range(len(methods)), labels if index % columns == 0 else [""] * len(methods))
        if ticks:
            axes.set_xticks([*ticks], [*ticks.values()])
            axes.set_xlim(min(ticks), max(ticks))
        axes.set_ylim(-0.6, len(methods) - 0.4)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
    for axes in axes_of[len(panels) :]:
        axes.remove()
    space = "\n" if len(baseline) > 30 else " "
    figure.supxlabel(f"{xlabel} over{space}{_plain(baseline)}", fontsize=9)
    return figure


def _plain(name: str) -> str:
    """Escape a name that Matplotlib would typeset as a formula."""
    return name.replace("$", r"\$")


def subplots(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure with its size in inches and its panels, row by row; ``options`` go to ``Figure.subplots``."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).ravel())
    for axes in panels:
        axes.grid(color="0.9", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set(color="0.35", linewidth=0.8)
        axes.tick_params(which="both", color="0.35", labelcolor="0.15", labelsize=8.5)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_fontsize(9)
    return figure, panels


def _draw_band(axes: Axes, band: Band, method: str, styles: Mapping[str, Mapping[str, Any]]) -> None:
    axes.plot(band.x, band.center, linewidth=1.7, label=_plain(method), **styles[method])
    axes.fill_between(band.x, band.low, band.high, color=styles[method]["color"], alpha=0.16, linewidth=0)


def frames_axis(axes: Axes, most: float) -> None:
    """Label an axis of up to ``most`` frames in thousands or millions."""
    unit, name = (1e6, "millions") if most >= 1e6 else (1e3, "thousands")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / unit:g}")
    axes.set_xlabel(f"frames ({name})")


def _legend(figure: Figure, styles: Mapping[str, Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linewidth=1.7, label=_plain(method), **style) for method, style in styles.items()]
    for most in range(min(5, len(handles)), 0, -1):  # the most that fit
        columns = math.ceil(len(handles) / math.ceil(len(handles) / most))  # rows of nearly equal length
        legend = figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
        width = legend.get_window_extent().width
        if width <= figure.bbox.width or most == 1:
            break
        legend.remove()
    figure.set_figwidth(max(figure.get_figwidth(), width / figure.dpi))
    figure.set_figheight(figure.get_figheight() + 0.17 * (math.ceil(len(handles) / columns) - 1))
