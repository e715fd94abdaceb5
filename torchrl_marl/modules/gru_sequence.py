"""A GRU over a sequence as one operator, which a compiler takes as it is.

Traced step by step, a sequence of 128 steps is thousands of operations, which Inductor compiles for minutes. The
operator runs in blocks of at most 32 steps, each one compiled function; what does not depend on the step before is
outside of them, in the backward pass all but one product with a matrix.

Shape suffixes: T steps, K steps of a block, R rows, H features, G = 3 H of the gates (reset, update, candidate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, register_fake

from torchrl_marl.compilation import GUARDLESS_OPTIONS, compile_whole

__all__ = ["gru_sequence"]

_LONGEST_BLOCK = 32


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
    sequences = projected_TRG, state_TRH, restart_TR1
    after, candidate, gates, recurrent = _in_blocks(_block, sequences, state_TRH[0], weight_GH.t(), bias_G)
    return after, candidate, gates, recurrent


def _block(
    projected_KRG: Tensor, state_KRH: Tensor, restart_KR1: Tensor, now_RH: Tensor, turned_HG: Tensor, bias_G: Tensor
) -> tuple[Tensor, ...]:
    size, results = now_RH.shape[-1], []
    for own, stored, anew in zip(projected_KRG.unbind(), state_KRH.unbind(), restart_KR1.unbind(), strict=True):
        before = torch.where(anew, stored, now_RH)
        product = torch.addmm(bias_G, before, turned_HG)
        gates = (own[:, : 2 * size] + product[:, : 2 * size]).sigmoid()
        r, z = gates.chunk(2, -1)
        n = torch.addcmul(own[:, 2 * size :], r, product[:, 2 * size :]).tanh()
        now_RH = torch.lerp(n, before, z)
        results.append((now_RH, n, gates, product))
    return (now_RH, *map(torch.stack, zip(*results, strict=True)))


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
    sequences = grad_TRH, slope_TRG, kept_TRH, restart_TR1
    after, before = _in_blocks(_block_back, sequences, torch.zeros_like(grad_TRH[0]), weight_GH, backwards=True)
    return after, before


def _block_back(
    grad_KRH: Tensor, slope_KRG: Tensor, kept_KRH: Tensor, restart_KR1: Tensor, later_RH: Tensor, weight_GH: Tensor
) -> tuple[Tensor, ...]:
    results = []
    steps = (sequence.unbind() for sequence in (grad_KRH, slope_KRG, kept_KRH, restart_KR1))
    for grad, slope, kept, anew in reversed(list(zip(*steps, strict=True))):
        total = grad + later_RH
        start = torch.addmm(total * kept, slope * total.repeat(1, 3), weight_GH)
        later_RH = torch.where(anew, 0.0, start)
        results.insert(0, (total, start))
    return (later_RH, *map(torch.stack, zip(*results, strict=True)))


def _in_blocks(
    block: FunctionType, sequences: Sequence[Tensor], carried: Tensor, *constants: Tensor, backwards: bool = False
) -> tuple[Tensor, ...]:
    """Run a function of blocks of steps, which returns what it carries on to the next block and its results."""
    steps = len(sequences[0])
    size = math.ceil(steps / math.ceil(steps / _LONGEST_BLOCK))  # the last block may be shorter
    kinds = tuple((x.shape[1:], x.dtype, x.device) for x in (*sequences, carried)), tuple(x.stride() for x in constants)
    results = []
    blocks = list(zip(*(sequence.contiguous().split(size) for sequence in sequences), strict=True))
    with torch.no_grad():
        for parts in reversed(blocks) if backwards else blocks:
            run = _compiled(block, len(parts[0]), kinds)
            carried, *found = run(*parts, carried.contiguous(), *constants)
            results.append(found)
        return tuple(map(torch.cat, zip(*(reversed(results) if backwards else results), strict=True)))


@lru_cache
def _compiled(block: FunctionType, size: int, shapes: tuple[object, ...]) -> Callable[..., tuple[Tensor, ...]]:
    return compile_whole(block, **GUARDLESS_OPTIONS)


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
