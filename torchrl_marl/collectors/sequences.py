"""Whole sequences for policies with a large memory, which is stored only at the start of each sequence."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type

from torchrl_marl.modules.protocols import Remembering

__all__ = ["SequenceCollector"]


class SequenceCollector:
    """Run a policy endlessly in an environment, and yield batches ``[num_envs, num_steps]``.

    The collector equals :class:`torchrl.collectors.Collector` in one process, except for the memory of the policy
    (:class:`~torchrl_marl.modules.protocols.Remembering`): only its values before a batch's first step are stored, as a
    view for all steps, and nothing under ``"next"``. Sable's memory is often a thousand times as large as an
    observation.

    Args:
        env: environment, which carries the states from step to step.
        policy: policy with exploration.
        frames_per_batch: steps of a batch over all environments, rounded up.

    Example:
        >>> from torchrl_marl.envs import make_env
        >>> from torchrl_marl.modules import make_sable, with_recurrent_state
        >>> env = make_env("balance", num_envs=2, max_steps=5, seed=0)
        >>> actor, critic = make_sable(env)
        >>> env = with_recurrent_state(env, actor)
        >>> collector = SequenceCollector(env, actor, frames_per_batch=12)
        >>> next(iter(collector))["agents_encoder_memory"].shape
        torch.Size([2, 6, 1, 1, 64, 64])
    """

    def __init__(self, env: EnvBase, policy: TensorDictModuleBase, *, frames_per_batch: int) -> None:
        self.env, self.policy = env, policy
        self.num_steps = -(-frames_per_batch // env.batch_size.numel())
        self._states = memory_keys(policy)
        following = (("next", *((key,) if isinstance(key, str) else key)) for key in self._states)
        self._dropped = [*self._states, *following]
        self._following: TensorDictBase | None = None

    def __iter__(self) -> Iterator[TensorDictBase]:
        while True:
            yield self._collect()

    def reset(self) -> None:
        """Start new episodes in all environments."""
        self._following = self.env.reset()

    def shutdown(self) -> None:
        """Close the environment."""
        self.env.close(raise_if_closed=False)

    @torch.no_grad()
    def _collect(self) -> TensorDictBase:
        following = self.env.reset() if self._following is None else self._following
        start, steps = following.select(*self._states), []
        with set_exploration_type(ExplorationType.RANDOM):
            for _ in range(self.num_steps):
                step, following = self.env.step_and_maybe_reset(self.policy(following))
                steps.append(step.exclude(*self._dropped))
        self._following = following
        batch = torch.stack(steps, -1)
        batch.names = [*batch.names[:-1], "time"]
        return batch.update(start.unsqueeze(-1).expand(batch.batch_size))


def memory_keys(policy: TensorDictModuleBase) -> list[NestedKey]:
    """Return the entries of a policy's memory that are too large to store at every step."""
    return [key for module in policy.modules() if isinstance(module, Remembering) for key in module.memory_keys]
