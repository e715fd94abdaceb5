"""Groups of agents with different spaces, competing or cooperating, with separate networks, losses and optimisers.

    python recipes/groups_vmas.py env.scenario=simple_tag loss=mappo         # three pursuers against one evader
    python recipes/groups_vmas.py env.scenario=simple_speaker_listener       # one sees the goal, the other one moves

Checkpoints are scored by the mean return of all agents; evaluations also log the return of each group.
Every value of config/groups_vmas.yaml and every argument of the classes it names can be overridden; -m runs grids.
"""

from torchrl_marl.run.names import check_names

if __name__ == "__main__":
    check_names(__file__)  # a misspelt name is answered before the imports below, which take seconds

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from tensordict import TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import Tensor

from torchrl_marl.modules import GroupSpec, collection_policy, with_recurrent_state
from torchrl_marl.run import Run, make_collector, make_update, recipe


class Learner:
    """Networks, loss and optimiser of one group."""

    def __init__(self, cfg: DictConfig, shape: GroupSpec, device: str) -> None:
        self.cfg, self.name = cfg, shape.name
        actor = instantiate(cfg.actor, shape, device=device)
        both = actor if isinstance(actor, tuple) else (actor, instantiate(cfg.critic, shape, device=device))
        self.actor, self.critic = both
        self.loss = instantiate(cfg.loss, self.actor, self.critic)
        self.loss.make_value_estimator(gamma=cfg.gamma, lmbda=cfg.lmbda)
        self.loss.check_loop(cfg.frames_per_batch, cfg.env.num_envs, cfg.minibatch_size, cfg.chunk_length)
        self.optimizer = instantiate(cfg.optimizer, self.loss.parameter_groups(critic_lr=cfg.critic_lr))
        self.scheduler = instantiate(cfg.scheduler, self.optimizer)
        self.update = make_update(self.loss, self.optimizer, max_grad_norm=cfg.max_grad_norm, compile=cfg.compile)

    def learn(self, batch: TensorDictBase) -> Iterator[dict[str, Tensor]]:
        """Train on the group's data; yield the metrics of each minibatch."""
        batch = batch.copy()  # all groups write their advantages under the same keys
        self.loss.prepare(batch)
        for phase in self.loss.phases(batch, chunk_length=self.cfg.chunk_length):
            for minibatch in phase.minibatches(self.cfg.minibatch_size, epochs=self.cfg.epochs):
                yield {f"{self.name}/{name}": value for name, value in self.update(minibatch).items()}
        if metrics := self.loss.metrics():
            yield {f"{self.name}/{name}": value for name, value in metrics.items()}
        self.scheduler.step()


@recipe(Path(__file__).parent / "config", "groups_vmas")
def main(cfg: DictConfig) -> float:
    """Train one method in every group of one task with one seed; return the mean of the last fifth of evaluations."""
    torch.set_num_threads(cfg.num_threads)
    torch.manual_seed(cfg.seed)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")

    make_env = partial(instantiate, cfg.env, device=device)
    env = make_env(seed=cfg.seed)
    shapes = [GroupSpec.from_env(env, group) for group in env.group_map]
    learners = [Learner(cfg, shape, device) for shape in shapes]

    policy = TensorDictSequential([collection_policy(learner.actor, learner.critic) for learner in learners])
    env = with_recurrent_state(env, policy)
    collector = make_collector(cfg, env, policy, learners[0].loss)

    actor = TensorDictSequential([learner.actor for learner in learners])
    own = {f"loss_{learner.name}": learner.loss for learner in learners}
    own |= {f"optimizer_{learner.name}": learner.optimizer for learner in learners}
    own |= {f"scheduler_{learner.name}": learner.scheduler for learner in learners}
    run = Run(cfg, env=env, make_env=make_env, actor=actor, shape=shapes, **own)
    for batch in run.batches(collector):
        for learner in learners:
            for metrics in learner.learn(batch):
                run.record(metrics)
    return run.finish()


if __name__ == "__main__":
    main()
