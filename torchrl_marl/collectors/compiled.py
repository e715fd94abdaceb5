"""Policy and game as one compiled function, for games whose step is a pure function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import (
    Compose,
    EnvBase,
    ExplorationType,
    InitTracker,
    TensorDictPrimer,
    TransformedEnv,
    set_exploration_type,
)

from torchrl_marl.envs import TensorEnv, preserve_random_state

__all__ = ["CompiledCollector"]

_INDUCTOR = {
    "fallback_random": True,  # Torch's generators, as uncompiled, rather than numbers of its own
    "cpp.use_decompose_tanh": True,  # by exp, to 1e-7: a third of the time of a rollout on a CPU went into tanh
}
_FLAGS = ("done", "terminated", "truncated")
_INIT = "is_init"
_Entries = dict[NestedKey, Tensor]  # of one step of all environments
_Function = TypeVar("_Function", bound=Callable[..., Any])


class CompiledCollector:
    """Run a policy in a game written in Torch without end, and yield ``[num_envs, num_steps]`` steps at a time.

    It yields what :class:`torchrl.collectors.Collector` yields with the same seeds, in one process, without the ids of
    trajectories. The policy, the game's step and the writing into the batch are one graph without Python between its
    operations; a second one begins new episodes, where any has ended. The policy draws from Torch's generator, as
    uncompiled. The first batch waits for the compiler, some ten seconds.

    Every batch has memory of its own, laid out by step: ``[num_envs, num_steps]`` is a view. The environment's state
    is up to date between batches, so that it can be stored and brought back.

    Args:
        env: a :class:`~torchrl_marl.envs.TensorEnv` (CoordSum, the mazes, PaxMen, AeroCombat, or a game of your own),
            as it is or in :func:`~torchrl_marl.modules.with_recurrent_state`.
        policy: what acts, with exploration: any policy that Torch compiles in one piece, such as those of
            :func:`~torchrl_marl.modules.make_actor` and :func:`~torchrl_marl.modules.collection_policy`. Its
            parameters may change, its layers may not.
        frames_per_batch: steps of all environments together in a batch, rounded up.
        compile: whether to compile the functions, or another backend of ``torch.compile``; uncompiled they do the same,
            slowly.

    Raises:
        ValueError: if the environment is not one of those.

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
        self.env, self.policy, self._game = env, policy, _game(env)
        self.num_steps = -(-frames_per_batch // env.batch_size.numel())
        self.reset()
        self._initial = {key: value for key, value in self._first.items() if key not in self._described()}
        with preserve_random_state(), torch.no_grad():
            _, now, after = self._outputs(self._state(), self._first)
        self._shapes = {"root": {**self._first, **now}, "next": after}
        self._step, self._restart = self._write_step, self._write_restart
        if compile:
            backend = "inductor" if compile is True else compile
            self._step, self._restart = _compiled(self._step, backend), _compiled(self._restart, backend)

    def __iter__(self) -> Iterator[TensorDictBase]:
        while True:
            yield self._collect()

    def reset(self) -> None:
        """Start new episodes in all environments."""
        self._first: _Entries = _leaves(self.env.reset())

    def shutdown(self) -> None:
        """Close the environment."""
        if not self.env.is_closed:
            self.env.close()

    @torch.no_grad()
    def _collect(self) -> TensorDictBase:
        root = {key: _empty(self.num_steps + 1, value) for key, value in self._shapes["root"].items()}
        after = {key: _empty(self.num_steps, value) for key, value in self._shapes["next"].items()}
        root_steps, next_steps, state = _unbind(root), _unbind(after), self._state()
        for name in _FLAGS:
            root[name].zero_()
        for key, value in self._first.items():
            root_steps[0][key].copy_(value)
        with set_exploration_type(ExplorationType.RANDOM):
            for now, then, following in zip(root_steps, next_steps, root_steps[1:], strict=False):
                state = self._step(state, now, then, following)
                if self._game.device.type != "cpu" or then["done"].any():  # no accelerator is waited for
                    state = self._restart(state, then["done"], following)
        self._game.state = TensorDict(state, batch_size=self._game.batch_size)
        self._first = {key: root_steps[-1][key].clone() for key in self._first}  # does not keep the batch alive
        batch = {key: value[:-1].transpose(0, 1) for key, value in root.items()}
        following = {key: value.transpose(0, 1) for key, value in after.items()}
        shape = (*self._game.batch_size, self.num_steps)
        result = self._nest(batch, shape).set("next", self._nest(following, shape))
        result.names = [None, "time"]
        return result

    def _write_step(self, state: _Entries, now: _Entries, then: _Entries, following: _Entries) -> _Entries:
        """Play a step from the entries ``now``; write what the policy adds to them, and what comes ``then``."""
        state, acted, happened = self._outputs(state, now)
        for key, value in acted.items():
            now[key].copy_(value)
        for key, value in happened.items():
            then[key].copy_(value)
            if key in self._first and key not in _FLAGS:
                following[key].copy_(value)
        return state

    def _write_restart(self, state: _Entries, done: Tensor, following: _Entries) -> _Entries:
        """Begin new episodes where the last ones are ``done``."""
        restarted = self._game.rules.restart(self._tensordict(state), done.squeeze(-1))
        for key, value in {**_leaves(self._game.rules.describe(restarted)), **self._initial}.items():
            mask = done.reshape(-1, *(1 for _ in value.shape[1:]))
            following[key].copy_(torch.where(mask, value, following[key]))
        return _contiguous(restarted)

    def _outputs(self, state: _Entries, now: _Entries) -> tuple[_Entries, _Entries, _Entries]:
        """Return the state after a step, what the policy adds to the entries before it, and those after it."""
        data = self.policy(self._nest(now, self._game.batch_size))
        memory = _leaves(data.pop("next")) if "next" in data.keys() else {}
        after, happened = self._game.rules.step(self._tensordict(state), data["agents", "action"])
        if _INIT in now:
            memory[_INIT] = torch.zeros_like(now[_INIT])
        acted = {key: value for key, value in _leaves(data).items() if key not in self._first}
        return _contiguous(after), acted, {**_leaves(happened), **memory}

    def _described(self) -> set[NestedKey]:
        return {*_leaves(self._game.rules.describe(self._game.state)), *_FLAGS}

    def _state(self) -> _Entries:
        return _contiguous(self._game.state)

    def _tensordict(self, state: Mapping[NestedKey, Tensor]) -> TensorDict:
        return TensorDict(dict(state), batch_size=self._game.batch_size)

    def _nest(self, entries: Mapping[NestedKey, Tensor], batch_size: tuple[int, ...]) -> TensorDict:
        """Put entries of the group where they belong; a few lines, as setting them one by one is slow to compile."""
        agents = {key[1]: value for key, value in entries.items() if isinstance(key, tuple)}
        rest = {key: value for key, value in entries.items() if isinstance(key, str)}
        group = TensorDict(agents, batch_size=(*batch_size, self._game.rules.num_agents))
        return TensorDict({**rest, "agents": group}, batch_size=batch_size)


def _game(env: EnvBase) -> TensorEnv:
    """Return the game below the transforms that hold a policy's memory, and refuse all else."""
    game, transforms = env, []
    while isinstance(game, TransformedEnv):
        own = game.transform
        transforms += list(own) if isinstance(own, Compose) else [own]
        game = game.base_env
    others = [type(one).__name__ for one in transforms if not isinstance(one, InitTracker | TensorDictPrimer)]
    if not isinstance(game, TensorEnv) or others:
        found = type(game).__name__ + (f" under {', '.join(others)}" if others else "")
        raise ValueError(
            "CompiledCollector takes a TensorEnv (CoordSumEnv, MazeEnv, PaxMenEnv, AeroCombatEnv or your own), under "
            f"no transforms but those of with_recurrent_state; got {found}. TorchRL's Collector (recipes: "
            "collector=default) takes any environment."
        )
    return game


def _compiled(method: _Function, backend: str) -> _Function:
    """Compile a method for arguments that never change their shapes.

    Dynamo's checks that its graph still fits would take longer than a small step. They are left out, and the code is a
    copy of the method's, since Dynamo keeps graphs by code: no other collector must find this one's.
    """
    own = FunctionType(method.__func__.__code__.replace(), method.__func__.__globals__)
    options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    if backend == "inductor":
        options |= _INDUCTOR
    compiled = torch.compile(own, fullgraph=True, backend=backend, options=options)
    return cast("_Function", lambda *arguments: compiled(method.__self__, *arguments))


def _leaves(data: TensorDictBase) -> _Entries:
    return dict(data.items(True, True))  # pyright: ignore[reportReturnType]


def _contiguous(state: TensorDictBase) -> _Entries:
    """Entries of one layout, which a compiled function relies on; games expand some."""
    return {key: value.contiguous() for key, value in state.items()}


def _empty(num_steps: int, value: Tensor) -> Tensor:
    return value.new_empty((num_steps, *value.shape))


def _unbind(entries: _Entries) -> list[_Entries]:
    steps = zip(*(value.unbind(0) for value in entries.values()), strict=True)
    return [dict(zip(entries, step, strict=True)) for step in steps]
