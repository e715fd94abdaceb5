"""The update of a training loop: one gradient step as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule, TensorDictParams
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from torchrl_marl.collectors.compiled import INDUCTOR_OPTIONS

__all__ = ["make_update"]

_OPTIONS: dict[str, Any] = {
    **INDUCTOR_OPTIONS,
    "guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe,  # those of libraries: a fifth of a small step
}


def make_update(
    loss: nn.Module, optimizer: Optimizer, *, max_grad_norm: float, compile: bool = False, cuda_graph: bool = False
) -> Callable[[TensorDictBase], dict[str, Tensor]]:
    """Build the gradient step of a loss.

    Nothing in it waits for an accelerator. Compiled, the loss, its gradients and their norm are one graph, and what is
    left to Python is the optimiser's step: take one with ``fused=True``. Noise is drawn from Torch's generator, as
    uncompiled.

    Args:
        loss: its gradients are those of the sum of all entries ``loss_*`` that it returns.
        optimizer: of the loss's parameters.
        max_grad_norm: the gradient is scaled down to this norm, over all parameters; infinity for no limit.
        compile: whether to compile the loss.
        cuda_graph: whether to record the whole step once as a CUDA graph, for minibatches of one size; the optimiser
            needs ``capturable=True``.

    Returns:
        ``update(minibatch)``: takes a step and returns what the loss measured, and ``grad_norm`` before clipping, all
        detached.

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
    _check_norm(max_grad_norm)
    objective = _Objective(loss)
    parameters = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}

    def differentiate(minibatch: TensorDictBase) -> dict[str, Tensor]:
        total, measured = objective(minibatch)
        total.backward()
        return {**measured, "grad_norm": torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)}

    def gradients(minibatch: TensorDictBase) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute what ``differentiate`` leaves in the parameters, as a function that compiles into one graph."""

        def evaluate(values: dict[str, Tensor]) -> tuple[Tensor, Any]:
            return functional_call(objective, values, (minibatch,), tie_weights=False)

        values = {name: parameter.detach() for name, parameter in parameters.items()}
        found, (_, measured) = grad_and_value(evaluate, has_aux=True)(values)
        grad_norm = torch.nn.utils.get_total_norm(found.values())
        scale = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ has it
        return {name: scale * gradient for name, gradient in found.items()}, {**measured, "grad_norm": grad_norm}

    def differentiate_at_once(minibatch: TensorDictBase) -> dict[str, Tensor]:
        found, measured = compute_gradients(minibatch)
        for name, gradient in found.items():
            parameters[name].grad = gradient
        return measured

    take_gradients, compute_gradients = differentiate, gradients
    if compile and _replaceable(objective):
        take_gradients = differentiate_at_once
        compute_gradients = torch.compile(gradients, fullgraph=True, options=_OPTIONS)
    elif compile:
        objective.compile(options=_OPTIONS)

    def update(minibatch: TensorDictBase) -> dict[str, Tensor]:
        measured = take_gradients(minibatch)
        optimizer.step()
        optimizer.zero_grad()
        return measured

    if not cuda_graph:
        return update
    recorded = CudaGraphModule(lambda minibatch: TensorDict(update(minibatch)))  # pyright: ignore[reportArgumentType]
    return lambda minibatch: dict(recorded(minibatch).items())  # pyright: ignore[reportOptionalMemberAccess]


def _check_norm(max_grad_norm: float) -> None:
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be a number above 0 (inf: no limit); got {max_grad_norm}.")


class _Objective(nn.Module):
    """The sum of a loss's parts, and all that it measures."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, minibatch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.loss(minibatch)
        total = sum(value for name, value in losses.items() if name.startswith("loss_"))
        return cast("Tensor", total), dict(losses.detach().items())


def _replaceable(objective: nn.Module) -> bool:
    """Whether the loss is a pure function of parameters that ``functional_call`` can replace."""
    modules = list(objective.modules())
    held = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    tied = len(held) > len(set(held))  # a replaced one would be replaced in one of its places
    # DistributedDataParallel averages within backward, and grad forbids a forward that moves buffers
    kinds = TensorDictParams | DistributedDataParallel
    return not tied and not any(isinstance(m, kinds) or getattr(m, "moves_buffers", False) for m in modules)
