"""Tabulate and draw runs in the mazes: `python benchmarks/maze_study.py RUNS --output results/mazes`.

Reads every finished run below RUNS and writes OUTPUT.json (of each run the method, its curves of returns in training
and in evaluation, and the reuse matrix over training) and OUTPUT.png (returns in training: mean over seeds, band from
the lowest to the highest). With most likely actions, only everyone's shortest ways give the best return.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

BEST = {"black_red": 0.8, "black_blue_red": 0.78667}


def label(config: DictConfig) -> str:
    """Name of a method with what distinguishes it in the study."""
    if config.method not in ("oappo", "oatrpo"):
        return config.method.upper()
    if config.loss.get("reuse_matrix") is not None:
        return f"{config.method.upper()} {config.loss.reuse_matrix}"
    own_weight, kl_threshold = config.loss.get("own_weight", 0.7), config.loss.get("kl_threshold", 0.1)
    return f"{config.method.upper()} lambda {own_weight:g}, sigma {kl_threshold:g}"


def curve(path: Path) -> list[list[float]]:
    return [[int(frames), round(float(value), 4)] for frames, value in (row.split(",") for row in path.open())]


def read_runs(folder: Path) -> list[dict]:
    runs = []
    for summary_file in sorted(folder.rglob("summary.json")):
        run, summary = summary_file.parent, json.loads(summary_file.read_text())
        config = DictConfig(OmegaConf.load(run / "config.yaml"))
        runs.append(
            {
                "task": config.env.scenario,
                "method": label(config),
                "seed": config.seed,
                "frames": summary["frames"],
                "git_commit": summary["git_commit"],
                "evaluations": curve(run / "scalars/eval/reward/episode_reward_mean.csv"),
                "returns": curve(run / "scalars/collection/reward/episode_reward_mean.csv"),
                "reuse": {
                    path.stem: [value for _, value in curve(path)]
                    for path in sorted((run / "scalars/train/agents").glob("reuse_*.csv"))
                },
            }
        )
    return sorted(runs, key=lambda run: (run["task"], run["method"], run["seed"]))


def grouped(runs: list[dict]) -> dict[str, dict[str, list[dict]]]:
    groups: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        groups[run["task"]][run["method"]].append(run)
    return groups


def frames_to(run: dict, level: float) -> int | None:
    return next((frames for frames, value in run["returns"] if value >= level), None)


def table(runs: list[dict]) -> str:
    lines = ["| maze | method | seeds | shortest ways | last return in evaluation | in training | frames to 0.75 |"]
    lines.append("|" + "---|" * 7)
    for task, methods in grouped(runs).items():
        for method, members in methods.items():
            last = [run["evaluations"][-1][1] for run in members]
            best = f"{sum(score > BEST[task] - 1e-3 for score in last)} of {len(last)}"
            training = mean(run["returns"][-1][1] for run in members)
            reached = [frames for frames in (frames_to(run, 0.75) for run in members) if frames is not None]
            frames = f"{mean(reached):,.0f}" if len(reached) == len(members) else "not all"
            seeds, scores = len(members), ", ".join(f"{score:.3f}" for score in last)
            lines.append(f"| {task} | {method} | {seeds} | {best} | {scores} | {training:.3f} | {frames} |")
    return "\n".join(lines) + "\n"


def draw_curves(runs: list[dict], path: Path) -> None:
    groups = grouped(runs)
    figure = Figure(figsize=(5 * len(groups), 3.6), dpi=150, layout="constrained")
    for axes, (task, methods) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for method, members in methods.items():
            times = sorted(set.intersection(*({frames for frames, _ in run["returns"]} for run in members)))
            columns = [[dict(run["returns"])[frames] for run in members] for frames in times]
            (line,) = axes.plot(times, [mean(column) for column in columns], label=method, linewidth=1.6)
            lowest, highest = [min(column) for column in columns], [max(column) for column in columns]
            axes.fill_between(times, lowest, highest, color=line.get_color(), alpha=0.12, linewidth=0)
        axes.set(title=task, xlabel="frames", ylim=(-0.5, 0.85))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e3:g} k")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, loc="lower right")
    figure.axes[0].set_ylabel("return while training")
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    found = read_runs(arguments.runs)
    arguments.output.with_suffix(".json").write_text(json.dumps(found) + "\n")
    print(table(found))
    draw_curves(found, arguments.output.with_suffix(".png"))
