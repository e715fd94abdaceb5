"""torchrl_marl's MAPPO for speed.py: the loop of recipes/mars_vmas.py without logging, evaluation and checkpoints.

With `compile` as last argument collection and update are compiled: `compile=true` in the recipe.
"""

from __future__ import annotations

import itertools
import sys
from functools import partial
from importlib.metadata import version

import torch
from contender import Setting, Stopwatch, Timing, main
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from torchrl_marl.collectors import CompiledCollector
from torchrl_marl.envs import make_coordsum, make_env
from torchrl_marl.modules import (
    collection_policy,
    make_actor,
    make_critic,
    make_recurrent_actor,
    make_recurrent_critic,
    with_recurrent_state,
)
from torchrl_marl.objectives import MAPPOLoss
from torchrl_marl.run.update import make_update


def task(setting: Setting) -> EnvBase:
    """A scenario of VMAS (simple_spread with discrete actions, as JaxMARL's), or CoordSum with ten actions."""
    options = {"num_envs": setting.num_envs, "max_steps": setting.max_steps, "seed": setting.seed}
    if setting.scenario == "simple_spread":
        options["continuous_actions"] = False
    if setting.scenario == "CoordSum":
        return make_coordsum(f"CoordSum-{setting.num_agents}x10", **options)
    return make_env(setting.scenario, **options, scenario_kwargs={"n_agents": setting.num_agents})


def run(
    iterations: int, setting: Setting, *, compiled: bool = False, stopwatch: Stopwatch | None = None
) -> list[Timing]:
    torch.set_num_threads(setting.threads)
    torch.manual_seed(setting.seed)
    env = task(setting)
    width = [setting.width]
    if setting.recurrent:
        sizes = {"hidden_sizes": width, "recurrent_size": setting.width, "head_sizes": width}
        actor, critic = make_recurrent_actor(env, agent_id=False, **sizes), make_recurrent_critic(env, **sizes)
    else:
        actor = make_actor(env, agent_id=False, hidden_sizes=2 * width)  # the peers' networks have no agent id
        critic = make_critic(env, hidden_sizes=2 * width)
    policy = collection_policy(actor, critic)
    env = with_recurrent_state(env, policy)
    loss = MAPPOLoss(
        actor,
        critic,
        clip_epsilon=setting.clip_epsilon,
        entropy_coeff=setting.entropy_coeff,
        normalize_advantage=False,
        functional=False,
    )
    loss.make_value_estimator(gamma=setting.gamma, lmbda=setting.lmbda)
    optimizer = torch.optim.Adam(loss.parameters(), lr=setting.lr, fused=compiled)
    update = make_update(loss, optimizer, max_grad_norm=setting.max_grad_norm, compile=compiled)
    if compiled:
        collector = CompiledCollector(env, policy, frames_per_batch=setting.frames)
    else:
        options = {"total_frames": -1, "auto_register_policy_transforms": False}
        collector = Collector(env, policy, frames_per_batch=setting.frames, **options)
    stopwatch = stopwatch or Stopwatch()
    for batch in stopwatch.watch(itertools.islice(collector, iterations)):
        loss.prepare(batch)
        diagnostics = [
            update(minibatch)
            for phase in loss.phases(batch, chunk_length=setting.max_steps if setting.recurrent else None)
            for minibatch in phase.minibatches(setting.minibatch_size, epochs=setting.epochs)
        ]
        {name: torch.stack([step[name] for step in diagnostics]).mean() for name in diagnostics[0]}
    collector.shutdown()
    return stopwatch.timings


if __name__ == "__main__":
    main(
        partial(run, compiled=sys.argv[3:] == ["compile"]),
        lambda: f"torchrl_marl {version('torchrl_marl')}, torchrl {version('torchrl')}, torch {torch.__version__}",
    )
