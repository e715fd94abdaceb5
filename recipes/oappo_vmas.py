"""OAPPO, OATRPO, HAPPO and HATRPO on VMAS: agents update in turn, and learn from those whose policies are like theirs.

    python recipes/oappo_vmas.py                       # loss=happo: from their own experience only
    python recipes/oappo_vmas.py loss.own_weight=0.4 loss.kl_threshold=1 env.scenario=navigation
    python recipes/oappo_vmas.py loss=oatrpo loss.reuse_matrix=AR  # one natural-gradient step a turn; a fixed mapping

Every value of config/oappo_vmas.yaml and every argument of what it names can be overridden; -m runs grids.
"""

from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from torchrl_marl.collectors import minibatches, split_into_chunks
from torchrl_marl.config import recipe
from torchrl_marl.evaluation import plot_reuse_matrix
from torchrl_marl.modules import GroupShape, collection_policy, with_recurrent_state
from torchrl_marl.objectives import NaturalGradientLoss, SequentialLoss, standardize
from torchrl_marl.training import Run


@recipe(Path(__file__).parent / "config", "oappo_vmas", losses=(SequentialLoss,))
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
    if isinstance(loss, NaturalGradientLoss) and loss.reduction != "mean":
        raise ValueError(f"loss.reduction must be mean, as a natural step compares means; got {loss.reduction}.")
    loss.make_value_estimator(gamma=cfg.gamma, lmbda=cfg.lmbda)
    compute_loss = torch.compile(loss) if cfg.compile else loss
    optimizer = instantiate(cfg.optimizer, loss.parameters())

    policy = collection_policy(actor, critic)
    env = with_recurrent_state(env, policy)
    collector = instantiate(cfg.collector, env, policy, frames_per_batch=cfg.frames_per_batch)

    run = Run(cfg, env=env, make_env=make_env, actor=actor, shape=shape, loss=loss, optimizer=optimizer)
    for batch in run.batches(collector):
        with torch.no_grad():
            loss.value_estimator(batch)
            loss.update_value_norm(batch)
            batch["advantage"] = standardize(batch["advantage"], batch.get((shape.name, "mask")))

        rows = split_into_chunks(batch.select(*loss.in_keys, strict=False), cfg.chunk_length)
        for turn in loss.turns(rows):  # every agent, in random order, then the critic
            if turn != "critic" and isinstance(loss, NaturalGradientLoss):
                run.record(loss.step(rows))
                continue
            for _ in range(cfg.epochs):
                for minibatch in minibatches(rows, cfg.minibatch_size):
                    losses = compute_loss(minibatch)
                    sum(losses[key] for key in losses.keys() if key.startswith("loss_")).backward()
                    grad_norm = torch.nn.utils.clip_grad_norm_(loss.parameters(), cfg.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                    run.record({**losses, "critic_grad_norm" if turn == "critic" else "grad_norm": grad_norm})
        run.record(loss.reuse_weights())
    return run.finish(partial(plot_reuse_matrix, group=shape.name))


if __name__ == "__main__":
    main()
