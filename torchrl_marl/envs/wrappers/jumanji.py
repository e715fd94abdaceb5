"""Environments of Jumanji: Connector, RobotWarehouse, Level-Based Foraging, SearchAndRescue."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torchrl.data import Bounded, Categorical
from torchrl.envs import EnvBase
from typing_extensions import Unpack

from torchrl_marl.envs.base import BatchOptions
from torchrl_marl.envs.wrappers.base import WrapperEnv
from torchrl_marl.envs.wrappers.jax import FIGURE_INCHES, JaxEnv, JaxGame, JaxTask, game_by_name
from torchrl_marl.extras import import_extra
from torchrl_marl.signatures import hands_on_to

__all__ = ["make_jumanji"]

_FIGURE = "torchrl_marl"  # name of the Matplotlib figure
_WAREHOUSES = {"tiny": (1, 3), "small": (2, 3), "medium": (2, 5), "large": (3, 5), "xlarge": (4, 5)}  # rows, columns
_SIZES = "|".join(_WAREHOUSES)


@hands_on_to(WrapperEnv.__init__)
def make_jumanji(
    scenario: str = "lbf-2s-8x8-2p-2f-coop",
    *,
    max_steps: int = 100,
    shared_reward: bool = True,
    **batch: Unpack[BatchOptions],
) -> EnvBase:
    """Build a task of Jumanji by its name in papers.

    ==============================================  =================================================================
    scenario                                        task
    ==============================================  =================================================================
    ``con-GxGxNa``                                  Connector: ``N`` agents join two points each, grid ``G x G``
    ``rware-SIZE-Nag[-easy|-hard]``                 RobotWarehouse, SIZE from tiny to xlarge
    ``lbf-[2s-]GxG-Np-Ff[-coop]``                   Level-Based Foraging, 2s for a sight of two cells
    ``sar-Na``                                      SearchAndRescue: ``N`` searchers, 40 targets
    ==============================================  =================================================================

    All but the last have ``("agents", "action_mask")``. In Connector, every agent observes five planes of the grid (own
    path, position and target, other agents' bodies and targets); ``"state"`` holds the planes of all agents. The share
    of connected agents is ``("info", "connected")``, the share of eaten food ``("info", "food")``. Time limits are
    truncations; a collision in RobotWarehouse is a termination.

    Args:
        scenario: the name.
        max_steps: time limit of an episode. Papers use ``G * G`` for Connector, then 500, 100 and 400.
        shared_reward: whether every agent gets the sum of all agents' rewards. RobotWarehouse always has a team reward.
        batch: see :class:`~torchrl_marl.envs.base.BatchOptions`.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        ImportError: if Jumanji is not installed.
        ValueError: if the name has none of these forms or an argument is out of its range.
    """
    import_extra("jumanji", "jax")
    game = game_by_name(_TASKS, scenario, max_steps)
    return JaxEnv(game, max_steps=max_steps, shared_reward=shared_reward, **batch)


def _connector(name: re.Match, max_steps: int) -> JaxGame:
    (module, generators, viewers), jnp = _parts("routing.connector"), import_extra("jax.numpy", "jax")
    size, num_agents = int(name[1]), int(name[2])
    grid = generators.RandomWalkGenerator(grid_size=size, num_agents=num_agents)
    env = module.Connector(generator=grid, time_limit=max_steps)
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
            "connected": state.agents.connected.mean(keepdims=True),
        }

    viewer = partial(viewers.ConnectorViewer, _FIGURE, num_agents, "rgb_array")
    return _jumanji_game(env, viewer, seen=seen, scene=lambda state: state.grid)


def _warehouse(name: re.Match, max_steps: int) -> JaxGame:
    module, generators, viewers = _parts("routing.robot_warehouse")
    (rows, columns), num_agents = _WAREHOUSES[name[1]], int(name[2])
    requests = {"-easy": 2 * num_agents, None: num_agents, "-hard": num_agents // 2}[name[3]]
    size = {"shelf_rows": rows, "shelf_columns": columns, "column_height": 8}
    floor = generators.RandomGenerator(**size, num_agents=num_agents, sensor_range=1, request_queue_size=requests)
    # RobotWarehouse reports its own limit like a collision, so the limit is set out of reach.
    env = module.RobotWarehouse(generator=floor, time_limit=max_steps + 1)
    viewer = partial(viewers.RobotWarehouseViewer, env.grid_size, env.goals, _FIGURE, "rgb_array")
    return _jumanji_game(env, viewer, own_rewards=False)


def _foraging(name: re.Match, max_steps: int) -> JaxGame:
    module, generators, viewers = _parts("routing.lbf")
    size, counts = int(name[2]), {"num_agents": int(name[3]), "num_food": int(name[4])}
    sight = 2 if name[1] else size
    field = generators.RandomGenerator(size, **counts, fov=sight, max_agent_level=2, force_coop=bool(name[5]))
    env = module.LevelBasedForaging(generator=field, time_limit=max_steps)
    viewer = partial(viewers.LevelBasedForagingViewer, size, _FIGURE, "rgb_array")

    def seen(state: Any, observation: Any) -> dict[str, Any]:
        return {**_own_views(state, observation), "food": state.food_items.eaten.mean(keepdims=True)}

    return _jumanji_game(env, viewer, seen=seen)


def _search(name: re.Match, max_steps: int) -> JaxGame:
    (module, generators, viewers), jnp = _parts("swarms.search_and_rescue"), import_extra("jax.numpy", "jax")
    num_agents = int(name[1])
    area = generators.RandomGenerator(num_searchers=num_agents, num_targets=40)
    env = module.SearchAndRescue(generator=area, time_limit=max_steps)

    def seen(state: Any, observation: Any) -> dict[str, Any]:
        common = jnp.stack([observation.targets_remaining, observation.step / max_steps])
        parts = observation.searcher_views.reshape(num_agents, -1), jnp.broadcast_to(common, (num_agents, 2))
        return {"observation": jnp.concatenate([*parts, observation.positions], 1)}

    def found_all(state: Any, timestep: Any) -> Any:
        return state.targets.found.all()

    viewer = partial(viewers.SearchAndRescueViewer, _FIGURE, render_mode="rgb_array")
    return _jumanji_game(env, viewer, seen=seen, terminated=found_all)


_TASKS = (
    JaxTask("con-GxGxNa", r"con-(\d+)x\1x(\d+)a", "con-5x5x3a", _connector),
    JaxTask("rware-SIZE-Nag[-easy|-hard]", rf"rware-({_SIZES})-(\d+)ag(-easy|-hard)?", "rware-tiny-2ag", _warehouse),
    JaxTask(
        "lbf-[2s-]GxG-Np-Ff[-coop]", r"lbf-(2s-)?(\d+)x\2-(\d+)p-(\d+)f(-coop)?", "lbf-2s-8x8-2p-2f-coop", _foraging
    ),
    JaxTask("sar-Na", r"sar-(\d+)a", "sar-2a", _search),
)


def _parts(name: str) -> list[ModuleType]:
    """Import the modules of an environment, its generators and its viewer."""
    return [import_extra(f"jumanji.environments.{name}{part}", "jax") for part in ("", ".generator", ".viewer")]


def _own_views(state: Any, observation: Any) -> dict[str, Any]:
    return {"observation": observation.agents_view.astype(float), "action_mask": observation.action_mask}


def _without_future(state: Any, timestep: Any) -> Any:
    """Whether the last step has a discount of 0 for all agents; at a time limit the discount is 1."""
    return timestep.last() & (timestep.discount == 0).all()


def _jumanji_game(
    env: Any,
    viewer: Callable[[], Any],
    *,
    seen: Callable[[Any, Any], dict[str, Any]] = _own_views,
    terminated: Callable[[Any, Any], Any] = _without_future,
    own_rewards: bool = True,
    scene: Callable[[Any], Any] = lambda state: state,
) -> JaxGame:
    """Build a game from a Jumanji environment.

    Args:
        env: the environment.
        viewer: function that builds the viewer.
        seen: function of state and observation that returns the entries of ``JaxGame.reset``.
        terminated: function of state and time step that returns whether the episode has terminated.
        own_rewards: False if all agents get the team's reward.
        scene: function of the state that returns the input of the viewer.
    """
    jnp, played = import_extra("jax.numpy", "jax"), env.action_spec
    shape, num_agents = torch.Size(played.shape), played.shape[0]
    if hasattr(played, "num_values"):
        spec = Categorical(int(played.num_values[0]), shape=shape)
    else:
        spec = Bounded(float(played.minimum), float(played.maximum), shape, dtype=torch.float32)

    def reset(key: Any) -> tuple[Any, dict[str, Any]]:
        state, timestep = env.reset(key)
        return state, seen(state, timestep.observation)

    def step(state: Any, action: Any) -> tuple[Any, dict[str, Any], Any, Any]:
        state, timestep = env.step(state, action)
        reward = jnp.broadcast_to(timestep.reward, (num_agents,)).astype(float)
        return state, seen(state, timestep.observation), reward, terminated(state, timestep)

    agents = [f"agent_{index}" for index in range(num_agents)]
    return JaxGame(agents, spec, reset, step, own_rewards, lambda state: _photograph(viewer(), scene(state)))


def _photograph(viewer: Any, state: Any) -> np.ndarray:
    """Return the image of a viewer, which would open a window if the figure did not exist."""
    pyplot = import_extra("matplotlib.pyplot", "jax")
    figure = pyplot.figure(_FIGURE, figsize=FIGURE_INCHES)
    figure.add_axes((0, 0, 1, 1))
    picture = np.array(viewer.render(state))[..., :3]
    pyplot.close(figure)
    return picture
