"""Training speed of torchrl_marl's MAPPO against TorchRL's script and BenchMARL: one table, see README.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from contender import Setting, Timing

HERE = Path(__file__).resolve().parent
NUM_AGENTS = {"navigation": 4, "balance": 3}  # VMAS's defaults; BenchMARL's own would be 3 and 4
OURS = "torchrl_marl"


@dataclass
class Run:
    """One contender's process in one round."""

    contender: str
    round: int
    setting: Setting
    versions: str
    timings: list[Timing]

    def median(self, what: str) -> float:
        return statistics.median(seconds(timing, what) for timing in self.timings)


def seconds(timing: Timing, what: str) -> float:
    return timing.collection + timing.update if what == "wall" else getattr(timing, what)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torchrl-script", type=Path, help="TorchRL's sota-implementations/multiagent/mappo_ippo.py")
    parser.add_argument("--benchmarl-python", type=Path, help="Python interpreter that has BenchMARL 1.5.2")
    parser.add_argument("--scenario", nargs="+", choices=NUM_AGENTS, default=list(NUM_AGENTS))
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        action="append",
        metavar=("NUM_ENVS", "MINIBATCH_SIZE"),
        help="may be repeated; default 60 1000 and 600 4000",
    )
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=3, help="timed iterations of a process")
    parser.add_argument("--warmup", type=int, default=1, help="iterations before those")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write every timing to this JSON file")
    return parser.parse_args()


def commands(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Command of each contender, without iterations, setting and what comes after them."""
    found = {OURS: [sys.executable, str(HERE / "ours.py")]}
    if arguments.torchrl_script:
        found["TorchRL's script"] = [sys.executable, str(HERE / "peers_torchrl.py")]
    else:
        print("TorchRL's script: skipped, no --torchrl-script", file=sys.stderr)
    found["TorchRL, same structure"] = [sys.executable, str(HERE / "peers_torchrl.py")]
    if arguments.benchmarl_python:
        found["BenchMARL"] = [str(arguments.benchmarl_python), str(HERE / "peers_benchmarl.py")]
    else:
        print("BenchMARL: skipped, no --benchmarl-python", file=sys.stderr)
    return found


def race(command: Sequence[str], setting: Setting, warmup: int, iterations: int) -> tuple[str, list[Timing]]:
    """Runs one contender in a process of its own and returns its versions and timings after the warm-up."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(setting.threads))
    script, *rest = command[1:]
    process = subprocess.run(
        [command[0], script, str(warmup + iterations), json.dumps(asdict(setting)), *rest],
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("TIMINGS ")]
    if process.returncode or not lines:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{process.stderr[-3000:]}")
    result = json.loads(lines[-1].removeprefix("TIMINGS "))
    timings = [Timing(**timing) for timing in result["timings"]]
    return result["versions"], timings[warmup : warmup + iterations]


def measure(arguments: argparse.Namespace) -> Iterable[Run]:
    """Every contender in turn, then the next round, so that all see the same disturbances of the machine."""
    contenders = commands(arguments)
    if arguments.torchrl_script:
        contenders["TorchRL's script"].append(str(arguments.torchrl_script.resolve()))
    for scenario in arguments.scenario:
        for num_envs, minibatch_size in arguments.size or [(60, 1000), (600, 4000)]:
            setting = Setting(
                scenario=scenario,
                num_agents=NUM_AGENTS[scenario],
                num_envs=num_envs,
                max_steps=arguments.max_steps,
                epochs=arguments.epochs,
                minibatch_size=minibatch_size,
                threads=arguments.threads,
            )
            for number in range(arguments.rounds):
                for name, command in contenders.items():
                    versions, timings = race(command, setting, arguments.warmup, arguments.iterations)
                    run = Run(name, number, setting, versions, timings)
                    print(
                        f"{setting.scenario} {num_envs} round {number}: {name} {run.median('wall'):.2f} s",
                        flush=True,
                        file=sys.stderr,
                    )
                    yield run


def ratios(runs: Mapping[tuple[str, int], Run], name: str, what: str) -> list[float]:
    """Speed relative to ours in each round: below 1 is slower than ours."""
    return [
        runs[OURS, number].median(what) / run.median(what) for (other, number), run in runs.items() if other == name
    ]


def table(runs: Iterable[Run]) -> str:
    rows = [
        "| task, environments, minibatch | contender | frames/s | s collection | s update | speed to ours [min, max] | by CPU time |",
        "|---|---|---|---|---|---|---|",
    ]
    settings: dict[Setting, dict[tuple[str, int], Run]] = {}
    for run in runs:
        settings.setdefault(run.setting, {})[run.contender, run.round] = run
    for setting, group in settings.items():
        for name in dict.fromkeys(name for name, _ in group):
            own = [run for (other, _), run in group.items() if other == name]
            middle = {
                what: statistics.median(run.median(what) for run in own) for what in ("wall", "collection", "update")
            }
            wall, cpu = ratios(group, name, "wall"), ratios(group, name, "cpu")
            rows.append(
                f"| {setting.scenario}, {setting.num_envs}, {setting.minibatch_size} | {name} "
                f"| {setting.frames / middle['wall']:.0f} | {middle['collection']:.2f} | {middle['update']:.2f} "
                f"| {statistics.median(wall):.2f} [{min(wall):.2f}, {max(wall):.2f}] | {statistics.median(cpu):.2f} |"
            )
    return "\n".join(rows)


def describe(runs: Sequence[Run], arguments: argparse.Namespace) -> str:
    versions = dict.fromkeys(f"{run.contender}: {run.versions}" for run in runs)
    return "\n".join(
        [
            f"{arguments.rounds} rounds, {arguments.iterations} timed iterations each after {arguments.warmup} of warm-up; "
            f"{arguments.max_steps} steps, {arguments.epochs} epochs, {arguments.threads} thread(s), "
            f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            *versions,
        ]
    )


def main() -> None:
    arguments = parse_arguments()
    runs = list(measure(arguments))
    print(table(runs))
    print()
    print(describe(runs, arguments))
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"command": shlex.join(sys.argv), "runs": [asdict(run) for run in runs]})
        )


if __name__ == "__main__":
    main()
