"""Sable: an autoregressive joint policy whose memory is a retention state of constant size.

Legend of shape suffixes: B sequences (environments), T steps, N agents, O observation, E embedding, H heads, D = E / H
features of a head, K outputs; a chunk has C steps and C * N tokens, M chunks make a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

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

__all__ = ["RetentionWeights", "make_sable", "positional_encoding", "retention", "retention_decay", "retention_weights"]


def retention_decay(num_heads: int, *, scaling: float = 1.0) -> Tensor:
    """Decay factor of each head's state per step, ``[H]``.

        kappa = (1 - exp(linspace(log 1/32, log 1/512, H))) scaling

    Reference: Mahjoub et al., Sable: a Performant, Efficient and Scalable Sequence Model for MARL, 2024,
    https://arxiv.org/abs/2410.01706; retention after Sun et al., https://arxiv.org/abs/2307.08621.

    Args:
        num_heads: number of heads.
        scaling: factor on every head's decay, in (0, 1]; Sable tunes it for each task.

    Example:
        >>> retention_decay(2, scaling=0.8)
        tensor([0.7750, 0.7984])
    """
    return (1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), num_heads).exp()) * scaling


def positional_encoding(step: Tensor, size: int) -> Tensor:
    """Sinusoidal encoding of the step within its episode: ``[*B]`` to ``[*B, size]``.

        PE[2j] = sin(t 10000^(-2j / size)),   PE[2j + 1] = cos(t 10000^(-2j / size))

    Example:
        >>> positional_encoding(torch.tensor([0, 1]), 4)
        tensor([[0.0000, 1.0000, 0.0000, 1.0000],
                [0.8415, 0.5403, 0.0100, 0.9999]])
    """
    frequency = torch.exp(torch.arange(0, size, 2, device=step.device) * (-math.log(10_000.0) / size))
    angle = step.unsqueeze(-1) * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., :size]


class RetentionWeights(NamedTuple):
    """Weights of retention for sequences split into chunks: powers of the decay, or 0 across resets.

    The weights depend only on the decay and the resets, so all layers of a network share them.
    """

    within: Tensor
    """From a token to those of its chunk that it sees, ``[B, H, M, C * N, C * N]``."""
    entering: Tensor
    """From a token to the state before its chunk, ``[B, H, M, C * N, 1]``."""
    leaving: Tensor
    """From a token to the state after its chunk, ``[B, H, M, C * N, 1]``."""
    across: Tensor
    """From the state after each chunk to what earlier ones left, the initial state first, ``[B, H, M + 1, M + 1]``."""


def retention_weights(
    reset_BT: Tensor, decay_H: Tensor, *, num_agents: int, causal: bool, chunk_size: int
) -> RetentionWeights:
    """Compute the weights of :func:`retention`.

    The state decays once per step, not per agent. A reset clears the state before the flagged step.

    Args:
        reset_BT: True at the first step of each episode.
        decay_H: factor for each step, of :func:`retention_decay`.
        num_agents: tokens of each step.
        causal: agents see themselves and the agents before them within a step (decoder); otherwise all see all
            (encoder).
        chunk_size: steps that are computed in parallel; must divide the length of the sequences.

    Raises:
        ValueError: if ``chunk_size`` does not divide the length of the sequences.
    """
    steps = reset_BT.shape[1]
    if chunk_size < 1 or steps % chunk_size:
        raise ValueError(f"Chunks of {chunk_size} steps do not fill sequences of {steps}: choose a divisor of {steps}.")
    episode_BMC = reset_BT.cumsum(1).unflatten(1, (-1, chunk_size))  # number of resets so far
    end_BM = functional.pad(episode_BMC[:, :, -1], (1, 0))  # after each chunk, the time before the first one in front
    chunk, step = (torch.arange(size, device=reset_BT.device) for size in (end_BM.shape[1], chunk_size))

    def powers(exponent: Tensor, same: Tensor) -> Tensor:
        """``decay ** exponent`` where the exponent counts backwards in time within one episode, else 0."""
        kept = same.unsqueeze(1) & (exponent >= 0)
        decay = decay_H.view(-1, *[1] * exponent.ndim)
        return torch.where(kept, decay ** exponent.clamp(min=0), 0.0)

    def to_tokens(weight: Tensor) -> Tensor:
        return weight.repeat_interleave(num_agents, -1).unsqueeze(-1)

    within = powers((step[:, None] - step)[None], episode_BMC[..., None] == episode_BMC[..., None, :])
    within = within.repeat_interleave(num_agents, -1).repeat_interleave(num_agents, -2)
    return RetentionWeights(
        within=within.tril() if causal else within,
        entering=to_tokens(powers((step + 1)[None], episode_BMC == end_BM[:, :-1, None])),
        leaving=to_tokens(powers((chunk_size - 1 - step)[None], episode_BMC == end_BM[:, 1:, None])),
        across=powers(chunk_size * (chunk[:, None] - chunk), end_BM[..., None] == end_BM[..., None, :]),
    )


def retention(
    query_BHTND: Tensor, key_BHTND: Tensor, value_BHTND: Tensor, state_BHDD: Tensor, weights: RetentionWeights
) -> tuple[Tensor, Tensor]:
    """Multi-agent retention over whole sequences: linear attention with an exponential decay in time.

        S_t = decay S_(t-1) + sum_i k_(t,i)^T v_(t,i),   y_(t,i) = q_(t,i) S_t                      (all see all)
        S_(t,i) = S_(t,i-1) + k_(t,i)^T v_(t,i),   S_(t,0) = decay S_(t-1,N),   y_(t,i) = q_(t,i) S_(t,i)     (causal)

    and ``S_(t-1) = 0`` at the start of an episode. The weights select one of the two forms and the number of steps that
    are computed in parallel: within a chunk as ``((q k^T) * decay^lag) v``, between chunks through the state. One chunk
    is the parallel form, chunks of one step are the recurrent form; values and gradients are the same.

    Reference: Sable, https://arxiv.org/abs/2410.01706, its retention for agents and for sequences of episodes.

    Args:
        query_BHTND: queries.
        key_BHTND: keys.
        value_BHTND: values.
        state_BHDD: state before the first step, key features along rows.
        weights: of :func:`retention_weights`.

    Returns:
        Outputs ``[B, H, T, N, D]`` and the state after each chunk, ``[B, H, M, D, D]``.

    Example:
        >>> query, key, value = torch.ones(3, 1, 1, 4, 2, 1)  # 4 steps of 2 agents
        >>> reset = torch.tensor([[False, False, True, False]])
        >>> weights = retention_weights(reset, torch.tensor([0.5]), num_agents=2, causal=False, chunk_size=2)
        >>> output, state = retention(query, key, value, torch.full((1, 1, 1, 1), 8.0), weights)
        >>> output[0, 0, :, 0, 0], state.flatten()  # 8 / 2 + 2, 6 / 2 + 2, 2, 2 / 2 + 2
        (tensor([6., 5., 2., 3.]), tensor([5., 3.]))
    """
    chunks, num_agents = weights.within.shape[2], query_BHTND.shape[3]
    query, key, value = (
        x.reshape(*x.shape[:2], chunks, -1, x.shape[-1]) for x in (query_BHTND, key_BHTND, value_BHTND)
    )
    within = (query @ key.mT * weights.within) @ value
    left_BHMDD = key.mT @ (weights.leaving * value)
    states = torch.cat([state_BHDD.unsqueeze(2), left_BHMDD], 2)
    states = (weights.across @ states.flatten(-2)).view_as(states)
    output = within + weights.entering * (query @ states[:, :, :-1])
    return output.unflatten(3, (-1, num_agents)).flatten(2, 3), states[:, :, 1:]


class Retention(nn.Module):
    """Multi-head retention, a norm of each head and a gate: one mixing layer of Sable.

    Args:
        embed_dim: E.
        num_heads: H. As in the authors' code the norm has H groups within each head, so that H * H must divide E.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_query = nn.Linear(embed_dim, embed_dim, bias=False)
        self.to_key_value_gate = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.to_output = nn.Linear(embed_dim, embed_dim, bias=False)
        self.norm = nn.GroupNorm(num_heads, embed_dim // num_heads, eps=1e-6)
        for layer in (self.to_query, self.to_key_value_gate, self.to_output):
            nn.init.normal_(layer.weight, std=1 / embed_dim)

    def forward(
        self, query_BTNE: Tensor, key_BTNE: Tensor, state_BHDD: Tensor, weights: RetentionWeights
    ) -> tuple[Tensor, Tensor]:
        """Mix whole sequences; return ``[B, T, N, E]`` and the state after each chunk, ``[B, H, M, D, D]``."""
        key, value, gate = self.to_key_value_gate(key_BTNE).chunk(3, -1)
        query, key, value = (self._heads(x).movedim(-2, 1) for x in (self.to_query(query_BTNE), key, value))
        output_BHTND, states = retention(query, key, value, state_BHDD, weights)
        return self._gated(output_BHTND.movedim(1, -2), gate), states

    def act(self, x_BNE: Tensor, memory: _StepMemory) -> Tensor:
        """Mix one step with full retention between agents, ``[B, N, E]`` to ``[B, N, E]``."""
        query = self.recall(x_BNE, memory)
        key, value, gate = self.to_key_value_gate(x_BNE).chunk(3, -1)
        memory.keys.copy_(self._heads(key).transpose(1, 2))
        memory.values.copy_(self._heads(value).transpose(1, 2))
        output_BHND = query.recalled + (query.heads @ memory.keys.mT) @ memory.values
        return self._gated(output_BHND.transpose(1, 2), gate)

    def act_in_turn(self, query: _Query, key_BE: Tensor, agent: int, memory: _StepMemory) -> Tensor:
        """Mix one agent's query with its own key and those of the agents before it: to ``[B, E]``."""
        key, value, gate = self.to_key_value_gate(key_BE).chunk(3, -1)
        memory.keys[:, :, agent], memory.values[:, :, agent] = self._heads(key), self._heads(value)
        keys, values = memory.keys[:, :, : agent + 1], memory.values[:, :, : agent + 1]
        score = (keys * query.heads.unsqueeze(2)).sum(-1, keepdim=True)
        return self._gated(query.recalled + (score * values).sum(2), gate)

    def recall(self, query_BNE: Tensor, memory: _StepMemory) -> _Query:
        """Return queries with their recall of earlier steps."""
        heads_BHND = self._heads(self.to_query(query_BNE)).transpose(1, 2)
        return _Query(heads_BHND, heads_BHND @ memory.state)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def _gated(self, output: Tensor, gate: Tensor) -> Tensor:
        """Norm, gate and mix heads: ``[*B, H, D]`` and ``[*B, E]`` to ``[*B, E]``."""
        normed = self.norm(output.flatten(0, -2)).view_as(output).flatten(-2)
        return self.to_output(functional.silu(gate) * normed)


class _Query(NamedTuple):
    """Heads of queries, ``[B, H, N, D]``, and what they recall of earlier steps, the same shape."""

    heads: Tensor
    recalled: Tensor

    def of(self, agent: int) -> _Query:
        """Return one agent's, ``[B, H, D]``."""
        return _Query(self.heads[:, :, agent], self.recalled[:, :, agent])


class _StepMemory(NamedTuple):
    """One layer's memory during one step: the decayed state, and the keys and values of this step's agents.

    Agent i recalls ``q_i (S + sum_j k_j^T v_j) = q_i S + sum_j (q_i . k_j) v_j``. The right-hand side needs no state
    per agent, so a step writes the state once.
    """

    state: Tensor
    """``[B, H, D, D]``."""
    keys: Tensor
    """``[B, H, N, D]``."""
    values: Tensor
    """``[B, H, N, D]``."""


class _StepMemories:
    """Memories of some layers during one step, side by side so that all are updated at once. No gradient flows.

    Args:
        memory: ``[B, *layers, H, D, D]``.
        step_B1: position in the episode; at 0 the memory counts as empty.
        decay_H: of each head.
        num_agents: N.
    """

    def __init__(self, memory: Tensor, step_B1: Tensor, decay_H: Tensor, num_agents: int) -> None:
        *layers, heads, dim, _ = memory.shape[1:]
        retained = (step_B1 != 0) * decay_H
        self._layers = layers
        self._states_RBHDD = (memory.flatten(1, -4).transpose(0, 1) * retained[..., None, None]).contiguous()
        self._keys = memory.new_empty(len(self._states_RBHDD), len(memory), heads, num_agents, dim)
        self._values = torch.empty_like(self._keys)

    def __iter__(self) -> Iterator[_StepMemory]:
        return map(_StepMemory, self._states_RBHDD, self._keys, self._values)

    def after(self) -> Tensor:
        """Add the step's keys and values; return the memory, ``[B, *layers, H, D, D]``."""
        keys, values = self._keys.flatten(0, 2), self._values.flatten(0, 2)
        self._states_RBHDD.flatten(0, 2).baddbmm_(keys.mT, values)
        return self._states_RBHDD.transpose(0, 1).unflatten(1, self._layers)


class SwiGLU(nn.Module):
    """Gated feed-forward layer, ``W3 (silu(W1 x) * W2 x)``, without biases."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.gate, self.linear, self.output = (nn.Linear(embed_dim, embed_dim, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Transform the last dimension."""
        return self.output(functional.silu(self.gate(x)) * self.linear(x))


class _Sizes(NamedTuple):
    """Sizes of encoder and decoder; see :func:`make_sable`."""

    embed_dim: int
    num_heads: int
    num_blocks: int
    decay_scaling: float
    feed_forward: bool
    chunk_size: int

    @property
    def memory(self) -> tuple[int, ...]:
        """Shape of the memory of one retention layer in each block, ``(L, H, D, D)``."""
        dim = self.embed_dim // self.num_heads
        return self.num_blocks, self.num_heads, dim, dim


class _EncoderBlock(nn.Module):
    def __init__(self, sizes: _Sizes) -> None:
        super().__init__()
        self.retention = Retention(sizes.embed_dim, sizes.num_heads)
        self.norm1, self.norm2 = _norm(sizes.embed_dim), _norm(sizes.embed_dim)
        self.feed_forward = SwiGLU(sizes.embed_dim) if sizes.feed_forward else None

    def add(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = self.norm1(x + mixed)
        return self.norm2(x if self.feed_forward is None else x + self.feed_forward(x))


class _DecoderBlock(nn.Module):
    def __init__(self, sizes: _Sizes) -> None:
        super().__init__()
        self.retention, self.cross_retention = (Retention(sizes.embed_dim, sizes.num_heads) for _ in range(2))
        self.norm1, self.norm2, self.norm3 = (_norm(sizes.embed_dim) for _ in range(3))
        self.feed_forward = SwiGLU(sizes.embed_dim) if sizes.feed_forward else None

    def add(self, x: Tensor, mixed: Tensor) -> Tensor:
        return self.norm1(x + mixed)

    def add_cross(self, encoding: Tensor, mixed: Tensor) -> Tensor:
        x = self.norm2(encoding + mixed)
        return self.norm3(x if self.feed_forward is None else x + self.feed_forward(x))


class SableEncoder(Encoder):
    """Sable's encoder: full retention over the agents of a step and all earlier steps.

    Its state is ``encoder_memory``, ``[B, L, H, D, D]``, and ``step``, ``[B, 1]``, the position in the episode, which
    is encoded; at step 0 the memory is treated as empty. For sequences ``step`` is ``[B, T, 1]``, and the memory is
    that before the first step, or ``[B, T, ...]``, of which that before the first step is taken.

    Args:
        observation_size: O, with the agent id.
        sizes: of the network.
    """

    decay: Tensor

    def __init__(self, observation_size: int, sizes: _Sizes) -> None:
        super().__init__()
        self.sizes, embed_dim = sizes, sizes.embed_dim
        self.state_shapes = {"encoder_memory": sizes.memory, "step": (1,)}
        self.register_buffer("decay", retention_decay(sizes.num_heads, scaling=sizes.decay_scaling), persistent=False)
        linear = orthogonal(nn.Linear(observation_size, embed_dim, bias=False), math.sqrt(2))
        self.embed = nn.Sequential(_norm(observation_size), linear, nn.GELU("tanh"))
        self.norm = _norm(embed_dim)
        blocks = nn.ModuleList(_EncoderBlock(sizes) for _ in range(sizes.num_blocks))
        self.blocks = cast("Sequence[_EncoderBlock]", blocks)

    def forward(self, observation: Tensor, state: State) -> Tensor:
        """Encode sequences ``[B, T, N, O]`` to ``[B, T, N, E]``."""
        return self._encode(observation, state, self.sizes.chunk_size)[0]

    def act(self, observation_BNO: Tensor, state: State) -> tuple[Tensor, State]:
        """Encode one step to ``[B, N, E]`` and return the next state."""
        step_B1 = state["step"]
        memories = _StepMemories(state["encoder_memory"], step_B1, self.decay, observation_BNO.shape[1])
        x, position_B1E = self.embed(observation_BNO), self._position(step_B1)
        for block, memory in zip(self.blocks, memories, strict=True):
            x = self.norm(x)
            x = block.add(x, block.retention.act(x + position_B1E, memory))
        return x, {"encoder_memory": memories.after(), "step": step_B1 + 1}

    def bootstrap(self, observation: Tensor, next_observation: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Encode ``[B, T, N, O]`` and, from the memory after each step, what is observed next.

        The next observation of an episode's last step is not part of the sequence, which goes on with another episode.
        """
        encoded = []
        per_sequence = observation.shape[1] * state["encoder_memory"][0].numel()
        for rows in torch.arange(len(observation)).split(max(1, 2**24 // per_sequence)):  # 64 MiB of memories at once
            before = {name: value[rows] for name, value in state.items()}
            x, memory_BTLHDD = self._encode(observation[rows], before, 1)
            after = {"encoder_memory": memory_BTLHDD.flatten(0, 1), "step": before["step"].flatten(0, 1) + 1}
            x_next, _ = self.act(next_observation[rows].flatten(0, 1), after)
            encoded.append(torch.stack([x, x_next.view_as(x)]))
        x, x_next = torch.cat(encoded, 1)
        return x, x_next

    def _encode(self, observation_BTNO: Tensor, state: State, chunk_size: int) -> tuple[Tensor, Tensor]:
        """Encodings and the memory after each chunk, ``[B, M, L, H, D, D]``."""
        memory, step = _sequence(observation_BTNO, state["encoder_memory"], state["step"], 4)
        weights = _weights(observation_BTNO, step, self.decay, causal=False, chunk_size=chunk_size)
        position = self._position(step).unsqueeze(2)
        x, memories = self.embed(observation_BTNO), []
        for index, block in enumerate(self.blocks):
            x = self.norm(x)
            mixed, after = block.retention(x + position, x + position, memory[:, index], weights)
            memories.append(after.movedim(2, 1))
            x = block.add(x, mixed)
        return x, torch.stack(memories, 2)

    def _position(self, step: Tensor) -> Tensor:
        return positional_encoding(step, self.sizes.embed_dim)


class SableDecoder(Decoder):
    """Sable's decoder: retention over actions and then over encodings, causal between the agents of a step.

    Its state is ``decoder_memory``, ``[B, 2, L, H, D, D]``, that of actions and that across to encodings, and ``step``,
    both as for :class:`SableEncoder`.

    Args:
        space: what it reads and writes.
        sizes: of the network.
    """

    decay: Tensor

    def __init__(self, space: ActionSpace, sizes: _Sizes) -> None:
        super().__init__()
        self.sizes, embed_dim = sizes, sizes.embed_dim
        self.state_shapes = {"decoder_memory": (2, *sizes.memory), "step": (1,)}
        self.register_buffer("decay", retention_decay(sizes.num_heads, scaling=sizes.decay_scaling), persistent=False)
        embedding = orthogonal(space.embedding(embed_dim), math.sqrt(2))
        self.embed = nn.Sequential(embedding, nn.GELU("tanh"), _norm(embed_dim))
        blocks = nn.ModuleList(_DecoderBlock(sizes) for _ in range(sizes.num_blocks))
        self.blocks = cast("Sequence[_DecoderBlock]", blocks)
        self.head = output_head(embed_dim, space.num_outputs, _norm)

    def forward(self, encoding: Tensor, previous: Tensor, state: State) -> Tensor:
        """Decode sequences: encodings ``[B, T, N, E]`` and the previous agents' actions to ``[B, T, N, K]``."""
        memory, step = _sequence(encoding, state["decoder_memory"], state["step"], 5)
        weights = _weights(encoding, step, self.decay, causal=True, chunk_size=self.sizes.chunk_size)
        position = positional_encoding(step, self.sizes.embed_dim).unsqueeze(2)
        query, x = encoding + position, self.embed(previous)
        for index, block in enumerate(self.blocks):
            mixed, _ = block.retention(x + position, x + position, memory[:, 0, index], weights)
            x = block.add(x, mixed)
            mixed, _ = block.cross_retention(query, x + position, memory[:, 1, index], weights)
            x = block.add_cross(encoding, mixed)
        return self.head(x)

    def act(self, encoding_BNE: Tensor, start: Tensor, choose: Choose, state: State) -> tuple[Tensor, State]:
        """Decode one step agent after agent; return outputs ``[B, N, K]`` and the next state."""
        num_agents, step_B1 = encoding_BNE.shape[1], state["step"]
        memories = _StepMemories(state["decoder_memory"], step_B1, self.decay, num_agents)
        position_B1E = positional_encoding(step_B1, self.sizes.embed_dim)
        position_BE = position_B1E.squeeze(1)
        layers = list(memories)
        own, across = layers[: len(self.blocks)], layers[len(self.blocks) :]
        # queries of encodings do not depend on actions
        queries = [
            b.cross_retention.recall(encoding_BNE + position_B1E, m) for b, m in zip(self.blocks, across, strict=True)
        ]
        previous, outputs = start, []
        for agent in range(num_agents):
            x = self.embed(previous)
            for block, memory, cross_memory, query in zip(self.blocks, own, across, queries, strict=True):
                key = x + position_BE
                own_query = block.retention.recall(key.unsqueeze(1), memory)
                x = block.add(x, block.retention.act_in_turn(own_query.of(0), key, agent, memory))
                mixed = block.cross_retention.act_in_turn(query.of(agent), x + position_BE, agent, cross_memory)
                x = block.add_cross(encoding_BNE[:, agent], mixed)
            outputs.append(self.head(x))
            previous = choose(agent, outputs[-1])
        return torch.stack(outputs, 1), {"decoder_memory": memories.after(), "step": step_B1 + 1}


def make_sable(
    env: EnvBase | GroupSpec,
    *,
    group: str | None = None,
    observes: Observes = "observation",
    embed_dim: int = 64,
    num_heads: int = 1,
    num_blocks: int = 1,
    decay_scaling: float = 0.8,
    feed_forward: bool = False,
    chunk_size: int = 8,
    value_norm: ValueNorm | None = None,
    device: torch.device | str | None = None,
) -> tuple[AutoregressiveActor, AutoregressiveCritic]:
    """Build Sable: an autoregressive actor with memory, and a critic on its encoder.

    The memory is a matrix for each head and layer, whatever the length of the episode. Act in
    :func:`~torchrl_marl.modules.with_recurrent_state`, which carries it. Losses and value estimates take whole
    sequences, ``[B, T]``: :class:`~torchrl_marl.collectors.SequenceCollector`.

    Reference: Mahjoub et al., Sable: a Performant, Efficient and Scalable Sequence Model for MARL, 2024,
    https://arxiv.org/abs/2410.01706. Defaults are those of the code of MAGPO's authors, https://github.com/liyheng/MAGPO.

    Args:
        env: the environment, or the shape of a group.
        group: name of the group; optional if the environment has one group.
        observes: ``"observation"``, each agent's own observation, or ``"observation_and_state"``, followed by the
            global ``"state"``, as a guider may see more than the agents.
        embed_dim: width E of all layers.
        num_heads: heads H of each retention layer; H * H must divide E.
        num_blocks: blocks of the encoder, and of the decoder.
        decay_scaling: factor on every head's decay, in (0, 1].
        feed_forward: add a SwiGLU layer to each block. The authors' code has these layers, but initialises them with
            zeros, where their gradient is always zero: omitting them is equivalent.
        chunk_size: maximum number of steps computed in parallel (rounded to a divisor); only affects speed.
        value_norm: running statistics of values; the critic then predicts normalised values, see
            :class:`~torchrl_marl.modules.Denormalize`.
        device: device of the parameters.

    Returns:
        The actor and the critic, which share the encoder. Train the parameters of both.

    Raises:
        ValueError: if the group or its spaces are not supported, or an option is out of its range.

    Example:
        >>> from torchrl_marl.envs import make_env
        >>> from torchrl_marl.modules import with_recurrent_state
        >>> env = make_env("balance", num_envs=7, max_steps=5, seed=0)
        >>> actor, critic = make_sable(env)
        >>> data = with_recurrent_state(env, actor).rollout(2, actor)
        >>> data["agents", "action_log_prob"].shape, data["next", "agents_encoder_memory"].shape
        (torch.Size([7, 2, 3]), torch.Size([7, 2, 1, 1, 64, 64]))
        >>> critic(data)["agents", "state_value"].shape
        torch.Size([7, 2, 3, 1])
    """
    if min(num_heads, num_blocks, chunk_size) < 1:
        raise ValueError(
            f"num_heads, num_blocks and chunk_size must be at least 1, got {num_heads}, {num_blocks}, {chunk_size}."
        )
    if embed_dim < 1 or embed_dim % num_heads**2 or embed_dim % 2:
        raise ValueError(
            f"embed_dim must be even and a multiple of num_heads squared, got {embed_dim} and {num_heads}."
        )
    if not 0 < decay_scaling <= 1:
        raise ValueError(f"decay_scaling must be in (0, 1], got {decay_scaling}.")
    shape = group_shape(env, group)
    space = action_space(shape, device)
    sizes = _Sizes(embed_dim, num_heads, num_blocks, decay_scaling, feed_forward, chunk_size)
    encoder = SableEncoder(input_size(shape, observes), sizes).to(device)
    decoder = SableDecoder(space, sizes).to(device)
    head = output_head(embed_dim, 1, _norm).to(device)
    critic = AutoregressiveCritic(encoder, head, shape, value_norm=value_norm, observes=observes)
    return AutoregressiveActor(encoder, decoder, space, shape, observes=observes), critic


def _norm(size: int) -> nn.Module:
    return nn.RMSNorm(size, eps=1e-6)


def _sequence(x: Tensor, memory: Tensor, step: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Memory before the first step and the position of each step, ``[B, T]``."""
    if x.ndim != 4 or step.shape != (*x.shape[:2], 1):
        raise ValueError(
            f"Sable trains on sequences [B, T, agents, features] with steps [B, T, 1], got {tuple(x.shape)} and "
            f"{tuple(step.shape)}."
        )
    return memory if memory.ndim == 1 + dims else memory[:, 0], step.squeeze(-1)


def _weights(x_BTNE: Tensor, step_BT: Tensor, decay: Tensor, *, causal: bool, chunk_size: int) -> RetentionWeights:
    length, num_agents = x_BTNE.shape[1:3]
    fitting = max(size for size in range(1, chunk_size + 1) if length % size == 0)
    return retention_weights(step_BT == 0, decay, num_agents=num_agents, causal=causal, chunk_size=fitting)
