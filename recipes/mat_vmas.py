"""The Multi-Agent Transformer on VMAS, with any ratio loss: agents act one after the other, trained all at once.

    python recipes/mat_vmas.py loss=mars env.scenario=balance actor.num_blocks=2

It is executed centrally: every agent's action depends on all observations and on the actions of agents before it.
Every value of config/mat_vmas.yaml and every argument of what it names can be overridden; -m runs grids.
"""

from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from torchrl_marl.collectors import minibatches
from torchrl_marl.config import recipe
from torchrl_marl.modules import GroupShape
from torchrl_marl.objectives import standardize
from torchrl_marl.training import Run
from torchrl_marl.updates import make_update


@recipe(Path(__file__).parent / "config", "mat_vmas", unread=("critic", "chunk_length"))
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
    loss.make_value_estimator(gamma=cfg.gamma, lmbda=cfg.lmbda)
    optimizer = instantiate(cfg.optimizer, loss.parameters())
    update = make_update(loss, optimizer, max_grad_norm=cfg.max_grad_norm, compile=cfg.compile)

    collector = instantiate(cfg.collector, env, actor, frames_per_batch=cfg.frames_per_batch)

    run = Run(cfg, env=env, make_env=make_env, actor=actor, shape=shape, loss=loss, optimizer=optimizer)
    for batch in run.batches(collector):
        with torch.no_grad():
            loss.value_estimator(batch)
            loss.update_value_norm(batch)
            batch["advantage"] = standardize(batch["advantage"], batch.get((shape.name, "mask")))

        rows = batch.reshape(-1).select(*loss.in_keys, strict=False)
        for _ in range(cfg.epochs):
            for minibatch in minibatches(rows, cfg.minibatch_size):
                run.record(update(minibatch))
    return run.finish()


if __name__ == "__main__":
    main()
