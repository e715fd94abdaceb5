import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchrl.envs import VmasEnv

import torchrl_marl
from torchrl_marl.envs import make_env
from torchrl_marl.envs.vmas import _check_scenario
from torchrl_marl.extras import import_vmas

vmas = pytest.importorskip("vmas")


def run_python(code):
    """Run code with warnings as errors in a fresh interpreter and return what it prints."""
    root = Path(torchrl_marl.__file__).parents[1]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def rollout(num_steps, env):
    torch.manual_seed(0)  # of the random actions
    return env.rollout(num_steps, break_when_any_done=False)


def test_importing_envs_imports_no_optional_package():
    output = run_python(
        "import sys, torchrl_marl.envs; print({'vmas', 'gym', 'pyglet', 'matplotlib', 'PIL'} & set(sys.modules))"
    )
    assert output == "set()\n"


def test_building_a_task_prints_and_warns_nothing():
    code = (
        "import gym_notices.notices as module; module.notices = {'0.26.2': 'unmaintained'};"  # as its newer releases
        "from torchrl_marl.envs import make_env; make_env('balance', num_envs=2, seed=0).rollout(2)"
    )
    assert run_python(code) == ""


@pytest.mark.parametrize(("time_limit", "truncated"), [("truncate", True), ("terminate", False)])
def test_time_limit_is_reported_as_asked(time_limit, truncated):
    data = rollout(8, make_env("wheel", num_envs=3, max_steps=4, time_limit=time_limit, seed=0))["next"]
    at_limit = torch.zeros(3, 8, 1, dtype=torch.bool)
    at_limit[:, 3::4] = True
    assert torch.equal(data["done"], at_limit)
    assert torch.equal(data["terminated"], at_limit & (not truncated))
    if truncated:
        assert torch.equal(data["truncated"], at_limit)


@pytest.mark.parametrize("time_limit", ["truncate", "terminate"])
def test_a_fall_is_a_termination_whatever_the_time_limit(time_limit):
    env = make_env("balance", num_envs=16, max_steps=1000, time_limit=time_limit, seed=0)
    data = rollout(60, env)["next"]
    assert data["terminated"].any()
    assert torch.equal(data["terminated"], data["done"])


@pytest.mark.parametrize(
    ("scenario", "groups"),
    [("balance", {"agents": 3}), ("football", {"agent_blue": 3}), ("simple_tag", {"adversary": 3, "agent": 1})],
)
def test_episode_reward_sums_the_rewards_of_the_episode_in_every_group(scenario, groups):
    data = rollout(7, make_env(scenario, num_envs=2, max_steps=4, seed=0))["next"]
    for group, num_agents in groups.items():
        reward = data[group, "reward"]
        assert reward.shape == (2, 7, num_agents, 1)
        expected = torch.cat([reward[:, :4].cumsum(1), reward[:, 4:].cumsum(1)], 1)
        torch.testing.assert_close(data[group, "episode_reward"], expected)


def test_same_seed_gives_the_same_course_whatever_other_environments_did():
    def course(seed):
        return rollout(12, make_env("navigation", num_envs=3, max_steps=5, seed=seed))

    first = course(0)
    other = make_env("football", num_envs=2, seed=3)
    other.rollout(3)
    assert (course(0) == first).all()
    assert not (course(1) == first).all()


def test_seeding_leaves_the_random_state_of_the_process_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    make_env("navigation", num_envs=2, seed=0).set_seed(5)
    assert torch.equal(torch.rand(3), expected)


def test_discrete_actions_are_one_number_per_agent():
    env = make_env("balance", num_envs=2, continuous_actions=False, seed=0)
    spec = env.full_action_spec["agents", "action"]
    assert (spec.shape, spec.space.n, spec.dtype) == ((2, 3), 9, torch.int64)
    assert env.rollout(2)["agents", "action"].shape == (2, 2, 3)


def test_actions_out_of_range_act_as_the_nearest_in_range():
    def after(action):
        env = make_env("transport", num_envs=2, seed=0)
        data = env.reset()
        data["agents", "action"] = torch.full((2, 4, 2), action)
        return env.step(data)["next", "agents", "observation"]

    assert torch.equal(after(5.0), after(1.0))
    assert not torch.equal(after(1.0), after(0.5))


def test_scenario_kwargs_reach_the_scenario():
    env = make_env("navigation", num_envs=2, scenario_kwargs={"n_agents": 5}, seed=0)
    assert len(env.group_map["agents"]) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scenario": "navigatoin"}, "no scenario 'navigatoin'; did you mean 'navigation'"),
        ({"scenario": "navigatoin"}, "VmasEnv.available_envs lists them all"),
        ({"scenario_kwargs": {"n_agnets": 3}}, "'wheel' has no option n_agnets; it has .*n_agents"),
        ({"time_limit": "truncated"}, "time_limit must be 'truncate' or 'terminate', got 'truncated'"),
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"max_steps": -1}, "max_steps must be at least 1, got -1"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_env(**{"scenario": "wheel", "num_envs": 2, **change})


def test_missing_vmas_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vmas", None)
    with pytest.raises(ImportError, match=r'pip install "torchrl_marl\[vmas\]"'):
        make_env("wheel", num_envs=2)


def test_every_scenario_finds_its_number_of_agents_among_its_options():
    # The options are read from VMAS's sources: this fails if they no longer look as expected.
    fixed = {"balance", "football", "navigation", "simple_spread", "transport", "wheel", "discovery", "flocking"}
    assert fixed <= set(VmasEnv.available_envs)
    for scenario in fixed:
        name = {"football": "n_blue_agents"}.get(scenario, "n_agents")
        _check_scenario(import_vmas(), scenario, {name: 2})
