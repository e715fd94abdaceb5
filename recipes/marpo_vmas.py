"""MARPO and RPO on VMAS: every row of a batch also holds the next step of its agent.

    python recipes/marpo_vmas.py                       # loss=rpo: fixed clips; loss=mappo: the same without reflection
    python recipes/marpo_vmas.py loss.reflection_coeff=0.1 loss.layout=paper env.scenario=balance

Every value of config/marpo_vmas.yaml and every argument of what it names can be overridden; -m runs grids.
"""

from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from torchrl_marl.collectors import NextStepKeys, minibatches, split_into_chunks
from torchrl_marl.config import recipe
from torchrl_marl.evaluation import plot_kl_interval
from torchrl_marl.modules import GroupShape, collection_policy, with_recurrent_state
from torchrl_marl.objectives import MARPOLoss, RatioLoss, standardize
from torchrl_marl.training import Run
from torchrl_marl.updates import make_update


@recipe(Path(__file__).parent / "config", "marpo_vmas", losses=(RatioLoss, MARPOLoss))
def main(cfg: DictConfig) -> float:
    """Train one method on one task with one seed; return the mean of the last fifth of the evaluations."""
    torch.set_num_threads(cfg.num_threads)
    torch.manual_seed(cfg.seed)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")

    make_env = partial(instantiate, cfg.env, device=device)
    env = make_env(seed=cfg.seed)
    shape = GroupShape.from_env(env)
    actor = instantiate(cfg.actor, shape, device=device)
    critic = instantiate(cfg.critic, shape, device=device)

    loss = instantiate(cfg.loss, actor, critic)
    if cfg.chunk_length is None and getattr(loss, "sequences", False):
        raise ValueError("chunk_length must be an integer, as loss.sequences=true trains on chunks; got null.")
    loss.make_value_estimator(gamma=cfg.gamma, lmbda=cfg.lmbda)
    optimizer = instantiate(cfg.optimizer, loss.parameters())
    update = make_update(loss, optimizer, max_grad_norm=cfg.max_grad_norm, compile=cfg.compile)
    add_next_step = NextStepKeys(action=(shape.name, "action"), log_prob=(shape.name, "action_log_prob"))

    policy = collection_policy(actor, critic)
    env = with_recurrent_state(env, policy)
    collector = instantiate(cfg.collector, env, policy, frames_per_batch=cfg.frames_per_batch)

    run = Run(cfg, env=env, make_env=make_env, actor=actor, shape=shape, loss=loss, optimizer=optimizer)
    for batch in run.batches(collector):
        with torch.no_grad():
            loss.value_estimator(batch)
            loss.update_value_norm(batch)
            batch["advantage"] = standardize(batch["advantage"], batch.get((shape.name, "mask")))
            add_next_step(batch)

        rows = split_into_chunks(batch.select(*loss.in_keys, strict=False), cfg.chunk_length)  # steps share a pass
        for _ in range(cfg.epochs):
            for minibatch in minibatches(rows, cfg.minibatch_size):
                run.record(update(minibatch))
    follows_kl = isinstance(loss, MARPOLoss) and loss.uses_kl
    plots = [partial(plot_kl_interval, group=shape.name)] if follows_kl else []
    return run.finish(*plots)


if __name__ == "__main__":
    main()
