"""What bfloat16 in the matrix products of a loss does to a policy's ratios, and to learning.

Without arguments, the ratios of an unchanged policy: scored under autocast, and acting in float32. With an arm and
overrides, recipes/mars_vmas.py trains with the loss under autocast: ``bfloat16``, or ``rescored``, which also scores a
batch's actions under autocast, once; ``float32`` is the recipe as it is:

    python benchmarks/precision.py rescored env.scenario=balance seed=3
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import cast

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import ExplorationType, set_exploration_type

from torchrl_marl.envs import make_env
from torchrl_marl.modules import make_actor
from torchrl_marl.modules.protocols import Actor
from torchrl_marl.objectives import RatioLoss
from torchrl_marl.run import update
from torchrl_marl.run.checkpoints import load_policy

RECIPE = Path(__file__).parents[1] / "recipes" / "mars_vmas.py"


def score(actor: Actor, data: TensorDictBase) -> Tensor:
    """Log-probabilities of a batch's actions under autocast."""
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return actor.get_dist(data.select(*actor.in_keys)).log_prob(data[actor.dist_sample_keys[0]]).float()


def print_ratios() -> None:
    print("| task, policy | lowest | highest | standard deviation | beyond 0.98 to 1.02 | rescored, most from 1 |")
    print("|---|---|---|---|---|---|")
    for task, trained in (("navigation", "zoo:navigation/mars"), ("balance", "zoo:balance/mappo")):
        for name in ("new", trained):
            torch.manual_seed(0)
            env = make_env(task, num_envs=60, max_steps=100, seed=0)
            actor = make_actor(env) if name == "new" else cast("Actor", load_policy(name))
            with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
                data = env.rollout(100, actor, break_when_any_done=False).reshape(-1)
            rows = torch.randperm(len(data))[:1_000]
            scored = score(actor, data)
            ratio = (scored - data[actor.log_prob_keys[0]]).exp()
            again = (score(actor, data[rows]) - scored[rows]).exp()  # in a minibatch
            cells = [f"{ratio.min():.3f}", f"{ratio.max():.3f}", f"{ratio.std():.4f}"]
            cells += [f"{(ratio - 1).abs().gt(0.02).float().mean():.2%}", f"{(again - 1).abs().max():.0e}"]
            print(f"| {task}, {name} | {' | '.join(cells)} |")


def patch(arm: str) -> None:
    """Put the loss under autocast, and for ``rescored`` the batch's log-probabilities."""
    forward, prepare = update._Objective.forward, RatioLoss.prepare

    def autocast_forward(self: update._Objective, minibatch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(self, minibatch)

    def rescore(self: RatioLoss, batch: TensorDictBase) -> TensorDictBase:
        return prepare(self, batch).set(self.tensor_keys.sample_log_prob, score(self.actor_network, batch))

    if arm != "float32":
        update._Objective.forward = autocast_forward
    if arm == "rescored":
        RatioLoss.prepare = rescore


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print_ratios()
    else:
        patch(sys.argv.pop(1))
        sys.argv[0], sys.path[0] = str(RECIPE), str(RECIPE.parent)
        importlib.import_module(RECIPE.stem).main()
