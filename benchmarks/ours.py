"""torchrl_marl's MAPPO for speed.py: the loop of recipes/mars_vmas.py without logging, evaluation and checkpoints.

With `compile` as last argument the loss is compiled, as `compile=true` does in the recipe.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.metadata import version

import torch
from contender import Setting, Stopwatch, Timing, main
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers import SamplerWithoutReplacement

from torchrl_marl.envs import make_env
from torchrl_marl.modules import make_actor, make_critic
from torchrl_marl.objectives import MAPPOLoss, standardize


def run(iterations: int, setting: Setting, *, compiled: bool = False) -> list[Timing]:
    torch.set_num_threads(setting.threads)
    torch.manual_seed(setting.seed)
    env = make_env(
        setting.scenario,
        num_envs=setting.num_envs,
        max_steps=setting.max_steps,
        seed=setting.seed,
        scenario_kwargs={"n_agents": setting.num_agents},
    )
    actor = make_actor(env, agent_id=False)  # the peers' networks have no agent id
    critic = make_critic(env)
    loss = MAPPOLoss(
        actor,
        critic,
        clip_epsilon=setting.clip_epsilon,
        entropy_coeff=setting.entropy_coeff,
        normalize_advantage=False,
        functional=False,
    )
    loss.make_value_estimator(gamma=setting.gamma, lmbda=setting.lmbda)
    compute_loss = torch.compile(loss) if compiled else loss
    optimizer = torch.optim.Adam(loss.parameters(), lr=setting.lr)
    collector = Collector(
        env,
        actor,
        frames_per_batch=setting.frames,
        total_frames=setting.frames * iterations,
        auto_register_policy_transforms=False,
    )
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(setting.frames),
        sampler=SamplerWithoutReplacement(drop_last=True),
        batch_size=setting.minibatch_size,
    )
    stopwatch = Stopwatch()
    for batch in stopwatch.watch(collector):
        with torch.no_grad():
            loss.value_estimator(batch)
            loss.update_value_norm(batch)
            batch["advantage"] = standardize(batch["advantage"])
        buffer.empty()
        buffer.extend(batch.reshape(-1).select(*loss.in_keys, strict=False))
        diagnostics = []
        for _ in range(setting.epochs):
            for minibatch in buffer:
                losses = compute_loss(minibatch)
                (losses["loss_objective"] + losses["loss_entropy"] + losses["loss_critic"]).backward()
                grad_norm = torch.nn.utils.clip_grad_norm_(loss.parameters(), setting.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                diagnostics.append({name: value.detach() for name, value in losses.items()} | {"grad_norm": grad_norm})
        {name: torch.stack([step[name] for step in diagnostics]).mean() for name in diagnostics[0]}
    collector.shutdown()
    return stopwatch.timings


if __name__ == "__main__":
    main(
        partial(run, compiled=sys.argv[3:] == ["compile"]),
        lambda: f"torchrl_marl {version('torchrl_marl')}, torchrl {version('torchrl')}, torch {torch.__version__}",
    )
