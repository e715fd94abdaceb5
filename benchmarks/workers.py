"""Frames per second of collection by one process and by workers: a table.

    python benchmarks/workers.py --rounds 5 --only pursuit

Every collector gets the same environments in total. "By processor" divides the frames by the processor time of this
process and of its busiest worker, one after the other: what a quiet machine with a core for each of them would do.
"Start" is the processor time of both before and beyond the first batch. Pursuit needs `pip install "pettingzoo[sisl]"`.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torchrl.collectors import Collector

from torchrl_marl.collectors import WorkerCollector, multiprocess_collector, ray_collector
from torchrl_marl.envs import make_custom, make_env, make_lbforaging
from torchrl_marl.modules import make_actor

COLLECTORS = (("one process", 0), ("multiprocess", 1), ("multiprocess", 2), ("ray", 1), ("ray", 2))
PURSUIT = "pettingzoo.sisl.pursuit_v5:parallel_env"
TASKS: dict[str, tuple[Callable, int, int]] = {  # make_env, copies, frames of a batch
    "navigation (VMAS)": (partial(make_env, "navigation"), 60, 6_000),
    "Foraging-8x8-2p-2f-v3": (partial(make_lbforaging, "Foraging-8x8-2p-2f-v3"), 16, 1_600),
    "pursuit (PettingZoo)": (partial(make_custom, PURSUIT, state=False, max_steps=500), 16, 800),
}


def processor_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def workers() -> list[int]:
    """Processes of this machine that collect for this one."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "spawn_main" in line or "ray::Worker" in line]


def main(rounds: int, only: str) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    columns = ("task", "collector", "workers", "frames/s", "by processor", "start, s", "bytes of a frame")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for task, (make, copies, frames) in TASKS.items():
        if only not in task:
            continue
        env = make(num_envs=copies, seed=0)
        policy = make_actor(env)
        for name, num_workers in COLLECTORS:
            if name == "ray" and importlib.util.find_spec("ray") is None:
                continue
            before, begun = set(workers()), time.process_time()
            if num_workers:
                engine = multiprocess_collector if name == "multiprocess" else ray_collector
                collector = engine(env, policy, make_env=make, num_workers=num_workers, frames_per_batch=frames)
            else:
                collector = Collector(
                    env, policy, frames_per_batch=frames, total_frames=-1, auto_register_policy_transforms=False
                )
            clock, processor, start, size = measure(collector, begun, before, rounds)
            rates = f"{frames / clock:,.0f} | {frames / processor:,.0f} | {start:.1f}"
            print(f"| {task} | {name} | {num_workers or ''} | {rates} | {size:,.0f} |", flush=True)
            collector.shutdown()


def measure(
    collector: Collector | WorkerCollector, started: float, others_before: set[int], rounds: int
) -> tuple[float, float, float, float]:
    """Median seconds of a batch, on the clock and by processor, those to start, and the bytes of a frame."""
    pids = sorted(set(workers()) - others_before)
    data = iter(collector)
    collector.reset()
    next(data)
    start = time.process_time() - started + max(map(processor_seconds, pids), default=0.0)
    clock, processor, size = [], [], 0.0
    for _ in range(rounds):
        begun, own = time.perf_counter(), time.process_time()
        others = [processor_seconds(pid) for pid in pids]
        batch = next(data)
        clock.append(time.perf_counter() - begun)
        busiest = max((processor_seconds(pid) - start for pid, start in zip(pids, others, strict=True)), default=0.0)
        processor.append(time.process_time() - own + busiest)
        size = batch.bytes() / batch.numel()
    usual = statistics.median(processor)
    return statistics.median(clock), usual, start - usual, size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="part of the names of tasks")
    main(**vars(parser.parse_args()))
