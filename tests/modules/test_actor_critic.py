"""The builders of actors and critics: shapes, initial weights, who sees what, who owns which parameter."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch.distributions import Categorical, Uniform
from torch.testing import assert_close
from torchrl.data import Binary, Bounded, Composite, OneHot, Unbounded
from torchrl.data import Categorical as CategoricalSpec
from torchrl.envs import ExplorationType, VmasEnv, set_exploration_type
from torchrl.modules import PopArtValueNorm, RunningValueNorm

from torchrl_marl.modules import AgentNetworks, Denormalize, GroupSpec, make_actor, make_critic, make_mat, make_sable
from torchrl_marl.modules.distributions import CensoredTanhNormal, InversionCategorical, InversionMaskedCategorical

AGENTS, OBSERVATION, ACTIONS, STATE = 3, 5, 4, 6
LOW, HIGH = (-1.0, -2.0), (1.0, 3.0)
SHAPES = {
    "categorical": GroupSpec("agents", AGENTS, OBSERVATION, num_actions=ACTIONS, state_size=STATE),
    "masked": GroupSpec("agents", AGENTS, OBSERVATION, num_actions=ACTIONS, masked=True, state_size=STATE),
    "continuous": GroupSpec("agents", AGENTS, OBSERVATION, action_low=LOW, action_high=HIGH, state_size=STATE),
}
OBSERVES = ("joint_observation", "state", "observation")

every_space = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_critic = pytest.mark.parametrize("observes", OBSERVES)
every_sharing = pytest.mark.parametrize(
    "options",
    [{"share_parameters": True}, {"share_parameters": True, "agent_id": False}, {"share_parameters": False}],
    ids=["shared", "shared-without-id", "own"],
)


def observations(*batch, shape=SHAPES["categorical"]):
    data = TensorDict(
        {shape.name: {"observation": torch.randn(*batch, AGENTS, OBSERVATION)}, "state": torch.randn(*batch, STATE)},
        batch_size=batch,
    )
    if shape.masked:
        legal = torch.rand(*batch, AGENTS, ACTIONS) < 0.5
        legal[..., -1] |= ~legal.any(-1)
        data[shape.name, "action_mask"] = legal
    return data


def stir(network):
    """Give every parameter a size that matters: the initial outputs of an actor are all but zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.5)
    return network


def network_output(actor, data):
    """What the actor's network writes, before any mask: logits, or loc and scale side by side."""
    network = actor.module[0]
    return torch.cat([network(data.clone())[key] for key in network.out_keys], -1)


# --- actors


@every_space
@every_sharing
@pytest.mark.parametrize("batch", [(), (7,), (2, 3)], ids=str)
def test_actor_writes_an_action_and_its_log_probability_for_each_agent(shape, options, batch):
    actor = make_actor(shape, hidden_sizes=(8,), **options)
    data = actor(observations(*batch, shape=shape))
    expected = (*batch, AGENTS, 2) if shape.num_actions is None else (*batch, AGENTS)
    assert data["agents", "action"].shape == expected
    assert data["agents", "action_log_prob"].shape == (*batch, AGENTS)
    assert data["agents", "action"].dtype == (torch.float32 if shape.num_actions is None else torch.int64)


@every_space
def test_actor_has_the_distribution_of_its_actions(shape):
    distribution = make_actor(shape).get_dist(observations(7, shape=shape))
    classes = (InversionCategorical, InversionMaskedCategorical, CensoredTanhNormal)
    expected = dict(zip(("categorical", "masked", "continuous"), classes, strict=True))
    assert type(distribution) is expected[next(name for name in SHAPES if SHAPES[name] is shape)]


@every_space
def test_the_group_gives_the_keys_their_first_part(shape):
    shape = dataclasses.replace(shape, name="predators")
    actor, critic = make_actor(shape, hidden_sizes=(8,)), make_critic(shape, hidden_sizes=(8,))
    data = critic(actor(observations(7, shape=shape)))
    assert "agents" not in data.keys()
    assert {"action", "action_log_prob", "state_value"} <= set(data["predators"].keys())
    assert actor.dist_sample_keys == [("predators", "action")]
    assert actor.log_prob_keys == [("predators", "action_log_prob")]
    assert critic.out_keys == [("predators", "state_value")]


@every_sharing
def test_actions_stay_within_their_bounds_and_reach_for_both(options):
    shape = SHAPES["continuous"]
    actor = stir(make_actor(shape, hidden_sizes=(8,), **options))
    data = observations(3000)
    data["agents", "observation"] *= 100  # far out, both ways
    action = actor(data)["agents", "action"].flatten(0, 1)
    low, high = torch.tensor(LOW), torch.tensor(HIGH)
    assert (action >= low).all()
    assert (action <= high).all()
    assert (action.min(0).values < low + 0.1 * (high - low)).all()
    assert (action.max(0).values > high - 0.1 * (high - low)).all()


def test_an_untrained_actor_is_indifferent():
    # The last layer is small: all actions about equally likely, continuous ones about the middle of their bounds.
    logits = make_actor(SHAPES["categorical"]).get_dist(observations(50)).probs
    assert_close(logits, torch.full_like(logits, 1 / ACTIONS), rtol=0, atol=0.02)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = make_actor(SHAPES["continuous"])(observations(50))["agents", "action"]
    middle = (torch.tensor(LOW) + torch.tensor(HIGH)) / 2
    assert_close(action, middle.expand_as(action), rtol=0, atol=0.1)


@pytest.mark.parametrize("exploration", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC], ids=str)
def test_a_masked_actor_never_takes_an_illegal_action(exploration):
    shape = SHAPES["masked"]
    actor = stir(make_actor(shape, hidden_sizes=(8,)))
    data = observations(2000, shape=shape)
    with set_exploration_type(exploration):
        data = actor(data)
    legal = data["agents", "action_mask"]
    assert not legal.all()
    assert legal.gather(-1, data["agents", "action"].unsqueeze(-1)).all()
    assert data["agents", "action_log_prob"].isfinite().all()


@every_space
@every_sharing
def test_the_stored_log_probability_is_that_of_the_action(shape, options):
    actor = stir(make_actor(shape, hidden_sizes=(8,), **options))
    with torch.no_grad():
        data = actor(observations(500, shape=shape))
        again = actor.get_dist(data.clone()).log_prob(data["agents", "action"])
    # inverting tanh near its ends costs digits: up to some 1e-5 for continuous actions
    assert_close(again, data["agents", "action_log_prob"], rtol=1e-4, atol=1e-4)


def test_the_log_probability_of_a_categorical_is_its_log_softmax():
    actor = stir(make_actor(SHAPES["categorical"], hidden_sizes=(8,)))
    data = actor(observations(20))
    log_softmax = data["agents", "logits"].log_softmax(-1)
    expected = log_softmax.gather(-1, data["agents", "action"].unsqueeze(-1)).squeeze(-1)
    assert_close(data["agents", "action_log_prob"], expected)


def test_the_log_probability_of_a_vector_action_sums_over_its_entries():
    # p(a) of a = middle + half_width tanh(x): N(x; loc, scale) / (half_width (1 - tanh(x)^2)) in each entry
    actor = stir(make_actor(SHAPES["continuous"], hidden_sizes=(8,))).double()
    data = observations(200).to(torch.float64)
    distribution = actor.get_dist(data)
    low, high = torch.tensor(LOW, dtype=torch.float64), torch.tensor(HIGH, dtype=torch.float64)
    tanh = torch.rand(200, AGENTS, 2, dtype=torch.float64) * 1.8 - 0.9
    action = (low + high) / 2 + (high - low) / 2 * tanh
    normal = torch.distributions.Normal(data["agents", "loc"], data["agents", "scale"]).log_prob(tanh.atanh())
    density = normal - (1 - tanh**2).log() - ((high - low) / 2).log()
    assert_close(distribution.log_prob(action), density.sum(-1), rtol=1e-5, atol=1e-5)


# --- critics


@every_critic
@every_sharing
@pytest.mark.parametrize("batch", [(), (7,), (2, 3)], ids=str)
def test_critic_writes_a_value_for_each_agent(observes, options, batch):
    critic = make_critic(SHAPES["categorical"], observes=observes, hidden_sizes=(8,), **options)
    assert critic(observations(*batch))["agents", "state_value"].shape == (*batch, AGENTS, 1)
    assert critic.in_keys == ["state" if observes == "state" else ("agents", "observation")]


@every_sharing
def test_a_joint_critic_sees_all_agents(options):
    critic = stir(make_critic(SHAPES["categorical"], hidden_sizes=(8,), **options))
    jacobian = torch.autograd.functional.jacobian(critic.module, torch.randn(AGENTS, OBSERVATION))
    assert jacobian.shape == (AGENTS, 1, AGENTS, OBSERVATION)
    assert (jacobian != 0).any(-1).all()


@every_sharing
def test_an_own_observation_critic_sees_its_agent_only(options):
    critic = stir(make_critic(SHAPES["categorical"], observes="observation", hidden_sizes=(8,), **options))
    jacobian = torch.autograd.functional.jacobian(critic.module, torch.randn(AGENTS, OBSERVATION)).squeeze(1)
    reaches = (jacobian != 0).any(-1)
    assert torch.equal(reaches, torch.eye(AGENTS, dtype=torch.bool))


@every_sharing
def test_a_state_critic_sees_the_state(options):
    critic = stir(make_critic(SHAPES["categorical"], observes="state", hidden_sizes=(8,), **options))
    jacobian = torch.autograd.functional.jacobian(critic.module, torch.randn(STATE))
    assert jacobian.shape == (AGENTS, 1, STATE)
    assert (jacobian != 0).all()


@pytest.mark.parametrize("observes", ["joint_observation", "state"])
@pytest.mark.parametrize("share_parameters", [True, False], ids=["shared", "own"])
def test_a_central_critic_can_value_agents_differently(observes, share_parameters):
    options = {"observes": observes, "hidden_sizes": (8,), "share_parameters": share_parameters}
    critic = stir(make_critic(SHAPES["categorical"], **options))
    value = critic(observations(7))["agents", "state_value"].squeeze(-1)
    assert (value[:, 0] - value[:, 1]).abs().min() > 1e-4


def test_a_shared_central_critic_has_one_body():
    shared = make_critic(SHAPES["categorical"], hidden_sizes=(8,))
    # (15 + 1) x 8 hidden, (8 + 1) x 3 outputs
    assert sum(parameter.numel() for parameter in shared.parameters()) == 16 * 8 + 9 * AGENTS
    own = make_critic(SHAPES["categorical"], hidden_sizes=(8,), share_parameters=False)
    assert sum(parameter.numel() for parameter in own.parameters()) == AGENTS * (16 * 8 + 9 * 1)


@every_critic
@every_sharing
def test_value_norm_is_the_critics_last_layer(observes, options):
    norm = RunningValueNorm(shape=1)
    norm.update(torch.tensor([[300.0], [500.0]]))
    critic = make_critic(SHAPES["categorical"], observes=observes, hidden_sizes=(8,), value_norm=norm, **options)
    assert isinstance(critic.module[-1], Denormalize)
    assert critic.module[-1].value_norm is norm
    data = observations(7)
    prediction = critic.module[:-1](data[critic.in_keys[0]])
    assert_close(critic(data)["agents", "state_value"], 400 + 100 * prediction)


# --- who sees what and who owns which parameter


@every_space
@every_sharing
def test_an_agents_policy_depends_on_its_own_observation_only(shape, options):
    actor = stir(make_actor(shape, hidden_sizes=(8,), **options))
    data = observations(7, shape=shape)
    before = network_output(actor, data)
    for agent in range(AGENTS):
        other = data.clone()
        other["agents", "observation"][:, agent] += 1
        changed = (network_output(actor, other) != before).any(-1)
        assert changed[:, agent].all()
        assert not changed[:, torch.arange(AGENTS) != agent].any()


@every_space
@pytest.mark.parametrize("builder", [make_actor, make_critic], ids=["actor", "critic"])
def test_agents_with_one_observation_differ_by_their_id(shape, builder):
    data = observations(7, shape=shape)
    data["agents", "observation"] = torch.randn(7, 1, OBSERVATION).expand(7, AGENTS, OBSERVATION)
    options = {"hidden_sizes": (8,), **({"observes": "observation"} if builder is make_critic else {})}

    def outputs(**more):
        module = stir(builder(shape, **options, **more))
        return network_output(module, data) if builder is make_actor else module(data)["agents", "state_value"]

    for more in ({}, {"share_parameters": False}, {"share_parameters": False, "agent_id": False}):
        output = outputs(**more)
        assert all((output[:, i] != output[:, j]).any(-1).all() for i in range(AGENTS) for j in range(i))
    output = outputs(agent_id=False)
    assert_close(output, output[:, :1].expand_as(output))


def test_the_agent_id_is_one_hot_and_in_order():
    # A first layer that copies its inputs shows them: the observation, then the id.
    actor = make_actor(SHAPES["categorical"], hidden_sizes=())
    network = actor.module[0].module
    (layer,) = (module for module in network.modules() if isinstance(module, torch.nn.Linear))
    assert layer.in_features == OBSERVATION + AGENTS
    seen = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    data = observations(2, 7)
    actor(data)
    assert torch.equal(seen[0][..., :OBSERVATION], data["agents", "observation"])
    assert torch.equal(seen[0][..., OBSERVATION:], torch.eye(AGENTS).expand(2, 7, AGENTS, AGENTS))
    assert not any("ids" in name for name in actor.state_dict())


@every_space
def test_each_agents_own_policy_parameters_are_reached_by_its_output_only(shape):
    actor = stir(make_actor(shape, hidden_sizes=(8,), share_parameters=False))
    output = network_output(actor, observations(7, shape=shape))
    _assert_reached_by_its_agent_only(output, actor)


@every_critic
def test_each_agents_own_critic_parameters_are_reached_by_its_value_only(observes):
    critic = stir(make_critic(SHAPES["categorical"], observes=observes, hidden_sizes=(8,), share_parameters=False))
    _assert_reached_by_its_agent_only(critic(observations(7))["agents", "state_value"], critic)


def _assert_reached_by_its_agent_only(output, module):
    """Agent i's output reaches every parameter of network i and no other parameter."""
    (networks,) = (child for child in module.modules() if isinstance(child, AgentNetworks))
    for agent in range(AGENTS):
        for owner, network in enumerate(networks.networks):
            grads = torch.autograd.grad(output[:, agent].square().sum(), list(network.parameters()), retain_graph=True)
            assert [gradient.any().item() for gradient in grads] == [owner == agent] * len(grads)


# --- initial weights


def layers(module):
    """``[[(weight, bias)]]``: each layer in order, in the networks of all agents or the one that they share."""
    own = [child.networks for child in module.modules() if isinstance(child, AgentNetworks)]
    networks = own[0] if own else [module]
    assert sum(len(list(network.parameters())) for network in networks) == len(list(module.parameters()))
    linear = [[layer for layer in net.modules() if isinstance(layer, torch.nn.Linear)] for net in networks]
    return [[(layer.weight, layer.bias) for layer in same] for same in zip(*linear, strict=True)]


def assert_orthogonal(weight, gain):
    """Rows or columns, whichever are fewer, are orthogonal and of length ``gain``."""
    rows, columns = weight.shape
    gram = weight @ weight.T if rows <= columns else weight.T @ weight
    assert_close(gram, gain**2 * torch.eye(min(rows, columns)), rtol=0, atol=1e-5 * gain**2)


@pytest.mark.parametrize(("activation", "gain"), [("tanh", 5 / 3), ("relu", math.sqrt(2))])
@pytest.mark.parametrize("share_parameters", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("role", ["actor", "continuous-actor", *OBSERVES])
def test_weights_are_orthogonal_and_biases_zero(role, share_parameters, activation, gain):
    options = {"hidden_sizes": (16, 12), "activation": activation, "share_parameters": share_parameters}
    if role in OBSERVES:
        module, output_gain = make_critic(SHAPES["categorical"], observes=role, **options), 1.0
    else:
        shape = SHAPES["continuous" if role == "continuous-actor" else "categorical"]
        module, output_gain = make_actor(shape, **options), 0.01
    found = layers(module)
    assert [len(layer) for layer in found] == [1 if share_parameters else AGENTS] * 3
    for layer, layer_gain in zip(found, (gain, gain, output_gain), strict=True):
        for weight, bias in layer:
            assert_orthogonal(weight, layer_gain)
            assert not bias.any()


@pytest.mark.parametrize("builder", [make_actor, make_critic], ids=["actor", "critic"])
def test_agents_with_parameters_of_their_own_start_differently(builder):
    for layer in layers(builder(SHAPES["categorical"], share_parameters=False)):
        weights = [weight for weight, _ in layer]
        assert all((weights[i] - weights[j]).abs().max() > 1e-3 for i in range(AGENTS) for j in range(i))


@pytest.mark.parametrize(("activation", "kind"), [("tanh", torch.nn.Tanh), ("relu", torch.nn.ReLU)])
@pytest.mark.parametrize("builder", [make_actor, make_critic], ids=["actor", "critic"])
def test_hidden_layers_have_the_sizes_and_activation_asked_for(builder, activation, kind):
    module = builder(SHAPES["categorical"], hidden_sizes=(16, 12, 9), activation=activation)
    assert [layer[0][0].shape[0] for layer in layers(module)][:-1] == [16, 12, 9]
    assert len([child for child in module.modules() if isinstance(child, kind)]) == 3


@pytest.mark.parametrize("builder", [make_actor, make_critic], ids=["actor", "critic"])
def test_one_seed_gives_one_network(builder):
    modules = []
    for _ in range(2):
        torch.manual_seed(3)
        modules.append(builder(SHAPES["categorical"]))
    assert_close(*(list(module.parameters()) for module in modules), rtol=0, atol=0)


# --- the shape of a group


def vmas(scenario="balance", **options):
    return VmasEnv(scenario, num_envs=2, seed=0, **options)


def test_the_shape_of_a_vmas_group():
    # balance: three agents that observe 16 numbers each and push within [-1, 1]^2, or back, not at all or forth in each
    # of the two directions: 9 actions
    assert GroupSpec.from_env(vmas()) == GroupSpec("agents", 3, 16, action_low=(-1.0, -1.0), action_high=(1.0, 1.0))
    assert GroupSpec.from_env(vmas(continuous_actions=False)) == GroupSpec("agents", 3, 16, num_actions=9)


def test_one_of_several_groups_must_be_named():
    env = vmas("simple_tag", num_good_agents=2, num_adversaries=4)
    with pytest.raises(ValueError, match="groups adversary, agent: name one with group="):
        GroupSpec.from_env(env)
    hunters, prey = (GroupSpec.from_env(env, group) for group in ("adversary", "agent"))
    assert (hunters.name, hunters.num_agents) == ("adversary", 4)
    assert (prey.name, prey.num_agents) == ("agent", 2)
    assert hunters.observation_size == prey.observation_size + 2  # each sees the velocities of all other prey


def test_an_unknown_group_raises_and_the_known_are_listed():
    with pytest.raises(ValueError, match="Unknown group 'wolves'; the environment has adversary, agent"):
        GroupSpec.from_env(vmas("simple_tag"), "wolves")
    with pytest.raises(ValueError, match="Unknown group 'wolves'; the environment has agents"):
        make_actor(vmas(), group="wolves")


@pytest.mark.parametrize("builder", [make_actor, make_critic], ids=["actor", "critic"])
def test_a_group_must_be_that_of_the_shape_given(builder):
    builder(SHAPES["categorical"], group="agents", hidden_sizes=(8,))
    with pytest.raises(ValueError, match="group='wolves', but the shape given is that of 'agents'"):
        builder(SHAPES["categorical"], group="wolves")


@pytest.mark.parametrize("continuous", [True, False], ids=["continuous", "discrete"])
@every_sharing
def test_networks_of_an_environment_drive_it(continuous, options):
    env = vmas(continuous_actions=continuous)
    actor, critic = make_actor(env, hidden_sizes=(8,), **options), make_critic(env, hidden_sizes=(8,), **options)
    with torch.no_grad():
        data = critic(env.rollout(4, actor))
    assert data["agents", "action_log_prob"].shape == (2, 4, 3)
    assert data["agents", "state_value"].shape == (2, 4, 3, 1)


def test_one_of_several_groups_can_be_driven():
    env = vmas("simple_tag")
    actors = [make_actor(env, group=group, hidden_sizes=(8,)) for group in env.group_map]
    with torch.no_grad():
        data = env.rollout(3, TensorDictSequential(*actors))
    assert data["adversary", "action_log_prob"].shape == (2, 3, 3)
    assert data["agent", "action_log_prob"].shape == (2, 3, 1)


def test_a_group_shape_is_plain_data():
    shape = SHAPES["continuous"]
    assert GroupSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in _through_json(shape).items()}) == shape
    with pytest.raises(dataclasses.FrozenInstanceError):
        shape.num_agents = 4


def _through_json(shape):
    return json.loads(json.dumps(dataclasses.asdict(shape)))


def stub_env(observation=None, action=None, **root):
    """Just the specs of an environment with one group of three."""
    observation = Unbounded((3, 5)) if observation is None else observation
    action = CategoricalSpec(4, shape=(3,)) if action is None else action
    group = observation if isinstance(observation, Composite) else Composite(observation=observation, shape=(3,))
    return SimpleNamespace(
        group_map={"agents": ["a", "b", "c"]},
        full_observation_spec_unbatched=Composite(agents=group, **root),
        full_action_spec_unbatched=Composite(agents=Composite(action=action, shape=(3,))),
    )


def test_a_state_and_an_action_mask_are_found():
    plain = GroupSpec("agents", 3, 5, num_actions=4)
    assert GroupSpec.from_env(stub_env()) == plain
    with_state = stub_env(state=Unbounded((6,)))
    assert GroupSpec.from_env(with_state) == dataclasses.replace(plain, state_size=6)
    masked = Composite(observation=Unbounded((3, 5)), action_mask=Binary(4, shape=(3, 4)), shape=(3,))
    assert GroupSpec.from_env(stub_env(masked)) == dataclasses.replace(plain, masked=True)


def test_bounds_may_differ_between_the_entries_of_an_action():
    low, high = torch.tensor(LOW).expand(3, 2), torch.tensor(HIGH).expand(3, 2)
    shape = GroupSpec.from_env(stub_env(action=Bounded(low, high)))
    assert (shape.action_low, shape.action_high) == (LOW, HIGH)


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (stub_env(Unbounded((3, 8, 8, 3))), r"An MLP needs observations \[agents, size\]; 'agents' has \(3, 8, 8, 3\)"),
        (stub_env(Composite(pixels=Unbounded((3, 5)), shape=(3,))), "'observation'.* not in .* has .*pixels"),
        (stub_env(state=Unbounded((8, 8))), r"An MLP needs a state \[size\]; the environment's has shape \(8, 8\)"),
        (stub_env(action=OneHot(4, shape=(3, 4))), "Actions must be categorical .* or bounded"),
        (stub_env(action=CategoricalSpec(4, shape=(3, 2))), "Actions must be categorical .* or bounded"),
        (stub_env(action=Unbounded((3, 2))), "Actions must be categorical .* or bounded"),
        (stub_env(action=Bounded(0, 3, shape=(3, 2), dtype=torch.int64)), "Actions must be categorical .* or bounded"),
        (
            stub_env(action=Bounded(-torch.ones(3, 1), torch.tensor([[1.0], [1.0], [2.0]]))),
            "must share their action bounds",
        ),
        (
            stub_env(action=Bounded(-torch.tensor([[1.0], [1.0], [2.0]]), torch.ones(3, 1))),
            "must share their action bounds",
        ),
    ],
    ids=[
        "pixels",
        "no-observation",
        "state-image",
        "one-hot",
        "two-categorical",
        "unbounded",
        "integer",
        "high",
        "low",
    ],
)
def test_spaces_that_do_not_fit_raise(env, says):
    with pytest.raises(ValueError, match=says):
        GroupSpec.from_env(env)


# --- options


@pytest.mark.parametrize("share_parameters", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("builder", [make_actor, make_critic], ids=["actor", "critic"])
def test_an_unknown_activation_raises_and_the_known_are_listed(builder, share_parameters):
    with pytest.raises(ValueError, match="activation must be one of tanh, relu; got 'gelu'"):
        builder(SHAPES["categorical"], activation="gelu", share_parameters=share_parameters)


def test_an_unknown_critic_input_raises():
    with pytest.raises(ValueError, match="observes must be joint_observation, state or observation; got 'everything'"):
        make_critic(SHAPES["categorical"], observes="everything")


@pytest.mark.parametrize("share_parameters", [True, False], ids=["shared", "own"])
def test_a_state_critic_needs_a_state(share_parameters):
    shape = dataclasses.replace(SHAPES["categorical"], state_size=None)
    with pytest.raises(ValueError, match='no "state" at the root; use "joint_observation"'):
        make_critic(shape, observes="state", share_parameters=share_parameters)


@pytest.mark.gpu
@every_space
@every_sharing
def test_networks_live_where_they_are_told(shape, options):
    norm = RunningValueNorm(shape=1)
    actor = make_actor(shape, device="cuda", **options)
    data = actor(observations(7, shape=shape).to("cuda"))
    for observes in OBSERVES:
        critic = make_critic(shape, observes=observes, value_norm=norm, device="cuda", **options)
        data = critic(data)
        assert all(tensor.device.type == "cuda" for tensor in [*critic.parameters(), *critic.buffers()])
    assert all(tensor.device.type == "cuda" for tensor in [*actor.parameters(), *data.values(True, True)])


def test_settled_entropy_is_that_of_one_action_or_of_a_thousandth_of_the_ranges():
    discrete = GroupSpec("agents", num_agents=2, observation_size=3, num_actions=5)
    almost_sure = torch.tensor([0.9999, 0.0001, 0, 0, 0])
    unsure = torch.tensor([0.99, 0.01, 0, 0, 0])
    assert Categorical(almost_sure).entropy() < discrete.settled_entropy < Categorical(unsure).entropy()

    continuous = GroupSpec("agents", num_agents=2, observation_size=3, action_low=(-1.0, 0.0), action_high=(1.0, 8.0))
    thousandth = Uniform(torch.zeros(2), torch.tensor([0.002, 0.008]))
    assert continuous.settled_entropy == pytest.approx(thousandth.entropy().sum().item())


@pytest.mark.parametrize("make", [make_actor, make_critic])
@pytest.mark.parametrize("sizes", [(0,), (16, -4)])
def test_layers_without_width_are_refused(make, sizes):
    shape = GroupSpec("agents", num_agents=2, observation_size=3, num_actions=5)
    with pytest.raises(ValueError, match="hidden_sizes must be at least 1 each"):
        make(shape, hidden_sizes=sizes)


@pytest.mark.parametrize("beta", [1.0, 2.0, -0.1])
def test_statistics_that_never_settle_are_refused(beta):
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\); got"):
        Denormalize(PopArtValueNorm(beta=beta))


@pytest.mark.parametrize("make", [make_mat, make_sable])
@pytest.mark.parametrize("options", [{"embed_dim": 0}, {"embed_dim": -64}, {"num_heads": 0}])
def test_transformers_without_width_or_heads_are_refused(make, options):
    shape = GroupSpec("agents", num_agents=2, observation_size=3, num_actions=5)
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* must be .*got"):
        make(shape, **options)
