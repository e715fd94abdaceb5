"""Recurrent networks in every ratio loss: collected data, values at episode ends, masked sequences, a memory task."""

import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers import SamplerWithoutReplacement
from torchrl.envs import RewardSum, TransformedEnv
from torchrl.envs.utils import check_env_specs
from torchrl.modules import RunningValueNorm, set_recurrent_mode

from tests.objectives.loss_factories import gradients
from tests.objectives.recall_env import RecallEnv
from torchrl_marl.collectors import NextStepKeys, split_into_chunks
from torchrl_marl.envs import make_env
from torchrl_marl.evaluation import evaluate
from torchrl_marl.modules import (
    AgentNetworks,
    GroupSpec,
    RecurrentModule,
    collection_policy,
    make_actor,
    make_critic,
    make_recurrent_actor,
    make_recurrent_critic,
    with_recurrent_state,
)
from torchrl_marl.objectives import IPPOLoss, MAPPOLoss, MARPOLoss, MARSLoss, MASPOLoss, standardize

SIZES = {"hidden_sizes": (8,), "recurrent_size": 7, "head_sizes": (9,)}
GAMMA, LMBDA = 0.9, 0.8
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}

every_loss = pytest.mark.parametrize("loss_class", [MAPPOLoss, IPPOLoss, MASPOLoss, MARSLoss])
every_sharing = pytest.mark.parametrize("share", [True, False], ids=["shared", "own"])


def stir(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.3)
    return network


def observed_by(loss_class):
    return "observation" if loss_class is IPPOLoss else "joint_observation"


def falling_balance(loss_class=MAPPOLoss, *, share=True, functional=True, continuous=False, **options):
    """A loss, and a collector of a task whose episodes end by termination (a fall) and by truncation."""
    env = make_env(
        "balance",
        num_envs=12,
        max_steps=35,
        continuous_actions=continuous,
        seed=0,
        scenario_kwargs={"package_mass": 40},
    )
    actor = stir(make_recurrent_actor(env, share_parameters=share, **SIZES))
    observes = observed_by(loss_class)
    critic = stir(make_recurrent_critic(env, observes=observes, share_parameters=share, **SIZES))
    loss = loss_class(actor, critic, functional=functional, **options)
    loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA)
    policy = collection_policy(actor, critic)
    collector = Collector(
        with_recurrent_state(env, policy),
        policy,
        frames_per_batch=12 * 48,
        total_frames=-1,
        auto_register_policy_transforms=False,
    )
    return loss, collector


def estimate(loss, batch):
    batch = batch.copy()
    with torch.no_grad():
        loss.value_estimator(batch, params=loss.critic_network_params)
    return batch


def memory_of(critic):
    (module,) = (module for module in critic.modules() if isinstance(module, RecurrentModule))
    return module


# --- from collected data to losses


@pytest.mark.parametrize(
    ("loss_class", "share"), [(MAPPOLoss, True), (IPPOLoss, False), (MASPOLoss, False), (MARSLoss, True)]
)
def test_ratios_are_one_on_what_was_just_collected(loss_class, share):
    loss, collector = falling_balance(loss_class, share=share)
    batches = iter(collector)
    for _ in range(2):  # the second batch begins within episodes, and with other parameters
        batch = estimate(loss, next(batches))
        done, terminated = batch["next", "done"][:, :-1], batch["next", "terminated"][:, :-1]
        assert terminated.any()
        assert (done & ~terminated).any()
        for length in (4, 8, 48):
            with torch.no_grad():
                output = loss(split_into_chunks(batch.select(*loss.in_keys, strict=False), length))
            assert abs(output["min_ratio"] - 1) < 1e-5
            assert abs(output["max_ratio"] - 1) < 1e-5
        stir(loss.actor_network)
        stir(loss.critic_network)
    assert not batch["is_init"][:, 0].all()


def test_both_ratios_of_marpo_are_one_on_what_was_just_collected():
    loss, collector = falling_balance(MARPOLoss, sequences=True)
    batch = NextStepKeys()(estimate(loss, next(iter(collector))))
    pairs = batch["next", "reflection_mask"]
    assert not pairs[batch["next", "done"].squeeze(-1)].any()
    for length in (4, 8, 48):
        output = loss(split_into_chunks(batch.select(*loss.in_keys, strict=False), length))
        assert abs(output["max_ratio"] - 1) < 1e-5
        assert abs(output["next_ratio"] - 1) < 1e-6
        assert output["next_clip_fraction"] == 0
        assert_close(output["reflection_share"], pairs.float().mean())
        assert all(gradient.isfinite().all() for gradient in gradients(output, loss.actor_network))


def test_marpos_next_log_ratio_of_a_changed_policy_is_that_of_its_own_next_step():
    # Whole batches as one chunk: r' of a row is r of the next one, with the memory that the changed policy has by then.
    loss, collector = falling_balance(MARPOLoss, sequences=True, normalize_advantage=False, ema_rate=0.0)
    batch = NextStepKeys()(estimate(loss, next(iter(collector))))
    stir(loss.actor_network)
    with torch.no_grad(), set_recurrent_mode(True):
        log_prob = loss.actor_network.get_dist(batch.copy()).log_prob(batch["agents", "action"])
    ratio = (log_prob - batch["agents", "action_log_prob"]).exp()
    pairs = batch["next", "reflection_mask"][:, :-1]
    assert not torch.allclose(ratio[:, 1:][pairs], torch.ones(()), atol=1e-2)
    output = loss(batch)
    assert_close(output["next_ratio"], ratio[:, 1:][pairs].mean())
    low, high = output["kl_interval_low"], output["kl_interval_high"]
    outside = (ratio[:, 1:][pairs] < low) | (ratio[:, 1:][pairs] > high)
    assert_close(output["next_clip_fraction"], outside.float().mean())


def test_marpo_asks_for_sequences_where_the_policy_has_a_memory():
    shape = GroupSpec("agents", 3, 5, num_actions=4)
    with pytest.raises(ValueError, match="sequences=True"):
        MARPOLoss(make_recurrent_actor(shape), make_critic(shape))


def test_log_probabilities_of_continuous_actions_are_recomputed_as_well_as_without_a_memory():
    loss, collector = falling_balance(continuous=True)
    batch = estimate(loss, next(iter(collector)))
    with torch.no_grad():
        by_rows = loss.actor_network.get_dist(batch.copy()).log_prob(batch["agents", "action"])
        inversion = (by_rows - batch["agents", "action_log_prob"]).abs().max()  # of tanh, in single precision
        output = loss(split_into_chunks(batch, 8))
    assert max(output["max_ratio"] - 1, 1 - output["min_ratio"]) < inversion + 1e-5


@every_sharing
@pytest.mark.parametrize(("loss_class", "functional"), [(MAPPOLoss, True), (IPPOLoss, False)])
def test_values_and_advantages_equal_a_step_by_step_reference(loss_class, share, functional):
    loss, collector = falling_balance(loss_class, share=share, functional=functional)
    batches = iter(collector)
    next(batches)
    batch = next(batches)  # begins within episodes
    values, next_values, advantages = reference_values(loss.critic_network, batch)
    for sequences in (False, True):  # row by row; in time, as a loss does that is given data without advantages
        with set_recurrent_mode(sequences):
            estimated = estimate(loss, batch)
        assert_close(estimated["agents", "state_value"], values, **TOLERANCE)
        assert_close(estimated["next", "agents", "state_value"], next_values, **TOLERANCE)
        assert_close(estimated["advantage"], advantages, **TOLERANCE)
        assert_close(estimated["value_target"], advantages + values, **TOLERANCE)
    # the value beyond an end depends on the memory of the episode: a memory that began there would be seen
    ends = batch["next", "done"].squeeze(-1)
    forgetful = batch["next"].copy().set(memory_of(loss.critic_network).state_key, 0 * next_state(loss, batch))
    forgotten = (loss.critic_network(forgetful)["agents", "state_value"] - next_values)[ends].abs()
    assert (forgotten > 1e-5).float().mean() > 0.9


def next_state(loss, batch):
    return batch["next", memory_of(loss.critic_network).state_key]


@torch.no_grad()
def reference_values(critic, batch):
    """Values by torch.nn.GRUCell, one agent and step after the other; advantages by their recursion."""
    memory, head = memory_of(critic), critic[1].module
    key = memory.state_key
    team = isinstance(key, str)
    agents = batch["agents", "observation"].shape[-2]
    cells = []  # one for each agent
    for agent in range(1 if team else agents):
        gru = memory.gru.networks[agent] if isinstance(memory.gru, AgentNetworks) else memory.gru
        cell = nn.GRUCell(gru.weight_ih.shape[1], gru.hidden_size)
        cell.load_state_dict(gru.state_dict())
        cells.append(cell)

    def step(observation, states):
        inputs = memory.embedding(observation)
        inputs = [inputs] if team else inputs.unbind(1)
        states = [cell(i, state) for cell, i, state in zip(cells, inputs, states, strict=True)]
        return head(states[0] if team else torch.stack(states, 1)), states

    values, next_values = (torch.zeros(*batch.shape, agents, 1) for _ in range(2))
    states = [batch[key][:, 0]] if team else batch[key][:, 0].unbind(1)
    for time, row in enumerate(batch.unbind(1)):
        states = [torch.where(row["is_init"], 0.0, state) for state in states]
        values[:, time], states = step(row["agents", "observation"], states)
        next_values[:, time], _ = step(row["next", "agents", "observation"], states)
    advantages, running = torch.zeros_like(values), 0.0
    for time in reversed(range(batch.shape[1])):
        goes_on = (~batch["next", "terminated"][:, time]).unsqueeze(-1)
        same_episode = (~batch["next", "done"][:, time]).unsqueeze(-1)
        reward = batch["next", "agents", "reward"][:, time]
        delta = reward + GAMMA * goes_on * next_values[:, time] - values[:, time]
        advantages[:, time] = running = delta + GAMMA * LMBDA * same_episode * running
    return values, next_values, advantages


@every_loss
@every_sharing
def test_losses_on_sequences_with_masks_are_those_computed_by_hand(loss_class, share):
    shape = GroupSpec("agents", 3, 5, num_actions=4)
    actor = stir(make_recurrent_actor(shape, share_parameters=share, **SIZES))
    critic = stir(make_recurrent_critic(shape, observes=observed_by(loss_class), share_parameters=share, **SIZES))
    data = sequences(actor, critic)
    loss = loss_class(actor, critic, normalize_advantage=False, entropy_coeff=0.03, critic_coeff=0.7)
    output = loss(data)

    live = data["agents", "mask"]
    logits, values = zip(*stepping(actor, critic, data), strict=True)
    log_probs, values = torch.stack(logits, 1).log_softmax(-1), torch.stack(values, 1)
    taken = log_probs.gather(-1, data["agents", "action"].unsqueeze(-1)).squeeze(-1)
    ratio = (taken - data["agents", "action_log_prob"]).exp()
    advantage = data["advantage"].squeeze(-1)
    good = advantage >= 0
    if loss_class in (MAPPOLoss, IPPOLoss):
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    elif loss_class is MASPOLoss:
        gain = ratio * advantage - advantage.abs() / 0.4 * (ratio - 1) ** 2
    else:
        target = torch.where(good, 1.25, 0.8)
        gain = ratio * advantage - advantage * target**2 / (target**2 - 1) * (ratio + 1 / ratio - 2)
    error = (values - data["value_target"]).squeeze(-1).abs()
    distance = torch.where(error < 1, error**2 / 2, error - 0.5)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    assert 0 < live.sum() < live.numel()
    assert_close(output["loss_objective"], -gain[live].mean(), **TOLERANCE)
    assert_close(output["loss_critic"], 0.7 * distance.mean(), **TOLERANCE)
    assert_close(output["loss_entropy"], -0.03 * entropy[live].mean(), **TOLERANCE)
    assert_close(output["max_ratio"], ratio[live].max(), **TOLERANCE)
    # gradients through time, too
    by_hand = -gain[live].mean() + 0.7 * distance.mean() - 0.03 * entropy[live].mean()
    parameters = [*actor.parameters(), *critic.parameters()]
    expected = torch.autograd.grad(by_hand, parameters)
    assert_close(gradients(output, actor, critic), list(expected), rtol=1e-4, atol=1e-6)


def sequences(actor, critic, batch=(6, 5)):
    """Sequences with episode starts in the middle, dead agents and ratios away from 1."""
    agents = 3
    start = torch.rand(*batch, 1) < 0.3
    data = TensorDict({"is_init": start}, batch_size=batch)
    data["agents", "observation"] = torch.randn(*batch, agents, 5)
    data["agents", "mask"] = torch.rand(*batch, agents) < 0.7
    data["agents", "action"] = torch.randint(4, (*batch, agents))
    data["agents", "action_log_prob"] = -1.4 + 0.3 * torch.randn(*batch, agents)
    data["advantage"], data["value_target"] = 2 * torch.randn(*batch, agents, 1), torch.randn(*batch, agents, 1)
    for network in (actor, critic):
        key = memory_of(network).state_key
        state = torch.randn(*batch, *([] if isinstance(key, str) else [agents]), SIZES["recurrent_size"])
        data[key] = torch.where(start.reshape(*batch, *[1] * (state.ndim - 2)), 0.0, state)
    return data


def stepping(actor, critic, data):
    """Logits and values of one step after the other, on states carried by hand."""
    keys = [memory_of(network).state_key for network in (actor, critic)]
    states = [data[key][:, 0] for key in keys]
    for now in data.unbind(1):
        for key, state in zip(keys, states, strict=True):
            start = now["is_init"].reshape(-1, *[1] * (state.ndim - 1))
            now[key] = torch.where(start, 0.0, state)
        now = critic(actor.module[0](now))
        states = [now["next", key] for key in keys]
        yield now["agents", "logits"], now["agents", "state_value"]


@every_loss
def test_functional_and_stateful_losses_agree_and_need_only_their_in_keys(loss_class):
    shape = GroupSpec("agents", 3, 5, num_actions=4)
    actor = stir(make_recurrent_actor(shape, **SIZES))
    critic = stir(make_recurrent_critic(shape, value_norm=RunningValueNorm(shape=1), **SIZES))
    data = sequences(actor, critic)
    before = data.clone()
    stateful = loss_class(actor, critic, functional=False)
    expected = stateful(data)
    assert (data == before).all()
    expected_gradients = gradients(expected, actor, critic)
    output = loss_class(actor, critic, functional=True)(data.select(*stateful.in_keys, strict=False))
    assert_close(dict(output.items()), dict(expected.items()), **TOLERANCE)
    assert_close(gradients(output, actor, critic), expected_gradients, **TOLERANCE)


@pytest.mark.parametrize("recurrent", ["actor", "critic"])
def test_one_network_with_a_memory_goes_with_one_without(recurrent):
    env = RecallEnv(4)
    actor = (make_recurrent_actor if recurrent == "actor" else make_actor)(env, hidden_sizes=(8,))
    critic = (make_recurrent_critic if recurrent == "critic" else make_critic)(env, hidden_sizes=(8,))
    loss = MAPPOLoss(actor, critic)
    loss.make_value_estimator()
    policy = collection_policy(actor, critic)
    env = with_recurrent_state(env, policy)
    collector = Collector(env, policy, frames_per_batch=40, total_frames=40, auto_register_policy_transforms=False)
    (batch,) = collector
    output = loss(split_into_chunks(estimate(loss, batch), 5))
    assert abs(output["max_ratio"] - 1) < 1e-5
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(output, actor, critic))


def test_compiled_equals_eager():
    torch.compiler.reset()
    shape = GroupSpec("agents", 3, 5, num_actions=4)
    actor = stir(make_recurrent_actor(shape, share_parameters=False, **SIZES))
    critic = stir(make_recurrent_critic(shape, **SIZES))
    data = sequences(actor, critic, batch=(6, 3))
    loss = MARSLoss(actor, critic, functional=False)
    outputs = [torch.compile(loss, fullgraph=True, backend="aot_eager")(data), loss(data)]
    assert_close(*(dict(output.items()) for output in outputs), **TOLERANCE)
    assert_close(*(gradients(output, actor, critic) for output in outputs), **TOLERANCE)


@pytest.mark.gpu
@every_loss
@every_sharing
def test_losses_on_a_gpu_equal_those_on_the_cpu(loss_class, share):
    shape = GroupSpec("agents", 3, 5, num_actions=4)
    actor = stir(make_recurrent_actor(shape, share_parameters=share, **SIZES))
    critic = stir(make_recurrent_critic(shape, share_parameters=share, **SIZES))
    data = sequences(actor, critic)
    loss = loss_class(actor, critic, functional=False)
    expected = loss(data)
    expected_gradients = gradients(expected, actor, critic)
    output = loss.to("cuda")(data.to("cuda"))
    on_gpu = [gradient.cpu() for gradient in gradients(output, actor, critic)]
    assert_close({key: value.cpu() for key, value in output.items()}, dict(expected.items()), rtol=1e-4, atol=1e-5)
    assert_close(on_gpu, expected_gradients, rtol=1e-4, atol=1e-5)


# --- a memory learns what its absence cannot


def test_the_memory_task_is_a_valid_environment():
    check_env_specs(RecallEnv(3))


@pytest.mark.parametrize(("memory", "expected"), [(True, 1.0), (False, 0.5)], ids=["gru", "mlp"])
def test_only_a_memory_recalls_what_was_shown_at_the_first_step(memory, expected):
    env = TransformedEnv(RecallEnv(64), RewardSum())
    shape = GroupSpec.from_env(env)
    sizes = {"hidden_sizes": (32,), "recurrent_size": 32, "head_sizes": ()} if memory else {"hidden_sizes": (32, 32)}
    actor = (make_recurrent_actor if memory else make_actor)(shape, **sizes)
    critic = (make_recurrent_critic if memory else make_critic)(shape, **sizes)
    returns = train(env, actor, critic, chunk_length=10 if memory else None, iterations=40)
    assert math.isclose(returns, expected, abs_tol=0.1)


def train(env, actor, critic, *, chunk_length, iterations):
    """The loop of the recipe; mean evaluation return."""
    loss = MARSLoss(actor, critic, target_ratios=(0.5, 2.0), functional=False, normalize_advantage=False)
    loss.make_value_estimator(gamma=0.99, lmbda=0.95)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    policy = collection_policy(actor, critic)
    collector = Collector(
        with_recurrent_state(env, policy),
        policy,
        frames_per_batch=640,
        total_frames=640 * iterations,
        auto_register_policy_transforms=False,
    )
    steps = chunk_length or 1
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(640 // steps), sampler=SamplerWithoutReplacement(), batch_size=320 // steps
    )
    for batch in collector:
        batch = estimate(loss, batch)
        batch["advantage"] = standardize(batch["advantage"])
        buffer.empty()
        buffer.extend(split_into_chunks(batch.select(*loss.in_keys, strict=False), chunk_length))
        for _ in range(4):
            for minibatch in buffer:
                losses = loss(minibatch)
                sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    return evaluate(TransformedEnv(RecallEnv(200), RewardSum()), actor, seed=1, max_steps=5).returns.mean().item()
