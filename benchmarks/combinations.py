"""Run every cell of the table of what combines: `python benchmarks/combinations.py OUTPUT.md`.

Each cell is a short training run (two iterations, an evaluation, the absolute metric) that has to end with exit code 0
and a return; `resume` stops after the first evaluation and goes on.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIZES = [
    *("env.num_envs=8", "env.max_steps=10", "frames_per_batch=160", "minibatch_size=80", "epochs=2"),
    *("total_frames=320", "evaluation.interval=160", "evaluation.episodes=2", "evaluation.video=false"),
    *("logger.wandb_project=null", "device=cpu"),
]
METHODS = {
    "MARS": ("mars_vmas", []),
    "MARPO": ("marpo_vmas", []),
    "OAPPO": ("oappo_vmas", ["loss=oappo"]),
    "MAGPO": ("magpo_vmas", ["loss=magpo", "loss.guider_learner_ratio=1.3"]),
}
OPTIONS = {
    "alone": [],
    "torchrun, two processes": [],
    "collector=multiprocess": ["collector=multiprocess"],
    "actor=gru": ["actor=gru", "critic=gru", "chunk_length=5"],
    "resume=": [],
    "compile=true": ["compile=true"],
    "torchrun, compile=true": ["compile=true"],
    "actor=gru compile=true": ["actor=gru", "critic=gru", "chunk_length=5", "compile=true"],
    "actor=gru collector=multiprocess": ["actor=gru", "critic=gru", "chunk_length=5", "collector=multiprocess"],
}


def run(method: str, option: str) -> str:
    """Train in a folder of its own; return the last line of what it said."""
    recipe, overrides = METHODS[method]
    overrides = [*overrides, *OPTIONS[option], *SIZES]
    if method == "MAGPO":  # its guider is the critic, and takes whole sequences
        overrides = [word for word in overrides if not word.startswith(("critic=", "chunk_length="))]
    script = str(ROOT / "recipes" / f"{recipe}.py")
    python = [sys.executable]
    if option.startswith("torchrun"):
        python = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        overrides = [
            word.replace("interval=160", "interval=320").replace("frames=320", "frames=640") for word in overrides
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:

        def call(*words: str) -> tuple[int, str]:
            done = subprocess.run(
                [*python, script, *words], cwd=folder, env=environment, capture_output=True, text=True
            )
            return done.returncode, done.stdout + done.stderr

        if option == "resume=":
            half = [word.replace("total_frames=320", "total_frames=160") for word in overrides]
            code, said = call(*half)
            if code:
                return said.strip().splitlines()[-1]
            stored = next(Path(folder).glob("runs/*/*/*/*"))
            code, said = call(f"resume={stored}", "total_frames=320")
        else:
            code, said = call(*overrides)
        found = re.findall(r"final return (\S+),", said)
        lines = [line for line in said.strip().splitlines() if line and "it/s" not in line]
        return f"works ({found[-1]})" if code == 0 and found else lines[-1]


def main(output: Path) -> None:
    """Run all cells, two at a time, and write the table."""
    cells = [(method, option) for option in OPTIONS for method in METHODS]
    with ThreadPoolExecutor(2) as pool:
        results = {}
        for cell, result in zip(cells, pool.map(lambda cell: run(*cell), cells), strict=True):
            results[cell] = result
            print(*cell, result, flush=True)
    lines = [f"| | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    lines += [f"| {option} | {' | '.join(results[method, option] for method in METHODS)} |" for option in OPTIONS]
    output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
