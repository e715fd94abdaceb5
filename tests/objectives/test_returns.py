"""Advantages and value targets: by hand, and with episodes that end by truncation or by termination."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close

from tests.objectives.loss_factories import AGENTS, make_batch, make_networks
from torchrl_marl.modules import GroupSpec, make_actor, make_critic
from torchrl_marl.objectives import HAPPOLoss, MAPPOLoss, SEACLoss

functional_or_not = pytest.mark.parametrize("functional", [True, False], ids=["functional", "stateful"])


class Value(nn.Module):
    """``V = scale * observation``: values are written into the observations."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, observation):
        return self.scale * observation


def make_loss(scale=1.0, *, functional=True, team=False, **hyperparameters):
    """A loss whose critic is ``Value``; its actor does not matter."""
    actor, _ = make_networks("categorical")
    keys = (["state"], ["state_value"]) if team else ([("agents", "observation")], [("agents", "state_value")])
    loss = MAPPOLoss(actor, TensorDictModule(Value(scale), *keys), functional=functional)
    if team:
        loss.set_keys(reward="reward")
    return loss.make_value_estimator(**hyperparameters)


def estimate(loss, data):
    data = data.clone()
    with torch.no_grad():
        loss.value_estimator(data, params=loss.critic_network_params)
    return data["advantage"], data["value_target"]


def transitions(value, next_value, reward, done, terminated, *, agents=1, team=False):
    """``[envs, time]`` numbers as a batch; a group's second agent has twice the numbers of its first, and so on."""
    factor = torch.arange(1.0, agents + 1)

    def each(numbers):
        numbers = torch.tensor(numbers)
        return numbers.unsqueeze(-1) if team else (numbers.unsqueeze(-1) * factor).unsqueeze(-1)

    def flag(numbers):
        return torch.tensor(numbers, dtype=torch.bool).unsqueeze(-1)

    observed = "state" if team else ("agents", "observation")
    data = TensorDict({}, batch_size=torch.tensor(value).shape)
    data[observed] = each(value)
    data["next", observed] = each(next_value)
    data["next", "reward" if team else ("agents", "reward")] = each(reward)
    data["next", "done"], data["next", "terminated"] = flag(done), flag(terminated)
    return data


# Three steps of two environments; gamma = lambda = 1/2, so that gamma lambda = 1/4.
# Environment 0 is truncated after step 1 (its last observation is worth 6; the next episode starts at 3),
# environment 1 terminates there. Both are cut at the end of the batch.
THREE_STEPS = {
    "value": [[2.0, 4.0, 3.0], [2.0, 4.0, 3.0]],
    "next_value": [[4.0, 6.0, 8.0], [4.0, 6.0, 8.0]],
    "reward": [[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]],
    "done": [[0, 1, 0], [0, 1, 0]],
    "terminated": [[0, 0, 0], [0, 1, 0]],
}
# delta = r + V(next) / 2 - V, without V(next) after a termination; A = delta + A(next) / 4 within the episode
#   env 0, step 2: 4 + 4 - 3 = 5;   A = 5              env 1, step 2: the same, 5
#          step 1: 2 + 3 - 4 = 1;   A = 1 (cut)               step 1: 2 + 0 - 4 = -2;  A = -2
#          step 0: 1 + 2 - 2 = 1;   A = 1 + 1/4               step 0: 1;               A = 1 - 1/2
ADVANTAGE = [[1.25, 1.0, 5.0], [0.5, -2.0, 5.0]]
TARGET = [[3.25, 5.0, 8.0], [2.5, 2.0, 8.0]]  # A + V


@functional_or_not
def test_advantages_of_three_steps_by_hand(functional):
    loss = make_loss(functional=functional, gamma=0.5, lmbda=0.5)
    advantage, target = estimate(loss, transitions(**THREE_STEPS))
    assert_close(advantage[..., 0, 0], torch.tensor(ADVANTAGE))
    assert_close(target[..., 0, 0], torch.tensor(TARGET))


def test_every_agent_has_its_own_advantage_with_done_at_the_root():
    # GAE is linear in rewards and values: twice the numbers, twice the advantage
    loss = make_loss(gamma=0.5, lmbda=0.5)
    advantage, target = estimate(loss, transitions(**THREE_STEPS, agents=3))
    assert advantage.shape == target.shape == (2, 3, 3, 1)
    for agent in range(3):
        assert_close(advantage[:, :, agent, 0], (agent + 1) * torch.tensor(ADVANTAGE))
        assert_close(target[:, :, agent, 0], (agent + 1) * torch.tensor(TARGET))


@functional_or_not
def test_a_team_reward_and_a_team_value_give_a_team_advantage(functional):
    loss = make_loss(functional=functional, team=True, gamma=0.5, lmbda=0.5)
    advantage, target = estimate(loss, transitions(**THREE_STEPS, team=True))
    assert_close(advantage[..., 0], torch.tensor(ADVANTAGE))
    assert_close(target[..., 0], torch.tensor(TARGET))


def test_a_team_reward_is_shared_by_agents_with_values_of_their_own():
    loss = make_loss(gamma=0.5, lmbda=0.5)
    loss.set_keys(reward="reward")
    data = transitions(**THREE_STEPS, agents=2)
    data["next", "reward"] = torch.tensor(THREE_STEPS["reward"]).unsqueeze(-1)
    data["next", "agents"].pop("reward")
    advantage, _ = estimate(loss, data)
    assert_close(advantage[:, :, 0, 0], torch.tensor(ADVANTAGE))
    # agent 1 has the same rewards and twice the values: what its rewards add is agent 0's, its values count twice
    #   env 0, step 2: 4 + 8 - 6 = 6;   step 1: 2 + 6 - 8 = 0;   step 0: 1 + 4 - 4 = 1, A = 1 + 0/4
    #   env 1, step 2: 6;               step 1: 2 + 0 - 8 = -6;  step 0: 1,             A = 1 - 6/4
    assert_close(advantage[:, :, 1, 0], torch.tensor([[1.0, 0.0, 6.0], [-0.5, -6.0, 6.0]]))


def test_defaults_are_gamma_99_and_lambda_95():
    # one step short of the end: delta_1 = r_1 + gamma V_2 - V_1; A_0 = delta_0 + gamma lambda delta_1
    loss = make_loss()
    data = transitions([[1.0, 2.0]], [[2.0, 3.0]], [[5.0, 7.0]], [[0, 0]], [[0, 0]])
    advantage, _ = estimate(loss, data)
    last = 7 + 0.99 * 3 - 2
    first = 5 + 0.99 * 2 - 1 + 0.99 * 0.95 * last
    assert_close(advantage.flatten(), torch.tensor([first, last]))


def value_of_reward_one_forever(episode_end, *, gamma=0.9, lmbda=0.95, steps=5):
    """Fit a constant value to its own targets until nothing moves; episodes of ``steps`` rewards of 1."""
    loss = make_loss(scale=0.0, functional=False, gamma=gamma, lmbda=lmbda)
    last = [0] * (steps - 1) + [1]
    data = transitions(
        [[1.0] * steps],
        [[1.0] * steps],
        [[1.0] * steps],
        [last],
        [last if episode_end == "terminated" else [0] * steps],
    )
    for _ in range(200):
        _, target = estimate(loss, data)
        loss.critic_network.module.scale.data.copy_(target.mean())
    return loss.critic_network.module.scale.item()


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_truncated_episodes_of_reward_one_are_worth_an_infinite_horizon(gamma):
    assert value_of_reward_one_forever("truncated", gamma=gamma) == pytest.approx(1 / (1 - gamma), rel=1e-4)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_terminated_episodes_of_reward_one_are_worth_less(gamma):
    # The negative control. No state is worth more than five rewards, and the mean target of lambda = 1 is that of
    # 1, 2, ..., 5 remaining rewards.
    value = value_of_reward_one_forever("terminated", gamma=gamma, lmbda=1.0)
    remaining = [(1 - gamma**k) / (1 - gamma) for k in range(1, 6)]
    assert value == pytest.approx(sum(remaining) / 5, rel=1e-5)
    assert value < 0.9 / (1 - gamma)


@functional_or_not
def test_training_on_the_losss_own_targets_finds_the_infinite_horizon(functional):
    # the same through forward, which computes the missing advantage itself, and gradient steps
    actor, _ = make_networks("categorical")
    critic = Value(0.0)
    keys = {"in_keys": [("agents", "worth")], "out_keys": [("agents", "state_value")]}
    loss = MAPPOLoss(actor, TensorDictModule(critic, **keys), functional=functional)
    loss.make_value_estimator(gamma=0.5, lmbda=0.95)
    data = make_batch(actor, "categorical", (2, 4)).exclude("advantage", "value_target")
    ones = torch.ones(2, 4, AGENTS, 1)
    data["agents", "worth"] = data["next", "agents", "worth"] = data["next", "agents", "reward"] = ones
    data["next", "done"] = (torch.arange(4) == 2).expand(2, 4).unsqueeze(-1)
    data["next", "terminated"] = torch.zeros(2, 4, 1, dtype=torch.bool)
    for _ in range(100):
        (gradient,) = torch.autograd.grad(loss(data)["loss_critic"], critic.scale)
        critic.scale.data.sub_(gradient)
    assert critic.scale.item() == pytest.approx(2, rel=1e-4)


def episode_with_a_death(agents, steps, death):
    """One episode with a reward of 1 a step for the team; agent 0 has died when step ``death`` begins."""
    data = TensorDict({}, batch_size=[1, steps])
    places = torch.eye(steps + 1)[:, :steps]  # the last observation is that of a terminal state
    data["agents", "observation"] = places[:-1].unsqueeze(1).expand(1, steps, agents, steps)
    data["next", "agents", "observation"] = places[1:].unsqueeze(1).expand(1, steps, agents, steps)
    data["next", "agents", "reward"] = torch.ones(1, steps, agents, 1)
    data["next", "done"] = data["next", "terminated"] = (torch.arange(steps) == steps - 1).reshape(1, steps, 1)
    data["agents", "mask"] = torch.ones(1, steps, agents, dtype=torch.bool)
    data["agents", "mask"][:, death:, 0] = False
    data["agents", "action"] = torch.zeros(1, steps, agents, dtype=torch.long)
    data["agents", "action_log_prob"] = torch.zeros(1, steps, agents)
    return data


@pytest.mark.parametrize("lmbda", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("method", [MAPPOLoss, HAPPOLoss, SEACLoss], ids=lambda method: method.__name__)
def test_values_of_agents_that_die_are_those_of_the_reward_that_their_team_goes_on_to_earn(method, lmbda):
    # Reward 1 a step for 20 steps; agent 0 dies at step 2. Its return from the start is 1 + gamma + ... = 18.21 like
    # everybody's, and the values of steps 2 to 19 are what the estimator bootstraps from.
    agents, steps, gamma = 2, 20, 0.99
    shape = GroupSpec("agents", agents, steps, num_actions=3)
    actor = make_actor(shape, share_parameters=False)
    critic = make_critic(shape, observes="observation", share_parameters=False, hidden_sizes=())  # a table for each
    tables = [parameter for name, parameter in critic.named_parameters() if name.endswith("weight")]
    nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in critic.parameters())), critic.parameters())
    options = {"sharing_coeff": 0.0} if method is SEACLoss else {}
    loss = method(actor, critic, critic_coeff=1.0, loss_critic_type="l2", functional=False, **options)
    loss.make_value_estimator(gamma=gamma, lmbda=lmbda)
    data = episode_with_a_death(agents, steps, death=2)
    for _ in range(25):
        batch = data.clone()
        with torch.no_grad():
            loss.value_estimator(batch)
        for table, gradient in zip(tables, torch.autograd.grad(loss(batch)["loss_critic"], tables), strict=True):
            table.data.sub_(agents * steps / 2 * gradient)  # the minimum of a square, for every row that counts
    remaining = (1 - gamma ** torch.arange(steps, 0, -1.0)) / (1 - gamma)
    assert remaining[0].item() == pytest.approx(18.21, abs=0.005)
    assert_close(torch.cat(tables), remaining.expand(agents, steps), rtol=1e-4, atol=0)
