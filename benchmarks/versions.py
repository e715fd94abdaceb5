"""Time whole training runs of each recipe in two checkouts, in turns: `python benchmarks/versions.py OLD --rounds 3`.

OLD is a folder with another commit (`git worktree add`). Both train with the same overrides and this interpreter; an
iteration's time is the difference in processor time of a longer and a shorter run.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMON = ["evaluation.episodes=1", "evaluation.video=false", "logger.wandb_project=null", "device=cpu"]
COMMON += ["evaluation.interval=10000000", "env.num_envs=60"]
RECIPES = {
    "mars_vmas": [],
    "marpo_vmas": [],
    "oappo_vmas": [],
    "magpo_vmas": [],
    "groups_vmas": [],
    "mars_vmas compile=true": ["compile=true"],
}


def seconds(checkout: Path, recipe: str, overrides: list[str], frames: int) -> float:
    """Processor time of a run and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = checkout / "recipes" / f"{recipe.split()[0]}.py"
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), *overrides, *COMMON, f"total_frames={frames}"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(command)}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a row for each recipe: seconds an iteration in both, and the median of the ratios of rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("old", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = {}
    for recipe in args.recipes:
        times: dict[str, list[float]] = {"old": [], "new": []}
        for _ in range(args.rounds):
            for name, checkout in (("old", args.old.resolve()), ("new", ROOT)):
                short, long = (seconds(checkout, recipe, RECIPES[recipe], n * 6_000) for n in (2, 8))
                times[name].append((long - short) / 6)
        ratios = [old / new for old, new in zip(times["old"], times["new"], strict=True)]
        rows[recipe] = times
        print(
            f"| {recipe} | {statistics.median(times['old']):.2f} s | {statistics.median(times['new']):.2f} s | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |",
            flush=True,
        )
        if args.output is not None:
            args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
