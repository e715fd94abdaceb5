"""Where the time of a training iteration goes: `python benchmarks/iteration.py [--case CASE ...]`.

Prints a table, one row for each case: seconds of processor time (all threads of this process) of each part of one
iteration, after one that is not counted, with the settings of the recipes' configurations. Beside it the physical
floor: the networks' floating-point operations at the rate of a large matrix product, and the bytes that must move (the
batch written once, minibatches read and written once an epoch, parameters and Adam's moments once an update) at the
rate of a large copy, both measured in the same run.
"""

import argparse
import logging
import math
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers import SamplerWithoutReplacement
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.modules import PopArtValueNorm
from torchrl.objectives.value import MultiAgentGAE

from torchrl_marl.collectors import SequenceCollector, sequence_minibatches
from torchrl_marl.envs import TensorEnv, make_coordsum, make_env, make_paxmen
from torchrl_marl.modules import (
    collection_policy,
    make_actor,
    make_critic,
    make_recurrent_actor,
    make_sable,
    with_recurrent_state,
)
from torchrl_marl.objectives import MAGPOLoss, MARSLoss, standardize

PARTS = ["simulator", "policy", "collector", "advantages", "minibatches", "loss", "backward", "optimiser"]
FLOORS = ["operations of collection", "operations of the update", "bytes of collection", "bytes of the update"]


@dataclass
class Profile:
    """What one iteration took, by part, and what it had to do."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    operations: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    frames: int = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def collect(self, collector: Iterator[TensorDictBase]) -> TensorDictBase:
        start = time.process_time()
        batch = next(collector)
        inner = self.seconds["simulator"] + self.seconds["policy"]
        self.seconds["collector"] = time.process_time() - start - inner
        self.frames, self.bytes["collection"] = batch.numel(), batch.bytes()
        return batch

    def update(self, loss: nn.Module, minibatch: TensorDictBase, optimizer: torch.optim.Optimizer) -> None:
        with self.part("loss"):
            losses = loss(minibatch)
            total = sum(value for name, value in losses.items() if name.startswith("loss_"))
        with self.part("backward"):
            total.backward()
        with self.part("optimiser"):
            torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        size = sum(parameter.numel() * 4 for parameter in loss.parameters())
        self.bytes["update"] += 2 * minibatch.bytes() + 7 * size  # read: parameter, gradient, two moments


def instrument(profile: Profile, env: EnvBase, policy: nn.Module) -> None:
    """Time the simulator's own functions below TorchRL's environment, and the policy."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    ours = isinstance(env, TensorEnv)
    owner = env.rules if ours else env.reset_at.__self__  # VMAS's own environment
    for name in ("step", "restart") if ours else ("step", "reset_at"):
        setattr(owner, name, profile.timed("simulator", getattr(owner, name)))
    policy.forward = profile.timed("policy", policy.forward)


def count_operations(profile: Profile, policy: nn.Module, loss: nn.Module, batch: TensorDictBase, updates: int) -> None:
    """Matrix products of one step and of one update, times how often they happen."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        policy(batch[:, 0].exclude("next").copy())
    profile.operations["collection"] = counter.get_total_flops() * batch.shape[1]
    with FlopCounterMode(display=False) as counter:
        losses = loss(batch.select(*loss.in_keys, strict=False)[:1])
        sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
    profile.operations["update"] = counter.get_total_flops() * len(batch) * updates
    loss.zero_grad()


def mars(env: EnvBase, minibatch_size: int, *, epochs: int = 5) -> Profile:
    """`recipes/mars_vmas.py` with its configuration's values, batches of 100 steps."""
    profile = Profile()
    actor, critic = make_actor(env), make_critic(env, value_norm=PopArtValueNorm(shape=1))
    loss = MARSLoss(actor, critic, target_ratios=(0.5, 2.0), normalize_advantage=False, functional=False)
    loss.make_value_estimator(gamma=0.99, lmbda=0.95)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    frames = 100 * env.batch_size.numel()
    options = {"total_frames": -1, "auto_register_policy_transforms": False}
    collector = iter(Collector(env, actor, frames_per_batch=frames, **options))
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(frames), sampler=SamplerWithoutReplacement(), batch_size=minibatch_size
    )

    def iterate(profile: Profile, epochs: int) -> TensorDictBase:
        batch = profile.collect(collector)
        with profile.part("advantages"), torch.no_grad():
            loss.value_estimator(batch)
            loss.update_value_norm(batch)
            batch["advantage"] = standardize(batch["advantage"])
        with profile.part("minibatches"):
            buffer.empty()
            buffer.extend(batch.reshape(-1).select(*loss.in_keys, strict=False))
        for _ in range(epochs):
            minibatches = iter(buffer)
            for _ in range(math.ceil(frames / minibatch_size)):
                with profile.part("minibatches"):
                    minibatch = next(minibatches)
                profile.update(loss, minibatch, optimizer)
        return batch

    count_operations(profile, actor, loss, iterate(Profile(), 1), epochs)
    instrument(profile, env, actor)
    iterate(profile, epochs)
    return profile


def magpo(*, epochs: int = 4, minibatch_size: int = 512) -> Profile:
    """`experiment=magpo_coordsum`, light: 16 environments, 2 048 frames, Sable guides learners with a GRU."""
    profile = Profile()
    env = make_coordsum(num_envs=16, seed=0)
    (guider, critic), learner = make_sable(env, embed_dim=32), make_recurrent_actor(env)
    loss = MAGPOLoss(guider, critic, learner, normalize_advantage=False, functional=False)
    loss.make_value_estimator(MultiAgentGAE(gamma=0.99, lmbda=0.95, value_network=None))
    optimizer = torch.optim.Adam(loss.parameters(), lr=5e-4)
    policy = collection_policy(guider, learner)
    env, memory = with_recurrent_state(env, policy), guider.memory_keys
    collector = SequenceCollector(env, policy, frames_per_batch=2048)
    data = iter(collector)

    def iterate(profile: Profile, epochs: int) -> TensorDictBase:
        batch = profile.collect(data)
        with profile.part("advantages"), torch.no_grad():
            critic.bootstrap(batch)
            loss.value_estimator(batch)
            loss.update_value_norm(batch)
            batch["advantage"] = standardize(batch["advantage"])
        rows = batch.select(*loss.in_keys, strict=False)
        for _ in range(epochs):
            minibatches = sequence_minibatches(rows, minibatch_size // collector.num_steps, states=memory)
            for _ in range(batch.numel() // minibatch_size):
                with profile.part("minibatches"):
                    minibatch = next(minibatches)
                profile.update(loss, minibatch, optimizer)
        return batch

    count_operations(profile, policy, loss, iterate(Profile(), 1), epochs)
    instrument(profile, env, policy)
    iterate(profile, epochs)
    return profile


CASES: dict[str, Callable[[], Profile]] = {
    **{
        f"{name}, {num_envs}": partial(
            lambda name, num_envs: mars(make_env(name, num_envs=num_envs, max_steps=100, seed=0), size_of(num_envs)),
            name,
            num_envs,
        )
        for name in ("navigation", "balance")
        for num_envs in (64, 600, 4096)
    },
    "CoordSum-3x10, 600": lambda: mars(make_coordsum(num_envs=600, seed=0), size_of(600)),
    "PaxMen-4, 600": lambda: mars(make_paxmen(num_envs=600, seed=0), size_of(600)),
    "MAGPO, CoordSum-3x10, 16": magpo,
}


def size_of(num_envs: int) -> int:
    """Minibatches as in `benchmarks/speed.py`."""
    return 1000 if num_envs < 600 else 4000


def rates() -> tuple[float, float]:
    """Floating-point operations and bytes per second of this process."""
    matrix, vector = torch.rand(1024, 1024), torch.rand(2**25)
    other = torch.empty_like(vector)

    def best(function: Callable[[], object]) -> float:
        taken = []
        for _ in range(10):
            start = time.process_time()
            function()
            taken.append(time.process_time() - start)
        return min(taken)

    return 2 * 1024**3 / best(lambda: matrix @ matrix), 2 * vector.nbytes / best(lambda: other.copy_(vector))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # its notices would break the table
    operations, bandwidth = rates()
    print(
        f"Torch {torch.__version__}, {arguments.threads} thread(s), {os.cpu_count()} cores, {platform.machine()}, "
        f"load {os.getloadavg()[0]:.1f}; a matrix product makes {operations / 1e9:.0f} GFLOP/s, a copy moves "
        f"{bandwidth / 1e9:.0f} GB/s.\n"
    )
    heading = ["case, environments", "frames", *PARTS, "sum", *FLOORS]
    print(f"| {' | '.join(heading)} |", "|---" * len(heading) + "|", sep="\n")
    for name in arguments.case:
        profile = CASES[name]()
        total = sum(profile.seconds.values())
        parts = [f"{profile.seconds[part]:.2f} ({profile.seconds[part] / total:.0%})" for part in PARTS]
        amounts = ((profile.operations, operations), (profile.bytes, bandwidth))
        floors = [
            f"{amount[stage] / 1e9:.2g} G: {amount[stage] / rate:.3f}"
            for amount, rate in amounts
            for stage in ("collection", "update")
        ]
        print(f"| {' | '.join([name, str(profile.frames), *parts, f'{total:.2f}', *floors])} |", flush=True)


if __name__ == "__main__":
    main()
