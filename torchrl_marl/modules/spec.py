"""The sizes and bounds of a group of agents that a network is built from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torchrl.data import Bounded, Categorical, TensorSpec
from torchrl.envs import EnvBase

__all__ = ["GroupSpec", "group_shape"]


@dataclass(frozen=True)
class GroupSpec:
    """Sizes and action bounds of one group of agents, as plain numbers that a checkpoint can store.

    Args:
        name: the group's name, the first part of its keys.
        num_agents: number of agents.
        observation_size: length of one agent's observation.
        num_actions: number of discrete actions; ``None`` if actions are continuous.
        action_low: lower bound of each continuous action; empty if discrete.
        action_high: upper bound of each continuous action; empty if discrete.
        masked: whether the environment writes legal actions under ``(name, "action_mask")``.
        state_size: length of the global ``"state"`` at the root; ``None`` if there is none.
        image: shape of the image that an agent observes, ``[C, H, W]`` or ``[H, W, C]``; ``None`` if there is none.
        image_key: ``"observation"`` if the observation is the image, ``"image"`` if the image is beside it.
    """

    name: str
    num_agents: int
    observation_size: int
    num_actions: int | None = None
    action_low: tuple[float, ...] = ()
    action_high: tuple[float, ...] = ()
    masked: bool = False
    state_size: int | None = None
    image: tuple[int, ...] | None = None
    image_key: str = "observation"

    @classmethod
    def from_env(cls, env: EnvBase, group: str | None = None) -> GroupSpec:
        """Read the shape of a group from an environment's specs.

        Args:
            env: environment with a ``group_map``.
            group: name of the group; optional if the environment has one group.

        Raises:
            ValueError: if the group is unknown or ambiguous, or an MLP does not support its spaces.
        """
        group_map = cast("dict[str, list[str]]", env.group_map)
        groups = list(group_map)
        if group is None and len(groups) != 1:
            raise ValueError(
                f"The environment has the groups {', '.join(groups)}: name one with group=, or train all of them with "
                "a recipe for groups."
            )
        group = groups[0] if group is None else group
        if group not in groups:
            raise ValueError(f"Unknown group {group!r}; the environment has {', '.join(groups)}.")
        observation_spec = env.full_observation_spec_unbatched
        if (group, "observation") not in observation_spec.keys(True, True):
            raise ValueError(f"({group!r}, 'observation') is not in the environment; it has {_keys(observation_spec)}.")
        observation = observation_spec[group, "observation"]
        image_key = "image" if (group, "image") in observation_spec.keys(True, True) else "observation"
        seen = observation_spec[group, image_key]
        image = seen.ndim == 4 and seen.dtype == torch.uint8
        if observation.ndim != 2 and not (image and image_key == "observation"):
            raise ValueError(
                f"An MLP needs observations [agents, size]; {group!r} has {tuple(observation.shape)}. A CNN takes "
                "images [agents, C, H, W] or [agents, H, W, C], which are uint8."
            )
        state = observation_spec["state"] if "state" in observation_spec.keys() else None
        if state is not None and state.ndim != 1:
            raise ValueError(f"An MLP needs a state [size]; the environment's has shape {tuple(state.shape)}.")
        return cls(
            name=group,
            num_agents=len(group_map[group]),
            observation_size=observation.shape[1:].numel(),
            image=tuple(seen.shape[1:]) if image else None,
            image_key=image_key if image else "observation",
            masked=(group, "action_mask") in observation_spec.keys(True, True),
            state_size=None if state is None else state.shape.numel(),
            **_action_space(env.full_action_spec_unbatched[group, "action"]),
        )

    @property
    def settled_entropy(self) -> float:
        """Entropy in nats below which a policy is nearly deterministic.

        Discrete actions: the entropy of 1.01 equally likely actions. Continuous actions: the entropy of a uniform
        distribution over a thousandth of the range of every action.
        """
        if self.num_actions is not None:
            return math.log(1.01)
        ranges = zip(self.action_low, self.action_high, strict=True)
        return sum(math.log((high - low) / 1000) for low, high in ranges)


def group_shape(env: EnvBase | GroupSpec, group: str | None, *, images: bool = False) -> GroupSpec:
    """Return the shape of a group of an environment, or ``env`` itself if it is a shape.

    Raises:
        ValueError: if ``group`` differs from the group of the shape, is not supported (see
            :meth:`GroupSpec.from_env`), or observes images and the network takes vectors (``images`` is off).
    """
    if not isinstance(env, GroupSpec):
        env = GroupSpec.from_env(env, group)
    if env.image is not None and not images:
        raise ValueError(
            f"The agents of {env.name!r} see images {list(env.image)}, which an MLP would flatten to "
            f"{math.prod(env.image):,} numbers: take networks with convolutions, actor=cnn critic=cnn."
        )
    if group not in (None, env.name):
        raise ValueError(f"group={group!r}, but the shape given is that of {env.name!r}.")
    return env


def _action_space(spec: TensorSpec) -> dict[str, Any]:
    if isinstance(spec, Categorical) and spec.ndim == 1:
        return {"num_actions": int(spec.space.n)}
    if isinstance(spec, Bounded) and spec.ndim == 2 and spec.dtype.is_floating_point:
        low, high = spec.space.low, spec.space.high
        if not ((low == low[:1]).all() and (high == high[:1]).all()):
            raise ValueError(
                "The agents of one group must share their action bounds; put other agents into separate groups."
            )
        return {"action_low": tuple(low[0].tolist()), "action_high": tuple(high[0].tolist())}
    raise ValueError(f"Actions must be categorical [agents] or bounded and continuous [agents, size], got {spec}.")


def _keys(spec: TensorSpec) -> str:
    return ", ".join(map(str, spec.keys(True, True)))
