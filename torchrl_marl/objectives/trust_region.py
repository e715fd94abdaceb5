"""Trust regions measured by the KL divergence: Fisher-vector products, conjugate gradient, backtracking line search.

Pure functions of tensors and functions, independent of agents, for :class:`HATRPOLoss` and :class:`OATRPOLoss`. A
parameter vector is the concatenation of a list of parameters, as returned by
:func:`torch.nn.utils.parameters_to_vector`.

Reference: Schulman et al., Trust Region Policy Optimization, 2015, https://arxiv.org/abs/1502.05477, appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from typing_extensions import Unpack

from torchrl_marl.signatures import check_at_least_0

__all__ = [
    "StepOptions",
    "backtracking_line_search",
    "conjugate_gradient",
    "fisher_vector_product",
    "natural_step",
    "trust_region_step",
]


class SearchOptions(TypedDict, total=False):
    """Options of a line search; meanings and defaults are those of :func:`backtracking_line_search`."""

    backtrack: float
    accept_ratio: float
    num_backtracks: int


class StepOptions(SearchOptions, total=False):
    """Options of a step; meanings and defaults are those of :func:`trust_region_step`."""

    damping: float
    num_iterations: int


def check_step_options(**options: float) -> None:
    """Reject :class:`StepOptions` out of their ranges.

    Raises:
        ValueError: with the name, the value and the allowed range.
    """
    check_at_least_0(**{name: options[name] for name in ("damping", "accept_ratio") if name in options})
    if not 0 < options.get("backtrack", 0.5) < 1:
        raise ValueError(f"backtrack must be between 0 and 1; got {options['backtrack']}.")
    for name in ("num_iterations", "num_backtracks"):
        if options.get(name, 1) < 1:
            raise ValueError(f"{name} must be at least 1; got {options[name]}.")


def fisher_vector_product(
    kl: Tensor, parameters: Sequence[Tensor], *, damping: float | Tensor = 0.0
) -> Callable[[Tensor], Tensor]:
    """Return the function ``v -> (F + damping I) v``, where F is the Hessian of ``kl`` at the current parameters.

    If ``kl`` is the mean of ``KL(pi_old || pi)`` at ``pi = pi_old``, F is the Fisher information matrix. F is never
    formed: a product takes one more backward pass, ``F v = d/dtheta (d kl/dtheta . v)``.

    Reference: TRPO, appendix C.1.

    Args:
        kl: scalar with a graph to the parameters.
        parameters: tensors with P elements in total.
        damping: added to the diagonal.

    Returns:
        Function of a vector ``[P]`` that returns a vector ``[P]``.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> product = fisher_vector_product((3 * x.square()).sum(), [x], damping=0.5)  # Hessian 6 I
        >>> product(torch.tensor([1.0, 0.0]))
        tensor([6.5000, 0.0000])
    """
    gradient = parameters_to_vector(torch.autograd.grad(kl, parameters, create_graph=True))

    def product(vector: Tensor) -> Tensor:
        rows = torch.autograd.grad(gradient @ vector, parameters, retain_graph=True)
        return parameters_to_vector([row.contiguous() for row in rows]) + damping * vector

    return product


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, *, num_iterations: int = 10, tolerance: float = 1e-10
) -> Tensor:
    """Solve ``A x = target`` for a symmetric positive definite A given by its products with vectors.

    The iteration starts from zero and stops changing once the squared residual is below
    ``tolerance * min(1, 100 |target|^2)``, so a short target is also solved to a relative precision. The number of
    products is fixed to avoid a synchronisation with the device.

    Reference: Hestenes and Stiefel, 1952; TRPO, appendix C.

    Args:
        product: ``v -> A v``.
        target: right-hand side, ``[P]``.
        num_iterations: number of products.
        tolerance: tolerance of the squared norm of the residual (1e-10 in HATRPO's code).

    Returns:
        Approximate solution, ``[P]``.

    Example:
        >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> conjugate_gradient(lambda v: matrix @ v, torch.tensor([1.0, 2.0]))  # (1, 7) / 11
        tensor([0.0909, 0.6364])
    """
    solution, residual, direction = torch.zeros_like(target), target, target
    square = target @ target
    smallest = tolerance * (100 * square).clamp(max=1.0)
    for _ in range(num_iterations):
        active = square > smallest
        curved = product(direction)
        length = torch.where(active, square / (direction @ curved), 0.0)
        solution = solution + length * direction
        residual = residual - length * curved
        next_square = residual @ residual
        direction = torch.where(active, residual + next_square / square * direction, direction)
        square = next_square
    return solution


def natural_step(
    product: Callable[[Tensor], Tensor], gradient: Tensor, *, max_kl: float | Tensor, num_iterations: int = 10
) -> Tensor:
    """Return the step of steepest ascent within a trust region: ``sqrt(2 max_kl / x.Fx) x`` with ``F x = gradient``.

    To second order, the step maximises the gain subject to ``KL <= max_kl``. A gradient of zero gives a step of zero.
    ``x.Fx`` is computed as ``x.gradient``, as the residual of conjugate gradients is orthogonal to their solution.

    Reference: TRPO, appendix C.

    Args:
        product: ``v -> F v``, such as :func:`fisher_vector_product` returns, damping included.
        gradient: gradient of the gain, ``[P]``.
        max_kl: radius of the trust region, in nats.
        num_iterations: number of conjugate-gradient iterations.

    Returns:
        Step, ``[P]``.

    Example:
        >>> natural_step(lambda v: 4 * v, torch.tensor([3.0, 0.0]), max_kl=0.02)  # 4 s^2 / 2 = 0.02
        tensor([0.1000, 0.0000])
    """
    direction = conjugate_gradient(product, gradient, num_iterations=num_iterations)
    step = (2 * max_kl / (direction @ gradient)).sqrt() * direction
    return torch.where((gradient == 0).all(), 0.0, step)


def backtracking_line_search(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    step: Tensor,
    *,
    expected: Tensor,
    max_kl: float | Tensor,
    backtrack: float = 0.8,
    accept_ratio: float = 0.5,
    num_backtracks: int = 10,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Shorten a step until it stays within the trust region and gains a sufficient share of the expected improvement.

    The accepted fraction is the first ``f = backtrack^k``, ``k = 0, 1, ...``, with

        KL < max_kl,   improvement > 0,   improvement > accept_ratio f expected

    Fractions are evaluated one by one, with one device synchronisation each: usually the first or second is accepted,
    and evaluating all of them would cost more.

    Reference: TRPO, appendix C, with the acceptance rule of HATRPO's authors, https://arxiv.org/abs/2109.11251.

    Args:
        evaluate: parameters ``[P] -> (improvement over start, KL from start)``, two scalars.
        start: ``[P]``
        step: the full step, ``[P]``.
        expected: first-order improvement of the full step, ``gradient . step``.
        max_kl: radius of the trust region.
        backtrack: factor between consecutive fractions, in (0, 1).
        accept_ratio: share of the expected improvement required for acceptance.
        num_backtracks: number of fractions tried.

    Returns:
        The accepted parameters, or ``start`` if no fraction is accepted, and the scalars ``step_fraction`` (0 if none
        is accepted), ``improvement`` and ``kl``.

    Example:
        >>> gain = lambda x: (x.sum() - x.square().sum() / 2, x.square().sum())  # the full step has a KL of 1
        >>> x, info = backtracking_line_search(
        ...     gain, torch.zeros(1), torch.ones(1), expected=torch.tensor(1.0), max_kl=0.3, backtrack=0.5)
        >>> x, info["step_fraction"]
        (tensor([0.5000]), tensor(0.5000))
    """
    for fraction in (backtrack**k for k in range(num_backtracks)):
        candidate = start + fraction * step
        improvement, kl = evaluate(candidate)
        if (kl < max_kl) & (improvement > 0) & (improvement > accept_ratio * fraction * expected):
            return candidate, {"step_fraction": torch.full_like(kl, fraction), "improvement": improvement, "kl": kl}
    zero = torch.zeros_like(expected)
    return start, {"step_fraction": zero, "improvement": zero, "kl": zero}


@torch.enable_grad()
def trust_region_step(
    parameters: Sequence[Tensor],
    evaluate: Callable[[], tuple[Tensor, Tensor]],
    *,
    max_kl: float | Tensor,
    damping: float = 0.1,
    num_iterations: int = 10,
    **search: Unpack[SearchOptions],
) -> dict[str, Tensor]:
    """Update parameters in place by one natural-gradient step, if a line search accepts one.

    Args:
        parameters: parameters to update.
        evaluate: returns ``(gain, mean KL from the initial policy)`` of the current parameters, two scalars.
        max_kl: radius of the trust region, in nats.
        damping: added to the diagonal of the Fisher matrix.
        num_iterations: number of conjugate-gradient iterations.
        **search: :class:`SearchOptions`.

    Returns:
        Detached scalars: ``step_fraction``, ``improvement``, ``kl``, ``expected_improvement`` of the full step, and
        ``grad_norm`` of the gain.

    Example:
        >>> x = torch.zeros(1, requires_grad=True)
        >>> info = trust_region_step([x], lambda: (x.sum(), x.square().sum()), max_kl=0.01, damping=0.0)
        >>> x  # fraction 1 reaches the bound and is rejected
        tensor([0.0800], requires_grad=True)
    """
    gain, kl = evaluate()
    gradient = parameters_to_vector(torch.autograd.grad(gain, parameters, retain_graph=True))
    product = fisher_vector_product(kl, parameters, damping=damping)
    step = natural_step(product, gradient, max_kl=max_kl, num_iterations=num_iterations)
    start, gain, expected = parameters_to_vector(parameters).detach(), gain.detach(), gradient @ step

    @torch.no_grad()
    def outcome(candidate: Tensor) -> tuple[Tensor, Tensor]:
        _assign(parameters, candidate)
        new_gain, new_kl = evaluate()
        return new_gain - gain, new_kl

    accepted, info = backtracking_line_search(outcome, start, step, expected=expected, max_kl=max_kl, **search)
    _assign(parameters, accepted)
    return {**info, "expected_improvement": expected, "grad_norm": gradient.norm()}


@torch.no_grad()
def _assign(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Write a vector into parameters in place: optimisers and collectors keep references to them."""
    for parameter, values in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(values.view_as(parameter))
