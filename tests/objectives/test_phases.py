"""How a loss says it is trained: what it prepares in a batch, and in which phases it learns from that."""

import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close
from torchrl.modules import PopArtValueNorm

from tests.objectives.loss_factories import AGENTS, add_transition, make_batch, make_networks, make_team_critic
from torchrl_marl.collectors import NextStepKeys, minibatches, split_into_chunks
from torchrl_marl.modules import GroupSpec, make_actor, make_sable
from torchrl_marl.objectives import (
    CTDSLoss,
    HAPPOLoss,
    HATRPOLoss,
    MAGPOLoss,
    MAPPOLoss,
    MARPOLoss,
    OAPPOLoss,
    standardize,
)
from torchrl_marl.run.update import make_update


def make(cls=MAPPOLoss, batch=(4, 6), *, live=0.7, **options):
    """A loss, and a batch in time order as a collector yields it."""
    own = {"share_parameters": False} if cls in (HAPPOLoss, HATRPOLoss, OAPPOLoss) else {}
    actor, critic = make_networks("categorical", value_norm=PopArtValueNorm(shape=1), **own)
    loss = cls(actor, critic, functional=False, normalize_advantage=False, **options)
    loss.make_value_estimator(gamma=0.9, lmbda=0.8)
    data = add_transition(make_batch(actor, "categorical", batch, live=live))
    data.names = [None, "time"]
    return loss, data


def guided(cls=MAGPOLoss, **options):
    shape = GroupSpec("agents", AGENTS, 5, num_actions=4)
    guider, critic = make_sable(shape, embed_dim=8)
    return cls(guider, critic, make_actor(shape, hidden_sizes=(8,)), functional=False, **options)


def test_a_prepared_batch_holds_what_a_loop_by_hand_writes_bit_for_bit():
    loss, data = make()
    by_hand, data_by_hand = make()
    with torch.no_grad():
        by_hand.value_estimator(data_by_hand)
        by_hand.update_value_norm(data_by_hand)
        advantage = standardize(data_by_hand["advantage"], data_by_hand["agents", "mask"])
    assert loss.prepare(data) is data
    assert torch.equal(data["advantage"], advantage)
    assert torch.equal(data["value_target"], data_by_hand["value_target"])
    assert_close(list(loss.buffers()), list(by_hand.buffers()), rtol=0, atol=0)
    live = data["advantage"][data["agents", "mask"]]
    assert_close((live.mean(), live.std()), (torch.tensor(0.0), torch.tensor(1.0)))


@pytest.mark.parametrize("cls", [MAPPOLoss, MARPOLoss, HAPPOLoss])
def test_advantages_of_each_agent_can_be_standardised_by_themselves(cls):
    loss, data = make(cls, standardize_per_agent=True)
    plain, by_hand = make(cls)
    loss.prepare(data)
    with torch.no_grad():
        plain.value_estimator(by_hand)
    mask = data["agents", "mask"]
    for agent in range(AGENTS):
        found, advantage = (batch["advantage"][..., agent, 0][mask[..., agent]] for batch in (data, by_hand))
        assert_close(found, (advantage - advantage.mean()) / advantage.std())
    together, data = make(cls)
    together.prepare(data)
    assert data["advantage"][..., 0, 0][mask[..., 0]].mean().abs() > 0.01  # over all agents: not each agent's is zero


def test_a_teams_advantage_is_standardised_as_one():
    actor, critic = make_networks("categorical")[0], make_team_critic()
    prepared = []
    for apart in (True, False):
        loss = MAPPOLoss(actor, critic, functional=False, standardize_per_agent=apart)
        loss.set_keys(reward="reward")
        data = add_transition(make_batch(actor, "categorical", (4, 6), team=True), team=True)
        data.names = [None, "time"]
        prepared.append(loss.make_value_estimator().prepare(data)["advantage"])
    assert torch.equal(*prepared)
    assert_close((prepared[0].mean(), prepared[0].std()), (torch.tensor(0.0), torch.tensor(1.0)))


def test_marpo_prepares_the_next_step_from_standardised_advantages():
    loss, data = make(MARPOLoss)
    _, by_hand = make(MARPOLoss)
    loss.prepare(data)
    by_hand["advantage"] = data["advantage"]
    NextStepKeys()(by_hand)
    for key in (("agents", "action"), ("agents", "action_log_prob"), ("agents", "advantage"), "reflection_mask"):
        assert torch.equal(data["next"][key], by_hand["next"][key])
    assert data["next", "reflection_mask"].any()
    assert loss(next(iter(loss.phases(data))).rows)["next_gain"].isfinite()


@pytest.mark.parametrize("chunk_length", [None, 3])
def test_ppo_learns_in_one_phase_from_the_minibatches_of_all_epochs(chunk_length):
    loss, data = make()
    loss.prepare(data)
    (phase,) = loss.phases(data, chunk_length=chunk_length)
    torch.manual_seed(1)
    found = list(phase.minibatches(6, epochs=2))
    torch.manual_seed(1)
    rows = split_into_chunks(data.select(*loss.in_keys, strict=False), chunk_length)
    expected = [minibatch for _ in range(2) for minibatch in minibatches(rows, 6)]
    assert len(found) == len(expected) == 2 * 24 // 6
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("cls", [HAPPOLoss, OAPPOLoss, HATRPOLoss])
def test_sequential_methods_have_a_phase_for_every_agent_and_then_the_critics(cls):
    loss, data = make(cls, live=None)
    loss.prepare(data)
    turns, sizes = [], []
    for phase in loss.phases(data):
        turns.append(loss.turn)
        assert loss.takes_steps is (cls is HATRPOLoss and loss.turn != "critic")
        sizes.append([len(minibatch) for minibatch in phase.minibatches(8, epochs=2)])
        updated = [agent for agent in turns[:-1] if isinstance(agent, int)]
        log_ratio = phase.rows["agents", "update_log_ratio"]  # rows are of now, and the data's ratios are not 1
        assert [agent for agent in range(AGENTS) if log_ratio[:, agent].any()] == sorted(updated)
    assert turns[-1] == "critic"
    assert sorted(turns[:-1]) == list(range(AGENTS))
    agents = [[24]] if cls is HATRPOLoss else [[8] * 6]  # a natural-gradient step takes the batch as it is
    assert sizes == agents * AGENTS + [[8] * 6]
    assert loss.turn is None


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def compile(request, monkeypatch):
    """The option of an update; where it is set, gradients are those of compiled code, which runs uncompiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    return request.param


def learned(update, loss, minibatches):
    """What updates measure, and the ids of the parameters that they move."""
    before = [parameter.detach().clone() for parameter in loss.parameters()]
    measured = [update(minibatch) for minibatch in minibatches]
    return measured, {id(p) for p, old in zip(loss.parameters(), before, strict=True) if not torch.equal(p, old)}


@pytest.mark.parametrize("cls", [HAPPOLoss, HATRPOLoss])
def test_an_update_moves_the_agent_whose_phase_it_is_and_nobody_else(cls, compile):
    loss, data = make(cls, live=None)
    loss.prepare(data)
    update = make_update(loss, torch.optim.Adam(loss.parameters(), lr=1e-2), max_grad_norm=1.0, compile=compile)
    for phase in (phase for _ in range(2) for phase in loss.phases(data)):  # with momentum in the second round
        turn = loss.turn
        measured, moved = learned(update, loss, phase.minibatches(24, epochs=1))
        allowed = loss.critic_network.parameters() if turn == "critic" else loss.agent_parameters(turn)
        assert moved
        assert moved <= {id(parameter) for parameter in allowed}
        norm = "critic_grad_norm" if turn == "critic" else "grad_norm"
        assert {name for name in measured[0] if "grad_norm" in name} == {norm}


def guided_batch(loss, steps=3):
    shape = (4, steps, AGENTS)
    torch.manual_seed(0)
    data = TensorDict({"agents": {"observation": torch.randn(*shape, 5)}}, batch_size=shape[:2])
    for key in loss.actor_network.memory_keys:
        size = loss.actor_network.make_tensordict_primer().primers[key].shape
        data[key] = torch.zeros(*shape[:2], *size)
    data["agents_step"] = torch.arange(steps).expand(4, steps).unsqueeze(-1)
    data["agents", "action"] = torch.randint(4, shape)
    data["agents", "action_log_prob"] = torch.full(shape, -1.4)
    data["advantage"], data["value_target"] = torch.randn(*shape, 1), torch.randn(*shape, 1)
    return data


@pytest.mark.parametrize("cls", [MAGPOLoss, CTDSLoss])
def test_a_guider_that_goes_first_is_alone_in_its_phase(cls):
    loss = guided(cls, guider_first=True)
    learner = {id(parameter) for parameter in loss.learner_network.parameters()}
    trained = []
    for phase in loss.phases(guided_batch(loss)):
        (minibatch,) = phase.minibatches(12, epochs=1)
        losses = loss(minibatch)
        loss.zero_grad()
        sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
        trained.append({id(parameter) for parameter in loss.parameters() if parameter.grad is not None})
    guider, follower = trained
    assert guider.isdisjoint(learner)
    assert follower == learner
    both = loss(guided_batch(loss))  # outside of phases all learn
    loss.zero_grad()
    sum(value for name, value in both.items() if name.startswith("loss_")).backward()
    assert {id(parameter) for parameter in loss.parameters() if parameter.grad is not None} >= guider | follower


def test_guider_and_learner_stay_as_they_are_in_the_others_phase(compile):
    loss = guided(guider_first=True)
    update = make_update(loss, torch.optim.Adam(loss.parameters(), lr=1e-2), max_grad_norm=1.0, compile=compile)
    learner = {id(parameter) for parameter in loss.learner_network.parameters()}
    for round_ in range(2):
        for index, phase in enumerate(loss.phases(guided_batch(loss))):
            _, moved = learned(update, loss, phase.minibatches(12, epochs=1))
            assert moved, round_
            assert moved == learner if index else moved.isdisjoint(learner)


def test_marpo_prepares_batches_without_names_and_refuses_memories_of_their_own_kind():
    loss, data = make(MARPOLoss)
    _, named = make(MARPOLoss)
    data.names = [None, None]
    assert torch.equal(loss.prepare(data)["next", "reflection_mask"], loss.prepare(named)["next", "reflection_mask"])
    plain, data = make(MARPOLoss, reflection_coeff=0.0)
    assert ("next", "reflection_mask") not in plain.prepare(data).keys(True)
    with pytest.raises(ValueError, match="does not support a policy with Sable's memory"):
        MARPOLoss(*make_sable(GroupSpec("agents", AGENTS, 5, num_actions=4), embed_dim=8))


def test_agents_are_shuffled_anew_in_each_epoch():
    loss = guided(shuffle_agents=True)
    (phase,) = loss.phases(guided_batch(loss))
    torch.manual_seed(0)
    orders = [minibatch["agents", "order"] for minibatch in phase.minibatches(12, epochs=6)]
    for order in orders:  # one order for the whole batch
        assert (order == order[0, 0]).all()
        assert sorted(order[0, 0].tolist()) == list(range(AGENTS))
    assert len({tuple(order[0, 0].tolist()) for order in orders}) > 1


def test_a_memory_of_its_own_kind_is_trained_on_whole_sequences():
    loss = guided()
    with pytest.raises(ValueError, match="whole sequences here: chunk_length must be None"):
        next(iter(loss.phases(guided_batch(loss), chunk_length=3)))
    (phase,) = loss.phases(guided_batch(loss))
    assert [minibatch.shape for minibatch in phase.minibatches(6, epochs=1)] == [(2, 3), (2, 3)]


@pytest.mark.parametrize("cls", [MAPPOLoss, HAPPOLoss, MAGPOLoss])
def test_every_parameter_is_in_one_gradient_group(cls):
    loss = guided() if cls is MAGPOLoss else make(cls)[0]
    grouped = [id(parameter) for group in loss.gradient_groups().values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in loss.parameters())


def test_a_loss_that_an_optimiser_trains_takes_no_steps():
    loss, data = make()
    assert not loss.takes_steps
    with pytest.raises(NotImplementedError, match="MAPPOLoss is trained by an optimiser"):
        loss.step(data)
