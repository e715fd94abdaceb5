"""Draw the panels of docs/wandb.md from the files of finished runs.

python docs/wandb_panels.py RUN [RUN ...] --output docs/wandb.png
"""

import argparse
from pathlib import Path

import matplotlib
import yaml

PANELS = {
    "eval/reward/episode_reward_mean": "evaluation return",
    "collection/reward/episode_reward_mean": "return while collecting",
    "train/agents/kl_approx": "KL divergence of an update",
    "train/agents/clip_fraction": "ratios outside the trust region",
    "train/agents/max_ratio": "largest ratio",
    "train/agents/entropy": "entropy",
    "train/agents/explained_variance": "explained variance of the critic",
    "timers/frames_per_second": "frames per second",
}


def main(runs: list[Path], output: Path) -> None:
    """Draw every panel, a line for each run."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(14, 5.5), sharex=True, layout="constrained")
    for axis, (metric, title) in zip(axes.flat, PANELS.items(), strict=True):
        for run in runs:
            rows = [row.split(",") for row in (run / "scalars" / f"{metric}.csv").read_text().split()]
            seed = yaml.safe_load((run / "config.yaml").read_text())["seed"]
            axis.plot([int(frames) for frames, _ in rows], [float(value) for _, value in rows], label=f"seed {seed}")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(metric, fontsize=8, family="monospace")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    main(arguments.runs, arguments.output)
