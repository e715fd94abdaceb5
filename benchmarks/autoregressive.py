"""Processor time of a training iteration on CoordSum, by method: collection, values, epochs; then acting by agents.

``--compiled`` collects and updates by compiled functions. The default is the light setting of
``experiment=magpo_coordsum``; Sable's own setting on the larger task is

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

from torchrl_marl.collectors import CompiledCollector, SequenceCollector
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
from torchrl_marl.run import make_update

GRU = {"hidden_sizes": (64,), "recurrent_size": 64, "head_sizes": (64,)}


class Contender:
    """One method with its networks, optimiser and collector."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        env = make_coordsum(arguments.task, num_envs=arguments.envs, seed=0)
        sizes = {"embed_dim": arguments.embed, "num_heads": arguments.heads, "num_blocks": arguments.blocks}
        recurrent = name == "MAPPO, recurrent"
        if recurrent:
            actor, critic = make_recurrent_actor(env, **GRU), make_recurrent_critic(env, **GRU)
        else:
            actor, critic = (make_mat if "MAT" in name else make_sable)(env, **sizes)
        if name.startswith(("MAGPO", "CTDS")):
            learner = make_recurrent_actor(env, **GRU)
            kind = MAGPOLoss if name.startswith("MAGPO") else CTDSLoss
            self.loss: RatioLoss = kind(actor, critic, learner, functional=False)
            policy: TensorDictModuleBase = collection_policy(actor, learner)
        else:
            self.loss = MAPPOLoss(actor, critic, functional=False)
            policy = collection_policy(actor, critic)
        self.loss.make_value_estimator(gamma=0.99, lmbda=0.95)
        env, options = with_recurrent_state(env, policy), {"frames_per_batch": arguments.envs * arguments.steps}
        if arguments.compiled:
            collector = CompiledCollector(env, policy, **options)
        elif recurrent:
            collector = Collector(env, policy, **options, total_frames=-1, auto_register_policy_transforms=False)
        else:
            collector = SequenceCollector(env, policy, **options)
        self.data: Iterator = iter(collector)
        adam = torch.optim.Adam(self.loss.parameters(), lr=1e-5, fused=arguments.compiled)
        self.update = make_update(self.loss, adam, max_grad_norm=0.5, compile=arguments.compiled)
        # Sable's memory and the learner's start where the rollout does; MAT's and MAPPO's networks in every chunk
        self.chunk = None if self.loss.learns_sequences else arguments.chunk if recurrent else arguments.steps
        self.minibatch = options["frames_per_batch"] // arguments.minibatches

    def __call__(self) -> tuple[float, float, float]:
        """Seconds of processor time: collection, values and advantages, one epoch."""
        start = time.process_time()
        batch = next(self.data)
        collected = time.process_time()
        self.loss.prepare(batch)
        valued = time.process_time()
        for phase in self.loss.phases(batch, chunk_length=self.chunk):
            for minibatch in phase.minibatches(self.minibatch, epochs=1):
                self.update(minibatch)
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
    names = ("MAPPO, recurrent", "MAT", "Sable", "CTDS, Sable", "MAGPO, MAT", "MAGPO, Sable")
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, 1 thread, {vars(arguments)}")
    contenders = {name: Contender(name, arguments) for name in arguments.methods}
    best = dict.fromkeys(contenders, (float("inf"),) * 3)
    for _ in range(arguments.rounds):  # in turns: what else the machine does hits all alike
        for name, contender in contenders.items():
            best[name] = tuple(map(min, best[name], contender()))
    thousands = arguments.envs * arguments.steps / 1000
    print("| method | collection | values | an epoch | iteration | times the first |\n|---|---|---|---|---|---|")
    total = {name: collection + values + arguments.epochs * epoch for name, (collection, values, epoch) in best.items()}
    for name, parts in best.items():
        cells = " | ".join(f"{1000 * part / thousands:.0f}" for part in (*parts, total[name]))
        print(f"| {name} | {cells} | {total[name] / total[arguments.methods[0]]:.1f} |")
    print("(milliseconds of processor time for 1,000 steps)\n")
    print("| actor | a step of one agent | each further agent |\n|---|---|---|")
    for name, builder in (("MAT", make_mat), ("Sable", make_sable)):
        one, nine = (1000 * acting(builder, arguments, agents) for agents in (1, 9))
        print(f"| {name} | {one:.2f} | {(nine - one) / 8:.2f} |")
    print(f"(milliseconds of processor time for {arguments.envs} environments)")


if __name__ == "__main__":
    main()
