"""The gains against their papers: vectors, closed forms, signs of gradients, limits."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from torchrl_marl.objectives.surrogates import (
    barrier_gain,
    clip_gain,
    kl_interval,
    quadratic_gain,
    ratio_gain,
    reflective_clip_gain,
)

GAINS = {"clip": clip_gain, "quadratic": quadratic_gain, "barrier": barrier_gain, "ratio": ratio_gain}
SOFT_GAINS = {"quadratic": quadratic_gain, "barrier": barrier_gain}  # those with a target ratio
LOW, HIGH = 0.75, 1.3  # neither reciprocal nor equally far from 1
MARS_VECTORS = json.loads(Path(__file__).with_name("mars_vectors.json").read_text())
KL_VECTORS = json.loads(Path(__file__).with_name("kl_interval_vectors.json").read_text())

every_gain = pytest.mark.parametrize("gain", GAINS.values(), ids=GAINS)
every_soft_gain = pytest.mark.parametrize("gain", SOFT_GAINS.values(), ids=SOFT_GAINS)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradient(gain, log_ratio, advantage, low=LOW, high=HIGH):
    """The gain and its derivative with respect to the log-ratio."""
    log_ratio = log_ratio.detach().requires_grad_()
    value = gain(log_ratio, advantage, low=low, high=high)
    (gradient,) = torch.autograd.grad(value.sum(), log_ratio)
    return value.detach(), gradient


# --- reference vectors


@pytest.mark.parametrize("name", ["clip", "clip_asym", "quadratic", "quadratic_asym", "barrier"])
def test_gain_matches_the_reference_vectors(name):
    epsilon, (low, high) = MARS_VECTORS["epsilon"], MARS_VECTORS["target_ratios"]
    if name in ("clip", "quadratic"):
        low, high = 1 - epsilon, 1 + epsilon
    gain = GAINS[name.removesuffix("_asym")]
    value = gain(float64(MARS_VECTORS["log_ratio"]), float64(MARS_VECTORS["advantage"]), low=low, high=high)
    assert_close(value, float64(MARS_VECTORS["gain"][name]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["quadratic", "barrier"])
def test_gradient_matches_the_reference_vectors(name):
    epsilon, (low, high) = MARS_VECTORS["epsilon"], MARS_VECTORS["target_ratios"]
    if name == "quadratic":
        low, high = 1 - epsilon, 1 + epsilon
    log_ratio, advantage = float64(MARS_VECTORS["log_ratio"]), float64(MARS_VECTORS["advantage"])
    _, gradient = value_and_gradient(GAINS[name], log_ratio, advantage, low, high)
    assert_close(gradient, float64(MARS_VECTORS["grad_log_ratio"][name]), rtol=1e-9, atol=1e-9)


# --- what all gains share


@every_gain
def test_gain_is_advantage_at_ratio_one(gain):
    advantage = torch.randn(50, dtype=torch.float64)
    assert torch.equal(gain(torch.zeros_like(advantage), advantage, low=LOW, high=HIGH), advantage)


@every_gain
def test_gradient_at_ratio_one_is_policy_gradient(gain):
    # d gain / d log pi = A at r = 1: the REINFORCE gradient of A log pi
    advantage = torch.randn(50, dtype=torch.float64)
    _, gradient = value_and_gradient(gain, torch.zeros_like(advantage), advantage)
    assert_close(gradient, advantage)


@every_gain
def test_zero_advantage_gives_exactly_zero_gain_and_gradient(gain):
    log_ratio = torch.linspace(-6, 6, 101)
    value, gradient = value_and_gradient(gain, log_ratio, torch.zeros_like(log_ratio))
    assert (value == 0).all()
    assert (gradient == 0).all()


@every_gain
def test_gain_is_proportional_to_the_advantage_of_one_sign(gain):
    log_ratio = torch.linspace(-2, 2, 41, dtype=torch.float64)
    for sign in (1.0, -1.0):
        one, seven = (gain(log_ratio, torch.full_like(log_ratio, a * sign), low=LOW, high=HIGH) for a in (1, 7))
        assert_close(seven, 7 * one)


@every_gain
def test_gradcheck(gain):
    log_ratio = (0.5 * torch.randn(4, 3, dtype=torch.float64)).requires_grad_()
    advantage = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, a: gain(u, a, low=LOW, high=HIGH), (log_ratio, advantage))


@every_gain
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_finite_for_extreme_log_ratios(gain, advantage):
    # float32 ends at exp(88.7). The quadratic gain squares the ratio, so that its range ends at exp(44.3).
    largest = 43.0 if gain is quadratic_gain else 80.0
    log_ratio = torch.tensor([-80.0, -40.0, 40.0, largest])
    value, gradient = value_and_gradient(gain, log_ratio, torch.full_like(log_ratio, advantage))
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("gain", [clip_gain, ratio_gain])
def test_the_gain_of_a_ratio_and_its_gradient_are_finite_for_any_log_ratio(gain, advantage):
    # Beyond 60 the ratio goes on with the slope that it has there; a clip cuts it as anywhere.
    log_ratio = torch.tensor([-300.0, 60.0, 62.0, 92.0, 300.0])
    value, gradient = value_and_gradient(gain, log_ratio, torch.full_like(log_ratio, advantage))
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    cut = gain is clip_gain and advantage > 0
    slope = torch.tensor(0.0 if cut else advantage * math.exp(60))
    assert_close(gradient[1:], slope.expand(4))
    assert_close(value[3] - value[1], 32 * slope)


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize(("now", "later"), [(46.0, 46.0), (92.0, 92.0), (300.0, -300.0), (0.0, 92.0)])  # e^46 = 1e20
def test_the_reflective_gain_and_its_gradient_are_finite_for_ratios_of_any_size(now, later, advantage):
    log_ratios = torch.tensor([now, later], requires_grad=True)
    sides = {"low": 0.8, "high": 1.2, "next_low": 0.9, "next_high": 1.1}
    gain = reflective_clip_gain(*log_ratios.unsqueeze(-1), torch.tensor([advantage]), **sides)
    (gradient,) = torch.autograd.grad(gain.sum(), log_ratios)
    assert gain.isfinite().all()
    assert gradient.isfinite().all()
    if advantage > 0 and later > 0:
        assert gain.item() == pytest.approx(min(math.exp(min(now, 1)), 1.2) * 1.1)  # both clips


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_barriers_gradient_has_a_norm_for_any_log_ratio(advantage):
    # Beyond 40 it keeps the slope that it has there: never flat, and its square does not overflow float32.
    log_ratio = torch.tensor([-300.0, -62.0, -40.0, 40.0, 62.0, 300.0])
    _, gradient = value_and_gradient(barrier_gain, log_ratio, torch.full_like(log_ratio, advantage))
    assert gradient.norm().isfinite()
    assert_close(gradient[:2], gradient[2].expand(2))
    assert_close(gradient[4:], gradient[3].expand(2))
    value = barrier_gain(log_ratio, torch.full_like(log_ratio, advantage), low=LOW, high=HIGH)
    assert_close(value[1] - value[2], -22 * gradient[2])


@every_gain
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_shape_and_dtype_are_kept(gain, dtype, shape):
    log_ratio, advantage = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    value = gain(log_ratio, advantage, low=LOW, high=HIGH)
    assert value.shape == shape
    assert value.dtype == dtype


@every_gain
def test_float32_gain_is_the_float64_gain_rounded(gain):
    log_ratio, advantage = torch.randn(1000, dtype=torch.float64), torch.randn(1000, dtype=torch.float64)
    log_ratio, advantage = log_ratio.float(), advantage.float()
    exact = gain(log_ratio.double(), advantage.double(), low=LOW, high=HIGH)
    terms = (log_ratio.double().exp() * advantage).abs() + exact.abs()  # the two terms that may cancel
    error = (gain(log_ratio, advantage, low=LOW, high=HIGH) - exact).abs()
    assert (error / terms).max() < 16 * torch.finfo(torch.float32).eps


@every_gain
def test_zero_dimensional_tensor_bounds_equal_floats(gain):
    log_ratio, advantage = torch.randn(50), torch.randn(50)
    expected = gain(log_ratio, advantage, low=LOW, high=HIGH)
    low, high = torch.tensor(LOW), torch.tensor(HIGH)
    for bounds in ((low, high), (LOW, high), (low, HIGH), (low.double(), high.double())):
        value = gain(log_ratio, advantage, low=bounds[0], high=bounds[1])
        assert value.dtype == torch.float32
        assert_close(value, expected)


@every_gain
@pytest.mark.parametrize("shapes", [((5, 3), (5,)), ((5, 3), (5, 1)), ((5, 3), (5, 3, 1)), ((5,), ())])
def test_different_shapes_raise_instead_of_broadcasting(gain, shapes):
    with pytest.raises(ValueError, match="the same shape"):
        gain(torch.zeros(shapes[0]), torch.zeros(shapes[1]), low=LOW, high=HIGH)


# --- clip


def test_clip_is_the_smaller_of_the_plain_and_the_clipped_product():
    # max(low, min(high, r)) in plain Python, one number at a time
    log_ratio, advantage = torch.randn(200, dtype=torch.float64), torch.randn(200, dtype=torch.float64)
    expected = []
    for u, a in zip(log_ratio.tolist(), advantage.tolist(), strict=True):
        ratio = math.exp(u)
        expected.append(min(ratio * a, max(LOW, min(HIGH, ratio)) * a))
    assert_close(clip_gain(log_ratio, advantage, low=LOW, high=HIGH), float64(expected))


@pytest.mark.parametrize("side", [1, -1])
def test_clip_has_zero_gradient_outside_the_interval(side):
    # good actions above the interval, bad ones below it: the favoured direction
    outside = float64([HIGH + 1e-6, 2.0, 10.0] if side > 0 else [LOW - 1e-6, 0.5, 0.01]).log()
    _, gradient = value_and_gradient(clip_gain, outside, torch.full_like(outside, 3.0 * side))
    assert (gradient == 0).all()


@pytest.mark.parametrize("side", [1, -1])
def test_clip_keeps_its_gradient_outside_the_interval_against_the_advantage(side):
    # good actions below the interval, bad ones above it: the way back, d(r A)/du = r A
    outside = float64([LOW - 1e-6, 0.5, 0.01] if side > 0 else [HIGH + 1e-6, 2.0, 10.0]).log()
    advantage = torch.full_like(outside, 3.0 * side)
    _, gradient = value_and_gradient(clip_gain, outside, advantage)
    assert_close(gradient, outside.exp() * advantage)


@pytest.mark.parametrize("side", [1, -1])
def test_clip_keeps_its_gradient_inside_the_interval(side):
    inside = float64([LOW + 1e-6, 0.9, 1.0, 1.1, HIGH - 1e-6]).log()
    advantage = torch.full_like(inside, 3.0 * side)
    _, gradient = value_and_gradient(clip_gain, inside, advantage)
    assert_close(gradient, inside.exp() * advantage)


# --- target ratios


@every_soft_gain
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_gain_has_one_stationary_point_and_it_is_the_target_ratio(gain, advantage):
    # A rise before the target and a fall after it, on a grid of ratios from 0.002 to 400, either sign of A.
    target = math.log(HIGH if advantage > 0 else LOW)
    log_ratio = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    log_ratio = log_ratio[(log_ratio - target).abs() > 1e-9]
    value, gradient = value_and_gradient(gain, log_ratio, torch.full_like(log_ratio, advantage))
    assert (gradient[log_ratio < target] > 0).all()
    assert (gradient[log_ratio > target] < 0).all()
    at_target, slope = value_and_gradient(gain, float64([target]), float64([advantage]))
    assert slope.abs().item() < 1e-14
    assert (value < at_target).all()


@every_soft_gain
@pytest.mark.parametrize(("advantage", "target"), [(2.0, HIGH), (-2.0, LOW)])
def test_gain_at_the_target_ratio_is_the_closed_form(gain, advantage, target):
    # quadratic: t A - A (t - 1) / 2 = A (t + 1) / 2;   barrier: t A - A t (t - 1) / (t + 1) = 2 A t / (t + 1)
    expected = advantage * ((target + 1) / 2 if gain is quadratic_gain else 2 * target / (target + 1))
    value = gain(float64([math.log(target)]), float64([advantage]), low=LOW, high=HIGH)
    assert_close(value, float64([expected]))


def test_quadratic_gain_is_maximal_at_ratio_one_plus_minus_epsilon():
    epsilon = 0.2
    ratio = torch.linspace(0.5, 1.5, 100_001, dtype=torch.float64)
    for sign in (1.0, -1.0):
        value = quadratic_gain(ratio.log(), torch.full_like(ratio, sign), low=1 - epsilon, high=1 + epsilon)
        assert ratio[value.argmax()].item() == pytest.approx(1 + sign * epsilon, abs=1e-5)


def test_quadratic_gain_with_symmetric_targets_is_maspo():
    # MASPO as its paper writes it: r A - |A| / (2 epsilon) (r - 1)^2
    epsilon = 0.3
    ratio, advantage = torch.rand(500, dtype=torch.float64) * 3 + 1e-3, torch.randn(500, dtype=torch.float64)
    expected = ratio * advantage - advantage.abs() / (2 * epsilon) * (ratio - 1) ** 2
    value = quadratic_gain(ratio.log(), advantage, low=1 - epsilon, high=1 + epsilon)
    assert_close(value, expected, rtol=1e-12, atol=1e-12)


def barrier(ratio, advantage, low=LOW, high=HIGH):
    """Alpha times phi, cut out of the gain."""
    return ratio * advantage - barrier_gain(ratio.log(), advantage, low=low, high=high)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_barrier_is_symmetric_under_ratio_inversion(advantage):
    ratio = torch.linspace(0.05, 20, 400, dtype=torch.float64)
    advantage = torch.full_like(ratio, advantage)
    assert_close(barrier(ratio, advantage), barrier(1 / ratio, advantage), rtol=1e-12, atol=1e-12)


def test_barrier_is_the_geometric_mean_of_the_penalties_at_a_ratio_and_its_inverse():
    # phi = sqrt((r - 1)^2 (1/r - 1)^2), alpha = A / (1 - 1 / target^2): MARS, Eqs. (7) and (11)
    ratio, advantage = torch.rand(500, dtype=torch.float64) * 3 + 1e-3, torch.randn(500, dtype=torch.float64)
    phi = ((ratio - 1) ** 2 * (1 / ratio - 1) ** 2).sqrt()
    target = torch.tensor([HIGH if a >= 0 else LOW for a in advantage], dtype=torch.float64)
    assert_close(barrier(ratio, advantage), advantage / (1 - 1 / target**2) * phi, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_barrier_diverges_as_ratio_goes_to_zero(advantage):
    # ~ -alpha / r: ten times smaller a ratio, ten times lower a gain
    ratio = float64([1e-3, 1e-6, 1e-9, 1e-12])
    value = barrier_gain(ratio.log(), torch.full_like(ratio, advantage), low=LOW, high=HIGH)
    alpha = advantage / (1 - (HIGH if advantage > 0 else LOW) ** -2)
    assert_close(value * ratio, torch.full_like(ratio, -alpha), rtol=5e-3, atol=0)
    assert (value < -100 * alpha).all()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_quadratic_gain_stays_finite_as_ratio_goes_to_zero(advantage):
    # r A - c (r - 1)^2 -> -c
    ratio = float64([1e-6, 1e-12])
    value = quadratic_gain(ratio.log(), torch.full_like(ratio, advantage), low=LOW, high=HIGH)
    c = advantage / (2 * ((HIGH if advantage > 0 else LOW) - 1))
    assert_close(value, torch.full_like(ratio, -c), rtol=0, atol=1e-5 * c)


# --- kl_interval


def divergence(ratio):
    """Left-hand side of x - 1 - ln x = kl."""
    return ratio - 1 - math.log(ratio)


GRID = [10**exponent for exponent in range(-12, 1)] + [0.02, 0.3, 2.0, 5.0, 10.0, 30.0]


@pytest.mark.parametrize("row", KL_VECTORS["roots"], ids=lambda row: row["d"])
def test_kl_interval_matches_lambert_w_in_forty_digits(row):
    low, high = kl_interval(float(row["d"]))
    assert low == pytest.approx(float(row["x1"]), abs=1e-15)
    assert high == pytest.approx(float(row["x2"]), rel=1e-15)
    lows, highs = kl_interval(float64([float(row["d"])]))
    assert lows.item() == pytest.approx(float(row["x1"]), abs=1e-15)
    assert highs.item() == pytest.approx(float(row["x2"]), rel=1e-15)


@pytest.mark.parametrize("row", KL_VECTORS["ppo_equivalent_d"], ids=lambda row: f"epsilon={row[0]}")
def test_kl_interval_inverts_the_divergence_of_a_clip(row):
    epsilon, lower, upper = row[0], float(row[1]), float(row[2])
    assert kl_interval(lower)[0] == pytest.approx(1 - epsilon, rel=1e-11)
    assert kl_interval(upper)[1] == pytest.approx(1 + epsilon, rel=1e-11)


@pytest.mark.parametrize("row", KL_VECTORS["ema"], ids=lambda row: f"d={row['d']:.4f}")
def test_kl_interval_matches_the_target_sequence(row):
    assert kl_interval(row["d"]) == pytest.approx((row["x1"], row["x2"]), rel=1e-14)


@pytest.mark.parametrize("kl", [1e-3, 0.02, 0.3, 1.0, 5.0, 30.0])
def test_kl_interval_solves_its_equation(kl):
    for root in kl_interval(kl):
        assert divergence(root) == pytest.approx(kl, rel=1e-12)


@pytest.mark.parametrize("kl", GRID)
def test_kl_interval_is_around_one_and_wider_above(kl):
    low, high = kl_interval(kl)
    assert 0 < low < 1 < high
    if kl > 1e-10:  # below, the difference kl / 3 is not far enough above the rounding of 1 + sqrt(2 kl)
        assert 1 - low < high - 1
        assert low * high < 1


def test_kl_interval_is_monotone():
    lows, highs = zip(*map(kl_interval, sorted(GRID)), strict=True)
    assert list(lows) == sorted(lows, reverse=True)
    assert list(highs) == sorted(highs)
    assert len(set(lows)) == len(set(highs)) == len(GRID)


@pytest.mark.parametrize("kl", [1e-6, 1e-3, 0.02, 0.3])
def test_kl_interval_matches_the_series_near_zero(kl):
    # x = 1 + s + s^2/3 + s^3/36 - s^4/270 + s^5/4320 + s^6/17010 with s = -sqrt(2 kl), sqrt(2 kl); the rest is O(s^7)
    for root, s in zip(kl_interval(kl), (-math.sqrt(2 * kl), math.sqrt(2 * kl)), strict=True):
        series = 1 + s + s**2 / 3 + s**3 / 36 - s**4 / 270 + s**5 / 4320 + s**6 / 17010
        assert root == pytest.approx(series, abs=1e-3 * abs(s) ** 7 + 1e-15)


def test_kl_interval_of_zero_is_one():
    assert kl_interval(0) == kl_interval(0.0) == (1.0, 1.0)
    low, high = kl_interval(torch.zeros(3))
    assert torch.equal(low, torch.ones(3))
    assert torch.equal(high, torch.ones(3))


@pytest.mark.parametrize("kl", [5e-324, 1e-300, 1e-40, 1e-20])
def test_kl_interval_of_a_tiny_divergence_is_one_up_to_rounding(kl):
    # 1 -+ sqrt(2 kl): below 1e-32 nothing but 1.0 is left in float64
    expected = (1 - math.sqrt(2 * kl), 1 + math.sqrt(2 * kl))
    assert kl_interval(kl) == pytest.approx(expected, rel=1e-15)
    assert torch.stack(kl_interval(float64([kl]))).flatten().tolist() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("kl", [30.0, 1000.0, 1e12])
def test_kl_interval_of_a_large_divergence(kl):
    # low -> e^-(1 + kl), which float64 cannot hold beyond 745; high = 1 + kl + ln(high)
    low, high = kl_interval(kl)
    assert low == pytest.approx(math.exp(-1 - kl), rel=1e-12)
    assert (low == 0) == (kl > 745)
    assert high == pytest.approx(1 + kl + math.log(high), rel=1e-15)


BAD_DIVERGENCES = [-1e-9, -3.5, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("kl", BAD_DIVERGENCES)
def test_kl_interval_refuses_impossible_divergences(kl):
    with pytest.raises(ValueError, match=rf"at least 0, got {kl!r}"):
        kl_interval(kl)


@pytest.mark.parametrize("kl", BAD_DIVERGENCES)
def test_kl_interval_of_a_tensor_names_its_impossible_entries(kl):
    with pytest.raises(ValueError, match=rf"at least 0, got \[{kl!r}\]"):
        kl_interval(float64([[0.1, 0.0], [kl, 0.2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 3)])
def test_kl_interval_of_a_tensor_keeps_shape_and_dtype(dtype, shape):
    low, high = kl_interval(torch.rand(shape, dtype=dtype))
    assert low.shape == high.shape == shape
    assert low.dtype == high.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_interval_of_a_tensor_equals_that_of_its_floats(dtype):
    kl = torch.tensor([0.0, *GRID], dtype=dtype)
    expected = torch.tensor([kl_interval(entry) for entry in kl.tolist()], dtype=torch.float64)
    # float32 input is solved in float64 and rounded once
    low, high = kl_interval(kl)
    eps = torch.finfo(dtype).eps
    assert_close(low.double(), expected[:, 0], rtol=eps, atol=eps)
    assert_close(high.double(), expected[:, 1], rtol=eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_interval_has_the_implicit_derivative(dtype):
    # x - 1 - ln x = kl differentiated: (1 - 1/x) x' = 1, so x' = x / (x - 1)
    kl = torch.tensor([1e-6, 1e-3, 0.02, 0.3, 1.0, 5.0], dtype=dtype, requires_grad=True)
    for root in kl_interval(kl):
        (derivative,) = torch.autograd.grad(root.sum(), kl, retain_graph=True)
        x = float64([kl_interval(entry)[int(root[0] > 1)] for entry in kl.tolist()])
        assert_close(derivative.double(), x / (x - 1), rtol=max(1e-9, 2 * torch.finfo(dtype).eps), atol=0)


def test_kl_interval_has_a_finite_derivative_at_zero():
    kl = float64([0.0, 0.1]).requires_grad_()
    low, high = kl_interval(kl)
    (derivative,) = torch.autograd.grad((low + high).sum(), kl)
    assert derivative.isfinite().all()
    assert derivative[0] == 0


def test_kl_interval_compiles():
    kl = float64([0.0, 1e-6, 0.1, 3.0]).requires_grad_()
    compiled = torch.compile(kl_interval, fullgraph=True, backend="aot_eager")
    for root, expected in zip(compiled(kl), kl_interval(kl), strict=True):
        assert_close(root, expected)
        gradients = [torch.autograd.grad(x.sum(), kl, retain_graph=True)[0] for x in (root, expected)]
        assert_close(*gradients)
    for root in compiled(float64(BAD_DIVERGENCES[:4])):  # values are not looked at: NaN instead of an error
        assert root.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_interval_on_a_gpu_equals_that_on_the_cpu(dtype):
    kl = torch.tensor([0.0, *GRID], dtype=dtype)
    for on_gpu, on_cpu in zip(kl_interval(kl.cuda()), kl_interval(kl), strict=True):
        assert on_gpu.device.type == "cuda"
        assert_close(on_gpu.cpu(), on_cpu)


@pytest.mark.gpu
@every_gain
def test_gain_on_a_gpu_equals_that_on_the_cpu(gain):
    log_ratio, advantage = torch.randn(1000), torch.randn(1000)
    low, high = torch.tensor(LOW).cuda(), torch.tensor(HIGH).cuda()
    on_gpu = gain(log_ratio.cuda(), advantage.cuda(), low=low, high=high)
    assert_close(on_gpu.cpu(), gain(log_ratio, advantage, low=LOW, high=HIGH), rtol=1e-5, atol=1e-5)


def test_kl_interval_refuses_integers_and_reaches_the_largest_floats():
    with pytest.raises(ValueError, match=r"got torch.int64"):
        kl_interval(torch.tensor(1))
    low, high = kl_interval(1e300)
    assert low == 0
    assert high == pytest.approx(1e300)


def test_compiled_kl_intervals_are_those_of_eager_code():
    torch.compiler.reset()
    kl = float64([1e-8, 1e-4, 0.01, 0.088, 0.3, 3.0, 30.0])  # a compiled solver takes fewer steps
    low, high = torch.compile(kl_interval, fullgraph=True, backend="aot_eager")(kl)
    expected_low, expected_high = kl_interval(kl)
    assert_close(low, expected_low, rtol=1e-12, atol=1e-15)
    assert_close(high, expected_high, rtol=1e-12, atol=0)
