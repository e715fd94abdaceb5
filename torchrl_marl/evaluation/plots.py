"""Pictures of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["plot_learning_curve"]


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
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path
