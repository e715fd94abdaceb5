"""Policy and game as one compiled function, for games whose step is a pure function of tensors, and for VMAS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModuleBase
from torch import Tensor
from torch.compiler import skip_all_guards_unsafe
from torch.fx import GraphModule
from torchrl.envs import EnvBase, ExplorationType, VmasEnv, set_exploration_type
from torchrl.envs.transforms import Compose, InitTracker, RewardSum, StepCounter, TensorDictPrimer, TransformedEnv

from torchrl_marl.collectors.sequences import memory_keys
from torchrl_marl.compilation import GUARDLESS_OPTIONS, compile_whole
from torchrl_marl.envs import TensorEnv, preserve_random_state
from torchrl_marl.envs.vmas_graph import VmasGraphs
from torchrl_marl.evaluation.episodes import Episodes, first_episodes, so_far
from torchrl_marl.modules import AutoregressiveActor, with_recurrent_state

__all__ = ["CompiledCollector"]

_FLAGS = {"done", "terminated", "truncated"}
_INIT = "is_init"
_Entries = dict[NestedKey, Tensor]  # of one step of all environments


class CompiledCollector:
    """Run a policy endlessly in a game written in Torch, or in VMAS; yield batches ``[num_envs, num_steps]``.

    With the same seeds, the batches equal those of :class:`torchrl.collectors.Collector` in one process, without
    trajectory ids. The policy, the game's step and the writes into the batch are one graph without Python between
    operations; a second graph starts new episodes where episodes have ended. The policy draws from Torch's generator,
    as without compilation. The first batch waits about ten seconds for the compiler, in VMAS up to a minute.

    VMAS's step and resets are graphs (``VmasGraphs``) that are checked against VMAS
    while they run: they equal VMAS up to rounding, or the collector falls back to VMAS with a warning.

    Every batch owns its memory, laid out by step: ``[num_envs, num_steps]`` is a view. A policy's large states
    (:class:`~torchrl_marl.modules.protocols.Remembering`) are stored only before a batch's first step, as by
    :class:`~torchrl_marl.collectors.SequenceCollector`. The environment's state is up to date between batches, so it
    can be stored and restored.

    Args:
        env: a :class:`~torchrl_marl.envs.TensorEnv` (CoordSum, the mazes, PaxMen, AeroCombat, or a game of your own),
            or :func:`~torchrl_marl.envs.make_env`'s VMAS, as it is or in
            :func:`~torchrl_marl.modules.with_recurrent_state`.
        policy: policy with exploration that Torch compiles as one graph, such as those of
            :func:`~torchrl_marl.modules.make_actor` and :func:`~torchrl_marl.modules.collection_policy`. Its
            parameters may change, its layers may not.
        frames_per_batch: steps of a batch over all environments, rounded up.
        compile: whether to compile the functions, or another backend of ``torch.compile``; without compilation the
            results are the same.

    Raises:
        ValueError: if the environment is not supported, or agents of one group have different spaces.

    Example:
        >>> from torchrl_marl.envs import make_coordsum
        >>> from torchrl_marl.modules import make_actor
        >>> env = make_coordsum("CoordSum-3x10", num_envs=4, seed=0)
        >>> collector = CompiledCollector(env, make_actor(env), frames_per_batch=80, compile=False)
        >>> batch = next(iter(collector))
        >>> batch.shape, batch["next", "agents", "reward"].shape
        (torch.Size([4, 20]), torch.Size([4, 20, 3, 1]))
    """

    def __init__(
        self, env: EnvBase, policy: TensorDictModuleBase, *, frames_per_batch: int, compile: bool | str = True
    ) -> None:
        game, limit = _game(env)
        self.env, self.policy = env, policy
        self.num_steps = -(-frames_per_batch // env.batch_size.numel())
        first = env.reset()
        self._first = _leaves(first)
        self._scribe = _Scribe(policy, first, described=game.observation_spec.keys(True, True))
        with preserve_random_state(), torch.no_grad():
            acted = _leaves(policy(first.copy()).exclude("next"))
        self._states = memory_keys(policy)
        after = env.fake_tensordict()["next"].exclude(*self._states)
        self._shapes = {"root": {**self._first, **acted}, "next": _leaves(after)}
        if isinstance(game, TensorEnv):
            self._game = _TensorGame(game, self._scribe, compile)
        else:
            self._game = _VmasGame(game, limit, self._scribe, compile, [acted[key] for key in game.action_keys])

    @staticmethod
    def takes(env: EnvBase) -> bool:
        """Whether the collector supports an environment."""
        try:
            _game(env)
        except ValueError:
            return False
        return True

    def __iter__(self) -> Iterator[TensorDictBase]:
        while True:
            yield self._collect()

    def reset(self) -> None:
        """Start new episodes in all environments."""
        self._first: _Entries = _leaves(self.env.reset())

    def shutdown(self) -> None:
        """Close the environment."""
        self.env.close(raise_if_closed=False)

    def acts_as(self, actor: TensorDictModuleBase) -> bool:
        """Whether the policy's most likely actions are those of an actor, so that :meth:`evaluate` plays the actor."""
        heads = _heads(actor)
        return bool(heads) and heads == self._scribe.heads

    @torch.no_grad()
    def evaluate(self, env: EnvBase, *, seed: int, max_steps: int) -> Episodes:
        """Play one episode in every copy of an environment with the policy's most likely actions.

        The result is that of :func:`torchrl_marl.evaluation.evaluate` up to rounding, but the episodes are played in
        the collector's environment, by the compiled functions of collection. They start from the states of ``env``,
        as many at a time as the collector has environments. The state of the collector's environment is restored;
        call it within :func:`torchrl_marl.envs.preserve_random_state` to restore Torch's generator, too.

        Args:
            env: batch of environments of the same game, not the collector's own.
            seed: seed of the initial states.
            max_steps: maximum length of an episode.

        Raises:
            ValueError: if an episode does not end within ``max_steps``.
        """
        env.set_seed(seed)
        first, parts = _leaves(with_recurrent_state(env, self.policy).reset()), []
        copies, following, restore = self.env.batch_size.numel(), self._first, self._game.hold()
        self._scribe.greedy.fill_(True)
        try:
            for rows in torch.arange(env.batch_size.numel(), device=env.device).split(copies):
                filled = rows.repeat(-(-copies // len(rows)))[:copies]
                self._first = {key: value[filled] for key, value in first.items()}
                self._game.load(_game(env)[0], filled)
                played: Any = so_far(self._collect())
                while played.shape[-1] < max_steps and not played["done"].any(-1).all():
                    played = torch.cat([played, so_far(self._collect())], -1)
                parts.append(first_episodes(played[: len(rows), :max_steps]))
        finally:
            self._scribe.greedy.fill_(False)
            self._first = following
            restore()
        return Episodes.joined(parts)

    @torch.no_grad()
    def _collect(self) -> TensorDictBase:
        root, root_steps = _memory(self.num_steps + 1, self._shapes["root"], self._states)
        after, next_steps = _memory(self.num_steps, self._shapes["next"])
        started = {key: self._first[key] for key in self._states}
        for name in _FLAGS & root.keys():
            root[name].zero_()
        for key, value in self._first.items():
            root_steps[0][key].copy_(value)
        self._game.begin()
        with set_exploration_type(ExplorationType.RANDOM):
            for now, then, following in zip(root_steps, next_steps, root_steps[1:], strict=False):
                self._game.step(now, then, following)
                if not self._game.waits or then["done"].any():
                    self._game.restart(then["done"], following)
        self._game.end()
        self._first = {key: root_steps[-1][key].clone() for key in self._first}  # a clone does not keep the batch alive
        batch = {key: value[:-1].transpose(0, 1) for key, value in root.items() if key not in started}
        batch |= {
            key: value.unsqueeze(1).expand(-1, self.num_steps, *value.shape[1:]) for key, value in started.items()
        }
        following = {key: value.transpose(0, 1) for key, value in after.items()}
        shape = (*self.env.batch_size, self.num_steps)
        result = self._scribe.nest(batch, shape).set("next", self._scribe.nest(following, shape))
        result.names = [None, "time"]
        return result


class _Scribe:
    """Runs the policy, and writes the entries before and after a step into the batch.

    Args:
        policy: the policy.
        first: entries at the start of an episode.
        described: entries that the game computes in each state; the other entries start episodes as in ``first``.
    """

    def __init__(self, policy: TensorDictModuleBase, first: TensorDictBase, *, described: Iterable[NestedKey]) -> None:
        self.policy, self.batch_size = policy, first.batch_size
        self.heads = _heads(policy)
        self.greedy = torch.zeros((), dtype=torch.bool, device=first.device)  # an input of the graph
        groups = first.items(True, False)
        self._groups = {key: value.batch_size[1:] for key, value in groups if isinstance(value, TensorDictBase)}
        self._carried = set(_leaves(first)) - _FLAGS
        self._initial = {key: value for key, value in _leaves(first).items() if key in self._carried - {*described}}

    def nest(self, entries: Mapping[NestedKey, Tensor], batch_size: Sequence[int]) -> TensorDict:
        """Return entries as a TensorDict, built group by group: setting entries one by one compiles slowly."""
        data = TensorDict({key: value for key, value in entries.items() if isinstance(key, str)}, batch_size=batch_size)
        for group, size in self._groups.items():
            path = (group,) if isinstance(group, str) else group
            own = {key[-1]: value for key, value in entries.items() if isinstance(key, tuple) and key[:-1] == path}
            data[group] = TensorDict(own, batch_size=(*batch_size, *size))
        return data

    def act(self, now: _Entries, then: _Entries, following: _Entries) -> TensorDictBase:
        """Run the policy on the entries ``now``; write its outputs, and its memory after the step."""
        data = self.policy(self.nest(now, self.batch_size))
        for head in self.heads:
            with set_exploration_type(ExplorationType.DETERMINISTIC):
                likely = head(data.copy())
            for key in head.dist_sample_keys:
                data.set(key, torch.where(self.greedy, likely.get(key), data.get(key)))
        memory = _leaves(data.pop("next")) if "next" in data.keys() else {}
        if _INIT in now:
            memory[_INIT] = torch.zeros_like(now[_INIT])
        for key, value in _leaves(data).items():
            if key not in self._carried and key not in _FLAGS:
                now[key].copy_(value)
        self.write(memory, then, following)
        return data

    def write(self, entries: _Entries, then: _Entries, following: _Entries) -> None:
        """Write the entries after a step."""
        for key, value in entries.items():
            if key in then:  # large states are not kept
                then[key].copy_(value)
            if key in self._carried:
                following[key].copy_(value)

    def restart(self, described: _Entries, done: Tensor, following: _Entries) -> None:
        """Write the initial entries of new episodes where episodes are ``done``."""
        for key, value in {**described, **self._initial}.items():
            mask = done.reshape(-1, *(1 for _ in value.shape[1:]))
            following[key].copy_(torch.where(mask, value, following[key]))


class _TensorGame:
    """A game whose state is passed from one compiled call to the next."""

    def __init__(self, game: TensorEnv, scribe: _Scribe, compile: bool | str) -> None:
        self._game, self._scribe = game, scribe
        self._step, self._restart = _compiled(self._write_step, compile), _compiled(self._write_restart, compile)
        self.waits = game.device.type == "cpu"  # avoid a synchronisation with an accelerator

    def begin(self) -> None:
        self._state = _contiguous(self._game.state)

    def step(self, now: _Entries, then: _Entries, following: _Entries) -> None:
        self._state = self._step(self._state, now, then, following)

    def restart(self, done: Tensor, following: _Entries) -> None:
        self._state = self._restart(self._state, done, following)

    def end(self) -> None:
        self._game.state = self._tensordict(self._state)

    def hold(self) -> Callable[[], None]:
        """Return a function that restores the present state."""
        return partial(setattr, self._game, "state", self._game.state)

    def load(self, game: Any, rows: Tensor) -> None:
        """Take over the state of some copies of another batch."""
        self._game.state = game.state[rows]

    def _write_step(self, state: _Entries, now: _Entries, then: _Entries, following: _Entries) -> _Entries:
        data = self._scribe.act(now, then, following)
        after, happened = self._game.rules.step(self._tensordict(state), data["agents", "action"])
        self._scribe.write(_leaves(happened), then, following)
        return _contiguous(after)

    def _write_restart(self, state: _Entries, done: Tensor, following: _Entries) -> _Entries:
        restarted = self._game.rules.restart(self._tensordict(state), done.squeeze(-1))
        self._scribe.restart(_leaves(self._game.rules.describe(restarted)), done, following)
        return _contiguous(restarted)

    def _tensordict(self, state: Mapping[NestedKey, Tensor]) -> TensorDict:
        return TensorDict(dict(state), batch_size=self._game.batch_size)


class _VmasGame:
    """VMAS: policy and graph of a step as one function; VMAS's own step if the graph is not valid."""

    waits = True

    def __init__(
        self, env: VmasEnv, max_steps: int | None, scribe: _Scribe, compile: bool | str, actions: Sequence[Tensor]
    ) -> None:
        self._env, self._max_steps, self._scribe, self._compile = env, max_steps, scribe, compile
        self._graphs = VmasGraphs(env, compile_step=self._fuse_step, compile_reset=self._fuse_reset)
        self._graphs.trace_step(actions)

    def begin(self) -> None:
        self._graphs.find_state()

    def step(self, *entries: _Entries) -> None:
        now, *_ = self._entries = entries
        self._has_acted = False

        def as_vmas() -> TensorDictBase:
            actions = {key: now[key] for key in self._env.action_keys}
            return VmasEnv._step(self._env, self._scribe.nest(actions, self._scribe.batch_size))

        if self._graphs.try_step([now[key] for key in self._env.action_keys], as_vmas) is None:
            if not self._has_acted:
                self._scribe.act(*entries)
            self._write(_leaves(as_vmas()), *entries)

    def restart(self, done: Tensor, following: _Entries) -> None:
        self._following = following
        if self._graphs.try_reset(done) is None:
            described = VmasEnv._reset(self._env, TensorDict({"_reset": done}, batch_size=self._scribe.batch_size))
            self._graphs.find_state()
            self._scribe.restart(_leaves(described.exclude(*_FLAGS)), done, following)

    def end(self) -> None: ...

    def hold(self) -> Callable[[], None]:
        return self._graphs.hold()

    def load(self, env: Any, rows: Tensor) -> None:
        self._graphs.load(env, rows)

    def _fuse_step(self, module: GraphModule) -> Callable[..., Sequence[Tensor]]:
        self._step, compiled = module, _compiled(self._write_step, self._compile)
        num_actions = len(self._env.action_keys)

        def run(*inputs: Tensor) -> Sequence[Tensor]:
            results = compiled(_apart(inputs[num_actions:]), *self._entries)
            self._has_acted = True
            return results

        return run

    def _fuse_reset(self, module: GraphModule) -> Callable[..., Sequence[Tensor]]:
        self._reset, compiled = module, _compiled(self._write_restart, self._compile)
        return lambda *inputs: compiled(_apart(inputs), self._following)

    def _write_step(self, state: list[Tensor], now: _Entries, then: _Entries, following: _Entries) -> Sequence[Tensor]:
        data = self._scribe.act(now, then, following)
        results = self._step(*(data[key] for key in self._env.action_keys), *state)
        self._write(_named(self._step, results), now, then, following)
        return results

    def _write_restart(self, inputs: list[Tensor], following: _Entries) -> Sequence[Tensor]:
        results = self._reset(*inputs)
        described = {key: value for key, value in _named(self._reset, results).items() if key not in _FLAGS}
        self._scribe.restart(described, inputs[0].unsqueeze(-1), following)
        return results

    def _write(self, happened: _Entries, now: _Entries, then: _Entries, following: _Entries) -> None:
        """Write VMAS's entries, with those of the transforms in ``make_env``'s environments."""
        if self._max_steps is not None:
            happened["step_count"] = now["step_count"] + 1
            happened["truncated"] = happened["step_count"] >= self._max_steps
            happened["done"] = happened["done"] | happened["truncated"]
        for group, reward in self._env.reward_keys:
            total = group, "episode_reward"
            if total in now:
                happened[total] = now[total] + happened[group, reward]
        self._scribe.write(happened, then, following)


def _game(env: EnvBase) -> tuple[TensorEnv | VmasEnv, int | None]:
    """Return the game below its transforms and the time limit of a transform, if any; reject other environments."""
    game, transforms = env, []
    while isinstance(game, TransformedEnv):
        own = game.transform
        transforms += list(own) if isinstance(own, Compose) else [own]
        game = game.base_env
    allowed = (InitTracker, TensorDictPrimer) + (StepCounter, RewardSum) * isinstance(game, VmasEnv)
    others = [type(one).__name__ for one in transforms if not isinstance(one, allowed)]
    if not isinstance(game, TensorEnv | VmasEnv) or others:
        found = type(game).__name__ + (f" under {', '.join(others)}" if others else "")
        raise ValueError(
            "CompiledCollector takes a TensorEnv (CoordSumEnv, MazeEnv, PaxMenEnv, AeroCombatEnv or your own) or VMAS, "
            f"under no transforms but those of make_env and with_recurrent_state; got {found}. TorchRL's Collector "
            "takes any environment."
        )
    if isinstance(game, VmasEnv) and any(game.het_specs_map.values()):
        raise ValueError(
            f"CompiledCollector takes groups of agents with equal spaces; in {game.scenario_name!r} they differ. "
            "TorchRL's Collector takes any environment."
        )
    return game, next((one.max_steps for one in transforms if isinstance(one, StepCounter)), None)


def _heads(policy: TensorDictModuleBase) -> list[ProbabilisticTensorDictModule]:
    """The parts of a policy that draw actions; none if agents act in turn, as one's parameters depend on draws."""
    parts = list(policy.modules())
    if any(isinstance(part, AutoregressiveActor) for part in parts):
        return []
    return [part for part in parts if isinstance(part, ProbabilisticTensorDictModule)]


def _compiled(method: Callable[..., Any], compile: bool | str) -> Callable[..., Any]:
    """Compile a method for arguments of constant shapes.

    Dynamo's guards would take longer than a small step, so they are skipped.
    """
    if not compile:
        return method
    guards = {"guard_filter_fn": skip_all_guards_unsafe}  # all that another backend takes
    options = GUARDLESS_OPTIONS if compile is True else guards
    compiled = compile_whole(method.__func__, backend=compile, **options)
    return lambda *arguments: compiled(method.__self__, *arguments)


def _leaves(data: TensorDictBase) -> _Entries:
    return dict(data.items(True, True))  # pyright: ignore[reportReturnType]


def _named(module: GraphModule, results: Sequence[Tensor]) -> _Entries:
    return dict(zip(module.meta["keys"], results[1:], strict=False))


def _apart(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous tensors without aliases, as when Dynamo traced them; copies where VMAS's are not."""
    found: list[Tensor] = []
    seen: set[int] = set()
    for value in inputs:
        memory = value.untyped_storage().data_ptr()
        if memory in seen or not value.is_contiguous():
            value = value.clone(memory_format=torch.contiguous_format)
        seen.add(memory)
        found.append(value)
    return found


def _contiguous(state: TensorDictBase) -> _Entries:
    """Contiguous entries, as a compiled function requires; games expand some entries."""
    return {key: value.contiguous() for key, value in state.items()}


def _memory(num_steps: int, like: _Entries, passing: Sequence[NestedKey] = ()) -> tuple[_Entries, list[_Entries]]:
    """Uninitialised entries of many steps, and views of each step's; those of ``passing`` ones take turns in two."""
    entries: _Entries = {
        key: value.new_empty((2 if key in passing else num_steps, *value.shape)) for key, value in like.items()
    }
    steps = zip(*(islice(cycle(value.unbind(0)), num_steps) for value in entries.values()), strict=True)
    return entries, [dict(zip(entries, step, strict=True)) for step in steps]
