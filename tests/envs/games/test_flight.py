"""Flight mechanics by closed forms, conservation laws, symmetries and an independent integration of Euler's angles."""

import math

import pytest
import torch

from torchrl_marl.envs.games.flight import GRAVITY, JET, Angles, air_density, angles, axes, dot, flight_at, fly


def some_flights(count=200, seed=0, **fixed):
    """Flights all over the envelope, in double precision, and controls."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(name, low, high):
        drawn = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
        return torch.full_like(drawn, fixed[name]) if name in fixed else drawn

    flight = flight_at(
        (uniform("east", -3e3, 3e3), uniform("north", -3e3, 3e3), uniform("altitude", 100.0, 9e3)),
        uniform("speed", 60.0, 300.0),
        uniform("attack", math.radians(-4), math.radians(20)),
        Angles(uniform("heading", -3.1, 3.1), uniform("climb", -1.4, 1.4), uniform("roll", -3.1, 3.1)),
    )
    controls = uniform("aileron", -1, 1), uniform("elevator", -1, 1), uniform("throttle", 0, 1)
    return flight, controls


def energy(flight):
    """Mechanical energy, J/kg."""
    return flight.speed.square() / 2 + GRAVITY * flight.position[2]


def flown(flight, controls, duration, steps):
    for _ in range(steps):
        flight = fly(flight, *controls, duration=duration / steps)
    return flight


def everything(flight):
    return torch.stack([*flight.position, *flight.direction, *flight.lift_axis, flight.speed, flight.attack])


@pytest.mark.parametrize("duration", [0.05, 0.25, 2.0])
def test_energy_never_grows_without_thrust(duration):
    flight, controls = some_flights(throttle=0.0)
    for _ in range(100):
        before, flight = energy(flight), fly(flight, *controls, duration=duration)
        assert (energy(flight) < before).all()


def test_energy_changes_by_the_work_of_thrust_and_drag():
    flight, (_, _, throttle) = some_flights(elevator=0.0, speed=150.0, attack=0.1)
    idle, duration = torch.zeros_like(throttle), 1e-3
    after = fly(flight, idle, idle, throttle, duration=duration)
    density = air_density(flight.position[2])
    thrust = throttle * 23_000 * density / 1.225
    slope = 2 * math.pi * 5.3 / (2 + math.sqrt(5.3**2 + 4))
    drag = density / 2 * 150**2 * 16.7 * (0.025 + (slope * 0.1) ** 2 / (math.pi * 0.8 * 5.3))
    power = (thrust * math.cos(0.1) - drag) * 150 / 5000
    torch.testing.assert_close((energy(after) - energy(flight)) / duration, power, rtol=1e-3, atol=0.02)


def test_drag_is_the_parabolic_polar_up_to_the_stall_and_more_beyond():
    attack = torch.linspace(-5, 20, 101, dtype=torch.float64).deg2rad()
    lift, drag = JET.lift_coefficient(attack), JET.drag_coefficient(attack)
    polar = 0.025 + lift**2 / (math.pi * 0.8 * 5.3)
    attached = attack <= math.radians(15)
    torch.testing.assert_close(drag[attached], polar[attached])
    assert (drag[~attached] > polar[~attached] + 1e-3).all()
    assert (drag.diff()[attack[1:] > 0] > 0).all()


def test_stall_limits_lift():
    attack = torch.linspace(-5, 20, 2501, dtype=torch.float64).deg2rad()
    lift = JET.lift_coefficient(attack)
    assert attack[lift.argmax()].rad2deg().item() == pytest.approx(15)
    # Stall speed in level flight, m g = rho V^2 S C_L / 2, without thrust: at 70 m/s the wings carry, at 60 not.
    stall_speed = math.sqrt(2 * 5000 * GRAVITY / (1.225 * 16.7 * lift.max().item()))
    assert 60 < stall_speed < 70
    zero = torch.zeros(2, dtype=torch.float64)
    level = Angles(zero, zero, zero)
    speed, attack = torch.tensor([60.0, 70.0]).double(), zero + math.radians(15)
    flight = fly(flight_at((zero, zero, zero), speed, attack, level), zero, zero, zero, duration=1e-3)
    assert (angles(flight).climb > 0).tolist() == [False, True]


def test_lift_stays_below_the_load_limit():
    flight, _ = some_flights(altitude=0.0, climb=0.0, roll=0.0, attack=0.0, speed=300.0)
    zero, full = torch.zeros_like(flight.speed), torch.ones_like(flight.speed)
    for _ in range(30):
        before, flight = flight, fly(flight, zero, full, zero, duration=0.05)
    turn = torch.stack(flight.direction) - torch.stack(before.direction)
    load = turn.norm(dim=0) / 0.05 * flight.speed / GRAVITY
    assert (load < 9.1).all()  # 8 g of lift and at most 1 g of weight
    assert (load > 6).all()


def steady_turn(speed, bank, altitude=1000.0):
    """A level turn: lift and thrust carry the weight over cos(bank), thrust balances drag."""
    weight, density = JET.mass * GRAVITY, air_density(torch.tensor(altitude).double())
    pressure_area = density / 2 * speed**2 * JET.wing_area
    attack = torch.zeros((), dtype=torch.float64)
    for _ in range(200):  # fixed point of T = D / cos alpha and L = W / cos(bank) - T sin alpha
        thrust = pressure_area * JET.drag_coefficient(attack) / attack.cos()
        attack = (weight / math.cos(bank) - thrust * attack.sin()) / (pressure_area * JET.lift_slope)
    throttle = thrust / (JET.max_thrust * density / 1.225)
    assert throttle < 1
    zero = torch.zeros((), dtype=torch.float64)
    start = Angles(heading=zero + 0.3, climb=zero, roll=zero + bank)
    flight = flight_at((zero, zero, zero + altitude), zero + speed, attack, start)
    return flight, (zero, zero, throttle)


@pytest.mark.parametrize("speed", [100.0, 150.0, 220.0])
def test_trimmed_level_flight_holds_altitude_heading_and_speed(speed):
    flight, controls = steady_turn(speed, bank=0.0)
    later = flown(flight, controls, duration=60.0, steps=240)
    assert later.position[2].item() == pytest.approx(1000, abs=0.5)
    assert later.speed.item() == pytest.approx(speed, rel=1e-4)
    assert angles(later).heading.item() == pytest.approx(0.3, abs=1e-9)
    travelled = math.hypot(later.position[0].item(), later.position[1].item())
    assert travelled == pytest.approx(60 * speed, rel=1e-4)


@pytest.mark.parametrize(("speed", "bank"), [(120.0, 0.5), (180.0, 1.0), (180.0, -1.0), (220.0, 1.3)])
def test_a_coordinated_level_turn_has_the_rate_g_tan_bank_over_speed(speed, bank):
    flight, controls = steady_turn(speed, bank)
    later = flown(flight, controls, duration=4.0, steps=80)
    turned = (angles(later).heading - angles(flight).heading).item()
    assert math.remainder(turned - 4 * GRAVITY * math.tan(bank) / speed, 2 * math.pi) == pytest.approx(0, abs=2e-3)
    assert later.position[2].item() == pytest.approx(1000, abs=0.5)
    assert angles(later).roll.item() == pytest.approx(bank, abs=2e-3)


def euler_derivative(state, aileron, throttle):
    """The equations of motion in wind axes by heading, climb and roll: an implementation of its own."""
    _, _, altitude, speed, heading, climb, roll, attack = state
    density = 1.225 * (1 - 0.0065 * altitude / 288.15) ** 4.25
    slope = 2 * math.pi * 5.3 / (2 + math.sqrt(5.3**2 + 4))
    lift = density / 2 * speed**2 * 16.7 * slope * attack
    drag = density / 2 * speed**2 * 16.7 * (0.025 + (slope * attack) ** 2 / (math.pi * 0.8 * 5.3))
    thrust = throttle * 23_000 * density / 1.225
    across = (lift + thrust * torch.sin(attack)) / (5000 * speed)
    turn = across * torch.sin(roll) / torch.cos(climb)
    return torch.stack(
        [
            speed * torch.cos(climb) * torch.sin(heading),
            speed * torch.cos(climb) * torch.cos(heading),
            speed * torch.sin(climb),
            (thrust * torch.cos(attack) - drag) / 5000 - 9.80665 * torch.sin(climb),
            turn,
            across * torch.cos(roll) - 9.80665 / speed * torch.cos(climb),
            math.pi / 2 * aileron + turn * torch.sin(climb),
            torch.zeros_like(attack),
        ]
    )


def test_flight_solves_the_equations_of_motion_in_heading_climb_and_roll():
    envelope = {"elevator": 0.0, "speed": 160.0, "altitude": 2000.0}
    flight, controls = some_flights(**envelope)
    mild = (angles(flight).climb.abs() < 0.9) & (flight.attack < 0.15) & (flight.attack > 0)
    flight, controls = type(flight)(*[pick(part, mild) for part in flight]), [control[mild] for control in controls]
    state = torch.stack([*flight.position, flight.speed, *angles(flight), flight.attack])
    steps, duration = 2000, 2.0
    for _ in range(steps):  # Runge and Kutta's classic
        k1 = euler_derivative(state, controls[0], controls[2])
        k2 = euler_derivative(state + duration / steps / 2 * k1, controls[0], controls[2])
        k3 = euler_derivative(state + duration / steps / 2 * k2, controls[0], controls[2])
        k4 = euler_derivative(state + duration / steps * k3, controls[0], controls[2])
        state = state + duration / steps / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    regular = (state[5].abs() < 1.4) & mild[mild]
    assert regular.sum() > 20
    expected = flight_at(tuple(state[:3]), state[3], state[7], Angles(*state[4:7]))
    later = flown(flight, controls, duration, 2000)
    torch.testing.assert_close(everything(later)[:, regular], everything(expected)[:, regular], rtol=1e-6, atol=1e-3)


def pick(part, where):
    return tuple(component[where] for component in part) if isinstance(part, tuple) else part[where]


def test_halving_the_step_quarters_the_error():
    flight, controls = some_flights(elevator=0.0, attack=0.08, speed=150.0)
    exact = everything(flown(flight, controls, 2.0, 1024))
    errors = [(everything(flown(flight, controls, 2.0, steps)) - exact).norm() for steps in (8, 16, 32)]
    assert 3.7 < errors[0] / errors[1] < 4.3
    assert 3.7 < errors[1] / errors[2] < 4.3


def test_the_step_of_the_game_is_fine_enough():
    flight, controls = some_flights(climb=0.0, speed=180.0, altitude=3000.0)
    coarse, fine = flown(flight, controls, 2.0, 8), flown(flight, controls, 2.0, 512)
    apart = torch.stack([one - other for one, other in zip(coarse.position, fine.position, strict=True)]).norm(dim=0)
    assert apart.max() < 2  # metres, of 360 flown


def test_a_mirror_image_flies_the_mirror_image():
    def mirrored(vector):
        return -vector[0], vector[1], vector[2]

    flight, (aileron, elevator, throttle) = some_flights()
    image = flight._replace(
        position=mirrored(flight.position),
        direction=mirrored(flight.direction),
        lift_axis=mirrored(flight.lift_axis),
    )
    one = flown(flight, (aileron, elevator, throttle), 5.0, 20)
    other = flown(image, (-aileron, elevator, throttle), 5.0, 20)
    torch.testing.assert_close(torch.stack(other.position), torch.stack(mirrored(one.position)))
    torch.testing.assert_close(angles(other).roll, -angles(one).roll)
    torch.testing.assert_close(torch.stack(axes(other)[1]), -torch.stack(mirrored(axes(one)[1])))


def test_turning_the_world_about_the_vertical_changes_nothing():
    def turned(vector):
        cos, sin = math.cos(1.1), math.sin(1.1)
        return cos * vector[0] + sin * vector[1], cos * vector[1] - sin * vector[0], vector[2]

    flight, controls = some_flights()
    elsewhere = flight._replace(
        position=turned(flight.position), direction=turned(flight.direction), lift_axis=turned(flight.lift_axis)
    )
    one, other = flown(flight, controls, 5.0, 20), flown(elsewhere, controls, 5.0, 20)
    for vector, expected in ((other.position, one.position), (other.lift_axis, one.lift_axis)):
        torch.testing.assert_close(torch.stack(vector), torch.stack(turned(expected)))
    torch.testing.assert_close(other.speed, one.speed)


def test_a_loop_passes_the_vertical_and_comes_back_to_its_heading():
    zero = torch.zeros((), dtype=torch.float64)
    flight = flight_at((zero, zero, zero + 500), zero + 260, zero + 0.07, Angles(zero, zero, zero))
    climbs, rolls = [], []
    for _ in range(600):
        flight = fly(flight, zero, zero, zero + 1, duration=0.1)
        climbs.append(angles(flight).climb.item())
        rolls.append(angles(flight).roll.abs().item())
        if len(climbs) > 100 and climbs[-2] < 0 <= climbs[-1]:
            break
    assert max(climbs) > 1.5
    assert min(climbs) < -1.5
    assert max(rolls) == pytest.approx(math.pi)  # on its back
    assert rolls[-1] == pytest.approx(0, abs=1e-9)
    assert flight.position[0].abs() < 1e-6
    assert angles(flight).heading.item() == pytest.approx(0, abs=1e-9)


def test_the_axes_stay_at_right_angles_and_of_length_one_in_single_precision():
    flight, controls = some_flights()
    flight = type(flight)(
        *[tuple(c.float() for c in part) if isinstance(part, tuple) else part.float() for part in flight]
    )
    flight = flown(flight, [control.float() for control in controls], 250.0, 1000)
    for one, other, expected in (
        (flight.direction, flight.direction, 1.0),
        (flight.lift_axis, flight.lift_axis, 1.0),
        (flight.direction, flight.lift_axis, 0.0),
    ):
        torch.testing.assert_close(dot(one, other), torch.full_like(flight.speed, expected), rtol=0, atol=1e-4)


def test_time_stands_still_where_the_duration_is_zero():
    flight, controls = some_flights()
    later = fly(flight, *controls, duration=torch.zeros_like(flight.speed))
    torch.testing.assert_close(everything(later)[:-1], everything(flight)[:-1])


def test_the_nose_is_the_angle_of_attack_above_the_velocity():
    zero = torch.zeros((), dtype=torch.float64)
    flight = flight_at((zero,) * 3, zero + 100, zero + 0.2, Angles(zero, zero, zero))
    nose, right, roof = (torch.stack(axis) for axis in axes(flight))
    torch.testing.assert_close(nose, torch.tensor([0, math.cos(0.2), math.sin(0.2)]).double())
    torch.testing.assert_close(right, torch.tensor([1.0, 0.0, 0.0]).double())
    torch.testing.assert_close(roof, torch.tensor([0, -math.sin(0.2), math.cos(0.2)]).double())


def test_angles_are_those_a_flight_was_made_of():
    generator = torch.Generator().manual_seed(0)
    given = [scale * (2 * torch.rand(50, generator=generator).double() - 1) for scale in (3.1, 1.5, 3.1)]
    zero = torch.zeros_like(given[0])
    back = angles(flight_at((zero, zero, zero), zero + 1, zero, Angles(*given)))
    for one, other in zip(back, given, strict=True):
        torch.testing.assert_close(one, other)
