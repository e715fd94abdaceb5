"""Evaluation episodes of a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type

from torchrl_marl.modules import with_recurrent_state

__all__ = ["Episodes", "ended_episode_returns", "episode_returns", "evaluate"]


class Episodes(NamedTuple):
    """``E`` finished episodes."""

    returns: Tensor
    """Undiscounted return, mean over agents, ``[E]``."""
    lengths: Tensor
    """Number of steps, ``[E]``."""
    groups: dict[str, Tensor]
    """Undiscounted return of each group, mean over its agents, ``[E]``."""
    info: dict[str, Tensor] = {}  # noqa: RUF012 (a NamedTuple's default)
    """Further numbers that the environment reports for each episode, such as ``win_rate`` (0 or 1), ``[E]``."""

    def metrics(self) -> dict[str, list[float]]:
        """Lists with one value per episode, by the names under which they are stored."""
        groups = self.groups if len(self.groups) > 1 else {}
        named = {"return": self.returns, **{f"return_{group}": returns for group, returns in groups.items()}}
        named |= {"episode_length": self.lengths}
        return {name: values.tolist() for name, values in (self.info | named).items()}

    @staticmethod
    def joined(parts: Sequence[Episodes]) -> Episodes:
        """Return the episodes of several batches, in order."""

        def join(values: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([own[name] for own in values]) for name in values[0]}

        returns, lengths, groups, info = zip(*parts, strict=True)
        return Episodes(torch.cat(returns), torch.cat(lengths), join(groups), join(info))

    def chunk(self, parts: int) -> list[Episodes]:
        """Split the episodes into ``parts`` equal parts, in order."""

        def cut(values: dict[str, Tensor]) -> list[dict[str, Tensor]]:
            return [{name: value.chunk(parts)[part] for name, value in values.items()} for part in range(parts)]

        own = zip(self.returns.chunk(parts), self.lengths.chunk(parts), cut(self.groups), cut(self.info), strict=True)
        return [Episodes(*part) for part in own]


@torch.no_grad()
def evaluate(
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    seed: int | None,
    max_steps: int,
    sampled: bool = False,
    after_step: Callable[[], object] = lambda: None,
) -> Episodes:
    """Play one episode in every copy of an environment.

    The function draws random numbers; call it under :func:`torchrl_marl.envs.preserve_random_state` during training.

    Args:
        env: batch of environments with ``(group, "episode_reward")``, such as those of ``make_env``. Entries of
            ``("next", "info")`` are read at the last step of an episode.
        policy: the policy; recurrent states start from zero in every episode.
        seed: seed of the environments; the same seed gives the same initial states. ``None`` keeps the random streams.
        max_steps: maximum length of an episode.
        sampled: sample the policy's actions instead of taking the most likely ones.
        after_step: is called after each of the ``max_steps`` steps, as ``tqdm.update``.

    Returns:
        The first episode of every copy.

    Raises:
        ValueError: if an episode does not end within ``max_steps``.
    """
    env = with_recurrent_state(env, policy)
    if seed is not None:
        env.set_seed(seed)
    following, steps = env.reset(), []
    ended = torch.zeros(env.batch_size, dtype=torch.bool, device=following.device)
    with set_exploration_type(ExplorationType.RANDOM if sampled else ExplorationType.DETERMINISTIC):
        for _ in range(max_steps):  # env.rollout would store a policy's memory at every step
            data, following = env.step_and_maybe_reset(policy(following))
            steps.append(so_far(data))
            after_step()
            ended |= steps[-1]["done"]
            if ended.all():
                break
    return first_episodes(torch.stack(steps, -1))


def so_far(data: TensorDictBase) -> TensorDict:
    """Return what is known of the episodes at every step, and whether they are done, with the shape of ``data``."""
    own = {"returns": episode_returns(data), "groups": group_returns(data), "info": episode_info(data)}
    return TensorDict({"done": data["next", "done"].squeeze(-1), **own}, data.batch_size)


def first_episodes(steps: Any) -> Episodes:
    """Return the first episode of every copy from :func:`so_far` of its steps, ``[E, T]``.

    Raises:
        ValueError: if an episode does not end.
    """
    done = steps["done"]
    if endless := int((~done.any(-1)).sum()):
        raise ValueError(f"{endless} of {len(done)} episodes did not end within {done.shape[-1]} steps.")
    first = done.int().argmax(-1)  # environments restart after their first episode
    ends = steps[torch.arange(len(first), device=first.device), first]
    return Episodes(ends["returns"], first + 1, ends["groups"].to_dict(), ends["info"].to_dict())


def ended_episode_returns(batch: TensorDictBase) -> Tensor:
    """Return the returns of episodes that end within a batch of training data, including steps of earlier batches."""
    return episode_returns(batch)[batch["next", "done"].squeeze(-1)]


def group_returns(data: TensorDictBase) -> dict[str, Tensor]:
    """Cumulative return at every step of each group, mean over its agents, with the shape of ``data``."""
    entries = data.get("next").items(True, True)
    return {key[0]: value.mean((-2, -1)) for key, value in entries if key[1:] == ("episode_reward",)}


def episode_info(data: TensorDictBase) -> dict[str, Tensor]:
    """Return the numbers that an environment reports in ``("next", "info")``, with the shape of ``data``.

    Entries that are not one number per environment are left out. ``"won"`` becomes ``"win_rate"``.
    """
    entries = data.get(("next", "info"), TensorDict()).items()
    size = data.batch_size
    numbers = {name: value.reshape(size).float() for name, value in entries if value.numel() == size.numel()}
    return {"win_rate" if name == "won" else name: value for name, value in numbers.items()}


def episode_returns(data: TensorDictBase) -> Tensor:
    """Cumulative return at every step, mean over the agents of all groups, with the shape of ``data``."""
    rewards = [value for key, value in data.get("next").items(True, True) if "episode_reward" in key]
    return torch.cat(rewards, -2).mean((-2, -1))
