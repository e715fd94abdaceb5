"""Figures of a single run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from torchrl_marl.evaluation.figures import frames_axis, subplots
from torchrl_marl.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_kl_interval", "plot_learning_curve", "plot_method", "plot_reuse_matrix"]

Metrics = Mapping[str, tuple[ArrayLike, ArrayLike]]
"""Frames and values that a run has logged, by metric."""


def plot_learning_curve(evaluations: Sequence[tuple[int, float]], path: Path, *, title: str) -> Path:
    """Draw evaluation return over frames.

    Args:
        evaluations: pairs of frames and mean return.
        path: PNG file to write.
        title: title of the plot.

    Returns:
        The path.

    Raises:
        ImportError: without matplotlib (``pip install "torchrl_marl[plot]"``).
    """
    figure, (axes,) = subplots(6, 3.6)
    frames, returns = zip(*evaluations, strict=True)
    axes.plot(frames, returns, color="#0072b2", linewidth=1.7, marker="o", markersize=3)
    axes.set(ylabel="evaluation return", title=title)
    frames_axis(axes, frames[-1])
    return _save(figure, path)


def plot_method(metrics: Metrics, folder: Path) -> list[Path]:
    """Draw the method-specific figures for which a run has logged metrics.

    Args:
        metrics: metrics of a run.
        folder: output folder.

    Returns:
        The PNG files.
    """
    pictures = {"kl_interval_low": plot_kl_interval, "reuse_0_0": plot_reuse_matrix}
    parts = [name.split("/") for name in metrics]
    return [pictures[own[-1]](metrics, folder, own[1]) for own in parts if own[0] == "train" and own[-1] in pictures]


def plot_kl_interval(metrics: Metrics, folder: Path, group: str = "agents") -> Path:
    """Draw MARPO's ratio interval over training, above the divergence that it follows.

    Args:
        metrics: metrics of a run of :class:`~torchrl_marl.objectives.MARPOLoss`.
        folder: output folder.
        group: name of the agents' group.

    Returns:
        The PNG file, ``kl_interval.png``.

    Raises:
        KeyError: if the run has no such metrics.
        ImportError: without matplotlib (``pip install "torchrl_marl[plot]"``).
    """
    figure, (above, below) = subplots(6, 5, 2, 1, sharex=True, height_ratios=(3, 2))
    frames, low = metrics[f"train/{group}/kl_interval_low"]
    high = metrics[f"train/{group}/kl_interval_high"][1]
    above.fill_between(frames, low, high, color="#0072b2", alpha=0.16, linewidth=0, label="KL interval")
    for name, style in (("max_ratio", "-"), ("min_ratio", "--")):
        label = name.replace("_", " ")
        above.plot(*metrics[f"train/{group}/{name}"], color="#d55e00", linewidth=1, linestyle=style, label=label)
    above.axhline(1, color="0.45", linewidth=0.9)
    above.set_yscale("log", base=2)
    above.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    above.set(ylabel="probability ratio", title="The interval of ratios and the divergence that it follows")
    for name, label, style in (("kl_target", "KL target", "-"), ("kl", "KL(old ‖ new)", "--")):
        below.plot(*metrics[f"train/{group}/{name}"], color="#0072b2", linewidth=1.4, linestyle=style, label=label)
    below.set(ylabel="nats", yscale="log")
    frames_axis(below, np.max(frames))
    for axes in (above, below):
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, folder / "kl_interval.png")


def plot_reuse_matrix(metrics: Metrics, folder: Path, group: str = "agents") -> Path:
    """Draw the reuse matrix of an off-agent method over training, one stripe per learner and source.

    Args:
        metrics: metrics of a run of :class:`~torchrl_marl.objectives.OAPPOLoss` or another off-agent method.
        folder: output folder.
        group: name of the agents' group.

    Returns:
        The PNG file, ``reuse_matrix.png``.

    Raises:
        KeyError: if the run has no such metrics.
        ImportError: without matplotlib (``pip install "torchrl_marl[plot]"``).
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    prefix = f"train/{group}/reuse"
    size, norm = sum(name.startswith(f"{prefix}_") for name in metrics), Normalize(0, 1)
    agents = range(math.isqrt(size))
    last = np.max(metrics[f"{prefix}_0_0"][0])
    figure, panels = subplots(6, 0.6 + 0.25 * size, len(agents), 1, sharex=True)
    for learner, axes in enumerate(panels):
        weights = np.stack([metrics[f"{prefix}_{learner}_{source}"][1] for source in agents])
        extent = (0, last, len(agents) - 0.5, -0.5)
        axes.imshow(weights, norm=norm, cmap="Blues", aspect="auto", extent=extent, interpolation="nearest")
        axes.set(ylabel=f"agent {learner}", yticks=agents)
        axes.grid(False)
    panels[0].set_title("Share of each agent's experience in what an agent learns from")
    frames_axis(panels[-1], last)
    figure.colorbar(ScalarMappable(norm, "Blues"), ax=panels)
    return _save(figure, folder / "reuse_matrix.png")


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as picture:
        figure.savefig(picture, dpi=150)
    return path
