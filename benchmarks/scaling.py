"""Cost against work: `python benchmarks/scaling.py --output benchmarks/results/scaling`.

Times whole iterations of training (ours.py) while one of environments, agents and width grows and the others stay at
their base, each point in a process of its own, and writes OUTPUT.json, OUTPUT.png and a table. An iteration has ten
steps and one epoch of eight minibatches. Processor time, so that other jobs on the machine matter less. Memory: bytes
of a batch, and the process's peak above what it took before it built anything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from contender import Setting, Stopwatch
from matplotlib.figure import Figure
from ours import run
from speed import race
from tensordict import TensorDictBase

STEPS = 10
GROWS = {
    "num_envs": [16, 64, 256, 1024, 4096, 16384, 65536],
    "num_agents": [2, 4, 8, 16, 32, 64],
    "width": [32, 64, 128, 256, 512],
}
LABELS = {"num_envs": "environments", "num_agents": "agents", "width": "width of layers"}
BASE = {"num_envs": 1024, "num_agents": 4, "width": 64}


@dataclass
class Point:
    """Cost of one iteration at one amount of work: seconds of processor time, bytes."""

    scenario: str
    grows: str
    value: int
    compiled: bool
    frames: int
    collection: float
    update: float
    bytes_per_frame: float
    peak_bytes: int

    @property
    def microseconds(self) -> float:
        """Of one frame: one step of one environment with all its agents."""
        return 1e6 * (self.collection + self.update) / self.frames


class Scale(Stopwatch):
    """A stopwatch that also weighs the batch."""

    bytes_per_frame = 0.0

    def watch(self, batches: Iterable[TensorDictBase]) -> Iterator[TensorDictBase]:
        for batch in super().watch(batches):
            self.bytes_per_frame = batch.bytes() / batch.numel()
            yield batch


def measure(scenario: str, grows: str, value: int, *, compiled: bool, iterations: int) -> Point:
    """Run in this process."""
    work = {**BASE, grows: value}
    frames = STEPS * work["num_envs"]
    setting = Setting(scenario=scenario, max_steps=STEPS, epochs=1, minibatch_size=frames // 8, lr=1e-3, **work)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    scale = Scale()
    timings = run(1 + iterations, setting, compiled=compiled, stopwatch=scale)[1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    share = statistics.median(timing.collection / (timing.collection + timing.update) for timing in timings)
    cpu = statistics.median(timing.cpu for timing in timings)
    return Point(scenario, grows, value, compiled, frames, share * cpu, (1 - share) * cpu, scale.bytes_per_frame, peak)


def table(points: Sequence[Point]) -> str:
    rows = [
        "| task | grows | to | frames | s collection | s update | µs/frame | kB/frame, batch | MB, peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        name = f"{point.scenario}, compiled" if point.compiled else point.scenario
        cells = [name, LABELS[point.grows], f"{point.value:,}", f"{point.frames:,}"]
        cells += [f"{point.collection:.3g}", f"{point.update:.3g}", f"{point.microseconds:.3g}"]
        cells += [f"{point.bytes_per_frame / 1e3:.2f}", f"{point.peak_bytes / 1e6:.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(points: Sequence[Point]) -> Figure:
    """Cost of a frame over work: a line that falls or is level means linear cost or better."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(GROWS))
    for axes, grows in zip(panels, GROWS, strict=True):
        own = [point for point in points if point.grows == grows]
        for (scenario, compiled), line in itertools.groupby(own, lambda point: (point.scenario, point.compiled)):
            line = list(line)
            name, style = (f"{scenario}, compiled", "--") if compiled else (scenario, "-")
            color = {"navigation": "#0072b2", "CoordSum": "#d55e00"}[scenario]
            values = [point.microseconds for point in line]
            axes.plot([point.value for point in line], values, style, marker="o", ms=3, label=name, color=color)
        axes.set(xlabel=LABELS[grows], yscale="log")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("processor time of a frame (µs)")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", default=["navigation", "CoordSum"])
    parser.add_argument("--grows", nargs="+", choices=GROWS, default=list(GROWS))
    parser.add_argument("--iterations", type=int, default=3, help="timed after one that is not")
    parser.add_argument("--compiled", action="store_true", help="compiled beside uncompiled")
    parser.add_argument("--output", type=Path, help="without ending")
    parser.add_argument("--point", help=argparse.SUPPRESS)  # what a process of this script measures
    arguments = parser.parse_args()
    if arguments.point:
        print("TIMINGS " + json.dumps(asdict(measure(**json.loads(arguments.point)))))
        return
    points, threads = [], Setting().threads
    modes = [False, True] if arguments.compiled else [False]
    for scenario, grows, compiled in itertools.product(arguments.scenario, arguments.grows, modes):
        for value in GROWS[grows]:
            what = {"scenario": scenario, "grows": grows, "value": value, "compiled": compiled}
            words = json.dumps({**what, "iterations": arguments.iterations})
            try:
                points.append(Point(**race([sys.executable, __file__, "--point", words], threads)))
            except RuntimeError as error:
                print(error, file=sys.stderr)
                continue
            print(points[-1], file=sys.stderr, flush=True)
    machine = f"Torch {torch.__version__}, {threads} thread, {os.cpu_count()} cores, {platform.machine()}"
    print(f"{table(points)}\n\n{machine}, load {os.getloadavg()[0]:.1f}.")
    if arguments.output:
        record = {"machine": machine, "base": BASE, "steps": STEPS, "points": [asdict(point) for point in points]}
        arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=1))
        draw(points).savefig(arguments.output.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
