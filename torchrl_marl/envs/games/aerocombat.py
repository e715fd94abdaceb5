"""AeroCombat: teams of jets fight each other, with sensors and weapons fixed to the airframe."""

from __future__ import annotations

import math
import re
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, pad
from torchrl.data import Bounded

from torchrl_marl.envs.games.aerocombat_picture import draw_combat
from torchrl_marl.envs.games.flight import JET, Aircraft, Angles, Flight, air_density, axes, flight_at, fly
from torchrl_marl.envs.games.rules import Rules, State, TimeLimit
from torchrl_marl.envs.games.sensors import SENSORS, Sensors, look, of_observers
from torchrl_marl.envs.games.streams import draw_uniform
from torchrl_marl.envs.games.tensor_env import GameEnv
from torchrl_marl.envs.games.vectors import Frame, Vector, dot, minus
from torchrl_marl.signatures import hands_on_to

__all__ = ["AeroCombatEnv", "AeroCombatRules", "make_aerocombat"]

_STEP = 0.25  # s, between decisions
_DISTANCE, _ALTITUDE, _SPEED = 5000.0, 3000.0, 180.0  # m, m, m/s: initial values, and the units of observations
_LANE = 400.0  # m, between neighbours at the start
_FAR = 1e12  # m^2, larger than any squared distance
_OWN, _TRACK = 9, 9  # sizes of an observation's entries for the own aircraft and for each other aircraft
_TRAIL = 12  # steps shown in images
_VECTORS = ("position", "direction", "lift_axis")  # fields of Flight stored in the state


@dataclass(eq=False, repr=False)
class AeroCombatRules(Rules):
    """The rules of :class:`AeroCombatEnv`, with the same arguments.

    A state has entries for all aircraft, agents before opponents. Detection is random, so it happens at the end of a
    step and the state stores the result: the observations of agents and of opponents, on which the opponents act.

    Within a step, the first dimension is the aircraft and the last the batch, ``[2N, ..., B]``, ``[2N, 2N, B]`` for
    pairs.
    """

    num_agents: int = 2
    _: KW_ONLY
    aircraft: Aircraft = JET
    sensors: Sensors = SENSORS
    max_steps: int = 240
    time_limit: TimeLimit = "truncate"

    def __post_init__(self) -> None:
        super().__post_init__()
        opponent = torch.arange(2 * self.num_agents) >= self.num_agents
        lane = _LANE * (torch.arange(self.num_agents) - (self.num_agents - 1) / 2)
        self._register_tables(
            oneself=torch.eye(2 * self.num_agents, dtype=torch.bool),
            enemies=opponent != opponent.unsqueeze(-1),
            side=1.0 - 2.0 * opponent,  # 1 agents, -1 opponents
            lane=lane.repeat(2),
        )

    @property
    def action_spec(self) -> Bounded:
        """Ailerons, elevator and throttle of each agent."""
        return Bounded(-1, 1, torch.Size([self.num_agents, 3]), dtype=torch.float32)

    def init_state(self, random: Tensor) -> dict[str, Tensor]:
        """Place the teams abreast and face to face, in level flight, with random offsets and nothing detected."""
        size = 2 * self.num_agents
        stream, drawn = draw_uniform(random, 5 * size)
        east, north, altitude, speed, heading = _batch_last(2 * drawn - 1, 5, size)
        side, lane = self.side.unsqueeze(-1), self.lane.unsqueeze(-1)
        altitude, speed = _ALTITUDE + 500 * altitude, _SPEED + 20 * speed
        position = side * (lane + 100 * east), side * (300 * north - _DISTANCE / 2), altitude
        level = torch.zeros_like(speed)
        heading = math.radians(20) * heading + math.pi / 2 * (1 - side)
        attack = self.aircraft.attack_for(level + 1, air_density(altitude) / 2 * speed.square())
        flight = flight_at(position, speed, attack, Angles(heading, level, level))
        motion, health = _motion(flight, random.shape), level + 1
        own = _batch_first(self._own(flight, axes(flight), health, clock=level[0]), random.shape)
        return {
            "random": stream,
            **motion,
            "health": _batch_first(health, random.shape),
            "target": _batch_first(torch.full_like(level, -1, dtype=torch.int64), random.shape),
            "observation": pad(own, (0, _TRACK * (size - 1))),
            "trail": motion["position"].unsqueeze(-3).repeat_interleave(_TRAIL, -3),
        }

    def transition(self, state: State, action: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Fly, then detect, shoot and report at the new positions."""
        batch, size = state["random"].shape, 2 * self.num_agents
        pursuit = self.pursue(state["observation"][..., self.num_agents :, :])
        controls = _batch_last(torch.cat([action.clamp(-1, 1), pursuit], -2), size, 3)
        aileron, elevator, throttle = controls.unbind(1)
        position, direction, lift_axis = (_vector(_batch_last(state[name], size, 3), 1) for name in _VECTORS)
        speed, attack, before = (_batch_last(state[name], size) for name in ("speed", "attack", "health"))
        flight, duration = Flight(position, direction, lift_axis, speed, attack), _STEP * (before > 0)  # 0 for the dead
        flight = fly(flight, aileron, elevator, (throttle + 1) / 2, duration=duration, aircraft=self.aircraft)
        step = state["step"] + 1
        stream, drawn = draw_uniform(state["random"], size * (size + 1))
        detection, hit = _batch_last(drawn, size + 1, size).split([size, 1])
        health = before * (flight.position[2] > 0)
        clock = (step / self.max_steps).reshape(-1)
        health, target, observation = self._encounter(flight, health, clock, detection, hit.squeeze(0))
        changes = {
            "random": stream,
            **_motion(flight, batch),
            "health": _batch_first(health, batch),
            "target": _batch_first(target, batch),
            "observation": _batch_first(observation, batch),
            "trail": torch.cat([state["trail"][..., 1:, :, :], state["position"].unsqueeze(-3)], -3),
        }
        (ours, theirs), (agents, opponents) = _live(state["health"]), _live(changes["health"])
        over = (agents == 0) | (opponents == 0)
        won = (over | (step >= self.max_steps)) & (agents > opponents)
        return changes, ((theirs - opponents) - (ours - agents)) / self.num_agents + won.float(), over

    def observe(self, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the agents' stored observations; the state has the motion and health of all aircraft."""
        alive = state["health"] > 0
        agents, opponents = _live(state["health"])
        rest = torch.stack([state["speed"] / _SPEED, state["attack"] / self.aircraft.stall_angle, state["health"]], -1)
        motion = torch.cat([state["position"] / _DISTANCE, state["direction"], state["lift_axis"], rest], -1)
        clock = state["step"].unsqueeze(-1) / self.max_steps
        return {
            "observation": state["observation"][..., : self.num_agents, :].clone(),
            "mask": alive[..., : self.num_agents].clone(),
        }, {
            "state": torch.cat([(motion * alive.unsqueeze(-1)).flatten(-2), clock], -1),
            "won": (agents > opponents).unsqueeze(-1),
        }

    def outcome(self, state: State) -> dict[str, Tensor]:
        """Return whether more agents than opponents are alive, and the share of live agents."""
        agents, opponents = _live(state["health"])
        return {"won": agents > opponents, "survivors": agents / self.num_agents}

    def _encounter(
        self, flight: Flight, health: Tensor, clock: Tensor, detection: Tensor, hit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Detect, shoot simultaneously and report; return healths, targets and observations, batch last."""
        sensors, frame = self.sensors, axes(flight)
        sight = look(flight.position, frame)
        enemies, oneself = self.enemies.unsqueeze(-1), self.oneself.unsqueeze(-1)
        absent = _FAR * (health <= 0)
        distance = sight.squared_distance + absent.unsqueeze(0) + absent.unsqueeze(1) + _FAR * oneself

        seen = sensors.view.holds(sight) & sensors.view.reaches(distance, detection)
        aim = torch.where(seen & enemies & sensors.weapons.holds(sight), distance, _FAR)
        nearest, target = aim.min(1)
        target = torch.where(sensors.weapons.reaches(nearest, hit), target, -1)
        numbers = torch.arange(len(target), device=target.device).unsqueeze(-1)
        health = (health - sensors.damage * (target.unsqueeze(1) == numbers).sum(0)).clamp(min=0)
        absent = _FAR * (health <= 0)
        distance = distance + absent.unsqueeze(0) + absent.unsqueeze(1)

        linked = ~enemies & (distance < sensors.communication_range**2)
        seen, linked, distance = (_batch_first(pair, distance.shape[-1:]) for pair in (seen, linked, distance))
        known = seen | linked | (linked.float() @ seen.float() > 0)
        distance, order = torch.where(known, distance, _FAR).sort(-1)
        own = self._own(flight, frame, health, clock) * (health > 0).unsqueeze(1)
        tracks = self._tracks(flight, frame, health, order[..., :-1], distance[..., :-1] < _FAR)
        return health, target, torch.cat([own, tracks.flatten(1, 2)], 1)

    def _own(self, flight: Flight, frame: Frame, health: Tensor, clock: Tensor) -> Tensor:
        """Instruments of every aircraft, ``[2N, 9, B]``; the vertical in the aircraft's axes gives roll and pitch."""
        (_, _, nose_up), (_, _, right_up), (_, _, roof_up) = frame
        attack, speed = flight.attack / self.aircraft.stall_angle, flight.speed / _SPEED
        altitude, clock = flight.position[2] / _ALTITUDE, clock.expand_as(health)
        climb = flight.direction[2]
        return torch.stack([nose_up, right_up, roof_up, attack, climb, speed, altitude, health, clock], 1)

    def _tracks(self, flight: Flight, frame: Frame, health: Tensor, order: Tensor, known: Tensor) -> Tensor:
        """Tracks of the other aircraft in the given order, ``[2N, 9, 2N - 1, B]``; zeros for unknown aircraft."""
        size, batch = health.shape
        side = self.side.unsqueeze(-1)
        east, north, up = (part / self.sensors.view.range for part in flight.position)
        entries = [east, north, up, *flight.direction, flight.speed / _SPEED, health, side.expand_as(health)]
        table = _batch_first(torch.stack(entries, 1), health.shape[1:]).flatten(0, 1)
        rows = order + size * torch.arange(batch, device=order.device)[:, None, None]
        tracks = _batch_last(embedding(rows, table), size, size - 1, _TRACK)
        apart = minus(_vector(tracks[:, :, :3], 2), of_observers((east, north, up)))
        course = _vector(tracks[:, :, 3:6], 2)
        seen = [dot(vector, of_observers(axis)) for vector in (apart, course) for axis in frame]
        speed, health, team = tracks[:, :, 6:].unbind(2)
        known = _batch_last(known.float(), size, size - 1).unsqueeze(1)
        return known * torch.stack([*seen, speed, health, team * side.unsqueeze(-1)], 1)

    def pursue(self, observation: Tensor) -> Tensor:
        """Pursue the nearest known enemy: the opponents' policy, and a baseline for agents.

        The policy rolls the lift axis towards the required turn and pulls up to maximum lift, compensating gravity, at
        full throttle. It turns in search if no enemy is known, and pulls up near the ground.

        Args:
            observation: observation of any aircraft, ``[..., O]``.

        Returns:
            Action, ``[..., 3]``.
        """
        aircraft = self.aircraft
        own, tracks = observation[..., :_OWN], observation[..., _OWN:].unflatten(-1, (_TRACK, -1))
        _, right_up, roof_up, attack, climb, speed, altitude, _, _ = own.unbind(-1)
        attack, speed, altitude = aircraft.stall_angle * attack, (_SPEED * speed).clamp(min=30), _ALTITUDE * altitude
        found, first = (tracks[..., -1, :] < 0).float().max(-1)
        first = first[..., None, None].expand(*first.shape, 3, 1)
        forward, right, up = tracks[..., :3, :].gather(-1, first).squeeze(-1).unbind(-1)
        up = up + forward * attack  # from the nose to the velocity, for small angles

        # Target direction as sines of the angles from the velocity: to the enemy, or a hard turn to an enemy behind; in
        # search, to the horizon and towards the lower wing.
        across = (right.square() + up.square()).sqrt()
        reach = torch.where(forward > 0, (across.square() + forward.square()).sqrt(), across).clamp(min=1e-6)
        found, search = found > 0, -0.1 * right_up.sign()
        right = torch.where(found, right / reach, search * roof_up - climb * right_up)
        up = torch.where(found, up / reach, -search * right_up - climb * roof_up)

        # An angle of attack of this size points the nose there; an additional part carries the weight.
        danger = ((500 - altitude - 4 * speed * climb) / 500).clamp(0, 1)  # from the altitude in four seconds
        weight = aircraft.attack_for(1 + 6 * danger, air_density(altitude) / 2 * speed.square())
        right, up = right * (1 - danger) + weight * right_up, up * (1 - danger) + weight * roof_up
        pull = (right.square() + up.square()).sqrt().clamp(min=1e-6)
        aileron = torch.where(up > 0, right / pull / (aircraft.roll_rate * _STEP), right.sign())
        elevator = (up.clamp(0, aircraft.stall_angle) - attack) / (aircraft.attack_rate * _STEP)
        return torch.stack([aileron.clamp(-1, 1), elevator.clamp(-1, 1), torch.ones_like(aileron)], -1)

    def draw(self, state: State) -> np.ndarray:
        """Draw all aircraft from above and from the side, with cones, trails, hits and health."""
        position, direction, lift_axis = (_vector(state[name], -1) for name in _VECTORS)
        frame = axes(Flight(position, direction, lift_axis, state["speed"], state["attack"]))
        frames = torch.stack([torch.stack(axis, -1) for axis in frame], -2)
        return draw_combat(state, frames, self.sensors, seconds=_STEP * float(state["step"]))


class AeroCombatEnv(GameEnv):
    """Air combat of two teams of jets, N against N, the opponents flown by a pursuit policy.

    Each agent moves ailerons (rate of roll), elevator (rate of the angle of attack) and throttle (thrust) four times a
    second. :mod:`~torchrl_marl.envs.games.flight` has the mechanics: turning costs speed through lift-induced drag,
    altitude and speed are exchanged, wings stall, and turns are coordinated. View and weapons are cones about the nose
    (:class:`Sensors`). An aircraft that hits the ground or has no health left is lost.

    In a step, all aircraft fly, detect, shoot simultaneously and report. An aircraft knows the aircraft that it
    detects, its allies within communication range, and the aircraft that these allies detect. All knowledge is current:
    there is no memory. The weapon fires automatically at the nearest detected enemy within the weapons' cone. The
    probability that detection or a hit fails is the square of the distance over the range.

    The team's reward is 1/N for each opponent lost, -1/N for each agent lost, and 1 for winning: more agents than
    opponents alive at the end of the episode, including the time limit. Returns lie between -1 and 2. An episode ends
    when a team is lost. With ``time_limit="truncate"`` values bootstrap beyond the limit, in addition to a win there.

    The teams start 5 km apart, each a line abreast with 400 m between neighbours, in level flight at about 180 m/s and
    3 km, with nothing detected.

    Reference: the MARS paper, appendix C.1 (AeroJAX), which describes the game in words. All constants are ours, see
    :class:`~torchrl_marl.envs.games.flight.Aircraft` and :class:`Sensors`; so are the opponents' policy, the weapons,
    and the reward values. There is one type of aircraft, so observations do not include the type.

    ==============================  ======================  ============================================================
    key                             shape                   content
    ==============================  ======================  ============================================================
    ``("agents", "observation")``   ``[B, N, 9 + 9 (2N-1)]``  own instruments, then nine rows about the others, below
    ``("agents", "action")``        ``[B, N, 3]``           aileron (right wing down), elevator (nose up), throttle
                                                            (-1 idle, 1 full), each in [-1, 1]
    ``("agents", "mask")``          ``[B, N]``              live agents; observations of dead agents are zeros
    ``"state"``                     ``[B, 24 N + 1]``       motion and health of live aircraft; elapsed share of time
    ``"won"``                       ``[B, 1]``              whether more agents than opponents are alive
    ``("info", "won")``             ``[B, 1]``              the same as a number
    ``("info", "survivors")``       ``[B, 1]``              share of live agents
    ==============================  ======================  ============================================================

    Instruments: the vertical's components along the nose (sine of pitch), to the right (roll) and up; angle of attack
    (1 = stall); sine of the flight-path angle; speed (180 m/s); altitude (3 km); health; elapsed share of the time.
    Rows, with one entry for each known aircraft, nearest first, then zeros: position forward, right and up (view
    ranges); direction of flight, forward, right and up; speed; health; 1 for an ally, -1 for an enemy. All vectors are
    in the observer's axes, so observations do not depend on the orientation of the map.

    ``rules.pursue`` is the opponents' policy, for baselines::

        policy = TensorDictModule(env.rules.pursue, [("agents", "observation")], [("agents", "action")])

    Args:
        num_agents: aircraft on each side, ``N``.
        aircraft: flight characteristics.
        sensors: fields of view and fire, damage and communication range.
        max_steps: time limit of an episode, in steps of a quarter of a second.
        time_limit: how the limit is reported, see :class:`~torchrl_marl.envs.games.rules.Rules`.
        num_envs, seed, device: see :class:`~torchrl_marl.envs.base.BatchOptions`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> env = AeroCombatEnv(2, num_envs=3, seed=0)
        >>> data = env.reset()
        >>> for _ in range(20):
        ...     data["agents", "action"] = env.rules.pursue(data["agents", "observation"])
        ...     data = env.step_mdp(env.step(data))
        >>> data["agents", "observation"].shape, data["agents", "mask"].all()  # nobody is lost in five seconds
        (torch.Size([3, 2, 36]), tensor(True))
    """

    rules_type = AeroCombatRules


def _batch_last(value: Tensor, *shape: int) -> Tensor:
    """``[*B, *shape]`` to ``[*shape, B]``, with a flat batch as the last dimension, for fast broadcasts."""
    return value.reshape(-1, math.prod(shape)).t().contiguous().unflatten(0, shape)


def _batch_first(value: Tensor, batch: torch.Size) -> Tensor:
    """``[..., B]`` to ``[*B, ...]``."""
    return value.flatten(0, -2).t().contiguous().reshape(*batch, *value.shape[:-1])


def _vector(value: Tensor, dim: int) -> Vector:
    east, north, up = value.unbind(dim)
    return east, north, up


def _motion(flight: Flight, batch: torch.Size) -> dict[str, Tensor]:
    vectors = {name: torch.stack(getattr(flight, name), 1) for name in _VECTORS}
    scalars = {"speed": flight.speed, "attack": flight.attack}
    return {name: _batch_first(value, batch) for name, value in (vectors | scalars).items()}


def _live(health: Tensor) -> tuple[Tensor, Tensor]:
    """Number of live agents and opponents."""
    agents, opponents = (health > 0).unflatten(-1, (2, -1)).sum(-1).unbind(-1)
    return agents, opponents


@hands_on_to(AeroCombatEnv)
def make_aerocombat(scenario: str = "AeroCombat-2v2", **options: Any) -> AeroCombatEnv:
    """Build AeroCombat by its name, ``AeroCombat-NvN``, such as AeroCombat-2v2 or AeroCombat-16v16.

    Args:
        scenario: the name.
        options: other arguments of :class:`AeroCombatEnv`.

    Returns:
        The environment.

    Raises:
        ValueError: if the name has another form or an argument is out of its range.

    Example:
        >>> make_aerocombat("AeroCombat-4v4", num_envs=2, seed=0).rules.num_agents
        4
    """
    match = re.fullmatch(r"AeroCombat-(\d+)v(\d+)", scenario)
    if match is None or match[1] != match[2]:
        raise ValueError(f"scenario must be AeroCombat-NvN, such as AeroCombat-2v2; got {scenario!r}")
    return AeroCombatEnv(int(match[1]), **options)
