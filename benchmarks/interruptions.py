"""Kill runs at random moments, resume them, and compare them with runs that nobody has killed, bit for bit.

    OMP_NUM_THREADS=1 python benchmarks/interruptions.py runs/interruptions --moments 20

Each run is a fork of this process, which has imported everything: a start costs no more than its environments. The
moment is drawn uniformly from the time between a run's first checkpoint and its end; one that has just ended by then is
resumed, too. A resumed run must have the CSV files (but timers), evaluations and last parameters of the whole one.
"""

import argparse
import os
import random
import runpy
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt  # noqa: F401  (once, not in every run)
import numpy as np
import torch
import vmas  # noqa: F401

import torchrl_marl.run.run  # noqa: F401
from torchrl_marl.run.checkpoints import find_checkpoint, load_policy
from torchrl_marl.run.records import read_metrics

RECIPES = Path(__file__).parents[1] / "recipes"
LOOP = [
    "env.num_envs=4",
    "env.max_steps=5",
    "frames_per_batch=20",
    "minibatch_size=10",
    "epochs=1",
    "total_frames=200",
    "evaluation.interval=60",  # three iterations; 200 is off the schedule
    "evaluation.episodes=2",
    "evaluation.video=false",
    "logger.wandb_project=null",
    "device=cpu",
]
SMALL = ["actor.hidden_sizes=[8]", "critic.hidden_sizes=[8]"]
GRU = [f"{net}.{size}" for net in ("actor", "critic") for size in ("recurrent_size=8", "head_sizes=[]")]
SETTINGS = {
    "mars": ("mars_vmas", SMALL),
    "marpo": ("marpo_vmas", ["chunk_length=5", *SMALL]),
    "magpo": ("magpo_vmas", ["guider.embed_dim=8", "actor.hidden_sizes=[8]"]),
    "oappo": ("oappo_vmas", SMALL),
    "compiled": ("mars_vmas", ["env=coordsum", "compile=true", *SMALL]),
    "gru": ("mars_vmas", ["actor=gru", "critic=gru", "chunk_length=5", *GRU, *SMALL]),
    "seeds": ("seeds", ["seed=[3,7]", *SMALL]),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(recipe: str, log: Path, *overrides: str) -> int:
    """Run a recipe in a fork; return its process id."""
    if child := os.fork():
        return child
    code = 1
    try:
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.argv = [recipe, *overrides]
        sys.path.insert(0, str(RECIPES))
        runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob("*/*/*/*/checkpoints/*.torchrl"))


def wait_for_start(process: int, folder: Path, seeds: int) -> bool:
    """Wait for the first checkpoint of every seed; return whether the run lives."""
    while len({path.parent for path in checkpoints(folder)}) < seeds:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.005)
    return True


def traces(folder: Path) -> dict[str, object]:
    """What must be equal, of each run below a folder by the beginning of its name, ``seedN``."""
    found: dict[str, object] = {}
    for run in folder.glob("*/*/*/*"):
        name = run.name.partition("-")[0]
        found[f"{name}/evaluations.json"] = (run / "evaluations.json").read_text()
        for metric, measured in read_metrics(run).items():
            if not metric.startswith("timers/"):
                found[f"{name}/{metric}"] = np.stack(measured).tobytes()
        for key, value in load_policy(find_checkpoint(run)).state_dict().items():
            found[f"{name}/{key}"] = value.numpy().tobytes() if torch.is_tensor(value) else value
    return found


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def interrupt_and_resume(setting: str, number: signal.Signals, folder: Path, seconds: float) -> tuple[str, float]:
    """Return how an interrupted and resumed run compares with the whole one, and how long it ran."""
    recipe, own = SETTINGS[setting]
    folder.mkdir(parents=True)
    log = folder.with_suffix(".log")
    process = start(recipe, log, *LOOP, *own, f"folder={folder}")
    if not wait_for_start(process, folder, 2 if recipe == "seeds" else 1):
        return f"no start: {log}", 0.0
    began = time.perf_counter()
    time.sleep(random.uniform(0, seconds))
    os.kill(process, number)
    wait(process)
    took = time.perf_counter() - began
    run = checkpoints(folder)[0].parents[1]
    ended = (run / "summary.json").exists()
    if code := wait(start(recipe, folder.with_suffix(".resumed.log"), f"resume={run}")):
        return f"resumed run ended with {code}: {log}", took
    different = differences(traces(folder), traces(folder.parents[1] / "whole"))
    if different:
        return f"{folder}: {len(different)} differ, {different[0]}", took
    return "equal, after its end" if ended else "equal", took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, default=20, help="of each signal and setting")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    print("| setting | signal | interrupted | resumed equal | after its end | else |\n|---|---|---|---|---|---|")
    for setting in arguments.settings:
        recipe, own = SETTINGS[setting]
        base = arguments.folder.resolve() / setting
        (base / "whole").mkdir(parents=True)
        process = start(recipe, base / "whole.log", *LOOP, *own, f"folder={base / 'whole'}")
        if not wait_for_start(process, base / "whole", 1):
            sys.exit(f"{setting} does not start: {base / 'whole.log'}")
        began = time.perf_counter()
        if code := wait(process):
            sys.exit(f"{setting} ended with {code}: {base / 'whole.log'}")
        durations = [time.perf_counter() - began]
        for number in SIGNALS:
            outcomes: Counter[str] = Counter()
            for moment in range(arguments.moments):
                outcome, took = interrupt_and_resume(
                    setting, number, base / number.name / str(moment), statistics.median(durations)
                )
                outcomes[outcome] += 1
                durations += [took] if "after its end" in outcome else []
            after = outcomes.pop("equal, after its end", 0)
            equal = outcomes.pop("equal", 0)
            rest = "; ".join(f"{count} x {what}" for what, count in outcomes.items()) or "none"
            print(f"| {setting} | {number.name} | {arguments.moments} | {equal} | {after} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
