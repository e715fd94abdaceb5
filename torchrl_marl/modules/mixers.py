"""Mixers of agents' action values into the team's: what TorchRL's ``VDNMixer`` and ``QMixer`` leave out, QPLEX."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrl.modules import MLP

__all__ = ["QPLEXMixer"]


class QPLEXMixer(nn.Module):
    """The duplex dueling mixer: monotonic in values of greedy actions, of any shape in advantages of the others.

        Q_tot(s, a) = sum_i [ w_i Q_i(a_i) + b_i ] + sum_i (lambda_i(s, a) - 1) w_i A_i(a_i),
        A_i(a_i) = Q_i(a_i) - max_b Q_i(b) <= 0,   w_i(s) > 0,
        lambda_i(s, a) = sum_k |v_k(s)| sigmoid(phi_ik(s)) sigmoid(lambda_ik(s, a)) > 0

    The advantages of the second sum pass no gradient, as in the authors' code: the importance weights ``lambda`` learn
    from them. All advantages are 0 where every agent takes its greedy action and pull down elsewhere, so that the joint
    greedy action is made of the agents' own. With ``w = 1``, ``b = 0`` and ``lambda = 1`` it is VDN's sum.

    Reference: Wang et al., QPLEX: Duplex Dueling Multi-Agent Q-Learning, 2021, https://arxiv.org/abs/2008.01062,
    Eqs. (8) to (13). Defaults are those of the authors for SMAC.

    Args:
        num_agents: ``N``.
        num_actions: ``A``.
        state_size: ``S``.
        embed_dim: width of the hidden layer behind ``w`` and ``b``.
        num_heads: attention heads, ``k``.
        attention_sizes: widths of hidden layers behind the attention, which heads share; none in SMAC.

    Example:
        >>> mixer = QPLEXMixer(num_agents=3, num_actions=5, state_size=4)
        >>> values = torch.zeros(7, 3, 1)
        >>> mixer(values, values, torch.zeros(7, 3, dtype=torch.int64), torch.zeros(7, 4)).shape
        torch.Size([7, 1])
    """

    def __init__(
        self,
        num_agents: int,
        num_actions: int,
        state_size: int,
        *,
        embed_dim: int = 64,
        num_heads: int = 4,
        attention_sizes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1; got {num_heads}.")
        self.num_agents, self.num_actions = num_agents, num_actions
        mlp = partial(MLP, activation_class=nn.ReLU)
        self.weight = mlp(state_size, num_agents, num_cells=[embed_dim])
        self.bias = mlp(state_size, num_agents, num_cells=[embed_dim])
        attention, pairs = partial(mlp, num_cells=list(attention_sizes)), num_heads * num_agents
        self.head = attention(state_size, num_heads)
        self.agent = attention(state_size, pairs)
        self.action = attention(state_size + num_agents * num_actions, pairs)

    def forward(self, chosen: Tensor, greedy: Tensor, action: Tensor, state: Tensor) -> Tensor:
        """Mix values of chosen and of greedy actions, ``[*B, N, 1]``, to ``[*B, 1]``.

        Args:
            chosen: ``Q_i(a_i)``.
            greedy: ``max_b Q_i(b)``.
            action: ``a_i``, ``[*B, N]``.
            state: ``[*B, S]``, or agents' observations ``[*B, N, O]`` with ``S = N O``.
        """
        state = state.flatten(action.ndim - 1)
        weight = self.weight(state).abs() + 1e-10
        value = weight * chosen.squeeze(-1) + self.bias(state)
        advantage = (weight * (chosen - greedy).squeeze(-1)).detach()
        return (value + (self.importance(state, action) - 1) * advantage).sum(-1, keepdim=True)

    def importance(self, state: Tensor, action: Tensor) -> Tensor:
        """The weights ``lambda_i(s, a) > 0`` of agents' advantages, ``[*B, N]``."""
        joint = functional.one_hot(action, self.num_actions).flatten(-2).to(state.dtype)
        agent, chosen = self.agent(state), self.action(torch.cat([state, joint], -1))
        attention = (agent.sigmoid() * chosen.sigmoid()).unflatten(-1, (-1, self.num_agents))
        return ((self.head(state).abs() + 1e-10).unsqueeze(-1) * attention).sum(-2)
