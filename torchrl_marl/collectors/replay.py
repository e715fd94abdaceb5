"""Off-policy data: epsilon-greedy actors, and a replay buffer of rows or chunks of consecutive steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictSequential
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import EGreedyModule, ProbabilisticActor, QValueModule

from torchrl_marl.distributed import gather, world_size
from torchrl_marl.objectives.minibatches import split_into_chunks

__all__ = ["ChunkReplayBuffer", "epsilon_greedy"]


class ChunkReplayBuffer:
    """TorchRL's replay buffer for single rows or chunks of consecutive steps, sampled uniformly with replacement.

    Recurrent states are stored only before the first step of each chunk, as replay reads no others: within a chunk,
    episodes start from zeros. The buffer holds the newest ``capacity`` steps and allocates its memory with the first
    batch. Checkpoints include the filled part of the buffer.

    Each process of torchrun stores the batches of all processes, so that the first one's checkpoint is complete, and
    draws its own samples.

    Args:
        keys: entries to store, such as ``loss.in_keys``.
        states: recurrent states among ``keys``, such as ``loss.recurrent_state_keys``.
        capacity: maximum number of steps.
        batch_size: steps of a sample, rounded up to whole chunks.
        chunk_length: steps of a chunk; ``None`` for rows.
        device: device of the buffer.

    Raises:
        ValueError: if the capacity is smaller than a sample.
    """

    def __init__(
        self,
        keys: Sequence[NestedKey],
        states: Sequence[NestedKey] = (),
        *,
        capacity: int,
        batch_size: int,
        chunk_length: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        length = chunk_length or 1
        if states and chunk_length is None:
            raise ValueError("chunk_length must be an integer: a recurrent policy needs consecutive steps; got null.")
        if capacity < max(batch_size, length):
            raise ValueError(
                f"capacity must be at least the {max(batch_size, length)} steps of a sample; got {capacity}."
            )
        storage = LazyTensorStorage(capacity // length, device=device)
        self._buffer = TensorDictReplayBuffer(storage=storage, batch_size=-(-batch_size // length))
        self._keys, self._states, self._chunk_length = list(keys), list(states), chunk_length

    def extend(self, batch: TensorDictBase) -> None:
        """Store a batch ``[*B, T]`` of steps in time order."""
        chunks = split_into_chunks(batch.select(*self._keys, strict=False), self._chunk_length)
        start = {str(number): gather(chunks[key][:, 0]) for number, key in enumerate(self._states)}
        size = [world_size() * len(chunks), *chunks.batch_size[1:]]
        steps = chunks.exclude(*self._states).apply(gather, batch_size=size)
        self._buffer.extend(TensorDict({"steps": steps, "start": start}, batch_size=size[:1]))

    def sample(self) -> TensorDictBase:
        """Draw rows ``[B]``, or chunks ``[B, chunk_length]`` with the states from which they are replayed."""
        drawn = self._buffer.sample()
        steps: TensorDictBase = drawn.get("steps")
        for number, key in enumerate(self._states):
            start = drawn["start", str(number)].unsqueeze(1)
            anew = steps.get("is_init").reshape(*steps.batch_size, *(1 for _ in start.shape[2:]))
            steps.set(key, torch.where(anew, 0.0, start))
        return steps

    def state_dict(self) -> dict[str, Any]:
        """Return the contents, for checkpoints."""
        return self._buffer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the contents."""
        self._buffer.load_state_dict(state_dict)


def epsilon_greedy(actor: ProbabilisticActor, exploration: EGreedyModule) -> TensorDictSequential:
    """Return an epsilon-greedy policy of an actor whose logits are action values.

    Args:
        actor: actor of :func:`~torchrl_marl.modules.make_actor`, for discrete actions.
        exploration: replaces each agent's action with probability epsilon by a random legal action.
    """
    values, mask = actor[-1].in_keys[0], exploration.action_mask_key
    group = values[:-1]
    keys = [exploration.action_key, values, (*group, "chosen_action_value")]
    greedy = QValueModule("categorical", action_value_key=values, action_mask_key=mask, out_keys=keys)
    return TensorDictSequential([actor[:-1], greedy, exploration])
