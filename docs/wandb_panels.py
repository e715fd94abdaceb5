"""Draw the panels of docs/wandb.md from the files of finished runs.

python docs/wandb_panels.py RUN [RUN ...] --output docs/wandb.png
"""

import argparse
from pathlib import Path

from torchrl_marl.evaluation.figures import Band, draw_curves
from torchrl_marl.run.records import read_metric, read_runs

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


def main(roots: list[Path], output: Path) -> None:
    """Draw every panel, a line for each run."""
    panels: dict[str, dict[str, Band]] = {title: {} for title in PANELS.values()}
    for run in read_runs(roots)[0].itertuples():
        for metric, title in PANELS.items():
            frames, values = read_metric(run.folder, metric)
            panels[title][f"seed {run.seed}"] = Band(frames, values, values, values)
    figure = draw_curves(panels, ylabel="")
    for axes, metric in zip(figure.axes, PANELS, strict=True):
        axes.set_xlabel(metric, fontsize=7, family="monospace")
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    main(arguments.runs, arguments.output)
