"""Buttons: the rules by hand, and what its examples of teams earn."""

import pytest
import torch

from torchrl_marl.envs import ButtonsEnv


def play(cells, action, **options):
    rules = ButtonsEnv("Buttons-2x5", num_envs=1, **options).rules
    state = rules.reset(torch.zeros(1, dtype=torch.int64)).set("cell", torch.tensor([cells]))
    state, data = rules.step(state, torch.tensor([action]))
    return state["cell"][0].tolist(), data["agents", "reward"][0, :, 0].tolist(), data["terminated"].item()


@pytest.mark.parametrize(
    ("cells", "action", "moved", "reward", "won"),
    [
        ([0, 4], [3, 3], [0, 4], 1.0, True),
        ([4, 0], [3, 3], [4, 0], 1.0, True),  # whoever presses which
        ([0, 0], [3, 3], [0, 0], -0.5, False),  # one button only
        ([0, 4], [3, 0], [0, 4], -0.5, False),  # the other one waits
        ([0, 3], [3, 2], [0, 4], -0.5, False),  # the other one only arrives
        ([0, 4], [1, 2], [0, 4], 0.0, False),  # a line ends
        ([2, 2], [1, 2], [1, 3], 0.0, False),
    ],
)
def test_rules_by_hand(cells, action, moved, reward, won):
    assert play(cells, action, press_cost=0.5) == (moved, [reward, reward], won)


def test_agents_that_part_and_press_by_habit_win_every_episode():
    env = ButtonsEnv("Buttons-2x5", num_envs=50, max_steps=5, seed=0)
    data = env.reset()
    for habit in [[1, 2]] * 4 + [[3, 3]]:  # the first goes left, the second right; then both press
        data = env.step_mdp(env.step(data.set(("agents", "action"), torch.tensor(habit).expand(50, 2))))
    assert (data["agents", "episode_reward"] == 1).all()
    assert data["terminated"].all()


def test_starts_are_uniform():
    cells = ButtonsEnv("Buttons-3x4", num_envs=4000, seed=0).state["cell"]
    counts = torch.stack([agent.bincount(minlength=4) for agent in cells.unbind(-1)])
    assert (((counts - 1000) ** 2 / 1000).sum(-1) < 16.3).all()  # three degrees of freedom: one in a thousand is above


@pytest.mark.parametrize("name", ["Buttons", "Buttons-1x5", "Buttons-2x1", "buttons-2x5"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=f"scenario must be Buttons-NxC .* got '{name}'"):
        ButtonsEnv(name, num_envs=1)
