"""MAGPO and CTDS on VMAS: an autoregressive guider collects data and learns, decentralised learners imitate the guider.

    python recipes/magpo_vmas.py                                 # loss=ctds: the learners only imitate
    python recipes/magpo_vmas.py guider=mat env.scenario=balance loss.guider_learner_ratio=1.2

The learner alone is evaluated, stored as the policy and recorded: each agent acts on its own observation.
Every value of config/magpo_vmas.yaml and every argument of the classes it names can be overridden; -m runs grids.
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


@recipe(
    Path(__file__).parent / "config",
    "magpo_vmas",
    networks=("guider_network", "critic_network", "learner_network"),
    unread=("critic", "chunk_length"),
)
def main(cfg: DictConfig) -> float:
    """Train one method on one task with one seed; return the mean of the last fifth of the evaluations."""
    init_distributed()
    torch.set_num_threads(cfg.num_threads)
    torch.manual_seed(cfg.seed)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")

    make_env = partial(instantiate, cfg.env, device=device)
    env = make_env(seed=cfg.seed)
    shape = GroupSpec.from_env(env)
    guider, critic = instantiate(cfg.guider, shape, device=device)
    learner = instantiate(cfg.actor, shape, device=device)

    loss = instantiate(cfg.loss, guider, critic, learner)
    loss.make_value_estimator(gamma=cfg.gamma, lmbda=cfg.lmbda)
    loss.check_loop(cfg.frames_per_batch, cfg.env.num_envs, cfg.minibatch_size)
    optimizer = instantiate(cfg.optimizer, loss.parameter_groups(critic_lr=cfg.critic_lr))
    scheduler = instantiate(cfg.scheduler, optimizer)
    update = make_update(loss, optimizer, max_grad_norm=cfg.max_grad_norm, compile=cfg.compile)

    policy = collection_policy(guider, learner)  # only the guider acts; a recurrent learner updates its memory
    env = with_recurrent_state(env, policy)
    collector = make_collector(cfg, env, policy, loss)

    learning = {"loss": loss, "optimizer": optimizer, "scheduler": scheduler}
    run = Run(cfg, env=env, make_env=make_env, actor=learner, shape=shape, **learning)
    for batch in run.batches(collector):
        loss.prepare(batch)
        for phase in loss.phases(batch):  # guider and learner together, or one after the other
            for minibatch in phase.minibatches(cfg.minibatch_size, epochs=cfg.epochs):
                run.record(update(minibatch))
        scheduler.step()
    return run.finish()


if __name__ == "__main__":
    main()
