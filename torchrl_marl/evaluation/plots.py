"""Pictures of runs."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_kl_interval", "plot_learning_curve"]


def plot_learning_curve(evaluations: Sequence[tuple[int, float]], path: Path, *, title: str) -> Path:
    """Draw evaluation return over frames.

    Args:
        evaluations: pairs of frames and mean return.
        path: PNG file to write.
        title: of the plot.

    Returns:
        The path.

    Raises:
        ImportError: without matplotlib (``pip install "torchrl_marl[plot]"``).
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(6, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    frames, returns = zip(*evaluations, strict=True)
    axes.plot(frames, returns, color="#2a6f97", linewidth=1.8, marker="o", markersize=3)
    axes.set(xlabel="frames", ylabel="evaluation return", title=title)
    _tidy(axes)
    figure.savefig(path)
    return path


def plot_kl_interval(run: Path, group: str = "agents") -> Path:
    """Draw MARPO's ratio interval over training, above the divergence that it follows.

    Args:
        run: folder of a run of :class:`~torchrl_marl.objectives.MARPOLoss`, with its metrics.
        group: name of the agents' group.

    Returns:
        The PNG file, ``kl_interval.png`` in the run's folder.

    Raises:
        FileNotFoundError: if the run has no such metrics.
        ImportError: without matplotlib (``pip install "torchrl_marl[plot]"``).
    """
    from matplotlib.figure import Figure

    def metric(name: str) -> tuple[list[float], list[float]]:
        with (run / "scalars" / "train" / group / f"{name}.csv").open() as file:
            frames, values = zip(*((float(row[0]), float(row[1])) for row in csv.reader(file)), strict=True)
        return list(frames), list(values)

    figure = Figure(figsize=(6, 5), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    frames, low = metric("kl_interval_low")
    above.fill_between(frames, low, metric("kl_interval_high")[1], color="#2a6f97", alpha=0.25, label="KL interval")
    for name, style in (("max_ratio", "-"), ("min_ratio", "--")):
        above.plot(*metric(name), color="#bc4b51", linewidth=1, linestyle=style, label=name.replace("_", " "))
    above.axhline(1, color="black", linewidth=0.6)
    above.set_yscale("log", base=2)
    above.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    above.set(ylabel="probability ratio", title="The interval of ratios and the divergence that it follows")
    for name, label, style in (("kl_target", "KL target", "-"), ("kl", "KL(old ‖ new)", "--")):
        below.plot(*metric(name), color="#2a6f97", linewidth=1.4, linestyle=style, label=label)
    below.set(xlabel="frames", ylabel="nats", yscale="log")
    for axes in (above, below):
        axes.legend(frameon=False, fontsize=8)
        _tidy(axes)
    path = run / "kl_interval.png"
    figure.savefig(path)
    return path


def _tidy(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
