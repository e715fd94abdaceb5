"""Data-parallel training: processes started by torchrun, one per device, train one policy.

    torchrun --nproc-per-node 2 SCRIPT

Each process steps its own environments and trains on its own minibatches. The configured sizes are per process, as
usual in PyTorch: two processes collect twice the frames in a batch. Gradients are averaged, so all processes hold the
same parameters; advantages and values are normalised over all processes. Without torchrun every function here is a
no-op.
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
    """Number of processes."""
    return distributed.get_world_size() if _joined() else 1


def rank() -> int:
    """Rank of this process; rank 0 logs, evaluates and saves."""
    return distributed.get_rank() if _joined() else 0


def init_distributed() -> None:
    """Initialise torch.distributed when launched by torchrun, and select a GPU for this process if available."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _joined():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group()  # gloo for CPU tensors, NCCL for GPU tensors
    atexit.register(distributed.destroy_process_group)


def broadcast_state(module: nn.Module) -> None:
    """Copy a module's parameters and buffers from the first process to all others."""
    if world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            distributed.broadcast(tensor.detach(), src=0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients in place; the same parameters must have gradients in all processes.

    The mean of means equals the global mean if all processes average over the same number of rows. With a mask of live
    agents the numbers differ, and every process has the same weight, not every row.
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
    """Return the mean of a value over all processes; every process must call this function."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    distributed.all_reduce(value)
    return value / world_size()


def gather(values: Tensor) -> Tensor:
    """Concatenate the values of all processes along the first dimension; every process must call this function.

    Args:
        values: values, with the same shape in all processes.
    """
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def broadcast_from_main(decide: Callable[[], T]) -> T:
    """Call ``decide`` in the first process and return its result in all processes."""
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
