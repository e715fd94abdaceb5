"""MAGPO and CTDS against an independent implementation's numbers, their reductions, and which loss trains what."""

import json
import math
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical, Normal
from torch.testing import assert_close
from torchrl.modules import MaskedCategorical, ProbabilisticActor, RunningValueNorm, TanhNormal
from torchrl.objectives.value import MultiAgentGAE

from tests.modules.test_autoregressive import NETWORKS, SHAPES, log_prob, play
from tests.objectives.loss_factories import gradients, make_networks
from torchrl_marl.modules import Denormalize, make_actor, make_recurrent_actor
from torchrl_marl.objectives import CTDSLoss, MAGPOLoss, MAPPOLoss
from torchrl_marl.objectives.divergences import divergence
from torchrl_marl.objectives.magpo import follow_imitation_gap
from torchrl_marl.objectives.surrogates import barrier_gain, clip_gain, double_clip_gain, quadratic_gain

VECTORS = json.loads((Path(__file__).parent / "magpo_vectors.json").read_text())
CASES = VECTORS["losses"]
GUIDER = ("loss_objective", "loss_guider_kl", "loss_entropy", "loss_critic")
LEARNER = ("loss_learner_kl", "loss_learner_objective")


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# --- the equations


def logits_actor(key):
    """An actor whose masked logits are an entry of the data."""
    return ProbabilisticActor(
        TensorDictModule(nn.Identity(), in_keys=[key], out_keys=[("agents", "logits")]),
        in_keys={"logits": ("agents", "logits"), "mask": ("agents", "action_mask")},
        out_keys=[("agents", "action")],
        distribution_class=MaskedCategorical,
        return_log_prob=True,
        log_prob_key=("agents", "action_log_prob"),
    )


def vector_data(case):
    """The case as a batch of one agent, with logits and values that take gradients."""
    given = CASES[case]["input"]
    leaves = {name: double(given[name]).unsqueeze(1).requires_grad_() for name in ("guider_logits", "learner_logits")}
    value = double(given["value"]).view(-1, 1, 1).requires_grad_()
    data = TensorDict(
        {
            **leaves,
            "predicted": value,
            "agents": {
                "action": torch.tensor(given["action"]).unsqueeze(1),
                "action_log_prob": double(given["old_log_prob"]).unsqueeze(1),
                "action_mask": torch.tensor(given["legal"]).bool().unsqueeze(1),
                "state_value": double(given["old_value"]).view(-1, 1, 1),
            },
            # the code divides by the standard deviation of the population
            "advantage": double(CASES[case]["intermediate"]["normalised_advantage"]).view(-1, 1, 1),
            "value_target": double(given["value_target"]).view(-1, 1, 1),
        },
        batch_size=len(value),
    )
    return data, [leaves["guider_logits"], leaves["learner_logits"], value]


def vector_loss(case, kind=MAGPOLoss, **more):
    hyper = CASES[case]["input"]["hyper"]
    critic = TensorDictModule(nn.Identity(), in_keys=["predicted"], out_keys=[("agents", "state_value")])
    options = {} if kind is CTDSLoss else {"guider_learner_ratio": float(hyper["delta"]), "rl_coeff": hyper["lam"]}
    return kind(
        logits_actor("guider_logits"),
        critic,
        logits_actor("learner_logits"),
        clip_epsilon=hyper["clip_eps"],
        clip_value=hyper["clip_eps"],
        entropy_coeff=hyper["ent_coef"],
        critic_coeff=hyper["vf_coef"] / 2,  # the code's value loss is half the mean square
        loss_critic_type="l2",
        normalize_advantage=False,
        **options,
        **more,
    ).double()


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_authors(case):
    data, leaves = vector_data(case)
    output = vector_loss(case)(data)
    expected, hyper = CASES[case]["expected"], CASES[case]["input"]["hyper"]
    for name, value in {
        "loss_objective": expected["guider_pg"],
        "loss_guider_kl": expected["guider_kl"],
        "entropy": expected["entropy"],
        "loss_critic": hyper["vf_coef"] * expected["value_loss"],
        "loss_learner_kl": expected["learner_kl"],
        "loss_learner_objective": hyper["lam"] * expected["learner_pg"],
        "double_clip_fraction": sum(CASES[case]["intermediate"]["mask"]) / len(data),
    }.items():
        assert_close(output[name].item(), value, rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    guider, learner = (sum(output[name] for name in names) for names in (GUIDER, LEARNER))
    assert_close(guider.item(), expected["guider_total"], rtol=0, atol=1e-7)
    assert_close(learner.item(), expected["learner_total"], rtol=0, atol=1e-7)
    found = torch.autograd.grad(guider + learner, leaves)
    names = ("guider_total_wrt_guider_logits", "learner_total_wrt_learner_logits", "guider_total_wrt_value")
    for gradient, leaf, name in zip(found, leaves, names, strict=True):
        assert_close(gradient, double(CASES[case][f"grad_{name}"]).view_as(leaf), rtol=0, atol=1e-7)


def test_ctds_is_that_of_the_authors():
    case = "ctds_delta_inf_lambda_0"
    data, leaves = vector_data(case)
    output = vector_loss(case, CTDSLoss)(data)
    expected = CASES[case]["expected"]
    total = sum(value for key, value in output.items() if key.startswith("loss_"))
    assert_close(total.item(), expected["guider_total"] + expected["learner_total"], rtol=0, atol=1e-7)
    found = torch.autograd.grad(total, leaves)
    names = ("guider_total_wrt_guider_logits", "learner_total_wrt_learner_logits", "guider_total_wrt_value")
    for gradient, leaf, name in zip(found, leaves, names, strict=True):
        assert_close(gradient, double(CASES[case][f"grad_{name}"]).view_as(leaf), rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_the_papers_direction_of_the_learners_divergence_is_an_option(case):
    data, _ = vector_data(case)
    reverse = CASES[case]["intermediate"]["kl_learner_guider_for_paper_eq10"]
    output = vector_loss(case, learner_kl="reverse")(data)
    assert_close(output["loss_learner_kl"].item(), sum(reverse) / len(reverse), rtol=0, atol=1e-9)


def test_advantages_are_those_of_the_authors():
    # Their done flag belongs to the observation; ours, under "next", to the step before it.
    vector = VECTORS["gae"]
    actor, critic = make_networks("categorical", agents=2)
    for case in vector["cases"]:
        value = torch.tensor([*vector["value"], vector["last_value"]]).view(1, 7, 2, 1)
        done = torch.tensor([*vector["done"], [case["last_done"]] * 2])[1:, :1].bool().unsqueeze(0)
        data = TensorDict(
            {
                "agents": {"state_value": value[:, :-1]},
                "next": {
                    "agents": {
                        "reward": torch.tensor(vector["reward"]).view(1, 6, 2, 1),
                        "state_value": value[:, 1:],
                    },
                    "done": done,
                    "terminated": done,
                },
            },
            batch_size=(1, 6),
        )
        loss = MAGPOLoss(actor, critic, actor)
        loss.make_value_estimator(MultiAgentGAE(gamma=0.99, lmbda=0.95, value_network=None))
        loss.value_estimator(data)
        for name in ("advantage", "value_target"):
            assert_close(data[name].view(6, 2), torch.tensor(case[name]), rtol=1e-5, atol=1e-5)


# guider, learner, old guider, advantage, whether the guider moves: delta 1.5, epsilon 0.2, worked out by hand
HAND = [
    (0.60, 0.30, 0.50, 1.0, 0.9, False),
    (0.60, 0.30, 0.50, -1.0, -1.2, True),
    (0.20, 0.40, 0.25, -1.0, -16 / 15, False),
    (0.20, 0.40, 0.25, 1.0, 0.8, True),
    (0.50, 0.45, 0.40, 1.0, 1.2, False),
    (0.45, 0.40, 0.42, 1.0, 15 / 14, True),
]


@pytest.mark.parametrize(("guider", "learner", "old", "advantage", "gain", "moves"), HAND)
def test_the_double_clip_stops_the_guider_where_it_would_leave_the_learner(
    guider, learner, old, advantage, gain, moves
):
    log_guider = double(guider).log().requires_grad_()
    found = double_clip_gain(
        log_guider - math.log(old),
        log_guider - math.log(learner),
        double(advantage),
        low=0.8,
        high=1.2,
        guider_learner_ratio=1.5,
    )
    assert_close(found.item(), gain)
    (gradient,) = torch.autograd.grad(found, log_guider)
    assert_close(gradient.item(), gain if moves else 0.0)


def random_policies(n=20_000):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, generator=generator, dtype=torch.float64) * scale for scale in (0.4, 0.5, 1.0)]


def test_the_general_double_clip_is_the_papers_for_the_clip():
    log_ratio, gap, advantage = random_policies()
    log_ratio.requires_grad_()
    gap_of_guider = gap + log_ratio - log_ratio.detach()  # both have the guider's gradient
    inner = gap_of_guider.clamp(-math.log(1.3), math.log(1.3)) + (log_ratio.detach() - gap)
    paper = torch.minimum(log_ratio.exp() * advantage, inner.exp().clamp(0.8, 1.2) * advantage)
    bounds = {"low": 0.8, "high": 1.2, "guider_learner_ratio": 1.3}
    found = double_clip_gain(log_ratio, gap_of_guider, advantage, **bounds)
    assert_close(found, paper)
    assert_close(*(torch.autograd.grad(gain.sum(), log_ratio, retain_graph=True)[0] for gain in (found, paper)))


@pytest.mark.parametrize("gain", [clip_gain, quadratic_gain, barrier_gain])
def test_far_from_the_learner_no_gain_pulls_the_guider_further_away(gain):
    log_ratio, gap, advantage = random_policies()
    log_ratio.requires_grad_()
    gap_of_guider = gap + log_ratio - log_ratio.detach()
    bounds = {"low": 0.7, "high": 1.4}
    found = double_clip_gain(log_ratio, gap_of_guider, advantage, guider_learner_ratio=1.3, gain=gain, **bounds)
    (gradient,) = torch.autograd.grad(found.sum(), log_ratio)
    (plain,) = torch.autograd.grad(gain(log_ratio, advantage, **bounds).sum(), log_ratio)
    outside = gap.abs() > math.log(1.3)
    assert 0.2 < outside.double().mean() < 0.8
    assert_close(gradient[~outside], plain[~outside])
    near = (log_ratio > math.log(0.7)) & (log_ratio < math.log(1.4)) & outside  # of its old self; else it is drawn back
    away = plain[near] * gap[near] > 0
    assert 0.3 < away.double().mean() < 0.7
    assert not gradient[near][away].any()
    assert_close(gradient[near][~away], plain[near][~away])


@pytest.mark.parametrize("gain", [clip_gain, quadratic_gain, barrier_gain])
def test_without_a_bound_on_the_learner_the_double_clip_is_the_gain_itself(gain):
    log_ratio, gap, advantage = random_policies()
    log_ratio.requires_grad_()
    bounds = {"low": 0.7, "high": 1.4}
    found = double_clip_gain(log_ratio, gap, advantage, guider_learner_ratio=math.inf, gain=gain, **bounds)
    plain = gain(log_ratio, advantage, **bounds)
    assert_close(found, plain)
    assert_close(*(torch.autograd.grad(x.sum(), log_ratio)[0] for x in (found, plain)))


# --- divergences


def test_the_divergence_of_squashed_gaussians_is_that_of_the_authors():
    vector = VECTORS["tanh_normal"]
    p, q = (TanhNormal(double(vector[f"loc{i}"]), double(vector[f"scale{i}"]).expand(2, 2)) for i in ("", "2"))
    assert_close(divergence(p, q, constant="first"), double(vector["expected_kl_p_q_sum"]), rtol=0, atol=1e-9)
    # their log-probabilities are clipped where an action is beyond 0.999; TorchRL's are not
    assert_close(p.log_prob(double(vector["action"]))[0], double(vector["expected_log_prob_sum"])[0], rtol=0, atol=1e-4)


def test_the_divergence_of_categoricals_is_that_of_the_definition():
    p, q = double([0.1, 0.2, 0.7]), double([0.3, 0.5, 0.2])
    expected = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    assert_close(divergence(Categorical(p), Categorical(q), constant="first").item(), expected)


def test_the_divergence_takes_gradient_to_one_side_only_and_none_through_illegal_actions():
    logits = [torch.randn(5, 3, 4).requires_grad_() for _ in range(2)]
    mask = torch.rand(5, 3, 4) < 0.6
    mask[..., 0] = True
    p, q = (MaskedCategorical(logits=x, mask=mask) for x in logits)
    for constant, of_p, of_q in (("first", False, True), ("second", True, False)):
        value = divergence(p, q, constant=constant)
        assert value.shape == (5, 3)
        assert (value >= 0).all()
        found = torch.autograd.grad(value.sum(), logits, allow_unused=True, retain_graph=True)
        assert [gradient is not None for gradient in found] == [of_p, of_q]
        for gradient in found:
            assert gradient is None or (
                gradient.isfinite().all() and gradient[mask].any() and not gradient[~mask].any()
            )


def test_policies_of_other_kinds_have_no_divergence():
    categorical, squashed = Categorical(torch.ones(3)), TanhNormal(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="one has discrete and one continuous"):
        divergence(categorical, squashed, constant="first")
    with pytest.raises(ValueError, match="not for Normal"):
        divergence(Normal(0.0, 1.0), squashed, constant="first")


# --- the losses as a whole


def sequences(guider, space, *, live=None):
    """A batch of sequences as a collector and a value estimator would leave it."""
    data = play(guider, space, steps=6, dtype=torch.float32).exclude("next")
    generator = torch.Generator().manual_seed(11)
    shape = data["agents", "action_log_prob"].shape
    data["agents", "action_log_prob"] += 0.3 * torch.randn(shape, generator=generator)
    data["agents", "state_value"] = torch.randn(*shape, 1, generator=generator)
    data["advantage"] = 1 + 2 * torch.randn(*shape, 1, generator=generator)
    data["value_target"] = torch.randn(*shape, 1, generator=generator)
    if live is not None:
        data["agents", "mask"] = torch.rand(shape, generator=generator) < live
    return data


def make(network, space, kind=MAGPOLoss, *, observes="observation", **options):
    """The loss, guider, critic and learner, which are far from their initial weights."""
    guider, critic = NETWORKS[network](SHAPES[space], observes=observes)
    learner = make_actor(SHAPES[space], hidden_sizes=(8,))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in dict.fromkeys([*guider.parameters(), *critic.parameters(), *learner.parameters()]):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return kind(guider, critic, learner, **options), guider, critic, learner


every_network = pytest.mark.parametrize("network", NETWORKS)
every_space = pytest.mark.parametrize("space", SHAPES)
functional_or_not = pytest.mark.parametrize("functional", [True, False], ids=["functional", "stateful"])


@every_network
@every_space
@functional_or_not
def test_which_loss_trains_what(network, space, functional):
    loss, guider, critic, learner = make(network, space, functional=functional)
    output = loss(sequences(guider, space))
    parts = {"encoder": critic.encoder, "decoder": guider[0].decoder, "value": critic.head, "learner": learner}
    reach = {
        key: [part for part, module in parts.items() if any(g.any() for g in gradients({key: output[key]}, module))]
        for key in output.keys()
        if key.startswith("loss_")
    }
    assert reach == {
        "loss_objective": ["encoder", "decoder"],
        "loss_guider_kl": ["encoder", "decoder"],
        "loss_entropy": ["encoder", "decoder"],
        "loss_critic": ["encoder", "value"],
        "loss_learner_kl": ["learner"],
        "loss_learner_objective": ["learner"],
    }


def run(loss, data):
    """Forward with the same noise each time, for entropies that are sampled."""
    torch.manual_seed(5)
    return loss(data)


@every_network
@every_space
def test_magpo_without_its_bound_and_its_own_objective_is_ctds(network, space):
    free = {"guider_learner_ratio": math.inf, "rl_coeff": 0.0}
    magpo, *networks = make(network, space, **free)
    ctds = CTDSLoss(*networks)
    data = sequences(networks[0], space)
    ours, theirs = run(magpo, data), run(ctds, data)
    assert not ours["loss_guider_kl"]
    assert not ours["loss_learner_objective"]
    assert_close({key: ours[key] for key in ctds.out_keys}, dict(theirs.items()))
    assert_close(*(gradients(output, *networks) for output in (ours, theirs)))


@every_network
@every_space
@pytest.mark.parametrize("live", [None, 0.6], ids=["all-live", "some-dead"])
def test_ctds_with_rl_adds_the_learners_clipped_ratio_to_the_old_guider(network, space, live):
    """Fig. 5b: MAGPO's Eq. (10), -lambda mean(min(r A, clip(r) A)) with r = pi / mu_old, for lambda in 1, 2, 4."""
    options = {"clip_epsilon": 0.3, "normalize_advantage": False}
    ctds, guider, critic, learner = make(network, space, CTDSLoss, rl_coeff=2.0, **options)
    data = sequences(guider, space, live=live)
    output = run(ctds, data)
    ratio = learner.get_dist(data.clone()).log_prob(data["agents", "action"]) - data["agents", "action_log_prob"]
    ratio, advantage = ratio.exp(), data["advantage"].squeeze(-1)
    mask = data.get(("agents", "mask"), torch.ones_like(ratio, dtype=torch.bool))
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.7, 1.3) * advantage)[mask].mean()
    assert_close(output["loss_learner_objective"], -2 * gain)
    assert_close((output["learner_min_ratio"], output["learner_max_ratio"]), (ratio[mask].min(), ratio[mask].max()))
    own = {"loss_learner_objective": output["loss_learner_objective"]}
    assert_close(gradients(own, learner), gradients({"loss_": -2 * gain}, learner))
    assert not any(gradient.any() for gradient in gradients(own, guider, critic))  # mu is a constant for the learner
    magpo = MAGPOLoss(guider, critic, learner, guider_learner_ratio=math.inf, rl_coeff=2.0, **options)
    theirs = run(magpo, data)
    assert_close({key: theirs[key] for key in ctds.out_keys}, dict(output.items()), rtol=0, atol=0)
    assert_close(*(gradients(losses, guider, critic, learner) for losses in (output, theirs)), rtol=0, atol=0)
    plain = run(CTDSLoss(guider, critic, learner, **options), data)
    assert not plain["loss_learner_objective"]
    for key in ("loss_objective", "loss_critic", "loss_learner_kl"):
        assert torch.equal(plain[key], output[key])


@every_network
@every_space
def test_the_guider_of_ctds_is_trained_as_mappo_trains_an_actor(network, space):
    ctds, guider, critic, _ = make(network, space, CTDSLoss)
    data = sequences(guider, space)
    ours, theirs = run(ctds, data), run(MAPPOLoss(guider, critic), data)
    assert_close({key: ours[key] for key in theirs.keys()}, dict(theirs.items()), rtol=0, atol=0)


@every_network
def test_a_learner_that_equals_the_guider_has_no_divergence_and_a_double_clip_that_is_the_clip(network):
    guider, critic = NETWORKS[network](SHAPES["categorical"])
    loss = MAGPOLoss(guider, critic, guider, guider_learner_ratio=1.01)
    data = sequences(guider, "categorical")
    output, mappo = loss(data), MAPPOLoss(guider, critic)(data)
    assert output["loss_learner_kl"].abs() < 1e-7
    assert not output["loss_guider_kl"]
    assert not output["double_clip_fraction"]
    assert_close(output["loss_objective"], mappo["loss_objective"])
    assert_close(output["loss_learner_objective"], mappo["loss_objective"])
    assert_close(output["learner_max_ratio"], mappo["max_ratio"])
    assert_close(output["learner_min_ratio"], mappo["min_ratio"])


@every_network
@every_space
@functional_or_not
def test_forward_returns_its_out_keys_from_its_in_keys_and_changes_nothing(network, space, functional):
    loss, guider, *_ = make(network, space, functional=functional)
    data = sequences(guider, space, live=0.7)
    data["agents", "unrelated"] = torch.zeros(4, 6, 3)
    before = data.clone()
    output = run(loss, data)
    assert sorted(output.keys()) == sorted(loss.out_keys)
    assert all(value.shape == () and value.isfinite() for value in output.values())
    assert (data == before).all()
    assert sorted(map(str, data.keys(True, True))) == sorted(map(str, before.keys(True, True)))
    few = data.select(*loss.in_keys, strict=False)
    assert ("agents", "unrelated") not in few.keys(True)
    assert_close(dict(run(loss, few).items()), dict(output.items()), rtol=0, atol=0)


@every_network
@every_space
def test_functional_equals_stateful_in_values_and_gradients(network, space):
    loss, *networks = make(network, space)
    stateful = MAGPOLoss(*networks, functional=False)
    data = sequences(networks[0], space, live=0.7)
    outputs = [run(x, data) for x in (loss, stateful)]
    assert_close(*(dict(output.items()) for output in outputs), rtol=0, atol=0)
    assert_close(*(gradients(output, *networks) for output in outputs))


def test_a_learner_with_a_memory_is_trained_on_its_own_sequence():
    # Its state is that of a policy that saw the guider's data; the loss is that of the states computed step by step.
    guider, critic = NETWORKS["sable"](SHAPES["categorical"])
    learner = make_recurrent_actor(SHAPES["categorical"], hidden_sizes=(8,), recurrent_size=6, head_sizes=(8,))
    loss = MAGPOLoss(guider, critic, learner)
    data = sequences(guider, "categorical")
    state, states = torch.randn(4, 3, 6), []
    data["is_init"] = torch.zeros(4, 6, 1, dtype=torch.bool)
    data["is_init"][1, 2] = True
    logits = []
    with torch.no_grad():
        for t in range(6):
            state = torch.where(data["is_init"][:, t, :, None], 0.0, state)
            states.append(state)
            step = learner(data[:, t].select(("agents", "observation")).set(("agents", "recurrent_state"), state))
            state = step["next", "agents", "recurrent_state"]
            logits.append(step["agents", "logits"])
    data["agents", "recurrent_state"] = torch.stack(states, 1)
    expected = divergence(guider.get_dist(data.copy()), Categorical(logits=torch.stack(logits, 1)), constant="second")
    output = loss(data)
    assert_close(output["loss_learner_kl"], expected.mean().detach())
    assert all(gradient.any() for gradient in gradients({"loss_learner_kl": output["loss_learner_kl"]}, learner))


# --- beyond the paper: a guider that sees the global state, a bound that follows the imitation gap


@every_network
@every_space
def test_a_state_that_only_the_guider_sees_moves_what_depends_on_the_guider_alone(network, space):
    loss, guider, critic, learner = make(network, space, observes="observation_and_state")
    assert "state" in loss.in_keys
    assert "state" not in learner.in_keys
    data = sequences(guider, space)
    other = data.clone().set("state", data["state"] + 1)
    before, after = run(loss, data), run(loss, other)
    for key in loss.out_keys:
        own = key in ("loss_learner_objective", "learner_min_ratio", "learner_max_ratio")
        assert torch.equal(before[key], after[key]) == own
    assert all(gradient.isfinite().all() for gradient in gradients(before, guider, critic, learner))


@every_network
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_imitation_gap_is_the_divergence_that_the_learner_minimises(network, direction):
    gaps = []

    def keep(ratio, gap):
        gaps.append(gap)
        return ratio

    loss, guider, *_ = make(network, "categorical", learner_kl=direction, adapt_ratio=keep)
    output = loss(sequences(guider, "categorical", live=0.7))
    (gap,) = gaps
    assert not gap.requires_grad
    assert torch.equal(gap, output["loss_learner_kl"].detach())


@every_network
@every_space
@functional_or_not
def test_a_rule_that_changes_nothing_is_magpo_bit_for_bit(network, space, functional):
    fixed, *networks = make(network, space, functional=functional)
    adaptive = MAGPOLoss(*networks, functional=functional, adapt_ratio=lambda ratio, gap: ratio)
    data = sequences(networks[0], space, live=0.7)
    outputs = [run(loss, data) for loss in (fixed, adaptive)]
    assert outputs[1].pop("guider_learner_ratio") == 1.5
    assert_close(*(dict(output.items()) for output in outputs), rtol=0, atol=0)
    assert_close(*(gradients(output, *networks) for output in outputs), rtol=0, atol=0)


def test_the_bound_follows_its_rule_in_training_mode_only_and_is_used_at_once():
    loss, *networks = make("mat", "categorical", adapt_ratio=lambda ratio, gap: ratio + 10 * gap)
    data = sequences(networks[0], "categorical")
    gap = MAGPOLoss(*networks)(data)["loss_learner_kl"].item()
    loss.eval()
    assert loss(data)["guider_learner_ratio"] == 1.5
    loss.train()
    with torch.no_grad():
        output = loss(data)
    assert_close(output["guider_learner_ratio"].item(), 1.5 + 10 * gap)
    at_once = MAGPOLoss(*networks, guider_learner_ratio=1.5 + 10 * gap)(data)
    assert_close(output["double_clip_fraction"], at_once["double_clip_fraction"])
    assert output["double_clip_fraction"] < MAGPOLoss(*networks)(data)["double_clip_fraction"]
    assert_close(loss(data)["guider_learner_ratio"].item(), 1.5 + 20 * gap)
    restored = MAGPOLoss(*networks, adapt_ratio=loss.adapt_ratio)
    restored.load_state_dict(loss.state_dict())
    assert_close(restored.guider_learner_ratio.item(), 1.5 + 20 * gap)


# delta, gap, delta afterwards: target 0.02, rate 0.5, between 1.1 and 9, by hand
@pytest.mark.parametrize(
    ("ratio", "gap", "after"),
    [
        (4.0, 0.02, 4.0),  # on target
        (4.0, 0.08, 2.0),  # four times too far: half the width ln 4
        (2.0, 0.005, 4.0),  # four times too close: twice the width
        (2.0, 0.0, 9.0),
        (1.2, 2.0, 1.1),
        (math.inf, 0.08, 9.0),
        (2.0, math.nan, 2.0),
        (2.0, math.inf, 2.0),
    ],
)
def test_the_width_of_the_bound_follows_the_gap_to_its_target(ratio, gap, after):
    options = {"target": 0.02, "rate": 0.5, "low": 1.1, "high": 9.0}
    assert_close(follow_imitation_gap(double(ratio), double(gap), **options), double(after))


@pytest.mark.parametrize("options", [{"target": 0.0}, {"rate": -1.0}, {"low": 1.0}, {"low": 3.0, "high": 2.0}], ids=str)
def test_a_rule_out_of_its_range_raises(options):
    with pytest.raises(ValueError, match="Needs target > 0, rate >= 0, 1 < low <= high; got"):
        follow_imitation_gap(double(2.0), double(0.1), **options)


@every_network
def test_policies_do_not_learn_from_dead_agents(network):
    loss, *networks = make(network, "categorical")
    data = sequences(networks[0], "categorical", live=0.6)
    dead = ~data["agents", "mask"]
    expected = loss(data)
    data["agents", "action_log_prob"][dead] = torch.nan
    data["advantage"][dead] = 1e6
    found = loss(data)
    assert_close(dict(found.items()), dict(expected.items()))
    assert_close(gradients(found, *networks), gradients(expected, *networks))
    data["value_target"][dead] += 1  # but the critic does
    assert (loss(data)["loss_critic"] - expected["loss_critic"]).abs() > 0.01


@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_dead_agents_do_not_bound_the_learners_ratios(shift):
    # Every live ratio is e^shift; a dead agent's ratio of one is neither the smallest nor the largest.
    loss, guider, _, learner = make("mat", "categorical")
    data = sequences(guider, "categorical", live=0.6)
    data["agents", "action_log_prob"] = log_prob(learner, data).detach() - shift
    output, expected = loss(data), torch.tensor(shift).exp()
    assert_close((output["learner_min_ratio"], output["learner_max_ratio"]), (expected, expected))


@pytest.mark.parametrize("kind", [MAGPOLoss, CTDSLoss])
def test_a_learner_imitates_where_it_lives(kind):
    loss, guider, _, learner = make("mat", "categorical", kind)
    data = sequences(guider, "categorical", live=0.6)
    kl = divergence(guider.get_dist(data.copy()), learner.get_dist(data.copy()), constant="first")
    assert_close(loss(data)["loss_learner_kl"], kl[data["agents", "mask"]].mean())


@every_network
def test_the_encoder_runs_once_for_guider_and_critic_and_gives_the_critic_what_it_would_compute(network):
    loss, guider, critic, _ = make(network, "categorical", functional=False)
    data = sequences(guider, "categorical")
    runs = []
    critic.encoder.register_forward_hook(lambda *_: runs.append(1))
    shared = loss(data)
    assert len(runs) == 1
    loss._shared_keys = []
    assert_close(dict(loss(data).items()), dict(shared.items()))
    assert len(runs) == 3


def test_bounds_and_coefficients_can_be_scheduled_by_assignment():
    loss, *networks = make("mat", "categorical")
    data = sequences(networks[0], "categorical")
    before = loss(data)
    loss.guider_learner_ratio, loss.rl_coeff = 1.2, 3.0
    built = MAGPOLoss(*networks, guider_learner_ratio=1.2, rl_coeff=3.0)
    assert_close(dict(loss(data).items()), dict(built(data).items()))
    assert loss(data)["double_clip_fraction"] != before["double_clip_fraction"]
    assert {"guider_learner_ratio", "rl_coeff"} <= set(loss.state_dict())


@pytest.mark.parametrize("kind", [MAGPOLoss, CTDSLoss])
def test_without_reduction_there_is_one_entry_for_each_step_and_agent(kind):
    loss, *networks = make("mat", "categorical", kind, reduction="none")
    data = sequences(networks[0], "categorical")
    output, reduced = loss(data), kind(*networks)(data)
    for key in loss.out_keys:
        assert output[key].shape == ((4, 6, 3) if key.startswith("loss_") else ())
        assert_close(output[key].mean(), reduced[key])


@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize("old", [0.0, 0.7])
def test_values_beyond_the_clip_are_not_pulled_further(scale, old):
    # with a value norm of that scale, which must not change the loss of values that are so much larger
    norm = RunningValueNorm(shape=1)
    norm.update(scale * torch.tensor([[-1.0], [1.0]]))
    shape = SHAPES["categorical"]
    guider, _ = NETWORKS["mat"](shape)
    value = old + torch.tensor([0.1, 0.5, -0.5, 0.5, -0.5]).view(-1, 1, 1).expand(5, 3, 1).clone()
    value.requires_grad_()
    critic = TensorDictModule(
        nn.Sequential(nn.Identity(), Denormalize(norm)), in_keys=["predicted"], out_keys=[("agents", "state_value")]
    )
    loss = MAGPOLoss(guider, critic, make_actor(shape), clip_value=0.2, loss_critic_type="l2", reduction="none")
    target = old + torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]).view(-1, 1, 1).expand(5, 3, 1)
    data = sequences(guider, "categorical")[:, 0].repeat(2)[:5]
    data.update({"predicted": value, "value_target": scale * target})
    data["agents", "state_value"] = torch.full((5, 3, 1), scale * old)
    found = loss(data)["loss_critic"]
    # of the old value, 0.5 more counts as 0.2 more and 0.5 less as 0.2 less, unless the distance is larger without
    expected = torch.tensor([0.9**2, 0.8**2, 1.5**2, 1.5**2, 0.8**2]).view(-1, 1).expand(5, 3)
    assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), value)
    assert [bool(g) for g in gradient[:, 0, 0]] == [True, False, True, True, False]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"guider_learner_ratio": 1.0}, "guider_learner_ratio must be above 1, got 1.0"),
        ({"rl_coeff": -1.0}, "rl_coeff must be at least 0, got -1.0"),
        ({"learner_kl": "both"}, "learner_kl must be one of forward, reverse; got 'both'"),
        ({"clip_value": 0.0}, "clip_value must be above 0"),
    ],
)
def test_options_out_of_range_raise(options, says):
    with pytest.raises(ValueError, match=says):
        make("mat", "categorical", **options)


@pytest.mark.parametrize(("network", "space"), [("mat", "masked"), ("sable", "continuous")])
def test_compiled_graph_equals_eager(network, space):
    torch.compiler.reset()
    loss, *networks = make(network, space, functional=False, adapt_ratio=follow_imitation_gap)
    data = sequences(networks[0], space, live=0.7)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    outputs = []
    for module in (compiled, loss):
        loss.guider_learner_ratio = 1.5
        outputs.append(run(module, data))
    assert loss.guider_learner_ratio < 1.5
    exact = {key for key in loss.out_keys if "entropy" not in key or space == "masked"}  # a sample's noise may differ
    assert_close(*({key: output[key] for key in exact} for output in outputs), rtol=1e-4, atol=1e-5)
    if space == "masked":
        assert_close(*(gradients(output, *networks) for output in outputs), rtol=1e-3, atol=1e-5)
