"""Flight mechanics of a jet as a point mass with attitude: pure functions, any batch, no trigonometry of headings.

Axes are east, north and up. Attitude is given by the velocity and the *lift axis*, a unit vector perpendicular to the
velocity in the aircraft's plane of symmetry. This representation has no singularity, including in loops and vertical
climbs. Turns are coordinated: there is no sideslip, so the nose lies in the plane of the two vectors, at the angle of
attack above the velocity. With lift L, drag D, thrust T, mass m and angle of attack alpha,

    speed'      = (T cos alpha - D) / m - g sin(climb)
    direction'    turns towards the lift axis by (L + T sin alpha) / (m speed), and falls with gravity
    lift axis'    rolls about the direction at the ailerons' rate p and follows the direction by parallel transport.

In terms of angles, these are the equations of motion in wind axes without sideslip:

    climb'   = ((L + T sin alpha) cos(roll) - m g cos(climb)) / (m speed)
    heading' = (L + T sin alpha) sin(roll) / (m speed cos(climb))
    roll'    = p + heading' sin(climb)

For a textbook derivation see Stevens, Lewis and Johnson, Aircraft Control and Simulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchrl_marl.envs.games.vectors import Frame, Vector, cross, dot, plus, scaled, turned

__all__ = ["GRAVITY", "JET", "Aircraft", "Angles", "Flight", "air_density", "angles", "axes", "flight_at", "fly"]

GRAVITY = 9.80665  # m/s^2, standard gravity


@dataclass(frozen=True)
class Aircraft:
    """A light subsonic jet, with figures of the order of magnitude of a trainer such as the BAE Hawk.

    Up to the stall, lift grows with the angle of attack by Helmbold's slope for wings of low aspect ratio; beyond the
    stall, lift falls at the same rate. Drag follows the parabolic polar, beyond the stall with the lift of an attached
    flow.

    Attributes:
        mass: kg, with half of the fuel
        wing_area: m^2
        aspect_ratio: span^2 / area, of a span of 9.4 m
        oswald_efficiency: span efficiency; 0.7 to 0.85 is typical of swept wings
        zero_lift_drag: coefficient; gives a typical top speed of about 290 m/s near the ground
        max_thrust: N at sea level; proportional to air density
        stall_angle: rad
        max_attack: rad
        min_attack: rad
        attack_rate: rad/s at full elevator
        roll_rate: rad/s at full aileron
        load_limit: g; the controls limit lift to this load, and to half of it downwards
    """

    mass: float = 5000.0
    wing_area: float = 16.7
    aspect_ratio: float = 5.3
    oswald_efficiency: float = 0.8
    zero_lift_drag: float = 0.025
    max_thrust: float = 23_000.0
    stall_angle: float = math.radians(15)
    max_attack: float = math.radians(20)
    min_attack: float = math.radians(-5)
    attack_rate: float = math.radians(12)
    roll_rate: float = math.radians(90)
    load_limit: float = 8.0

    @property
    def lift_slope(self) -> float:
        """Change of the lift coefficient with the angle of attack, 1/rad: Helmbold's formula for an unswept wing."""
        return 2 * math.pi * self.aspect_ratio / (2 + math.hypot(self.aspect_ratio, 2))

    @property
    def induced_drag(self) -> float:
        """Factor ``k`` of the squared lift coefficient in the drag polar."""
        return 1 / (math.pi * self.oswald_efficiency * self.aspect_ratio)

    def lift_coefficient(self, attack: Tensor) -> Tensor:
        """``a alpha`` up to the stall, falling at the same rate beyond it.

        Example:
            >>> JET.lift_coefficient(torch.tensor([0.0, 5.0, 15.0, 20.0]).deg2rad())
            tensor([0.0000, 0.3791, 1.1374, 0.7583])
        """
        return self.lift_slope * (self.stall_angle - (self.stall_angle - attack).abs())

    def drag_coefficient(self, attack: Tensor) -> Tensor:
        """``C_D0 + k (a alpha)^2``: the polar ``C_D0 + k C_L^2`` up to the stall, more drag beyond it."""
        return self.zero_lift_drag + self.induced_drag * self.lift_slope**2 * attack.square()

    def attack_for(self, load: Tensor, pressure: Tensor) -> Tensor:
        """Return the angle of attack, rad, with a lift of ``load`` times the weight, ignoring the stall.

        Args:
            load: load, g.
            pressure: dynamic pressure, Pa.
        """
        return load * (self.mass * GRAVITY / (self.wing_area * self.lift_slope)) / pressure


JET = Aircraft()


class Flight(NamedTuple):
    """The motion of aircraft; every tensor of the same shape.

    Attributes:
        position: east, north and altitude, m
        direction: unit vector of the velocity
        lift_axis: unit vector perpendicular to the direction
        speed: m/s
        attack: angle of attack, rad
    """

    position: Vector
    direction: Vector
    lift_axis: Vector
    speed: Tensor
    attack: Tensor


class Angles(NamedTuple):
    """The usual angles of a flight, rad.

    Attributes:
        heading: heading of the velocity, from north to east
        climb: flight-path angle, from the horizon upwards
        roll: bank about the velocity, right wing down
    """

    heading: Tensor
    climb: Tensor
    roll: Tensor


def air_density(altitude: Tensor) -> Tensor:
    """Density of the standard atmosphere, kg/m^3: the troposphere of ISO 2533, continued upwards.

    The exponent 4.256 is rounded to 4 1/4, which needs only square roots; the error is below 0.2 % up to 11 km.

    Args:
        altitude: m.

    Example:
        >>> air_density(torch.tensor([0.0, 5000.0, 10000.0]))
        tensor([1.2250, 0.7366, 0.4133])
    """
    temperature = (1 - 0.0065 / 288.15 * altitude).clamp(min=0.01)  # relative to sea level
    return 1.225 * temperature.square().square() * temperature.sqrt().sqrt()


def fly(
    flight: Flight,
    aileron: Tensor,
    elevator: Tensor,
    throttle: Tensor,
    *,
    duration: Tensor | float,
    aircraft: Aircraft = JET,
) -> Flight:
    """Integrate the flight with constant controls.

    The integrator is Strang splitting, of second order in the duration: half of the free fall, the aerodynamic forces,
    the other half. Free fall is an exact parabola, lift an exact rotation, and drag alone is solved exactly: without
    thrust, energy cannot grow for any step size.

    Args:
        flight: current flight.
        aileron: roll rate, -1 (left) to 1 (right), as a share of the maximum rate.
        elevator: rate of the angle of attack, -1 (down) to 1 (up), as a share of the maximum rate.
        throttle: thrust, 0 to 1.
        duration: s; zero leaves an aircraft unchanged.
        aircraft: flight characteristics.

    Returns:
        The flight after ``duration``.
    """
    return _fall(_steer(_fall(flight, duration / 2), aileron, elevator, throttle, duration, aircraft), duration / 2)


def _fall(flight: Flight, duration: Tensor | float) -> Flight:
    """Free fall; the lift axis follows the direction by parallel transport."""
    east, north, up = before = scaled(flight.speed, flight.direction)
    after = (east, north, up - GRAVITY * duration)
    speed = dot(after, after).sqrt().clamp(min=1e-3)
    direction = scaled(1 / speed, after)
    # The rotation that takes the direction u to w takes l, perpendicular to u, to l - (l.w) (u + w) / (1 + u.w).
    turn = dot(flight.lift_axis, direction) / (1 + dot(flight.direction, direction)).clamp(min=1e-6)
    return Flight(
        position=plus(flight.position, scaled(duration / 2, plus(before, after))),
        direction=direction,
        lift_axis=plus(flight.lift_axis, scaled(-turn, plus(flight.direction, direction))),
        speed=speed,
        attack=flight.attack,
    )


def _steer(
    flight: Flight, aileron: Tensor, elevator: Tensor, throttle: Tensor, duration: Tensor | float, aircraft: Aircraft
) -> Flight:
    """Roll, lift, drag and thrust at a fixed position: half of roll and drag, the lift, the other halves."""
    density = air_density(flight.position[2])
    limit = aircraft.attack_for(torch.full_like(density, aircraft.load_limit), density / 2 * flight.speed.square())
    low, high = (-limit / 2).clamp(min=aircraft.min_attack), limit.clamp(max=aircraft.max_attack)
    change = aircraft.attack_rate * duration / 2 * elevator
    attack = (flight.attack + change).maximum(low).minimum(high)
    per_mass = density * (aircraft.wing_area / (2 * aircraft.mass))  # force / (coefficient speed^2 mass), 1/m
    thrust = throttle * density * (aircraft.max_thrust / (1.225 * aircraft.mass))  # m/s^2
    push, drag = thrust * attack.cos(), per_mass * aircraft.drag_coefficient(attack)

    middle = _decelerated(flight.speed, push, drag, duration / 2)
    turn = duration * (per_mass * aircraft.lift_coefficient(attack) * middle + thrust * attack.sin() / middle)
    speed = _decelerated(middle, push, drag, duration / 2)

    roll = aircraft.roll_rate * duration / 2 * aileron
    cos_roll, sin_roll, cos_turn, sin_turn = roll.cos(), roll.sin(), turn.cos(), turn.sin()
    right = cross(flight.direction, flight.lift_axis)
    lift_axis, right = turned(flight.lift_axis, right, cos_roll, sin_roll)
    direction, lift_axis = turned(flight.direction, lift_axis, cos_turn, sin_turn)
    lift_axis, _ = turned(lift_axis, right, cos_roll, sin_roll)
    attack = (flight.attack + 2 * change).maximum(low).minimum(high)
    return Flight(flight.position, direction, lift_axis, speed, attack)


def _decelerated(speed: Tensor, push: Tensor, drag: Tensor, duration: Tensor | float) -> Tensor:
    """Solve ``speed' = push - drag speed^2`` to second order, and exactly without push."""
    return ((speed + duration * push) / (1 + duration * drag * speed)).clamp(min=1e-3)


def axes(flight: Flight) -> Frame:
    """Return the aircraft's axes."""
    nose, roof = turned(flight.direction, flight.lift_axis, flight.attack.cos(), flight.attack.sin())
    return nose, cross(flight.direction, flight.lift_axis), roof


def angles(flight: Flight) -> Angles:
    """Return heading, climb and roll."""
    east, north, up = flight.direction
    _, _, right_up = cross(flight.direction, flight.lift_axis)
    return Angles(torch.atan2(east, north), up.clamp(-1, 1).asin(), torch.atan2(-right_up, flight.lift_axis[2]))


def flight_at(position: Vector, speed: Tensor, attack: Tensor, angles: Angles) -> Flight:
    """Return the flight with the given angles.

    Example:
        >>> zero, eighth = torch.zeros(1), torch.full((1,), math.pi / 4)
        >>> flight = flight_at((zero, zero, zero), zero + 200, zero, Angles(heading=zero, climb=zero, roll=eighth))
        >>> flight.direction, flight.lift_axis  # to the north, the right wing down
        ((tensor([0.]), tensor([1.]), tensor([0.])), (tensor([0.7071]), tensor([0.]), tensor([0.7071])))
    """
    (heading, climb, roll), zero = angles, torch.zeros_like(speed)
    forward = (heading.sin(), heading.cos(), zero)
    right = (heading.cos(), -heading.sin(), zero)
    direction, lift_axis = turned(forward, (zero, zero, zero + 1), climb.cos(), climb.sin())
    lift_axis, _ = turned(lift_axis, right, roll.cos(), roll.sin())
    return Flight(position, direction, lift_axis, speed, attack)
