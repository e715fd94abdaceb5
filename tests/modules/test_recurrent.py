"""Recurrent actors and critics: one step or a sequence, restarts, whose weights and whose memory are whose."""

import json
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close
from torchrl.collectors import Collector
from torchrl.envs import ExplorationType, TransformedEnv, set_exploration_type
from torchrl.modules import ProbabilisticActor, RunningValueNorm, set_recurrent_mode
from torchrl.modules.utils import get_env_transforms_from_module

from torchrl_marl.envs import make_env
from torchrl_marl.modules import (
    AgentNetworks,
    Denormalize,
    GroupSpec,
    MultiAgentGRU,
    RecurrentModule,
    collection_policy,
    make_actor,
    make_critic,
    make_recurrent_actor,
    make_recurrent_critic,
    with_recurrent_state,
)
from torchrl_marl.modules.gru_sequence import gru_sequence

AGENTS, OBSERVATION, ACTIONS, STATE, HIDDEN = 3, 5, 4, 6, 7
SPACES = {
    "categorical": {"num_actions": ACTIONS},
    "masked": {"num_actions": ACTIONS, "masked": True},
    "continuous": {"action_low": (-1.0, -2.0), "action_high": (1.0, 3.0)},
}
SHAPES = {name: GroupSpec("agents", AGENTS, OBSERVATION, state_size=STATE, **kw) for name, kw in SPACES.items()}
SHAPE = SHAPES["categorical"]
SIZES = {"hidden_sizes": (8,), "recurrent_size": HIDDEN, "head_sizes": (9,)}
STARTS = [[1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]]  # [envs, time]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}

every_space = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_sharing = pytest.mark.parametrize("share", [True, False], ids=["shared", "own"])
every_critic = pytest.mark.parametrize("observes", ["joint_observation", "state", "observation"])


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def stir(network):
    """Give every parameter a size that matters: the initial outputs of an actor are all but zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.5)
    return network


def memory(network):
    (module,) = (module for module in network.modules() if isinstance(module, RecurrentModule))
    return module


def output(network, data):
    """What a network says of each row: all parameters of the action distribution side by side, or the values."""
    data = data.copy()
    if not isinstance(network, ProbabilisticActor):
        return network(data)["agents", "state_value"]
    network.module[0](data)
    parameters = [key for key in ("logits", "loc", "scale") if ("agents", key) in data.keys(True)]
    return torch.cat([data["agents", key] for key in parameters], -1)


def sequences(network, starts=STARTS, shape=SHAPE):
    """Data ``[envs, time]`` that start from states which are not zero and hold nonsense where none may be read."""
    starts = torch.tensor(starts, dtype=torch.bool)
    batch = starts.shape
    data = TensorDict(
        {
            "agents": {"observation": torch.randn(*batch, AGENTS, OBSERVATION)},
            "state": torch.randn(*batch, STATE),
            "is_init": starts.unsqueeze(-1),
        },
        batch_size=batch,
    )
    if shape.masked:
        legal = torch.rand(*batch, AGENTS, ACTIONS) < 0.6
        legal[..., 1] = True
        data["agents", "action_mask"] = legal
    module = memory(network)
    state = torch.full((*batch, *module.make_tensordict_primer().primers[module.state_key].shape), torch.nan)
    state[:, 0] = torch.randn_like(state[:, 0])
    state[starts] = 0
    return data.set(module.state_key, state)


def stepped(network, data):
    """Outputs and states of a sequence, one step after the other, with states put to zero where episodes start."""
    key, outputs, states = memory(network).state_key, [], []
    state = data[key][:, 0]
    for now in data.unbind(-1):
        start = now["is_init"].reshape(-1, *[1] * (state.ndim - 1))
        now = now.copy().set(key, state * ~start)
        outputs.append(output(network, now))
        state = memory(network)(now)["next", key]
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def networks(share=True, shape=SHAPE):
    critics = [
        make_recurrent_critic(shape, observes=observes, share_parameters=share, **SIZES)
        for observes in ("joint_observation", "state", "observation")
    ]
    return [stir(network) for network in (make_recurrent_actor(shape, share_parameters=share, **SIZES), *critics)]


def gru_like(gru):
    """``torch.nn.GRU`` with the weights of one agent."""
    reference = nn.GRU(gru.weight_ih.shape[-1], gru.hidden_size, batch_first=True)
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(reference, f"{name}_l0").copy_(getattr(gru, name))
    return reference


# --- the unit


def test_a_restart_goes_on_from_the_state_stored_there():
    gru = MultiAgentGRU(3, 4)
    inputs, state = torch.randn(5, 2, 3), torch.randn(5, 2, 4)
    restart = torch.zeros(5, 2, 1, dtype=torch.bool)
    restart[2, 1] = True
    found, straight = gru(inputs, state, restart), gru(inputs, state, torch.zeros_like(restart))
    anew = gru(inputs[2:], state[2:], torch.zeros_like(restart[2:]))
    assert_close((found[:, 0], found[:2, 1], found[2:, 1]), (straight[:, 0], straight[:2, 1], anew[:, 1]))


def test_without_restarts_it_is_torchs_gru_in_values_and_gradients():
    gru = stir(MultiAgentGRU(OBSERVATION, HIDDEN))
    reference = gru_like(gru)
    inputs, first = torch.randn(4, 6, OBSERVATION), torch.randn(4, HIDDEN)
    states = torch.full((6, 4, HIDDEN), torch.nan)
    states[0] = first
    after = gru(inputs.transpose(0, 1), states, torch.zeros(6, 4, 1, dtype=torch.bool)).transpose(0, 1)
    expected, _ = reference(inputs, first.unsqueeze(0))
    assert_close(after, expected, **TOLERANCE)
    weights = torch.randn_like(after)
    gradients = torch.autograd.grad((weights * after).sum(), gru.parameters())
    expected_gradients = torch.autograd.grad((weights * expected).sum(), reference.parameters())
    assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


def test_weights_of_ones_own_are_one_gru_for_each_agent():
    units = AgentNetworks([stir(MultiAgentGRU(OBSERVATION, HIDDEN)) for _ in range(AGENTS)])
    inputs, state = torch.randn(6, 4, AGENTS, OBSERVATION), torch.randn(6, 4, AGENTS, HIDDEN)
    restart = (torch.rand(6, 4, 1, 1) < 0.3).expand(6, 4, AGENTS, 1)
    after, step = units(inputs, state, restart), units(inputs[0], state[0])
    for agent, unit in enumerate(units.networks):
        assert_close(after[:, :, agent], unit(inputs[:, :, agent], state[:, :, agent], restart[:, :, 0]), **TOLERANCE)
        assert_close(step[:, agent], unit(inputs[0, :, agent], state[0, :, agent]), **TOLERANCE)


def test_each_gates_matrices_begin_orthogonal_and_biases_zero():
    gru = MultiAgentGRU(HIDDEN, HIDDEN)
    gates = torch.cat([gru.weight_ih, gru.weight_hh]).detach().reshape(6, HIDDEN, HIDDEN)
    for gate in gates:
        assert_close(gate @ gate.T, torch.eye(HIDDEN), **TOLERANCE)
    assert len({gate.sum().item() for gate in gates}) == 6
    assert not gru.bias_ih.any()
    assert not gru.bias_hh.any()


def test_the_actor_reproduces_the_vectors_of_magpos_learner():
    # Computed independently in numpy: Linear, ReLU, GRU, Linear, ReLU, Linear, with a reset in the middle and a mask.
    vectors = json.loads((Path(__file__).parent / "gru_vectors.json").read_text())

    def vector(*path):
        value = vectors
        for name in path:
            value = value[name]
        return torch.tensor(value, dtype=torch.float64)

    shape = GroupSpec("agents", 2, 3, num_actions=3, masked=True)
    actor = make_recurrent_actor(
        shape, hidden_sizes=(4,), recurrent_size=4, head_sizes=(4,), activation="relu", agent_id=False
    ).double()
    weights = dict(actor.named_parameters())
    pre, gru, post = vectors["params"]["pre"], vectors["params"]["gru"], vectors["params"]["post"]
    values = {
        "embedding.0.0.weight": torch.tensor(pre["kernel"]).T,
        "embedding.0.0.bias": torch.tensor(pre["bias"]),
        "gru.weight_ih": torch.cat([torch.tensor(gru[f"i{gate}_w"]).T for gate in "rzn"]),
        "gru.weight_hh": torch.cat([torch.tensor(gru[f"h{gate}_w"]).T for gate in "rzn"]),
        "gru.bias_ih": torch.cat([torch.tensor(gru[f"i{gate}_b"]) for gate in "rzn"]),
        "gru.bias_hh": torch.cat([torch.zeros(8), torch.tensor(gru["hn_b"])]),
        "1.module.0.weight": torch.tensor(post["kernel"]).T,
        "1.module.0.bias": torch.tensor(post["bias"]),
        "1.module.2.weight": torch.tensor(vectors["params"]["head"]["kernel"]).T,
        "1.module.2.bias": torch.tensor(vectors["params"]["head"]["bias"]),
    }
    assert len(values) == len(weights)
    for suffix, value in values.items():
        (name,) = (name for name in weights if name.endswith(suffix))
        weights[name].data.copy_(value)
    done = vector("done").transpose(0, 1)  # time first in the file, and one for each agent
    assert (done == done[..., :1]).all()
    observation = vector("obs").transpose(0, 1)
    state = torch.zeros(2, 4, 2, 4, dtype=torch.float64)
    state[:, 0] = vector("h0")
    agents = {"observation": observation, "recurrent_state": state}
    agents["action_mask"] = vector("legal").transpose(0, 1).bool()
    data = TensorDict({"agents": agents, "is_init": done[..., :1].bool()}, batch_size=(2, 4))
    with set_recurrent_mode(True):
        logits = actor.get_dist(data).logits.log_softmax(-1)
        final = memory(actor)(data)["next", "agents", "recurrent_state"][:, -1]
    expected = vector("expected_log_softmax").transpose(0, 1)
    legal = agents["action_mask"]
    assert_close(logits[legal], expected[legal], rtol=0, atol=1e-6)
    assert_close(final, vector("expected_final_hidden"), rtol=0, atol=1e-6)


# --- sequences


@every_sharing
def test_a_sequence_equals_stepping_with_episode_starts_anywhere(share):
    for network in networks(share):
        data = sequences(network)
        with set_recurrent_mode(True):
            outputs, states = output(network, data), memory(network)(data.copy())["next", memory(network).state_key]
        expected_outputs, expected_states = stepped(network, data)
        assert_close(outputs, expected_outputs, rtol=0, atol=1e-6)
        assert_close(states, expected_states, rtol=0, atol=1e-6)


@every_space
@every_sharing
@pytest.mark.usefixtures("float64")  # single precision loses digits on the way back through tanh
def test_log_probabilities_of_a_sequence_are_those_of_acting(shape, share):
    actor = stir(make_recurrent_actor(shape, share_parameters=share, **SIZES))
    data, log_probs, actions = sequences(actor, shape=shape), [], []
    state = data["agents", "recurrent_state"][:, 0]
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        for now in data.unbind(-1):
            now = now.copy().set(("agents", "recurrent_state"), state * ~now["is_init"].unsqueeze(-1))
            actor(now)
            state = now["next", "agents", "recurrent_state"]
            actions.append(now["agents", "action"])
            log_probs.append(now["agents", "action_log_prob"])
        with set_recurrent_mode(True):
            recomputed = actor.get_dist(data).log_prob(torch.stack(actions, 1))
    assert recomputed.shape == (4, 6, AGENTS)
    assert_close(recomputed, torch.stack(log_probs, 1), rtol=0, atol=1e-6)


@every_sharing
@pytest.mark.parametrize("length", [1, 2, 3])
def test_chunks_equal_the_whole(share, length):
    for network in networks(share):
        data, key = sequences(network), memory(network).state_key
        whole, after = stepped(network, data)
        start = data["is_init"].reshape(*data.shape, *[1] * (after.ndim - 2))
        stored = torch.cat([data[key][:, :1], after[:, :-1] * ~start[:, 1:]], 1)
        chunks = data.set(key, stored).reshape(-1, length)
        with set_recurrent_mode(True):
            assert_close(output(network, chunks), whole.reshape(-1, length, *whole.shape[2:]), rtol=0, atol=1e-6)


def test_an_episode_start_cuts_all_influence_of_what_came_before():
    for network in networks():
        data = sequences(network, [[0, 0, 0, 1, 0, 0]])
        for key in (("agents", "observation"), "state", memory(network).state_key):
            data[key].requires_grad_()
        with set_recurrent_mode(True):
            later = output(network, data)[:, 3:].sum()
        read = [key for key in network.in_keys if key in data.keys(True, True) and data[key].requires_grad]
        seen, state = torch.autograd.grad(later, [data[key] for key in read])
        assert not seen[:, :3].any()
        assert seen[:, 3:].flatten(2).any(-1).all()
        assert not state[:, 0].any()


def test_gradients_reach_back_to_the_start_of_the_episode():
    for network in networks():
        data = sequences(network, [[0, 0, 1, 0, 0, 0]])
        observed = next(key for key in (("agents", "observation"), "state") if key in network.in_keys)
        data[observed].requires_grad_()
        with set_recurrent_mode(True):
            last = output(network, data)[:, -1].sum()
        (seen,) = torch.autograd.grad(last, data[observed])
        assert seen.flatten(2).any(-1).tolist() == [[False, False, True, True, True, True]]


def test_leading_dimensions_are_batch():
    actor = networks()[0]
    data = sequences(actor)
    with set_recurrent_mode(True):
        expected = output(actor, data).reshape(2, 2, 6, AGENTS, -1)
        assert_close(output(actor, data.reshape(2, 2, 6)), expected, **TOLERANCE)


def test_a_row_outside_of_recurrent_mode_starts_from_its_stored_state_alone():
    for network in networks():
        data = sequences(network, [[1, 0], [0, 1]])
        key = memory(network).state_key
        data[key] = torch.randn_like(data[key])
        rows = output(network, data.reshape(-1))
        assert_close(output(network, data), rows.reshape(2, 2, *rows.shape[1:]), **TOLERANCE)
        assert_close(output(network, data.set("is_init", ~data["is_init"])), output(network, data))


# --- agents


def weights_of_agents(network):
    """Each weight of networks of agents' own, as the list of all agents' ones."""
    stacks = [module for module in network.modules() if isinstance(module, AgentNetworks)]
    return [same for stack in stacks for same in zip(*(own.parameters() for own in stack.networks), strict=True)]


def test_gradients_of_one_agents_output_touch_only_its_own_weights():
    for network in networks(share=False):
        data = sequences(network)
        with set_recurrent_mode(True):
            mine = output(network, data)[:, :, 1].square().sum()
        assert sum(map(len, weights_of_agents(network))) == len(list(network.parameters()))
        for weights in weights_of_agents(network):
            gradients = torch.autograd.grad(mine, weights, retain_graph=True)
            assert [gradient.any().item() for gradient in gradients] == [False, True, False]


def permuted(network, data, order, *, weights):
    """The network's output for agents in another order, with their weights moved along."""
    data = data.copy()
    for key in (("agents", "observation"), memory(network).state_key):
        data[key] = data[key][:, :, order]
    if weights:
        with torch.no_grad():
            for same in weights_of_agents(network):
                before = [weight.clone() for weight in same]
                for weight, source in zip(same, order, strict=True):
                    weight.copy_(before[source])
    with set_recurrent_mode(True):
        return output(network, data)


@every_sharing
def test_permuted_agents_give_permuted_results(share):
    options = {"share_parameters": share, "agent_id": False, **SIZES}
    actor = stir(make_recurrent_actor(SHAPE, **options))
    critic = stir(make_recurrent_critic(SHAPE, observes="observation", **options))
    for network in (actor, critic):
        data, order = sequences(network), [2, 0, 1]
        with set_recurrent_mode(True):
            expected = output(network, data)[:, :, order]
        assert_close(permuted(network, data, order, weights=not share), expected, **TOLERANCE)
        assert not torch.allclose(output(network, data), expected)


@every_sharing
def test_an_agent_acts_on_its_own_history_alone(share):
    actor = stir(make_recurrent_actor(SHAPE, share_parameters=share, **SIZES))
    data = sequences(actor)
    others = data.clone()
    others["agents", "observation"][:, :, 1:] += 1
    others["agents", "recurrent_state"][:, :, 1:] += 1
    with set_recurrent_mode(True):
        before, after = output(actor, data), output(actor, others)
    assert_close(before[:, :, 0], after[:, :, 0])
    assert not torch.isclose(before[:, :, 1:], after[:, :, 1:]).all(-1).any()


def test_agents_that_share_a_network_differ_by_their_id():
    actor = networks()[0]
    data = sequences(actor)
    data["agents", "observation"] = data["agents", "observation"][:, :, :1].expand(-1, -1, AGENTS, -1)
    distribution = output(actor, data.set(("agents", "recurrent_state"), torch.zeros(4, 6, AGENTS, HIDDEN)))
    assert not torch.isclose(distribution[:, :, 0], distribution[:, :, 1]).all()


# --- builders


@every_space
@every_sharing
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=str)
def test_an_actor_writes_actions_log_probabilities_and_the_state_to_carry_on(shape, share, batch):
    actor = make_recurrent_actor(shape, share_parameters=share, **SIZES)
    agents = {"observation": torch.randn(*batch, AGENTS, OBSERVATION)}
    agents["recurrent_state"] = torch.zeros(*batch, AGENTS, HIDDEN)
    agents["action_mask"] = torch.ones(*batch, AGENTS, ACTIONS, dtype=torch.bool)
    data = actor(TensorDict({"agents": agents}, batch_size=batch))
    assert data["agents", "action"].shape == ((*batch, AGENTS, 2) if shape.num_actions is None else (*batch, AGENTS))
    assert data["agents", "action_log_prob"].shape == (*batch, AGENTS)
    assert data["next", "agents", "recurrent_state"].shape == (*batch, AGENTS, HIDDEN)
    assert actor.in_keys[:3] == [("agents", "observation"), ("agents", "recurrent_state"), "is_init"]


@every_space
def test_actions_are_distributed_as_in_a_feed_forward_actor(shape):
    feed_forward = make_actor(shape).get_dist(sequences(networks()[0], shape=shape))
    recurrent_actor = make_recurrent_actor(shape, **SIZES)
    recurrent = recurrent_actor.get_dist(sequences(recurrent_actor, [[1, 1]], shape=shape))
    assert type(recurrent) is type(feed_forward)
    if shape.num_actions is None:
        assert_close(recurrent.low, feed_forward.low)
        middle = recurrent.deterministic_sample
        assert_close(middle, torch.tensor([0.0, 0.5]).expand_as(middle), rtol=0, atol=0.1)
    else:  # an untrained actor is indifferent
        legal = recurrent.probs > 0
        uniform = legal / legal.sum(-1, keepdim=True)
        assert_close(recurrent.probs, uniform, rtol=0, atol=0.02)


@every_critic
@every_sharing
def test_a_critic_values_every_agent(observes, share):
    norm = RunningValueNorm(shape=1)
    norm.update(torch.tensor([[1.0], [5.0]]))
    critic = make_recurrent_critic(SHAPE, observes=observes, share_parameters=share, value_norm=norm, **SIZES)
    data = sequences(critic)
    with set_recurrent_mode(True):
        value = critic(data)["agents", "state_value"]
    assert value.shape == (4, 6, AGENTS, 1)
    assert isinstance(critic[1].module[-1], Denormalize)
    assert abs(value.mean().item() - 3) < 3  # predictions of order one around the mean of 3
    team = share and observes != "observation"
    assert memory(critic).state_key == ("agents_critic_state" if team else ("agents", "critic_state"))
    assert data[memory(critic).state_key].shape == ((4, 6, HIDDEN) if team else (4, 6, AGENTS, HIDDEN))


def test_the_states_of_actor_critic_and_groups_do_not_collide():
    shapes = [GroupSpec(name, AGENTS, OBSERVATION, num_actions=2) for name in ("red", "blue")]
    keys = [memory(make_recurrent_actor(shape, **SIZES)).state_key for shape in shapes]
    for options in ({}, {"observes": "observation"}):
        keys += [memory(make_recurrent_critic(shape, **options, **SIZES)).state_key for shape in shapes]
    assert len(set(keys)) == 6


def test_parameters_come_back_from_a_state_dict():
    for share in (True, False):
        for network, restored in zip(networks(share), networks(share), strict=True):
            data = sequences(network)
            with set_recurrent_mode(True):
                expected = output(network, data)
                assert not torch.allclose(output(restored, data), expected)
                restored.load_state_dict(network.state_dict())
                assert torch.equal(output(restored, data), expected)


@pytest.mark.parametrize("build", [make_recurrent_actor, make_recurrent_critic])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_sizes": ()}, r"hidden_sizes.*\(\)"),
        ({"activation": "gelu"}, "tanh, relu; got 'gelu'"),
        ({"group": "others"}, "'others'"),
    ],
)
def test_what_cannot_be_built_is_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(SHAPE, **options)


def test_a_critic_of_something_unknown_is_refused():
    with pytest.raises(ValueError, match="got 'everything'"):
        make_recurrent_critic(SHAPE, observes="everything")
    with pytest.raises(ValueError, match='no "state"'):
        make_recurrent_critic(GroupSpec("agents", 2, 3, num_actions=2), observes="state")


# --- what is missing or does not fit is said


def test_acting_without_a_state_says_where_to_get_one():
    with pytest.raises(KeyError, match=r"with_recurrent_state.*\(7, 3, 7\)"):
        make_recurrent_actor(SHAPE, **SIZES)(
            TensorDict({"agents": {"observation": torch.zeros(7, AGENTS, OBSERVATION)}}, batch_size=7)
        )


def test_rows_in_place_of_sequences_are_refused():
    actor = networks()[0]
    with set_recurrent_mode(True), pytest.raises(ValueError, match=r"shape \(24,\): split"):
        actor.get_dist(sequences(actor).reshape(-1))


def test_a_state_of_another_shape_is_refused():
    actor = networks()[0]
    data = sequences(actor)
    with pytest.raises(ValueError, match=r"\(4, 6, 1, 7\)"):
        actor(data.set(("agents", "recurrent_state"), torch.zeros(4, 6, 1, HIDDEN)))


def test_episode_starts_of_another_shape_are_refused():
    actor = networks()[0]
    data = sequences(actor)
    with set_recurrent_mode(True), pytest.raises(ValueError, match=r"\(4, 6, 1\), but has shape \(4, 6, 3, 1\)"):
        actor.get_dist(data.copy().set("is_init", torch.zeros(4, 6, AGENTS, 1, dtype=torch.bool)))
    with set_recurrent_mode(True), pytest.raises(ValueError, match="but is missing"):
        actor.get_dist(data.exclude("is_init"))


# --- environments


def test_states_are_zero_where_episodes_start_and_carried_on_elsewhere():
    env = make_env("balance", num_envs=16, max_steps=100, seed=0, scenario_kwargs={"package_mass": 20})
    actor, critic = make_recurrent_actor(env, **SIZES), make_recurrent_critic(env, **SIZES)
    policy = collection_policy(stir(actor), critic)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        data = with_recurrent_state(env, policy).rollout(60, policy, break_when_any_done=False)
    start, ended = data["is_init"].squeeze(-1), data["next", "done"].squeeze(-1)
    assert start[:, 0].all()
    assert torch.equal(start[:, 1:], ended[:, :-1])
    assert ended[:, :-1].any()  # some episodes end while others go on
    assert data["next", "terminated"].any()
    assert not ended.all(0).any()
    for key in (("agents", "recurrent_state"), "agents_critic_state"):
        before, after = data[key], data["next", key]
        assert not before[start].any()
        assert torch.equal(before[:, 1:][~start[:, 1:]], after[:, :-1][~ended[:, :-1]])
        assert after[ended].flatten(1).any(-1).all()  # the state after the last step, for the value of what it led to


def test_an_environment_gets_what_is_missing_and_stays_as_it_is():
    env = make_env("balance", num_envs=2, seed=0)
    actor, critic = make_recurrent_actor(env, **SIZES), make_recurrent_critic(env, **SIZES)
    recurrent = with_recurrent_state(env, collection_policy(actor, critic))
    added = {("agents", "recurrent_state"), "agents_critic_state", "is_init"}
    keys = [set(each.full_observation_spec.keys(True, True)) for each in (env, recurrent)]
    assert keys[1] - keys[0] == added
    assert recurrent.full_observation_spec["agents", "recurrent_state"].shape == (2, 3, HIDDEN)
    assert with_recurrent_state(recurrent, actor) is recurrent
    assert with_recurrent_state(env, make_actor(env)) is env


def test_a_feed_forward_critic_adds_nothing_to_what_is_collected():
    actor = make_recurrent_actor(SHAPE, **SIZES)
    assert collection_policy(actor, make_critic(SHAPE)) is actor
    policy = collection_policy(make_actor(SHAPE), make_recurrent_critic(SHAPE, **SIZES))
    assert "agents_critic_state" in policy.in_keys
    assert ("agents", "state_value") not in policy.out_keys


def test_torchrls_own_tools_find_the_transforms():
    env = make_env("balance", num_envs=2, seed=0)
    actor = make_recurrent_actor(env, **SIZES)
    theirs = TransformedEnv(env, get_env_transforms_from_module(actor), auto_unwrap=False)
    assert theirs.full_observation_spec == with_recurrent_state(env, actor).full_observation_spec
    collector = Collector(env, actor, frames_per_batch=8, total_frames=8, auto_register_policy_transforms=True)
    (batch,) = collector
    assert batch["next", "agents", "recurrent_state"].any()


@pytest.mark.gpu
@every_space
@every_sharing
def test_networks_run_where_they_are_told(shape, share):
    actor = make_recurrent_actor(shape, share_parameters=share, device="cuda", **SIZES)
    critics = [
        make_recurrent_critic(shape, observes=observes, share_parameters=share, device="cuda", **SIZES)
        for observes in ("joint_observation", "state", "observation")
    ]
    for network in (actor, *critics):
        data = sequences(network, shape=shape)
        with set_recurrent_mode(True):
            on_gpu = output(network, data.to("cuda"))
            assert_close(on_gpu.cpu(), output(network.cpu(), data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("agents", [None, 2], ids=["shared", "own"])
def test_a_compiled_sequence_has_the_states_and_gradients_of_the_loop_over_steps(agents, monkeypatch):
    """Also where a transform takes the gradients, as a compiled update does; here in blocks of 3, 3 and 1 steps."""
    monkeypatch.setattr("torchrl_marl.modules.gru_sequence._LONGEST_BLOCK", 3)
    torch.compiler.reset()
    torch.manual_seed(0)
    gru = MultiAgentGRU(3, 4) if agents is None else AgentNetworks([MultiAgentGRU(3, 4) for _ in range(agents)])
    inputs, state, weight = torch.randn(7, 5, 2, 3), torch.randn(7, 5, 2, 4), torch.randn(7, 5, 2, 4)
    restart = torch.rand(7, 5, 2, 1) < 0.3
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases, too
    values = {name: parameter.detach() for name, parameter in gru.named_parameters()}

    def gradients(values, inputs, state):
        def evaluate(values, inputs, state):
            after = torch.func.functional_call(gru, values, (inputs, state, restart))
            return (weight * after).sum(), after

        return torch.func.grad_and_value(evaluate, argnums=(0, 1, 2), has_aux=True)(values, inputs, state)

    compiled = torch.compile(gradients, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values, inputs, state), gradients(values, inputs, state))


def test_compiled_blocks_of_sequences_are_kept_apart_by_the_layout_of_weights(monkeypatch):
    kept = []
    monkeypatch.setattr(
        "torchrl_marl.modules.gru_sequence._compiled", lambda block, size, shapes: kept.append((block, shapes)) or block
    )
    torch.manual_seed(0)
    projected, state, bias = torch.randn(4, 2, 9), torch.randn(4, 2, 3), torch.randn(9)
    restart, weight = torch.zeros(4, 2, 1, dtype=torch.bool), torch.randn(9, 3)
    turned = weight.t().contiguous().t()
    results = [gru_sequence(projected, state, restart, own, bias) for own in (weight, turned, weight)]
    assert torch.equal(results[0], results[2])
    assert_close(results[0], results[1], **TOLERANCE)
    assert kept[0] == kept[2] != kept[1]
