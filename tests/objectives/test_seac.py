"""SEAC: every agent learns from everybody, weighted by how likely it would have done the same."""

import pytest
import torch
from torch.testing import assert_close
from torchrl.modules import PopArtValueNorm

from tests.objectives.loss_factories import (
    AGENTS,
    PADDING,
    add_transition,
    gradients,
    make_batch,
    make_networks,
    total,
)
from torchrl_marl.objectives import SEACLoss
from torchrl_marl.objectives.surrogates import clip_gain


def networks(space="categorical", **options):
    return make_networks(space, "observation", share_parameters=False, **options)


def on_policy_batch(actor, space="categorical", **options):
    """A batch whose actions are those of the current policies, as A2C needs it."""
    data = make_batch(actor, space, **options)
    with torch.no_grad():
        data["agents", "action_log_prob"] = actor.get_dist(data.clone()).log_prob(data["agents", "action"])
    return data


def pairwise_losses(actor, critic, data, sharing_coeff):
    """The paper's sums pair by pair: each network evaluates all slots, and one slot of the result is kept."""
    mask = data.get(("agents", "mask"), torch.ones(*data.shape, AGENTS, dtype=torch.bool))
    objective, distance = 0.0, 0.0
    for learner in range(AGENTS):
        for source in range(AGENTS):
            moved = data.clone()
            for key, value in data["agents"].items():  # the source's row in the learner's slot
                moved["agents", key][:, learner] = value[:, source]
            log_prob = actor.get_dist(moved).log_prob(moved["agents", "action"])[:, learner]
            value = critic(moved)["agents", "state_value"][:, learner, 0]
            weight = 1.0
            if source != learner:
                weight = sharing_coeff * (log_prob - data["agents", "action_log_prob"][:, source]).exp().detach()
            error = data["value_target"][:, source, 0] - value
            live = mask[:, source]
            objective = objective - (weight * log_prob * error.detach() * live).sum() / mask.sum()
            if source == learner:  # its own values are learnt wherever its returns bootstrap from them
                distance = distance + error.square().mean() / AGENTS
            else:
                distance = distance + (weight * error.square() * live).sum() / mask.sum()
    return {"loss_objective": objective, "loss_critic": 0.5 * distance}


@pytest.mark.parametrize("space", ["categorical", "masked", "continuous"])
@pytest.mark.parametrize("live", [None, 0.6], ids=["all-live", "some-dead"])
def test_gradients_are_those_of_the_papers_sums_over_pairs(space, live):
    actor, critic = networks(space)
    data = on_policy_batch(actor, space, live=live)
    losses = SEACLoss(actor, critic, sharing_coeff=0.7, entropy_coeff=0.0, functional=False)(data)
    expected = pairwise_losses(actor, critic, data, 0.7)
    assert_close(losses["loss_critic"], expected["loss_critic"])
    assert_close(gradients(losses, actor, critic), gradients(expected, actor, critic))


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("live", [None, 0.6], ids=["all-live", "some-dead"])
def test_the_objective_is_the_sum_over_sources_of_any_gain_of_ratio_and_advantage(normalize, live):
    actor, critic = networks()
    data = make_batch(actor, "categorical", live=live)  # ratios away from 1, as in a second epoch
    mask = data.get(("agents", "mask"), torch.ones(12, AGENTS, dtype=torch.bool))
    options = {"gain": clip_gain, "clip_epsilon": (0.1, 0.3), "normalize_advantage": normalize}
    loss = SEACLoss(actor, critic, sharing_coeff=0.7, functional=False, **options)
    expected = 0.0
    for i, (policy, value) in enumerate(zip(loss._policies, loss._critics, strict=True)):
        ratio = policy.get_dist(data.clone()).log_prob(data["agents", "action"]) - data["agents", "action_log_prob"]
        advantage = (data["value_target"] - value(data.clone())["agents", "state_value"]).squeeze(-1).detach()
        if normalize:  # over the rows of each pair in which the source lives
            columns = [column[alive] for column, alive in zip(advantage.T, mask.T, strict=True)]
            mean, deviation = (torch.stack([f(column) for column in columns]) for f in (torch.mean, torch.std))
            advantage = (advantage - mean) / deviation
        ratio, weight = ratio.exp(), torch.full((AGENTS,), 0.7)
        weight[i] = 1.0
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.3) * advantage)
        expected = expected - (weight * gain)[mask].sum() / mask.sum()
    output = loss(data)
    assert_close(output["loss_objective"], expected)
    assert_close(gradients({"loss_objective": output["loss_objective"]}, actor), gradients({"loss_": expected}, actor))


def test_values_are_compared_in_units_of_their_scale():
    value_norm = PopArtValueNorm(shape=1)
    actor, critic = networks(value_norm=value_norm)
    value_norm.update(torch.tensor([[-30.0], [50.0]]))
    data = make_batch(actor, "categorical")
    output = SEACLoss(actor, critic, sharing_coeff=0.0, functional=False)(data)
    error = data["value_target"] - critic(data.clone())["agents", "state_value"]
    assert_close(output["loss_critic"], 0.5 * (error / value_norm.scale()).square().mean())


def test_without_sharing_agents_are_independent():
    actor, critic = networks()
    data = make_batch(actor, "categorical")
    loss = SEACLoss(actor, critic, sharing_coeff=0.0, functional=False)
    before = gradients(loss(data), actor, critic)
    other = data.clone()
    other["agents", "observation"][:, 1:] += 1.0
    other["value_target"][:, 1:] *= -3.0
    after = gradients(loss(other), actor, critic)
    per_network = len(before) // 2 // AGENTS
    for offset in (0, len(before) // 2):  # the first agent's actor and critic
        assert_close(before[offset : offset + per_network], after[offset : offset + per_network])
    assert not torch.allclose(before[per_network], after[per_network])


@pytest.mark.parametrize("padding", [False, True], ids=["dead", "padding"])
def test_what_the_dead_have_stored_changes_nothing(padding):
    actor, critic = networks()
    data = make_batch(actor, "categorical", live=0.6, padding=padding)
    loss = SEACLoss(actor, critic, functional=False)
    garbled, dead = data.clone(), ~data[PADDING if padding else ("agents", "mask")]
    garbled["agents", "action_log_prob"][dead] = torch.nan
    if padding:
        garbled["value_target"][dead] = torch.inf
    assert_close(loss(garbled), loss(data))
    assert_close(gradients(loss(garbled), actor, critic), gradients(loss(data), actor, critic))


def test_functional_equals_stateful():
    actor, critic = networks()
    data = make_batch(actor, "categorical")
    stateful = total(SEACLoss(actor, critic, functional=False)(data))
    loss = SEACLoss(actor, critic)
    assert_close(total(loss(data)), stateful)
    total(loss(data)).backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())


def test_returns_come_from_the_value_estimator_where_the_batch_has_none():
    actor, critic = networks()
    data = add_transition(make_batch(actor, "categorical", (4, 5)))
    goes_on = ~data["next", "done"][:, :-1, None]  # then the next observation is that of the next row
    following = data["next", "agents", "observation"][:, :-1]
    following.copy_(torch.where(goes_on, data["agents", "observation"][:, 1:], following))
    loss = SEACLoss(actor, critic, functional=False)
    loss.make_value_estimator(gamma=0.9, lmbda=1)
    estimated = loss(data)
    last = critic(data["next"].clone())["agents", "state_value"].detach()
    returns, ahead = torch.empty_like(last), last[:, -1]
    for step in reversed(range(5)):  # five steps, then the source's own critic
        done, terminated = data["next", "done"][:, step, None], data["next", "terminated"][:, step, None]
        ahead = torch.where(done, last[:, step], ahead) * ~terminated
        ahead = returns[:, step] = data["next", "agents", "reward"][:, step] + 0.9 * ahead
    assert_close(estimated, loss(data.set("value_target", returns)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sharing_coeff": -1.0}, "sharing_coeff"), ({"reduction": "median"}, "reduction")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SEACLoss(*networks(), **options)


def test_networks_and_returns_must_be_the_agents_own():
    actor, critic = networks()
    shared, _ = make_networks("categorical", "observation")
    with pytest.raises(ValueError, match="network of its own"):
        SEACLoss(shared, critic)
    with pytest.raises(ValueError, match="3 agents, 2 critics"):
        SEACLoss(actor, networks(agents=2)[1])
    data = make_batch(actor, "categorical", team=True)
    with pytest.raises(ValueError, match="value_target"):
        SEACLoss(actor, critic)(data)
