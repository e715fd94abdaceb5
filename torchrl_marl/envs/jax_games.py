"""Environments of Jumanji and JaxMARL: batches that JAX steps at once, with tensors that share JAX's memory."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchrl.data import Bounded, Categorical
from torchrl.envs import EnvBase

from torchrl_marl.envs.bridge import BridgeEnv, Layout, import_extra, with_time_limit

__all__ = ["JaxGame", "JaxGamesEnv", "make_jaxmarl", "make_jumanji"]

_WAREHOUSES = {"tiny": (1, 3), "small": (2, 3), "medium": (2, 5), "large": (3, 5), "xlarge": (4, 5)}  # rows, columns


class JaxGame(NamedTuple):
    """One environment as two pure functions of JAX arrays, neither of which begins a new episode by itself."""

    layout: Layout
    """What it reads and writes."""
    reset: Callable[[Any], tuple[Any, dict[str, Any]]]
    """From a random key to the state and what is seen: ``observation [N, O]`` and, where the layout has them,
    ``action_mask [N, A]`` and ``state [S]``."""
    step: Callable[[Any, Any], tuple[Any, dict[str, Any], Any, Any]]
    """From the state and the actions to the state, what is seen, the rewards ``[N]`` and whether it terminated."""
    own_rewards: bool
    """False if all agents get the team's reward anyway."""


class JaxGamesEnv(BridgeEnv):
    """A batch of one JAX environment: one compiled call for all copies in each step.

    Results are handed to Torch without a copy where JAX computes on ``device``, so never write into them. The reset
    key of an episode is ``jax.random.PRNGKey`` of the seed that the copy's random stream gives.

    Args:
        game: the environment.
        num_envs: number of copies.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        seed: of the random streams; ``None`` draws one from Torch's global generator.
        device: where the tensors are.

    Raises:
        ValueError: if ``num_envs`` is below 1.
    """

    def __init__(
        self, game: JaxGame, *, num_envs: int, shared_reward: bool, seed: int | None, device: torch.device | str
    ) -> None:
        shared_reward = shared_reward and game.own_rewards
        super().__init__(game.layout, num_envs=num_envs, shared_reward=shared_reward, seed=seed, device=device)
        jax = import_extra("jax", "jax")
        self._jax: ModuleType = jax
        self._jax_device = torch.device("cpu" if jax.default_backend() == "cpu" else "cuda")
        self._shown: Any = None  # the states and what is seen of all copies

        def start(seeds: Any) -> Any:
            shown = jax.vmap(lambda seed: game.reset(jax.random.PRNGKey(seed)))(seeds)
            return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), shown)  # weak types would compile the step twice

        def choose(which: Any, new: Any, old: Any) -> Any:
            pick = jax.vmap(lambda mine, one, other: jax.numpy.where(mine, one, other))
            return jax.tree.map(lambda one, other: pick(which, one, other), new, old)

        def step(state: Any, action: Any) -> Any:
            following, seen, reward, terminated = jax.vmap(game.step)(state, action)
            return jax.tree.map(lambda new, old: new.astype(old.dtype), following, state), seen, reward, terminated

        self._start, self._choose, self._advance_all = jax.jit(start), jax.jit(choose), jax.jit(step)

    def _begin(self, which: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        new = self._start(self._to_jax(seeds.int()))
        self._shown = new if self._shown is None else self._choose(self._to_jax(which), new, self._shown)
        return self._to_torch(self._shown[1])

    def _advance(self, action: Tensor) -> dict[str, Tensor]:
        action = action if action.is_floating_point() else action.int()  # JAX would copy int64
        state, seen, reward, terminated = self._advance_all(self._shown[0], self._to_jax(action))
        self._shown = state, seen
        data = self._to_torch({**seen, "reward": reward, "terminated": terminated})
        return {**data, "truncated": torch.zeros_like(data["terminated"])}

    def _to_jax(self, tensor: Tensor) -> Any:
        return self._jax.numpy.from_dlpack(tensor.to(self._jax_device).contiguous())

    def _to_torch(self, arrays: dict[str, Any]) -> dict[str, Tensor]:
        return {name: torch.from_dlpack(array).to(self.device) for name, array in arrays.items()}


def make_jumanji(
    scenario: str = "lbf-2s-8x8-2p-2f-coop",
    *,
    num_envs: int,
    max_steps: int = 100,
    shared_reward: bool = True,
    seed: int | None = None,
    device: torch.device | str = "cpu",
) -> EnvBase:
    """Build a task of Jumanji by the name that papers give it.

    ==============================================  =================================================================
    scenario                                        task
    ==============================================  =================================================================
    ``con-GxGxNa``                                  Connector: ``N`` agents join two points each, grid ``G x G``
    ``rware-SIZE-Nag[-easy|-hard]``                 RobotWarehouse, SIZE from tiny to xlarge
    ``lbf-[2s-]GxG-Np-Ff[-coop]``                   Level-Based Foraging, 2s for a sight of two cells
    ``sar-Na``                                      SearchAndRescue: ``N`` searchers, 40 targets
    ==============================================  =================================================================

    All but the last have ``("agents", "action_mask")``. Connector shows every agent five planes of the grid (own path,
    position and target, others' bodies, others' targets) and has the planes of all agents as ``"state"``. Time limits
    are truncations; a collision in RobotWarehouse is a termination.

    Args:
        scenario: the name.
        num_envs: number of environments stepped together.
        max_steps: time limit of an episode. Papers use ``G * G`` for Connector, 500, 100 and 400.
        shared_reward: whether every agent gets the sum of all agents' rewards. RobotWarehouse's is the team's anyway.
        seed: of the random streams; ``None`` draws one from Torch's global generator.
        device: where the tensors are.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        ImportError: if Jumanji is not installed.
        ValueError: if the name has none of these forms or an argument is out of its range.
    """
    import_extra("jumanji", "jax")
    forms: dict[str, Callable[[re.Match, int], JaxGame]] = {
        r"con-(\d+)x\1x(\d+)a": _connector,
        r"rware-(tiny|small|medium|large|xlarge)-(\d+)ag(-easy|-hard)?": _warehouse,
        r"lbf-(2s-)?(\d+)x\2-(\d+)p-(\d+)f(-coop)?": _foraging,
        r"sar-(\d+)a": _search,
    }
    games = [build(match, max_steps) for form, build in forms.items() if (match := re.fullmatch(form, scenario))]
    if not games:
        raise ValueError(
            "scenario must be con-GxGxNa, rware-SIZE-Nag[-easy|-hard], lbf-[2s-]GxG-Np-Ff[-coop] or sar-Na, such as "
            f"con-5x5x3a, rware-tiny-2ag, lbf-2s-8x8-2p-2f-coop or sar-2a; got {scenario!r}"
        )
    env = JaxGamesEnv(games[0], num_envs=num_envs, shared_reward=shared_reward, seed=seed, device=device)
    return with_time_limit(env, max_steps)


def make_jaxmarl(
    scenario: str = "smax-2s3z",
    *,
    num_envs: int,
    max_steps: int = 100,
    shared_reward: bool = False,
    seed: int | None = None,
    device: torch.device | str = "cpu",
) -> EnvBase:
    """Build a task of JaxMARL.

    ``smax-MAP``: StarCraft-like battles against scripted enemies (2s3z, 3s5z, smacv2_5_units, ...), with action masks
    and the world's state; the reward is the team's. JaxMARL 0.2's rules differ from those behind Mava's and MAGPO's
    tables in details. ``simple_spread_Nag``: MPE's, continuous actions in ``[0, 1]^5``.

    JaxMARL's own limits let an episode last one step longer than they say; here it lasts ``max_steps``, and the papers'
    26 steps of MPE are ``max_steps=26``.

    Args:
        scenario: the name.
        num_envs: number of environments stepped together.
        max_steps: time limit of an episode, reported as truncation. Winning and losing are terminations.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        seed: of the random streams; ``None`` draws one from Torch's global generator.
        device: where the tensors are.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        ImportError: if JaxMARL is not installed.
        ValueError: if there is no such task or an argument is out of its range.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what else could be installed
        jaxmarl = import_extra("jaxmarl", "jax")
    if match := re.fullmatch(r"simple_spread_(\d+)ag", scenario):
        number = int(match[1])
        options = {"num_agents": number, "num_landmarks": number, "action_type": "Continuous", "max_steps": max_steps}
        game = _jaxmarl_game(jaxmarl.make("MPE_simple_spread_v3", **options), own_rewards=True)
    elif scenario.startswith("smax-"):
        smax = import_extra("jaxmarl.environments.smax", "jax")
        try:
            options = {"scenario": smax.map_name_to_scenario(scenario.removeprefix("smax-")), "max_steps": max_steps}
        except KeyError:
            raise ValueError(f"SMAX has no map {scenario.removeprefix('smax-')!r}") from None
        options |= {"see_enemy_actions": True, "walls_cause_death": True, "attack_mode": "closest"}
        game = _jaxmarl_game(jaxmarl.make("HeuristicEnemySMAX", **options), own_rewards=False)
    else:
        raise ValueError(f"scenario must be smax-MAP or simple_spread_Nag, such as smax-2s3z; got {scenario!r}")
    env = JaxGamesEnv(game, num_envs=num_envs, shared_reward=shared_reward, seed=seed, device=device)
    return with_time_limit(env, max_steps)


def _connector(name: re.Match, max_steps: int) -> JaxGame:
    module, jnp = import_extra("jumanji.environments.routing.connector", "jax"), import_extra("jax.numpy", "jax")
    generator = import_extra("jumanji.environments.routing.connector.generator", "jax").RandomWalkGenerator
    size, num_agents = int(name[1]), int(name[2])
    env = module.Connector(generator=generator(grid_size=size, num_agents=num_agents), time_limit=max_steps)

    ids = jnp.arange(num_agents)[:, None, None]

    def seen(state: Any, observation: Any) -> dict[str, Any]:
        # A cell holds 0, or 1 + 3 i + (0 for path, 1 for position, 2 for target) of agent i.
        taken, owner, kind = state.grid > 0, (state.grid - 1) // 3, (state.grid - 1) % 3
        of_all = taken & (kind == jnp.arange(3)[:, None, None])
        mine, others = taken & (owner == ids), taken & (owner != ids)
        planes = [*(mine & (kind == index) for index in range(3)), others & (kind < 2), others & (kind == 2)]
        return {
            "observation": jnp.stack(planes, 1).reshape(num_agents, -1).astype(float),
            "action_mask": observation.action_mask,
            "state": of_all.reshape(-1).astype(float),
        }

    layout = Layout(_names(num_agents), 5 * size**2, _choices(num_agents, 5), state_size=3 * size**2, masked=True)
    return _jumanji_game(env, layout, seen, _without_future)


def _warehouse(name: re.Match, max_steps: int) -> JaxGame:
    module = import_extra("jumanji.environments.routing.robot_warehouse", "jax")
    generator = import_extra("jumanji.environments.routing.robot_warehouse.generator", "jax").RandomGenerator
    (rows, columns), num_agents = _WAREHOUSES[name[1]], int(name[2])
    requests = {"-easy": 2 * num_agents, None: num_agents, "-hard": num_agents // 2}[name[3]]
    floor = generator(
        shelf_rows=rows,
        shelf_columns=columns,
        column_height=8,
        num_agents=num_agents,
        sensor_range=1,
        request_queue_size=requests,
    )
    # Its own limit is reported like a collision: out of reach.
    env = module.RobotWarehouse(generator=floor, time_limit=max_steps + 1)
    layout = Layout(_names(num_agents), env.num_obs_features, _choices(num_agents, 5), masked=True)
    return _jumanji_game(env, layout, _own_views, _without_future, own_rewards=False)


def _foraging(name: re.Match, max_steps: int) -> JaxGame:
    module = import_extra("jumanji.environments.routing.lbf", "jax")
    generator = import_extra("jumanji.environments.routing.lbf.generator", "jax").RandomGenerator
    size, num_agents, num_food = int(name[2]), int(name[3]), int(name[4])
    field = generator(
        grid_size=size,
        fov=2 if name[1] else size,
        num_agents=num_agents,
        num_food=num_food,
        max_agent_level=2,
        force_coop=bool(name[5]),
    )
    env = module.LevelBasedForaging(generator=field, time_limit=max_steps)
    layout = Layout(_names(num_agents), 3 * (num_agents + num_food), _choices(num_agents, 6), masked=True)
    return _jumanji_game(env, layout, _own_views, _without_future)


def _search(name: re.Match, max_steps: int) -> JaxGame:
    module, jnp = import_extra("jumanji.environments.swarms.search_and_rescue", "jax"), import_extra("jax.numpy", "jax")
    generator = import_extra("jumanji.environments.swarms.search_and_rescue.generator", "jax").RandomGenerator
    num_agents = int(name[1])
    area = generator(num_searchers=num_agents, num_targets=40)
    env = module.SearchAndRescue(generator=area, time_limit=max_steps)

    def seen(state: Any, observation: Any) -> dict[str, Any]:
        common = jnp.stack([observation.targets_remaining, observation.step / max_steps])
        parts = [
            observation.searcher_views.reshape(num_agents, -1),
            jnp.broadcast_to(common, (num_agents, 2)),
            observation.positions,
        ]
        return {"observation": jnp.concatenate(parts, 1)}

    views = env.observation_spec.searcher_views.shape
    size = torch.Size(views[1:]).numel() + 4
    spec = Bounded(-1.0, 1.0, torch.Size([num_agents, 2]), dtype=torch.float32)
    found_all = lambda state, timestep: state.targets.found.all()  # noqa: E731
    return _jumanji_game(env, Layout(_names(num_agents), size, spec), seen, found_all)


def _jumanji_game(
    env: Any,
    layout: Layout,
    seen: Callable[[Any, Any], dict[str, Any]],
    terminated: Callable[[Any, Any], Any],
    *,
    own_rewards: bool = True,
) -> JaxGame:
    jnp = import_extra("jax.numpy", "jax")

    def reset(key: Any) -> tuple[Any, dict[str, Any]]:
        state, timestep = env.reset(key)
        return state, seen(state, timestep.observation)

    def step(state: Any, action: Any) -> tuple[Any, dict[str, Any], Any, Any]:
        state, timestep = env.step(state, action)
        reward = jnp.broadcast_to(timestep.reward, (len(layout.agents),)).astype(float)
        return state, seen(state, timestep.observation), reward, terminated(state, timestep)

    return JaxGame(layout, reset, step, own_rewards)


def _own_views(state: Any, observation: Any) -> dict[str, Any]:
    return {"observation": observation.agents_view.astype(float), "action_mask": observation.action_mask}


def _without_future(state: Any, timestep: Any) -> Any:
    """The last step, with a discount of 0 for all: at a time limit it is 1."""
    return timestep.last() & (timestep.discount == 0).all()


def _jaxmarl_game(env: Any, *, own_rewards: bool) -> JaxGame:
    """An environment of JaxMARL without its automatic reset; every step draws from a key kept beside the state."""
    jax, agents = import_extra("jax", "jax"), list(env.agents)
    jnp = jax.numpy
    space, battle = env.action_space(agents[0]), not own_rewards

    def seen(state: Any, observation: dict[str, Any]) -> dict[str, Any]:
        own = {"observation": jnp.stack([observation[agent] for agent in agents])}
        if not battle:
            return own
        legal = env.get_avail_actions(state)
        mask = jnp.stack([legal[agent] for agent in agents]).astype(bool)
        return {**own, "action_mask": mask, "state": observation["world_state"]}

    def reset(key: Any) -> tuple[Any, dict[str, Any]]:
        key, own = jax.random.split(key)
        observation, state = env.reset(own)
        return (key, state), seen(state, observation)

    def step(keyed: Any, action: Any) -> tuple[Any, dict[str, Any], Any, Any]:
        key, own = jax.random.split(keyed[0])
        observation, state, reward, done, _ = env.step_env(own, keyed[1], dict(zip(agents, action, strict=True)))
        rewards = jnp.stack([reward[agent] for agent in agents])
        return (key, state), seen(state, observation), rewards, done["__all__"]

    size = env.observation_space(agents[0]).shape[0]
    if battle:
        layout = Layout(agents, size, _choices(len(agents), space.n), state_size=env.state_size, masked=True)
    else:
        spec = Bounded(0.0, 1.0, torch.Size([len(agents), space.shape[0]]), dtype=torch.float32)
        layout = Layout(agents, size, spec)
    return JaxGame(layout, reset, step, own_rewards)


def _names(num_agents: int) -> list[str]:
    return [f"agent_{index}" for index in range(num_agents)]


def _choices(num_agents: int, num_actions: int) -> Categorical:
    return Categorical(num_actions, shape=torch.Size([num_agents]))
