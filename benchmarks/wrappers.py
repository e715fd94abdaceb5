"""Overhead of the wrappers of JAX over the raw packages: `python benchmarks/wrappers.py [--num-envs 1024]`.

The raw package takes its own compiled, vmapped step with its own automatic reset, on the same actions; the wrapper
takes `step_and_maybe_reset`, what a collector calls. The two take turns, a block of steps each, and the figures are
medians over the rounds, in processor time of all threads of this process, so that what else the machine does weighs
little.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import torch
from jax import numpy as jnp
from torchrl.envs import EnvBase

from torchrl_marl.envs import make_jaxmarl, make_jumanji

BLOCK = 26  # steps: an episode of MPE and, to count many resets, of all others but battles, which end by themselves
SCENARIOS = [
    *("smax-2s3z", "smax-3m", "simple_spread_3ag", "simple_spread_10ag"),
    *("con-5x5x3a", "con-10x10x10a", "lbf-2s-8x8-2p-2f-coop", "lbf-15x15-4p-5f", "rware-tiny-4ag", "sar-2a"),
]


def raw_jumanji(scenario: str, limit: int) -> tuple[Callable, Callable]:
    from jumanji.environments import Connector, LevelBasedForaging, RobotWarehouse, SearchAndRescue
    from jumanji.environments.routing.connector.generator import RandomWalkGenerator
    from jumanji.environments.routing.lbf.generator import RandomGenerator as Field
    from jumanji.environments.routing.robot_warehouse.generator import RandomGenerator as Floor
    from jumanji.environments.swarms.search_and_rescue.generator import RandomGenerator as Area
    from jumanji.wrappers import AutoResetWrapper

    build = {
        "con-5x5x3a": lambda: Connector(RandomWalkGenerator(5, 3), time_limit=limit),
        "con-10x10x10a": lambda: Connector(RandomWalkGenerator(10, 10), time_limit=limit),
        "lbf-2s-8x8-2p-2f-coop": lambda: LevelBasedForaging(
            Field(8, 2, 2, fov=2, max_agent_level=2, force_coop=True), time_limit=limit
        ),
        "lbf-15x15-4p-5f": lambda: LevelBasedForaging(Field(15, 4, 5, fov=15, max_agent_level=2), time_limit=limit),
        "rware-tiny-4ag": lambda: RobotWarehouse(Floor(1, 3, 8, 4, 1, 4), time_limit=limit),
        "sar-2a": lambda: SearchAndRescue(generator=Area(2, 40), time_limit=limit),
    }
    env = AutoResetWrapper(build[scenario]())
    return env.reset, lambda key, state, action: env.step(state, action)


def raw_jaxmarl(scenario: str, limit: int) -> tuple[Callable, Callable]:
    import jaxmarl
    from jaxmarl.environments.smax import map_name_to_scenario

    if scenario.startswith("smax-"):
        options = {"see_enemy_actions": True, "walls_cause_death": True, "attack_mode": "closest", "max_steps": limit}
        battle = map_name_to_scenario(scenario.removeprefix("smax-"))
        env = jaxmarl.make("HeuristicEnemySMAX", scenario=battle, **options)
    else:
        number = int(scenario.removeprefix("simple_spread_").removesuffix("ag"))
        options = {"num_agents": number, "num_landmarks": number, "action_type": "Continuous", "max_steps": limit - 1}
        env = jaxmarl.make("MPE_simple_spread_v3", **options)

    def step(key: Any, state: Any, action: Any) -> Any:
        observation, state, reward, done, _ = env.step(key, state, dict(zip(env.agents, action, strict=True)))
        return state, (observation, reward, done, env.get_avail_actions(state) if "smax" in scenario else ())

    def reset(key: Any) -> Any:
        return env.reset(key)[::-1]

    return reset, step


def raw_player(scenario: str, limit: int, actions: list[torch.Tensor]) -> Callable[[], None]:
    jaxmarl = scenario.startswith(("smax", "simple"))
    reset, step = (raw_jaxmarl if jaxmarl else raw_jumanji)(scenario, limit)
    num_envs = len(actions[0])

    def step_all(key: Any, state: Any, action: Any) -> Any:
        key, own = jax.random.split(key)
        return key, *jax.vmap(step)(jax.random.split(own, num_envs), state, action)

    drawn = [jnp.from_dlpack((a if a.is_floating_point() else a.int()).contiguous()) for a in actions]
    play_all = jax.jit(step_all)
    state, _ = jax.jit(jax.vmap(reset))(jax.random.split(jax.random.PRNGKey(0), num_envs))
    key, count = jax.random.PRNGKey(1), 0

    def play() -> None:
        nonlocal key, state, count
        count += 1
        key, state, seen = play_all(key, state, drawn[count % len(drawn)])
        jax.block_until_ready(seen)

    return play


def wrapper_player(env: EnvBase, actions: list[torch.Tensor]) -> Callable[[], None]:
    data, count = env.reset(), 0

    def play() -> None:
        nonlocal data, count
        count += 1
        data["agents", "action"] = actions[count % len(actions)]
        data = env.step_and_maybe_reset(data)[1]

    return play


def seconds(play: Callable[[], None], steps: int) -> float:
    start = time.process_time()
    for _ in range(steps):
        play()
    return (time.process_time() - start) / steps


def measure(scenario: str, num_envs: int, budget: float) -> tuple[float, float, float]:
    """Seconds of a raw step and of the wrapper's, and the overhead."""
    limit = 100 if scenario.startswith("smax") else BLOCK
    make = make_jaxmarl if scenario.startswith(("smax", "simple")) else make_jumanji
    env = make(scenario, num_envs=num_envs, max_steps=limit, seed=0)
    actions = [env.full_action_spec.rand()["agents", "action"] for _ in range(16)]
    players = raw_player(scenario, limit, actions), wrapper_player(env, actions)
    for play in players:
        seconds(play, 2 * BLOCK)  # compiles, and spreads the ends of episodes
    end, rounds = time.perf_counter() + budget, []
    while time.perf_counter() < end or len(rounds) < 3:
        rounds.append([seconds(play, BLOCK) for play in players])
    raw, wrapper = (statistics.median(times) for times in zip(*rounds, strict=True))
    return raw, wrapper, statistics.median(own / other for other, own in rounds) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", default=SCENARIOS)
    parser.add_argument("--num-envs", nargs="+", type=int, default=[1024])
    parser.add_argument("--seconds", type=float, default=10, help="measuring time of each row, at least three rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"Processor time. Torch {torch.__version__}, JAX {jax.__version__} on {jax.default_backend()}, "
        f"{os.cpu_count()} cores, {platform.machine()}, load {load}.\n\n"
        "| task | environments | raw, ms a step | wrapper, ms a step | overhead |\n|---|---|---|---|---|"
    )
    for scenario in arguments.scenario:
        for num_envs in arguments.num_envs:
            raw, wrapper, overhead = measure(scenario, num_envs, arguments.seconds)
            row = f"{1e3 * raw:.2f} | {1e3 * wrapper:.2f} | {100 * overhead:+.0f} %"
            print(f"| {scenario} | {num_envs} | {row} |", flush=True)


if __name__ == "__main__":
    main()
