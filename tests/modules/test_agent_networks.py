"""Networks of agents' own: evaluated together, owned and trained apart."""

import pytest
import torch
from tensordict import TensorDict, TensorDictParams
from torch import nn
from torch.testing import assert_close

from tests.objectives.loss_factories import AGENTS, SPACES, gradients, group_shape, make_batch, make_networks
from torchrl_marl.modules import AgentNetworks, agent_policy, make_recurrent_actor
from torchrl_marl.objectives import MAPPOLoss


def linear_networks(agents=AGENTS):
    return [nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(agents)]


@pytest.mark.parametrize("batch", [(), (7,), (4, 6)], ids=str)
def test_each_agents_slot_is_the_output_of_its_network(batch):
    networks = linear_networks()
    inputs = torch.randn(*batch, AGENTS, 5)
    expected = torch.stack([network(inputs[..., i, :]) for i, network in enumerate(networks)], -2)
    assert_close(AgentNetworks(networks)(inputs), expected)


def test_an_optimizer_leaves_agents_without_a_gradient_alone_momentum_included():
    networks = AgentNetworks(linear_networks())
    optimizer = torch.optim.Adam(networks.parameters(), lr=0.1)
    inputs = torch.randn(7, AGENTS, 5)
    networks(inputs).square().sum().backward()  # gives everybody momentum
    optimizer.step()
    optimizer.zero_grad()
    before = [[p.clone() for p in network.parameters()] for network in networks.networks]
    networks.networks[1](inputs[:, 1]).square().sum().backward()
    optimizer.step()
    for agent, network in enumerate(networks.networks):
        same = [torch.equal(p, q) for p, q in zip(before[agent], network.parameters(), strict=True)]
        assert same == [agent != 1] * len(same)


def test_networks_that_are_not_alike_raise():
    with pytest.raises(ValueError, match="must be alike"):
        AgentNetworks([nn.Linear(5, 2), nn.Linear(5, 3)])
    with pytest.raises(ValueError, match="must be alike"):
        AgentNetworks([])


def test_inputs_of_another_number_of_agents_raise():
    with pytest.raises(ValueError, match=r"\[..., 3 agents, size\], got \(7, 2, 5\)"):
        AgentNetworks(linear_networks())(torch.zeros(7, 2, 5))


@pytest.mark.parametrize("space", SPACES)
def test_an_agents_policy_is_its_slot_of_the_groups_policy_and_acts_in_any_slot(space):
    actor, _ = make_networks(space, share_parameters=False)
    data = make_batch(actor, space)
    actions = data["agents", "action"]
    together = actor.get_dist(data.clone()).log_prob(actions)
    for agent in range(AGENTS):
        policy = agent_policy(actor, agent)
        apart = policy.get_dist(data.clone()).log_prob(actions)
        assert_close(apart[:, agent], together[:, agent])
        assert not torch.isclose(apart, together).all(0)[[j for j in range(AGENTS) if j != agent]].any()
        two = data.select(("agents", "observation"), ("agents", "action_mask"), strict=False)
        two["agents"] = two["agents"].apply(lambda x: x[:, :2])
        assert_close(policy.get_dist(two).log_prob(actions[:, :2]), apart[:, :2])


def test_an_agents_policy_holds_its_parameters_and_no_others():
    actor, _ = make_networks("categorical", share_parameters=False)
    (networks,) = (module for module in actor.modules() if isinstance(module, AgentNetworks))
    for agent in range(AGENTS):
        held = {id(parameter) for parameter in agent_policy(actor, agent).parameters()}
        assert held == {id(parameter) for parameter in networks.networks[agent].parameters()}


def test_an_agents_policy_needs_networks_of_their_own():
    shared, _ = make_networks("categorical")
    with pytest.raises(ValueError, match=r"network of its own.*module.0.module"):
        agent_policy(shared, 0)
    clusters, _ = make_networks("categorical", share_parameters=[0, 1, 0])
    with pytest.raises(ValueError, match=r"network of its own.*networks.0.0.weight.*networks.0.2.bias.$"):
        agent_policy(clusters, 1)
    own, _ = make_networks("categorical", share_parameters=False)
    for agent in (-1, AGENTS):
        with pytest.raises(ValueError, match=f"no agent {agent}.*0 to 2"):
            agent_policy(own, agent)


def test_agents_of_a_cluster_share_their_network_and_its_gradients():
    torch.manual_seed(0)
    clusters = [0, 1, 0]
    actor, critic = make_networks("categorical", share_parameters=clusters)
    apart, _ = make_networks("categorical", share_parameters=False)
    data = make_batch(actor, "categorical")
    for network in (actor, critic):
        (stack,) = (module for module in network.modules() if isinstance(module, AgentNetworks))
        assert stack.networks[0] is stack.networks[2]
        assert stack.networks[0] is not stack.networks[1]
    (mine,), (theirs,) = ([m for m in net.modules() if isinstance(m, AgentNetworks)] for net in (actor, apart))
    for agent, cluster in enumerate(clusters):
        theirs.networks[agent].load_state_dict(mine.networks[clusters.index(cluster)].state_dict())
    log_probs = [net.get_dist(data.clone()).log_prob(data["agents", "action"]) for net in (actor, apart)]
    assert_close(*log_probs)
    for log_prob in log_probs:
        (log_prob * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    for own, first, third in zip(*(net.parameters() for net in (mine.networks[0], *theirs.networks[::2])), strict=True):
        assert_close(own.grad, first.grad + third.grad)
    optimizer = torch.optim.Adam(actor.parameters(), lr=0.1)
    optimizer.step()
    assert_close(mine.networks[0].state_dict(), mine.networks[2].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("functional", [True, False], ids=["functional", "stateful"])
def test_clusters_train_with_any_loss_of_simultaneous_updates(functional):
    actor, critic = make_networks("categorical", share_parameters=[1, 1, 0])
    loss = MAPPOLoss(actor, critic, functional=functional)
    data = make_batch(actor, "categorical")
    expected = gradients(MAPPOLoss(actor, critic, functional=False)(data), actor, critic)
    assert len(list(actor.parameters())) == 2 * 4
    assert_close(gradients(loss(data), actor, critic), expected, rtol=0, atol=0)
    assert all(gradient.any() for gradient in expected)


@pytest.mark.parametrize("clusters", [[0, 1], [], [0, 0, 1, 1]], ids=str)
def test_clusters_of_another_number_of_agents_raise(clusters):
    with pytest.raises(ValueError, match=r"a cluster for each agent; got \["):
        make_networks("categorical", share_parameters=clusters)


def test_recurrent_networks_are_shared_by_all_or_none():
    with pytest.raises(ValueError, match=r"take True or False; got share_parameters=\[0, 1, 0\]"):
        make_recurrent_actor(group_shape("categorical"), share_parameters=[0, 1, 0])


def test_compiled_networks_equal_eager_ones():
    torch.compiler.reset()
    networks = AgentNetworks(linear_networks())
    inputs = torch.randn(7, AGENTS, 5)
    compiled = torch.compile(networks, fullgraph=True, backend="aot_eager")
    assert_close(compiled(inputs), networks(inputs))


@pytest.mark.parametrize("parameters", [True, False], ids=["parameters", "plain-tensors"])
def test_functional_parameters_take_the_place_of_the_networks_own(parameters):
    # as functional losses and value estimators put them there, also under vmap
    networks = AgentNetworks(linear_networks())
    before = [parameter.clone() for parameter in networks.parameters()]
    inputs = torch.randn(7, AGENTS, 5)
    other = AgentNetworks(linear_networks())
    params = TensorDict.from_module(other).data.clone()
    params = TensorDictParams(params) if parameters else params
    with params.to_module(networks, preserve_module_state=False):
        assert_close(networks(inputs), other(inputs))
        assert_close(networks.networks[1](inputs[:, 1]), other(inputs)[:, 1])

    def call(params):
        with params.to_module(networks, preserve_module_state=False):
            return networks(inputs)

    both = torch.stack([TensorDict.from_module(module).data for module in (networks, other)])
    assert_close(torch.vmap(call)(both), torch.stack([networks(inputs), other(inputs)]))
    assert_close(list(networks.parameters()), before, rtol=0, atol=0)
