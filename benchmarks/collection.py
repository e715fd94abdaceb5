"""Frames per second of collecting with a policy: `python benchmarks/collection.py [--game PaxMen-4] [--num-envs 64]`.

Prints one table: TorchRL's `Collector`, `CompiledCollector` uncompiled and compiled, and, where JAX is installed, plain
JAX (`jax_coordsum.py`, and JaxMARL's simple_spread beside VMAS's). All play episodes of 100 steps with the same MLP of
two hidden layers, and write the same entries. Contenders take turns, one batch each, so that other load on the machine
meets all alike; figures are medians over rounds, in processor time of all threads of this process, and ratios are
divided within each round. Compilation is not counted, and neither is the first batch.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from torchrl_marl.collectors import CompiledCollector
from torchrl_marl.envs import make_aerocombat, make_coordsum, make_env, make_maze, make_paxmen
from torchrl_marl.modules import make_actor

GAMES: dict[str, Callable[..., EnvBase]] = {
    "CoordSum-3x10": make_coordsum,
    "black_red": make_maze,
    "PaxMen-4": make_paxmen,
    "AeroCombat-2v2": make_aerocombat,
    "simple_spread": make_env,
}
Contender = Callable[[], object]
BASIS = "TorchRL's Collector"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--game", nargs="+", choices=GAMES, default=list(GAMES))
    parser.add_argument("--num-envs", nargs="+", type=int, default=[64, 1024, 4096])
    parser.add_argument("--hidden-size", type=int, default=64, help="of both hidden layers")
    parser.add_argument("--num-steps", type=int, default=100, help="of a batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def torch_contenders(game: str, num_envs: int, arguments: argparse.Namespace) -> Iterator[tuple[str, Contender]]:
    def build() -> tuple[EnvBase, torch.nn.Module]:
        env = GAMES[game](game, num_envs=num_envs, max_steps=100, seed=0)
        return env, make_actor(env, hidden_sizes=[arguments.hidden_size] * 2)

    frames = num_envs * arguments.num_steps
    options = {"total_frames": -1, "auto_register_policy_transforms": False}
    yield BASIS, iter(Collector(*build(), frames_per_batch=frames, **options)).__next__
    for name, compile in (("uncompiled", False), ("compiled", True)):
        collector = CompiledCollector(*build(), frames_per_batch=frames, compile=compile)
        yield f"CompiledCollector, {name}", iter(collector).__next__


def jax_coordsum(num_envs: int, arguments: argparse.Namespace) -> Contender:
    import jax
    from jax_coordsum import CoordSum, make_collect, make_layers

    game, key = CoordSum(num_envs), jax.random.key(0)
    layers = make_layers(key, (2 + game.num_agents, *[arguments.hidden_size] * 2, game.num_actions))
    collect, state = make_collect(game, arguments.num_steps), game.reset(key)

    def play() -> None:
        nonlocal state, key
        key, own = jax.random.split(key)
        state, _ = jax.block_until_ready(collect(layers, state, own))

    return play


def jaxmarl_simple_spread(num_envs: int, arguments: argparse.Namespace) -> Contender:
    import jax
    import jaxmarl
    from jax import numpy as jnp
    from jax_coordsum import logits_of, make_layers

    env = jaxmarl.make("MPE_simple_spread_v3", max_steps=99)  # discrete actions; ends after max_steps + 1
    key = jax.random.key(0)
    layers = make_layers(key, (18 + 3, *[arguments.hidden_size] * 2, 5))

    def seen(observation: dict) -> jax.Array:
        return jnp.stack([observation[agent] for agent in env.agents], 1)

    def step(carried: tuple, key: jax.Array) -> tuple[tuple, tuple]:
        observation, state = carried
        act_key, step_key = jax.random.split(key)
        logits = logits_of(layers, seen(observation))
        action = jax.random.categorical(act_key, logits)
        log_prob = jnp.take_along_axis(logits, action[..., None], -1)
        actions = dict(zip(env.agents, action.T, strict=True))
        after, state, reward, done, _ = jax.vmap(env.step)(jax.random.split(step_key, num_envs), state, actions)
        return (after, state), (seen(observation), logits, action, log_prob, seen(after), reward, done)

    @jax.jit
    def collect(carried: tuple, key: jax.Array) -> tuple:
        return jax.lax.scan(step, carried, jax.random.split(key, arguments.num_steps))

    carried = jax.vmap(env.reset)(jax.random.split(key, num_envs))

    def play() -> None:
        nonlocal carried, key
        key, own = jax.random.split(key)
        carried, _ = jax.block_until_ready(collect(carried, own))

    return play


def contenders(game: str, num_envs: int, arguments: argparse.Namespace) -> Iterator[tuple[str, Contender]]:
    yield from torch_contenders(game, num_envs, arguments)
    if game == "CoordSum-3x10" and importlib.util.find_spec("jax"):
        yield "plain JAX", jax_coordsum(num_envs, arguments)
    if game == "simple_spread" and importlib.util.find_spec("jaxmarl"):
        yield "JaxMARL", jaxmarl_simple_spread(num_envs, arguments)


def seconds(play: Contender) -> float:
    start = time.process_time()
    play()
    return time.process_time() - start


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    flags = f"--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads={arguments.threads}"
    os.environ["XLA_FLAGS"] = flags if arguments.threads == 1 else ""
    print(
        f"Torch {torch.__version__}, {arguments.threads} thread(s), {os.cpu_count()} cores, {platform.machine()}, load "
        f"{os.getloadavg()[0]:.1f}; {arguments.rounds} rounds of {arguments.num_steps} steps, hidden layers of "
        f"{arguments.hidden_size}.\n"
    )
    print("| game | environments | contender | 1000 frames/s | speed [min, max] |", "|---" * 5 + "|", sep="\n")
    for game in arguments.game:
        for num_envs in arguments.num_envs:
            torch.compiler.reset()
            players = dict(contenders(game, num_envs, arguments))
            for play in players.values():
                play()
            rounds = [{name: seconds(play) for name, play in players.items()} for _ in range(arguments.rounds)]
            for name in players:
                speed = num_envs * arguments.num_steps / statistics.median(taken[name] for taken in rounds) / 1000
                ratios = [taken[BASIS] / taken[name] for taken in rounds]
                spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
                print(f"| {game} | {num_envs} | {name} | {speed:.0f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
