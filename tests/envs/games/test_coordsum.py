"""CoordSum by the paper's appendix B, by hand, and by transitions of the authors' released environment."""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from torchrl_marl.envs import CoordSumEnv, make_coordsum

VECTORS = json.loads((Path(__file__).parent / "coordsum_vectors.json").read_text())


@pytest.fixture
def script_targets(monkeypatch):
    """Let the environments draw given targets."""

    def script(targets):
        rest = iter(targets)

        def draw(stream, bound):
            target = next(rest)
            assert target < bound
            return stream, torch.full_like(stream, target)

        monkeypatch.setattr("torchrl_marl.envs.games.coordsum.draw_below", draw)

    return script


def rollout(env, policy):
    data, steps = env.reset(), []
    while not steps or not data["done"].any():
        steps.append(env.step(policy(data)).clone())
        data = env.step_mdp(steps[-1])
    return torch.stack(steps, 1)


def play(rules, actions):
    """Rewards and guesses of a list of joint actions, and the targets seen."""
    state = rules.reset(torch.zeros(1, dtype=torch.int64))
    rewards, guesses, targets, ends = [], [], [int(rules.describe(state)["agents", "observation"][0, 0, 0])], []
    for action in actions:
        state, data = rules.step(state, torch.tensor([action]))
        assert (data["agents", "reward"] == data["agents", "reward"][:, :1]).all()
        rewards.append(data["agents", "reward"][0, 0].item())
        guesses.append(state["played_guess"].item())
        targets.append(int(data["agents", "observation"][0, 0, 0]))
        ends.append((data["terminated"].item(), data["truncated"].item()))
    return rewards, guesses, targets, ends


@pytest.mark.parametrize("name", VECTORS)
def test_transitions_are_those_of_the_released_environment(name, script_targets):
    episode = VECTORS[name]
    released = "paper" not in name
    options = {"num_rows": episode["num_actions"], "observe_step": False} if released else {}
    script_targets([0, *episode["targets"]])  # the constructor's own reset draws one
    env = CoordSumEnv(
        episode["num_agents"],
        episode["num_actions"],
        num_targets=episode["maxval"],
        num_envs=1,
        max_steps=episode["time_limit"],
        **options,
    )
    rewards, guesses, targets, ends = play(env.rules, episode["actions"])
    assert rewards == episode["reward_per_agent"]
    assert guesses == episode["opponent_guess"]
    assert targets == episode["targets"]
    assert sum(rewards) == episode["episode_return"]
    assert ends == [(False, False)] * (len(ends) - 1) + [(True, False)]


def test_rewards_by_hand(script_targets):
    # Two agents, numbers 0..3, targets 0..3: the paper's rules.
    script_targets([0, 2, 2, 2, 2, 2, 3, 3, 2, 0])
    rules = CoordSumEnv(2, 4, num_envs=1).rules
    rounds = [
        ((0, 2), 1),  # nothing remembered: the opponent guesses 0, and the first agent chose it
        ((1, 1), 2),  # it remembers {0}, guesses 0
        ((1, 0), 0),  # the sum is 1; the choice counts all the same
        ((0, 2), 2),  # it remembers {0: 1, 1: 2}, guesses 1
        ((0, 2), 1),  # it remembers {0: 2, 1: 2}: of equals the smaller
        ((3, 0), 2),  # another target has a memory of its own
        ((3, 0), 1),
        ((1, 1), 2),  # back to 2: {0: 3, 1: 2}
    ]
    rewards, *_ = play(rules, [action for action, _ in rounds])
    assert rewards == [reward for _, reward in rounds]


def reference_rewards(targets, actions, num_actions, num_rows):
    memory, rewards = defaultdict(Counter), []
    for target, action in zip(targets, actions, strict=True):
        votes = memory[min(target, num_rows - 1)]
        guess = min(range(num_actions), key=lambda choice: (-votes[choice], choice))
        rewards.append(0.0 if sum(action) != target else 1.0 if guess == action[0] else 2.0)
        votes[action[0]] += 1
    return rewards


@pytest.mark.parametrize(("num_agents", "num_actions", "num_rows"), [(1, 2, None), (2, 3, None), (2, 3, 2), (3, 4, 1)])
def test_random_play_equals_a_plain_implementation_with_counters(num_agents, num_actions, num_rows):
    env = CoordSumEnv(num_agents, num_actions, num_rows=num_rows, num_envs=20, seed=0)
    data = env.rollout(100)
    assert data["next", "agents", "reward"].sum() > 0
    for row in data:
        targets = row["agents", "observation"][:, 0, 0].int().tolist()
        actions = row["agents", "action"].tolist()
        expected = reference_rewards(targets, actions, num_actions, num_rows or num_actions)
        assert row["next", "agents", "reward"][:, 0, 0].tolist() == expected


def test_a_deterministic_policy_beats_the_opponent_once_for_each_target_but_zero():
    env = make_coordsum("CoordSum-3x10", num_envs=50, seed=0)

    def first_takes_all(data):
        target = data["agents", "observation"][..., 0].long()
        data["agents", "action"] = target * (torch.arange(3) == 0)
        return data

    data = rollout(env, first_takes_all)
    targets = data["agents", "observation"][:, :, 0, 0]
    expected = [100 + len(set(row.tolist()) - {0.0}) for row in targets]
    assert data["next", "agents", "episode_reward"][:, -1, 0, 0].tolist() == expected
    assert sum(expected) / 50 == pytest.approx(109, abs=0.1)


def test_observations_are_the_target_and_the_share_of_rounds_played():
    env = make_coordsum("CoordSum-3x10", num_envs=2, max_steps=4, seed=0)
    data = env.rollout(4)
    observation = torch.cat([data["agents", "observation"], data["next", "agents", "observation"][:, -1:]], 1)
    assert observation.shape == (2, 5, 3, 2)
    assert (observation == observation[:, :, :1]).all()
    assert observation[0, :, 0, 1].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert set(observation[..., 0].unique().tolist()) <= set(range(10))
    assert torch.equal(data["state"][..., :2], data["agents", "observation"][:, :, 0])


def test_the_state_tells_the_opponents_guess():
    env = make_coordsum("CoordSum-3x10", num_envs=200, seed=0)

    def avoid_the_guess(data):  # the last agents complete the sum, so that each may have to choose up to 9
        target, guess = data["state"][:, 0].long(), data["state"][:, 2:].argmax(-1)
        first = torch.where(guess == 0, 1, 0).minimum(target)
        data["agents", "action"] = torch.stack([first, target - first, torch.zeros_like(first)], -1)
        return data

    data = rollout(env, avoid_the_guess)
    zero = data["agents", "observation"][:, :, 0, 0] == 0
    reward = data["next", "agents", "reward"][:, :, 0, 0]
    assert (reward[zero] == 1).all()  # 0 = 0 + 0 + 0 is what it guesses
    assert (reward[~zero] == 2).all()


@pytest.mark.parametrize(("name", "num_targets"), [("CoordSum-3x10", 10), ("CoordSum-5x20-80", 80)])
def test_targets_are_uniform(name, num_targets):
    env = make_coordsum(name, num_envs=200, seed=0)
    counts = env.rollout(100)["agents", "observation"][:, :, 0, 0].long().flatten().bincount(minlength=num_targets)
    assert len(counts) == num_targets
    expected = 20_000 / num_targets
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < num_targets - 1 + 4 * math.sqrt(2 * num_targets)


def test_released_tasks_hide_the_step_and_clamp_the_memory():
    rules = make_coordsum("CoordSum-8x15-100", num_envs=1).rules
    assert (rules.num_agents, rules.num_actions, rules.num_targets, rules.num_rows) == (8, 15, 100, 15)
    env = make_coordsum("CoordSum-8x15-100", num_envs=1)
    assert env.reset()["agents", "observation"].shape == (1, 8, 1)
    rules = make_coordsum("CoordSum-5x20", num_envs=1).rules
    assert (rules.num_agents, rules.num_actions, rules.num_targets, rules.num_rows) == (5, 20, 20, 20)


def test_long_games_do_not_overflow_the_opponents_memory(script_targets):
    script_targets([0] * 5000)
    env = CoordSumEnv(1, 30, num_targets=1, num_envs=1, max_steps=2201)
    _, guesses, *_ = play(env.rules, [(29,)] * 1100 + [(5,)] * 1101)  # 1100 * 30 does not fit into 16 bits
    assert guesses == [0] + [29] * 2199 + [5]


@pytest.mark.parametrize("name", ["3x10", "CoordSum-3x", "CoordSum-3x10-v0", "coordsum-3x10"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=f"scenario must be CoordSum-NxK .* got '{name}'"):
        make_coordsum(name, num_envs=1)


@pytest.mark.parametrize("name", ["num_agents", "num_actions", "num_targets", "num_rows"])
def test_wrong_arguments_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        CoordSumEnv(**{"num_envs": 1, name: 0})
