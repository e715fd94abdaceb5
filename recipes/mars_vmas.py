"""MARS, MASPO, MAPPO and IPPO on VMAS.

    python recipes/mars_vmas.py env.scenario=balance loss=maspo seed=3

Every value of config/mars_vmas.yaml and every argument of what it names can be overridden; -m runs grids.
"""

from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from torchrl_marl.collectors import minibatches, split_into_chunks
from torchrl_marl.config import recipe
from torchrl_marl.data_parallel import data_parallel, gather, join_processes
from torchrl_marl.modules import GroupShape, collection_policy, with_recurrent_state
from torchrl_marl.objectives import standardize
from torchrl_marl.training import Run
from torchrl_marl.updates import make_update


@recipe(Path(__file__).parent / "config", "mars_vmas")
def main(cfg: DictConfig) -> float:
    """Train one method on one task with one seed; return the mean of the last fifth of the evaluations."""
    join_processes()
    torch.set_num_threads(cfg.num_threads)
    torch.manual_seed(cfg.seed)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")

    make_env = partial(instantiate, cfg.env, device=device)
    env = make_env(seed=cfg.seed)
    shape = GroupShape.from_env(env)
    actor = instantiate(cfg.actor, shape, device=device)
    critic = instantiate(cfg.critic, shape, device=device)

    loss = instantiate(cfg.loss, actor, critic)
    loss.make_value_estimator(gamma=cfg.gamma, lmbda=cfg.lmbda)
    optimizer = instantiate(cfg.optimizer, loss.parameters())
    update = make_update(data_parallel(loss), optimizer, max_grad_norm=cfg.max_grad_norm, compile=cfg.compile)

    policy = collection_policy(actor, critic)
    env = with_recurrent_state(env, policy)
    collector = instantiate(cfg.collector, env, policy, frames_per_batch=cfg.frames_per_batch)

    run = Run(cfg, env=env, make_env=make_env, actor=actor, shape=shape, loss=loss, optimizer=optimizer)
    for batch in run.batches(collector):
        with torch.no_grad():
            loss.value_estimator(batch)
            loss.update_value_norm(batch, gather=gather)
            batch["advantage"] = standardize(batch["advantage"], batch.get((shape.name, "mask")), gather=gather)

        rows = split_into_chunks(batch.select(*loss.in_keys, strict=False), cfg.chunk_length)
        for _ in range(cfg.epochs):
            for minibatch in minibatches(rows, cfg.minibatch_size):
                run.record(update(minibatch))
    return run.finish()


if __name__ == "__main__":
    main()
