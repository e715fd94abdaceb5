"""What test_workers.py runs in a process of its own: batches of several collectors, saved to a file."""

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector

from torchrl_marl.collectors import multiprocess_collector, ray_collector
from torchrl_marl.envs import make_maze, reseed
from torchrl_marl.modules import make_recurrent_actor, with_recurrent_state

NUM_ENVS, STEPS = 4, 6
make_env = partial(make_maze, "black_red", max_steps=4)  # episodes end within a batch


class Turn(nn.Module):
    """A policy without noise, which changes with its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, observation: Tensor) -> Tensor:
        return ((observation.sum(-1) + 1) * self.weight).long() % 4


def collected(
    policy: nn.Module, collector: Iterable[TensorDictBase], begin: Callable[[], object], end: Callable[[], object]
) -> list[TensorDict]:
    """Two batches, of which the second has other weights, and one after a new beginning."""
    with torch.no_grad():
        nn.utils.vector_to_parameters(
            torch.linspace(-1, 1, sum(p.numel() for p in policy.parameters())), policy.parameters()
        )
    torch.manual_seed(3)
    batches = []
    data: Iterator[TensorDictBase] = iter(collector)
    begin()
    for step in range(3):
        if step == 2:
            begin()
        batches.append(next(data).exclude("collector").clone().to_tensordict())
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 1
    end()
    return batches


def by_workers(policy: nn.Module, engine: Callable, num_workers: int) -> list[TensorDict]:
    env = with_recurrent_state(make_env(num_envs=NUM_ENVS), policy)
    collector = engine(
        env,
        policy,
        make_env=make_env,
        num_workers=num_workers,
        frames_per_batch=NUM_ENVS * STEPS - 1,  # is rounded up
    )
    return collected(policy, collector, collector.reset, collector.shutdown)


def by_hand(policy: nn.Module, world_size: int) -> list[TensorDict]:
    """One TorchRL collector after another, each with its part of the environments."""
    parts = []
    for part in range(world_size):
        copies = NUM_ENVS // world_size
        env = with_recurrent_state(make_env(num_envs=copies), policy)
        collector = Collector(
            env, policy, frames_per_batch=copies * STEPS, total_frames=-1, auto_register_policy_transforms=False
        )
        seeds = torch.Generator().manual_seed(3)

        def begin(env=env, collector=collector, rank=part, seeds=seeds) -> None:
            reseed(env, int(torch.randint(2**31 - 1, (), generator=seeds)), rank=rank, world_size=world_size)
            collector.reset()

        parts.append(collected(policy, collector, begin, collector.shutdown))
    return [torch.cat(rows) for rows in zip(*parts, strict=True)]


if __name__ == "__main__":
    name, path = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    engine = {"multiprocess": multiprocess_collector, "ray": ray_collector}[name]
    turn = TensorDictModule(Turn(), in_keys=[("agents", "observation")], out_keys=[("agents", "action")])
    actor = make_recurrent_actor(make_env(num_envs=1), hidden_sizes=[4], recurrent_size=4, head_sizes=[])
    torch.save(
        {
            "noiseless": [by_workers(turn, engine, 2), by_hand(turn, 1)],
            "noisy": [by_workers(actor, engine, 2), by_hand(actor, 2)],
        },
        path,
    )
