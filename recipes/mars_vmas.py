"""MARS, MASPO, MAPPO, IPPO and SEAC on VMAS, with the loop of every method with decentralised agents.

    python recipes/mars_vmas.py env.scenario=balance loss=maspo seed=3

Every value of config/mars_vmas.yaml and every argument of the classes it names can be overridden; -m runs grids.
"""

from torchrl_marl.run.names import check_names

if __name__ == "__main__":
    check_names(__file__)  # a misspelt name is answered before the imports below, which take seconds

from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from torchrl_marl.distributed import init_distributed
from torchrl_marl.modules import GroupSpec, collection_policy, with_recurrent_state
from torchrl_marl.run import Run, make_collector, make_update, recipe

CONFIG = Path(__file__).parent / "config"


def train(cfg: DictConfig) -> float:
    """Train one method on one task with one seed; return the mean of the last fifth of the evaluations."""
    init_distributed()
    torch.set_num_threads(cfg.num_threads)
    torch.manual_seed(cfg.seed)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")

    make_env = partial(instantiate, cfg.env, device=device)
    env = make_env(seed=cfg.seed)
    shape = GroupSpec.from_env(env)
    actor = instantiate(cfg.actor, shape, device=device)
    actor, critic = actor if isinstance(actor, tuple) else (actor, instantiate(cfg.critic, shape, device=device))

    loss = instantiate(cfg.loss, actor, critic)
    loss.make_value_estimator(gamma=cfg.gamma, lmbda=cfg.lmbda)
    loss.check_loop(cfg.frames_per_batch, cfg.env.num_envs, cfg.minibatch_size, cfg.chunk_length)
    optimizer = instantiate(cfg.optimizer, loss.parameter_groups(critic_lr=cfg.critic_lr))
    scheduler = instantiate(cfg.scheduler, optimizer)
    update = make_update(loss, optimizer, max_grad_norm=cfg.max_grad_norm, compile=cfg.compile)

    policy = collection_policy(actor, critic)
    env = with_recurrent_state(env, policy)
    collector = make_collector(cfg, env, policy, loss)

    learning = {"loss": loss, "optimizer": optimizer, "scheduler": scheduler}
    run = Run(cfg, env=env, make_env=make_env, actor=actor, shape=shape, **learning)
    for batch in run.batches(collector):
        loss.prepare(batch)  # advantages, value targets, and entries of the method
        for phase in loss.phases(batch, chunk_length=cfg.chunk_length):  # one, or one per agent
            for minibatch in phase.minibatches(cfg.minibatch_size, epochs=cfg.epochs):
                run.record(update(minibatch))
        run.record(loss.metrics())
        scheduler.step()
    return run.finish()


main = recipe(CONFIG, "mars_vmas")(train)

if __name__ == "__main__":
    main()
