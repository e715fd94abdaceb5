"""Several seeds of MARS, MASPO, MAPPO or IPPO at once, in a game of this library's own.

    python recipes/seeds.py "seed=[0,1,2]" env=coordsum loss=mappo
    python recipes/seeds.py --config-name=mappo_maze "seed=[0,1,2,3,4]"
    python recipes/seeds.py resume=RUN  # of any of the seeds; all of them go on, bit for bit

Each seed leaves the folder of a run, and learns what it learns alone in mars_vmas.py.
"""

from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torchrl.collectors import Collector

from torchrl_marl.collectors import split_into_chunks
from torchrl_marl.modules import GroupSpec
from torchrl_marl.run import recipe
from torchrl_marl.seeds import Seed, SeedGroup, seed_configs


@recipe(Path(__file__).parent / "config", "seeds")
def main(cfg: DictConfig) -> float:
    """Train the seeds together; return the mean over them of the mean of the last fifth of the evaluations."""
    torch.set_num_threads(cfg.num_threads)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    make_env = partial(instantiate, cfg.env, device=device)
    group = SeedGroup([build_seed(own, make_env) for own in seed_configs(cfg)], make_env=make_env)
    optimizer = instantiate(cfg.optimizer, group.parameters())
    collector = Collector(
        group.env,
        group.policy,
        frames_per_batch=len(group) * cfg.frames_per_batch,
        total_frames=-1,
        auto_register_policy_transforms=False,
    )

    for batch in group.batches(collector, optimizer):
        group.estimate_advantages(batch)
        rows = split_into_chunks(batch.select(*group.in_keys, strict=False), cfg.chunk_length)
        rows = rows.reshape(len(group), -1, *rows.shape[1:])
        for minibatch in group.minibatches(rows, cfg.minibatch_size, epochs=cfg.epochs):
            losses = group.losses_of(minibatch)
            total = losses["loss_objective"] + losses["loss_entropy"] + losses["loss_critic"]
            total.sum().backward()
            grad_norm = group.clip_grad_norm_(cfg.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            group.record({**losses, "grad_norm": grad_norm})
    return group.finish()


def build_seed(cfg: DictConfig, make_env: partial) -> Seed:
    """Build what one seed has of its own, as mars_vmas.py does."""
    torch.manual_seed(cfg.seed)
    env = make_env(seed=cfg.seed)
    shape = GroupSpec.from_env(env)
    actor = instantiate(cfg.actor, shape, device=env.device)
    critic = instantiate(cfg.critic, shape, device=env.device)
    loss = instantiate(cfg.loss, actor, critic)
    loss.make_value_estimator(gamma=cfg.gamma, lmbda=cfg.lmbda)
    optimizer = instantiate(cfg.optimizer, loss.parameters())
    return Seed(cfg, env=env, make_env=make_env, actor=actor, shape=shape, loss=loss, optimizer=optimizer)


if __name__ == "__main__":
    main()
