"""VMAS's step and reset as compiled graphs, checked against VMAS itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import NoneType
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.envs import VmasEnv

from torchrl_marl.envs.random_state import preserve_random_state

__all__ = ["VmasGraphs"]

_ROOTS = ("scenario", "world", "steps")  # attributes of VMAS's Environment that a step reads or writes
_OF_A_STEP = ("forces_dict", "torques_dict", "entity_index_map")  # rebuilt by the world in every step
_HOST_READS = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist)
_ROW_BY_ROW = ("add", "sub", "mul", "div", "truediv", "neg")  # names of Tensor's methods, in any spelling
_DENSE_CHECKS = 32  # number of initial runs of a graph that are all checked
_TOLERANCE = 1e-3  # relative and absolute
_MAX_ROWS = 0.02  # share of environments that may differ by more: rounding can decide a contact or an arrival
_MAX_MISSES = 0.5  # share of runs that fall back to VMAS beyond which compilation gains nothing

Compiler = Callable[[GraphModule], Callable[..., Sequence[Tensor]]]


class VmasGraphs:
    """The graphs of a step and of a partial reset, which replace VMAS's own step and reset of an environment.

    A step of VMAS calls more than a thousand operations on small tensors from Python, and VMAS resets environments one
    by one. Here a whole step (actions, physics, rewards, observations, done flags) is traced into one graph, whose
    inputs and outputs are the actions and all tensors that the scenario and its world hold; ``torch.compile`` fuses the
    graph into a few loops. A reset of part of the batch is traced in the same way; the random numbers that VMAS draws
    for each environment are further inputs.

    **Equal to VMAS.** The graphs hold VMAS's own operations, so that results differ by rounding alone. A graph
    recomputes every decision that Python took from a tensor while the step was traced; if one comes out differently,
    the step falls back to VMAS. Collisions that VMAS skips because the bodies are far apart in the whole batch are
    computed, and used only where VMAS would compute them. VMAS repeats the first 32 steps and steps 64, 128, 256, ...
    from the same state as a check; resets likewise. If results differ, or a step cannot be traced (because it draws
    random numbers, for example), a warning gives the reason and the environment falls back to VMAS for good.

    Args:
        env: the environment.
        compile_step: compiles the graph of a step. The function that it returns may compute more than the graph, but
            takes the same arguments (actions, tensors of the state) and returns the same results: whether the graph is
            valid, the entries ``module.meta["keys"]``, and tensors of the state.
        compile_reset: compiles the graph of a reset, whose first argument is the mask of environments.
    """

    def __init__(self, env: VmasEnv, *, compile_step: Compiler, compile_reset: Compiler) -> None:
        self.env, self.refused = env, set[str]()
        self._compile_step, self._compile_reset = compile_step, compile_reset
        self._step_graph: _Graph | None = None
        self._reset_graph: _Graph | None = None
        self._draws: _Draws | None = None

    @torch.no_grad()
    def try_step(
        self, actions: Sequence[Tensor], step_as_vmas: Callable[[], TensorDictBase]
    ) -> Sequence[Tensor] | None:
        """Take a step and return its entries; return ``None`` if the step has to fall back to VMAS."""
        self.trace_step(actions)
        if self._step_graph is None or "step" in self.refused:
            return None
        try:
            return self._step_graph.run(actions, step_as_vmas)
        except _RefusedError as reason:
            return self._refuse("step", reason)

    def trace_step(self, actions: Sequence[Tensor]) -> None:
        """Trace a step from the environment's current state, which stays unchanged."""
        if self._step_graph is not None or "step" in self.refused:
            return
        acting = self.env.full_action_spec.zero()

        def step(*actions: Tensor) -> TensorDictBase:
            return VmasEnv._step(self.env, acting.update(dict(zip(self.env.action_keys, actions, strict=True))))

        try:
            self._step_graph = _Graph(self.env, step, actions, self._compile_step)
        except _RefusedError as reason:
            self._refuse("step", reason)

    @torch.no_grad()
    def try_reset(self, mask: Tensor) -> Sequence[Tensor] | None:
        """Reset the environments of a mask, ``[B, 1]``, and return the entries of all; ``None`` falls back to VMAS."""
        if "reset" in self.refused or mask.all():
            return None
        stream = self.env._env.vmas_random_state
        before = list(stream)

        def reset_as_vmas() -> TensorDictBase:
            stream[:] = before
            return VmasEnv._reset(self.env, TensorDict({"_reset": mask}, batch_size=self.env.batch_size))

        try:
            if self._reset_graph is None or self._draws is None:
                self._draws = _recorded_draws(self.env)
                first = torch.arange(self.env.num_envs, device=mask.device) == 0
                inputs = [first, *self._draws.of_all(self.env.num_envs)]
                self._reset_graph = _Graph(self.env, self._reset_where, inputs, self._compile_reset)
            draws = self._draws.again(mask.flatten(), stream)
            after = list(stream)
            outputs = self._reset_graph.run([mask.flatten(), *draws], reset_as_vmas)
        except _RefusedError as reason:
            stream[:] = before
            return self._refuse("reset", reason)
        stream[:] = before if outputs is None else after
        return outputs

    def find_state(self) -> None:
        """Locate the state's tensors again after VMAS has reset the environment."""
        for name, graph in (("step", self._step_graph), ("reset", self._reset_graph)):
            try:
                if graph is not None and name not in self.refused:
                    graph.find_state()
            except _RefusedError as reason:
                self._refuse(name, reason)

    def hold(self) -> Callable[[], None]:
        """Return a function that restores the environment's present state."""
        state = _State(self.env)
        return partial(state.restore, [value.clone() for value in state.read()], state.settings())

    def load(self, env: VmasEnv, rows: Tensor) -> None:
        """Take over the state of some copies of another batch of the same scenario."""
        theirs = {path: box[key] for path, (box, key) in _State(env).places.items()}
        for path, (box, key) in _State(self.env).places.items():
            if path in theirs:  # others are created by the first step
                value = theirs[path]
                box[key] = value.clone() if value.shape == box[key].shape else value[rows]

    def _reset_where(self, mask: Tensor, *draws: Tensor) -> TensorDictBase:
        """Reset the whole batch with given draws, and keep the result only where the mask is set."""
        vmas, state = self.env._env, _State(self.env)
        before = [value.clone() for value in state.read()]
        with _Draws(draws):
            vmas.scenario.env_reset_world_at(None)
        vmas.steps = torch.zeros_like(vmas.steps)
        state.find()
        after = state.read()
        if len(before) != len(after):
            raise _RefusedError("a reset changes the number of its tensors")
        state.write([_choose_rows(mask, *pair) for pair in zip(after, before, strict=True)])
        vmas.reset = lambda **_: None  # for VmasEnv's reset, which also reads the observations
        try:
            return VmasEnv._reset(self.env)
        finally:
            del vmas.reset

    def _refuse(self, name: str, reason: _RefusedError) -> None:
        self.refused.add(name)
        warnings.warn(f"The {name} of {self.env.scenario_name!r} falls back to VMAS: {reason}.", stacklevel=3)


class _RefusedError(Exception):
    """Raised for a step or reset that cannot be compiled; the message gives the reason."""


class _State:
    """Where a VMAS environment keeps its tensors and plain values: container and key by path."""

    places: dict[str, tuple[Any, Any]]  # of tensors
    _plain: dict[str, tuple[Any, Any]]

    def __init__(self, env: VmasEnv) -> None:
        self._root = env._env
        scenario = type(env.scenario).__module__
        self._modules = {"vmas", "", scenario.partition(".")[0]}  # VMAS loads its scenarios without a name
        self.find()

    def find(self) -> None:
        self.places, self._plain, self._seen = {}, {}, set()
        for name in _ROOTS:
            self._visit(name, vars(self._root), name)

    def read(self) -> list[Tensor]:
        return [box[key] for box, key in self.places.values()]

    def settings(self) -> dict[str, object]:
        return {path: box[key] for path, (box, key) in self._plain.items()}

    def write(self, values: Sequence[Tensor]) -> None:
        for (box, key), value in zip(self.places.values(), values, strict=True):
            box[key] = value

    def restore(self, tensors: Sequence[Tensor], settings: Mapping[str, object]) -> None:
        """Restore what ``read`` and ``settings`` returned; entries created since then stay."""
        old = dict(zip(self.places, tensors, strict=True))
        self.find()
        for places, values in ((self.places, old), (self._plain, settings)):
            for path in places.keys() & values.keys():
                box, key = places[path]
                box[key] = values[path]

    def _visit(self, path: str, box: Any, key: Any) -> None:
        value = box[key]
        if isinstance(value, Tensor):
            self.places[path] = box, key
        elif isinstance(value, (bool, int, float, str, NoneType)):
            self._plain[path] = box, key
        elif id(value) not in self._seen:
            self._seen.add(id(value))
            for name, *place in self._parts(value):
                self._visit(f"{path}{name}", *place)

    def _parts(self, value: Any) -> Iterator[tuple[str, Any, Any]]:
        """Yield name, container and key of a value's parts; tuples are immutable, so only objects in them count."""
        if isinstance(value, list):
            yield from ((f"[{index}]", value, index) for index in range(len(value)))
        elif isinstance(value, dict):
            yield from ((f"[{index}]", value, key) for index, key in enumerate(value))
        elif isinstance(value, tuple):
            yield from ((f"[{i}]", value, i) for i, part in enumerate(value) if self._is_object(part))
        elif self._is_object(value):
            parts = vars(value)
            yield from ((f".{name}", parts, name) for name in parts if name not in _OF_A_STEP)

    def _is_object(self, value: Any) -> bool:
        return type(value).__module__.partition(".")[0] in self._modules


class _Graph:
    """One step or reset, traced and compiled.

    Args:
        env: the environment, in the state to trace from, which stays unchanged.
        function: the function to trace; it computes data from tensors and changes the environment's state.
        inputs: example inputs.
        compiler: see :class:`VmasGraphs`.

    Raises:
        _RefusedError: if the function does more than compute tensors from tensors.
    """

    def __init__(
        self, env: VmasEnv, function: Callable[..., TensorDictBase], inputs: Sequence[Tensor], compiler: Compiler
    ) -> None:
        self._env, self._state, self._runs, self._misses = env, _State(env), 0, 0
        start = _State(env)
        before, settings = start.read(), start.settings()
        try:
            with preserve_random_state():  # a step of VMAS that is interrupted leaves its own behind
                self._state.write([value.clone() for value in before])
                function(*inputs)  # the first step of all creates some attributes
                self._state.find()
                self._paths, self._settings = list(self._state.places), self._state.settings()
                module = self._trace(env, function, inputs)
        finally:
            start.restore(before, settings)
            self._state.find()
        _check_operations(module)
        self._used = _drop_unused_inputs(module, len(inputs))
        module.meta["keys"] = self._keys
        self._compiled = compiler(module)

    def run(self, inputs: Sequence[Tensor], reference: Callable[[], TensorDictBase]) -> Sequence[Tensor] | None:
        """Run the graph, update the state and return the data's entries; ``None`` if a decision came out differently.

        Args:
            inputs: inputs of the function.
            reference: VMAS's own step or reset, for checks.

        Raises:
            _RefusedError: with the state unchanged, if results differ or decisions come out differently too often.
        """
        before = self._state.read()
        everything = [*inputs, *before]
        valid, *results = self._compiled(*(everything[index] for index in self._used))
        outputs, after = results[: len(self._keys)], results[len(self._keys) :]
        self._runs += 1
        if not valid:
            self._misses += 1
            if self._misses > _MAX_MISSES * max(self._runs, _DENSE_CHECKS):
                raise _RefusedError("its control flow depends too often on tensor values")
            return None
        if self._runs <= _DENSE_CHECKS or self._runs.bit_count() == 1:
            self._check(before, outputs, after, reference)
        places = list(self._state.places.values())
        for index, value in zip(self._changed, after, strict=True):
            box, key = places[index]
            box[key] = value
        return outputs

    def find_state(self) -> None:
        """Locate the state's tensors again after a reset.

        Raises:
            _RefusedError: if the reset changed more than tensors: everything else is a constant of the graph.
        """
        self._state.find()
        self._compare_settings(self._state)

    def _check(
        self,
        before: Sequence[Tensor],
        outputs: Sequence[Tensor],
        after: Sequence[Tensor],
        reference: Callable[[], TensorDictBase],
    ) -> None:
        self._state.write([value.clone() for value in before])
        expected, now = reference(), _State(self._env)
        true = dict(zip(now.places, now.read(), strict=True))
        self._state.restore(before, self._settings)
        if list(true) != self._paths:
            raise _RefusedError("the number of its tensors changes")
        state = list(before)
        for index, value in zip(self._changed, after, strict=True):
            state[index] = value
        pairs = [(key, value, expected[key]) for key, value in zip(self._keys, outputs, strict=True)]
        pairs += [(path, value, true[path]) for path, value in zip(self._paths, state, strict=True)]
        different = [str(name) for name, value, wanted in pairs if not _close(value, wanted)]
        if different:
            raise _RefusedError(f"compiled, it differs in {', '.join(different)} (run {self._runs})")

    def _compare_settings(self, state: _State) -> None:
        now = state.settings()
        changed = [path for path, value in self._settings.items() if now.get(path, value) != value]
        if changed or list(state.places) != self._paths:
            raise _RefusedError(f"it changes {', '.join(changed) or 'the number of its tensors'}")

    def _trace(self, env: VmasEnv, function: Callable[..., TensorDictBase], inputs: Sequence[Tensor]) -> GraphModule:
        def traced(*everything: Tensor) -> list[Tensor]:
            copies = [value.clone() for value in everything[len(inputs) :]]
            self._state.write(copies)
            with _Tracer(env.world) as tracer:
                data = function(*everything[: len(inputs)])
                decisions = tracer.finish()
            state = _State(env)
            self._compare_settings(state)
            self._keys = list(data.keys(True, True))
            after = state.read()
            pairs = enumerate(zip(copies, after, strict=True))
            self._changed = [index for index, (copy, value) in pairs if value is not copy or copy._version]
            valid = torch.stack(decisions).all() if decisions else torch.ones((), dtype=torch.bool)
            return [valid, *(data[key] for key in self._keys), *(after[index] for index in self._changed)]

        return make_fx(traced)(*inputs, *self._state.read())


class _Draws(TorchDispatchMode):
    """Records the random numbers that a reset draws, or replaces them by given ones."""

    def __init__(self, given: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self._given = None if given is None else iter(given)
        self.calls: list[tuple[Callable[[], Tensor], Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        in_place = func._schema.is_mutable
        if self._given is None:
            drawn = func(*args, **kwargs)
            if not drawn.ndim or len(drawn) != 1:
                raise _RefusedError(f"it draws numbers of shape {list(drawn.shape)} for one environment")
            like = torch.empty_like(drawn)
            self.calls.append(
                (lambda: func(*((like.clone(), *args[1:]) if in_place else args), **kwargs), drawn.clone())
            )
            return drawn
        drawn = next(self._given, None)
        if drawn is None:
            raise _RefusedError("the number of its random draws depends on the drawn values")
        return args[0].copy_(drawn) if in_place else drawn.clone()

    def of_all(self, num_envs: int) -> list[Tensor]:
        """Return the recorded numbers, repeated for every environment."""
        return [drawn.expand(num_envs, *drawn.shape[1:]).clone() for _, drawn in self.calls]

    def again(self, mask: Tensor, stream: list[Any]) -> list[Tensor]:
        """Draw for each environment of the mask in turn, as VMAS does; the others get the first one's numbers."""
        order = (mask.cumsum(0) - 1).clamp(min=0)
        process = torch.get_rng_state()
        torch.set_rng_state(stream[0])
        try:
            drawn = [[call() for call, _ in self.calls] for _ in range(int(mask.sum()))]
            stream[0] = torch.get_rng_state()
        finally:
            torch.set_rng_state(process)
        return [torch.cat(rows)[order] for rows in zip(*drawn, strict=True)]


def _recorded_draws(env: VmasEnv) -> _Draws:
    """The draws of one reset: the fewest of eight tries, since scenarios may draw until a place is free."""
    state = _State(env)
    before, recorded = state.read(), []
    with preserve_random_state():
        try:
            for _ in range(8):
                state.write([value.clone() for value in before])
                with _Draws() as draws:
                    env._env.reset_at(0, return_observations=False)
                recorded.append(draws)
                state.find()
        finally:
            state.write(before)
    return min(recorded, key=lambda draws: len(draws.calls))


def _choose_rows(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    if new.shape[:1] != mask.shape:
        return old
    return torch.where(mask.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _check_operations(module: GraphModule) -> None:
    for node in module.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise _RefusedError(f"it draws random numbers ({node.target})")
        if torch.Tag.dynamic_output_shape in tags and node.target is not torch.ops.aten.index.Tensor:
            raise _RefusedError(f"the size of a tensor depends on the values of another one ({node.target})")


class _Tracer(TorchFunctionMode):
    """Makes a step of VMAS traceable.

    * A value that Python reads from a tensor becomes a decision, which the graph repeats.
    * ``x[mask] += y[mask]`` becomes a choice between two values for every row.
    * A pair of bodies that could collide is computed; whether it is near enough in any environment chooses the result.
    """

    def __init__(self, world: Any) -> None:
        super().__init__()
        self._world = world
        self._decisions: list[Tensor] = []
        self._selections: dict[int, tuple[Tensor, Tensor]] = {}  # all rows, and the mask
        self._asked: frozenset[str] | None = None
        self._near: dict[frozenset[str], Tensor] = {}
        self._joints = {frozenset({joint.entity_a.name, joint.entity_b.name}) for joint in world.joints}
        self._joints_to_come: set[frozenset[str]] = set()

    def __enter__(self) -> _Tracer:
        world = self._world
        self._world_collides, self._world_distance = world.collides, world.get_distance
        self._world_forces = world.update_env_forces
        world.collides, world.get_distance = self._collides, self._distance
        world.update_env_forces = self._forces
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for name in ("collides", "get_distance", "update_env_forces"):
            delattr(self._world, name)

    def finish(self) -> list[Tensor]:
        """Return for every decision whether it came out as it did while tracing."""
        if self._near:
            raise _RefusedError(f"it asks whether {' and '.join(next(iter(self._near)))} collide, not how far they are")
        return self._decisions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HOST_READS:
            return self._decide(func, args[0])
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            if _is_mask(args[1]):
                return (self._select if func is Tensor.__getitem__ else self._assign)(*args)
            if isinstance(args[1], tuple) and func is Tensor.__getitem__ and any(map(_is_mask, args[1])):
                raise _RefusedError("it takes rows and a column by a mask")
        if self._selections and any(id(arg) in self._selections for arg in args):
            return self._compute_rows(func, args)
        return func(*args, **(kwargs or {}))

    def _decide(self, func: Callable[[Tensor], Any], tensor: Tensor) -> Any:
        if self._asked is not None:
            self._near[self._asked] = tensor
            return True
        with disable_proxy_modes_tracing():
            value = func(tensor)
        self._decisions.append((tensor == torch.tensor(value)).all())
        return value

    def _select(self, values: Tensor, mask: Tensor) -> Tensor:
        return self._as_rows(values.clone(), mask)

    def _as_rows(self, values: Tensor, mask: Tensor) -> Tensor:
        self._selections[id(values)] = values, mask
        return values

    def _assign(self, values: Tensor, mask: Tensor, new: Any) -> None:
        if id(new) in self._selections:
            self._expect_equal(mask, self._selections[id(new)][1])
        elif isinstance(new, Tensor) and new.ndim > values.ndim - mask.ndim:
            raise _RefusedError("it writes one value for each row of a mask")
        mask = mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim))
        values.copy_(torch.where(mask, new, values))

    def _compute_rows(self, func: Any, args: Sequence[Any]) -> Tensor:
        if func.__name__.strip("_").removeprefix("i").removeprefix("r") not in _ROW_BY_ROW:
            raise _RefusedError(f"it computes with the rows of a mask ({func.__name__})")
        masks = [self._selections[id(arg)][1] for arg in args if id(arg) in self._selections]
        if any(isinstance(arg, Tensor) and arg.ndim and id(arg) not in self._selections for arg in args):
            raise _RefusedError(f"it computes with one value for each row of a mask ({func.__name__})")
        for mask in masks[1:]:
            self._expect_equal(masks[0], mask)
        return self._as_rows(func(*args), masks[0])

    def _expect_equal(self, mask: Tensor, other: Tensor) -> None:
        if mask is other:
            return
        with disable_proxy_modes_tracing():
            if not torch.equal(mask, other):
                raise _RefusedError("it moves rows from one mask to another")
        self._decisions.append((mask == other).all())

    def _collides(self, a: Any, b: Any) -> bool:
        self._asked = frozenset({a.name, b.name})
        if self._asked in self._near:
            raise _RefusedError(f"it asks whether {a.name} and {b.name} collide, not how far they are")
        try:
            answer = self._world_collides(a, b)
        finally:
            pair, self._asked = self._asked, None
        if pair in self._near and pair in self._joints:
            self._joints_to_come.add(pair)
        return answer

    def _forces(self, a: Any, force_a: Any, torque_a: Any, b: Any, force_b: Any, torque_b: Any) -> None:
        pair, near = frozenset({a.name, b.name}), None
        if pair in self._joints_to_come:  # a joint pulls at any distance; the collision of its bodies comes after it
            self._joints_to_come.remove(pair)
        else:
            near = self._near.pop(pair, None)

        def felt(effect: Any) -> Any:
            return effect if near is None or not isinstance(effect, Tensor) else torch.where(near, effect, 0.0)

        self._world_forces(a, felt(force_a), felt(torque_a), b, felt(force_b), felt(torque_b))

    def _distance(self, a: Any, b: Any, env_index: int | None = None) -> Tensor:
        distance = self._world_distance(a, b, env_index)
        near = self._near.pop(frozenset({a.name, b.name}), None)
        return distance if near is None else torch.where(near, distance, torch.inf)


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype is torch.bool


def _drop_unused_inputs(module: GraphModule, num_first: int) -> list[int]:
    """Keep only the first inputs and those that the graph uses; return their indices."""
    module.graph.eliminate_dead_code()
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    used = [index for index, node in enumerate(inputs) if node.users or index < num_first]
    for index in set(range(len(inputs))) - set(used):
        module.graph.erase_node(inputs[index])
    module.recompile()
    return used


def _close(value: Tensor, expected: Tensor) -> bool:
    """Return whether all but a few rows are equal up to rounding."""
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return False
    if value.is_floating_point():
        apart = ~torch.isclose(value, expected, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
    else:
        apart = value != expected
    rows = apart.reshape(len(apart), -1).any(-1) if apart.ndim else apart
    return bool(rows.float().mean() <= _MAX_ROWS)
