"""Multi-Agent Transformer: attention between the agents of one step, no memory.

Legend of shape suffixes: B steps (environments), N agents, O observation, E embedding, H heads, D = E / H features of a
head, K outputs. Training passes take any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrl.envs import EnvBase
from torchrl.modules import ValueNorm

from torchrl_marl.modules.autoregressive import (
    ActionSpace,
    AutoregressiveActor,
    AutoregressiveCritic,
    Choose,
    Decoder,
    Encoder,
    Observes,
    State,
    action_space,
    input_size,
    orthogonal,
    output_head,
)
from torchrl_marl.modules.spec import GroupSpec, group_shape

__all__ = ["make_mat"]


def make_mat(
    env: EnvBase | GroupSpec,
    *,
    group: str | None = None,
    observes: Observes = "observation",
    embed_dim: int = 64,
    num_heads: int = 1,
    num_blocks: int = 1,
    value_norm: ValueNorm | None = None,
    device: torch.device | str | None = None,
) -> tuple[AutoregressiveActor, AutoregressiveCritic]:
    """Build the Multi-Agent Transformer: an autoregressive actor and a critic on its encoder.

    Reference: Wen et al., Multi-Agent Reinforcement Learning is a Sequence Modeling Problem, 2022,
    https://arxiv.org/abs/2205.14953. Details and defaults are those of the code of MAGPO's authors,
    https://github.com/liyheng/MAGPO. MAT's own code has the exact GELU and another epsilon in its norms, an unsquashed
    Gaussian for continuous actions and one ratio for each of their entries.

    Args:
        env: the environment, or the shape of a group.
        group: name of the group; optional if the environment has one group.
        observes: ``"observation"``, each agent's own observation, or ``"observation_and_state"``, followed by the
            global ``"state"``, as a guider may see more than the agents.
        embed_dim: width E of all layers.
        num_heads: heads H of each attention layer; must divide E.
        num_blocks: blocks of the encoder, and of the decoder.
        value_norm: running statistics of values; the critic then predicts normalised values, see
            :class:`~torchrl_marl.modules.Denormalize`.
        device: device of the parameters.

    Returns:
        The actor and the critic, which share the encoder. Train the parameters of both.

    Raises:
        ValueError: if the group or its spaces are not supported, or an option is out of its range.

    Example:
        >>> from tensordict import TensorDict
        >>> actor, critic = make_mat(GroupSpec("agents", num_agents=3, observation_size=8, num_actions=5))
        >>> data = TensorDict({"agents": {"observation": torch.zeros(7, 3, 8)}}, batch_size=7)
        >>> actor(data)["agents", "action"].shape, critic(data)["agents", "state_value"].shape
        (torch.Size([7, 3]), torch.Size([7, 3, 1]))
    """
    if min(num_heads, num_blocks, embed_dim) < 1 or embed_dim % num_heads:
        raise ValueError(
            "num_heads, num_blocks and embed_dim must be at least 1 and num_heads must divide embed_dim, "
            f"got {num_heads}, {num_blocks} and {embed_dim}."
        )
    shape = group_shape(env, group)
    space = action_space(shape, device)
    encoder = MATEncoder(input_size(shape, observes), embed_dim, num_heads, num_blocks).to(device)
    decoder = MATDecoder(space, embed_dim, num_heads, num_blocks).to(device)
    head = output_head(embed_dim, 1, _norm).to(device)
    critic = AutoregressiveCritic(encoder, head, shape, value_norm=value_norm, observes=observes)
    return AutoregressiveActor(encoder, decoder, space, shape, observes=observes), critic


class Attention(nn.Module):
    """Multi-head attention over agents, with small initial weights."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_query, self.to_key, self.to_value, self.to_output = (
            orthogonal(nn.Linear(embed_dim, embed_dim), 0.01) for _ in range(4)
        )

    def forward(self, query: Tensor, key: Tensor, *, causal: bool) -> Tensor:
        """Attend ``[..., N, E]`` to ``[..., N, E]``; if causal, only to the own and earlier agents."""
        queries, keys, values = (
            self._heads(x).transpose(-2, -3) for x in (self.to_query(query), self.to_key(key), self.to_value(key))
        )
        output = functional.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
        return self.to_output(output.transpose(-2, -3).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class _AgentAfterAgent:
    """A causal attention layer during one step, with keys and values of the agents decoded so far."""

    def __init__(self, layer: Attention, query_BNE: Tensor) -> None:
        self.layer = layer
        self.keys = layer._heads(torch.empty_like(query_BNE)).transpose(1, 2)
        self.values = torch.empty_like(self.keys)

    def mix(self, agent: int, query_BE: Tensor, key_BE: Tensor) -> Tensor:
        self.keys[:, :, agent] = self.layer._heads(self.layer.to_key(key_BE))
        self.values[:, :, agent] = self.layer._heads(self.layer.to_value(key_BE))
        query = self.layer._heads(query_BE).unsqueeze(2)
        seen = slice(agent + 1)
        output = functional.scaled_dot_product_attention(query, self.keys[:, :, seen], self.values[:, :, seen])
        return self.layer.to_output(output.flatten(1))


class _EncoderBlock(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(embed_dim, num_heads), _mlp(embed_dim)
        self.norm1, self.norm2 = _norm(embed_dim), _norm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, x, causal=False))
        return self.norm2(x + self.mlp(x))


class _DecoderBlock(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention, self.cross_attention = Attention(embed_dim, num_heads), Attention(embed_dim, num_heads)
        self.mlp = _mlp(embed_dim)
        self.norm1, self.norm2, self.norm3 = (_norm(embed_dim) for _ in range(3))

    def add(self, x: Tensor, mixed: Tensor) -> Tensor:
        return self.norm1(x + mixed)

    def add_cross(self, encoding: Tensor, mixed: Tensor) -> Tensor:
        x = self.norm2(encoding + mixed)
        return self.norm3(x + self.mlp(x))


class MATEncoder(Encoder):
    """MAT's encoder: full attention between agents."""

    state_shapes: Mapping[str, tuple[int, ...]] = {}

    def __init__(self, observation_size: int, embed_dim: int, num_heads: int, num_blocks: int) -> None:
        super().__init__()
        linear = orthogonal(nn.Linear(observation_size, embed_dim), math.sqrt(2))
        self.embed = nn.Sequential(_norm(observation_size), linear, nn.GELU("tanh"), _norm(embed_dim))
        self.blocks = nn.Sequential(*(_EncoderBlock(embed_dim, num_heads) for _ in range(num_blocks)))

    def forward(self, observation: Tensor, state: State) -> Tensor:
        """Encode ``[..., N, O]`` to ``[..., N, E]``."""
        return self.blocks(self.embed(observation))

    def act(self, observation_BNO: Tensor, state: State) -> tuple[Tensor, State]:
        """Encode one step to ``[B, N, E]``; there is no state."""
        return self(observation_BNO, state), {}

    def bootstrap(self, observation: Tensor, next_observation: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Encode observations and next observations."""
        return self(observation, state), self(next_observation, state)


class MATDecoder(Decoder):
    """MAT's decoder: causal attention over agents, to actions and then to encodings."""

    state_shapes: Mapping[str, tuple[int, ...]] = {}

    def __init__(self, space: ActionSpace, embed_dim: int, num_heads: int, num_blocks: int) -> None:
        super().__init__()
        embedding = orthogonal(space.embedding(embed_dim), math.sqrt(2))
        self.embed = nn.Sequential(embedding, nn.GELU("tanh"), _norm(embed_dim))
        blocks = nn.ModuleList(_DecoderBlock(embed_dim, num_heads) for _ in range(num_blocks))
        self.blocks = cast("Sequence[_DecoderBlock]", blocks)
        self.head = output_head(embed_dim, space.num_outputs, _norm)

    def forward(self, encoding: Tensor, previous: Tensor, state: State) -> Tensor:
        """Decode encodings ``[..., N, E]`` and the previous agents' actions to ``[..., N, K]``."""
        x = self.embed(previous)
        for block in self.blocks:
            x = block.add(x, block.attention(x, x, causal=True))
            x = block.add_cross(encoding, block.cross_attention(encoding, x, causal=True))
        return self.head(x)

    def act(self, encoding_BNE: Tensor, start: Tensor, choose: Choose, state: State) -> tuple[Tensor, State]:
        """Decode one step agent after agent; return outputs ``[B, N, K]``; there is no state."""
        actions = [_AgentAfterAgent(block.attention, encoding_BNE) for block in self.blocks]
        across = [_AgentAfterAgent(block.cross_attention, encoding_BNE) for block in self.blocks]
        queries = [block.cross_attention.to_query(encoding_BNE) for block in self.blocks]  # actions do not matter
        previous, outputs = start, []
        for agent in range(encoding_BNE.shape[1]):
            x = self.embed(previous)
            for block, own, other, query_BNE in zip(self.blocks, actions, across, queries, strict=True):
                x = block.add(x, own.mix(agent, block.attention.to_query(x), x))
                x = block.add_cross(encoding_BNE[:, agent], other.mix(agent, query_BNE[:, agent], x))
            outputs.append(self.head(x))
            previous = choose(agent, outputs[-1])
        return torch.stack(outputs, 1), {}


def _mlp(embed_dim: int) -> nn.Sequential:
    hidden, output = (orthogonal(nn.Linear(embed_dim, embed_dim), gain) for gain in (math.sqrt(2), 0.01))
    return nn.Sequential(hidden, nn.GELU("tanh"), output)


def _norm(size: int) -> nn.Module:
    return nn.LayerNorm(size, eps=1e-6)
