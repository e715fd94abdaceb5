"""Steps per second of the library's own games: `python benchmarks/environments.py [--threads 2] [--compile]`.

Prints one table. "rules" is `rules.step`, the pure function; "EnvBase.step" adds TorchRL's checks and TensorDict work;
"with resets" is `step_and_maybe_reset`, what a collector calls. Actions are random and drawn before. Each figure is the
median over slices of the time that `--seconds` grants it, so that a disturbance of the machine weighs little. On a
machine that others use, `--clock processor` counts the time that this process had, of all its threads together.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch

from torchrl_marl.envs import TensorEnv, make_aerocombat, make_coordsum, make_maze, make_paxmen

GAMES: dict[str, Callable[..., TensorEnv]] = {
    **{name: make_coordsum for name in ("CoordSum-3x10", "CoordSum-3x30", "CoordSum-5x20", "CoordSum-8x15")},
    **{name: make_maze for name in ("black_red", "black_blue_red")},
    **{name: make_paxmen for name in ("PaxMen-4", "PaxMen-6")},
    **{name: make_aerocombat for name in ("AeroCombat-2v2", "AeroCombat-4v4", "AeroCombat-16v16")},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--game", nargs="+", choices=GAMES, default=list(GAMES))
    parser.add_argument("--num-envs", nargs="+", type=int, default=[64, 1024, 4096, 16384])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time of each figure")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--compile", action="store_true", help="also the compiled rules")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def steps_per_second(play: Callable[[], None], num_envs: int, arguments: argparse.Namespace) -> float:
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time

    def timed(repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            play()
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        return (clock() - start) / repeats

    timed(3)
    repeats = max(1, round(0.05 * arguments.seconds / timed(3)))
    end, timings = time.perf_counter() + arguments.seconds, []
    while time.perf_counter() < end:
        timings.append(timed(repeats))
    return num_envs / statistics.median(timings)


def measure(name: str, num_envs: int, arguments: argparse.Namespace) -> dict[str, float]:
    env = GAMES[name](name, num_envs=num_envs, seed=0, device=arguments.device)
    actions = [env.full_action_spec.rand() for _ in range(16)]
    data, state, count = env.reset(), env.state, 0

    def next_action() -> torch.Tensor:
        nonlocal count
        count += 1
        return actions[count % 16]["agents", "action"]

    def rules(step: Callable) -> Callable[[], None]:
        def play() -> None:
            nonlocal state
            state = step(state, next_action())[0]

        return play

    def step() -> None:
        data["agents", "action"] = next_action()
        env.step(data)

    def step_and_reset() -> None:
        nonlocal data
        data["agents", "action"] = next_action()
        data = env.step_and_maybe_reset(data)[1]

    players = {"rules": rules(env.rules.step)}
    if arguments.compile:
        torch.compiler.reset()
        players["rules, compiled"] = rules(torch.compile(env.rules.step, fullgraph=True))
    players |= {"EnvBase.step": step, "with resets": step_and_reset}
    return {what: steps_per_second(play, num_envs, arguments) for what, play in players.items()}


@torch.no_grad()
def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"Million environment steps per second of {arguments.clock} time (in brackets: agent steps). "
        f"Torch {torch.__version__} on {arguments.device}, {arguments.threads} thread(s), "
        f"{os.cpu_count()} cores, {platform.machine()}, load {load}.\n"
    )
    heading = None
    for name in arguments.game:
        for num_envs in arguments.num_envs:
            speeds = measure(name, num_envs, arguments)
            if heading is None:
                heading = f"| game | environments | {' | '.join(speeds)} |"
                print(heading, "|---" * heading.count("|", 1) + "|", sep="\n")
            num_agents = GAMES[name](name, num_envs=1).rules.num_agents
            cells = [f"{speed / 1e6:.2f} ({num_agents * speed / 1e6:.2f})" for speed in speeds.values()]
            print(f"| {name} | {num_envs} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
