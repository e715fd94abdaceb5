"""Draw the pictures of the methods' pages: `python docs/pictures.py`."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from torchrl_marl.objectives.reuse import gated_reuse_matrix
from torchrl_marl.objectives.surrogates import (
    barrier_gain,
    clip_gain,
    double_clip_gain,
    kl_interval,
    quadratic_gain,
    ratio_gain,
    reflective_clip_gain,
)

FOLDER = Path(__file__).parent / "methods"
RATIO = torch.linspace(0.05, 3.0, 400)


def gains() -> Figure:
    """Trust regions with the same bounds."""
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    for axis, sign in zip(figure.subplots(1, 2), (1.0, -1.0), strict=True):
        advantage = torch.full_like(RATIO, sign)
        for label, gain in {
            "no trust region": ratio_gain,
            "MAPPO": clip_gain,
            "MASPO": quadratic_gain,
            "MARS": barrier_gain,
        }.items():
            style = ":" if gain is ratio_gain else "-"
            axis.plot(RATIO, gain(RATIO.log(), advantage, low=0.5, high=2.0), style, label=label)
        axis.axvline(1, color="gray", linewidth=0.5)
        axis.set(title=f"A = {sign:+.0f}", xlabel="ratio r", ylabel="gain", ylim=(-4, 3))
        for bound in (0.5, 2.0):
            axis.axvline(bound, color="gray", linewidth=0.5, linestyle="--")
    axis.legend(frameon=False)
    return figure


def marpo() -> Figure:
    """The reflective gain, and the interval of a divergence."""
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    low, high = kl_interval(torch.tensor(0.088))
    for following in (0.6, 1.0, 1.5):
        log_next = torch.full_like(RATIO, float(np.log(following)))
        gain = reflective_clip_gain(
            RATIO.log(), log_next, torch.ones_like(RATIO), low=low, high=high, next_low=low, next_high=high
        )
        left.plot(RATIO, gain, label=f"next ratio {following}")
    left.set(title="reflective gain, next advantage +1", xlabel="ratio r", ylabel="gain")
    left.legend(frameon=False)
    target = torch.linspace(1e-3, 0.3, 200)
    bounds = [kl_interval(value) for value in target]
    right.fill_between(target, [float(low) for low, _ in bounds], [float(high) for _, high in bounds], alpha=0.3)
    right.set(title="interval of ratios", xlabel="KL target d, nats", ylabel="ratio")
    return figure


def magpo() -> Figure:
    """The double clip."""
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    for axis, sign in zip(figure.subplots(1, 2), (1.0, -1.0), strict=True):
        for learner in (0.5, 1.0, 2.0):  # pi / mu_old
            gain = double_clip_gain(
                RATIO.log(),
                RATIO.log() - float(np.log(learner)),
                torch.full_like(RATIO, sign),
                low=0.8,
                high=1.2,
                guider_learner_ratio=1.3,
            )
            axis.plot(RATIO, gain, label=f"learner at {learner} of the old guider")
        axis.set(title=f"A = {sign:+.0f}", xlabel="guider's ratio r", ylabel="gain")
    axis.legend(frameon=False)
    return figure


def oappo() -> Figure:
    """Whose experience four agents use, two pairs of whom are alike."""
    divergence = torch.full((4, 4), 2.0)
    for one, other in ((0, 3), (1, 2)):
        divergence[one, other] = divergence[other, one] = 0.02
    divergence.fill_diagonal_(0)
    weights = gated_reuse_matrix(divergence, own_weight=0.7, kl_threshold=0.1)
    figure = Figure(figsize=(3.6, 3.2), dpi=150, layout="constrained")
    axis = figure.subplots()
    axis.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    for (learner, source), weight in np.ndenumerate(weights.numpy()):
        axis.text(
            source, learner, f"{weight:.1f}", ha="center", va="center", color="white" if weight > 0.5 else "black"
        )
    axis.set(xlabel="source", ylabel="learner", xticks=range(4), yticks=range(4))
    return figure


if __name__ == "__main__":
    for draw in (gains, marpo, magpo, oappo):
        draw().savefig(FOLDER / f"{draw.__name__}.png")
