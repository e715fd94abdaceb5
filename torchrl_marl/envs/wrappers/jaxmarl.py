"""Environments of JaxMARL: SMAX, MPE, JaxNav, Overcooked."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from torchrl.envs import EnvBase
from typing_extensions import Unpack

from torchrl_marl.envs.base import BatchOptions
from torchrl_marl.envs.wrappers.base import WrapperEnv, actions_like, check_options
from torchrl_marl.envs.wrappers.jax import FIGURE_INCHES, JaxEnv, JaxGame, JaxTask, game_by_name
from torchrl_marl.extras import import_extra
from torchrl_marl.signatures import hands_on_to

__all__ = ["make_jaxmarl"]

_UNITS = "mMszgh"  # letters of SMAX's unit types, in SMAX's order


@hands_on_to(WrapperEnv.__init__)
def make_jaxmarl(
    scenario: str = "smax-2s3z",
    *,
    max_steps: int = 100,
    shared_reward: bool = False,
    scenario_kwargs: Mapping[str, Any] | None = None,
    **batch: Unpack[BatchOptions],
) -> EnvBase:
    """Build a task of JaxMARL.

    ==============================================  =================================================================
    scenario                                        task
    ==============================================  =================================================================
    ``smax-MAP``                                    SMAX, battles against scripted enemies: 2s3z, smacv2_5_units, ...
    ``smax-UNITS_vs_UNITS``                         the same with any units, such as 3s_vs_4z or 2m1M_vs_6g
    ``simple_spread_Nag``                           MPE's, continuous actions in ``[0, 1]^5``
    ``jaxnav-GxGxNa``                               JaxNav: ``N`` robots drive to goals by lidar, maps of ``G x G`` m
    ``overcooked-LAYOUT``                           Overcooked: cramped_room, coord_ring, forced_coord, ...
    ==============================================  =================================================================

    SMAX has action masks, the world's state, ``("agents", "mask")`` (live agents), and ``("info", "won")``, which is 1
    if all enemies are dead and not all allies; its reward is the team's. Units are counted by letters: ``m`` marines,
    ``M`` marauders, ``s`` stalkers, ``z`` zealots, ``g`` zerglings, ``h`` hydralisks.
    The rules of JaxMARL 0.2 differ in details from those behind the tables of Mava and MAGPO. JaxNav's goals have a
    radius of 0.3 m, as in the MARS paper; all else is JaxMARL's. Overcooked's observation, ``[W, H, 26]``, is
    flattened; its reward is the team's, 20 for a soup, without JaxMARL's shaped reward.

    With JaxMARL's own limits, an episode of SMAX or MPE lasts one step longer than the limit. Here, it lasts
    ``max_steps``: use ``max_steps=26`` for the papers' 26 steps of MPE.

    Args:
        scenario: the name.
        max_steps: time limit of an episode, reported as truncation. Winning and losing are terminations, as is, in
            JaxNav, the arrival or crash of all robots. JaxMARL's own limits are 100, 25, 500 and 400.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        scenario_kwargs: arguments of JaxMARL's environment that differ from the scenario's, such as ``{"attack_mode":
            "random"}`` for SMAX's enemies, which attack the closest ally by default, or ``{"action_type": "Discrete"}``
            for MPE.
        batch: see :class:`~torchrl_marl.envs.base.BatchOptions`.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        ImportError: if JaxMARL is not installed.
        ValueError: if the task or an option is unknown, or an argument is out of its range.
    """
    import_extra("jaxmarl", "jax")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JaxNav clips its own defaults, Overcooked recommends its successor
        game = game_by_name(_TASKS, scenario, max_steps, scenario_kwargs or {})
    return JaxEnv(game, max_steps=max_steps, shared_reward=shared_reward, **batch)


def _built(
    name: re.Match, options: Mapping[str, Any], build: Callable[..., Any], *inner: Callable[..., Any], **settings: Any
) -> Any:
    """Build an environment with the scenario's settings and the options that differ from them.

    Options are arguments of ``build``, or of the constructors ``inner`` to which ``build`` passes unknown arguments.
    """
    check_options(options, name[0], build, *inner)
    return build(**{**settings, **options})


def _battle(name: re.Match, max_steps: int, options: Mapping[str, Any]) -> JaxGame:
    smax, jax = _environments("smax"), import_extra("jax", "jax")
    mode = options.get("attack_mode", "closest")
    if mode not in ("closest", "random"):
        raise ValueError(f"scenario_kwargs.attack_mode must be closest or random, got {mode!r}")
    rules = {"see_enemy_actions": True, "walls_cause_death": True, "attack_mode": mode, "max_steps": max_steps}
    env = _built(name, options, smax.HeuristicEnemySMAX, smax.SMAX, scenario=_units(smax, name[1]), **rules)
    agents, jnp = env.agents, jax.numpy

    def known(state: Any, observation: dict[str, Any]) -> dict[str, Any]:
        legal, alive = env.get_avail_actions(state), state.state.unit_alive
        return {
            "action_mask": jnp.stack([legal[agent] for agent in agents]).astype(bool),
            "mask": alive[: len(agents)],
            "state": observation["world_state"],
            "won": jnp.atleast_1d(alive[: len(agents)].any() & ~alive[len(agents) :].any()).astype(float),
        }

    def draw(state: Any) -> np.ndarray:
        units = jax.tree.map(np.asarray, state.state)
        scene = None, units, dict.fromkeys(env.all_agents, 0)
        with jax.disable_jit():  # otherwise JAX compiles for every unit of every image
            return _drawn(lambda axes: env.init_render(axes, scene, 0, units.step))

    return _jaxmarl_game(env, draw, known=known, own_rewards=False)


def _units(smax: ModuleType, name: str) -> Any:
    """Return SMAX's map of this name, or the units that the name lists."""
    with contextlib.suppress(KeyError):
        return smax.map_name_to_scenario(name)
    side = rf"((?:[1-9]\d*[{_UNITS}])+)"
    match = re.fullmatch(f"{side}_vs_{side}", name)
    if match is None:
        raise ValueError(f"SMAX has no map {name!r}; own units are written UNITS_vs_UNITS of {_UNITS}, as in 3s_vs_4z")
    teams = [
        [_UNITS.index(kind) for number, kind in re.findall(r"(\d+)(\D)", side) for _ in range(int(number))]
        for side in match.groups()
    ]
    types = import_extra("jax.numpy", "jax").array([*teams[0], *teams[1]], dtype="uint8")
    return smax.Scenario(types, *map(len, teams), False, False)


def _spread(name: re.Match, max_steps: int, options: Mapping[str, Any]) -> JaxGame:
    mpe, number = _environments("mpe"), int(name[1])
    settings = {"num_agents": number, "num_landmarks": number, "action_type": "Continuous", "max_steps": max_steps}
    env = _built(name, options, mpe.SimpleSpreadMPE, **settings)

    def draw(state: Any) -> np.ndarray:
        with contextlib.redirect_stdout(io.StringIO()):
            figure = _environments("mpe.mpe_visualizer").MPEVisualizer(env, [state]).fig
        figure.canvas.draw()
        picture = np.array(figure.canvas.buffer_rgba())[..., :3]
        import_extra("matplotlib.pyplot", "jax").close(figure)
        return picture

    return _jaxmarl_game(env, draw)


def _navigation(name: re.Match, max_steps: int, options: Mapping[str, Any]) -> JaxGame:
    jaxnav, size = _environments("jaxnav.jaxnav_env"), int(name[1])
    settings = {"num_agents": int(name[2]), "map_params": {"map_size": (size, size), "fill": 0.3}, "goal_radius": 0.3}
    # JaxNav's own limit looks like the arrival of all robots, so it is set out of reach.
    env = _built(name, options, jaxnav.JaxNav, **settings, max_steps=max_steps + 1)
    return _jaxmarl_game(env, lambda state: _drawn(lambda axes: env.init_render(axes, state, lidar=False)))


def _kitchen(name: re.Match, max_steps: int, options: Mapping[str, Any]) -> JaxGame:
    overcooked = _environments("overcooked")
    if name[1] not in overcooked.overcooked_layouts:
        layouts = ", ".join(overcooked.overcooked_layouts)
        raise ValueError(f"Overcooked has no layout {name[1]!r}; it has {layouts}")
    layout = overcooked.overcooked_layouts[name[1]]
    env = _built(name, options, overcooked.Overcooked, layout=layout, max_steps=max_steps)

    def draw(state: Any) -> np.ndarray:
        visualizer = import_extra("jaxmarl.viz.overcooked_visualizer", "jax").OvercookedVisualizer()
        visualizer.window = window = _Window()
        visualizer.render(env.agent_view_size, state, highlight=False)
        return window.picture

    return _jaxmarl_game(env, draw, own_rewards=False, ends=False)


_TASKS = (
    JaxTask("smax-MAP", r"smax-(\w+)", "smax-2s3z", _battle),
    JaxTask("simple_spread_Nag", r"simple_spread_(\d+)ag", "simple_spread_3ag", _spread),
    JaxTask("jaxnav-GxGxNa", r"jaxnav-(\d+)x\1x(\d+)a", "jaxnav-11x11x4a", _navigation),
    JaxTask("overcooked-LAYOUT", r"overcooked-(\w+)", "overcooked-cramped_room", _kitchen),
)


def _environments(name: str) -> ModuleType:
    return import_extra(f"jaxmarl.environments.{name}", "jax")


def _jaxmarl_game(
    env: Any,
    draw: Callable[[Any], np.ndarray],
    *,
    known: Callable[[Any, dict[str, Any]], dict[str, Any]] = lambda state, observation: {},
    own_rewards: bool = True,
    ends: bool = True,
) -> JaxGame:
    """Build a game from a JaxMARL environment; the random key of steps is stored with the state.

    Args:
        env: the environment.
        draw: function of the state that returns an image.
        known: function of the state and the agents' observations that returns entries besides ``observation``.
        own_rewards: False if all agents get the team's reward.
        ends: False if only the time limit ends an episode.
    """
    jax, agents = import_extra("jax", "jax"), list(env.agents)
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

    spec = actions_like(env.action_space(agents[0]), len(agents))
    return JaxGame(agents, spec, reset, step, own_rewards, lambda keyed: draw(keyed[1]))


class _Window:
    """Replaces the window of JaxMARL's visualiser of Overcooked."""

    picture: np.ndarray

    def show_img(self, picture: np.ndarray) -> None:
        self.picture = picture.astype(np.uint8)


def _drawn(draw: Callable[[Any], object]) -> np.ndarray:
    """Return the image that a function draws on given axes."""
    figure = import_extra("matplotlib.figure", "jax").Figure(FIGURE_INCHES)
    canvas = import_extra("matplotlib.backends.backend_agg", "jax").FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
