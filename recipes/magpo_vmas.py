"""MAGPO and CTDS on VMAS: an autoregressive guider collects and learns, decentralised learners follow it.

    python recipes/magpo_vmas.py                                 # loss=ctds: the learners only imitate
    python recipes/magpo_vmas.py guider=mat env.scenario=balance loss.guider_learner_ratio=1.2

What is evaluated, stored as the policy and filmed is the learner alone: each agent acts on what it observes.
Every value of config/magpo_vmas.yaml and every argument of what it names can be overridden; -m runs grids.
"""

from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torchrl.objectives.value import MultiAgentGAE

from torchrl_marl.collectors import sequence_minibatches, sequences_in
from torchrl_marl.config import recipe
from torchrl_marl.modules import GroupShape, collection_policy, with_recurrent_state
from torchrl_marl.objectives import CTDSLoss, MAGPOLoss, standardize
from torchrl_marl.objectives.magpo import GUIDER_LOSSES, LEARNER_LOSSES
from torchrl_marl.training import Run


@recipe(
    Path(__file__).parent / "config",
    "magpo_vmas",
    losses=(MAGPOLoss, CTDSLoss),
    collectors=("sequences",),
    unread=("critic", "chunk_length"),
)
def main(cfg: DictConfig) -> float:
    """Train one method on one task with one seed; return the mean of the last fifth of the evaluations."""
    torch.set_num_threads(cfg.num_threads)
    torch.manual_seed(cfg.seed)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")

    make_env = partial(instantiate, cfg.env, device=device)
    env = make_env(seed=cfg.seed)
    shape = GroupShape.from_env(env)
    guider, critic = instantiate(cfg.guider, shape, device=device)
    learner = instantiate(cfg.actor, shape, device=device)

    loss = instantiate(cfg.loss, guider, critic, learner)
    if (adapt_ratio := getattr(loss, "adapt_ratio", None)) is not None:
        adapt_ratio(loss.guider_learner_ratio, torch.ones((), device=device))  # refuses its options before the run
    loss.make_value_estimator(MultiAgentGAE(gamma=cfg.gamma, lmbda=cfg.lmbda, value_network=None))
    compute_loss = torch.compile(loss) if cfg.compile else loss
    optimizer = instantiate(cfg.optimizer, loss.parameters())
    guider_parameters = [*dict.fromkeys([*guider.parameters(), *critic.parameters()])]

    policy = collection_policy(guider, learner)  # only the guider acts; a learner with a memory keeps it up to date
    env, memory = with_recurrent_state(env, policy), guider.memory_keys
    collector = instantiate(cfg.collector, env, policy, frames_per_batch=cfg.frames_per_batch, states=memory)
    num_sequences = sequences_in(cfg.minibatch_size, collector.num_steps)

    run = Run(cfg, env=env, make_env=make_env, actor=learner, shape=shape, loss=loss, optimizer=optimizer)
    for batch in run.batches(collector):
        with torch.no_grad():
            critic.bootstrap(batch)
            loss.value_estimator(batch)
            loss.update_value_norm(batch)
            batch["advantage"] = standardize(batch["advantage"], batch.get((shape.name, "mask")))

        data = batch.select(*loss.in_keys, strict=False)
        phases = (GUIDER_LOSSES, LEARNER_LOSSES) if cfg.guider_first else (GUIDER_LOSSES + LEARNER_LOSSES,)
        for trained in (phase for phase in phases for _ in range(cfg.epochs)):
            if cfg.shuffle_agents:
                order = torch.randperm(shape.num_agents, device=device)
                data[shape.name, "order"] = order.expand(*data.batch_size, -1)
            for minibatch in sequence_minibatches(data, num_sequences, states=memory):
                losses = compute_loss(minibatch)
                sum(value for name, value in losses.items() if name in trained).backward()
                norms = {
                    "grad_norm": torch.nn.utils.clip_grad_norm_(guider_parameters, cfg.max_grad_norm),
                    "learner_grad_norm": torch.nn.utils.clip_grad_norm_(learner.parameters(), cfg.max_grad_norm),
                }
                optimizer.step()
                optimizer.zero_grad()
                run.record({**losses, **norms})
    return run.finish()


if __name__ == "__main__":
    main()
