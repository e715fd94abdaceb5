"""QPLEX's mixer of agents' action values, which TorchRL lacks; ``VDNMixer`` and ``QMixer`` are TorchRL's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrl.modules import MLP

__all__ = ["QPLEXMixer"]


class QPLEXMixer(nn.Module):
    """Duplex dueling mixer: monotonic in the values of greedy actions, unrestricted in the advantages of other actions.

        Q_tot(s, a) = sum_i [ w_i Q_i(a_i) + b_i ] + sum_i (lambda_i(s, a) - 1) w_i A_i(a_i),
        A_i(a_i) = Q_i(a_i) - max_b Q_i(b) <= 0,   w_i(s) > 0,
        lambda_i(s, a) = sum_k |v_k(s)| sigmoid(phi_ik(s)) sigmoid(lambda_ik(s, a)) > 0

    As in the authors' code, the advantages in the second sum are detached; they only train the importance weights
    ``lambda``. Advantages are 0 if every agent takes its greedy action and negative otherwise, so the greedy joint
    action consists of the agents' greedy actions. With ``w = 1``, ``b = 0`` and ``lambda = 1`` the mixer is VDN's sum.

    Reference: Wang et al., QPLEX: Duplex Dueling Multi-Agent Q-Learning, 2021, https://arxiv.org/abs/2008.01062,
    Eqs. (8) to (13). Defaults are those of the authors for SMAC.

    Args:
        num_agents: ``N``.
        num_actions: ``A``.
        state_size: ``S``.
        embed_dim: width of the hidden layer of the networks of ``w`` and ``b``.
        num_heads: number of attention heads, ``k``.
        attention_sizes: widths of the hidden layers of the attention networks, shared by the heads; none in SMAC.

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
        """Mix the values of chosen and of greedy actions, ``[*B, N, 1]``, into a team value, ``[*B, 1]``.

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
        """Importance weights ``lambda_i(s, a) > 0`` of the agents' advantages, ``[*B, N]``."""
        joint = functional.one_hot(action, self.num_actions).flatten(-2).to(state.dtype)
        agent, chosen = self.agent(state), self.action(torch.cat([state, joint], -1))
        attention = (agent.sigmoid() * chosen.sigmoid()).unflatten(-1, (-1, self.num_agents))
        return ((self.head(state).abs() + 1e-10).unsqueeze(-1) * attention).sum(-2)
