"""What aircraft see, hit and tell each other: cones that are fixed to the airframe, and the geometry of pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from torchrl_marl.envs.games.vectors import Frame, Vector, dot, minus

__all__ = ["SENSORS", "Cone", "Sensors", "Sight", "look", "of_observers"]


class Sight(NamedTuple):
    """Where every aircraft, the first dimension, has every other one, the second, in its own axes, in m and m^2."""

    forward: Tensor
    right: Tensor
    up: Tensor
    squared_distance: Tensor


@dataclass(frozen=True)
class Cone:
    """A field of view or of fire about the nose. It turns with the aircraft: rolled on its side, it is as high as wide.

    Args:
        azimuth: half-angle to the sides, rad, in (0, pi].
        elevation: half-angle upwards and downwards, rad, in (0, pi/2].
        range: m.

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
        """Whether another aircraft is within the angles.

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
        """Whether chance, a number of [0, 1), lets it reach so far: in ``1 - (distance / range)^2`` of all cases."""
        return drawn + squared_distance * self.range**-2 < 1


@dataclass(frozen=True)
class Sensors:
    """What aircraft see, hit and tell each other.

    The paper names these quantities and leaves the values open. Ours make a fight of manoeuvre: the teams meet within
    sight, a head-on pass lasts for about ten shots of which eight must hit, and who comes from behind is seen by nobody
    but the victim's allies.

    Args:
        view: where other aircraft are detected.
        weapons: where enemies that are detected are shot at, the nearest of them, once each step.
        damage: of a hit, as a share of full health, in (0, 1].
        communication_range: m; allies within it tell each other where they are and what they detect.

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
    """Return where all aircraft, with components ``[M, B]``, have each other, ``[M, M, B]``."""
    east, north, up = (part.unsqueeze(0) for part in position)
    apart = minus((east, north, up), of_observers(position))
    forward, right, up = (dot(apart, of_observers(axis)) for axis in frame)
    return Sight(forward, right, up, squared_distance=dot(apart, apart))


def of_observers(vector: Vector) -> Vector:
    """Bring a vector of the observers, with components ``[M, B]``, to pairs, ``[M, 1, B]``."""
    east, north, up = (part.unsqueeze(1) for part in vector)
    return east, north, up
