"""AeroCombat by transitions worked out by hand, by an implementation with plain loops, and by symmetries."""

import math

import pytest
import torch
from tensordict import TensorDict

from torchrl_marl.envs import AeroCombatEnv, make_aerocombat
from torchrl_marl.envs.games.flight import Angles, Flight, angles, axes, flight_at
from torchrl_marl.envs.games.sensors import SENSORS, Cone, Sensors, Sight, look
from torchrl_marl.envs.games.streams import draw_uniform, random_streams

NORTH, EAST, SOUTH = 0.0, math.pi / 2, math.pi
STRAIGHT = torch.tensor([0.0, 0.0, 1.0])


@pytest.fixture
def luck(monkeypatch):
    """Choose what is drawn: 0 detects and hits whatever is possible, 0.999 nothing."""

    def choose(detection, hit):
        def draw(stream, count):
            size = (math.isqrt(4 * count + 1) - 1) // 2  # count = size * (size + 1)
            drawn = torch.full((*stream.shape, count), float(detection))
            drawn[..., size * size :] = hit
            return stream, drawn

        monkeypatch.setattr("torchrl_marl.envs.games.aerocombat.draw_uniform", draw)

    return choose


def rules_of(num_agents, **options):
    return AeroCombatEnv(num_agents, num_envs=1, seed=0, **options).rules


def plane(east=0.0, north=0.0, altitude=3000.0, heading=NORTH, climb=0.0, roll=0.0, speed=180.0, health=1.0):
    return east, north, altitude, heading, climb, roll, speed, health


def scene(rules, *planes, num_envs=None):
    """A state with the given planes, agents first, in trimmed flight, whose opponents have seen nothing yet."""
    batch = () if num_envs is None else (num_envs,)
    state = rules.reset(random_streams(0, num_envs or 1).reshape(batch))
    values = torch.tensor(planes).T
    east, north, altitude, heading, climb, roll, speed, health = values.unbind()
    attack = torch.full_like(speed, 0.05)
    flight = flight_at((east, north, altitude), speed, attack, Angles(heading, climb, roll))
    entries = {name: torch.stack(getattr(flight, name), -1) for name in ("position", "direction", "lift_axis")}
    for name, value in {**entries, "speed": speed, "attack": attack, "health": health}.items():
        state[name] = value.expand(*batch, *value.shape).clone()
    return state


def play(rules, state, *actions):
    """One step in which agents fly straight unless told otherwise; the new state, and what is known of it."""
    chosen = torch.stack(actions) if actions else STRAIGHT.expand(rules.num_agents, 3)
    return rules.step(state, chosen.expand(*state.batch_size, -1, -1))


def tracks(rules, state, observer):
    """What an aircraft knows of the others, a row for each that it knows."""
    rows = state["observation"][..., observer, 9:].unflatten(-1, (9, 2 * rules.num_agents - 1)).T
    return rows[rows[:, -1] != 0]


def knows_enemy(rules, state, observer):
    return bool((tracks(rules, state, observer)[:, -1] < 0).any())


class PlainCombat:
    """Health, target and observation at the end of a step, with loops over aircraft and angles by arctangents."""

    def __init__(self, rules, before, after):
        self.rules, self.sensors, self.n, self.size = rules, rules.sensors, rules.num_agents, 2 * rules.num_agents
        self.drawn = draw_uniform(before["random"], self.size * (self.size + 1))[1].tolist()
        self.state = {name: value.double() for name, value in after.items()}
        self.position, self.direction = self.state["position"], self.state["direction"]
        self.frames = [self.frame(index) for index in range(self.size)]
        health = before["health"].tolist()
        self.health = [health[i] if self.position[i, 2] > 0 else 0.0 for i in range(self.size)]
        self.seen = [[self.sees(i, j) for j in range(self.size)] for i in range(self.size)]
        self.target = [self.shot(i) for i in range(self.size)]
        damage = [self.sensors.damage * self.target.count(j) for j in range(self.size)]
        self.health = [max(0.0, one - other) for one, other in zip(self.health, damage, strict=True)]
        self.observation = torch.stack([self.observe(i) for i in range(self.size)])

    def frame(self, i):
        along, lift, attack = self.direction[i], self.state["lift_axis"][i], self.state["attack"][i]
        nose, roof = attack.cos() * along + attack.sin() * lift, attack.cos() * lift - attack.sin() * along
        return torch.stack([nose, torch.linalg.cross(nose, roof), roof])

    def allied(self, i, j):
        return (i < self.n) == (j < self.n)

    def alive(self, *numbers):
        return all(self.health[i] > 0 for i in numbers)

    def distance(self, i, j):
        return (self.position[j] - self.position[i]).norm().item()

    def within(self, i, j, cone):
        forward, right, up = (self.frames[i] @ (self.position[j] - self.position[i])).tolist()
        azimuth, elevation = math.atan2(right, forward), math.atan2(up, math.hypot(forward, right))
        return abs(azimuth) <= cone.azimuth and abs(elevation) <= cone.elevation

    def chance(self, i, j, cone):
        return 1 - (self.distance(i, j) / cone.range) ** 2

    def sees(self, i, j):
        view = self.sensors.view
        lucky = self.drawn[i * self.size + j] < self.chance(i, j, view)
        return i != j and self.alive(i, j) and self.within(i, j, view) and lucky

    def shot(self, i):
        seen = [j for j in range(self.size) if self.seen[i][j] and not self.allied(i, j)]
        aimed = [j for j in seen if self.within(i, j, self.sensors.weapons)]
        if not aimed:
            return -1
        nearest = min(aimed, key=lambda j: self.distance(i, j))
        lucky = self.drawn[self.size**2 + i] < self.chance(i, nearest, self.sensors.weapons)
        return nearest if lucky else -1

    def linked(self, i):
        others = [k for k in range(self.size) if k != i and self.allied(i, k) and self.alive(k)]
        return [k for k in others if self.distance(i, k) < self.sensors.communication_range]

    def observe(self, i):
        observation = torch.zeros(9 + 9 * (self.size - 1), dtype=torch.float64)
        if not self.alive(i):
            return observation
        speed, attack = self.state["speed"] / 180, self.state["attack"] / math.radians(15)
        clock = self.state["step"] / self.rules.max_steps
        own = [attack[i], self.direction[i, 2], speed[i], self.position[i, 2] / 3000, self.health[i], clock]
        observation[:9] = torch.tensor([*self.frames[i][:, 2], *own])
        told = {j for k in [i, *self.linked(i)] for j in range(self.size) if self.seen[k][j]}
        known = [j for j in told | set(self.linked(i)) if j != i and self.alive(j)]
        for slot, j in enumerate(sorted(known, key=lambda j: self.distance(i, j))):
            place = self.frames[i] @ (self.position[j] - self.position[i]) / self.sensors.view.range
            rest = torch.tensor([speed[j], self.health[j], 1.0 if self.allied(i, j) else -1.0])
            observation[9 + slot :: self.size - 1] = torch.cat([place, self.frames[i] @ self.direction[j], rest])
        return observation


@pytest.mark.parametrize("num_agents", [1, 3])
def test_encounters_are_those_of_a_plain_implementation_with_loops(num_agents):
    env = AeroCombatEnv(num_agents, num_envs=4, seed=1)
    rules, state = env.rules, env.state
    generator = torch.Generator().manual_seed(0)
    hits = losses = 0
    for step in range(220):
        action = rules.pursue(state["observation"][:, :num_agents])
        action[:2] = 2 * torch.rand(2, num_agents, 3, generator=generator) - 1
        before, (state, _) = state, rules.step(state, action)
        if step % 20 and not (state["target"] >= 0).any():
            continue
        for index in range(4):
            plain = PlainCombat(rules, before[index], state[index])
            assert state["health"][index].tolist() == plain.health
            assert state["target"][index].tolist() == plain.target
            torch.testing.assert_close(state["observation"][index].double(), plain.observation, rtol=0, atol=2e-5)
        hits, losses = hits + (state["target"] >= 0).sum(), (state["health"] <= 0).sum()
    assert hits > 30
    assert losses > 2


def test_a_cone_holds_what_lies_within_its_angles():
    generator = torch.Generator().manual_seed(0)
    place = torch.randn(3, 5000, generator=generator, dtype=torch.float64)
    forward, right, up = place
    azimuth, elevation = torch.atan2(right, forward).abs(), torch.atan2(up, torch.hypot(forward, right)).abs()
    for cone in (Cone(0.2, 0.1, 1.0), Cone(1.2, 0.9, 1.0), Cone(2.5, 0.3, 1.0), Cone(math.pi, math.pi / 2, 1.0)):
        holds = cone.holds(Sight(forward, right, up, forward**2 + right**2 + up**2))
        assert torch.equal(holds, (azimuth <= cone.azimuth) & (elevation <= cone.elevation))
    assert holds.all()


@pytest.mark.parametrize(
    ("roll", "pitch", "bearing", "height", "hit"),
    [
        # The weapons reach 15 degrees to the sides and 10 up and down.
        (0, 0, 12, 0, True),
        (0, 0, 0, 12, False),
        (90, 0, 12, 0, False),  # on its side, it is the other way round
        (90, 0, 0, 12, True),
        (0, 5, 0, 12, True),  # nose up
        (0, -5, 0, 8, False),
        (180, 5, 0, 12, False),  # upside down, pulling is down
        (180, 0, 0, -8, True),
        (45, 0, 13, 0, True),
    ],
)
def test_cones_turn_with_roll_and_pitch(roll, pitch, bearing, height, hit):
    zero = torch.zeros(2, 1)
    bearing, height = math.radians(bearing), math.radians(height)
    away = (math.cos(height) * math.sin(bearing), math.cos(height) * math.cos(bearing), math.sin(height))
    position = tuple(torch.tensor([[0.0], [500 * part]]) for part in away)
    angle = Angles(zero, zero, zero + math.radians(roll))
    flight = flight_at(position, zero + 200, zero + math.radians(pitch), angle)
    assert bool(SENSORS.weapons.holds(look(flight.position, axes(flight)))[0, 1, 0]) is hit


def test_detection_fades_with_the_square_of_the_distance():
    rules = rules_of(1)
    for distance, share in ((2000.0, 15 / 16), (4000.0, 3 / 4), (6000.0, 7 / 16), (7900.0, 0.025), (8100.0, 0.0)):
        state = scene(rules, plane(), plane(north=distance), num_envs=20_000)  # one flies ahead, as fast
        state, data = play(rules, state)
        found = (data["agents", "observation"][:, 0, 9:] != 0).any(-1).float().mean().item()
        assert found == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 20_000) + 1e-3)


def test_what_lies_outside_of_the_view_is_not_detected(luck):
    luck(0, 0)
    rules = rules_of(1)
    for bearing, found in ((0, True), (65, True), (-65, True), (75, False), (180, False)):
        east, north = 3000 * math.sin(math.radians(bearing)), 3000 * math.cos(math.radians(bearing))
        state, _ = play(rules, scene(rules, plane(), plane(east, north)))
        assert knows_enemy(rules, state, 0) is found
        state, _ = play(rules, scene(rules, plane(roll=math.pi / 2), plane(east, north)))
        assert knows_enemy(rules, state, 0) is (abs(bearing) < 50)


def test_allies_share_what_they_detect_within_communication_range(luck):
    luck(0, 1)
    rules = rules_of(2)
    enemies = plane(north=6000.0), plane(north=6100.0)
    for apart, told in ((3900.0, True), (4100.0, False)):
        # The second agent flies away from all others.
        state, _ = play(rules, scene(rules, plane(), plane(north=-apart, heading=SOUTH), *enemies))
        assert len(tracks(rules, state, 0)) == (3 if told else 2)
        assert knows_enemy(rules, state, 0)
        assert knows_enemy(rules, state, 1) is told
        assert len(tracks(rules, state, 1)) == (3 if told else 0)


def test_nobody_hears_of_the_dead_or_from_them(luck):
    luck(0, 1)
    rules = rules_of(2)
    enemies = plane(north=6000.0), plane(north=6100.0, health=0.0)
    state, data = play(rules, scene(rules, plane(health=0.0), plane(north=-1000.0, heading=SOUTH), *enemies))
    assert len(tracks(rules, state, 1)) == 0
    assert (data["agents", "observation"][0] == 0).all()
    assert data["agents", "mask"].tolist() == [False, True]
    state, _ = play(rules, scene(rules, plane(), plane(north=-1000.0, heading=SOUTH), *enemies))
    assert len(tracks(rules, state, 1)) == 2  # the ally and the enemy that lives


def test_tracks_are_sorted_by_distance_and_say_whose_they_are(luck):
    luck(0, 1)
    rules = rules_of(2)
    state = scene(
        rules,
        plane(),
        plane(east=1000.0, north=500.0),
        plane(north=3000.0, heading=SOUTH),
        plane(east=200.0, north=2000.0),
    )
    state, _ = play(rules, state)
    rows = tracks(rules, state, 0)
    assert rows[:, -1].tolist() == [1, -1, -1]
    assert (8000 * rows[:, 1]).tolist() == pytest.approx([1000, 200, 0], abs=5)  # to the right
    forward = (8000 * rows[:, 0]).tolist()  # the nose is 0.05 rad above the course; the last one comes towards it
    assert forward == pytest.approx([500, 2000, 3000 - 2 * 45], abs=10)
    assert rows[:, 3].tolist() == pytest.approx([1, 1, -1], abs=0.01)


def test_a_hit_takes_an_eighth_and_the_eighth_kills(luck):
    luck(0, 0)
    rules = rules_of(1)
    state, healths, rewards = scene(rules, plane(), plane(north=500.0)), [], []
    for _ in range(8):
        state, data = play(rules, state)
        healths.append(state["health"].tolist()[1])
        rewards.append(data["agents", "reward"].item())
    assert healths == [0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]
    assert rewards == [0] * 7 + [2]  # the one opponent, and the win
    assert (data["terminated"].item(), data["truncated"].item(), data["won"].item()) == (True, False, True)


def test_hits_fade_with_the_square_of_the_distance(luck):
    rules = rules_of(1)
    for distance, drawn, hit in ((500.0, 0.7, True), (500.0, 0.8, False), (900.0, 0.15, True), (1010.0, 0.0, False)):
        luck(0, drawn)
        state, _ = play(rules, scene(rules, plane(), plane(north=distance)))
        assert state["target"].tolist() == [1 if hit else -1, -1]


def test_weapons_need_detection(luck):
    luck(0.999, 0)
    rules = rules_of(1)
    state, _ = play(rules, scene(rules, plane(), plane(north=500.0)))
    assert state["health"].tolist() == [1, 1]


def test_weapons_hit_the_nearest_enemy_and_no_ally(luck):
    luck(0, 0)
    rules = rules_of(2)
    state, _ = play(rules, scene(rules, plane(), plane(north=200.0), plane(north=900.0), plane(north=600.0)))
    assert state["target"].tolist() == [3, 3, -1, -1]
    assert state["health"].tolist() == [1, 1, 1, 0.75]


def test_shots_are_simultaneous(luck):
    luck(0, 0)
    rules = rules_of(1)
    state, data = play(rules, scene(rules, plane(health=0.1), plane(north=500.0, heading=SOUTH, health=0.1)))
    assert state["health"].tolist() == [0, 0]
    assert data["agents", "reward"].item() == 0
    assert (data["terminated"].item(), data["won"].item()) == (True, False)


def test_the_info_tells_who_won_and_how_many_survive(luck):
    luck(0, 0)
    rules = rules_of(2)
    away, dying = plane(east=9000.0), plane(north=500.0, health=0.1)
    _, data = play(rules, scene(rules, plane(), away, dying, plane(east=-9000.0)))
    assert data["info", "won"].tolist() == [1.0]
    assert data["info", "survivors"].tolist() == [1.0]
    _, data = play(rules, scene(rules, plane(health=0.0), away, plane(north=500.0), plane(east=-9000.0)))
    assert data["info", "won"].tolist() == [0.0]
    assert data["info", "survivors"].tolist() == [0.5]


def test_losses_are_shared_out_over_the_team(luck):
    luck(0, 0)
    rules = rules_of(2)
    away = plane(east=9000.0)
    kill = scene(rules, plane(), away, plane(north=500.0, health=0.1), plane(east=-9000.0))
    death = scene(rules, plane(north=500.0, health=0.1), away, plane(), plane(east=-9000.0))
    for state, reward, mask in ((kill, 0.5, [True, True]), (death, -0.5, [False, True])):
        state, data = play(rules, state)
        assert data["agents", "reward"].flatten().tolist() == [reward] * 2
        assert data["agents", "mask"].tolist() == mask
        assert not data["done"]
        state, data = play(rules, state)  # it is counted once
        assert data["agents", "reward"].flatten().tolist() == [0] * 2


@pytest.mark.parametrize(("index", "reward"), [(0, -0.5), (3, 0.5)])
def test_who_hits_the_ground_is_lost(index, reward):
    rules = rules_of(2)
    planes = [plane(north=6000.0 * number, heading=EAST) for number in range(4)]
    planes[index] = plane(north=6000.0 * index, altitude=10.0, climb=-1.0)
    state, data = play(rules, scene(rules, *planes))
    assert state["health"].tolist() == [float(number != index) for number in range(4)]
    assert data["agents", "reward"].flatten().tolist() == [reward] * 2


@pytest.mark.parametrize("time_limit", ["truncate", "terminate"])
def test_more_agents_than_opponents_win_at_the_limit(time_limit):
    rules = rules_of(2, max_steps=1, time_limit=time_limit)
    far = [plane(north=9000.0 * number, heading=EAST) for number in range(4)]
    for dead, reward in (((), 0), ((2,), 1), ((0,), 0), ((0, 3), 0)):
        planes = [(*flown[:-1], 0.0) if number in dead else flown for number, flown in enumerate(far)]
        _, data = play(rules, scene(rules, *planes))
        assert data["agents", "reward"].flatten().tolist() == [reward] * 2
        assert data["won"].item() is (reward == 1)
        assert data["truncated"].item() is (time_limit == "truncate")
        assert data["terminated"].item() is (time_limit == "terminate")


def test_the_dead_stand_still_and_shoot_at_nobody(luck):
    luck(0, 0)
    rules = rules_of(2)
    state = scene(rules, plane(health=0.0), plane(east=9000.0), plane(north=500.0), plane(north=600.0, health=0.0))
    later, _ = play(rules, state)
    for name in ("position", "direction", "lift_axis", "speed"):
        torch.testing.assert_close(later[name][[0, 3]], state[name][[0, 3]], rtol=0, atol=1e-6)
    assert later["health"].tolist() == [0, 1, 1, 0]
    assert later["target"].tolist() == [-1] * 4
    described = later["position"][1].tolist()
    assert rules.describe(later)["state"].reshape(-1)[:12].tolist() == [0] * 12
    assert rules.describe(later)["state"][12:15].tolist() == pytest.approx([place / 5000 for place in described])


def flight_of(state):
    vectors = [state[name].unbind(-1) for name in ("position", "direction", "lift_axis")]
    return Flight(*vectors, state["speed"], state["attack"])


def test_agents_steer_with_aileron_elevator_and_throttle():
    rules = rules_of(3)
    planes = [plane(east=9000.0 * number) for number in range(6)]
    actions = torch.tensor([[1.0, 0, -1], [0, 0, 1], [-7, 7, -7]])  # the last one is out of range
    before = scene(rules, *planes)
    state, _ = play(rules, before, *actions)
    roll, attack = angles(flight_of(state)).roll, state["attack"] - before["attack"]
    assert roll[:3].tolist() == pytest.approx([math.radians(22.5), 0, -math.radians(22.5)], abs=0.01)
    assert attack[:3].tolist() == pytest.approx([0, 0, math.radians(3)], abs=1e-6)
    # full thrust for a quarter of a second, at 74 % of the density at sea level
    assert (state["speed"][1] - state["speed"][0]).item() == pytest.approx(0.25 * 23_000 / 5000 * 0.742, abs=0.01)


def test_teams_start_face_to_face_in_level_flight():
    env = AeroCombatEnv(4, num_envs=500, seed=0)
    state = env.state
    north, east, altitude = state["position"][..., 1], state["position"][..., 0], state["position"][..., 2]
    assert (north[:, :4] < -2000).all()
    assert (north[:, 4:] > 2000).all()
    assert (east.abs() < 750).all()
    assert ((altitude > 2400) & (altitude < 3600)).all()
    heading = angles(flight_of(state)).heading.abs()
    assert (heading[:, :4] < math.radians(20.1)).all()
    assert (heading[:, 4:] > math.radians(159.9)).all()
    # the teams' starts are one another's image under half a turn
    torch.testing.assert_close(north[:, :4].mean(), -north[:, 4:].mean(), rtol=0.01, atol=0)
    torch.testing.assert_close(altitude[:, :4].std(), altitude[:, 4:].std(), rtol=0.1, atol=0)
    for _ in range(4):
        state, _ = play(env.rules, state)
    assert angles(flight_of(state)).climb[:, :4].abs().max() < math.radians(1)
    torch.testing.assert_close(state["position"][:, :4, 2], altitude[:, :4], rtol=0, atol=2)


def transformed(state, matrix):
    """The world through a matrix, ``[3, 3]``."""
    image = state.clone()
    for name in ("position", "direction", "lift_axis", "trail"):
        image[name] = state[name] @ matrix.T
    return image


def test_turning_the_world_about_the_vertical_changes_no_observation():
    env = AeroCombatEnv(2, num_envs=50, seed=0)
    cos, sin = math.cos(2.0), math.sin(2.0)
    one, other = env.state, transformed(env.state, torch.tensor([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1.0]]))
    for _ in range(60):
        action = env.rules.pursue(one["observation"][:, :2])
        (one, data), (other, turned) = env.rules.step(one, action), env.rules.step(other, action)
        torch.testing.assert_close(turned["agents", "observation"], data["agents", "observation"], rtol=0, atol=2e-3)
        assert torch.equal(turned["agents", "reward"], data["agents", "reward"])


def test_the_mirror_image_of_a_fight_is_a_fight():
    env = AeroCombatEnv(2, num_envs=50, seed=0)
    flip = torch.ones(9 + 27)
    flip[1] = -1  # the vertical's component to the right
    flip[9 + 3 : 9 + 6] = flip[9 + 12 : 9 + 15] = -1  # places and courses to the right
    one, other = env.state, transformed(env.state, torch.diag(torch.tensor([-1.0, 1, 1])))
    other["lift_axis"] = one["lift_axis"] * torch.tensor([-1.0, 1, 1])
    for _ in range(60):
        action = env.rules.pursue(one["observation"][:, :2])
        mirrored = action * torch.tensor([-1.0, 1, 1])
        (one, data), (other, image) = env.rules.step(one, action), env.rules.step(other, mirrored)
        observation = data["agents", "observation"]
        torch.testing.assert_close(image["agents", "observation"], flip * observation, rtol=0, atol=2e-3)
        assert torch.equal(image["agents", "reward"], data["agents", "reward"])


def outcomes(env, policy):
    """Shares of episodes won, lost and drawn."""
    state, agents, opponents = env.state, None, None
    over = torch.zeros(env.batch_size, dtype=torch.bool)
    while not over.all():
        state, data = env.rules.step(state, policy(state))
        live = (state["health"] > 0).unflatten(-1, (2, -1)).sum(-1)
        now = data["done"].squeeze(-1) & ~over
        agents, opponents = (
            torch.where(now, count, kept if kept is not None else count)
            for count, kept in zip(live.unbind(-1), (agents, opponents), strict=True)
        )
        over |= now
    return tuple((relation).float().mean().item() for relation in (agents > opponents, agents < opponents))


def test_pursuit_against_pursuit_wins_as_often_as_it_loses():
    env = AeroCombatEnv(2, num_envs=600, seed=0)
    won, lost = outcomes(env, lambda state: env.rules.pursue(state["observation"][:, :2]))
    assert won + lost > 0.6
    assert won - lost == pytest.approx(0, abs=0.11)  # three standard deviations: 3 sqrt((won + lost) / 600)


def test_pursuit_beats_random_play():
    env = AeroCombatEnv(2, num_envs=200, seed=0)
    generator = torch.Generator().manual_seed(0)
    won, lost = outcomes(env, lambda state: 2 * torch.rand(200, 2, 3, generator=generator) - 1)
    assert lost > 0.9
    assert won < 0.05


def test_pursuit_pulls_up_before_the_ground():
    rules = rules_of(1)
    state = scene(rules, plane(), plane(north=15_000.0, altitude=1500.0, climb=-0.7, roll=2.0, speed=220.0))
    lowest = 1500.0
    for _ in range(120):
        state, _ = play(rules, state)
        lowest = min(lowest, state["position"][1, 2].item())
    assert 50 < lowest < 1500
    assert state["health"][1] == 1


@pytest.mark.parametrize("action", [(1, 1, 1), (-1, 1, -1), (0, -1, 1), (0, 1, -1)])
def test_the_controls_held_at_their_stops_give_finite_numbers(action):
    env = AeroCombatEnv(2, num_envs=8, seed=0)
    state = env.state
    for _ in range(240):
        state, data = env.rules.step(state, torch.tensor(action).float().expand(8, 2, 3))
        assert all(value.isfinite().all() for value in data.values(True, True))
    norm = state["direction"].norm(dim=-1)
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=0, atol=1e-4)


def test_sensors_can_be_chosen():
    sensors = Sensors(view=Cone(0.5, 0.5, 100.0), damage=1.0)
    env = AeroCombatEnv(1, sensors=sensors, num_envs=1, seed=0)
    assert env.rules.sensors.view.range == 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cone(0.0, 1.0, 1.0), r"azimuth must be in \(0, pi\] rad, got 0.0"),
        (lambda: Cone(1.0, 2.0, 1.0), r"elevation must be in \(0, pi/2\] rad, got 2.0"),
        (lambda: Cone(1.0, 1.0, 0.0), "range must be positive, got 0.0"),
        (lambda: Sensors(damage=0.0), r"damage must be in \(0, 1\], got 0.0"),
        (lambda: Sensors(communication_range=-1.0), "communication_range must not be negative, got -1.0"),
        (lambda: AeroCombatEnv(0, num_envs=1), "num_agents must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["4v4", "AeroCombat-2v3", "AeroCombat-2", "aerocombat-2v2"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=f"scenario must be AeroCombat-NvN, .* got '{name}'"):
        make_aerocombat(name, num_envs=1)


@pytest.mark.parametrize("num_agents", [2, 16])
def test_sizes_grow_with_the_teams(num_agents):
    env = make_aerocombat(f"AeroCombat-{num_agents}v{num_agents}", num_envs=2, seed=0)
    data = env.rollout(3)
    assert data["agents", "observation"].shape == (2, 3, num_agents, 9 + 9 * (2 * num_agents - 1))
    assert data["state"].shape == (2, 3, 24 * num_agents + 1)
    assert data["agents", "action"].shape == (2, 3, num_agents, 3)


def test_rules_take_no_batch_at_all():
    rules = rules_of(2)
    state, data = rules.step(rules.reset(random_streams(0, 1)[0]), torch.zeros(2, 3))
    assert isinstance(state, TensorDict)
    assert (state.batch_size, data["agents", "observation"].shape) == ((), (2, 36))
