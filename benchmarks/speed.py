"""Training speed of torchrl_marl's MAPPO against TorchRL's script and BenchMARL: one table, see README.md."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from contender import Setting, Timing

HERE = Path(__file__).resolve().parent
NUM_AGENTS = {"navigation": 4, "balance": 3, "simple_spread": 3}  # VMAS's defaults; BenchMARL's own are 3 and 4
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
        """Seconds of an iteration: "collection", "update", "wall" (both) or "cpu"."""
        return statistics.median(
            timing.collection + timing.update if what == "wall" else getattr(timing, what) for timing in self.timings
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torchrl-script", type=Path, help="TorchRL's sota-implementations/multiagent/mappo_ippo.py")
    parser.add_argument("--benchmarl-python", type=Path, help="Python interpreter that has BenchMARL")
    parser.add_argument("--jax-python", type=Path, help="Python interpreter that has JaxMARL; simple_spread alone")
    parser.add_argument("--scenario", nargs="+", choices=NUM_AGENTS, default=["navigation", "balance"])
    parser.add_argument("--recurrent", action="store_true", help="networks with a GRU; JaxMARL and ours alone")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        action="append",
        metavar=("NUM_ENVS", "MINIBATCH_SIZE"),
        help="may be repeated; default 60 1000 and 600 4000",
    )
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--width", nargs="+", type=int, default=[256], help="of the networks' two hidden layers")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=3, help="timed iterations of a process")
    parser.add_argument("--warmup", type=int, default=1, help="iterations before those")
    parser.add_argument("--compiled", action="store_true", help="also ours compiled")
    parser.add_argument("--output", type=Path, help="write every timing to this JSON file")
    return parser.parse_args()


def commands(arguments: argparse.Namespace) -> dict[str, tuple[list[str], list[str]]]:
    """What each contender's command is before and after the number of iterations and the setting."""
    ours, torchrl = ([sys.executable, str(HERE / name)] for name in ("ours.py", "peers_torchrl.py"))
    found: dict[str, tuple[list[str], list[str]]] = {OURS: (ours, [])}
    if arguments.jax_python:
        found[f"{OURS}, compiled"] = (ours, ["compile"])
        found["JAX"] = ([str(arguments.jax_python), str(HERE / "peers_jax.py")], [])
        return found
    if arguments.compiled:
        found[f"{OURS}, compiled"] = (ours, ["compile"])
    if arguments.torchrl_script:
        found["TorchRL's script"] = (torchrl, [str(arguments.torchrl_script.resolve())])
    else:
        print("TorchRL's script: no --torchrl-script, a loop of the same structure instead", file=sys.stderr)
        found["TorchRL, same structure"] = (torchrl, [])
    if arguments.benchmarl_python:
        found["BenchMARL"] = ([str(arguments.benchmarl_python), str(HERE / "peers_benchmarl.py")], [])
    else:
        print("BenchMARL: skipped, no --benchmarl-python", file=sys.stderr)
    return found


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    sizes = arguments.size or [(60, 1000), (600, 4000)]
    for scenario, (num_envs, minibatch_size), width in itertools.product(arguments.scenario, sizes, arguments.width):
        yield Setting(
            scenario=scenario,
            num_agents=NUM_AGENTS[scenario],
            num_envs=num_envs,
            max_steps=arguments.max_steps,
            epochs=arguments.epochs,
            minibatch_size=minibatch_size,
            width=width,
            recurrent=arguments.recurrent,
            threads=arguments.threads,
        )


def race(command: Sequence[str], threads: int) -> dict:
    """Runs one contender in a process of its own and returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in process.stdout.splitlines() if line.startswith("TIMINGS ")]
    if process.returncode or not lines:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{process.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("TIMINGS "))


def measure(arguments: argparse.Namespace) -> Iterator[Run]:
    """All contenders in turn, then the next round, so that a disturbance of the machine meets all alike."""
    contenders = commands(arguments)
    warmup, iterations = arguments.warmup, arguments.iterations
    for setting in settings(arguments):
        for number in range(arguments.rounds):
            for name, (before, after) in contenders.items():
                command = [*before, str(warmup + iterations), json.dumps(asdict(setting)), *after]
                result = race(command, setting.threads)
                timings = [Timing(**timing) for timing in result["timings"]][warmup : warmup + iterations]
                run = Run(name, number, setting, result["versions"], timings)
                print(
                    f"{setting.scenario} {setting.num_envs}, round {number}: {name} {run.median('wall'):.2f} s",
                    file=sys.stderr,
                )
                yield run


def relative_speeds(runs: Mapping[tuple[str, int], Run], name: str, what: str) -> list[float]:
    """Speed relative to ours in each round: below 1 is slower than ours."""
    return [
        runs[OURS, number].median(what) / run.median(what) for (other, number), run in runs.items() if other == name
    ]


def table(runs: Iterable[Run]) -> str:
    rows = [
        "| task, environments, minibatch, width | contender | frames/s | s collection | s update | speed / ours [min, max] | by CPU time |",  # noqa: E501
        "|---|---|---|---|---|---|---|",
    ]
    by_setting: dict[Setting, dict[tuple[str, int], Run]] = {}
    for run in runs:
        by_setting.setdefault(run.setting, {})[run.contender, run.round] = run
    for setting, group in by_setting.items():
        for name in dict.fromkeys(name for name, _ in group):
            own = [run for (other, _), run in group.items() if other == name]
            wall, collection, update = (
                statistics.median(run.median(what) for run in own) for what in ("wall", "collection", "update")
            )
            speeds = relative_speeds(group, name, "wall")
            cpu = statistics.median(relative_speeds(group, name, "cpu"))
            rows.append(
                f"| {setting.scenario}, {setting.num_envs}, {setting.minibatch_size}, {setting.width} | {name} "
                f"| {setting.frames / wall:.0f} | {collection:.2f} | {update:.2f} "
                f"| {statistics.median(speeds):.2f} [{min(speeds):.2f}, {max(speeds):.2f}] | {cpu:.2f} |"
            )
    return "\n".join(rows)


def describe(runs: Sequence[Run], arguments: argparse.Namespace) -> str:
    measured = (
        f"{arguments.rounds} rounds; {arguments.iterations} timed iterations of each process after {arguments.warmup}; "
        f"{arguments.max_steps} steps, {arguments.epochs} epochs, {arguments.threads} thread(s); "
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}."
    )
    return "\n".join([measured, *dict.fromkeys(f"{run.contender}: {run.versions}" for run in runs)])


def main() -> None:
    arguments = parse_arguments()
    runs = list(measure(arguments))
    print(f"{table(runs)}\n\n{describe(runs, arguments)}")
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"command": shlex.join(sys.argv), "runs": [asdict(run) for run in runs]})
        )


if __name__ == "__main__":
    main()
