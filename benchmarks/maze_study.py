"""Tabulate and draw runs in the mazes: `python benchmarks/maze_study.py RUNS --output results/mazes`.

Reads every finished run below RUNS and writes OUTPUT.json (of each run the method, its curves of returns in training
and in evaluation, and the reuse matrix over training) and OUTPUT.png (returns in training: mean over seeds, band from
the lowest to the highest). With most likely actions, only everyone's shortest ways give the best return.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from torchrl_marl.evaluation.figures import Band, draw_curves
from torchrl_marl.run.records import RETURN, read_metric, read_metrics, read_runs

BEST = {"black_red": 0.8, "black_blue_red": 0.78667}


def label(method: str, config: Mapping[str, Any]) -> str:
    """Name of a method with what distinguishes it in the study."""
    if method == "oappo_fading":
        return f"OAPPO fading, sigma {config['loss.kl_threshold']:g}"
    if method not in ("oappo", "oatrpo"):
        return method.upper()
    if config.get("loss.reuse_matrix") is not None:
        return f"{method.upper()} {config['loss.reuse_matrix']}"
    own_weight, kl_threshold = config.get("loss.own_weight", 0.7), config.get("loss.kl_threshold", 0.1)
    return f"{method.upper()} lambda {own_weight:g}, sigma {kl_threshold:g}"


def curve(run: Path, metric: str) -> list[list[float]]:
    return [[int(frames), round(float(value), 4)] for frames, value in zip(*read_metric(run, metric), strict=True)]


def curves_of(folder: Path) -> list[dict]:
    runs = [
        {
            "task": run.task,
            "method": label(run.method, run.config),
            "seed": run.seed,
            "frames": run.frames,
            "git_commit": run.sessions[-1]["git_commit"],
            "evaluations": curve(run.folder, RETURN),
            "returns": curve(run.folder, "collection/reward/episode_reward_mean"),
            "reuse": {
                name.rpartition("/")[2]: [value for _, value in curve(run.folder, name)]
                for name in read_metrics(run.folder)
                if name.startswith("train/agents/reuse_")
            },
        }
        for run in read_runs([folder])[0].itertuples()
    ]
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


def draw(runs: list[dict], path: Path) -> None:
    bands: dict[str, dict[str, Band]] = defaultdict(dict)
    for task, methods in grouped(runs).items():
        for method, members in methods.items():
            times = sorted(set.intersection(*({frames for frames, _ in run["returns"]} for run in members)))
            values = np.array([[dict(run["returns"])[frames] for frames in times] for run in members])
            bands[task][method] = Band(times, values.mean(0), values.min(0), values.max(0))
    draw_curves(bands, ylabel="return while training").savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    found = curves_of(arguments.runs)
    arguments.output.with_suffix(".json").write_text(json.dumps(found) + "\n")
    print(table(found))
    draw(found, arguments.output.with_suffix(".png"))
