"""What bfloat16 in the matrix products of a loss does to the ratios of an unchanged policy.

    OMP_NUM_THREADS=1 python benchmarks/precision.py

A policy acts in float32; a loss with ``precision="bfloat16"`` scores its actions, and again after ``prepare``. Learning
curves: ``python recipes/mars_vmas.py loss.precision=bfloat16 env.scenario=balance seed=3`` and without.
"""

from __future__ import annotations

from typing import cast

import torch
from torchrl.envs import ExplorationType, set_exploration_type

from torchrl_marl.envs import make_env
from torchrl_marl.modules import make_actor, make_critic
from torchrl_marl.modules.protocols import Actor
from torchrl_marl.objectives import MARSLoss
from torchrl_marl.run.checkpoints import load_policy


def main() -> None:
    print("| task, policy | lowest | highest | standard deviation | beyond 0.98 to 1.02 | after prepare, most from 1 |")
    print("|---|---|---|---|---|---|")
    for task, trained in (("navigation", "zoo:navigation/mars"), ("balance", "zoo:balance/mappo")):
        for name in ("new", trained):
            torch.manual_seed(0)
            env = make_env(task, num_envs=60, max_steps=100, seed=0)
            actor = make_actor(env) if name == "new" else cast("Actor", load_policy(name))
            loss = MARSLoss(actor, make_critic(env), functional=False, precision="bfloat16")
            loss.make_value_estimator()
            with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
                batch = env.rollout(100, actor, break_when_any_done=False)
            collected = batch["agents", "action_log_prob"].clone()
            scored = loss.prepare(batch)["agents", "action_log_prob"]
            ratio = (scored - collected).exp()
            output = loss(batch.reshape(-1)[torch.randperm(batch.numel())[:1_000]])  # in a minibatch
            cells = [f"{ratio.min():.3f}", f"{ratio.max():.3f}", f"{ratio.std():.4f}"]
            furthest = max(1 - output["min_ratio"].item(), output["max_ratio"].item() - 1)
            cells += [f"{(ratio - 1).abs().gt(0.02).float().mean():.2%}", f"{furthest:.0e}"]
            print(f"| {task}, {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
