"""Sable on VMAS, with any ratio loss: like MAT, with a memory of constant size over the whole episode.

    python recipes/sable_vmas.py loss=mars env.scenario=balance actor.num_blocks=2

It is executed centrally. Minibatches are whole sequences, each trained from the memory before its first step.
Every value of config/sable_vmas.yaml and every argument of what it names can be overridden; -m runs grids.
"""

from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torchrl.objectives.value import MultiAgentGAE

from torchrl_marl.collectors import sequence_minibatches, sequences_in
from torchrl_marl.config import recipe
from torchrl_marl.modules import GroupShape, with_recurrent_state
from torchrl_marl.objectives import standardize
from torchrl_marl.training import Run
from torchrl_marl.updates import make_update


@recipe(Path(__file__).parent / "config", "sable_vmas", collectors=("sequences",), unread=("critic", "chunk_length"))
def main(cfg: DictConfig) -> float:
    """Train one method on one task with one seed; return the mean of the last fifth of the evaluations."""
    torch.set_num_threads(cfg.num_threads)
    torch.manual_seed(cfg.seed)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")

    make_env = partial(instantiate, cfg.env, device=device)
    env = make_env(seed=cfg.seed)
    shape = GroupShape.from_env(env)
    actor, critic = instantiate(cfg.actor, shape, device=device)

    loss = instantiate(cfg.loss, actor, critic)
    loss.make_value_estimator(MultiAgentGAE(gamma=cfg.gamma, lmbda=cfg.lmbda, value_network=None))
    optimizer = instantiate(cfg.optimizer, loss.parameters())
    update = make_update(loss, optimizer, max_grad_norm=cfg.max_grad_norm, compile=cfg.compile)

    env, memory = with_recurrent_state(env, actor), actor.memory_keys
    collector = instantiate(cfg.collector, env, actor, frames_per_batch=cfg.frames_per_batch, states=memory)
    num_sequences = sequences_in(cfg.minibatch_size, collector.num_steps)

    run = Run(cfg, env=env, make_env=make_env, actor=actor, shape=shape, loss=loss, optimizer=optimizer)
    for batch in run.batches(collector):
        with torch.no_grad():
            critic.bootstrap(batch)
            loss.value_estimator(batch)
            loss.update_value_norm(batch)
            batch["advantage"] = standardize(batch["advantage"], batch.get((shape.name, "mask")))

        data = batch.select(*loss.in_keys, strict=False)
        for _ in range(cfg.epochs):
            for minibatch in sequence_minibatches(data, num_sequences, states=memory):
                run.record(update(minibatch))
    return run.finish()


if __name__ == "__main__":
    main()
