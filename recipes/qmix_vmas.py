"""VDN, QMIX, QPLEX and LDSA on VMAS: off-policy, from a replay buffer, with discrete actions.

    python recipes/qmix_vmas.py env.scenario=balance loss=qplex
    python recipes/qmix_vmas.py actor=gru chunk_length=25 # recurrent agents; loss=ldsa has its own

Agents act epsilon-greedily on their own action values; a mixer of these values is used in training only. Checkpoints
include the buffer.
Every value of config/qmix_vmas.yaml and every argument of the classes it names can be overridden; -m runs grids.
"""

from torchrl_marl.run.names import check_names

if __name__ == "__main__":
    check_names(__file__)  # a misspelt name is answered before the imports below, which take seconds

from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from torchrl_marl.collectors import epsilon_greedy
from torchrl_marl.distributed import init_distributed, world_size
from torchrl_marl.modules import GroupSpec, with_recurrent_state
from torchrl_marl.run import Run, make_collector, make_update, recipe


@recipe(
    Path(__file__).parent / "config",
    "qmix_vmas",
    networks=("local_value_network", "group_spec"),
    unread=("critic", "lmbda"),
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
    actor = instantiate(cfg.actor, shape, device=device)  # its logits are action values

    loss = instantiate(cfg.loss, actor, shape)
    loss.make_value_estimator(gamma=cfg.gamma)
    targets = instantiate(cfg.target_updater, loss)
    optimizer = instantiate(cfg.optimizer, loss.parameters())
    scheduler = instantiate(cfg.scheduler, optimizer)
    update = make_update(loss, optimizer, max_grad_norm=cfg.max_grad_norm, compile=cfg.compile)
    keys, states, length = loss.in_keys, loss.recurrent_state_keys, cfg.chunk_length
    make_buffer = instantiate(cfg.buffer, _partial_=True)
    buffer = make_buffer(keys, states, batch_size=cfg.minibatch_size, chunk_length=length, device=device)
    num_updates = -(-cfg.epochs * cfg.frames_per_batch // cfg.minibatch_size)

    action = (shape.name, "action")
    legal = (shape.name, "action_mask") if shape.masked else None
    spec = env.full_action_spec[action].to(device)
    explore = instantiate(cfg.exploration, _partial_=True)  # Hydra would convert keys to lists
    exploration = explore(spec, action_key=action, action_mask_key=legal, device=device)
    policy = epsilon_greedy(actor, exploration)
    env = with_recurrent_state(env, policy)
    collector = make_collector(cfg, env, policy, loss)

    learning = {"loss": loss, "optimizer": optimizer, "scheduler": scheduler, "target_updater": targets}
    kept = {"exploration": exploration, "buffer": buffer}
    run = Run(cfg, env=env, make_env=make_env, actor=actor, shape=shape, **learning, **kept)
    for batch in run.batches(collector):
        buffer.extend(batch)
        exploration.step(batch.numel() * world_size())
        for _ in range(num_updates):
            run.record(update(buffer.sample()))
            targets.step()
        run.record({"epsilon": exploration.eps})
        scheduler.step()
    return run.finish()


if __name__ == "__main__":
    main()
