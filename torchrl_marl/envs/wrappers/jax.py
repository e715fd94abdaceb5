"""Environments written in JAX: batches stepped by one JAX call, with tensors that share JAX's memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorSpec
from typing_extensions import Unpack

from torchrl_marl.envs.base import BatchOptions, spec_of
from torchrl_marl.envs.wrappers.base import WrapperEnv
from torchrl_marl.extras import import_extra

__all__ = ["FIGURE_INCHES", "JaxEnv", "JaxGame", "JaxTask", "game_by_name"]

FIGURE_INCHES = (3.6, 3.6)  # size of the figures that packages draw on


class JaxGame(NamedTuple):
    """One environment as two pure functions of JAX arrays, without automatic reset.

    Attributes:
        agents: names of the ``N`` agents.
        action_spec: ``[N]`` for discrete or ``[N, A]`` for continuous actions.
        reset: function of a random key that returns the state and observed entries: ``observation [N, O]`` and, if
            present, ``action_mask [N, A]``, ``mask [N]``, ``state [S]`` and the episode's current metrics by name,
            ``[1]``.
        step: function of state and actions that returns state, observed entries, rewards ``[N]`` and termination.
        own_rewards: False if all agents get the team's reward.
        draw: function of one environment's state that returns the package's image.
    """

    agents: list[str]
    action_spec: TensorSpec
    reset: Callable[[Any], tuple[Any, dict[str, Any]]]
    step: Callable[[Any, Any], tuple[Any, dict[str, Any], Any, Any]]
    own_rewards: bool
    draw: Callable[[Any], np.ndarray]


class JaxTask(NamedTuple):
    """A family of a package's tasks.

    Attributes:
        written: form of the names, for error messages.
        form: regular expression of the names.
        example: an example of a name.
        build: function of the parts of a name and the builder's other arguments that returns the game.
    """

    written: str
    form: str
    example: str
    build: Callable[..., JaxGame]


def game_by_name(tasks: Sequence[JaxTask], scenario: str, *arguments: Any) -> JaxGame:
    """Build the game whose form matches the name, from the parts of the name and the other arguments.

    Raises:
        ValueError: if no form matches, with the forms and examples.
    """
    for task in tasks:
        if match := re.fullmatch(task.form, scenario):
            return task.build(match, *arguments)
    columns = [task.written for task in tasks], [task.example for task in tasks]
    written, examples = (f"{', '.join(names)} or {last}" for *names, last in columns)
    raise ValueError(f"scenario must be {written}, such as {examples}; got {scenario!r}")


class JaxEnv(WrapperEnv):
    """A batch of one JAX environment: one compiled call per step for all copies.

    A step is one compiled call that returns finished tensors. Another compiled call resets the copies whose episodes
    ended, a sixteenth of the batch at a time. If JAX computes on ``device``, Torch shares the memory of the results: do
    not write into them. The 64 bits of a copy's random stream are a JAX key, which is split in every episode: the first
    half is the new stream, the second the episode's reset key.

    Args:
        game: the environment.
        max_steps: time limit of an episode, reported as truncation.
        shared_reward: whether every agent gets the sum of all agents' rewards; ignored for a reward of the team.
        batch: ``num_envs``, ``seed`` and ``device``, see :class:`~torchrl_marl.envs.base.BatchOptions`.

    Raises:
        ValueError: if ``num_envs`` or ``max_steps`` is below 1.
    """

    def __init__(self, game: JaxGame, *, max_steps: int, shared_reward: bool, **batch: Unpack[BatchOptions]) -> None:
        shared_reward = shared_reward and game.own_rewards
        super().__init__(game.agents, game.action_spec, max_steps=max_steps, shared_reward=shared_reward, **batch)
        self.game = game
        jax = import_extra("jax", "jax")
        self._jax: ModuleType = jax
        self._jax_device = torch.device("cpu" if jax.default_backend() == "cpu" else "cuda")
        self._restart, self._play = jax.jit(self._restarted), jax.jit(self._played)
        nothing = jax.eval_shape(self._begun, jax.ShapeDtypeStruct((batch["num_envs"], 2), "uint32"))
        nothing = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), nothing)
        # State and observed entries of all copies, committed to the device to avoid a second compilation.
        self._shown = jax.device_put(nothing, jax.devices()[0])
        self.observation_spec = spec_of(self._data(self._to_torch(self._shown[1])))

    def _begun(self, keys: Any) -> Any:
        """Initial states and observations of new episodes; keys ``[*, 2]``."""
        jnp = self._jax.numpy
        state, seen = self._jax.vmap(self.game.reset)(keys)
        returns = jnp.zeros((len(keys), len(self.game.agents), 1))
        return state, {**seen, "episode_reward": returns, "step_count": jnp.zeros((len(keys), 1), int)}

    def _restarted(self, keys: Any, which: Any, shown: Any) -> Any:
        """Reset where ``which`` is set, a few copies at a time, as few episodes end in a step and resets are slow."""
        jax, jnp = self._jax, self._jax.numpy
        num_envs = len(which)
        few = -(-num_envs // 16)
        rows = jnp.nonzero(which, size=few * -(-num_envs // few), fill_value=num_envs)[0]

        def some(index: Any, carried: Any) -> Any:
            mine = jax.lax.dynamic_slice(rows, (few * index,), (few,))  # indices beyond the last copy are dropped
            pairs = jax.vmap(jax.random.split)(carried[0][mine])
            return jax.tree.map(
                lambda all_, new: all_.at[mine].set(new.astype(all_.dtype), mode="drop"),
                carried,
                (pairs[:, 0], self._begun(pairs[:, 1])),
            )

        keys = jax.lax.bitcast_convert_type(keys, jnp.uint32)
        keys, shown = jax.lax.fori_loop(0, (which.sum() + few - 1) // few, some, (keys, shown))
        return jax.lax.bitcast_convert_type(keys, jnp.int32), shown

    def _played(self, shown: Any, action: Any) -> Any:
        """Step all copies, and count steps and rewards."""
        before, old = shown
        state, seen, reward, terminated = self._jax.vmap(self.game.step)(before, action)
        state = self._jax.tree.map(lambda new, old: new.astype(old.dtype), state, before)
        outcome = self._outcome(old, seen, reward[..., None], terminated[:, None])
        return (state, {name: outcome.pop(name) for name in old}), outcome

    def _reset_copies(self, where: Tensor, streams: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        keys = streams.view(torch.int32).unflatten(0, (-1, 2))  # a stream's 64 bits are a key of JAX
        keys, self._shown = self._restart(self._to_jax(keys), self._to_jax(where), self._shown)
        return torch.from_dlpack(keys).cpu().view(torch.int64).squeeze(-1), self._to_torch(self._shown[1])

    def _step_copies(self, action: Tensor) -> dict[str, Tensor]:
        action = action if action.is_floating_point() else action.int()  # JAX would copy int64
        self._shown, outcome = self._play(self._shown, self._to_jax(action))
        return self._to_torch({**self._shown[1], **outcome})

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """Step like TorchRL's method, without its general handling of keys, which takes a fifth of a fast step.

        Other entries of the tensordict, such as the policy's outputs, are not carried over to the next step.
        """
        if "next" in tensordict or "_step" in tensordict:
            return super().step_and_maybe_reset(tensordict)
        shown = self._step_copies(self._action(tensordict))
        tensordict["next"] = self._data(shown)
        if shown["done"].any():
            self.streams, begun = self._reset_copies(shown["done"].squeeze(-1).cpu(), self.streams)
            flags = {name: torch.zeros_like(shown[name]) for name in ("done", "terminated", "truncated")}
            return tensordict, self._data(begun | flags)
        return tensordict, self._data({name: value for name, value in shown.items() if name != "reward"})

    def _picture(self, env_index: int) -> np.ndarray:
        return self.game.draw(self._jax.tree.map(lambda leaf: leaf[env_index], self._shown[0]))

    def _to_jax(self, tensor: Tensor) -> Any:
        if self._jax_device.type == "cpu":
            return tensor.cpu().numpy()  # also shares memory, in a tenth of the time of from_dlpack
        return self._jax.numpy.from_dlpack(tensor.to(self._jax_device).contiguous())

    def _to_torch(self, arrays: dict[str, Any]) -> dict[str, Tensor]:
        return {name: torch.from_dlpack(array).to(self.device) for name, array in arrays.items()}
