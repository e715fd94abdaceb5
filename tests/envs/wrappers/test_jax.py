import contextlib
import functools
import importlib.util
import io
import sys
import warnings

import numpy as np
import pytest
import torch
from torchrl.envs import EnvBase
from torchrl.envs.utils import check_env_specs

from tests.recipes.runs import run_folders, run_recipe
from torchrl_marl.envs import RandomState, make_jaxmarl, make_jumanji, render_episode
from torchrl_marl.envs.games.streams import random_streams
from torchrl_marl.modules import make_actor, make_critic
from torchrl_marl.objectives import MAPPOLoss

LIMIT = 12
BATTLE = 40  # steps, of which random ones survive fewer
JUMANJI = ["con-5x5x3a", "lbf-8x8-2p-2f", "rware-tiny-2ag", "sar-2a"]
JAXMARL = ["smax-3m", "simple_spread_3ag", "jaxnav-9x9x2a", "overcooked-cramped_room"]


@functools.cache  # compiling takes seconds
def game(scenario):
    package, make = ("jaxmarl", make_jaxmarl) if scenario in JAXMARL else ("jumanji", make_jumanji)
    needs(package)
    return make(scenario, num_envs=3, max_steps=limit(scenario), seed=0, shared_reward=False)


def needs(package):
    if importlib.util.find_spec(package) is None:  # to import JaxMARL is the library's task: it changes sys.stderr
        pytest.skip(f"needs {package}")


def limit(scenario):
    return BATTLE if scenario == "smax-3m" else LIMIT


def rollout(env, num_steps):
    torch.manual_seed(0)  # of the random actions
    return env.rollout(num_steps, break_when_any_done=False)


each_scenario = pytest.mark.parametrize("scenario", JUMANJI + JAXMARL)


class RawJumanji:
    """Jumanji's own environment, unbatched; the end of an episode told apart by the state."""

    def __init__(self, scenario):
        import jax
        from jumanji.environments import Connector, LevelBasedForaging, RobotWarehouse, SearchAndRescue
        from jumanji.environments.routing.connector.generator import RandomWalkGenerator
        from jumanji.environments.routing.lbf.generator import RandomGenerator as Field
        from jumanji.environments.routing.robot_warehouse.generator import RandomGenerator as Floor
        from jumanji.environments.swarms.search_and_rescue.generator import RandomGenerator as Area

        build = {
            "con-5x5x3a": lambda: Connector(RandomWalkGenerator(grid_size=5, num_agents=3), time_limit=10**6),
            "lbf-8x8-2p-2f": lambda: LevelBasedForaging(Field(8, 2, 2, fov=8), time_limit=10**6),
            "rware-tiny-2ag": lambda: RobotWarehouse(Floor(1, 3, 8, 2, 1, 2), time_limit=10**6),
            "sar-2a": lambda: SearchAndRescue(generator=Area(2, 40), time_limit=LIMIT),
        }
        self.name, self.env = scenario, build[scenario]()
        self.start, self.go = jax.jit(self.env.reset), jax.jit(self.env.step)

    def reset(self, key):
        self.state, timestep = self.start(key)
        return self.observed(timestep.observation)

    def step(self, action):
        self.state, timestep = self.go(self.state, action)
        ended = bool(self.state.targets.found.all()) if self.name == "sar-2a" else bool(timestep.last())
        return self.observed(timestep.observation), np.asarray(timestep.reward), ended

    def observed(self, observation):
        if self.name == "con-5x5x3a":
            grid = np.asarray(observation.grid)
            views = []
            for index in range(3):
                path, position, target = (grid == 3 * index + 1, grid == 3 * index + 2, grid == 3 * index + 3)
                foreign = (grid > 0) & ~(path | position | target)
                views.append(np.stack([path, position, target, foreign & (grid % 3 != 0), foreign & (grid % 3 == 0)]))
            planes = np.stack([(grid % 3 == rest) & (grid > 0) for rest in (1, 2, 0)])
            seen = {"observation": np.stack(views).reshape(3, -1), "state": planes.ravel()}
        elif self.name == "sar-2a":
            left, step = float(observation.targets_remaining), int(observation.step) / LIMIT
            own = zip(np.asarray(observation.searcher_views), np.asarray(observation.positions), strict=True)
            return {"observation": np.stack([[*view.ravel(), left, step, *position] for view, position in own])}
        else:
            seen = {"observation": np.asarray(observation.agents_view)}
        return {**seen, "action_mask": np.asarray(observation.action_mask)}


class RawJaxMarl:
    """JaxMARL's own environment, unbatched and without its automatic reset."""

    def __init__(self, scenario):
        import jax

        with contextlib.redirect_stdout(io.StringIO()):
            import jaxmarl
            from jaxmarl.environments.smax import map_name_to_scenario

        self.name = scenario
        battle = {"see_enemy_actions": True, "walls_cause_death": True, "attack_mode": "closest"}
        build = {
            "smax-3m": lambda: jaxmarl.make("HeuristicEnemySMAX", scenario=map_name_to_scenario("3m"), **battle),
            "simple_spread_3ag": lambda: jaxmarl.make("MPE_simple_spread_v3", action_type="Continuous"),
            "jaxnav-9x9x2a": lambda: jaxmarl.make(
                "jaxnav", num_agents=2, map_params={"map_size": (9, 9), "fill": 0.3}, goal_radius=0.3
            ),
            "overcooked-cramped_room": lambda: jaxmarl.make("overcooked", max_steps=LIMIT),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JaxNav clips its own defaults, Overcooked recommends its successor
            self.env = build[scenario]()
        self.split = jax.random.split
        self.start, self.go = jax.jit(self.env.reset), jax.jit(self.env.step_env)

    def reset(self, key):
        self.key, own = self.split(key)
        observation, self.state = self.start(own)
        return self.observed(observation)

    def step(self, action):
        self.key, own = self.split(self.key)
        actions = dict(zip(self.env.agents, action, strict=True))
        observation, self.state, reward, done, _ = self.go(own, self.state, actions)
        rewards = [float(reward[agent]) for agent in self.env.agents]
        ended = self.name != "overcooked-cramped_room" and bool(done["__all__"])  # there is only its limit
        return self.observed(observation), np.array(rewards), ended

    def observed(self, observation):
        seen = {"observation": np.stack([observation[agent].ravel() for agent in self.env.agents])}
        if self.name == "smax-3m":
            legal = self.env.get_avail_actions(self.state)
            seen["action_mask"] = np.stack([legal[agent] for agent in self.env.agents])
            seen["state"] = np.asarray(observation["world_state"])
            seen["mask"] = np.asarray(self.state.state.unit_alive[:3])
        return seen


def assert_seen(data, seen):
    for key, value in seen.items():
        ours = data["state"] if key == "state" else data["agents", key]
        np.testing.assert_allclose(ours.float(), value.astype(np.float32), rtol=1e-4, atol=1e-5, err_msg=key)


@each_scenario
def test_every_step_equals_the_raw_package_resets_included(scenario):
    env = game(scenario)
    env.set_seed(7)
    data = rollout(env, 2 * limit(scenario) + 2)
    import jax

    raw = RawJaxMarl(scenario) if scenario in JAXMARL else RawJumanji(scenario)
    streams = random_streams(7, 3)
    for index in range(2):
        key, step, ends = streams[index : index + 1].view(torch.int32).numpy().view(np.uint32), 0, 0
        for turn in data[index].unbind(0):
            if step == 0:
                key, own = jax.random.split(key)
                assert_seen(turn, raw.reset(own))
            action = turn["agents", "action"].numpy()
            seen, reward, ended = raw.step(action if action.dtype == np.float32 else action.astype(np.int32))
            step, following = step + 1, turn["next"]
            assert_seen(following, seen)
            np.testing.assert_allclose(
                following["agents", "reward"].squeeze(-1),
                np.broadcast_to(reward, following["agents", "reward"].squeeze(-1).shape),
                rtol=1e-4,
                atol=1e-5,
            )
            assert following["terminated"].item() == ended
            assert following["truncated"].item() == (step == limit(scenario) and not ended)
            assert turn["step_count"].item() == step - 1
            step, ends = (0, ends + 1) if following["done"] else (step, ends)
        assert ends >= 2


@each_scenario
def test_data_match_the_specs_and_nothing_compiles_twice(scenario):
    check_env_specs(game(scenario))
    rollout(game(scenario), LIMIT + 2)  # with resets
    assert game(scenario)._play._cache_size() == game(scenario)._restart._cache_size() == 1


@each_scenario
def test_only_the_environments_asked_are_reset(scenario):
    env = game(scenario)
    data = env.rollout(2)[:, -1]["next"]
    data["_reset"] = torch.tensor([[False], [True], [False]])
    before = data["agents", "observation"].clone()
    after = env.reset(data)["agents", "observation"]
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])


@each_scenario
def test_a_restored_environment_begins_the_same_episodes(scenario):
    env = game(scenario)
    env.set_seed(0)
    rollout(env, LIMIT + 1)
    saved = RandomState(env).state_dict()
    expected = rollout(env, LIMIT + 1)
    env.set_seed(1)
    RandomState(env).load_state_dict(saved)
    assert (rollout(env, LIMIT + 1) == expected).all()


@pytest.mark.parametrize("scenario", ["lbf-8x8-2p-2f", "smax-3m"])
def test_tensors_share_the_memory_of_jax(scenario):
    env = game(scenario)
    seen = env.reset()["agents", "observation"]
    assert seen.data_ptr() == env._shown[1]["observation"].unsafe_buffer_pointer()


@pytest.mark.parametrize("scenario", ["lbf-8x8-2p-2f", "smax-3m"])
def test_the_quick_way_through_a_step_equals_torchrls_own(scenario):
    env = game(scenario)
    courses = []
    for step in (env.step_and_maybe_reset, functools.partial(EnvBase.step_and_maybe_reset, env)):
        env.set_seed(3)
        torch.manual_seed(0)
        following, course = env.reset(), []
        for _ in range(limit(scenario) + 2):
            data, following = step(env.rand_action(following))
            course.append((data.clone(), following.exclude("_reset", ("agents", "action")).clone()))
        courses.append(course)
    for ours, torchrls in zip(*courses, strict=True):
        for one, other in zip(ours, torchrls, strict=True):
            assert (one == other).all()


def test_the_fallen_are_left_out_of_the_loss():
    env = game("smax-3m")
    env.set_seed(0)
    torch.manual_seed(0)
    batch = env.rollout(BATTLE, break_when_any_done=False)
    mask, legal = batch["agents", "mask"], batch["agents", "action_mask"]
    assert mask[:, 0].all()
    assert not mask.all()
    stop = torch.arange(legal.shape[-1]) == 4
    assert torch.equal(legal[~mask], stop.expand_as(legal[~mask]))
    loss = MAPPOLoss(make_actor(env), make_critic(env), normalize_advantage=False)
    batch["agents", "action_log_prob"] = torch.zeros(mask.shape)
    batch["advantage"] = batch["value_target"] = torch.zeros(*mask.shape, 1)
    expected = loss(batch)["loss_objective"]
    batch["advantage"] = 1e3 * ~mask.unsqueeze(-1)
    assert loss(batch)["loss_objective"] == expected


def test_a_battle_is_won_once_all_enemies_and_not_all_allies_have_fallen():
    env = game("smax-3m")
    env.reset()
    import jax

    key, battle = jax.tree.map(lambda leaf: leaf[0], env._shown[0])
    for health, won in (([45, 45, 45, 0, 0, 0], 1), ([0, 0, 45, 0, 0, 0], 1), ([0] * 6, 0), ([0, 0, 0, 45, 0, 0], 0)):
        units = battle.state.replace(unit_health=jax.numpy.array(health, float))
        _, seen, reward, _ = env.game.step((key, battle.replace(state=units)), jax.numpy.full(3, 4))
        assert seen["won"].tolist() == [won]
        assert won == (reward.max() >= 1)  # as JaxMARL's own log has it


def test_the_share_of_agents_that_are_connected_is_told():
    data = rollout(game("con-5x5x3a"), 3 * LIMIT)["next"]
    targets = data["agents", "observation"].unflatten(-1, (5, 25))[..., 2, :]  # reached, a target is a position
    share = 1 - targets.sum(-1).mean(-1, keepdim=True)
    assert share.unique().numel() > 2
    torch.testing.assert_close(data["info", "connected"], share)


def test_the_share_of_food_eaten_is_told():
    env = game("lbf-8x8-2p-2f")
    assert not env.reset()["info", "food"].any()
    import jax

    field = jax.tree.map(lambda leaf: leaf[0], env._shown[0])
    for eaten in ([False, True], [True, True]):
        items = field.food_items.replace(eaten=jax.numpy.array(eaten))
        _, seen, *_ = env.game.step(field.replace(food_items=items), jax.numpy.zeros(2, int))
        assert seen["food"].tolist() == [sum(eaten) / 2]


def test_random_actions_are_legal():
    env = game("smax-3m")
    data = rollout(env, LIMIT)
    legal = data["agents", "action_mask"].gather(-1, data["agents", "action"].unsqueeze(-1))
    assert legal.all()
    assert not data["agents", "action_mask"].all()


def test_shared_reward_is_the_sum_over_agents_unless_it_is_the_teams():
    pytest.importorskip("jumanji")
    reward = rollout(game("con-5x5x3a"), LIMIT)["next", "agents", "reward"]
    assert not torch.equal(reward[..., :1, :].expand_as(reward), reward)
    env = make_jumanji("con-5x5x3a", num_envs=3, max_steps=LIMIT, seed=0)
    reward = rollout(env, LIMIT)["next", "agents", "reward"]
    assert torch.equal(reward[..., :1, :].expand_as(reward), reward)
    assert not make_jumanji("rware-tiny-2ag", num_envs=1).shared_reward  # Jumanji has it for the team


@each_scenario
def test_the_package_draws_the_film(scenario, tmp_path):
    image = pytest.importorskip("PIL.Image")
    env = game(scenario)
    env.set_seed(0)
    path = render_episode(env, env.rand_action, tmp_path / "film.gif", max_steps=2)
    with image.open(path) as film:
        assert film.n_frames == 3
        assert len(np.unique(np.asarray(film.convert("RGB")).reshape(-1, 3), axis=0)) > 3


@pytest.mark.parametrize(("make", "module"), [(make_jumanji, "jumanji"), (make_jaxmarl, "jaxmarl")])
def test_missing_package_names_the_command_that_installs_it(monkeypatch, make, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "torchrl_marl\[jax\]"'):
        make(num_envs=1)


def test_importing_jaxmarl_leaves_the_streams_as_they_are(monkeypatch):
    def imported(*_):  # JaxMARL does so when Brax is missing
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        raise ImportError

    monkeypatch.setattr("torchrl_marl.extras.importlib.import_module", imported)
    before = sys.stdout, sys.stderr
    with pytest.raises(ImportError):
        make_jaxmarl(num_envs=1)
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(
    ("make", "scenario", "message"),
    [
        (make_jumanji, "con-5x6x3a", "scenario must be con-GxGxNa, .*; got 'con-5x6x3a'"),
        (make_jaxmarl, "smax-9m", "SMAX has no map '9m'"),
        (make_jaxmarl, "smax-3s_vs_0z", "SMAX has no map '3s_vs_0z'; own units are written UNITS_vs_UNITS of mMszgh"),
        (make_jaxmarl, "overcooked-hall", "Overcooked has no layout 'hall'; it has cramped_room"),
        (make_jaxmarl, "hanabi", "scenario must be smax-MAP, simple_spread_Nag, jaxnav-GxGxNa or overcooked-LAYOUT"),
    ],
)
def test_unknown_scenarios_are_named(make, scenario, message):
    needs("jumanji" if make is make_jumanji else "jaxmarl")
    with pytest.raises(ValueError, match=message):
        make(scenario, num_envs=1)


def test_a_battle_has_the_units_that_its_name_counts():
    needs("jaxmarl")
    env = make_jaxmarl("smax-1s2h_vs_3z1g", num_envs=1, seed=0)
    env.reset()
    units = env._shown[0][1].state
    assert units.unit_types.tolist() == [[2, 5, 5, 3, 3, 3, 4]]
    assert units.unit_health.tolist() == [[160, 80, 80, 150, 150, 150, 35]]  # JaxMARL's, of the types in this order
    assert env.group_map == {"agents": ["ally_0", "ally_1", "ally_2"]}
    own, map_ = (make_jaxmarl(f"smax-{name}", num_envs=1, seed=0).reset() for name in ("2m3m_vs_6m", "5m_vs_6m"))
    assert (own == map_).all()


def test_options_reach_the_environment_and_wrong_ones_are_named(monkeypatch):
    needs("jaxmarl")
    from jaxmarl.environments import smax

    built, options = smax.HeuristicEnemySMAX, []
    monkeypatch.setattr(smax, "HeuristicEnemySMAX", lambda **given: options.append(given) or built(**given))
    monkeypatch.setattr("torchrl_marl.envs.wrappers.jaxmarl.check_options", lambda *_: None)
    make_jaxmarl("smax-3m", num_envs=1, scenario_kwargs={"attack_mode": "random", "won_battle_bonus": 2.0})
    assert options[0].items() >= {"attack_mode": "random", "won_battle_bonus": 2.0, "see_enemy_actions": True}.items()
    monkeypatch.undo()
    env = make_jaxmarl("simple_spread_3ag", num_envs=1, scenario_kwargs={"action_type": "Discrete"})
    assert env.full_action_spec["agents", "action"].space.n == 5
    for given, message in (
        ({"attack_mode": "weakest"}, "scenario_kwargs.attack_mode must be closest or random, got 'weakest'"),
        ({"bonus": 1}, "'smax-3m' has no option bonus; it has enemy_shoots, attack_mode, num_allies"),
    ):
        with pytest.raises(ValueError, match=message):
            make_jaxmarl("smax-3m", num_envs=1, scenario_kwargs=given)


@each_scenario
def test_mars_trains_for_an_iteration(monkeypatch, tmp_path, scenario):
    package = "jaxmarl" if scenario in JAXMARL else "jumanji"
    needs(package)
    overrides = [f"env={package}", f"env.scenario={scenario}", "total_frames=80", "evaluation.interval=80"]
    run_recipe(monkeypatch, tmp_path, *overrides)
    assert (run_folders(tmp_path)[0] / "learning_curve.png").exists()
