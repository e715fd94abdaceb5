"""Data-parallel learning: processes that torchrun starts, one for each device, learn one policy together.

    torchrun --nproc-per-node 2 SCRIPT

Each process plays its own environments and learns from its own minibatches, of the sizes that the configuration says,
as everywhere in PyTorch: two processes collect twice the frames in a batch. Gradients are averaged, so that parameters
are the same in all of them; advantages and values are normalised over all of them. Without torchrun every function here
is a no-op.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

__all__ = [
    "any_process",
    "average",
    "average_gradients",
    "broadcast_from_main",
    "broadcast_state",
    "gather",
    "init_distributed",
    "rank",
    "world_size",
]

T = TypeVar("T")


def world_size() -> int:
    """How many processes learn together."""
    return distributed.get_world_size() if _joined() else 1


def rank() -> int:
    """Which of them this is; the first, 0, logs, evaluates and saves."""
    return distributed.get_rank() if _joined() else 0


def init_distributed() -> None:
    """Join the other processes that torchrun has started, if it has, and use a GPU of one's own, if there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _joined():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group()  # gloo for what lies on the CPU, NCCL for what lies on GPUs
    atexit.register(distributed.destroy_process_group)


def broadcast_state(module: nn.Module) -> None:
    """Give a module the parameters and buffers that it has in the first process."""
    if world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            distributed.broadcast(tensor.detach(), src=0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average what ``backward`` has left, in place; the same parameters must have gradients in all processes.

    A mean of means is the mean over the whole if the parts count the same number of rows. With a mask of live agents
    they count differently many, and each process, not each row, weighs the same.
    """
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(together)
    together /= world_size()
    for gradient, average in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(average.view_as(gradient))


def average(value: Tensor) -> Tensor:
    """Return the mean of a value over all processes; all must call it."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    distributed.all_reduce(value)
    return value / world_size()


def gather(values: Tensor) -> Tensor:
    """Return the values of all processes, one after the other along the first dimension; all must call it.

    Args:
        values: of the same shape in all processes.
    """
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def broadcast_from_main(decide: Callable[[], T]) -> T:
    """Return in all processes what ``decide`` returns in the first one, where alone it is called."""
    if world_size() == 1:
        return decide()
    decision: list[Any] = [decide() if rank() == 0 else None]
    distributed.broadcast_object_list(decision, src=0)
    return decision[0]


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    return flag if world_size() == 1 else bool(gather(torch.tensor([flag])).any())


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
