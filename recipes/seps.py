"""Selective parameter sharing: find similar agents of a task from the outcomes of a random policy.

    python recipes/seps.py                                            # prints actor.share_parameters=[0,1,0]
    python recipes/seps.py env=vmas env.scenario=transport cluster.num_clusters=2

Pass the printed override to a recipe, such as recipes/mars_vmas.py. Every value of config/seps.yaml and every argument
of the functions it names can be overridden.
"""

from torchrl_marl.run.names import check_names

if __name__ == "__main__":
    check_names(__file__)  # a misspelt name is answered before the imports below, which take seconds

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torchrl.envs import ExplorationType, set_exploration_type

from torchrl_marl.modules import GroupSpec
from torchrl_marl.run import recipe

# Keys that only training reads.
_UNREAD = (
    "total_frames",
    "epochs",
    "minibatch_size",
    "chunk_length",
    "gamma",
    "lmbda",
    "max_grad_norm",
    "critic_lr",
    "scheduler",
    "loss",
    "critic",
)
_UNREAD += ("collector", "optimizer", "evaluation", "logger", "resume", "init_from", "compile")


@recipe(Path(__file__).parent / "config", "seps", unread=_UNREAD)
def main(cfg: DictConfig) -> float:
    """Collect transitions, encode and cluster the agents, print the clusters; return the number of clusters."""
    torch.set_num_threads(cfg.num_threads)
    torch.manual_seed(cfg.seed)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")

    env = instantiate(cfg.env, device=device, seed=cfg.seed)
    shape = GroupSpec.from_env(env)
    actor = instantiate(cfg.actor, shape, device=device)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        batch = env.rollout(cfg.frames_per_batch // cfg.env.num_envs, actor, break_when_any_done=False)

    clusters = instantiate(cfg.cluster)(instantiate(cfg.encode)(batch, shape))
    print(f"actor.share_parameters=[{','.join(map(str, clusters))}]")
    return len(set(clusters))


if __name__ == "__main__":
    main()
