"""The update of a training loop: one gradient step as a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, NoneType
from typing import Any, cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.adam import adam

from torchrl_marl.compilation import GUARDLESS_OPTIONS, INDUCTOR_OPTIONS, compile_whole, or_uncompiled
from torchrl_marl.distributed import average_gradients, broadcast_state, world_size
from torchrl_marl.objectives import RatioLoss

__all__ = ["make_update"]

_Groups = Mapping[str, Sequence[nn.Parameter]]
_Differentiate = Callable[[TensorDictBase], dict[str, Tensor]]
_OPTIONS: dict[str, Any] = {
    **INDUCTOR_OPTIONS,
    "guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe,  # guards on globals take a fifth of a small step
}


def make_update(
    loss: RatioLoss, optimizer: Optimizer, *, max_grad_norm: float, compile: bool = False
) -> Callable[[TensorDictBase], dict[str, Tensor]]:
    """Build the gradient step of a loss.

    Processes started by torchrun average their gradients with equal weights and start with the parameters of the first
    process. Phases without an optimiser (``loss.takes_steps``) call ``loss.step``.

    The update does not synchronise with an accelerator. With ``compile``, the loss, its gradients, their norm and
    Adam's step are one graph; other optimisers take their step in Python. Agents that learn in turn
    (``loss.trained``) share a graph. The first step of an Adam without a state of what is trained runs uncompiled and
    creates the state; parameters without a gradient in that step stay as they are. Noise is drawn from Torch's
    generator, as without compilation.

    Args:
        loss: the loss; gradients are those of the sum of all its entries ``loss_*``.
        optimizer: optimiser of the loss's parameters.
        max_grad_norm: maximum gradient norm of each of ``loss.gradient_groups()``; infinity for no limit.
        compile: whether to compile the loss.

    Returns:
        ``update(minibatch)``, which takes a step and returns the outputs of the loss and the gradient norms before
        clipping, such as ``grad_norm``, all detached.

    Raises:
        ValueError: if ``max_grad_norm`` is not above 0.

    Example:
        >>> from torchrl_marl.collectors import minibatches
        >>> from torchrl_marl.envs import make_coordsum
        >>> from torchrl_marl.modules import make_actor, make_critic
        >>> from torchrl_marl.objectives import MAPPOLoss
        >>> env = make_coordsum("CoordSum-3x10", num_envs=4, seed=0)
        >>> loss = MAPPOLoss(actor := make_actor(env), make_critic(env), functional=False)
        >>> _ = loss.make_value_estimator(gamma=0.99, lmbda=0.95)
        >>> with torch.no_grad():
        ...     rows = loss.value_estimator(env.rollout(5, actor)).reshape(-1)
        >>> optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3, fused=True)
        >>> update = make_update(loss, optimizer, max_grad_norm=0.5)
        >>> measured = [update(minibatch) for minibatch in minibatches(rows, 10)]
        >>> measured[0]["grad_norm"] > 0
        tensor(True)
    """
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be a number above 0 (inf: no limit); got {max_grad_norm}.")
    broadcast_state(loss)
    groups, objective = loss.gradient_groups(), _Objective(loss, loss)
    compiled = _CompiledUpdate(loss, groups, max_grad_norm, optimizer) if compile and _replaceable(loss) else None
    differentiate = _backward(objective, groups, max_grad_norm, compile=compile and compiled is None)

    def update(minibatch: TensorDictBase) -> dict[str, Tensor]:
        if loss.takes_steps:
            return dict(loss.step(minibatch).items())
        part = None if compiled is None else compiled.part()
        if compiled is not None and part is not None:
            measured = compiled(part, minibatch)
            if compiled.takes_steps:
                return measured
        else:
            measured = differentiate(minibatch)
        optimizer.step()
        optimizer.zero_grad()
        return measured

    return update


def _backward(objective: _Objective, groups: _Groups, max_grad_norm: float, *, compile: bool) -> _Differentiate:
    """Back-propagate; parameters that do not affect the loss have no gradient."""
    parameters = list(objective.parameters())
    compiled = torch.compile(objective, dynamic=False, options=_OPTIONS) if compile else objective
    evaluate = or_uncompiled(compiled, objective)

    def differentiate(minibatch: TensorDictBase) -> dict[str, Tensor]:
        total, measured = evaluate(minibatch)
        total.backward()
        average_gradients(parameters)
        for name, group in groups.items():
            if any(parameter.grad is not None for parameter in group):
                measured[name] = nn.utils.clip_grad_norm_(group, max_grad_norm)
        return measured

    return differentiate


class _Part:
    """What a phase trains, under names that graphs know it by: those of all agents that take turns are alike."""

    def __init__(self, loss: RatioLoss, trained: nn.Module, groups: _Groups, optimizer: Optimizer | None) -> None:
        self.objective = _Objective(loss, trained)
        parameters = self.objective.named_parameters()  # each under its first name, which is that within the part
        self.parameters = {
            name: parameter for name, parameter in parameters if parameter.requires_grad and name.startswith("trained.")
        }
        self._buffers = [
            (name, self.objective.get_submodule(owner), key)
            for name, _ in self.objective.named_buffers()
            for owner, _, key in [name.rpartition(".")]
        ]
        name_of = {id(parameter): name for name, parameter in self.parameters.items()}
        names_of = {norm: [name_of[id(p)] for p in group if id(p) in name_of] for norm, group in groups.items()}
        self.names_of = {norm: names for norm, names in names_of.items() if names}
        self.step = None if optimizer is None else _AdamStep(optimizer, name_of)

    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the part and of the loss: of now, since some are replaced by others."""
        return {name: getattr(owner, key) for name, owner, key in self._buffers}


class _CompiledUpdate:
    """The results of ``_backward`` and Adam's step, from one graph for each kind of part and of minibatch.

    Dynamo's guards would take a tenth of a small step. In their place stand the names of the part's parameters, the
    shapes of buffers, the entries and the size of the minibatch, and the settings of the loss and of the optimiser.
    """

    def __init__(self, loss: RatioLoss, groups: _Groups, max_grad_norm: float, optimizer: Optimizer) -> None:
        self.takes_steps = _is_plain_adam(optimizer)
        self._loss, self._groups, self._max_grad_norm, self._optimizer = loss, groups, max_grad_norm, optimizer
        self._moves_buffers = any(getattr(module, "moves_buffers", False) for module in loss.modules())
        self._parts: dict[int, _Part] = {}
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def part(self) -> _Part | None:
        """What the current phase trains, once the optimiser has a state of it where the graph takes its step."""
        trained = cast("nn.Module", self._loss.trained)
        if id(trained) not in self._parts:
            optimizer = self._optimizer if self.takes_steps else None
            self._parts[id(trained)] = _Part(self._loss, trained, self._groups, optimizer)
        part, state = self._parts[id(trained)], self._optimizer.state
        return part if not self.takes_steps or any(p in state for p in part.parameters.values()) else None

    @torch.no_grad()
    def __call__(self, part: _Part, minibatch: TensorDictBase) -> dict[str, Tensor]:
        """Return what is measured; without Adam's step, leave the gradients in the parameters."""
        buffers = part.buffers()
        case = *part.parameters, *(buffer.shape for buffer in buffers.values())
        case += minibatch.batch_size, *minibatch.keys(True, True), *_settings(self._loss)
        case += () if part.step is None else tuple(part.step.settings())
        if case not in self._compiled:
            self._compiled[case] = compile_whole(self._function(), **GUARDLESS_OPTIONS)
        state = [] if part.step is None else part.step.state()
        self._current = part
        found, moved, measured = self._compiled[case](minibatch, part.parameters, buffers, state)
        for name, buffer in moved.items():
            buffers[name].copy_(buffer)  # AOTAutograd loses such a write within the graph
        for name, gradient in found.items():
            part.parameters[name].grad = gradient
        return measured

    def _function(self) -> FunctionType:
        """What is compiled. All tensors are arguments: the graph of the part that was traced serves all of its kind."""

        def gradients(
            minibatch: TensorDictBase, parameters: dict[str, Tensor], buffers: dict[str, Tensor], state: list[Any]
        ) -> tuple[dict[str, Tensor], ...]:
            part, moves_buffers = self._current, self._moves_buffers

            def evaluate(values: dict[str, Tensor], held: dict[str, Tensor]) -> tuple[Tensor, Any]:
                if moves_buffers:
                    held = {name: buffer.clone() for name, buffer in held.items()}  # torch.func lets none be moved
                total, measured = functional_call(part.objective, {**values, **held}, (minibatch,), tie_weights=False)
                return total, (measured, held if moves_buffers else {})

            values = {name: parameter.detach() for name, parameter in parameters.items()}
            found, (_, (measured, moved)) = grad_and_value(evaluate, has_aux=True)(values, buffers)
            clipped, norms = {}, {}
            for norm, names in part.names_of.items():
                norms[norm] = nn.utils.get_total_norm([found[name] for name in names], foreach=False)
                scale = (self._max_grad_norm / (norms[norm] + 1e-6)).clamp(max=1.0)  # as in clip_grad_norm_
                clipped |= {name: scale * found[name] for name in names}
            if part.step is not None:
                part.step(values, clipped, state)
                clipped = {}
            return clipped, moved, {**measured, **norms}

        return gradients


class _AdamStep:
    """Adam's step for a graph: Torch's function, with moments and learning rates as arguments of the graph."""

    def __init__(self, optimizer: Optimizer, name_of: Mapping[int, str]) -> None:
        self._optimizer = optimizer
        self._groups = [
            {name_of[id(p)]: p for p in group["params"] if id(p) in name_of} for group in optimizer.param_groups
        ]
        self._rates = [
            torch.full((), group["lr"], device=group["params"][0].device) for group in optimizer.param_groups
        ]
        self._written = [group["lr"] for group in optimizer.param_groups]

    def settings(self) -> list[Any]:
        """Constants of the graph: values of each group, and its parameters with a state."""
        names = "eps", "weight_decay", "maximize", "decoupled_weight_decay"
        groups, state = self._optimizer.param_groups, self._optimizer.state
        self._settings = [(*group["betas"], *(group[name] for name in names)) for group in groups]
        self._groups = [{name: p for name, p in own.items() if p in state} for own in self._groups]
        return [*self._settings, *map(tuple, self._groups)]

    def state(self) -> list[Any]:
        """Learning rate and moments of each group."""
        for index, group in enumerate(self._optimizer.param_groups):  # other objects after load_state_dict
            if group["lr"] != self._written[index]:
                self._written[index] = group["lr"]
                self._rates[index].fill_(group["lr"])
        state, names = self._optimizer.state, ("exp_avg", "exp_avg_sq", "step")
        return [
            (rate, *([state[p][name] for p in own.values()] for name in names))
            for rate, own in zip(self._rates, self._groups, strict=True)
        ]

    def __call__(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor], state: list[Any]) -> None:
        """Move the values and the state in place."""
        compiling = torch.compiler.is_compiling()
        names = "beta1", "beta2", "eps", "weight_decay", "maximize", "decoupled_weight_decay"
        # not the optimiser's groups: Dynamo would hold their parameters, of all agents those that it was traced with
        groups = zip(self._written, self._groups, self._settings, state, strict=True)
        for written, own, settings, (rate, moments, squares, steps) in groups:
            if not own:  # a group of another part
                continue
            adam(
                [values[name] for name in own],
                [gradients[name] for name in own],
                moments,
                squares,
                [],
                steps,
                foreach=True,
                capturable=compiling,  # without a host's wait for the number of steps
                lr=rate if compiling else written,
                amsgrad=False,
                **dict(zip(names, settings, strict=True)),
            )


def _is_plain_adam(optimizer: Optimizer) -> bool:
    """Whether the optimiser is Adam in a form that :class:`_AdamStep` can take."""
    return type(optimizer) in (Adam, AdamW) and not any(
        group["amsgrad"]
        or group["differentiable"]
        or isinstance(group["lr"], Tensor)
        or (group["params"][0].is_cuda and not group["fused"])  # which counts steps on the CPU
        for group in optimizer.param_groups
    )


def _settings(loss: RatioLoss) -> list[tuple[str, object]]:
    """What of a loss is no tensor and may be assigned to: its graph takes them as they are."""
    return [
        (name, value) for name, value in vars(loss).items() if isinstance(value, bool | float | str | tuple | NoneType)
    ]


class _Objective(nn.Module):
    """The sum of a loss's entries ``loss_*``, and all its outputs."""

    def __init__(self, loss: RatioLoss, trained: nn.Module) -> None:
        super().__init__()
        self.trained, self.loss = trained, loss

    def forward(self, minibatch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.loss(minibatch)
        total = sum(value for name, value in losses.items() if name.startswith("loss_"))
        return cast("Tensor", total), dict(losses.detach().items())


def _replaceable(loss: RatioLoss) -> bool:
    """Whether the loss is a pure function of parameters that ``functional_call`` can replace."""
    modules = list(loss.modules())
    held = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    tied = len(held) > len(set(held))  # functional_call would replace only one of the tied parameters
    # Parameters that a phase does not train get gradients of zero from torch.func in place of none, with which
    # optimisers move them; and averages of gradients come before their norm
    foreign = any(isinstance(module, TensorDictParams) for module in modules)
    return not tied and not foreign and loss.trained is not None and world_size() == 1
