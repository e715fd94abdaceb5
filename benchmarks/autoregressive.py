"""Processor time of a training iteration on CoordSum, by method: collection, values, epochs; then acting by agents.

The default is the light setting of ``experiment=magpo_coordsum``; Sable's own setting on the larger task is

    python benchmarks/autoregressive.py --task CoordSum-5x20 --envs 64 --epochs 10 --embed 64 --heads 2 --blocks 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.objectives.value import MultiAgentGAE

from torchrl_marl.collectors import SequenceCollector, sequence_minibatches, split_into_chunks
from torchrl_marl.envs import make_coordsum
from torchrl_marl.modules import (
    GroupSpec,
    collection_policy,
    make_mat,
    make_recurrent_actor,
    make_recurrent_critic,
    make_sable,
    with_recurrent_state,
)
from torchrl_marl.objectives import CTDSLoss, MAGPOLoss, MAPPOLoss, RatioLoss

GRU = {"hidden_sizes": (64,), "recurrent_size": 64, "head_sizes": (64,)}


class Contender:
    """One method with its networks, optimiser and collector."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        env = make_coordsum(arguments.task, num_envs=arguments.envs, seed=0)
        sizes = {"embed_dim": arguments.embed, "num_heads": arguments.heads, "num_blocks": arguments.blocks}
        frames = arguments.envs * arguments.steps
        self.memory: list = []
        if name == "MAPPO, recurrent":
            actor, critic = make_recurrent_actor(env, **GRU), make_recurrent_critic(env, **GRU)
            self.loss: RatioLoss = MAPPOLoss(actor, critic, functional=False)
            self.loss.make_value_estimator()
            policy: TensorDictModuleBase = collection_policy(actor, critic)
            self.values: Callable = lambda batch: batch
            options = {"total_frames": -1, "auto_register_policy_transforms": False}
            collector = Collector(with_recurrent_state(env, policy), policy, frames_per_batch=frames, **options)
        else:
            actor, critic = (make_mat if "MAT" in name else make_sable)(env, **sizes)
            policy = actor
            if name.startswith(("MAGPO", "CTDS")):
                learner = make_recurrent_actor(env, **GRU)
                self.loss = (MAGPOLoss if name.startswith("MAGPO") else CTDSLoss)(
                    actor, critic, learner, functional=False
                )
                policy = collection_policy(actor, learner)
            else:
                self.loss = MAPPOLoss(actor, critic, functional=False)
            self.loss.make_value_estimator(MultiAgentGAE(gamma=0.99, lmbda=0.95, value_network=None))
            self.memory, self.values = actor.memory_keys, critic.bootstrap
            env = with_recurrent_state(env, policy)
            collector = SequenceCollector(env, policy, frames_per_batch=frames, states=self.memory)
        self.data: Iterator = iter(collector)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=1e-5)
        # Sable's memory and the learner's start where the rollout does; recurrent MAPPO's networks start in every chunk
        self.chunk = arguments.chunk if name == "MAPPO, recurrent" else arguments.steps
        self.minibatch = frames // arguments.minibatches // self.chunk

    def __call__(self) -> tuple[float, float, float]:
        """Seconds of processor time: collection, values and advantages, one epoch."""
        start = time.process_time()
        batch = next(self.data)
        collected = time.process_time()
        with torch.no_grad():
            self.loss.value_estimator(self.values(batch))
        valued = time.process_time()
        data = batch.select(*self.loss.in_keys, strict=False)
        if self.chunk < data.shape[1]:
            data = split_into_chunks(data, self.chunk)
        for minibatch in sequence_minibatches(data, self.minibatch, states=self.memory):
            losses = self.loss(minibatch)
            sum(losses[key] for key in losses.keys() if key.startswith("loss_")).backward()
            torch.nn.utils.clip_grad_norm_(self.loss.parameters(), 0.5)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return collected - start, valued - collected, time.process_time() - valued


def acting(builder: Callable, arguments: argparse.Namespace, agents: int) -> float:
    """Least seconds of processor time of one step of all environments, with so many agents."""
    shape = GroupSpec("agents", agents, observation_size=2, num_actions=20)
    actor, _ = builder(shape, embed_dim=arguments.embed, num_heads=arguments.heads, num_blocks=arguments.blocks)
    data = TensorDict({"agents": {"observation": torch.zeros(arguments.envs, agents, 2)}}, arguments.envs)
    for key, spec in actor.make_tensordict_primer().primers.items():
        data[key] = spec.zero((arguments.envs,))
    best = float("inf")
    with set_exploration_type(ExplorationType.RANDOM):
        for _ in range(50):
            start = time.process_time()
            actor(data)
            best = min(best, time.process_time() - start)
            data.update(data.pop("next", {}))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="CoordSum-3x10")
    sizes = {"envs": 16, "steps": 128, "chunk": 32, "epochs": 4, "minibatches": 4, "embed": 32, "heads": 1, "blocks": 1}
    for name, default in {**sizes, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, 1 thread, {vars(arguments)}")
    names = ("MAPPO, recurrent", "MAT", "Sable", "CTDS, Sable", "MAGPO, MAT", "MAGPO, Sable")
    contenders = {name: Contender(name, arguments) for name in names}
    best = dict.fromkeys(names, (float("inf"),) * 3)
    for _ in range(arguments.rounds):  # in turns: what else the machine does hits all alike
        for name, contender in contenders.items():
            best[name] = tuple(map(min, best[name], contender()))
    thousands = arguments.envs * arguments.steps / 1000
    print("| method | collection | values | an epoch | iteration | times MAPPO |\n|---|---|---|---|---|---|")
    total = {name: collection + values + arguments.epochs * epoch for name, (collection, values, epoch) in best.items()}
    for name, parts in best.items():
        cells = " | ".join(f"{1000 * part / thousands:.0f}" for part in (*parts, total[name]))
        print(f"| {name} | {cells} | {total[name] / total['MAPPO, recurrent']:.1f} |")
    print("(milliseconds of processor time for 1,000 steps)\n")
    print("| actor | a step of one agent | each further agent |\n|---|---|---|")
    for name, builder in (("MAT", make_mat), ("Sable", make_sable)):
        one, nine = (1000 * acting(builder, arguments, agents) for agents in (1, 9))
        print(f"| {name} | {one:.2f} | {(nine - one) / 8:.2f} |")
    print(f"(milliseconds of processor time for {arguments.envs} environments)")


if __name__ == "__main__":
    main()
