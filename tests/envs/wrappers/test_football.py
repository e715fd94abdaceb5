"""The wrapper of Google Research Football against the engine where it is built, its logic against a stand-in."""

import logging
import sys
import types

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from tests.recipes.runs import run_folders, run_recipe
from torchrl_marl.envs import make_football
from torchrl_marl.envs.games.streams import draw_below, random_streams


class Pitch:
    """Three players, of whom number 1 has the ball and walks to the goal: a goal in episode 0, else the limit."""

    def __init__(self, config):
        self.config, self.episode = config, -1

    def reset(self):
        self.episode, self.steps = self.episode + 1, 0
        return self.observation()

    def step(self, action):
        assert len(action) == 3
        self.steps += 1
        score = float(self.episode == 0 and self.steps == 4)
        over = bool(score) or self.steps == 6
        return self.observation(), np.full(3, score, dtype=np.float32), over, {"score_reward": score}

    def observation(self):
        ball = [min(0.2 * self.steps, 0.7), 0.0, 0.1]
        common = {"ball": ball, "ball_owned_team": 0, "ball_owned_player": 2, "steps_left": 6 - self.steps}
        return [{**common, "active": index + 1} for index in range(3)]


@pytest.fixture
def stand_in(monkeypatch):
    def convert(observation, fixed_positions):
        assert fixed_positions
        numbers = np.zeros((len(observation), 115), dtype=np.float32)
        for row, own in zip(numbers, observation, strict=True):
            row[88], row[97 + own["active"]] = own["ball"][0], 1
        return numbers

    names = ["gfootball", *(f"gfootball.env.{name}" for name in ("football_env", "wrappers", "config"))]
    modules = {name: types.ModuleType(name) for name in [*names, "gfootball.env", "gfootball.env.scenario_builder"]}
    modules["gfootball.env.football_env"].FootballEnv = Pitch
    modules["gfootball.env.wrappers"].Simple115StateWrapper = types.SimpleNamespace(convert_observation=convert)
    modules["gfootball.env.config"].Config = dict
    modules["gfootball.env.scenario_builder"].all_scenarios = lambda: ["academy_3_vs_1_with_keeper"]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def rollout(env, num_steps):
    torch.manual_seed(0)
    return env.rollout(num_steps, break_when_any_done=False)


@pytest.mark.usefixtures("stand_in")
def test_a_goal_terminates_and_the_limits_truncate():
    data = rollout(make_football(num_envs=1, seed=0), 10)["next"]
    assert data["terminated"].flatten().nonzero().flatten().tolist() == [3]
    assert data["truncated"].flatten().nonzero().flatten().tolist() == [9]  # the scenario's own
    data = rollout(make_football(num_envs=1, seed=0, max_steps=3), 3)["next"]
    assert data["truncated"].flatten().tolist() == [False, False, True]


@pytest.mark.usefixtures("stand_in")
def test_the_goals_of_an_episode_are_counted():
    goals = rollout(make_football(num_envs=1, seed=0), 10)["next", "info", "goals"]
    assert goals.flatten().tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.usefixtures("stand_in")
def test_left_players_are_grouped_and_the_state_is_what_they_have_in_common():
    env = make_football(num_envs=2, seed=0)
    assert env.group_map == {"agents": ["left_0", "left_1", "left_2"]}
    data = rollout(env, 3)
    active = data["agents", "observation"][..., 97:108]
    assert torch.equal(active.argmax(-1), torch.arange(1, 4).expand(2, 3, 3))
    without = torch.cat([data["agents", "observation"][:, :, 0, :97], data["agents", "observation"][:, :, 0, 108:]], -1)
    assert torch.equal(data["state"], without)


@pytest.mark.usefixtures("stand_in")
def test_the_carrier_earns_a_tenth_for_each_ring_and_all_get_what_is_left_with_a_goal():
    reward = rollout(make_football(num_envs=1, seed=0), 4)["next", "agents", "reward"].squeeze(-1)[0]
    # Thresholds 0.99 - k 0.8 / 9: the ball at distances 0.8, 0.6 and 0.4 from the goal is within 3, 5 and 7 of them.
    expected = torch.tensor([[0, 0.3, 0], [0, 0.2, 0], [0, 0.2, 0], [2, 1.3, 2]])
    torch.testing.assert_close(reward, expected)
    plain = rollout(make_football(num_envs=1, seed=0, checkpoints=False), 4)["next", "agents", "reward"]
    assert plain.squeeze(-1)[0].tolist() == [[0] * 3] * 3 + [[1] * 3]


@pytest.mark.usefixtures("stand_in")
def test_every_episode_has_the_seed_that_its_stream_gives():
    env = make_football(num_envs=1, seed=3)
    stream = random_streams(3, 1)
    for _ in range(3):
        env.reset()
        stream, seed = draw_below(stream, 2**31 - 1)
        config = env._games[0].env.config
        assert config["game_engine_random_seed"] == int(seed)
        assert config["reverse_team_processing"] == bool(seed % 2)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scenario": "academy_2_vs_6"}, "gfootball has no scenario 'academy_2_vs_6'; it has academy_3_vs_1"),
        ({"num_agents": 12}, r"num_agents must be in 1\.\.11, got 12"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_football(**{"num_envs": 1, **change})


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gfootball", None)
    with pytest.raises(ImportError, match=r'pip install "torchrl_marl\[football\]"'):
        make_football(num_envs=1)


def test_the_engine_itself_matches_the_specs_and_repeats_by_seed():
    pytest.importorskip("gfootball")
    env = make_football(num_envs=2, seed=0)
    check_env_specs(env)
    env.set_seed(5)
    first = rollout(env, 30)
    env.set_seed(5)
    assert (rollout(env, 30) == first).all()
    assert not (first["agents", "observation"][0] == first["agents", "observation"][1]).all()


def test_every_step_equals_the_raw_engine(caplog):
    pytest.importorskip("gfootball")
    from gfootball.env.config import Config
    from gfootball.env.football_env import FootballEnv
    from gfootball.env.wrappers import Simple115StateWrapper

    caplog.set_level(logging.INFO)  # as Hydra does
    data = rollout(make_football(num_envs=1, seed=7, checkpoints=False), 60)[0]
    assert data["next", "done"].any()
    assert not caplog.records
    stream, step, env = random_streams(7, 1), 0, None
    for turn in data.unbind(0):
        if step == 0:
            stream, seed = draw_below(stream, 2**31 - 1)
            level = {"level": "academy_3_vs_1_with_keeper", "players": ["agent:left_players=3"]}
            env = FootballEnv(Config({**level, "game_engine_random_seed": int(seed)}))
            seen = env.reset()
        np.testing.assert_array_equal(turn["agents", "observation"], Simple115StateWrapper.convert_observation(seen, 1))
        seen, reward, over, _ = env.step(turn["agents", "action"].tolist())
        np.testing.assert_array_equal(turn["next", "agents", "reward"].squeeze(-1), reward)
        assert turn["next", "done"].item() == over
        step = 0 if over else step + 1


def test_mars_trains_for_an_iteration(monkeypatch, tmp_path):
    pytest.importorskip("gfootball")
    run_recipe(monkeypatch, tmp_path, "env=football", "env.num_envs=2", "total_frames=80", "evaluation.interval=80")
    assert (run_folders(tmp_path)[0] / "learning_curve.png").exists()
