"""The update of a training loop: one gradient step as a function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from tensordict.nn import CudaGraphModule
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["make_update"]

_LOSSES = ("loss_objective", "loss_entropy", "loss_critic")


def make_update(
    loss: nn.Module, optimizer: Optimizer, *, max_grad_norm: float, compile: bool = False, cuda_graph: bool = False
) -> Callable[[TensorDictBase], dict[str, Tensor]]:
    """Build the gradient step of a loss with ``loss_objective``, ``loss_entropy`` and ``loss_critic``.

    Nothing in it waits for an accelerator. Compiled, loss and gradients are two graphs, and what is left to Python is
    clipping and the optimiser's step: take an optimiser with ``fused=True``.

    Args:
        loss: its gradients are those of the sum of its three losses.
        optimizer: of the loss's parameters.
        max_grad_norm: the gradient is scaled down to this norm, over all parameters.
        compile: whether to compile the loss.
        cuda_graph: whether to record the whole step once as a CUDA graph, for minibatches of one size; the optimiser
            needs ``capturable=True``.

    Returns:
        ``update(minibatch)``: takes a step and returns what the loss measured, and ``grad_norm`` before clipping, all
        detached.

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

    def total(minibatch: TensorDictBase) -> tuple[Tensor, TensorDictBase]:
        losses = loss(minibatch)
        objective, entropy, critic = (losses[name] for name in _LOSSES)
        return objective + entropy + critic, losses.detach()

    compute_total = torch.compile(total) if compile else total
    parameters = list(loss.parameters())

    def update(minibatch: TensorDictBase) -> TensorDictBase:
        loss_total, measured = compute_total(minibatch)
        loss_total.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return measured.set("grad_norm", grad_norm)

    step = CudaGraphModule(update) if cuda_graph else update  # pyright: ignore[reportArgumentType]
    return lambda minibatch: dict(step(minibatch).items())  # pyright: ignore[reportOptionalMemberAccess]
