"""A composition of the papers' ideas: it reduces to each of them, and what none of them has is written out in loops."""

import pytest
import torch
from torch.testing import assert_close

from tests.objectives.loss_factories import AGENTS, SPACES, gradients, make_networks
from tests.objectives.test_marpo import as_sequences, make_batch
from torchrl_marl.modules import agent_policy
from torchrl_marl.objectives import ComposedLoss, HAPPOLoss, MARPOLoss, OAPPOLoss
from torchrl_marl.objectives.surrogates import (
    barrier_gain,
    clip_gain,
    kl_interval,
    quadratic_gain,
    reflective_clip_gain,
)

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
BOUNDS = {"clip_epsilon": (0.5, 1.0), "next_clip_epsilon": (0.4, 0.7)}
MATRIX = [[0.6, 0.4, 0.0], [0.25, 0.75, 0.0], [0.2, 0.3, 0.5]]
every_space = pytest.mark.parametrize("space", SPACES)
gains = pytest.mark.parametrize("gain", [clip_gain, quadratic_gain, barrier_gain])
intervals = pytest.mark.parametrize("interval", ["fixed", "kl"])


def make(kind, space="categorical", *, live=None, **options):
    networks = make_networks(space, share_parameters=False)
    data = as_sequences(make_batch(networks[0], space, (4, 3), live=live)).reshape(-1)
    return kind(*networks, **options), data, networks


def run(loss, data):
    torch.manual_seed(5)
    return loss(data)


def found(loss, data, networks, *, but=()):
    output = run(loss, data)
    return {key: value for key, value in output.items() if key not in but}, gradients(output, *networks)


def in_turns(loss, data, networks, **options):
    """Outputs and gradients of every turn, with a step of every agent so that the compound ratio is not 1."""
    results = []
    for turn in loss.turns(data, order=[2, 0, 1]):
        output, grads = found(loss, data, networks, **options)
        results.append((output, grads))
        with torch.no_grad():
            for parameter, grad in zip([p for network in networks for p in network.parameters()], grads, strict=True):
                parameter -= 0.1 * grad
        assert turn == "critic" or any(grad.any() for grad in grads)
    return results


# --- it reduces to the papers' methods


@every_space
@gains
@pytest.mark.parametrize(("older", "options"), [(HAPPOLoss, {}), (OAPPOLoss, {"reuse_matrix": MATRIX})])
def test_in_turns_without_reflection_it_is_happo_or_oappo_bit_for_bit(space, gain, older, options):
    own = options or {"own_weight": 1.0}
    composed = make(ComposedLoss, space, live=0.7, reflection_coeff=0, gain=gain, clip_epsilon=(0.5, 1.0), **own)
    before = make(older, space, live=0.7, gain=gain, clip_epsilon=(0.5, 1.0), **options)
    assert_close(in_turns(*composed), in_turns(*before), rtol=0, atol=0)


@every_space
@gains
@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_together_on_own_experience_it_is_marpo_with_a_network_for_each_agent(space, gain, coefficient):
    options = {**BOUNDS, "gain": gain, "reflection_coeff": coefficient}
    composed = make(ComposedLoss, space, live=0.7, order="together", own_weight=1.0, **options)
    marpo = make(MARPOLoss, space, live=0.7, layout="rpo", **options)
    assert_close(found(*composed), found(*marpo, but=("current_gain",)), rtol=0, atol=0)


@every_space
def test_together_with_the_kl_interval_it_is_marpo_in_the_papers_layout(space):
    composed = make(ComposedLoss, space, live=0.7, order="together", own_weight=1.0, interval="kl", ema_rate=0.5)
    marpo = make(MARPOLoss, space, live=0.7, layout="paper", ema_rate=0.5)
    for _ in range(2):  # the target moves
        assert_close(found(*composed), found(*marpo, but=("current_gain",)), rtol=0, atol=0)


@every_space
@intervals
@pytest.mark.parametrize(("coefficient", "live"), [(0.0, 0.7), (0.3, None)])
def test_together_agents_that_each_count_as_the_only_source_are_those_without_reuse(space, interval, coefficient, live):
    options = {**BOUNDS, "order": "together", "reflection_coeff": coefficient, "interval": interval}
    options |= {"entropy_coeff": 0.0}  # its noise, where it is sampled, is drawn in another order
    own = make(ComposedLoss, space, live=live, own_weight=1.0, **options)
    mixed = make(ComposedLoss, space, live=live, reuse_matrix=MATRIX, **options)
    mixed[0].reuse.matrix.copy_(torch.eye(AGENTS))  # the loop over learners, with weights of 0
    keys = ("loss_objective", "loss_critic", "min_ratio", "max_ratio", "kl_approx", "clip_fraction")
    (one, one_grads), (other, other_grads) = (found(*made) for made in (own, mixed))
    assert_close([one[key] for key in keys], [other[key] for key in keys], **TOLERANCE)
    assert_close(one_grads, other_grads, **TOLERANCE)


# --- what none of them has, in plain loops


def ratios(networks, data, learner, source):
    """Log-ratio of a learner's network on a source's rows, ``[B]``."""
    policy = agent_policy(networks[0], learner)
    column = data.clone()
    group = column["agents"]
    for key in ("observation", "action", "action_mask"):
        if key in group:
            group[key] = group[key][:, source : source + 1]
    log_prob = policy.get_dist(column.select(*networks[0].in_keys)).log_prob(group["action"]).squeeze(-1)
    return log_prob - data["agents", "action_log_prob"][:, source]


def following(data):
    """The next step's rows as rows of their own."""
    nxt = data["next"]
    rows = data.select("agents").clone()
    for key in ("observation", "action", "action_log_prob", "action_mask"):
        if key in nxt["agents"].keys():
            rows["agents", key] = nxt["agents", key]
    return rows, nxt["agents", "advantage"].squeeze(-1), nxt["reflection_mask"]


def written_out(networks, data, learner, weights, compounds, *, gain, coefficient=0.3):
    """The docstring's objective of one learner, source by source, with the compound ratios of both steps."""
    low, high, next_low, next_high = 0.5, 2.0, 0.6, 1.7
    later, next_advantage, has_next = following(data)
    live = data.get(("agents", "mask"), torch.ones_like(has_next))
    advantage = data["advantage"].squeeze(-1)
    total = torch.zeros(())
    for source, weight in enumerate(weights):
        if not weight:
            continue
        now, pairs = live[:, source], (live & has_next)[:, source]
        r, r_next = ratios(networks, data, learner, source), ratios(networks, later, learner, source)
        factor, next_factor = (compound[:, source] for compound in compounds)
        own = gain(r, advantage[:, source], low=low, high=high)
        if gain is clip_gain:
            sides = {"low": low, "high": high, "next_low": next_low, "next_high": next_high}
            reflected = reflective_clip_gain(r, r_next, next_advantage[:, source], **sides)
        else:
            joint = {"low": low * next_low, "high": high * next_high}
            reflected = gain(r + r_next, next_advantage[:, source], **joint)
        term = (factor * own)[now].mean() + coefficient * (factor * next_factor * reflected)[pairs].mean()
        total = total - weight * term
    return total


def assert_same_gradients(found, expected, actor):
    """Equal up to rounding of the largest entry: those of the barrier reach 1e14 here."""
    one, other = (gradients({"loss_": loss}, actor) for loss in (found, expected))
    for grad, expected_grad in zip(one, other, strict=True):
        assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5 * expected_grad.abs().max().clamp(min=1).item())
    return one


@every_space
@gains
def test_reflection_in_turns_weighs_both_steps_by_the_updates_so_far(space, gain):
    options = {**BOUNDS, "gain": gain, "normalize_advantage": False, "entropy_coeff": 0.0, "reuse_matrix": MATRIX}
    loss, data, networks = make(ComposedLoss, space, live=0.8, **options)
    live, (later, _, has_next) = data["agents", "mask"], following(data)
    for turn in loss.turns(data, order=[2, 0, 1]):
        if turn == "critic":
            break
        compounds = []
        for rows, paired in ((data, live), (later, has_next)):
            moved = [ratios(networks, rows, i, i) for i in range(AGENTS)]
            turned = {0: [2], 1: [2, 0], 2: []}[turn]  # who has had a turn
            change = torch.stack([moved[i] if i in turned else torch.zeros_like(moved[i]) for i in range(AGENTS)], -1)
            change = torch.where(paired, change, 0.0).detach()
            compounds.append((change.sum(-1, keepdim=True) - change).exp())
        expected = written_out(networks, data, turn, MATRIX[turn], compounds, gain=gain)
        output = loss(data)
        assert_close(output["loss_objective"], expected, **TOLERANCE)
        grads = assert_same_gradients(output["loss_objective"], expected, networks[0])
        with torch.no_grad():
            for parameter, grad in zip(networks[0].parameters(), grads, strict=True):
                parameter -= 0.2 * grad / grad.norm().clamp(min=1)


@every_space
@gains
def test_reuse_without_turns_is_the_mean_over_learners_of_their_sources_terms(space, gain):
    options = {**BOUNDS, "gain": gain, "normalize_advantage": False, "reuse_matrix": MATRIX, "order": "together"}
    loss, data, networks = make(ComposedLoss, space, **options)
    ones = torch.ones_like(data["agents", "action_log_prob"])
    each = [written_out(networks, data, i, MATRIX[i], (ones, ones), gain=gain) for i in range(AGENTS)]
    expected = torch.stack(each).mean()
    output = run(loss, data)
    assert_close(output["loss_objective"], expected, **TOLERANCE)
    assert_same_gradients(output["loss_objective"], expected, networks[0])


@every_space
def test_in_turns_the_interval_follows_the_learners_divergence_on_its_own_rows(space):
    options = {"interval": "kl", "ema_rate": 1.0, "kl_bias": 0.05, "kl_floor": 0.0, "kl_target_max": 50.0}
    alone = make(ComposedLoss, space, live=0.8, own_weight=1.0, **options)
    shared = make(ComposedLoss, space, live=0.8, reuse_matrix=MATRIX, **options)
    targets = []
    for loss, data, networks in (alone, shared):
        marpo = MARPOLoss(*networks, layout="paper", ema_rate=1.0, kl_bias=0.05, kl_floor=0.0, kl_target_max=50.0)
        old = data["agents", "mask"].clone()
        for turn in loss.turns(data, order=[0, 1, 2]):
            if turn != "critic":
                output = run(loss, data)
                only = data.clone()
                only["agents", "mask"] = old & (torch.arange(AGENTS) == turn)
                expected = run(marpo, only)
                assert_close(output["kl"], expected["kl"], **TOLERANCE)
                low, high = kl_interval(output["kl"].item() + 0.05)
                assert output["kl_interval_low"].item() == pytest.approx(low, rel=1e-5)
                assert output["kl_interval_high"].item() == pytest.approx(high, rel=1e-5)
                targets.append(output["kl_target"])
    assert_close(targets[:3], targets[3:], **TOLERANCE)


def test_a_learner_without_a_share_of_its_own_still_measures_its_divergence():
    loss, data, networks = make(ComposedLoss, interval="kl", reuse_matrix=[[0.0, 1.0, 0.0], *MATRIX[1:]])
    with torch.no_grad():
        for parameter in networks[0].parameters():
            parameter.mul_(1.5)
    turns = loss.turns(data, order=[0, 1, 2])
    assert next(turns) == 0
    assert loss(data)["kl"] > 1e-3


# --- the loop, and what is refused


@pytest.mark.parametrize("order", ["turns", "together"])
def test_phases_are_the_agents_and_the_critic_or_one_for_all(order):
    loss, data, _ = make(ComposedLoss, order=order, kl_threshold=100.0)
    phases = list(loss.phases(data.unsqueeze(0)))
    assert len(phases) == (AGENTS + 1 if order == "turns" else 1)
    assert loss.reuse.matrix.diagonal().lt(1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "both"}, "order must be one of turns, together"),
        ({"interval": "wide"}, "interval must be one of fixed, kl"),
        ({"order": "together", "reduction": "sum"}, "reduction must be mean"),
        ({"reflection_coeff": -1.0}, "reflection_coeff must be"),
    ],
)
def test_options_out_of_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(ComposedLoss, **options)
