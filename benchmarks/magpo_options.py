"""Tabulate runs of MAGPO's options: `python benchmarks/magpo_options.py RUNS --output results/magpo_options`.

Reads every finished run below RUNS and writes OUTPUT.json: of each run its command, its curves, and the return of the
learner of its last checkpoint with sampled actions, 320 episodes on starts that nothing else has seen.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torchrl.envs import ExplorationType, set_exploration_type

from torchrl_marl.modules import with_recurrent_state
from torchrl_marl.run.checkpoints import find_checkpoint, load_policy
from torchrl_marl.run.records import read_metrics, read_runs

CURVES = {
    "evaluations": "eval/reward/episode_reward_mean",
    "returns": "collection/reward/episode_reward_mean",
    "imitation_gap": "train/agents/loss_learner_kl",
    "double_clip_fraction": "train/agents/double_clip_fraction",
    "guider_learner_ratio": "train/agents/guider_learner_ratio",
}


def option(config: Mapping[str, Any]) -> str:
    if config.get("guider.observes", "observation") != "observation":
        return "guider sees the state"
    adapts = any(key.startswith("loss.adapt_ratio") and value for key, value in config.items())
    return "delta follows the gap" if adapts else f"delta {config['loss.guider_learner_ratio']:g}"


@torch.no_grad()
def sampled_return(run: Path, seed: int) -> float:
    """Mean return of the last learner's sampled actions; all episodes have one length."""
    env_config = OmegaConf.load(run / "config.yaml").env
    policy = load_policy(find_checkpoint(run))
    env = with_recurrent_state(instantiate(env_config, num_envs=320, seed=4_000_012 + seed), policy)
    torch.manual_seed(seed)
    with set_exploration_type(ExplorationType.RANDOM):
        data = env.rollout(env_config.max_steps, policy, break_when_any_done=False)
    return data["next", "agents", "reward"].sum(1).mean().item()


def curves_of(folder: Path) -> list[dict]:
    runs = []
    for run in read_runs([folder])[0].itertuples():
        entry = {
            "task": run.task,
            "option": option(run.config),
            "seed": run.seed,
            "sampled_return": sampled_return(run.folder, run.seed),
            "frames": run.frames,
            "seconds": run.frames / run.frames_per_second,
            "absolute": run.absolute,
            "git_commit": run.sessions[-1]["git_commit"],
            "command": run.sessions[-1]["command"],
        }
        metrics = read_metrics(run.folder)
        for name, metric in CURVES.items():
            if metric in metrics:
                rows = zip(*metrics[metric], strict=True)
                entry[name] = [[int(frames), round(float(value), 5)] for frames, value in rows]
        runs.append(entry)
    return sorted(runs, key=lambda run: (run["task"], run["option"], run["seed"]))


def last_fifth(curve: list[list[float]]) -> float:
    return mean(value for _, value in curve[-max(1, len(curve) // 5) :])


def table(runs: list[dict]) -> str:
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for run in runs:
        groups[run["task"], run["option"]].append(run)
    heads = ["task", "option", "learner, most likely actions", "learner, sampled", "guider", "gap (nats)", "delta"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (task, name), members in groups.items():
        scores = [
            [f"{run['evaluations'][-1][1]:.2f}" for run in members],
            [f"{run['sampled_return']:.2f}" for run in members],
            [f"{last_fifth(run['returns']):.2f}" for run in members],
            [f"{last_fifth(run['imitation_gap']):.4f}" for run in members],
            [f"{last_fifth(run['guider_learner_ratio']):.2f}" for run in members if "guider_learner_ratio" in run],
        ]
        lines.append(f"| {task} | {name} | " + " | ".join(", ".join(column) for column in scores) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    found = curves_of(arguments.runs)
    arguments.output.with_suffix(".json").write_text(json.dumps(found) + "\n")
    print(table(found))
