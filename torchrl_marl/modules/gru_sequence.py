"""A GRU over a sequence as one operator, which a compiler takes as it is.

Traced step by step, a sequence of 128 steps is thousands of operations, which Inductor compiles for minutes. The loop
here is Python's, over few operations that write where their results belong; what does not depend on the step before is
outside of it, in the backward pass all but one product with a matrix.

Shape suffixes: T steps, R rows, H features, G = 3 H of the gates (reset, update, candidate).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, register_fake

__all__ = ["gru_sequence"]


def gru_sequence(projected: Tensor, state: Tensor, restart: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Run a GRU along the first dimension, from stored states where it restarts.

    Args:
        projected: inputs of the gates, bias included, ``[T, *rows, 3 H]``.
        state: stored states before each step, ``[T, *rows, H]``; those of the first step and of restarts are read.
        restart: bool, ``[T, *rows, 1]``.
        weight: of the recurrent product, ``[3 H, H]``.
        bias: of it, ``[3 H]``.

    Returns:
        The state after each step, ``[T, *rows, H]``.
    """
    rows = (x.reshape(len(x), -1, x.shape[-1]) for x in (projected.to(state.dtype), state, restart))
    run = _Sequence.apply if torch.is_grad_enabled() else _run  # Dynamo traces no autograd.Function without gradients
    return run(*rows, weight, bias)[0].view(state.shape)


@custom_op("torchrl_marl::gru_sequence", mutates_args=())
def _run(
    projected_TRG: Tensor, state_TRH: Tensor, restart_TR1: Tensor, weight_GH: Tensor, bias_G: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return states, candidates, gates of reset and update, and products with the states before."""
    after, candidate, gates, recurrent = _empty_like(state_TRH, 1, 1, 2, 3)
    size, turned = state_TRH.shape[-1], weight_GH.t()
    halves = [2 * size, size]
    steps = (
        *(state_TRH, restart_TR1, *projected_TRG.split(halves, -1), recurrent, *recurrent.split(halves, -1)),
        *(gates, *gates.split(size, -1), candidate, after),
    )
    now = state_TRH[0]
    for stored, anew, own, own_n, product, other, other_n, gate, r, z, n, out in _each(*steps):
        before = torch.where(anew, stored, now)
        torch.addmm(bias_G, before, turned, out=product)
        torch.add(own, other, out=gate).sigmoid_()
        torch.addcmul(own_n, r, other_n, out=n).tanh_()
        now = torch.lerp(n, before, z, out=out)
    return after, candidate, gates, recurrent


@custom_op("torchrl_marl::gru_sequence_backward", mutates_args=())
def _run_back(
    grad_TRH: Tensor, slope_TRG: Tensor, kept_TRH: Tensor, restart_TR1: Tensor, weight_GH: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the states after each step, all later ones included, and of those before.

    Args:
        grad_TRH: gradients of the states after each step, by what reads them outside of the sequence.
        slope_TRG: derivative of a state after a step by each product with the one before.
        kept_TRH: share of the state before that is kept.
        restart_TR1: where the state before is a stored one.
        weight_GH: of the products.
    """
    after, before = _empty_like(grad_TRH, 1, 1)
    slope = slope_TRG.unflatten(-1, (3, -1))
    scaled = torch.empty_like(slope[0], memory_format=torch.contiguous_format)
    scaled_RG, later = scaled.flatten(-2), torch.zeros_like(after[0])
    steps = (grad_TRH, slope, kept_TRH, restart_TR1, after, after.unsqueeze(-2), before)
    for grad, by_product, kept, anew, total, total_once, start in reversed(_each(*steps)):
        torch.add(grad, later, out=total)
        torch.mul(by_product, total_once, out=scaled)
        torch.mul(total, kept, out=start).addmm_(scaled_RG, weight_GH)
        later = start.masked_fill(anew, 0.0)
    return after, before


@register_fake("torchrl_marl::gru_sequence")
def _(projected: Tensor, state: Tensor, restart: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return _empty_like(state, 1, 1, 2, 3)


@register_fake("torchrl_marl::gru_sequence_backward")
def _(grad: Tensor, slope: Tensor, kept: Tensor, restart: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return _empty_like(grad, 1, 1)


class _Sequence(torch.autograd.Function):
    """``_run`` with its gradient; ``torch.func`` does not differentiate operators that register their own."""

    @staticmethod
    def forward(*arguments: Tensor) -> tuple[Tensor, ...]:
        return _run(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        _, state, restart, weight, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(state, restart, weight, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        state, restart, weight, after, n, gates, recurrent = ctx.saved_tensors
        before = torch.where(restart, state, torch.cat([state[:1], after[:-1]]))
        r, z = gates.chunk(2, -1)
        by_candidate = (1 - z) * (1 - n.square())
        slope = [by_candidate * recurrent.chunk(3, -1)[2] * r * (1 - r), (before - n) * z * (1 - z), by_candidate * r]
        total, start = _run_back(grad, torch.cat(slope, -1), z, restart, weight)
        scaled = [total * one for one in slope]
        products = torch.cat(scaled, -1).flatten(0, 1)
        stored = torch.cat([start[:1], start[1:].where(restart[1:], 0.0)])
        of_inputs = torch.cat([*scaled[:2], total * by_candidate], -1)
        return of_inputs, stored, None, products.t() @ before.flatten(0, 1), products.sum(0)


def _empty_like(like: Tensor, *times: int) -> tuple[Tensor, ...]:
    """Uninitialised entries, so many times as wide."""
    return tuple(like.new_empty(*like.shape[:-1], factor * like.shape[-1]) for factor in times)


def _each(*sequences: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(sequence.unbind() for sequence in sequences), strict=True))
