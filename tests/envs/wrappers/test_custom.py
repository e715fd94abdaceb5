import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, TransformedEnv, VecNormV2
from torchrl.envs.utils import check_env_specs

from tests.recipes.runs import run_folders, run_recipe
from torchrl_marl.__main__ import main
from torchrl_marl.envs import check_env, make_custom, make_env, render_episode
from torchrl_marl.envs.games.streams import draw_below, random_streams
from torchrl_marl.modules import GroupSpec


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


class Arena(Parallel):
    """PettingZoo's parallel API: two reds and a blue that differ in their spaces; a red falls in step 2, one in step 4.

    The blue one goes on until step 6, where the limit of the game is, or falls there too.
    """

    possible_agents = ("red_0", "red_1", "blue_0")
    sizes = {"red_0": 3, "red_1": 3, "blue_0": 2}  # noqa: RUF012

    def __init__(self, blue_falls=False):
        self.blue_falls, self.moves = blue_falls, []

    def observation_space(self, agent):
        return Box(-1, 1, (self.sizes[agent],))

    def action_space(self, agent):
        return Discrete(self.sizes[agent])

    def reset(self, seed=None, options=None):
        self.steps, self.agents = 0, list(self.possible_agents)
        return self.seen(), {}

    def step(self, action):
        assert list(action) == self.agents, "only agents that are there may act"
        self.moves.append(action)
        self.steps += 1
        falls = {"red_0": 2, "red_1": 4, "blue_0": 6 if self.blue_falls else 99}
        down = {agent: self.steps >= falls[agent] for agent in self.agents}
        cut = {agent: self.steps == 6 and not down[agent] for agent in self.agents}
        seen, reward = self.seen(), dict.fromkeys(self.agents, 1.0)
        self.agents = [agent for agent in self.agents if not (down[agent] or cut[agent])]
        return seen, reward, down, cut, {}

    def seen(self):
        return {agent: np.full(self.sizes[agent], 1.0 + self.steps) for agent in self.agents}

    def state(self):
        if not self.agents:
            raise AttributeError("there is nobody whose state this were")
        return np.full(5, float(self.steps))


class Boxes(Listed):
    """Continuous actions of unequal number and bounds."""

    action_space = Tuple(Box(-1, 3, (2,)), Box(0, 8, (1,)))

    def step(self, action):
        assert isinstance(action, tuple)  # as highway-env insists
        self.taken = action
        return super().step([np.concatenate(action)])


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


def test_options_of_a_vmas_scenario_class_reach_its_world():
    from vmas.scenarios.dispersion import Scenario

    for num_agents in (2, 3):
        env = make_custom(Scenario, num_envs=2, max_steps=5, seed=0, factory_kwargs={"n_agents": num_agents})
        assert len(env.group_map["agents"]) == num_agents

    class Mine(Scenario):
        def make_world(self, batch_dim, device, **kwargs):
            return super().make_world(batch_dim, device, **kwargs)

    make_custom(Mine, num_envs=2, max_steps=5, seed=0, factory_kwargs={"n_agents": 2})
    with pytest.raises(ValueError, match=r"^Mine takes no n_agnts in make_world; it names n_agents"):
        make_custom(Mine, num_envs=2, max_steps=5, seed=0, factory_kwargs={"n_agnts": 2})


def test_a_game_whose_render_is_abstract_says_so(tmp_path):
    class Unseen(Parallel):
        def render(self):
            raise NotImplementedError  # as PettingZoo's ParallelEnv does

    env = make_custom(Unseen, num_envs=1, max_steps=3, seed=0)
    with pytest.raises(ValueError, match=r"^the environment cannot be drawn here: it does not implement render\(\)$"):
        render_episode(env, env.rand_action, tmp_path / "game.gif", max_steps=3)


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


def play(env, num_steps):
    """Steps of a single copy, whose agents always take their first action."""
    data, steps = env.reset(), []
    for _ in range(num_steps):
        for group in env.group_map:
            data[group, "action"] = env.full_action_spec[group, "action"].zero()
        step, data = env.step_and_maybe_reset(data)
        steps.append(step)
    return torch.stack(steps, 1)[0]


def test_agents_that_fall_stay_as_masked_rows_which_see_and_earn_nothing():
    env = make_custom(Arena, num_envs=1, max_steps=99, seed=0, group_by="padding")
    check_env_specs(env)
    data = play(env, 8)
    steps = torch.arange(8) % 6
    live = torch.stack([steps < 2, steps < 4, steps < 6], -1)  # before each step
    assert torch.equal(data["agents", "mask"], live)
    torch.testing.assert_close(data["next", "agents", "reward"].squeeze(-1), live.float())
    seen = data["agents", "observation"]
    torch.testing.assert_close(seen[..., 0], live * (1.0 + steps).unsqueeze(-1))
    assert data["agents", "action_mask"][~live].any(-1).all()
    ends = torch.tensor([5]), torch.tensor([0])
    assert [*map(torch.Tensor.tolist, data["next", "truncated"].nonzero(as_tuple=True))] == [*map(list, ends)]
    assert not data["next", "terminated"].any()  # the blue one goes on, beyond the limit
    torch.testing.assert_close(data["next", "agents", "observation"][5, :, 0], torch.tensor([0.0, 0.0, 7.0]))


def test_the_last_agents_fall_ends_the_episode():
    env = make_custom(Arena, num_envs=1, seed=0, group_by="padding", factory_kwargs={"blue_falls": True})
    data = play(env, 6)["next"]
    assert data["terminated"].flatten().tolist() == [False] * 5 + [True]
    assert not data["truncated"].any()


def test_a_state_is_asked_for_while_there_are_agents_and_may_be_left_out():
    made = make_custom(Arena, num_envs=1, seed=0, group_by="padding")
    assert play(made, 6)["next", "state"][:, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 5.0]
    assert "state" not in make_custom(Arena, num_envs=1, seed=0, group_by="padding", state=False).reset().keys()


def test_padding_adds_zeros_and_masks_what_an_agent_cannot_do():
    env = make_custom(Arena, num_envs=2, seed=0, group_by="padding")
    data = rollout(env, 4)
    assert data["agents", "observation"].shape == (2, 4, 3, 3)
    assert (data["agents", "observation"][..., 2, 2] == 0).all()
    assert data["agents", "action_mask"][0, 0].tolist() == [[True] * 3, [True] * 3, [True, True, False]]
    assert all(move.get("blue_0", 0) < 2 for game in env._games for move in game.env.moves)


def test_padded_continuous_actions_are_scaled_to_each_agents_bounds():
    env = make_custom(Boxes, num_envs=1, seed=0, group_by="padding")
    check_env_specs(env)
    data = env.reset()
    data["agents", "action"] = torch.tensor([[[-1.0, 0.5], [0.5, 0.7]]])
    env.step(data)
    first, second = env._games[0].env.taken
    np.testing.assert_allclose(first, [-1.0, 2.0])  # of -1..3
    np.testing.assert_allclose(second, [6.0])  # of 0..8, whose second action it does not have


GROUPINGS = [
    ("name", {"red": ["red_0", "red_1"], "blue": ["blue_0"]}),
    ("spaces", {"agents_0": ["red_0", "red_1"], "agents_1": ["blue_0"]}),
    ({"ends": ["blue_0", "red_0"], "middle": ["red_1"]}, {"ends": ["blue_0", "red_0"], "middle": ["red_1"]}),
]


@pytest.mark.parametrize(("group_by", "groups"), GROUPINGS)
def test_groups_hold_what_is_their_agents_own(group_by, groups):
    env = make_custom(Arena, num_envs=1, seed=0, group_by=group_by)
    assert env.group_map == groups
    check_env_specs(env)
    data, joint = play(env, 6), play(make_custom(Arena, num_envs=1, seed=0, group_by="padding"), 6)
    for group, agents in groups.items():
        members = [Arena.possible_agents.index(agent) for agent in agents]
        size = max(Arena.sizes[agent] for agent in agents)
        own = joint["agents", "observation"][:, members, :size]
        assert torch.equal(data[group, "observation"], own)
        assert torch.equal(data["next", group, "episode_reward"], joint["next", "agents", "episode_reward"][:, members])
        assert torch.equal(data[group, "mask"], joint["agents", "mask"][:, members])
        assert env.full_action_spec[group, "action"].space.n == size
        assert ((group, "action_mask") in data.keys(True)) == (group == "ends")  # the one that is padded


def test_each_groups_actions_reach_its_agents():
    env = make_custom(Arena, num_envs=1, seed=0, group_by={"ends": ["blue_0", "red_0"], "middle": ["red_1"]})
    data = env.reset()
    data["ends", "action"], data["middle", "action"] = torch.tensor([[1, 2]]), torch.tensor([[0]])
    env.step(data)
    assert env._games[0].env.moves == [{"red_0": 2, "red_1": 0, "blue_0": 1}]
    boxes = make_custom(Boxes, num_envs=1, seed=0, group_by="spaces")
    data = boxes.reset()
    data["agents_0", "action"], data["agents_1", "action"] = torch.tensor([[[9.0, -0.5]]]), torch.tensor([[[7.0]]])
    boxes.step(data)  # within each one's own bounds, which are its group's
    np.testing.assert_allclose(np.concatenate(boxes._games[0].env.taken), [3.0, -0.5, 7.0])


def test_other_spaces_of_gymnasium_are_flattened_and_choices_numbered():
    spaces = pytest.importorskip("gymnasium").spaces
    seen = spaces.Dict(a=spaces.Discrete(3), b=spaces.Box(-1, 1, (2,)))
    plain = {"a": 1, "b": np.array([0.5, -0.5])}
    game = {
        "observation_space": spaces.Tuple([seen] * 2),
        "action_space": spaces.Tuple([spaces.MultiDiscrete([2, 3])] * 2),
        "reset": lambda self, seed=None: ([plain] * 2, {}),
        "step": lambda self, action: taken.append(action) or ([plain] * 2, 1.0, False, False, {}),
    }
    taken: list = []
    env = make_custom(type("Rich", (), game), num_envs=1, seed=0)
    assert env.full_action_spec["agents", "action"].space.n == 6
    data = env.reset()
    assert data["agents", "observation"][0, 0].tolist() == [0.0, 1.0, 0.0, 0.5, -0.5]
    env.step(data.set(("agents", "action"), torch.tensor([[5, 1]])))
    assert [move.tolist() for move in taken[0]] == [[1, 2], [0, 1]]


def choosing(mask, mask_space, sizes=(2, 3)):
    """A game of one agent with several choices, and a mask for each."""
    spaces = pytest.importorskip("gymnasium").spaces
    seen = {"observation": np.zeros(1, np.float32), "action_mask": mask}
    game = {
        "observation_space": spaces.Tuple([spaces.Dict(observation=spaces.Box(-1, 1, (1,)), action_mask=mask_space)]),
        "action_space": spaces.Tuple([spaces.MultiDiscrete(sizes)]),
        "reset": lambda self, seed=None: ([seen], {}),
        "step": lambda self, action: ([seen], 1.0, False, False, {}),
    }
    return make_custom(type("Choosing", (), game), num_envs=1, seed=0)


def test_masks_of_choices_forbid_every_combination_with_an_illegal_one():
    spaces = pytest.importorskip("gymnasium").spaces
    first, second = [1, 0], [0, 1, 1]
    parts = spaces.Tuple([spaces.MultiBinary(2), spaces.MultiBinary(3)])
    apart, joined = (np.array(first), np.array(second)), np.array(first + second)
    for mask, space in ((apart, parts), (joined, spaces.MultiBinary(5))):
        data = choosing(mask, space).reset()
        assert data["agents", "action_mask"][0, 0].tolist() == [False, True, True, False, False, False]
    with pytest.raises(ValueError, match=r"must have a mask for each component, of lengths \[2, 3\]"):
        choosing(np.ones(6), spaces.MultiBinary(6)).reset()


@pytest.mark.parametrize("sizes", [(2, 2), (1, 2, 3)])
def test_a_mask_that_fits_the_combinations_as_well_as_the_components_must_be_a_tuple(sizes):
    spaces = pytest.importorskip("gymnasium").spaces
    size = sum(sizes)
    with pytest.raises(ValueError, match=r"as a tuple, as its entries would also fit all combinations"):
        choosing(np.ones(size), spaces.MultiBinary(size), sizes).reset()
    apart = spaces.Tuple([spaces.MultiBinary(size) for size in sizes])
    mask = tuple(np.ones(size) if axis else np.arange(size) < 1 for axis, size in enumerate(sizes))
    legal = choosing(mask, apart, sizes).reset()["agents", "action_mask"]
    assert legal.flatten().tolist() == [index < math.prod(sizes[1:]) for index in range(math.prod(sizes))]


def test_one_size_of_choices_is_no_ambiguity():
    spaces = pytest.importorskip("gymnasium").spaces
    legal = choosing(np.array([1, 0, 1]), spaces.MultiBinary(3), (3,)).reset()["agents", "action_mask"]
    assert legal.flatten().tolist() == [True, False, True]


class Driving:
    """Two agents that see a picture, their speed and a gear."""

    def __init__(self):
        spaces = pytest.importorskip("gymnasium").spaces
        picture = spaces.Box(0, 255, (12, 10, 3), np.uint8)
        seen = spaces.Dict(camera=picture, gear=spaces.Discrete(2), speed=spaces.Box(-1, 1, (2,)))
        self.observation_space, self.action_space = spaces.Tuple([seen] * 2), spaces.Tuple([spaces.Discrete(4)] * 2)

    def reset(self, seed=None):
        self.random = np.random.default_rng(seed)
        return self.seen(), {}

    def step(self, action):
        return self.seen(), float(sum(action)), False, False, {}

    def seen(self):
        camera = self.random.integers(0, 256, (2, 12, 10, 3), dtype="uint8")
        speed = self.random.uniform(-1, 1, (2, 2)).astype(np.float32)
        self.last = [{"camera": camera[i], "gear": i, "speed": speed[i]} for i in range(2)]
        return self.last


def test_an_image_beside_other_entries_stays_an_image_and_the_others_are_one_vector():
    env = make_custom(Driving, num_envs=1, seed=0, max_steps=3)
    check_env_specs(env)
    data = env.reset()
    seen = env._games[0].env.last
    assert data["agents", "image"].dtype == torch.uint8
    np.testing.assert_array_equal(data["agents", "image"][0], [own["camera"] for own in seen])
    vectors = [[1.0 - own["gear"], own["gear"], *own["speed"]] for own in seen]
    np.testing.assert_allclose(data["agents", "observation"][0], vectors)
    spec = GroupSpec.from_env(env)
    assert (spec.image, spec.image_key, spec.observation_size) == ((12, 10, 3), "image", 4)
    split = make_custom(Driving, num_envs=1, seed=0, group_by={"one": ["agent_0"], "two": ["agent_1"]})
    second = split.reset()["two", "image"][0, 0]
    np.testing.assert_array_equal(second, split._games[0].env.last[1]["camera"])


def test_a_step_does_not_look_for_the_image_among_the_spaces(monkeypatch):
    env = make_custom(Driving, num_envs=1, seed=0, max_steps=3)
    data = env.reset()

    def look(space):
        raise AssertionError("spaces do not change")

    monkeypatch.setattr("torchrl_marl.envs.wrappers.spaces._is_image", look)
    assert env.step(env.rand_action(data))["next", "agents", "image"].shape == (1, 2, 12, 10, 3)


def test_two_images_of_an_agent_are_refused():
    class Stereo(Driving):
        def __init__(self):
            super().__init__()
            seen = self.observation_space[0]
            both = type(seen)({**seen.spaces, "mirror": seen["camera"]})
            self.observation_space = type(self.observation_space)([both] * 2)

    with pytest.raises(ValueError, match=r"may hold one image .* beside other entries; got Dict"):
        make_custom(Stereo, num_envs=1)


def test_observations_of_64_bits_are_cast():
    class Wide(OneOfTorchRL):
        def __init__(self):
            super().__init__()
            seen = Unbounded((2, 3), dtype=torch.float64)
            self.observation_spec = Composite(agents=Composite(observation=seen, shape=(2,)))

        def _reset(self, tensordict):
            data = super()._reset(tensordict)
            data["agents", "observation"] = data["agents", "observation"].double()
            return data

    env = make_custom(Wide, num_envs=2, seed=0)
    check_env_specs(env)
    assert rollout(env, 2)["agents", "observation"].dtype == torch.float32


def test_a_factory_whose_transform_keeps_statistics_is_told_so():
    def make():
        return TransformedEnv(OneOfTorchRL(), VecNormV2(in_keys=[("agents", "observation")]))

    with pytest.warns(UserWarning, match=r"make: VecNormV2 keeps statistics .* no checkpoint has them"):
        make_custom(make, num_envs=2, seed=0)


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
    (Arena, {}, r"equal spaces, or group_by must .*env\.group_by=padding.*by themselves.*Discrete"),
    (Arena, {"group_by": "team"}, "group_by must be padding, spaces, name or a mapping .* got 'team'"),
    (Arena, {"group_by": {"a": ["red_0"]}}, "group_by must hold each of the agents red_0, red_1, blue_0 once"),
    (
        changed(Listed, action_space=Tuple(Discrete(2), Box(-1, 1, (2,)))),
        {"group_by": "padding"},
        "padded whose actions are all discrete or all continuous",
    ),
    (changed(Listed, action_space=Tuple(Discrete(2))), {}, "agents that observe .* must be those that act"),
    (changed(Listed, action_space=Tuple(*2 * [Box(-np.inf, 1, (2,))])), {}, "a bounded Box of one dimension"),
    (changed(Listed, observation_space=Tuple(*2 * [Discrete(2)])), {}, "observations must be a Box, or a Dict of obs"),
    (
        lambda: OneOfTorchRL("observation"),
        {},
        r"'observation'\) must be \[2, size\], one for each agent.*the environment has",
    ),
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


@pytest.mark.parametrize("how", ["name", "{ends: [blue_0, red_0], middle: [red_1]}"])
def test_check_groups_as_training_does(how, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torchrl-marl", "check", f"{__name__}:Arena", "--group-by", how])
    main()
    found = re.findall(r'group "(\w+)", \d agents?: (.*)', capsys.readouterr().out)
    groups = (
        {"red": "red_0, red_1", "blue": "blue_0"} if how == "name" else {"ends": "blue_0, red_0", "middle": "red_1"}
    )
    assert dict(found) == groups
    monkeypatch.setattr(sys, "argv", ["torchrl-marl", "check", f"{__name__}:Arena", "--group-by", "nam"])
    with pytest.raises(SystemExit, match=r"^torchrl_marl check: group_by must be padding, spaces, name .* got 'nam'$"):
        main()
