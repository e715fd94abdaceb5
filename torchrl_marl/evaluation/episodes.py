"""Evaluation episodes of a policy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type

from torchrl_marl.modules import with_recurrent_state

__all__ = ["Episodes", "ended_episode_returns", "episode_returns", "evaluate"]


class Episodes(NamedTuple):
    """Finished episodes, ``E`` of them."""

    returns: Tensor
    """Undiscounted return, mean over agents, ``[E]``."""
    lengths: Tensor
    """Number of steps, ``[E]``."""
    groups: dict[str, Tensor]
    """Undiscounted return of each group, mean over its agents, ``[E]``."""

    def metrics(self) -> dict[str, list[float]]:
        """Lists of one value an episode, by the names under which they are stored."""
        groups = self.groups if len(self.groups) > 1 else {}
        return {
            "return": self.returns.tolist(),
            **{f"return_{group}": returns.tolist() for group, returns in groups.items()},
            "episode_length": self.lengths.tolist(),
        }

    def chunk(self, parts: int) -> list[Episodes]:
        """Cut the episodes into as many equal parts, in order."""
        groups = zip(*(returns.chunk(parts) for returns in self.groups.values()), strict=True)
        own = [dict(zip(self.groups, returns, strict=True)) for returns in groups]
        return [Episodes(*part) for part in zip(self.returns.chunk(parts), self.lengths.chunk(parts), own, strict=True)]


@torch.no_grad()
def evaluate(
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    seed: int | None,
    max_steps: int,
    sampled: bool = False,
) -> Episodes:
    """Play one episode in every copy of an environment.

    It draws random numbers; enclose it in :func:`torchrl_marl.envs.preserve_random_state` during training.

    Args:
        env: batch of environments that count ``(group, "episode_reward")``, as ``make_env`` makes them.
        policy: the policy; if it is recurrent, every episode starts from states of zero.
        seed: of the environments; the same seed gives the same starts. ``None`` leaves their random streams alone.
        max_steps: the longest that an episode can be.
        sampled: sample the policy's actions instead of taking the most likely ones.

    Returns:
        The first episode of every copy.

    Raises:
        ValueError: if an episode does not end within ``max_steps``.
    """
    env = with_recurrent_state(env, policy)
    if seed is not None:
        env.set_seed(seed)
    following, steps = env.reset(), []
    with set_exploration_type(ExplorationType.RANDOM if sampled else ExplorationType.DETERMINISTIC):
        for _ in range(max_steps):  # not env.rollout, which would keep a policy's memory of every step
            data, following = env.step_and_maybe_reset(policy(following))
            groups = group_returns(data)
            steps.append((data["next", "done"].squeeze(-1), episode_returns(data), *groups.values()))
    done, *returns = (torch.stack(entries, -1) for entries in zip(*steps, strict=True))
    if not done.any(-1).all():
        raise ValueError(f"{int((~done.any(-1)).sum())} of {len(done)} episodes did not end within {max_steps} steps.")
    first = done.int().argmax(-1)  # the copies start anew after it
    mean, *own = (values.gather(-1, first.unsqueeze(-1)).squeeze(-1) for values in returns)
    return Episodes(mean, first + 1, dict(zip(groups, own, strict=True)))


def ended_episode_returns(batch: TensorDictBase) -> Tensor:
    """Return the returns of the episodes that end within a batch of training data (some began in an earlier one)."""
    return episode_returns(batch)[batch["next", "done"].squeeze(-1)]


def group_returns(data: TensorDictBase) -> dict[str, Tensor]:
    """Return so far at every step of each group, mean over its agents, of the shape of ``data``."""
    entries = data.get("next").items(True, True)
    return {key[0]: value.mean((-2, -1)) for key, value in entries if key[1:] == ("episode_reward",)}


def episode_returns(data: TensorDictBase) -> Tensor:
    """Return so far at every step, mean over the agents of all groups, of the shape of ``data``."""
    rewards = [value for key, value in data.get("next").items(True, True) if "episode_reward" in key]
    return torch.cat(rewards, -2).mean((-2, -1))
