"""Pictures of runs."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torchrl_marl.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_kl_interval", "plot_learning_curve", "plot_method", "plot_reuse_matrix"]


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
    return _save(figure, path)


def plot_method(run: Path) -> list[Path]:
    """Draw what a method logs of itself: the picture of each metric that the run has, and that has one.

    Args:
        run: folder of a run.

    Returns:
        The PNG files.
    """
    pictures = {"kl_interval_low": plot_kl_interval, "reuse_0_0": plot_reuse_matrix}
    files = [file for name in pictures for file in (run / "scalars" / "train").glob(f"*/{name}.csv")]
    return [pictures[file.stem](run, file.parent.name) for file in sorted(files)]


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

    metric = partial(_metric, run, group)
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
    return _save(figure, run / "kl_interval.png")


def plot_reuse_matrix(run: Path, group: str = "agents") -> Path:
    """Draw whose experience the agents of an off-agent method used over training: one stripe a learner and source.

    Args:
        run: folder of a run of :class:`~torchrl_marl.objectives.OAPPOLoss` or one of its kind, with its metrics.
        group: name of the agents' group.

    Returns:
        The PNG file, ``reuse_matrix.png`` in the run's folder.

    Raises:
        FileNotFoundError: if the run has no such metrics.
        ImportError: without matplotlib (``pip install "torchrl_marl[plot]"``).
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    files = list((run / "scalars" / "train" / group).glob("reuse_*_*.csv"))
    if not files:
        raise FileNotFoundError(f"{run} has no metrics train/{group}/reuse_*.")
    agents, norm = math.isqrt(len(files)), Normalize(0, 1)
    figure = Figure(figsize=(6, 0.6 + 0.25 * len(files)), dpi=150, layout="constrained")
    axes = figure.subplots(agents, 1, sharex=True, squeeze=False)[:, 0]
    for learner, stripes in enumerate(axes):
        series = [_metric(run, group, f"reuse_{learner}_{source}") for source in range(agents)]
        frames, weights = series[0][0], [values for _, values in series]
        extent = (0, frames[-1], agents - 0.5, -0.5)
        stripes.imshow(weights, norm=norm, cmap="Blues", aspect="auto", extent=extent, interpolation="nearest")
        stripes.set(ylabel=f"agent {learner}", yticks=range(agents))
        _tidy(stripes)
        stripes.grid(False)
    axes[0].set_title("Share of each agent's experience in what an agent learns from")
    axes[-1].set_xlabel("frames")
    figure.colorbar(ScalarMappable(norm, "Blues"), ax=list(axes))
    return _save(figure, run / "reuse_matrix.png")


def _metric(run: Path, group: str, name: str) -> tuple[list[float], list[float]]:
    with (run / "scalars" / "train" / group / f"{name}.csv").open() as file:
        frames, values = zip(*((float(row[0]), float(row[1])) for row in csv.reader(file)), strict=True)
    return list(frames), list(values)


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as picture:
        figure.savefig(picture)
    return path


def _tidy(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
