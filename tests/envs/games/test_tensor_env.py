"""What holds for every game written in Torch."""

import inspect
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hydra.utils import get_object
from torchrl.collectors import Collector
from torchrl.envs import Compose, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from tests.recipes.runs import GAMES
from torchrl_marl.envs import (
    CoordSumEnv,
    check_env,
    make_aerocombat,
    make_coordsum,
    make_maze,
    make_paxmen,
    render_episode,
)
from torchrl_marl.envs.games.streams import random_streams

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ENVS = {  # the task of every game's choice of env=, and larger ones
    **{game.scenario: partial(get_object(game._target_), game.scenario) for game in GAMES.values()},
    "CoordSum-5x20-80": partial(make_coordsum, "CoordSum-5x20-80"),
    "black_blue_red": partial(make_maze, "black_blue_red"),
    "PaxMen-6": partial(make_paxmen, "PaxMen-6"),
    "AeroCombat-4v4": partial(make_aerocombat, "AeroCombat-4v4"),
}
DETERMINISTIC = {"black_red", "black_blue_red"}


@pytest.fixture(params=ENVS)
def make(request):
    return ENVS[request.param]


@pytest.fixture(params=[name for name in ENVS if name not in DETERMINISTIC])
def make_random(request):
    return ENVS[request.param]


def random_actions(env, num_steps, seed=0):
    """Actions apart from any global random state, ``[num_steps, num_envs, num_agents, ...]``."""
    generator = torch.Generator().manual_seed(seed)
    spec = env.full_action_spec_unbatched["agents", "action"]
    shape = (num_steps, *env.batch_size, *spec.shape)
    if spec.dtype.is_floating_point:
        drawn = torch.rand(shape, generator=generator).to(env.device)
        return spec.space.low + (spec.space.high - spec.space.low) * drawn
    return torch.randint(spec.space.n, shape, generator=generator).to(env.device)


def course(env, actions, resets=()):
    """Every transition of an environment that starts anew where it is done, or at the steps of ``resets``."""
    data, steps = env.reset(), []
    for step, action in enumerate(actions):
        data["agents", "action"] = action
        data = env.step(data)
        steps.append(data.clone())
        data = env.step_mdp(data)
        mask = data["done"] | torch.tensor([[step in resets]], device=env.device).expand(data["done"].shape)
        data = env.reset(data.set("_reset", mask)) if mask.any() else data
    return torch.stack(steps, 1)


def assert_equal(one, other):
    assert set(one.keys(True, True)) == set(other.keys(True, True))
    for key, value in one.items(True, True):
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("device", DEVICES)
def test_specs_describe_the_data(make, device):
    check_env_specs(make(num_envs=3, max_steps=5, seed=0, device=device))


@pytest.mark.parametrize("time_limit", ["truncate", "terminate"])
def test_time_limit_is_reported_as_asked(make, time_limit):
    env = make(num_envs=3, max_steps=4, time_limit=time_limit, seed=0)
    data = course(env, random_actions(env, 8))["next"]
    at_limit = torch.zeros(3, 8, 1, dtype=torch.bool)
    at_limit[:, 3::4] = True
    flag, other = ("truncated", "terminated") if time_limit == "truncate" else ("terminated", "truncated")
    assert torch.equal(data["done"], at_limit)
    assert torch.equal(data[flag], at_limit)
    assert not data[other].any()


def test_reward_sums_and_step_counts_are_those_of_torchrls_transforms(make):
    env = make(num_envs=3, max_steps=4, seed=0)
    actions = random_actions(env, 11)
    own = course(env, actions)
    env.set_seed(0)
    sums = RewardSum(in_keys=[("agents", "reward")], out_keys=[("agents", "sum")])
    theirs = course(TransformedEnv(env, Compose(StepCounter(step_count_key="count"), sums)), actions)
    for data, other in ((own, theirs), (own["next"], theirs["next"])):
        assert torch.equal(data["agents", "episode_reward"], other["agents", "sum"])
        assert torch.equal(data["step_count"], other["count"])


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (make_aerocombat, {"won", "survivors"}),
        (make_maze, {"arrived"}),
        (make_paxmen, {"eaten"}),
        (make_coordsum, set()),
    ],
)
def test_what_an_episode_comes_to_is_one_number_for_each_copy_beside_what_agents_see(make, names):
    data = make(num_envs=3, max_steps=4, seed=0).rollout(4)
    for info in (data.get("info", {}), data["next"].get("info", {})):
        assert set(info.keys()) == names
        assert all(value.shape == (3, 4, 1) and value.dtype == torch.float32 for value in info.values())


def test_same_seed_gives_the_same_course_whatever_the_process_draws(make):
    def seeded_course(seed):
        env = make(num_envs=3, max_steps=4, seed=seed)
        torch.rand(5)
        return course(env, random_actions(env, 9))

    first = seeded_course(0)
    assert_equal(seeded_course(0), first)
    env = make(num_envs=3, max_steps=4, seed=7)
    env.rollout(5)
    env.set_seed(0)
    assert_equal(course(env, random_actions(env, 9)), first)


def test_environments_leave_the_random_state_of_the_process_alone(make):
    before = torch.get_rng_state()
    env = make(num_envs=3, max_steps=4, seed=0)
    course(env, random_actions(env, 9))
    env.set_seed(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_the_process_s_generator_chooses_one(make):
    def streams():
        torch.manual_seed(3)
        return make(num_envs=2).get_extra_state(), make(num_envs=2).get_extra_state()

    first, second = streams()
    assert not torch.equal(first, second)
    assert torch.equal(streams()[0], first)


def test_copies_and_seeds_differ(make_random):
    starts = [make_random(num_envs=64, seed=seed).reset()["state"] for seed in (0, 1)]
    assert len(starts[0].unique(dim=0)) > 1
    assert not torch.equal(*starts)


def test_each_environment_of_a_batch_plays_as_it_does_alone(make):
    env = make(num_envs=4, max_steps=5, seed=0)
    actions = random_actions(env, 17)
    streams = env.get_extra_state()
    batch = course(env, actions, resets=(6,))
    for index in range(4):
        alone = make(num_envs=1, max_steps=5)
        alone.set_extra_state(streams[index : index + 1])
        assert_equal(course(alone, actions[:, index : index + 1], resets=(6,)), batch[index : index + 1])


def test_a_partial_reset_leaves_the_other_environments_and_their_streams_alone(make):
    env = make(num_envs=3, max_steps=50, seed=0)
    actions = random_actions(env, 6)
    data = env.reset()
    for action in actions:
        data = env.step_mdp(env.step(data.set(("agents", "action"), action)))
    before = env.state.clone()
    reset = env.reset(data.clone().set("_reset", torch.tensor([[False], [True], [False]])))
    assert reset["step_count"].squeeze(-1).tolist() == [6, 0, 6]
    for index in (0, 2):
        assert_equal(env.state[index], before[index])
        assert_equal(reset[index].exclude("_reset"), data[index])


def test_the_state_dict_brings_back_the_episodes_to_come(make):
    env = make(num_envs=3, max_steps=4, seed=0)
    actions = random_actions(env, 9)
    course(env, actions)
    saved = {name: value.clone() for name, value in env.state_dict().items()}
    expected = course(env, actions)
    restored = make(num_envs=3, max_steps=4, seed=99)
    restored.load_state_dict(saved)
    assert_equal(course(restored, actions), expected)


def test_streams_of_another_batch_are_refused(make):
    with pytest.raises(ValueError, match=r"streams must be of shape \[3\], got \[2\]"):
        make(num_envs=3).load_state_dict(make(num_envs=2).state_dict())


def test_rules_take_any_batch_and_leave_their_arguments_as_they_were(make):
    env = make(num_envs=6, max_steps=3, seed=0)
    rules, actions = env.rules, random_actions(env, 4)
    random = random_streams(1, 6)
    flat, square = rules.reset(random), rules.reset(random.reshape(2, 3))
    for action in actions:
        given = flat.clone()
        next_flat, data = rules.step(flat, action)
        assert_equal(flat, given)
        square, square_data = rules.step(square, action.unflatten(0, (2, 3)))
        assert_equal(square_data.reshape(6), data)
        flat = rules.restart(next_flat, data["done"].squeeze(-1))
        square = rules.restart(square, square_data["done"].squeeze(-1))
        assert_equal(square.reshape(6), flat)


def test_a_compiled_step_with_restart_is_one_graph_and_equals_the_eager_one(make):
    env = make(num_envs=5, max_steps=3, seed=0)
    rules = env.rules

    def play(state, action):
        state, data = rules.step(state, action)
        return rules.restart(state, data["done"].squeeze(-1)), data

    torch.compiler.reset()
    compiled = torch.compile(play, fullgraph=True, backend="aot_eager")
    state = other = rules.reset(random_streams(0, 5))
    for action in random_actions(env, 7):
        state, data = play(state, action)
        other, other_data = compiled(other, action)
        assert_equal(other_data, data)
        assert_equal(other, state)


def test_a_step_reads_no_value_back_from_the_device(make):
    env = make(num_envs=4, seed=0)
    action = random_actions(env, 1)[0].to("meta")  # tensors without values
    rules = env.rules.to("meta")
    state = rules.reset(torch.empty(4, dtype=torch.int64, device="meta"))
    state, data = rules.step(state, action)
    assert rules.restart(state, data["done"].squeeze(-1)).batch_size == (4,)


@pytest.mark.parametrize("num_agents", [1, 3])
def test_what_the_environment_returns_can_be_changed_in_place_without_harm(num_agents):
    env = CoordSumEnv(num_agents, num_envs=2, seed=0)
    data = env.reset()
    for action in [None, *random_actions(env, 3)]:
        data = data if action is None else env.step(data.set(("agents", "action"), action))["next"]
        before = env.state.clone()
        for value in data.clone(recurse=False).values(True, True):
            value.zero_()
        assert_equal(env.state, before)


def test_playing_on_after_the_end_does_no_harm(make):
    env = make(num_envs=2, max_steps=3, seed=0)
    data = env.reset()
    for action in random_actions(env, 8):
        data = env.step_mdp(env.step(data.set(("agents", "action"), action)))
    assert data["step_count"].tolist() == [[8], [8]]
    assert data["agents", "observation"].isfinite().all()


def test_a_collector_resets_finished_episodes(make):
    env = make(num_envs=3, max_steps=4, seed=0)
    collector = Collector(
        env, env.rand_action, frames_per_batch=30, total_frames=30, auto_register_policy_transforms=False
    )
    (batch,) = list(collector)
    assert batch["step_count"].squeeze(-1).tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]] * 3


def test_check_env_finds_nothing_to_warn_about(make, capsys):
    env = make(num_envs=8, seed=0)
    streams = env.get_extra_state()
    assert check_env(env) == []
    printed = capsys.readouterr().out
    assert f"{type(env).__name__}, 8 environments in parallel, cpu" in printed
    assert f"{env.rules.max_steps} steps, reported as {env.rules.time_limit}d" in printed
    assert torch.equal(env.get_extra_state(), streams)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"time_limit": "stop"}, "time_limit must be 'truncate' or 'terminate', got 'stop'"),
    ],
)
def test_wrong_arguments_are_named(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(**{"num_envs": 2, **change})


def test_pictures_show_the_chosen_environment_and_change_nothing(make):
    pytest.importorskip("PIL")
    env = make(num_envs=40, max_steps=50, seed=0)
    data = env.reset()
    for action in random_actions(env, 30):
        data = env.step_mdp(env.step(data.set(("agents", "action"), action)))
    before = env.state.clone()
    picture = env.render(7)
    assert (picture.dtype, picture.ndim, picture.shape[-1]) == (torch.uint8, 3, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 5
    assert torch.equal(env.render(7), picture)
    assert any(not torch.equal(env.render(index), picture) for index in range(6))
    assert_equal(env.state, before)


def test_an_unknown_environment_is_not_drawn(make):
    with pytest.raises(ValueError, match=r"env_index must be in 0\.\.1, got 2"):
        make(num_envs=2).render(2)


def test_an_episode_becomes_a_film(make, tmp_path):
    image = pytest.importorskip("PIL.Image")
    env = make(num_envs=2, max_steps=5, seed=0)
    path = render_episode(env, env.rand_action, tmp_path / "film.gif", max_steps=50)
    with image.open(path) as film:
        assert film.n_frames == 6
        assert film.info["duration"] == pytest.approx(1000 / 6, abs=10)


def test_missing_pillow_names_the_command_that_installs_it(monkeypatch):
    env = CoordSumEnv(num_envs=1, seed=0)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r'pip install "torchrl_marl\[plot\]"'):
        env.render()


@pytest.mark.gpu
def test_the_course_is_the_same_on_cpu_and_gpu(make):
    def on(device):
        env = make(num_envs=5, max_steps=4, seed=0, device=device)
        return course(env, random_actions(env, 9)).cpu()

    one, other = on("cpu"), on("cuda")
    for key, value in one.items(True, True):  # sines and cosines may differ in their last digits
        torch.testing.assert_close(value, other[key], rtol=0, atol=1e-4 if value.is_floating_point() else 0)


SHARED = {"num_envs": inspect.Parameter.empty, "seed": None, "device": "cpu"}
MAKERS = [make_aerocombat, make_coordsum, make_maze, make_paxmen]


@pytest.mark.parametrize("maker", MAKERS)
def test_a_makers_signature_shows_what_it_hands_on_with_the_games_own_defaults(maker):
    parameters = inspect.signature(maker).parameters
    rules = maker(num_envs=1).rules
    expected = {"max_steps": rules.max_steps, "time_limit": rules.time_limit, **SHARED}
    assert {name: parameters[name].default for name in expected} == expected
    assert not any(value.kind == value.VAR_KEYWORD for value in parameters.values())


@pytest.mark.parametrize("maker", MAKERS)
def test_a_misspelt_argument_is_refused(maker):
    with pytest.raises(TypeError, match="num_env"):
        maker(num_env=1)
    with pytest.raises(TypeError, match="max_step'"):
        maker(num_envs=1, max_step=1)
