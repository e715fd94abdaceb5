"""Reuse mappings: the sources of each agent's experience, as weights or as draws.

``M[i, j]`` is the probability that agent i (the learner) uses the experience of agent j (the source): j's observations,
action masks, actions, log-probabilities and live mask, evaluated by i's network. Rows sum to one. Columns need not:
several learners may use one source.

Reference: Chen et al., Off-Agent Trust Region Policy Optimization, IJCAI 2024, sections 4.2 and 5.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypedDict, get_args

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor, nn
from torchrl.modules import set_recurrent_mode

from torchrl_marl.modules import agent_policy
from torchrl_marl.modules.recurrent import recurrent_state_keys
from torchrl_marl.objectives.divergences import pairwise_kl

__all__ = [
    "ReuseGate",
    "ReuseMappingSampler",
    "ReuseOptions",
    "ReuseScheme",
    "fading_reuse_matrix",
    "fixed_reuse_matrix",
    "gated_reuse_matrix",
]

ReuseScheme = Literal["NR", "AR", "UR", "RR"]
ReuseMatrix = ReuseScheme | Tensor | Sequence[Sequence[float]]
ReuseGate = Callable[..., Tensor]
"""Distribution of reuse mappings ``[N, N]`` from divergences: ``gate(kl, own_weight=..., kl_threshold=...)``."""


class ReuseOptions(TypedDict, total=False):
    """Options of experience reuse; meanings and defaults are those of :class:`ReuseMappingSampler`."""

    own_weight: float
    kl_threshold: float
    reuse_matrix: ReuseMatrix | None
    kl_reduction: Literal["mean", "max"]
    gate: ReuseGate


def gated_reuse_matrix(kl: Tensor, *, own_weight: float = 0.7, kl_threshold: float = 0.1) -> Tensor:
    """Distribution of reuse mappings that splits ``1 - own_weight`` evenly among agents with similar policies.

        M[i, i] = own_weight,   M[i, j] = (1 - own_weight) / (number of j != i with K[i, j] <= kl_threshold)

    An agent without any such j uses its own experience only, ``M[i, i] = 1``. "Own" is defined by index. The paper
    defines it by a divergence of zero, which gives rows that sum to more than one while agents are identical.

    Reference: OAPPO, Eq. (9).

    Args:
        kl: result of :func:`pairwise_kl`, ``[N, N]``.
        own_weight: probability of an agent's own experience, lambda in (0, 1].
        kl_threshold: largest divergence of a source, sigma, in nats.

    Returns:
        ``[N, N]``, rows sum to one.

    Raises:
        ValueError: if an argument is out of its range or ``kl`` is not square.

    Example:
        >>> kl = torch.tensor([[0.0, 0.05, 0.02], [0.05, 0.0, 0.3], [0.2, 0.3, 0.0]])
        >>> gated_reuse_matrix(kl)
        tensor([[0.7000, 0.1500, 0.1500],
                [0.3000, 0.7000, 0.0000],
                [0.0000, 0.0000, 1.0000]])
    """
    _check_gate(own_weight, kl_threshold)
    if kl.ndim != 2 or kl.shape[0] != kl.shape[1]:
        raise ValueError(f"kl must be [agents, agents], got {tuple(kl.shape)}.")
    own = torch.eye(len(kl), dtype=torch.bool, device=kl.device)
    close = (kl <= kl_threshold) & ~own
    count = close.sum(-1, keepdim=True)
    shared = close.to(kl.dtype) * (1 - own_weight) / count.clamp(min=1)
    return torch.where(own, torch.where(count > 0, kl.new_tensor(own_weight), 1.0), shared)


def fading_reuse_matrix(kl: Tensor, *, own_weight: float = 0.7, kl_threshold: float = 0.1) -> Tensor:
    """Distribution of reuse mappings in which the share of each source fades as its policy departs.

        M[i, j] = (1 - own_weight) / (N - 1) max(0, 1 - K[i, j] / kl_threshold),   M[i, i] = 1 - sum_j M[i, j]

    Agents that are alike share as behind :func:`gated_reuse_matrix`; as they take on roles of their own, each pair's
    lambda rises to 1 without a step. The paper names lambda and sigma that adapt as future work; the rule is ours.

    Args:
        kl: :func:`pairwise_kl`, ``[N, N]``.
        own_weight: probability of an agent's own experience while all are alike, in (0, 1].
        kl_threshold: divergence from which on a source is not used, in nats, above 0.

    Returns:
        ``[N, N]``, rows sum to one.

    Raises:
        ValueError: if an argument is out of its range or ``kl`` is not square.

    Example:
        >>> fading_reuse_matrix(torch.tensor([[0.0, 0.05, 0.025], [0.05, 0.0, 0.3], [0.2, 0.3, 0.0]]))
        tensor([[0.8125, 0.0750, 0.1125],
                [0.0750, 0.9250, 0.0000],
                [0.0000, 0.0000, 1.0000]])
    """
    _check_gate(own_weight, kl_threshold)
    if not kl_threshold > 0:
        raise ValueError(f"kl_threshold must be above 0 for shares that fade, got {kl_threshold!r}.")
    if kl.ndim != 2 or kl.shape[0] != kl.shape[1]:
        raise ValueError(f"kl must be [agents, agents], got {tuple(kl.shape)}.")
    shares = (1 - own_weight) / max(1, len(kl) - 1) * (1 - kl / kl_threshold).clamp(min=0)
    shares = shares.fill_diagonal_(0)
    return shares + torch.diag(1 - shares.sum(-1))


def fixed_reuse_matrix(scheme: ReuseMatrix, num_agents: int, *, own_weight: float = 0.7) -> Tensor:
    """Return a mapping that is independent of the policies, given by its name in the paper or as a matrix.

    ``"NR"``, no reuse, is HAPPO; ``"AR"``, all reuse, is uniform. ``"RR"``, reasonable reuse, and ``"UR"``,
    unreasonable reuse, are defined for the maze of three agents (red, black, blue): black and blue share in ``"RR"``,
    red and black in ``"UR"``. The paper does not give the weights of ``"RR"`` and ``"UR"``; ``own_weight`` is ours.

    Reference: OAPPO, section 6.1 and Fig. 2.

    Args:
        scheme: ``"NR"``, ``"AR"``, ``"UR"``, ``"RR"``, or a matrix ``[N, N]`` whose rows sum to one.
        num_agents: N.
        own_weight: share of an agent's own experience in ``"UR"`` and ``"RR"``.

    Raises:
        ValueError: if the scheme is unknown, or the matrix has the wrong shape or does not hold probabilities.

    Example:
        >>> fixed_reuse_matrix("RR", 3)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.0000, 0.7000, 0.3000],
                [0.0000, 0.3000, 0.7000]])
    """
    _check_gate(own_weight, 0.0)
    if not isinstance(scheme, str):
        return _checked_matrix(torch.as_tensor(scheme if isinstance(scheme, Tensor) else list(map(list, scheme))))
    if scheme not in get_args(ReuseScheme):
        raise ValueError(f"reuse_matrix must be a matrix or one of {', '.join(get_args(ReuseScheme))}; got {scheme!r}.")
    if scheme == "NR":
        return torch.eye(num_agents)
    if scheme == "AR":
        return torch.full((num_agents, num_agents), 1 / num_agents)
    if num_agents != 3:
        raise ValueError(f"{scheme} is a scheme for 3 agents (red, black, blue), but the group has {num_agents}.")
    pair = [0, 1] if scheme == "UR" else [1, 2]
    matrix = torch.eye(3)
    matrix[pair, pair], matrix[pair, pair[::-1]] = own_weight, 1 - own_weight
    return matrix


class ReuseMappingSampler(nn.Module):
    """Hold the distribution of reuse mappings, update it from the agents' policies, and sample from it.

    ``matrix``, ``[N, N]``, is a buffer, so it moves and is saved with the loss. Its initial value is the fixed mapping
    or the identity.

    Args:
        num_agents: N.
        own_weight: probability of an agent's own experience, lambda in (0, 1]; 1 is HAPPO.
        kl_threshold: largest divergence of a source, sigma, in nats.
        reuse_matrix: a fixed mapping, see :func:`fixed_reuse_matrix`; ``None`` to follow the policies.
        kl_reduction: see :func:`pairwise_kl`.
        gate: how the mapping follows divergences, :func:`gated_reuse_matrix` or :func:`fading_reuse_matrix`.
        num_rows: number of randomly drawn rows that the divergences are measured on.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl_marl.modules import GroupSpec, make_actor
        >>> actor = make_actor(GroupSpec("agents", 3, 8, num_actions=5), share_parameters=False)
        >>> sampler = ReuseMappingSampler(3)
        >>> data = TensorDict({"agents": {"observation": torch.zeros(7, 3, 8)}}, batch_size=7)
        >>> sampler.update(actor, data)  # new policies are nearly identical
        >>> sampler.matrix
        tensor([[0.7000, 0.1500, 0.1500],
                [0.1500, 0.7000, 0.1500],
                [0.1500, 0.1500, 0.7000]])
        >>> sampler.sample((7,)).shape
        torch.Size([7, 3])
    """

    matrix: Tensor

    def __init__(
        self,
        num_agents: int,
        *,
        own_weight: float = 0.7,
        kl_threshold: float = 0.1,
        reuse_matrix: ReuseMatrix | None = None,
        kl_reduction: Literal["mean", "max"] = "mean",
        gate: ReuseGate = gated_reuse_matrix,
        num_rows: int = 2048,
    ) -> None:
        super().__init__()
        _check_gate(own_weight, kl_threshold)
        if kl_reduction not in ("mean", "max"):
            raise ValueError(f"kl_reduction must be mean or max; got {kl_reduction!r}.")
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}.")
        self.own_weight, self.kl_threshold = own_weight, kl_threshold
        self.kl_reduction: Literal["mean", "max"] = kl_reduction
        self.gate, self.num_rows = gate, num_rows
        self.fixed = reuse_matrix is not None or own_weight == 1  # then no divergence can change the matrix
        matrix = fixed_reuse_matrix("NR" if reuse_matrix is None else reuse_matrix, num_agents, own_weight=own_weight)
        if matrix.shape != (num_agents, num_agents):
            raise ValueError(f"reuse_matrix must be [{num_agents}, {num_agents}], got {tuple(matrix.shape)}.")
        self.register_buffer("matrix", matrix)

    @torch.no_grad()
    @set_recurrent_mode(True)
    def update(
        self, actor: ProbabilisticTensorDictSequential, tensordict: TensorDictBase, mask: Tensor | None = None
    ) -> None:
        """Measure the pairwise divergences of the policies and update ``matrix``; a no-op for a fixed matrix.

        Policies with a memory are compared on sequences that start from an empty memory.

        Args:
            actor: the group's policy, with a network for each agent, see :func:`torchrl_marl.modules.agent_policy`.
            tensordict: the actor's inputs, any batch shape ``[*B]``; for a memory, sequences ``[*B, time]``.
            mask: live agents (bool), ``[*B, N]``.
        """
        if self.fixed:
            return
        states = recurrent_state_keys(actor)
        row = tensordict.batch_size[-1:] if states else torch.Size()
        rows = tensordict.select(*actor.in_keys, strict=False).reshape(-1, *row)
        rows.update(rows.select(*states).apply(torch.zeros_like))
        mask = None if mask is None else mask.reshape(-1, *row, mask.shape[-1])
        if rows.numel() > self.num_rows:
            chosen = torch.randperm(len(rows))[: max(1, self.num_rows // row.numel())]
            rows, mask = rows[chosen], None if mask is None else mask[chosen]
        others = [agent_policy(actor, agent).get_dist(rows.copy()) for agent in range(len(self.matrix))]
        kl = pairwise_kl(actor.get_dist(rows.copy()), others, mask, reduction=self.kl_reduction)
        self.matrix.copy_(self.gate(kl, own_weight=self.own_weight, kl_threshold=self.kl_threshold))

    def sources(self, agent: int) -> tuple[int, ...]:
        """Agents whose experience ``agent`` uses, always including ``agent``. The call synchronises with the device."""
        return tuple(j for j, weight in enumerate(self.matrix[agent].tolist()) if weight > 0 or j == agent)

    def sample(self, batch_size: Sequence[int]) -> Tensor:
        """Draw the source of every learner in every row, ``[*batch_size, N]``."""
        draws = torch.multinomial(self.matrix, math.prod(batch_size), replacement=True)
        return draws.T.reshape(*batch_size, len(self.matrix))


def _check_gate(own_weight: float, kl_threshold: float) -> None:
    if not 0 < own_weight <= 1:
        raise ValueError(f"own_weight must be in (0, 1], got {own_weight!r}.")
    if not kl_threshold >= 0:
        raise ValueError(f"kl_threshold must be at least 0, got {kl_threshold!r}.")


def _checked_matrix(matrix: Tensor) -> Tensor:
    matrix = matrix.detach().clone().to(torch.get_default_dtype() if not matrix.is_floating_point() else matrix.dtype)
    if matrix.ndim != 2 or (matrix < 0).any() or not torch.isclose(matrix.sum(-1), matrix.new_tensor(1.0)).all():
        raise ValueError(
            f"reuse_matrix must hold probabilities [agents, agents] with rows that sum to 1; got {matrix}."
        )
    return matrix
