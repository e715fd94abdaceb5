import sys

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from tests.recipes.runs import run_folders, run_recipe
from torchrl_marl.envs import RandomState, make_lbforaging, make_mamujoco, make_pettingzoo, make_rware
from torchrl_marl.envs.games.streams import draw_below, random_streams

PACKAGES = {"lbforaging": "lbforaging", "rware": "rware", "mpe": "mpe2", "mamujoco": "gymnasium_robotics"}
CONTINUOUS = {"N": 3, "continuous_actions": True}


def lbforaging(**kwargs):
    pytest.importorskip("lbforaging")
    return make_lbforaging("Foraging-5x5-2p-1f-v3", **{"max_steps": 20, "shared_reward": False, **kwargs})


def rware(**kwargs):
    pytest.importorskip("rware")
    return make_rware("rware-tiny-2ag-v2", **{"max_steps": 20, "shared_reward": False, **kwargs})


def mpe(**kwargs):
    pytest.importorskip("mpe2")
    return make_pettingzoo("simple_spread_v3", **{"max_steps": 20, "scenario_kwargs": CONTINUOUS, **kwargs})


def mpe_discrete(**kwargs):
    return mpe(scenario_kwargs={"N": 3}, **kwargs)


def mamujoco(**kwargs):
    pytest.importorskip("gymnasium_robotics")
    return make_mamujoco("HalfCheetah-6x1", **{"max_steps": 20, **kwargs})


each_package = pytest.mark.parametrize("make", [lbforaging, rware, mpe, mpe_discrete, mamujoco])


def rollout(env, num_steps):
    torch.manual_seed(0)  # of the random actions
    return env.rollout(num_steps, break_when_any_done=False)


class RawLBForaging:
    def __init__(self):
        import gymnasium
        import lbforaging  # noqa: F401

        self.env = gymnasium.make("Foraging-5x5-2p-1f-v3", disable_env_checker=True)

    def reset(self, seed):
        return np.stack(self.env.reset(seed=seed)[0])

    def step(self, action):
        observation, reward, _, _, _ = self.env.step(action.tolist())
        return np.stack(observation), reward, self.env.unwrapped.field.sum() == 0


class RawRware(RawLBForaging):
    def __init__(self):
        import gymnasium
        import rware  # noqa: F401

        self.env = gymnasium.make("rware-tiny-2ag-v2", disable_env_checker=True)

    def step(self, action):
        observation, reward, _, _, _ = self.env.step(action.tolist())
        return np.stack(observation), reward, False


class RawMpe:
    def __init__(self):
        from mpe2 import simple_spread_v3

        self.env = simple_spread_v3.parallel_env(max_cycles=10**6, **CONTINUOUS)

    def reset(self, seed):
        return np.stack(list(self.env.reset(seed=seed)[0].values()))

    def step(self, action):
        observation, reward, *_ = self.env.step(dict(zip(self.env.agents, action, strict=True)))
        return np.stack(list(observation.values())), list(reward.values()), False


class RawMamujoco:
    def __init__(self):
        from gymnasium_robotics import mamujoco_v1

        self.env = mamujoco_v1.parallel_env("HalfCheetah", "6x1")

    def reset(self, seed):
        return self.padded(self.env.reset(seed=seed)[0])

    def step(self, action):
        observation, reward, *_ = self.env.step(dict(zip(self.env.possible_agents, action, strict=True)))
        return self.padded(observation), list(reward.values()), False

    def padded(self, observation):
        longest = max(map(len, observation.values()))
        return np.stack([np.pad(own, (0, longest - len(own))) for own in observation.values()])


@each_package
def test_data_match_the_specs(make):
    check_env_specs(make(num_envs=3, seed=0))


@pytest.mark.parametrize(
    ("make", "raw"), [(lbforaging, RawLBForaging), (rware, RawRware), (mpe, RawMpe), (mamujoco, RawMamujoco)]
)
def test_every_step_equals_the_raw_package_resets_included(make, raw):
    data = rollout(make(num_envs=2, seed=7), 50)
    assert data["next", "done"].sum() >= 4
    streams = random_streams(7, 2)
    for index, course in enumerate(data.unbind(0)):
        game, stream, step = raw(), streams[index], 0
        for turn in course.unbind(0):
            if step == 0:
                stream, seed = draw_below(stream, 2**31 - 1)
                seen = game.reset(int(seed))
            np.testing.assert_array_equal(turn["agents", "observation"], seen.astype(np.float32))
            seen, reward, over = game.step(turn["agents", "action"].numpy())
            step += 1
            following = turn["next"]
            np.testing.assert_array_equal(following["agents", "observation"], seen.astype(np.float32))
            np.testing.assert_allclose(following["agents", "reward"].squeeze(-1), reward, rtol=1e-6)
            assert following["terminated"].item() == over
            assert following["truncated"].item() == (step == 20 and not over)
            step = 0 if following["done"] else step


def test_eating_everything_terminates_and_the_time_limit_truncates():
    data = rollout(lbforaging(num_envs=8, seed=0), 60)["next"]
    eaten = data["agents", "reward"].sum((-2, -1)) > 0  # there is one food
    assert eaten.any()
    assert torch.equal(data["terminated"].squeeze(-1), eaten)
    assert torch.equal(data["truncated"], (data["step_count"] == 20) & ~data["terminated"])
    assert torch.equal(data["done"], data["terminated"] | data["truncated"])


def test_the_share_of_food_eaten_is_told_in_every_step():
    env = lbforaging(num_envs=6, seed=0, scenario_kwargs={"max_num_food": 2, "max_player_level": 2})
    data = rollout(env, 60)
    food, reward = data["next", "info", "food"], data["next", "agents", "reward"].sum(-2)
    grown = food - torch.where(data["next", "step_count"] == 1, 0.0, food.roll(1, 1))
    assert set(food.unique().tolist()) == {0.0, 0.5, 1.0}
    assert torch.equal(grown > 0, reward > 0)
    assert torch.equal(food == 1, data["next", "terminated"])
    assert not data["info", "food"][:, 0].any()


@each_package
def test_only_the_environments_asked_are_reset(make):
    env = make(num_envs=3, seed=0)
    data = env.rollout(2)[:, -1]["next"]
    data["_reset"] = torch.tensor([[False], [True], [False]])
    before = data["agents", "observation"].clone()
    after = env.reset(data)["agents", "observation"]
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])


@each_package
def test_a_copy_plays_as_it_would_alone(make):
    many, one = make(num_envs=3, seed=5), make(num_envs=1, seed=5)
    first, alone = many.reset(), one.reset()
    for _ in range(25):
        first = many.rand_action(first)
        alone["agents", "action"] = first["agents", "action"][:1]
        (after, first), (after_alone, alone) = many.step_and_maybe_reset(first), one.step_and_maybe_reset(alone)
        assert (after[:1].exclude("_reset") == after_alone.exclude("_reset")).all()


@each_package
def test_a_restored_environment_begins_the_same_episodes(make):
    env, other = make(num_envs=2, seed=0), make(num_envs=2, seed=1)
    rollout(env, 30)
    saved = RandomState(env).state_dict()
    RandomState(other).load_state_dict(saved)
    assert (rollout(env, 30) == rollout(other, 30)).all()


def test_action_mask_tells_the_legal_moves():
    env = lbforaging(num_envs=4, seed=3)
    rollout(env, 5)
    data = env.reset()
    for game, mask in zip(env._games, data["agents", "action_mask"], strict=True):
        food = {(int(row), int(column)) for row, column in zip(*game.env.field.nonzero(), strict=True)}
        for player, legal in zip(game.env.players, mask.tolist(), strict=True):
            row, column = map(int, player.position)
            around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            inside = [0 <= r < 5 and 0 <= c < 5 and (r, c) not in food for r, c in around]
            assert legal == [True, *inside, bool(food & set(around))]


@pytest.mark.parametrize("make", [lbforaging, mpe])
def test_shared_reward_is_the_sum_over_agents(make):
    own = rollout(make(num_envs=4, seed=0, shared_reward=False), 40)["next", "agents", "reward"]
    shared = rollout(make(num_envs=4, seed=0, shared_reward=True), 40)["next", "agents", "reward"]
    assert own.abs().sum() > 0
    torch.testing.assert_close(shared, own.sum(-2, keepdim=True).expand_as(own))


def test_state_is_the_environments_own():
    data = mpe(num_envs=2, seed=0).reset()
    assert torch.equal(data["state"], data["agents", "observation"].flatten(1))  # so defines MPE it


def test_actions_out_of_range_act_as_the_nearest_in_range():
    def after(low, high):
        env = mpe(num_envs=1, seed=0)
        data = env.reset()
        data["agents", "action"] = torch.tensor([low, low, high, low, high]).expand(1, 3, 5)
        return env.step(data)["next", "agents", "observation"]

    assert torch.equal(after(-3.0, 4.0), after(0.0, 1.0))
    assert not torch.equal(after(0.0, 1.0), after(0.2, 0.5))


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [
        (make_lbforaging, "lbforaging.foraging", "gym"),
        (make_rware, "rware.warehouse", "gym"),
        (make_pettingzoo, "mpe2", "mpe"),
        (make_mamujoco, "gymnasium_robotics.envs.multiagent_mujoco.mujoco_multi", "mamujoco"),
    ],
)
def test_missing_package_names_the_command_that_installs_it(monkeypatch, make, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "torchrl_marl\[{extra}\]"'):
        make(num_envs=1)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (lbforaging, {"num_envs": 0}, "num_envs must be at least 1, got 0"),
        (rware, {"max_steps": 0}, "max_steps must be at least 1, got 0"),
        (lbforaging, {"scenario_kwargs": {"foods": 1}}, "'Foraging-5x5-2p-1f-v3' has no option foods; it has players"),
        (mpe, {"scenario_kwargs": {"n": 1}}, "'simple_spread_v3' has no option n; it has N"),
    ],
)
def test_wrong_arguments_are_named(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(**{"num_envs": 1, **change})


def test_unknown_scenarios_are_named():
    pytest.importorskip("rware")
    with pytest.raises(ValueError, match="rware has no scenario 'rware-tny-2ag-v2'; did you mean 'rware-tiny-2ag-v2'"):
        make_rware("rware-tny-2ag-v2", num_envs=1)
    pytest.importorskip("mpe2")
    with pytest.raises(ValueError, match="mpe2 has no scenario 'simple_spred_v3'"):
        make_pettingzoo("simple_spred_v3", num_envs=1)


@pytest.mark.parametrize("scenario", ["HalfCheetah-9x9", "HalfCheetah", "Cheetah-6x1"])
def test_unknown_bodies_and_partitions_are_named(scenario):
    pytest.importorskip("gymnasium_robotics")
    with pytest.raises(ValueError, match=rf"MaMuJoCo has no scenario '{scenario}': .* such as HalfCheetah-6x1"):
        make_mamujoco(scenario, num_envs=1)


def test_agents_with_fewer_joints_have_actions_without_effect_and_all_are_scaled():
    pytest.importorskip("gymnasium_robotics")
    env = make_mamujoco("Humanoid-9|8", num_envs=1, seed=0)
    assert env.full_action_spec["agents", "action"].shape == (1, 2, 9)
    data, raw = env.reset(), env._games[0].env
    data["agents", "action"] = torch.ones(1, 2, 9)
    taken = []
    raw.single_agent_env.step, step = lambda action: taken.append(action) or step(action), raw.single_agent_env.step
    env.step(data)
    np.testing.assert_allclose(taken[0], np.full(17, 0.4), rtol=1e-6)  # the Humanoid's limit


def test_agents_that_differ_are_rejected():
    pytest.importorskip("mpe2")
    with pytest.raises(ValueError, match="agents must have equal spaces"):
        make_pettingzoo("simple_tag_v3", num_envs=1)


@pytest.mark.parametrize(
    ("name", "package"),
    PACKAGES.items(),
)
def test_mars_trains_for_an_iteration(monkeypatch, tmp_path, name, package):
    pytest.importorskip(package)
    run_recipe(monkeypatch, tmp_path, f"env={name}", "total_frames=80", "evaluation.interval=80")
    assert (run_folders(tmp_path)[0] / "learning_curve.png").exists()
