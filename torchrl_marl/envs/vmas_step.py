"""VMAS's step as one compiled graph, checked against VMAS itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import NoneType
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode
from torchrl.envs import VmasEnv

from torchrl_marl.envs.random_state import preserve_random_state

__all__ = ["CompiledVmasEnv"]

_ROOTS = ("scenario", "world", "steps")  # of VMAS's Environment: what a step reads and writes; the rest draws pictures
_OF_A_STEP = ("forces_dict", "torques_dict", "entity_index_map")  # the world builds these anew in each step
_HOST_READS = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist)
_ROW_BY_ROW = ("add", "sub", "mul", "div", "truediv", "neg")  # names of Tensor's methods, in any spelling
_DENSE_CHECKS = 32  # first steps, which are all checked
_TOLERANCE = 1e-3  # relative and absolute
_MAX_ROWS = 0.02  # share of environments that may differ by more: rounding decides whether a contact or a goal is there
_MAX_MISSES = 0.25  # share of steps left to VMAS beyond which there is nothing to gain


class CompiledVmasEnv(VmasEnv):
    """A :class:`~torchrl.envs.VmasEnv` whose step is traced once and compiled; its arguments are ``VmasEnv``'s.

    A step of VMAS is a thousand and more operations on small tensors, called one by one from Python. Here one step with
    everything that belongs to it (actions, physics, rewards, observations, ends) is traced into one graph, whose inputs
    and outputs are the actions and all tensors that the scenario and its world hold; ``torch.compile`` makes a few
    loops of it. Resets are VMAS's own and draw from its random stream as ever.

    **Equal to VMAS.** The graph has VMAS's own operations: results differ by rounding alone. What Python decided from a
    tensor while the step was traced the graph computes again: where it comes out differently, VMAS does this step.
    Bodies that VMAS does not collide because they are far apart in the whole batch are computed, and the result is
    taken only where VMAS would. The first 32 steps, and steps 64, 128, 256, ..., VMAS does also, from the same state.
    If anything differs, or if a step cannot be traced (it draws random numbers, say), a warning says what, and the
    environment goes on with VMAS's step.

    The first step traces and compiles: up to a minute, seconds where an earlier process has compiled the same.
    """

    compiler: Callable[[GraphModule], Callable[..., list[Tensor]]] = partial(torch.compile, dynamic=False)
    """What compiles the graph."""

    _graph: _Graph | None = None
    _refused = False
    _steps = 0
    _misses = 0

    def to(self, device: torch.device | str) -> CompiledVmasEnv:
        """Move the environment; the next step is traced anew."""
        self._graph = None
        return super().to(device)

    def _reset(self, tensordict: TensorDictBase | None = None, **options: Any) -> TensorDictBase:
        data = super()._reset(tensordict, **options)
        if self._graph is not None:
            try:
                self._graph.check_settings()
            except _RefusedError as reason:
                self._refuse(reason)
        return data

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        if not self._refused:
            try:
                return self._compiled_step(tensordict)
            except _RefusedError as reason:
                self._refuse(reason)
        return super()._step(tensordict)

    @torch.no_grad()
    def _compiled_step(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = [tensordict.get((group, "action")) for group in self.group_map]
        if self._graph is None:
            with preserve_random_state():  # a step of VMAS that is interrupted leaves its own behind
                self._graph = _Graph(self, super()._step, tensordict.select(*self.action_keys))
        graph, before = self._graph, self._graph.state.read()
        self._steps += 1
        valid, outputs, after = graph(actions, before)
        if not valid:
            self._misses += 1
            if self._misses > _MAX_MISSES * max(self._steps, _DENSE_CHECKS):
                raise _RefusedError("what it does depends too often on what its tensors hold")
            return super()._step(tensordict)
        if self._steps <= _DENSE_CHECKS or self._steps.bit_count() == 1:
            graph.state.write([value.clone() for value in before])
            expected = super()._step(tensordict)
            differences = graph.differences(outputs, after, expected)
            graph.state.write(before)
            if differences:
                raise _RefusedError(f"step {self._steps} differs from VMAS's: {', '.join(differences)}")
        graph.take(after)
        return graph.data(outputs)

    def _refuse(self, reason: _RefusedError) -> None:
        self._refused, self._graph = True, None
        name = self.scenario_name
        warnings.warn(f"The step of {name!r} is not compiled, it goes on as VMAS does it: {reason}.", stacklevel=2)


class _RefusedError(Exception):
    """A step that cannot be compiled; the message says why."""


class _State:
    """The places of all tensors that a VMAS environment holds, by their paths, and its plain Python values."""

    def __init__(self, env: VmasEnv) -> None:
        self._root = env._env
        self.find()

    def find(self) -> None:
        self.places: dict[str, tuple[Any, Any]] = {}
        self.settings: dict[str, object] = {}
        self._seen: set[int] = set()
        for name in _ROOTS:
            self._visit(name, vars(self._root), name)

    def read(self) -> list[Tensor]:
        return [box[key] for box, key in self.places.values()]

    def write(self, values: Sequence[Tensor]) -> None:
        for (box, key), value in zip(self.places.values(), values, strict=True):
            box[key] = value

    def _visit(self, path: str, box: Any, key: Any) -> None:
        value = box[key]
        if isinstance(value, Tensor):
            if not isinstance(box, tuple):
                self.places[path] = box, key
        elif isinstance(value, (bool, int, float, str, NoneType)):
            self.settings[path] = value
        elif id(value) not in self._seen:
            self._seen.add(id(value))
            if isinstance(value, (list, tuple)):
                self.settings[path] = len(value)
                for index in range(len(value)):
                    self._visit(f"{path}[{index}]", value, index)
            elif isinstance(value, dict):
                for index, name in enumerate(value):
                    self._visit(f"{path}[{index}]", value, name)
            elif type(value).__module__.partition(".")[0] in ("vmas", ""):  # VMAS loads scenarios without a name
                for name in vars(value):
                    if name not in _OF_A_STEP:
                        self._visit(f"{path}.{name}", vars(value), name)


class _Graph:
    """One step of VMAS, traced and compiled.

    Args:
        env: at the state to trace from, which stays as it is.
        step: VMAS's.
        tensordict: actions to trace with.

    Raises:
        _RefusedError: if the step does more than to compute tensors from tensors.
    """

    def __init__(
        self, env: CompiledVmasEnv, step: Callable[[TensorDictBase], TensorDictBase], tensordict: TensorDictBase
    ) -> None:
        self.state = _State(env)
        before = dict(zip(self.state.places, self.state.read(), strict=True))
        try:
            self.state.write([value.clone() for value in before.values()])
            step(tensordict)  # the first step of all creates some attributes
            self.state.find()
            self._paths, self._settings = list(self.state.places), self.state.settings
            module = self._trace(env, step, tensordict)
        finally:
            self.state.find()
            for path, value in before.items():
                box, key = self.state.places[path]
                box[key] = value
        self._check_operations(module)
        self._inputs = _drop_unused_inputs(module)
        self._compiled = env.compiler(module)

    def __call__(self, actions: Sequence[Tensor], before: Sequence[Tensor]) -> tuple[bool, list[Tensor], list[Tensor]]:
        """Return whether Python would decide as it did while tracing, the step's data, and the changed state."""
        inputs = [*actions, *before]
        valid, *results = self._compiled(*(inputs[index] for index in self._inputs))
        return bool(valid), results[: len(self._keys)], results[len(self._keys) :]

    def data(self, outputs: Sequence[Tensor]) -> TensorDictBase:
        data = self._template.copy()
        for key, value in zip(self._keys, outputs, strict=True):
            data.set(key, value)
        return data

    def take(self, after: Sequence[Tensor]) -> None:
        """Put the changed state into its places."""
        places = list(self.state.places.values())
        for index, value in zip(self._changed, after, strict=True):
            box, key = places[index]
            box[key] = value

    def differences(self, outputs: Sequence[Tensor], after: Sequence[Tensor], expected: TensorDictBase) -> list[str]:
        """Name what differs from the expected data and from the state that the environment has now."""
        state = self.state.read()
        pairs = [(str(key), value, expected[key]) for key, value in zip(self._keys, outputs, strict=True)]
        pairs += [
            (self._paths[index], value, state[index]) for index, value in zip(self._changed, after, strict=True)
        ]
        return [name for name, value, true in pairs if not _close(value, true)]

    def check_settings(self) -> None:
        """Find the state's places again, after a reset.

        Raises:
            _RefusedError: if a reset changes more than tensors, as the graph has everything else as a constant.
        """
        self.state.find()
        self._compare_settings(self.state, "reset")

    def _compare_settings(self, state: _State, what: str) -> None:
        changed = [path for path, value in self._settings.items() if state.settings.get(path, value) != value]
        if changed or list(state.places) != self._paths:
            named = ", ".join(changed) or "the number of its tensors"
            raise _RefusedError(f"a {what} changes {named}")

    def _trace(
        self, env: CompiledVmasEnv, step: Callable[[TensorDictBase], TensorDictBase], tensordict: TensorDictBase
    ) -> GraphModule:
        groups = list(env.group_map)

        def traced(*inputs: Tensor) -> list[Tensor]:
            copies = [value.clone() for value in inputs[len(groups) :]]
            self.state.write(copies)
            data = tensordict.copy()
            for group, action in zip(groups, inputs, strict=False):
                data.set((group, "action"), action)
            with _Tracer(env.world) as tracer:
                data = step(data)
                decisions = tracer.finish()
            after = _State(env)
            self._compare_settings(after, "step")
            self._template, self._keys = data.empty(recurse=True), list(data.keys(True, True))
            values = after.read()
            self._changed = [
                index
                for index, (copy, value) in enumerate(zip(copies, values, strict=True))
                if value is not copy or copy._version
            ]
            valid = torch.stack(decisions).all() if decisions else torch.ones((), dtype=torch.bool)
            return [valid, *(data[key] for key in self._keys), *(values[index] for index in self._changed)]

        return make_fx(traced)(*(tensordict[group, "action"] for group in groups), *self.state.read())

    @staticmethod
    def _check_operations(module: GraphModule) -> None:
        for node in module.graph.nodes:
            tags = getattr(node.target, "tags", ())
            if torch.Tag.nondeterministic_seeded in tags:
                raise _RefusedError(f"a step draws random numbers ({node.target})")
            if torch.Tag.dynamic_output_shape in tags and node.target is not torch.ops.aten.index.Tensor:
                raise _RefusedError(f"the size of a tensor depends on what another one holds ({node.target})")


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
        """Return for every decision whether it would be taken again."""
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

    def _forces(self, a: Any, force_a: Tensor, torque_a: Any, b: Any, force_b: Tensor, torque_b: Any) -> None:
        pair = frozenset({a.name, b.name})
        near = None
        if pair in self._joints_to_come:  # a joint pulls at any distance; the collision of its bodies comes after it
            self._joints_to_come.remove(pair)
        else:
            near = self._near.pop(pair, None)
        effects = force_a, torque_a, force_b, torque_b
        if near is not None:
            effects = tuple(near * effect for effect in effects)
        force_a, torque_a, force_b, torque_b = effects
        self._world_forces(a, force_a, torque_a, b, force_b, torque_b)

    def _distance(self, a: Any, b: Any, env_index: int | None = None) -> Tensor:
        distance = self._world_distance(a, b, env_index)
        near = self._near.pop(frozenset({a.name, b.name}), None)
        return distance if near is None else torch.where(near, distance, torch.inf)


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype is torch.bool


def _drop_unused_inputs(module: GraphModule) -> list[int]:
    """Leave only the inputs that something is computed from; return their numbers."""
    module.graph.eliminate_dead_code()
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    used = [index for index, node in enumerate(inputs) if node.users]
    for index in set(range(len(inputs))) - set(used):
        module.graph.erase_node(inputs[index])
    module.recompile()
    return used


def _close(value: Tensor, expected: Tensor) -> bool:
    """Whether all but a few rows are equal up to rounding."""
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return False
    if value.is_floating_point():
        apart = ~torch.isclose(value, expected, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
    else:
        apart = value != expected
    rows = apart.reshape(len(apart), -1).any(-1) if apart.ndim else apart
    return bool(rows.float().mean() <= _MAX_ROWS)
