"""Iterations of methods whose agents update in turn, beside another checkout's: `python benchmarks/turns.py OLD`.

Navigation, 60 environments x 100 steps, minibatches of 1,000, 5 epochs, networks of 256 x 256 (SEAC: 5 steps, one
minibatch). OLD is a folder with another commit, such as 65bde0a, which runs uncompiled; this one runs compiled. Both
wait in processes of their own and take an iteration each in turn, so that other load on the machine meets both alike.
Seconds are processor time of one thread, medians of the iterations; ratios are those of iterations that follow one
another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchrl.collectors import Collector
from torchrl.modules import PopArtValueNorm

METHODS = ("HAPPO", "OAPPO", "SEAC", "HATRPO", "OATRPO")


def old_loop(loss: Any, optimizer: torch.optim.Optimizer) -> Callable[[Any, int, int], None]:
    """The loops of recipes/oappo_vmas.py and recipes/mars_vmas.py before the single loop."""
    from torchrl_marl.collectors import minibatches
    from torchrl_marl.objectives import NaturalGradientLoss, standardize

    def learn(batch: Any, size: int, epochs: int) -> None:
        with torch.no_grad():
            loss.value_estimator(batch)
            loss.update_value_norm(batch)
            batch["advantage"] = standardize(batch["advantage"], None)
        rows = batch.select(*loss.in_keys, strict=False).reshape(-1)
        for turn in loss.turns(rows) if hasattr(loss, "turns") else [None]:
            if isinstance(loss, NaturalGradientLoss) and turn != "critic":
                loss.step(rows)
                continue
            for _ in range(epochs):
                for minibatch in minibatches(rows, size):
                    losses = loss(minibatch)
                    sum(losses[key] for key in losses.keys() if key.startswith("loss_")).backward()
                    torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()

    return learn


def loop(loss: Any, optimizer: torch.optim.Optimizer) -> Callable[[Any, int, int], None]:
    """The loop of this commit's recipes, compiled."""
    from torchrl_marl.run import make_update

    update = make_update(loss, optimizer, max_grad_norm=0.5, compile=True)

    def learn(batch: Any, size: int, epochs: int) -> None:
        loss.prepare(batch)
        for phase in loss.phases(batch):
            for minibatch in phase.minibatches(size, epochs=epochs):
                update(minibatch)

    return learn


def serve(method: str, compiled: bool) -> None:
    """Take an iteration for each line of the input; print its seconds of collection and of learning."""
    from torchrl_marl import objectives
    from torchrl_marl.collectors import CompiledCollector
    from torchrl_marl.envs import make_env
    from torchrl_marl.modules import make_actor, make_critic

    torch.set_num_threads(1)
    torch.manual_seed(0)
    env = make_env("navigation", num_envs=60, seed=0)
    own: dict[str, Any] = {"observes": "observation", "share_parameters": False} if method == "SEAC" else {}
    actor = make_actor(env, share_parameters=False)
    critic = make_critic(env, value_norm=PopArtValueNorm(shape=1), **own)
    loss = getattr(objectives, f"{method}Loss")(actor, critic, normalize_advantage=False, functional=False)
    loss.make_value_estimator(gamma=0.99, lmbda=1.0 if own else 0.95)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3, eps=1e-5, fused=True)
    learn = (loop if compiled else old_loop)(loss, optimizer)
    frames, size, epochs = (300, 300, 1) if own else (6_000, 1_000, 5)
    options: dict[str, Any] = {"total_frames": -1, "auto_register_policy_transforms": False}
    kind, options = (CompiledCollector, {}) if compiled else (Collector, options)
    data = iter(kind(env, actor, frames_per_batch=frames, **options))
    for _ in sys.stdin:
        start = time.process_time()
        batch = next(data)
        collected = time.process_time()
        learn(batch, size, epochs)
        print(json.dumps([collected - start, time.process_time() - collected]), flush=True)


def compare(old: Path, method: str, warmup: int, rounds: int) -> str:
    """A row of the table."""
    servers = []
    for checkout, name in ((old, "old"), (Path(__file__).parents[1], "new")):
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(old), "--serve", method, name]
        servers.append(
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    times: list[list[list[float]]] = [[], []]
    for number in range(warmup + rounds):
        for server, own in zip(servers, times, strict=True):
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write("\n")
            server.stdin.flush()
            seconds = json.loads(server.stdout.readline())
            if number >= warmup:
                own.append(seconds)
    for server in servers:
        server.communicate()
    ratios = [sum(before) / sum(after) for before, after in zip(*times, strict=True)]
    frames = 300 if method == "SEAC" else 6_000
    cells = [method]
    for own in (times[1], times[0]):
        parts = [statistics.median(part) for part in zip(*own, strict=True)]
        total = statistics.median(map(sum, own))
        cells += [*(f"{part:.3f}" for part in parts), f"{frames / total:.0f}"]
    cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--warmup", type=int, default=2, help="iterations before those that count; SEAC needs 30")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], arguments.serve[1] == "new")
        return
    print("| method | collection | learning | frames/s | old: collection | learning | frames/s | times as fast |")
    print("|---|---|---|---|---|---|---|---|")
    for method in arguments.methods:
        print(compare(arguments.old.resolve(), method, arguments.warmup, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
