"""Environments of Jumanji and JaxMARL: batches that JAX steps at once, with tensors that share JAX's memory."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical
from torchrl.envs import EnvBase

from torchrl_marl.envs.bridge import BridgeEnv, Layout, import_extra

__all__ = ["JaxGame", "JaxGamesEnv", "make_jaxmarl", "make_jumanji"]

_FIGURE, _INCHES = "torchrl_marl", (3.6, 3.6)  # name and size of the figures that packages draw on
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
    draw: Callable[[Any], np.ndarray]
    """From one environment's state to its picture, by the package's own means."""


class JaxGamesEnv(BridgeEnv):
    """A batch of one JAX environment: one compiled call for all copies in each step.

    A step is one compiled call that returns finished tensors, new episodes are begun by another that resets only those
    copies that ended, a sixteenth of the batch at a time. Results are handed to Torch without a copy where JAX computes
    on ``device``, so never write into them. A copy's random stream is a key of JAX (its 64 bits), which is split for
    each episode: the first half goes on, the second is the episode's reset key.

    Args:
        game: the environment.
        num_envs: number of copies.
        max_steps: time limit of an episode, reported as truncation.
        shared_reward: whether every agent gets the sum of all agents' rewards.
        seed: of the random streams; ``None`` draws one from Torch's global generator.
        device: where the tensors are.

    Raises:
        ValueError: if ``num_envs`` or ``max_steps`` is below 1.
    """

    def __init__(
        self,
        game: JaxGame,
        *,
        num_envs: int,
        max_steps: int,
        shared_reward: bool,
        seed: int | None,
        device: torch.device | str,
    ) -> None:
        shared_reward = shared_reward and game.own_rewards
        super().__init__(
            game.layout,
            num_envs=num_envs,
            max_steps=max_steps,
            shared_reward=shared_reward,
            seed=seed,
            device=device,
        )
        self.game = game
        jax = import_extra("jax", "jax")
        self._jax: ModuleType = jax
        self._jax_device = torch.device("cpu" if jax.default_backend() == "cpu" else "cuda")
        self._restart, self._play = jax.jit(self._restarted), jax.jit(self._played)
        nothing = jax.eval_shape(self._begun, jax.ShapeDtypeStruct((num_envs, 2), "uint32"))
        nothing = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), nothing)
        # Of all copies the state and what is seen. Committed to the device, or else it would compile twice.
        self._shown = jax.device_put(nothing, jax.devices()[0])

    def _begun(self, keys: Any) -> Any:
        """The states of new episodes and what is seen of them; keys ``[*, 2]``."""
        jnp = self._jax.numpy
        state, seen = self._jax.vmap(self.game.reset)(keys)
        returns = jnp.zeros((len(keys), len(self.layout.agents), 1))
        return state, {**seen, "episode_reward": returns, "step_count": jnp.zeros((len(keys), 1), int)}

    def _restarted(self, keys: Any, which: Any, shown: Any) -> Any:
        """Begin new episodes where ``which``, a few at a time: a step has few ends, and resets are often expensive."""
        jax, jnp = self._jax, self._jax.numpy
        num_envs = len(which)
        few = -(-num_envs // 16)
        rows = jnp.nonzero(which, size=few * -(-num_envs // few), fill_value=num_envs)[0]

        def some(index: Any, carried: Any) -> Any:
            mine = jax.lax.dynamic_slice(rows, (few * index,), (few,))  # what is beyond the last one is dropped
            pairs = jax.vmap(jax.random.split)(carried[0][mine])
            return jax.tree.map(
                lambda all_, new: all_.at[mine].set(new.astype(all_.dtype), mode="drop"),
                carried,
                (pairs[:, 0], self._begun(pairs[:, 1])),
            )

        keys = jax.lax.bitcast_convert_type(keys, jnp.uint32)
        keys, shown = jax.lax.fori_loop(0, (which.sum() + few - 1) // few, some, (keys, shown))
        return jax.lax.bitcast_convert_type(keys, jnp.int32), shown

    def _played(self, shown: Any, action: Any) -> Any:
        """Step all, and count what ``BridgeEnv`` counts."""
        jax, jnp = self._jax, self._jax.numpy
        before, old = shown
        bounds = self.layout.action_spec.space
        if isinstance(self.layout.action_spec, Bounded):  # so that a plain Gaussian policy can act
            action = action.clip(bounds.low.numpy(), bounds.high.numpy())
        state, seen, reward, terminated = jax.vmap(self.game.step)(before, action)
        state = jax.tree.map(lambda new, old: new.astype(old.dtype), state, before)
        if self.shared_reward:
            reward = jnp.broadcast_to(reward.sum(-1, keepdims=True), reward.shape)
        reward, terminated = reward[..., None], terminated[:, None]
        steps = old["step_count"] + 1
        truncated = (steps >= self.max_steps) & ~terminated
        seen = {**seen, "episode_reward": old["episode_reward"] + reward, "step_count": steps}
        flags = {"done": terminated | truncated, "terminated": terminated, "truncated": truncated}
        return (state, seen), {"reward": reward, **flags}

    def _begin(self, which: Tensor, streams: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        keys = streams.view(torch.int32).unflatten(0, (-1, 2))  # a stream's 64 bits are a key of JAX
        keys, self._shown = self._restart(self._to_jax(keys), self._to_jax(which), self._shown)
        return torch.from_dlpack(keys).cpu().view(torch.int64).squeeze(-1), self._to_torch(self._shown[1])

    def _advance(self, action: Tensor) -> dict[str, Tensor]:
        action = action if action.is_floating_point() else action.int()  # JAX would copy int64
        self._shown, outcome = self._play(self._shown, self._to_jax(action))
        return self._to_torch({**self._shown[1], **outcome})

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """Do what TorchRL's method does, without its handling of keys that may be anything: a fifth of a quick step.

        What else the tensordict holds, such as the policy's outputs, is not carried on to the next step.
        """
        if "next" in tensordict or "_step" in tensordict:
            return super().step_and_maybe_reset(tensordict)
        shown = self._advance(tensordict["agents", "action"])
        tensordict["next"] = self._data(shown)
        if shown["done"].any():
            self._streams, begun = self._begin(shown["done"].squeeze(-1).cpu(), self._streams)
            flags = {name: torch.zeros_like(shown[name]) for name in ("done", "terminated", "truncated")}
            return tensordict, self._data(begun | flags)
        return tensordict, self._data({name: value for name, value in shown.items() if name != "reward"})

    def _draw(self, env_index: int) -> np.ndarray:
        return self.game.draw(self._jax.tree.map(lambda leaf: leaf[env_index], self._shown[0]))

    def _to_jax(self, tensor: Tensor) -> Any:
        if self._jax_device.type == "cpu":
            return tensor.cpu().numpy()  # shared as well, at a tenth of the time that it takes to wrap it
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
    game = _first(forms, scenario, max_steps)
    if game is None:
        raise ValueError(
            "scenario must be con-GxGxNa, rware-SIZE-Nag[-easy|-hard], lbf-[2s-]GxG-Np-Ff[-coop] or sar-Na, such as "
            f"con-5x5x3a, rware-tiny-2ag, lbf-2s-8x8-2p-2f-coop or sar-2a; got {scenario!r}"
        )
    return JaxGamesEnv(
        game, num_envs=num_envs, max_steps=max_steps, shared_reward=shared_reward, seed=seed, device=device
    )


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
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what else could be installed
        import_extra("jaxmarl", "jax")
    forms: dict[str, Callable[[re.Match, int], JaxGame]] = {
        r"smax-(\w+)": _battle,
        r"simple_spread_(\d+)ag": _spread,
        r"jaxnav-(\d+)x\1x(\d+)a": _navigation,
        r"overcooked-(\w+)": _kitchen,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JaxNav clips its own defaults, Overcooked recommends its successor
        game = _first(forms, scenario, max_steps)
    if game is None:
        raise ValueError(
            "scenario must be smax-MAP, simple_spread_Nag, jaxnav-GxGxNa or overcooked-LAYOUT, such as smax-2s3z, "
            f"simple_spread_3ag, jaxnav-11x11x4a or overcooked-cramped_room; got {scenario!r}"
        )
    return JaxGamesEnv(
        game, num_envs=num_envs, max_steps=max_steps, shared_reward=shared_reward, seed=seed, device=device
    )


def _first(forms: Mapping[str, Callable[[re.Match, int], JaxGame]], scenario: str, max_steps: int) -> JaxGame | None:
    """Build the game whose form the name has."""
    games = (build(match, max_steps) for form, build in forms.items() if (match := re.fullmatch(form, scenario)))
    return next(games, None)


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
    draw = lambda state: _photograph(viewer(_FIGURE, num_agents, "rgb_array"), state.grid)  # noqa: E731
    return _jumanji_game(env, layout, seen, _without_future, draw)


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
    draw = lambda state: _photograph(viewer(env.grid_size, env.goals, _FIGURE, "rgb_array"), state)  # noqa: E731
    return _jumanji_game(env, layout, _own_views, _without_future, draw, own_rewards=False)


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
    draw = lambda state: _photograph(viewer(size, _FIGURE, "rgb_array"), state)  # noqa: E731
    return _jumanji_game(env, layout, _own_views, _without_future, draw)


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
    draw = lambda state: _photograph(viewer(_FIGURE, render_mode="rgb_array"), state)  # noqa: E731
    return _jumanji_game(env, Layout(_names(num_agents), size, spec), seen, found_all, draw)


def _jumanji_game(
    env: Any,
    layout: Layout,
    seen: Callable[[Any, Any], dict[str, Any]],
    terminated: Callable[[Any, Any], Any],
    draw: Callable[[Any], np.ndarray],
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

    return JaxGame(layout, reset, step, own_rewards, draw)


def _own_views(state: Any, observation: Any) -> dict[str, Any]:
    return {"observation": observation.agents_view.astype(float), "action_mask": observation.action_mask}


def _without_future(state: Any, timestep: Any) -> Any:
    """The last step, with a discount of 0 for all: at a time limit it is 1."""
    return timestep.last() & (timestep.discount == 0).all()


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
        with jax.disable_jit():  # of which it would compile something for every unit of every picture
            draw_on = lambda axes: env.init_render(axes, (None, units, dict.fromkeys(env.all_agents, 0)), 0, units.step)  # noqa: E731
            return _drawn(draw_on)

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
    draw = lambda state: _drawn(lambda axes: env.init_render(axes, state, lidar=False))  # noqa: E731
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
        return Layout(agents, size, _choices(rows, int(action.n)))
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


def _photograph(viewer: Any, state: Any) -> np.ndarray:
    """The picture of a viewer of Jumanji; it would open a window for its figure, unless there is one of that name."""
    pyplot = import_extra("matplotlib.pyplot", "jax")
    figure = pyplot.figure(_FIGURE, figsize=_INCHES)
    figure.add_axes((0, 0, 1, 1))
    picture = np.array(viewer.render(state))[..., :3]
    pyplot.close(figure)
    return picture


def _drawn(draw: Callable[[Any], object]) -> np.ndarray:
    """The picture that something draws on the axes it is given."""
    figure = import_extra("matplotlib.figure", "jax").Figure(_INCHES)
    canvas = import_extra("matplotlib.backends.backend_agg", "jax").FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _names(num_agents: int) -> list[str]:
    return [f"agent_{index}" for index in range(num_agents)]


def _choices(num_agents: int, num_actions: int) -> Categorical:
    return Categorical(num_actions, shape=torch.Size([num_agents]))
