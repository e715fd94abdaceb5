"""Spaces of Gymnasium as the tensors of a group of agents."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torchrl.data import Bounded, Categorical, TensorSpec

from torchrl_marl.envs.wrappers.base import actions_like

__all__ = ["AgentSpaces", "Part", "group_agents", "part_of"]


@dataclass(frozen=True)
class AgentSpaces:
    """What one agent sees and does; every step reads what follows from it."""

    observation: Any
    action: Any

    @cached_property
    def masked(self) -> bool:
        """Whether an observation is a dictionary of ``observation`` and ``action_mask``."""
        parts = getattr(self.observation, "spaces", None)
        return isinstance(parts, Mapping) and set(parts) == {"observation", "action_mask"}

    @cached_property
    def seen(self) -> Any:
        """The space of what it sees, without the mask."""
        return self.observation.spaces["observation"] if self.masked else self.observation

    @cached_property
    def image(self) -> str | None:
        """Key of the image in a ``Dict`` of an image and other entries.

        Raises:
            ValueError: if there are several images, or nothing beside an image.
        """
        parts = getattr(self.seen, "spaces", None)
        parts = parts if isinstance(parts, Mapping) else {}
        images = [key for key, space in parts.items() if _is_image(space)]
        if images and (len(images) > 1 or len(parts) == 1):
            raise ValueError(
                "a Dict of observations may hold one image (uint8 in three dimensions) beside other entries; got "
                f"{self.seen}"
            )
        return images[0] if images else None

    @cached_property
    def image_shape(self) -> tuple[int, ...] | None:
        """Shape of the image beside the vector of other entries."""
        return None if self.image is None else tuple(self.seen.spaces[self.image].shape)

    @cached_property
    def vector(self) -> Any:
        """The space of what it sees, without an image beside other entries."""
        if self.image is None:
            return self.seen
        return type(self.seen)({key: space for key, space in self.seen.spaces.items() if key != self.image})

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """``[size]``, or that of an image: ``uint8`` in three dimensions. Anything else is made a vector."""
        space, kind = self.vector, type(self.vector).__name__
        if kind in ("Box", "MultiBinary"):
            return tuple(space.shape) if _is_image(space) else (int(np.prod(space.shape)),)
        gymnasium = sys.modules.get("gymnasium")
        if gymnasium is None or not getattr(space, "is_np_flattenable", False):
            raise ValueError(
                "an agent's observations must be a Box, or a Dict of observation and action_mask, or a space that "
                f"gymnasium.spaces.flatten makes a vector; got {space}"
            )
        return (gymnasium.spaces.flatdim(space),)

    @cached_property
    def num_actions(self) -> int | None:
        """How many discrete actions it has; ``None`` if they are continuous."""
        space, kind = self.action, type(self.action).__name__
        if kind == "Discrete" and getattr(space, "start", 0) == 0:
            return int(space.n)
        if kind == "MultiDiscrete" and space.nvec.ndim == 1:
            return int(np.prod(space.nvec))
        if kind == "Box" and len(space.shape) == 1 and np.isfinite([space.low, space.high]).all():
            return None
        raise ValueError(
            f"an agent's actions must be Discrete from 0, MultiDiscrete, or a bounded Box of one dimension; got {space}"
        )

    def flat(self, view: Any) -> np.ndarray:
        """What the agent sees as a vector, without an image beside other entries."""
        if type(self.seen).__name__ in ("Box", "MultiBinary"):
            return np.ravel(view)
        return sys.modules["gymnasium"].spaces.flatten(self.vector, view)

    def legal(self, mask: Any) -> np.ndarray:
        """Legal choices, ``[num_actions]``: of ``MultiDiscrete`` actions, the combinations of legal components.

        Args:
            mask: legal actions; of ``MultiDiscrete`` a tuple with the mask of each component, or the concatenation.

        Raises:
            ValueError: if the lengths differ from those of the components, or a concatenation could also be a mask of
                all combinations.
        """
        if not hasattr(self.action, "nvec"):
            return np.asarray(mask)
        sizes = self.action.nvec.tolist()
        ambiguous = len(sizes) > 1 and sum(sizes) == self.num_actions  # as many entries as combinations
        parts = mask if isinstance(mask, tuple) else np.split(np.ravel(mask), np.cumsum(sizes)[:-1])
        if [len(part) for part in parts] != sizes or (ambiguous and not isinstance(mask, tuple)):
            how = ", as its entries would also fit all combinations" if ambiguous else " or one after the other"
            raise ValueError(
                f"the action_mask of {self.action} must have a mask for each component, of lengths {sizes}, as a tuple"
                f"{how}; got {mask}"
            )
        return reduce(np.logical_and.outer, parts).ravel()

    def move(self, choice: Any, *, scaled: bool) -> Any:
        """What the environment takes for a network's choice; ``scaled`` if that is from -1 to 1."""
        if hasattr(self.action, "nvec"):
            return np.array(np.unravel_index(choice, self.action.nvec))
        if self.num_actions is not None:
            return choice
        low, high = self.action.low, self.action.high
        choice = choice[: len(low)]
        return (low + (choice + 1) / 2 * (high - low)).astype(np.float32) if scaled else choice


def _is_image(space: Any) -> bool:
    return type(space).__name__ == "Box" and len(space.shape) == 3 and space.dtype == np.uint8


class Part(NamedTuple):
    """What the agents of a group have in common.

    Attributes:
        members: their indices.
        shape: of an observation.
        image: shape of the image beside it, if there is one.
        action_spec: of all of them, ``[n]`` or ``[n, A]``.
        masked: whether they have an action mask.
        scaled: whether actions are from -1 to 1 in place of each agent's own bounds.
    """

    members: list[int]
    shape: tuple[int, ...]
    image: tuple[int, ...] | None
    action_spec: TensorSpec
    masked: bool
    scaled: bool


def part_of(spaces: Sequence[AgentSpaces], members: list[int], *, pad: bool) -> Part:
    """Return the spaces of a group, which are those of the largest where they differ.

    Observations then end in zeros, discrete actions that an agent does not have are masked, and continuous ones are
    from -1 to 1, scaled to each agent's own bounds, with some that have no effect.

    Raises:
        ValueError: if they differ though ``pad`` is off, or are of different kinds, or networks cannot take one.
    """
    own = [spaces[index] for index in members]
    shapes, counts = [one.shape for one in own], [one.num_actions for one in own]
    differ, beside = any(one.action != own[0].action for one in own), {one.image_shape for one in own}
    if not pad and (differ or any((one.shape, one.masked) != (shapes[0], own[0].masked) for one in own)):
        kinds = "; ".join(dict.fromkeys(f"observations {one.observation} with actions {one.action}" for one in own))
        raise ValueError(
            "agents must have equal spaces, or group_by must say what to do: env.group_by=padding (one group), spaces "
            "or name (groups that learn by themselves), or a mapping of agents' names by group; agents "
            f"have {kinds}"
        )
    images, discrete = {shape for shape in shapes if len(shape) > 1}, [count for count in counts if count is not None]
    if (images and len(set(shapes)) > 1) or len(beside) > 1 or len(discrete) not in (0, len(own)):
        raise ValueError(
            "agents can be padded whose actions are all discrete or all continuous and whose images are of one size; "
            f"got observations {[one.image_shape or one.shape for one in own]} and actions "
            f"{[one.action for one in own]}"
        )
    shape = max(shapes)
    if discrete:
        spec: TensorSpec = Categorical(max(discrete), shape=torch.Size([len(own)]))
    elif differ:
        spec = Bounded(-1.0, 1.0, torch.Size([len(own), max(one.action.shape[0] for one in own)]), dtype=torch.float32)
    else:
        spec = actions_like(own[0].action, len(own))
    return Part(members, shape, beside.pop(), spec, any(one.masked for one in own) or len(set(discrete)) > 1, differ)


def group_agents(
    agents: Sequence[str], spaces: Sequence[AgentSpaces], group_by: str | Mapping[str, Sequence[str]] | None
) -> dict[str, list[int]]:
    """Return the indices of each group's agents by its name; there is one group, ``"agents"``, if nothing is asked for.

    Raises:
        ValueError: if ``group_by`` is unknown, or its groups do not hold every agent once.
    """
    if group_by is None or group_by == "padding":
        return {"agents": list(range(len(agents)))}
    if isinstance(group_by, Mapping):
        if sorted(name for members in group_by.values() for name in members) != sorted(agents):
            raise ValueError(f"group_by must hold each of the agents {', '.join(agents)} once; got {dict(group_by)}")
        return {group: [agents.index(name) for name in members] for group, members in group_by.items()}
    if group_by not in ("name", "spaces"):
        raise ValueError(f"group_by must be padding, spaces, name or a mapping of agents by group; got {group_by!r}")
    groups: dict[str, list[int]] = {}
    firsts: list[AgentSpaces] = []
    for index, (name, own) in enumerate(zip(agents, spaces, strict=True)):
        if own not in firsts:
            firsts.append(own)
        label = re.sub(r"_?\d+$", "", name) or name if group_by == "name" else f"agents_{firsts.index(own)}"
        groups.setdefault(label, []).append(index)
    return groups
