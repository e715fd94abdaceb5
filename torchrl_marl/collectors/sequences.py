"""Whole sequences for policies with a large memory: it is kept where a sequence starts, not at every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type

__all__ = ["SequenceCollector", "sequence_minibatches", "sequences_in"]


class SequenceCollector:
    """Run a policy in an environment without end, and yield ``[num_envs, num_steps]`` steps at a time.

    It does what :class:`torchrl.collectors.Collector` does in one process, but of the entries named in ``states`` it
    keeps only what they were before a batch's first step, as a view for all steps, and nothing under ``"next"``:
    Sable's memory is often a thousand times as large as an observation.

    Args:
        env: environment, which carries the states from step to step.
        policy: what acts, with exploration.
        frames_per_batch: steps of all environments together in a batch, rounded up.
        states: entries of which the first of each batch is kept.

    Example:
        >>> from torchrl_marl.envs import make_env
        >>> from torchrl_marl.modules import make_sable, with_recurrent_state
        >>> env = make_env("balance", num_envs=2, max_steps=5, seed=0)
        >>> actor, critic = make_sable(env)
        >>> env = with_recurrent_state(env, actor)
        >>> collector = SequenceCollector(env, actor, frames_per_batch=12, states=actor.memory_keys)
        >>> next(iter(collector))["agents_encoder_memory"].shape
        torch.Size([2, 6, 1, 1, 64, 64])
    """

    def __init__(
        self, env: EnvBase, policy: TensorDictModuleBase, *, frames_per_batch: int, states: Sequence[NestedKey]
    ) -> None:
        self.env, self.policy = env, policy
        self.num_steps = -(-frames_per_batch // env.batch_size.numel())
        self._states = list(states)
        self._dropped = [*states, *(("next", *((key,) if isinstance(key, str) else key)) for key in states)]
        self._following: TensorDictBase | None = None

    def __iter__(self) -> Iterator[TensorDictBase]:
        while True:
            yield self._collect()

    def reset(self) -> None:
        """Start new episodes in all environments."""
        self._following = self.env.reset()

    def shutdown(self) -> None:
        """Close the environment."""
        if not self.env.is_closed:
            self.env.close()

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
        return batch.update(start.unsqueeze(-1).expand(batch.batch_size))


def sequences_in(minibatch_size: int, num_steps: int) -> int:
    """Return how many whole sequences of ``num_steps`` a minibatch of so many steps holds.

    Raises:
        ValueError: if it holds none.

    Example:
        >>> sequences_in(250, 100)
        2
    """
    if minibatch_size < num_steps:
        raise ValueError(f"minibatch_size must be at least the {num_steps} steps of a sequence; got {minibatch_size}.")
    return minibatch_size // num_steps


def sequence_minibatches(
    batch: TensorDictBase, num_sequences: int, *, states: Sequence[NestedKey] = ()
) -> Iterator[TensorDictBase]:
    """Yield the sequences of a batch ``[B, T]`` once, in random order, ``num_sequences`` at a time.

    Args:
        batch: as :class:`SequenceCollector` yields it.
        num_sequences: sequences of a minibatch; the last one may have fewer.
        states: entries of which only the first of each sequence counts; they are not copied for each step.

    Raises:
        ValueError: if a minibatch would have no sequence.

    Example:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"step": torch.arange(12).reshape(4, 3)}, batch_size=(4, 3))
        >>> sorted(row for minibatch in sequence_minibatches(batch, 2) for row in minibatch["step"].tolist())
        [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    """
    if num_sequences < 1:
        raise ValueError(
            f"A minibatch must have at least one sequence, {batch.shape[1]} steps; got {num_sequences} sequences."
        )
    start, rest = batch.select(*states)[:, 0], batch.exclude(*states)
    for rows in torch.randperm(len(batch), device=batch.device).split(num_sequences):
        yield rest[rows].update(start[rows].unsqueeze(1).expand(len(rows), batch.shape[1]))
