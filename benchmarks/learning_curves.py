"""Draw and tabulate runs: `python benchmarks/learning_curves.py RUNS --output results/vmas`.

Reads every finished run below RUNS (folders that a recipe writes) and writes OUTPUT.png (a panel for each task, a line
for each method: mean over seeds, band from the smallest to the largest), OUTPUT.md (a table) and OUTPUT.json (every
evaluation of every run with its configuration, so that nothing but this file is needed to draw it again).
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from omegaconf import OmegaConf

COLORS = {
    "mars": "#d1495b",
    "marpo": "#d1495b",
    "rpo": "#e0a458",
    "mappo": "#2a6f97",
    "maspo": "#8a6fb0",
    "ippo": "#6b8f71",
}


def read_runs(folder: Path) -> list[dict]:
    runs = []
    for summary_file in sorted(folder.rglob("summary.json")):
        config = OmegaConf.load(summary_file.parent / "config.yaml")
        rows = (summary_file.parent / "scalars/eval/reward/episode_reward_mean.csv").read_text().split()
        runs.append(
            {
                "task": config.env.scenario,
                "method": config.method,
                "seed": config.seed,
                "config": OmegaConf.to_container(config),
                "summary": json.loads(summary_file.read_text()),
                "evaluations": [[int(row.split(",")[0]), float(row.split(",")[1])] for row in rows],
            }
        )
    return runs


def grouped(runs: list[dict]) -> dict[str, dict[str, list[dict]]]:
    groups: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        groups[run["task"]][run["method"]].append(run)
    return groups


def draw(runs: list[dict], path: Path) -> None:
    groups = grouped(runs)
    figure = Figure(figsize=(4 * len(groups), 3.3), dpi=150, layout="constrained")
    for axes, (task, methods) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for method, members in sorted(methods.items()):
            frames = [frame for frame, _ in members[0]["evaluations"]]
            columns = list(zip(*[[score for _, score in run["evaluations"]] for run in members], strict=True))
            color = COLORS.get(method)
            axes.plot(frames, [mean(column) for column in columns], label=method, color=color, linewidth=1.8)
            lowest, highest = [min(column) for column in columns], [max(column) for column in columns]
            axes.fill_between(frames, lowest, highest, color=color, alpha=0.18, linewidth=0)
        axes.set(title=task, xlabel="frames")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("evaluation return")
    figure.savefig(path)


def table(runs: list[dict]) -> str:
    lines = [
        "| task | method | seeds | final return | absolute metric | frames | frames/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, methods in grouped(runs).items():
        for method, members in sorted(methods.items()):
            cells = []
            for name in ("final", "absolute"):
                values = [run["summary"][name] for run in members]
                spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
                cells.append(f"{mean(values):.2f}{spread} ({', '.join(f'{value:.2f}' for value in values)})")
            speeds = [run["summary"]["frames_per_second"] for run in members]
            frames = members[0]["summary"]["frames"]
            seeds = ", ".join(str(run["seed"]) for run in members)
            lines.append(f"| {task} | {method} | {seeds} | {' | '.join(cells)} | {frames:,} | {mean(speeds):,.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    found = read_runs(arguments.runs)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(found, arguments.output.with_suffix(".png"))
    arguments.output.with_suffix(".md").write_text(table(found))
    arguments.output.with_suffix(".json").write_text(json.dumps(found) + "\n")
    print(table(found))
