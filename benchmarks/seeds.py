"""Seeds together against seeds alone: `python benchmarks/seeds.py --seeds 1 5 10`.

Runs recipes/mars_vmas.py with one seed and examples/seeds.py with several, for a few and for some more iterations, and
prints the processor time of an iteration: the difference of both runs, so that imports, evaluation and drawing count
for nothing. On a busy machine processor time is steadier than the clock.
"""

import argparse
import contextlib
import runpy
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["env=coordsum", "actor.hidden_sizes=[64,64]", "critic.hidden_sizes=[64,64]"]
TASKS = {
    "maze, 256 x 25 steps, minibatch 6400": [
        "env=maze",
        "env.num_envs=256",
        "loss=mappo",
        "actor.hidden_sizes=[32]",
        "actor.agent_id=false",
        "critic.hidden_sizes=[32]",
        "frames_per_batch=6400",
        "minibatch_size=6400",
    ],
    "CoordSum-3x10, 60 x 100 steps, minibatch 1000": [*SMALL, "frames_per_batch=6000"],
    "CoordSum-3x10, 16 x 32 steps, minibatch 128": [
        *SMALL,
        "env.num_envs=16",
        "env.max_steps=32",
        "frames_per_batch=512",
        "minibatch_size=128",
    ],
}


def processor_time(recipe: str, overrides: list[str], frames: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["logger.wandb_project=null", "evaluation.video=false", "evaluation.episodes=1", "device=cpu"]
        limits = [f"total_frames={frames}", "evaluation.interval=1000000", f"folder={folder}"]
        sys.argv = [recipe, *quiet, *limits, *overrides]
        start = time.process_time()
        with contextlib.redirect_stdout(sys.stderr):
            runpy.run_module(recipe, run_name="__main__")
        return time.process_time() - start


def iteration_time(recipe: str, overrides: list[str], iterations: int) -> float:
    """Seconds of processor time of an iteration."""
    batch = next(int(word.partition("=")[2]) for word in overrides if word.startswith("frames_per_batch"))
    _, short, long = (processor_time(recipe, overrides, n * batch) for n in (1, 1, 1 + iterations))  # one to warm up
    return (long - short) / iterations


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--iterations", type=int, default=10)
    arguments = parser.parse_args()
    lines = ["| task | seeds | alone, s | together, s | times faster |", "|---|---|---|---|---|"]
    for task, overrides in TASKS.items():
        alone = iteration_time("recipes.mars_vmas", [*overrides, "seed=0"], arguments.iterations)
        for count in arguments.seeds:
            seeds = f"seed=[{','.join(map(str, range(count)))}]"
            together = iteration_time("examples.seeds", [*overrides, seeds], arguments.iterations)
            ratio = count * alone / together
            lines.append(f"| {task} | {count} | {count * alone:.3f} | {together:.3f} | {ratio:.2f} |")
    print("\n".join(lines))
