"""Environments of Jumanji: Connector, RobotWarehouse, Level-Based Foraging, SearchAndRescue."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torchrl.data import Bounded, Categorical
from torchrl.envs import EnvBase

from torchrl_marl.envs.wrappers.base import Layout, import_extra
from torchrl_marl.envs.wrappers.jax import FIGURE_INCHES, JaxEnv, JaxGame, game_by_name

__all__ = ["make_jumanji"]

_FIGURE = "torchrl_marl"  # its name
_WAREHOUSES = {"tiny": (1, 3), "small": (2, 3), "medium": (2, 5), "large": (3, 5), "xlarge": (4, 5)}  # rows, columns


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
    game = game_by_name(forms, scenario, max_steps)
    if game is None:
        raise ValueError(
            "scenario must be con-GxGxNa, rware-SIZE-Nag[-easy|-hard], lbf-[2s-]GxG-Np-Ff[-coop] or sar-Na, such as "
            f"con-5x5x3a, rware-tiny-2ag, lbf-2s-8x8-2p-2f-coop or sar-2a; got {scenario!r}"
        )
    return JaxEnv(game, num_envs=num_envs, max_steps=max_steps, shared_reward=shared_reward, seed=seed, device=device)


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
    viewer = import_extra("jumanji.environments.routing.connector.viewer", "jax").ConnectorViewer
    viewer = partial(viewer, _FIGURE, num_agents, "rgb_array")
    return _jumanji_game(env, layout, seen, _without_future, viewer, scene=lambda state: state.grid)


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
    viewer = import_extra("jumanji.environments.routing.robot_warehouse.viewer", "jax").RobotWarehouseViewer
    viewer = partial(viewer, env.grid_size, env.goals, _FIGURE, "rgb_array")
    return _jumanji_game(env, layout, _own_views, _without_future, viewer, own_rewards=False)


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
    viewer = import_extra("jumanji.environments.routing.lbf.viewer", "jax").LevelBasedForagingViewer
    viewer = partial(viewer, size, _FIGURE, "rgb_array")
    return _jumanji_game(env, layout, _own_views, _without_future, viewer)


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
    viewer = import_extra("jumanji.environments.swarms.search_and_rescue.viewer", "jax").SearchAndRescueViewer
    viewer = partial(viewer, _FIGURE, render_mode="rgb_array")
    return _jumanji_game(env, Layout(_names(num_agents), size, spec), seen, found_all, viewer)


def _jumanji_game(
    env: Any,
    layout: Layout,
    seen: Callable[[Any, Any], dict[str, Any]],
    terminated: Callable[[Any, Any], Any],
    viewer: Callable[[], Any],
    *,
    own_rewards: bool = True,
    scene: Callable[[Any], Any] = lambda state: state,
) -> JaxGame:
    """An environment of Jumanji.

    Args:
        env: the environment.
        layout: what it reads and writes.
        seen: from the state and the observation to the entries of ``JaxGame.reset``.
        terminated: from the state and the time step to whether the episode has ended for good.
        viewer: makes what draws it.
        own_rewards: False if all agents get the team's reward anyway.
        scene: what the viewer is shown of the state.
    """
    jnp = import_extra("jax.numpy", "jax")

    def reset(key: Any) -> tuple[Any, dict[str, Any]]:
        state, timestep = env.reset(key)
        return state, seen(state, timestep.observation)

    def step(state: Any, action: Any) -> tuple[Any, dict[str, Any], Any, Any]:
        state, timestep = env.step(state, action)
        reward = jnp.broadcast_to(timestep.reward, (len(layout.agents),)).astype(float)
        return state, seen(state, timestep.observation), reward, terminated(state, timestep)

    return JaxGame(layout, reset, step, own_rewards, lambda state: _photograph(viewer(), scene(state)))


def _own_views(state: Any, observation: Any) -> dict[str, Any]:
    return {"observation": observation.agents_view.astype(float), "action_mask": observation.action_mask}


def _without_future(state: Any, timestep: Any) -> Any:
    """The last step, with a discount of 0 for all: at a time limit it is 1."""
    return timestep.last() & (timestep.discount == 0).all()


def _photograph(viewer: Any, state: Any) -> np.ndarray:
    """The picture of a viewer of Jumanji; it would open a window for its figure, unless there is one of that name."""
    pyplot = import_extra("matplotlib.pyplot", "jax")
    figure = pyplot.figure(_FIGURE, figsize=FIGURE_INCHES)
    figure.add_axes((0, 0, 1, 1))
    picture = np.array(viewer.render(state))[..., :3]
    pyplot.close(figure)
    return picture


def _names(num_agents: int) -> list[str]:
    return [f"agent_{index}" for index in range(num_agents)]


def _choices(num_agents: int, num_actions: int) -> Categorical:
    return Categorical(num_actions, shape=torch.Size([num_agents]))
