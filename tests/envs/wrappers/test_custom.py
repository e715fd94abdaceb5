import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import check_env_specs

from tests.recipes.runs import run_folders, run_recipe
from torchrl_marl.__main__ import main
from torchrl_marl.envs import check_env, make_custom, make_env, render_episode
from torchrl_marl.envs.games.streams import draw_below, random_streams


class Space:
    """What is read of a space of Gymnasium, so that these tests need no Gymnasium."""

    def __init__(self, **parts):
        self.__dict__.update(parts)

    def __eq__(self, other):
        return repr(self) == repr(other)

    def __repr__(self):
        return f"{type(self).__name__}({self.__dict__})"


class Box(Space):
    def __init__(self, low, high, shape):
        super().__init__(shape=shape, low=np.full(shape, low, np.float32), high=np.full(shape, high, np.float32))


class Discrete(Space):
    def __init__(self, n):
        super().__init__(n=n)


def Dict(**spaces):
    return Space(spaces=spaces)


def Tuple(*spaces):
    return Space(spaces=spaces)


class Listed:
    """Gymnasium's list style: a matrix for each agent to see, a reward for both, flags in a list."""

    observation_space = Tuple(*2 * [Box(-1, 1, (2, 3))])
    action_space = Tuple(*2 * [Box(-1, 2, (2,))])

    def reset(self, seed=None):
        self.random = np.random.default_rng(seed)
        return self.random.random((2, 2, 3)), {}

    def step(self, action):
        return list(self.random.random((2, 2, 3))), float(np.sum(action)), [False, False], False, {}


class Named:
    """Gymnasium's dictionary style with masks and flags as RLlib has them; takes what it is handed."""

    names = ("red", "blue", "green")
    observation_space = Dict(
        **{name: Dict(observation=Box(-1, 1, (3,)), action_mask=Box(0, 1, (4,))) for name in names}
    )
    action_space = Dict(**{name: Discrete(4) for name in names})

    def __init__(self, seed, max_steps, render_mode=None, *, prize=1.0):
        self.made_of, self.prize = (seed, max_steps, render_mode), prize

    def reset(self, seed=None):
        self.random = np.random.default_rng(seed)
        return self.seen(), {}

    def step(self, action):
        assert list(action) == list(self.names)
        rewards = {name: self.prize * choice for name, choice in reversed(action.items())}
        flags = dict.fromkeys(self.names, False)
        return self.seen(), rewards, {**flags, "__all__": self.random.random() < 0.2}, flags, {}

    def seen(self):
        masks = self.random.random((3, 4)) < 0.5
        masks[:, 1] = True
        views = zip(self.names, self.random.random((3, 3)), masks, strict=True)
        return {name: {"observation": view, "action_mask": mask.astype(np.int8)} for name, view, mask in views}

    def render(self):
        return np.full((30, 40, 3), 200, np.uint8)


class Parallel:
    """PettingZoo's parallel API with a state."""

    possible_agents = ("first", "second")
    state_space = Box(-1, 1, (5,))

    def observation_space(self, agent):
        return Box(-1, 1, (3,))

    def action_space(self, agent):
        return Discrete(2)

    def reset(self, seed=None, options=None):
        self.random, self.steps = np.random.default_rng(seed), 0
        return {agent: self.random.random(3) for agent in self.possible_agents}, {}

    def step(self, action):
        self.steps += 1
        over = dict.fromkeys(self.possible_agents, self.steps == 4)
        views = {agent: self.random.random(3) for agent in self.possible_agents}
        return views, {agent: float(choice) for agent, choice in action.items()}, dict.fromkeys(over, False), over, {}

    def state(self):
        return np.arange(5.0)


class OneOfTorchRL(EnvBase):
    """A single environment that only draws random numbers; ``flaw`` leaves out or misshapes an entry."""

    def __init__(self, flaw=None, batch_size=()):
        super().__init__(batch_size=torch.Size(batch_size))
        self.group_map = {"agents": ["agent_0", "agent_1"]}
        seen = "vision" if flaw == "observation" else "observation"
        group = (*batch_size, 2)
        view = Composite({seen: Unbounded((*group, 3))}, shape=group)
        self.observation_spec = Composite(agents=view, shape=batch_size)
        action = Composite(action=Bounded(-1.0, 1.0, (*group, 2)), shape=group)
        self.action_spec = Composite(agents=action, shape=batch_size)
        rewarded = batch_size if flaw == "reward" else group
        reward = Composite(reward=Unbounded((*rewarded, 1)), shape=rewarded)
        self.reward_spec = Composite(agents=reward, shape=batch_size)
        flags = {name: Binary(shape=(*batch_size, 1), dtype=torch.bool) for name in ("done", "terminated", "truncated")}
        self.done_spec = Composite(flags, shape=batch_size)

    def _set_seed(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def _reset(self, tensordict):
        data = self.observation_spec.zero().update(self.full_done_spec.zero())
        data["agents", "observation"] = torch.rand(*data["agents"].shape, 3, generator=self.generator)
        return data

    def _step(self, tensordict):
        return self._reset(None).update(self.full_reward_spec.one())


def batch_of_torchrl(num_envs):
    return OneOfTorchRL(batch_size=(num_envs,))


class Scattered:
    """Makes a VMAS scenario object of the user's own."""

    def __new__(cls):
        from vmas.scenarios.dispersion import Scenario

        return Scenario()


KINDS = [Listed, Named, Parallel, OneOfTorchRL, batch_of_torchrl]


def rollout(env, num_steps):
    torch.manual_seed(0)  # of the random actions
    return env.rollout(num_steps, break_when_any_done=False)


@pytest.mark.parametrize("factory", KINDS)
def test_every_kind_gives_a_batch_that_a_network_can_play(factory):
    env = make_custom(factory, num_envs=3, max_steps=6, seed=0)
    assert env.batch_size == (3,)
    check_env_specs(env)
    data = rollout(env, 12)["next"]
    reward, total = data["agents", "reward"], data["agents", "episode_reward"]
    assert torch.equal(total[:, 0], reward[:, 0])
    assert data["done"].sum() >= 6
    assert (data["step_count"] <= 6).all()


@pytest.mark.parametrize("factory", KINDS)
def test_the_same_seed_gives_the_same_course_and_copies_differ(factory):
    first, again, other = (rollout(make_custom(factory, num_envs=2, max_steps=6, seed=s), 8) for s in (5, 5, 6))
    assert (first == again).all()
    seen = first["agents", "observation"]
    assert not torch.equal(seen, other["agents", "observation"])
    assert not torch.equal(seen[0], seen[1])


def test_a_vmas_scenario_object_plays_as_the_scenario_of_that_name():
    pytest.importorskip("vmas")
    own = rollout(make_custom(Scattered, num_envs=3, max_steps=4, seed=7), 6)
    named = rollout(make_env("dispersion", num_envs=3, max_steps=4, seed=7), 6)
    assert (own == named).all()


def test_every_value_of_a_list_or_dictionary_reaches_its_agent():
    listed = rollout(make_custom(Listed, num_envs=1, max_steps=3, seed=0), 1)[0, 0]
    assert listed["agents", "observation"].shape == (2, 6)
    expected = listed["agents", "action"].sum()
    torch.testing.assert_close(listed["next", "agents", "reward"], expected.expand(2, 1))
    named = rollout(make_custom(Named, num_envs=1, max_steps=3, seed=0, factory_kwargs={"prize": 10.0}), 1)[0, 0]
    torch.testing.assert_close(named["next", "agents", "reward"][:, 0], 10.0 * named["agents", "action"])
    _, seed = draw_below(random_streams(0, 1), 2**31 - 1)
    views = Named(0, 0).reset(int(seed[0]))[0]
    for index, name in enumerate(Named.names):
        np.testing.assert_allclose(named["agents", "observation"][index], views[name]["observation"], rtol=1e-6)
        np.testing.assert_array_equal(named["agents", "action_mask"][index], views[name]["action_mask"] > 0)
    assert torch.equal(rollout(make_custom(Parallel, num_envs=1), 1)["state"][0, 0], torch.arange(5.0))


def test_an_environments_own_limit_and_its_end_keep_their_names():
    data = rollout(make_custom(Parallel, num_envs=2, max_steps=9, seed=0), 8)["next"]
    assert data["truncated"].squeeze(-1)[:, 3::4].all()
    assert not data["terminated"].any()
    data = rollout(make_custom(Named, num_envs=8, max_steps=6, seed=0), 20)["next"]
    assert data["terminated"].any()
    assert torch.equal(data["truncated"], (data["step_count"] == 6) & ~data["terminated"])


def test_a_factory_gets_what_it_takes():
    env = make_custom(Named, num_envs=2, max_steps=7, seed=30)
    assert [game.env.made_of for game in env._games] == [(30, 7, "rgb_array"), (31, 7, "rgb_array")]


def test_the_recipes_name_of_an_unnamed_task_is_none_for_the_factory():
    def make(num_envs, scenario="own"):
        names.append(scenario)
        return OneOfTorchRL(batch_size=(num_envs,))

    names: list[str] = []
    make_custom(make, num_envs=2, scenario="other", seed=0)
    make_custom(make, num_envs=2, scenario=make, seed=0)
    assert names == ["other", "own"]


def test_a_copied_environment_of_torchrl_is_filmed(tmp_path):
    pytest.importorskip("PIL")
    picture = torch.zeros(8, 8, 3, dtype=torch.uint8)
    drawn = type("Drawn", (OneOfTorchRL,), {"render": lambda self, env_index: picture})
    env = make_custom(drawn, num_envs=2, max_steps=3, seed=0)
    assert render_episode(env, env.rand_action, tmp_path / "film.gif", max_steps=3).read_bytes().startswith(b"GIF")


def test_games_that_draw_themselves_are_filmed_and_others_say_what_is_missing(tmp_path):
    pytest.importorskip("PIL")
    env = make_custom(Named, num_envs=1, max_steps=3, seed=0)
    assert render_episode(env, env.rand_action, tmp_path / "film.gif", max_steps=3).read_bytes().startswith(b"GIF")
    env = make_custom(type("Dark", (Named,), {"render": lambda self: None}), num_envs=1, seed=0)
    with pytest.raises(ValueError, match=r"render\(\) must return uint8 \[height, width, 3\].*got NoneType"):
        render_episode(env, env.rand_action, tmp_path / "film.gif", max_steps=3)


def changed(base, **attributes):
    return type(base.__name__, (base,), attributes)


def needs_size(size):
    return Listed()


WRONG = [
    (None, {}, "factory must be 'module:callable', such as my_module:make_env; got None"),
    ("games", {}, "factory must be 'module:callable'.*got 'games'"),
    ("no_such_games:make", {}, "there is no module 'no_such_games' in "),
    ("tests.envs.wrappers.test_custom:Lister", {}, "has no callable 'Lister'; it has Listed"),
    (Listed, {"num_envs": 0}, "num_envs must be at least 1, got 0"),
    (needs_size, {}, r"needs_size needs size: set env\.factory_kwargs\.size=\.\.\., or a default"),
    (Named, {"factory_kwargs": {"price": 1}}, "Named takes no price; it takes seed, max_steps, render_mode, prize"),
    (lambda: {}, {}, r"<lambda> returned dict; it must return an environment of TorchRL \(EnvBase\), PettingZoo"),
    (changed(Listed, action_space=Box(-1, 1, (2,))), {}, "Listed does not say what each agent observes and does"),
    (
        changed(Parallel, agent_iter=None),
        {},
        r"agents move in turns: wrap it in pettingzoo\.utils\.aec_to_parallel",
    ),
    (changed(Listed, action_space=Tuple(Discrete(2), Discrete(3))), {}, "agents must have equal spaces"),
    (changed(Listed, action_space=Tuple(Discrete(2))), {}, "agents that observe .* must be those that act"),
    (changed(Listed, action_space=Tuple(*2 * [Box(-np.inf, 1, (2,))])), {}, "a bounded Box of one dimension"),
    (changed(Listed, observation_space=Tuple(*2 * [Discrete(2)])), {}, "observations must be a Box, or a Dict of obs"),
    (lambda: OneOfTorchRL("observation"), {}, r"'observation'\) must be \[2, size\], what each agent sees.*there are"),
    (lambda: OneOfTorchRL("reward"), {}, r"'reward'\) must be \[2, 1\], one for each agent: .* \(it is \[1\]\)"),
    (lambda: OneOfTorchRL(batch_size=(4,)), {}, r"batch size \[4\], but 2 environments are asked for: take num_envs"),
]


@pytest.mark.parametrize(("factory", "change", "message"), WRONG, ids=[message[:30] for *_, message in WRONG])
def test_what_is_wrong_is_said_in_the_users_words(factory, change, message):
    with pytest.raises(ValueError, match=message):
        make_custom(factory, **{"num_envs": 2, "seed": 0, **change})


def test_a_module_that_fails_to_import_another_one_says_so(tmp_path, monkeypatch):
    (tmp_path / "broken_games.py").write_text("import no_such_thing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
        make_custom("broken_games:make", num_envs=1)


def test_check_env_names_the_entries_that_an_environment_lacks():
    env = OneOfTorchRL("observation")
    with pytest.raises(ValueError, match=r"\('agents', 'observation'\) must be .*agents', 'vision'"):
        check_env(env)


def test_a_recipe_finds_the_factory_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "found_here.py").write_text("from tests.envs.wrappers.test_custom import Named\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = ["env=custom", "env.factory=found_here:Named", "env.factory_kwargs.prize=2.0", "total_frames=80"]
    run_recipe(monkeypatch, tmp_path, *own, "evaluation.video=true")
    (folder,) = run_folders(tmp_path)
    assert folder.parents[1].name == "found_here.Named"
    assert (folder / "episode.gif").exists()
    trusted = ["--factory", "found_here:Named"]
    for arguments in (["evaluate", str(folder), "--episodes", "2", *trusted], ["check", "found_here:Named"]):
        monkeypatch.setattr(sys, "argv", ["torchrl_marl", *arguments])
        main()
    printed = capsys.readouterr().out
    assert re.search(r"mars on found_here:Named after 80 frames: mean return", printed)
    assert 'group "agents", 3 agents: red, blue, green' in printed
