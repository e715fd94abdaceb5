"""Sensors, weapons and communication of aircraft: cones fixed to the airframe, and the geometry of pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from torchrl_marl.envs.games.vectors import Frame, Vector, dot, minus

__all__ = ["SENSORS", "Cone", "Sensors", "Sight", "look", "of_observers"]


class Sight(NamedTuple):
    """Positions of aircraft (second dimension) in the axes of observers (first dimension), in m and m^2."""

    forward: Tensor
    right: Tensor
    up: Tensor
    squared_distance: Tensor


@dataclass(frozen=True)
class Cone:
    """A field of view or of fire about the nose, which turns and rolls with the aircraft.

    Args:
        azimuth: half-angle to the sides, rad, in (0, pi].
        elevation: half-angle upwards and downwards, rad, in (0, pi/2].
        range: range, m.

    Raises:
        ValueError: if an argument is out of its range.
    """

    azimuth: float
    elevation: float
    range: float

    def __post_init__(self) -> None:
        if not 0 < self.azimuth <= math.pi:
            raise ValueError(f"azimuth must be in (0, pi] rad, got {self.azimuth}")
        if not 0 < self.elevation <= math.pi / 2:
            raise ValueError(f"elevation must be in (0, pi/2] rad, got {self.elevation}")
        if not self.range > 0:
            raise ValueError(f"range must be positive, got {self.range}")

    def holds(self, sight: Sight) -> Tensor:
        """Whether another aircraft is within the cone's angles.

        Example:
            >>> import torch
            >>> ahead, abeam = torch.tensor([100.0, 100.0]), torch.tensor([20.0, 30.0])
            >>> sight = Sight(forward=ahead, right=abeam, up=torch.zeros(2), squared_distance=ahead**2 + abeam**2)
            >>> Cone(azimuth=math.radians(15), elevation=math.radians(10), range=1000.0).holds(sight)
            tensor([ True, False])
        """
        sideways = sight.right.abs() * math.cos(self.azimuth) <= sight.forward * math.sin(self.azimuth)
        return sideways & (sight.up.square() <= math.sin(self.elevation) ** 2 * sight.squared_distance)

    def reaches(self, squared_distance: Tensor, drawn: Tensor) -> Tensor:
        """Whether a detection or shot succeeds, with probability ``1 - (distance / range)^2``; ``drawn`` in [0, 1)."""
        return drawn + squared_distance * self.range**-2 < 1


@dataclass(frozen=True)
class Sensors:
    """Fields of view and fire, damage and communication range of an aircraft.

    The paper names these quantities without values. The values chosen here reward manoeuvring: the teams meet within
    sight, a head-on pass lasts for about ten shots of which eight must hit, and an attacker from behind is seen only by
    the victim's allies.

    Args:
        view: cone in which other aircraft are detected.
        weapons: cone in which the nearest detected enemy is shot at, once per step.
        damage: damage of a hit, as a share of full health, in (0, 1].
        communication_range: m; allies within this range share their positions and detections.

    Raises:
        ValueError: if an argument is out of its range.
    """

    view: Cone = Cone(azimuth=math.radians(70), elevation=math.radians(50), range=8000.0)
    weapons: Cone = Cone(azimuth=math.radians(15), elevation=math.radians(10), range=1000.0)
    damage: float = 1 / 8
    communication_range: float = 4000.0

    def __post_init__(self) -> None:
        if not 0 < self.damage <= 1:
            raise ValueError(f"damage must be in (0, 1], got {self.damage}")
        if self.communication_range < 0:
            raise ValueError(f"communication_range must not be negative, got {self.communication_range}")


SENSORS = Sensors()


def look(position: Vector, frame: Frame) -> Sight:
    """Return the relative positions, ``[M, M, B]``, of all aircraft, with components ``[M, B]``."""
    east, north, up = (part.unsqueeze(0) for part in position)
    apart = minus((east, north, up), of_observers(position))
    forward, right, up = (dot(apart, of_observers(axis)) for axis in frame)
    return Sight(forward, right, up, squared_distance=dot(apart, apart))


def of_observers(vector: Vector) -> Vector:
    """Reshape a vector of the observers, with components ``[M, B]``, for pairs, ``[M, 1, B]``."""
    east, north, up = (part.unsqueeze(1) for part in vector)
    return east, north, up
