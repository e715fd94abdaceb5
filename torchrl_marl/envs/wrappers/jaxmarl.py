"""Environments of JaxMARL: SMAX, MPE, JaxNav, Overcooked."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchrl.data import Bounded, Categorical
from torchrl.envs import EnvBase

from torchrl_marl.envs.wrappers.base import Layout, import_extra
from torchrl_marl.envs.wrappers.jax import FIGURE_INCHES, JaxEnv, JaxGame, game_by_name

__all__ = ["make_jaxmarl"]


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

    ==============================================  =================================================================
    scenario                                        task
    ==============================================  =================================================================
    ``smax-MAP``                                    SMAX, battles against scripted enemies: 2s3z, smacv2_5_units, ...
    ``simple_spread_Nag``                           MPE's, continuous actions in ``[0, 1]^5``
    ``jaxnav-GxGxNa``                               JaxNav: ``N`` robots drive to goals by lidar, maps of ``G x G`` m
    ``overcooked-LAYOUT``                           Overcooked: cramped_room, coord_ring, forced_coord, ...
    ==============================================  =================================================================

    SMAX has action masks, the world's state and ``("agents", "mask")``, who lives; its reward is the team's.
    JaxMARL 0.2's rules differ from those behind Mava's and MAGPO's tables in details. JaxNav's goals have a radius of
    0.3 m, as in the MARS paper, the rest is JaxMARL's. Overcooked's observation, ``[W, H, 26]``, is flattened; its
    reward is the team's, 20 for a soup, without the shaped reward that JaxMARL reports beside it.

    JaxMARL's own limits let an episode of SMAX or MPE last one step longer than they say; here it lasts ``max_steps``,
    and the papers' 26 steps of MPE are ``max_steps=26``.

    Args:
        scenario: the name.
        num_envs: number of environments stepped together.
        max_steps: time limit of an episode, reported as truncation. Winning and losing are terminations, and in JaxNav
            that all have arrived or crashed. JaxMARL's own are 100, 25, 500 and 400.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        seed: of the random streams; ``None`` draws one from Torch's global generator.
        device: where the tensors are.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        ImportError: if JaxMARL is not installed.
        ValueError: if there is no such task or an argument is out of its range.
    """
    # it prints what else could be installed, and leaves both streams as they were when Python started
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(sys.stderr):
        import_extra("jaxmarl", "jax")
    forms: dict[str, Callable[[re.Match, int], JaxGame]] = {
        r"smax-(\w+)": _battle,
        r"simple_spread_(\d+)ag": _spread,
        r"jaxnav-(\d+)x\1x(\d+)a": _navigation,
        r"overcooked-(\w+)": _kitchen,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JaxNav clips its own defaults, Overcooked recommends its successor
        game = game_by_name(forms, scenario, max_steps)
    if game is None:
        raise ValueError(
            "scenario must be smax-MAP, simple_spread_Nag, jaxnav-GxGxNa or overcooked-LAYOUT, such as smax-2s3z, "
            f"simple_spread_3ag, jaxnav-11x11x4a or overcooked-cramped_room; got {scenario!r}"
        )
    return JaxEnv(game, num_envs=num_envs, max_steps=max_steps, shared_reward=shared_reward, seed=seed, device=device)


def _battle(name: re.Match, max_steps: int) -> JaxGame:
    smax, jax = import_extra("jaxmarl.environments.smax", "jax"), import_extra("jax", "jax")
    try:
        units = smax.map_name_to_scenario(name[1])
    except KeyError:
        raise ValueError(f"SMAX has no map {name[1]!r}") from None
    env = smax.HeuristicEnemySMAX(
        scenario=units, max_steps=max_steps, see_enemy_actions=True, walls_cause_death=True, attack_mode="closest"
    )
    agents, jnp = env.agents, jax.numpy

    def known(state: Any, observation: dict[str, Any]) -> dict[str, Any]:
        legal = env.get_avail_actions(state)
        return {
            "action_mask": jnp.stack([legal[agent] for agent in agents]).astype(bool),
            "mask": state.state.unit_alive[: len(agents)],
            "state": observation["world_state"],
        }

    def draw(state: Any) -> np.ndarray:
        units = jax.tree.map(np.asarray, state.state)
        scene = None, units, dict.fromkeys(env.all_agents, 0)
        with jax.disable_jit():  # of which it would compile something for every unit of every picture
            return _drawn(lambda axes: env.init_render(axes, scene, 0, units.step))

    layout = _jaxmarl_layout(env)._replace(state_size=env.state_size, masked=True, mortal=True)
    return _jaxmarl_game(env, layout, known, draw, own_rewards=False)


def _spread(name: re.Match, max_steps: int) -> JaxGame:
    mpe, number = import_extra("jaxmarl.environments.mpe", "jax"), int(name[1])
    env = mpe.SimpleSpreadMPE(num_agents=number, num_landmarks=number, action_type="Continuous", max_steps=max_steps)

    def draw(state: Any) -> np.ndarray:
        visualizer = import_extra("jaxmarl.environments.mpe.mpe_visualizer", "jax").MPEVisualizer
        with contextlib.redirect_stdout(io.StringIO()):
            figure = visualizer(env, [state]).fig
        figure.canvas.draw()
        picture = np.array(figure.canvas.buffer_rgba())[..., :3]
        import_extra("matplotlib.pyplot", "jax").close(figure)
        return picture

    return _jaxmarl_game(env, _jaxmarl_layout(env), _nothing_more, draw)


def _navigation(name: re.Match, max_steps: int) -> JaxGame:
    jaxnav, size = import_extra("jaxmarl.environments.jaxnav.jaxnav_env", "jax"), int(name[1])
    env = jaxnav.JaxNav(
        num_agents=int(name[2]),
        map_params={"map_size": (size, size), "fill": 0.3},
        goal_radius=0.3,
        max_steps=max_steps + 1,  # its own limit looks like an arrival of all: out of reach
    )

    def draw(state: Any) -> np.ndarray:
        return _drawn(lambda axes: env.init_render(axes, state, lidar=False))

    return _jaxmarl_game(env, _jaxmarl_layout(env), _nothing_more, draw)


def _kitchen(name: re.Match, max_steps: int) -> JaxGame:
    overcooked = import_extra("jaxmarl.environments.overcooked", "jax")
    if name[1] not in overcooked.overcooked_layouts:
        layouts = ", ".join(overcooked.overcooked_layouts)
        raise ValueError(f"Overcooked has no layout {name[1]!r}; it has {layouts}")
    env = overcooked.Overcooked(overcooked.overcooked_layouts[name[1]], max_steps=max_steps)

    def draw(state: Any) -> np.ndarray:
        visualizer = import_extra("jaxmarl.viz.overcooked_visualizer", "jax").OvercookedVisualizer()
        visualizer.window = window = _Window()
        visualizer.render(env.agent_view_size, state, highlight=False)
        return window.picture

    return _jaxmarl_game(env, _jaxmarl_layout(env), _nothing_more, draw, own_rewards=False, ends=False)


def _nothing_more(state: Any, observation: dict[str, Any]) -> dict[str, Any]:
    return {}


def _jaxmarl_layout(env: Any) -> Layout:
    agents = list(env.agents)
    observation, action = env.observation_space(agents[0]), env.action_space(agents[0])
    size, rows = torch.Size(observation.shape).numel(), len(agents)
    if hasattr(action, "n"):
        return Layout(agents, size, Categorical(int(action.n), shape=torch.Size([rows])))
    low, high = (torch.tensor(np.broadcast_to(bound, (rows, *action.shape))) for bound in (action.low, action.high))
    return Layout(agents, size, Bounded(low, high, torch.Size([rows, *action.shape]), dtype=torch.float32))


def _jaxmarl_game(
    env: Any,
    layout: Layout,
    known: Callable[[Any, dict[str, Any]], dict[str, Any]],
    draw: Callable[[Any], np.ndarray],
    *,
    own_rewards: bool = True,
    ends: bool = True,
) -> JaxGame:
    """An environment of JaxMARL without its automatic reset; every step draws from a key kept beside the state.

    Args:
        env: the environment.
        layout: what it reads and writes.
        known: from the state and the agents' observations to what there is besides.
        draw: from the state to a picture.
        own_rewards: False if all agents get the team's reward anyway.
        ends: False if all that ends an episode is its limit.
    """
    jax, agents = import_extra("jax", "jax"), layout.agents
    jnp = jax.numpy

    def seen(state: Any, observation: dict[str, Any]) -> dict[str, Any]:
        own = jnp.stack([observation[agent].reshape(-1) for agent in agents]).astype(float)
        return {"observation": own, **known(state, observation)}

    def reset(key: Any) -> tuple[Any, dict[str, Any]]:
        key, own = jax.random.split(key)
        observation, state = env.reset(own)
        return (key, state), seen(state, observation)

    def step(keyed: Any, action: Any) -> tuple[Any, dict[str, Any], Any, Any]:
        key, own = jax.random.split(keyed[0])
        observation, state, reward, done, _ = env.step_env(own, keyed[1], dict(zip(agents, action, strict=True)))
        rewards = jnp.stack([reward[agent] for agent in agents])
        return (key, state), seen(state, observation), rewards, done["__all__"] & ends

    return JaxGame(layout, reset, step, own_rewards, lambda keyed: draw(keyed[1]))


class _Window:
    """What JaxMARL's visualiser of Overcooked takes for a window."""

    picture: np.ndarray

    def show_img(self, picture: np.ndarray) -> None:
        self.picture = picture.astype(np.uint8)


def _drawn(draw: Callable[[Any], object]) -> np.ndarray:
    """The picture that something draws on the axes it is given."""
    figure = import_extra("matplotlib.figure", "jax").Figure(FIGURE_INCHES)
    canvas = import_extra("matplotlib.backends.backend_agg", "jax").FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
