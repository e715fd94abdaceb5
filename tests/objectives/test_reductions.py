"""Each method states the settings in which it equals an older one; here they are proved, on gradients too.

A new method adds one row to ``METHODS``, which ``test_contract.py`` holds to what every loss promises, too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch
import torchrl.objectives.multiagent as torchrl_multiagent
from omegaconf import OmegaConf
from torch.testing import assert_close

from tests.objectives.loss_factories import SPACES, add_transition, gradients, make_batch, make_networks, total
from torchrl_marl.objectives import (
    ComposedLoss,
    HAPPOLoss,
    IPPOLoss,
    MAPPOLoss,
    MARPOLoss,
    MARSLoss,
    MASPOLoss,
    OAPPOLoss,
    RatioLoss,
    SEACLoss,
)
from torchrl_marl.objectives.mars import additive_target_ratios, multiplicative_target_ratios
from torchrl_marl.objectives.ratio import clip_bounds
from torchrl_marl.objectives.surrogates import barrier_gain, clip_gain, quadratic_gain


@dataclass(frozen=True)
class Method:
    """A loss, the settings that it is tested with, and what its paper says the gain of one sample is."""

    loss: type[RatioLoss]
    gain: Callable[[float, float], float]  # (ratio, advantage) -> gain, in plain numbers
    options: dict = field(default_factory=dict)
    observes: str = "joint_observation"
    own_networks: bool = False  # whether agents may not share parameters
    reads_advantages: bool = True  # else it takes them from its critics, which are the agents' own
    equals: type[RatioLoss] | None = None  # the older method that it is with these options, bit for bit


def clipped(low, high):
    return lambda ratio, advantage: min(ratio * advantage, min(max(ratio, low), high) * advantage)


def quadratic(low, high):
    def gain(ratio, advantage):
        epsilon = high - 1 if advantage >= 0 else 1 - low
        return ratio * advantage - abs(advantage) / (2 * epsilon) * (ratio - 1) ** 2

    return gain


def barrier(low, high):
    def gain(ratio, advantage):
        target = high if advantage >= 0 else low
        return ratio * advantage - advantage * target**2 / (target**2 - 1) * (ratio + 1 / ratio - 2)

    return gain


METHODS = {
    "MAPPO": Method(MAPPOLoss, clipped(0.8, 1.2)),
    "IPPO": Method(IPPOLoss, clipped(0.8, 1.2), observes="observation", equals=MAPPOLoss),
    "MASPO": Method(MASPOLoss, quadratic(0.8, 1.2)),
    "MARS": Method(MARSLoss, barrier(0.8, 1.25)),
    # Without reflection: the next step has its tests in test_marpo.py. The target stays, so that two calls are alike.
    # Outside of any turn, where agents update at once on their own data; turns have their tests in test_sequential.py.
    "HAPPO": Method(HAPPOLoss, clipped(0.8, 1.2), own_networks=True, equals=MAPPOLoss),
    "OAPPO": Method(OAPPOLoss, clipped(0.8, 1.2), {"reuse_matrix": "RR"}, own_networks=True, equals=MAPPOLoss),
    "MARPO": Method(MARPOLoss, clipped(0.8, 1.2), {"reflection_coeff": 0.0, "ema_rate": 0.0}, equals=MAPPOLoss),
    # Together on own data; what else it composes has its tests in test_composition.py.
    "Composed": Method(
        ComposedLoss,
        clipped(0.8, 1.2),
        {"order": "together", "own_weight": 1.0, "reflection_coeff": 0.0},
        own_networks=True,
        equals=MAPPOLoss,
    ),
    # Without the others' data, which have their tests in test_seac.py, and with a gain that has bounds.
    "SEAC": Method(
        SEACLoss,
        clipped(0.8, 1.2),
        {"sharing_coeff": 0.0, "gain": clip_gain, "loss_critic_type": "smooth_l1", "critic_coeff": 1.0},
        observes="observation",
        own_networks=True,
        reads_advantages=False,
    ),
}

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # about ten roundings of float32: sums of tens of terms of order one
LOSSES = ("loss_objective", "loss_entropy", "loss_critic")

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_space = pytest.mark.parametrize("space", SPACES)
functional_or_not = pytest.mark.parametrize("functional", [True, False], ids=["functional", "stateful"])
clips = pytest.mark.parametrize("clip_epsilon", [0.2, 0.05, (0.1, 0.3)], ids=str)


def networks_of(method, space, observes=None, **options):
    """An actor and a critic that the method can train."""
    own = {"share_parameters": False} if method.own_networks else {}
    return make_networks(space, observes or method.observes, **{**own, **options})


def make(method, space="categorical", *, networks=None, **options):
    """The loss and its two networks."""
    actor, critic = networks or networks_of(method, space)
    return method.loss(actor, critic, **{**method.options, **options}), actor, critic


def run(loss, data):
    """Forward with the same noise each time, for entropies that are sampled."""
    torch.manual_seed(5)
    return loss(data)


def losses_and_gradients(loss, data, *networks):
    output = run(loss, data)
    return {key: output[key] for key in LOSSES}, gradients(output, *networks)


# --- MAPPO is TorchRL's


@every_space
@functional_or_not
@clips
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
@pytest.mark.parametrize(
    ("ours", "theirs", "observes"),
    [
        (MAPPOLoss, torchrl_multiagent.MAPPOLoss, "joint_observation"),
        (IPPOLoss, torchrl_multiagent.IPPOLoss, "observation"),
    ],
    ids=["MAPPO", "IPPO"],
)
def test_ppo_equals_torchrls(ours, theirs, observes, space, functional, clip_epsilon, normalize):
    networks = make_networks(space, observes)
    options = {
        "clip_epsilon": clip_epsilon,
        "normalize_advantage": normalize,
        "functional": functional,
        "entropy_coeff": 0.02,
        "critic_coeff": 0.6,
    }
    ours, theirs = ours(*networks, **options), theirs(*networks, **options)
    theirs.set_keys(value=("agents", "state_value"))
    for batch in ((12,), (4, 3)):
        data = make_batch(networks[0], space, batch)
        assert_close(*(losses_and_gradients(loss, data, *networks) for loss in (ours, theirs)), **TOLERANCE)
        one, other = run(ours, data), run(theirs, data)
        for key in ("clip_fraction", "entropy", "max_ratio"):
            assert_close(one[key], other[key], **TOLERANCE)
        assert one["clip_fraction"] > 0


def test_ppo_equals_torchrls_with_its_defaults():
    networks = make_networks("categorical")
    data = make_batch(networks[0], "categorical")
    ours, theirs = MAPPOLoss(*networks), torchrl_multiagent.MAPPOLoss(*networks)
    theirs.set_keys(value=("agents", "state_value"))
    assert_close(*(losses_and_gradients(loss, data, *networks) for loss in (ours, theirs)), **TOLERANCE)


@pytest.mark.parametrize("kind", ["smooth_l1", "l2", "l1"])
def test_critic_losses_equal_torchrls(kind):
    networks = make_networks("categorical")
    data = make_batch(networks[0], "categorical")
    ours = MAPPOLoss(*networks, loss_critic_type=kind)
    theirs = torchrl_multiagent.MAPPOLoss(*networks, loss_critic_type=kind)
    theirs.set_keys(value=("agents", "state_value"))
    assert_close(*(losses_and_gradients(loss, data, *networks) for loss in (ours, theirs)), **TOLERANCE)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_equal_torchrls(reduction):
    networks = make_networks("categorical")
    data = make_batch(networks[0], "categorical")
    ours = MAPPOLoss(*networks, reduction=reduction)
    theirs = torchrl_multiagent.MAPPOLoss(*networks, reduction=reduction)
    theirs.set_keys(value=("agents", "state_value"))
    one, other = ours(data), theirs(data)
    assert_close({key: one[key] for key in LOSSES}, {key: other[key] for key in LOSSES}, **TOLERANCE)


def test_masks_of_plain_advantages_equal_torchrls():
    # TorchRL masks its reductions, not the normalisation of advantages
    networks = make_networks("categorical")
    data = make_batch(networks[0], "categorical", live=0.6, padding=True)
    ours = MAPPOLoss(*networks, normalize_advantage=False)
    theirs = torchrl_multiagent.MAPPOLoss(*networks, normalize_advantage=False)
    theirs.set_keys(value=("agents", "state_value"))
    theirs.loss_mask_key = ("collector", "mask")
    assert_close(*(losses_and_gradients(loss, data, *networks) for loss in (ours, theirs)), **TOLERANCE)


@functional_or_not
@pytest.mark.parametrize("team", [False, True], ids=["per-agent-reward", "team-reward"])
def test_advantages_and_targets_equal_torchrls(functional, team):
    networks = make_networks("categorical")
    data = add_transition(make_batch(networks[0], "categorical", (5, 6)), team=team)
    results = []
    for loss in (
        MAPPOLoss(*networks, functional=functional),
        torchrl_multiagent.MAPPOLoss(*networks, functional=functional),
    ):
        reward = "reward" if team else ("agents", "reward")
        loss.set_keys(value=("agents", "state_value"), reward=reward)
        loss.make_value_estimator(gamma=0.9, lmbda=0.8)
        params = loss.critic_network_params if functional else None
        estimated = data.clone()
        with torch.no_grad():
            loss.value_estimator(estimated, params=params)
        results.append((estimated["advantage"], estimated["value_target"], losses_and_gradients(loss, data, *networks)))
    assert_close(*results, **TOLERANCE)


# --- the methods among each other


REDUCED = {name: method for name, method in METHODS.items() if method.equals is not None}


@every_space
@pytest.mark.parametrize("method", REDUCED.values(), ids=REDUCED)
def test_a_method_without_its_own_term_equals_an_older_one_bit_for_bit(method, space):
    newer, *networks = make(method, space)
    data = make_batch(networks[0], space, live=0.7)
    older = method.equals(*networks)
    found, expected = (losses_and_gradients(loss, data, *networks) for loss in (newer, older))
    assert_close(found, expected, rtol=0, atol=0)


@every_space
def test_all_ratio_methods_have_one_gradient_at_ratio_one(space):
    networks = make_networks(space)
    data = make_batch(networks[0], space)
    with torch.no_grad():
        log_prob = networks[0].get_dist(data.clone()).log_prob(data["agents", "action"])
    data["agents", "action_log_prob"] = log_prob
    mappo, maspo, mars = (
        losses_and_gradients(loss(*networks), data, *networks) for loss in (MAPPOLoss, MASPOLoss, MARSLoss)
    )
    assert_close(maspo, mappo, **TOLERANCE)
    assert_close(mars, mappo, **TOLERANCE)
    # and it is the policy gradient: of -mean(A log pi), with advantages standardised for each agent
    advantage = data["advantage"].squeeze(-1)
    advantage = (advantage - advantage.mean(0)) / advantage.std(0)
    log_prob = networks[0].get_dist(data.clone()).log_prob(data["agents", "action"])
    policy_gradient = gradients({"loss_": -(advantage * log_prob).mean()}, networks[0])
    mars_gradient = gradients({"loss_": MARSLoss(*networks)(data)["loss_objective"]}, networks[0])
    assert_close(mars_gradient, policy_gradient, **TOLERANCE)


def test_ratio_methods_differ_away_from_ratio_one():
    networks = make_networks("categorical")
    data = make_batch(networks[0], "categorical")
    objectives = {loss(*networks)(data)["loss_objective"].item() for loss in (MAPPOLoss, MASPOLoss, MARSLoss)}
    assert len(objectives) == 3


@pytest.mark.parametrize("loss", [MAPPOLoss, IPPOLoss, MASPOLoss])
def test_a_pair_of_equal_widths_equals_one_width(loss):
    networks = make_networks("categorical")
    data = make_batch(networks[0], "categorical")
    pair, single = (losses_and_gradients(loss(*networks, clip_epsilon=e), data, *networks) for e in ((0.3, 0.3), 0.3))
    assert_close(pair, single, rtol=0, atol=0)


SAME_BOUNDS = {  # low 0.75 and high 1.5 in each method's own words
    "MAPPO": (MAPPOLoss, {"clip_epsilon": (0.25, 0.5)}, clip_gain),
    "MASPO": (MASPOLoss, {"clip_epsilon": (0.25, 0.5)}, quadratic_gain),
    "MARS": (MARSLoss, {"target_ratios": (0.75, 1.5)}, barrier_gain),
}


@pytest.mark.parametrize("method", SAME_BOUNDS)
@pytest.mark.parametrize("host", SAME_BOUNDS)
def test_any_method_with_anothers_gain_and_bounds_is_the_other_method(host, method):
    networks = make_networks("categorical")
    data = make_batch(networks[0], "categorical", live=0.7)
    loss, options, gain = SAME_BOUNDS[method]
    host_loss, host_options, _ = SAME_BOUNDS[host]
    expected = losses_and_gradients(loss(*networks, **options), data, *networks)
    swapped = losses_and_gradients(host_loss(*networks, gain=gain, **host_options), data, *networks)
    assert_close(swapped, expected, rtol=0, atol=0)


def test_symmetric_mars_reaches_both_targets_by_the_same_factor():
    assert multiplicative_target_ratios(1.25) == pytest.approx((Fraction(4, 5), 1.25))
    for ratio in (1.01, 1.5, 4.0):
        low, high = multiplicative_target_ratios(ratio)
        assert (low * high, high) == pytest.approx((1, ratio))


def test_additive_mars_reaches_both_targets_over_the_same_distance():
    assert additive_target_ratios(0.25) == (0.75, 1.25)
    for epsilon in (0.01, 0.3, 0.9):
        low, high = additive_target_ratios(epsilon)
        assert (1 - low, high - 1) == pytest.approx((epsilon, epsilon))


@pytest.mark.parametrize("pair", [multiplicative_target_ratios(1.5), additive_target_ratios(0.2)], ids=str)
def test_target_ratio_helpers_fit_the_loss(pair):
    loss = MARSLoss(*make_networks("categorical"), target_ratios=pair)
    assert (loss.ratio_low.item(), loss.ratio_high.item()) == pytest.approx(pair)


# --- bounds


def test_default_bounds():
    networks = make_networks("categorical")
    for loss, low, high in ((MAPPOLoss, 0.8, 1.2), (IPPOLoss, 0.8, 1.2), (MASPOLoss, 0.8, 1.2), (MARSLoss, 0.8, 1.25)):
        built = loss(*networks)
        assert (built.ratio_low.item(), built.ratio_high.item()) == pytest.approx((low, high))
        assert (built.entropy_coeff.item(), built.critic_coeff.item()) == pytest.approx((0.01, 1.0))


def test_clip_bounds_are_one_minus_low_and_one_plus_high():
    assert clip_bounds(0.5) == (0.5, 1.5)
    assert clip_bounds((0.25, 2.0)) == (0.75, 3.0)
    assert clip_bounds([0.25, 0.5]) == (0.75, 1.5)


BAD_WIDTHS = [0, 0.0, -0.2, 1, 1.2, float("nan"), (0.2, 0.0), (0.0, 0.2), (1.0, 0.2), (0.2, -0.1), (-0.2, 0.1)]
BAD_WIDTHS += [(0.1, 0.2, 0.3), (0.1,), ()]


@pytest.mark.parametrize("loss", [MAPPOLoss, IPPOLoss, MASPOLoss])
@pytest.mark.parametrize("clip_epsilon", BAD_WIDTHS, ids=str)
def test_impossible_clips_raise_and_state_the_rule(loss, clip_epsilon):
    with pytest.raises(
        ValueError, match=r"number in \(0, 1\) or a pair \(low, high\) with 0 < low < 1 and high > 0"
    ) as e:
        loss(*make_networks("categorical"), clip_epsilon=clip_epsilon)
    assert f"got {clip_epsilon}" in str(e.value)


BAD_TARGETS = [(1.25, 0.8), (0.8, 0.9), (1.1, 1.25), (0.0, 1.25), (-0.5, 1.25), (0.8, 1.0), (1.0, 1.25)]
BAD_TARGETS += [(0.8, 1.0, 1.25), (0.8,), (), (0.8, float("nan")), (float("nan"), 1.25)]
BAD_TARGETS += [(0.5, float("inf")), (0.99999999, 1.25), (0.8, 1.00000001), (1e-50, 1.25)]  # float32 cannot hold them


@pytest.mark.parametrize("target_ratios", BAD_TARGETS, ids=str)
def test_impossible_target_ratios_raise_and_state_the_rule(target_ratios):
    with pytest.raises(ValueError, match="0 < low < 1 < high") as error:
        MARSLoss(*make_networks("categorical"), target_ratios=target_ratios)
    assert f"got {target_ratios}" in str(error.value)


@pytest.mark.parametrize("loss", [MAPPOLoss, IPPOLoss, MASPOLoss, MARSLoss])
def test_hydra_lists_are_pairs(loss):
    # TorchRL's loss accepts a ListConfig and fails in forward
    networks = make_networks("categorical")
    data = make_batch(networks[0], "categorical")
    option, pair = ("target_ratios", (0.7, 1.3)) if loss is MARSLoss else ("clip_epsilon", (0.2, 0.28))
    listed, plain = (loss(*networks, **{option: value})(data) for value in (OmegaConf.create(list(pair)), pair))
    assert_close(total(listed), total(plain), rtol=0, atol=0)
    with pytest.raises(ValueError, match="pair"):
        loss(*networks, **{option: OmegaConf.create([0.1, 1.2, 1.3])})
