"""Autoregressive joint policies, where each agent acts given the actions of earlier agents, as TensorDict modules.

A network consists of an encoder of all agents' observations and a decoder of their actions. The decoder has two modes
with the same probabilities: agent by agent, to sample actions, and all agents at once, for given actions.

The modes correspond to the two methods of TorchRL's probabilistic modules. ``forward``, called by a collector, samples
agent by agent; ``get_dist``, called by a loss, is the parallel pass given the actions in the data ("teacher forcing").
``get_dist`` returns an ordinary distribution of each agent's action given the earlier actions. Log-probabilities
``[B, N]``, entropies and divergences therefore have the same form as for decentralised actors, and every ratio loss
supports autoregressive actors. The alternative, a distribution that holds the decoder, loops in ``sample`` and runs the
parallel pass in ``log_prob``, would hide parameters from their module, decode twice to evaluate a sample, and have no
entropy without actions.

Shape suffixes: B steps (environments), N agents, E embedding, K outputs of the decoder, A entries of an action.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional
from torchrl.data import Unbounded
from torchrl.envs import ExplorationType, TensorDictPrimer, exploration_type
from torchrl.modules import MaskedCategorical, ProbabilisticActor, ValueNorm

from torchrl_marl.modules.distributions import CensoredTanhNormal
from torchrl_marl.modules.spec import GroupSpec
from torchrl_marl.modules.value_norm import Denormalize

__all__ = ["AutoregressiveActor", "AutoregressiveCritic", "CategoricalActions", "Observes", "TanhNormalActions"]

Observes = Literal["observation", "observation_and_state"]
"""Encoder input of each agent: its own observation, optionally followed by the global ``"state"``."""
State = Mapping[str, Tensor]
Choose = Callable[[int, Tensor], Tensor]
"""``choose(agent, output_BK)`` samples that agent's action and returns it as the next agent's decoder input."""


class Encoder(nn.Module):
    """Abstract encoder of the observations of all agents."""

    state_shapes: Mapping[str, tuple[int, ...]]
    """What it remembers from step to step, if anything."""

    def forward(self, observation: Tensor, state: State) -> Tensor:
        """Encode ``[*batch, N, O]`` to ``[*batch, N, E]``; with a state, whole sequences ``[B, T, N, O]``."""
        raise NotImplementedError

    def act(self, observation_BNO: Tensor, state: State) -> tuple[Tensor, State]:
        """Encode one step to ``[B, N, E]`` and return the next state; without gradient."""
        raise NotImplementedError

    def bootstrap(self, observation: Tensor, next_observation: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Encode the observations and the next observations of a batch, without gradient."""
        raise NotImplementedError


class Decoder(nn.Module):
    """Abstract decoder of the parameters of each agent's distribution, given the actions of earlier agents."""

    state_shapes: Mapping[str, tuple[int, ...]]
    """What it remembers from step to step, if anything."""

    def forward(self, encoding: Tensor, previous: Tensor, state: State) -> Tensor:
        """Decode all agents at once: encodings and the previous agents' actions to outputs ``[*batch, N, K]``."""
        raise NotImplementedError

    def act(self, encoding_BNE: Tensor, start: Tensor, choose: Choose, state: State) -> tuple[Tensor, State]:
        """Decode one step agent by agent; return outputs ``[B, N, K]`` and the next state, without gradient."""
        raise NotImplementedError


class CategoricalActions(nn.Module):
    """Discrete actions: outputs of the decoder are logits, its inputs indices, 0 before the first agent.

    Args:
        num_actions: number of actions.
        masked: whether the data has an action mask.
    """

    parameter_names = ("logits",)

    def __init__(self, num_actions: int, *, masked: bool = False) -> None:
        super().__init__()
        self.num_outputs = num_actions
        self.distribution_class = MaskedCategorical if masked else Categorical
        self.distribution_kwargs: dict[str, Any] = {}

    def embedding(self, embed_dim: int) -> nn.Module:
        """Return a layer for decoder inputs."""
        return nn.Embedding(self.num_outputs + 1, embed_dim)

    def forward(self, output: Tensor) -> tuple[Tensor, ...]:
        """Return the parameters of the distribution."""
        return (output,)

    def decoder_input(self, action: Tensor) -> Tensor:
        """Return an action as the decoder of the next agent reads it."""
        return action + 1

    def start(self, encoding_BNE: Tensor) -> Tensor:
        """Return what the decoder of the first agent reads."""
        return torch.zeros(len(encoding_BNE), dtype=torch.long, device=encoding_BNE.device)

    def noise(self, encoding_BNE: Tensor) -> Tensor:
        """Draw Gumbel noise for a step: the argmax of logits plus noise is a sample."""
        return -encoding_BNE.new_empty(*encoding_BNE.shape[:-1], self.num_outputs).exponential_().log()

    def choose(self, output_BK: Tensor, noise_BK: Tensor | None, mask_BK: Tensor | None) -> Tensor:
        """Sample one agent's action; without noise, take the most probable one."""
        output_BK = output_BK if noise_BK is None else output_BK + noise_BK
        return (output_BK if mask_BK is None else output_BK.masked_fill(~mask_BK, -torch.inf)).argmax(-1)


class TanhNormalActions(nn.Module):
    """Continuous actions within bounds: outputs of the decoder are means of a squashed Gaussian.

    The scale before squashing is a state-independent parameter, initially 0.694, as in the code of Sable's authors.
    Inputs of the decoder are actions scaled to [-1, 1], zeros before the first agent.

    Args:
        low: lower bound of each entry of an action.
        high: upper bound of each entry.
        device: device of the parameters.
    """

    parameter_names = ("loc", "scale")
    low: Tensor
    high: Tensor

    def __init__(
        self, low: Sequence[float], high: Sequence[float], *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(low, device=device), persistent=False)
        self.register_buffer("high", torch.tensor(high, device=device), persistent=False)
        self.raw_scale = nn.Parameter(torch.zeros(len(low), device=device))
        self.num_outputs = len(low)
        self.distribution_class = CensoredTanhNormal
        self.distribution_kwargs: dict[str, Any] = {"low": self.low, "high": self.high}

    def embedding(self, embed_dim: int) -> nn.Module:
        """Return a layer for decoder inputs."""
        return nn.Linear(self.num_outputs, embed_dim)

    def forward(self, output: Tensor) -> tuple[Tensor, ...]:
        """Return the parameters of the distribution."""
        return output, self._scale().expand_as(output)

    def decoder_input(self, action: Tensor) -> Tensor:
        """Return an action as the decoder of the next agent reads it."""
        return (2 * action - self.low - self.high) / (self.high - self.low)

    def start(self, encoding_BNE: Tensor) -> Tensor:
        """Return what the decoder of the first agent reads."""
        return encoding_BNE.new_zeros(len(encoding_BNE), self.num_outputs)

    def noise(self, encoding_BNE: Tensor) -> Tensor:
        """Draw the noise of a step's samples."""
        return self._scale() * encoding_BNE.new_empty(*encoding_BNE.shape[:-1], self.num_outputs).normal_()

    def choose(self, output_BA: Tensor, noise_BA: Tensor | None, mask: Tensor | None) -> Tensor:
        """Sample one agent's action; without noise, squash the mean."""
        squashed = (output_BA if noise_BA is None else output_BA + noise_BA).tanh()
        return (self.low + self.high + (self.high - self.low) * squashed) / 2

    def _scale(self) -> Tensor:
        return functional.softplus(self.raw_scale) + 1e-3


ActionSpace = CategoricalActions | TanhNormalActions


def input_size(shape: GroupSpec, observes: Observes) -> int:
    """Return the length of each agent's encoder input, including its one-hot id.

    Raises:
        ValueError: if the choice is unknown, or the state is missing.
    """
    if observes not in get_args(Observes):
        raise ValueError(f"observes must be one of {', '.join(get_args(Observes))}; got {observes!r}.")
    if observes == "observation":
        return shape.observation_size + shape.num_agents
    if shape.state_size is None:
        raise ValueError(f'observes="{observes}", but the environment has no "state" at the root; use "observation".')
    return shape.observation_size + shape.state_size + shape.num_agents


def action_space(shape: GroupSpec, device: torch.device | str | None) -> ActionSpace:
    """Return the action space of a group, which converts decoder inputs and outputs."""
    if shape.num_actions is None:
        return TanhNormalActions(shape.action_low, shape.action_high, device=device)
    return CategoricalActions(shape.num_actions, masked=shape.masked)


def output_head(embed_dim: int, outputs: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Return the layers from encodings to outputs, with small initial outputs."""
    hidden = orthogonal(nn.Linear(embed_dim, embed_dim), math.sqrt(2))
    return nn.Sequential(hidden, nn.GELU("tanh"), norm(embed_dim), orthogonal(nn.Linear(embed_dim, outputs), 0.01))


def orthogonal(layer: nn.Module, gain: float) -> nn.Module:
    """Initialise a layer with an orthogonal weight and a zero bias, if any."""
    for name, parameter in layer.named_parameters():
        nn.init.zeros_(parameter) if name == "bias" else nn.init.orthogonal_(parameter, gain)
    return layer


class AutoregressiveActor(ProbabilisticActor):
    """Joint policy of a group: each agent acts given all observations and the actions of earlier agents.

    A call on a batch of single steps samples actions in the order of agents, or takes the most probable actions under
    deterministic exploration. It writes ``action``, ``action_log_prob``, the parameters of the distributions and, if
    the networks have a state, the next state under ``"next"``, all without gradient. The loop runs over agents only and
    reuses the computations of earlier agents. :meth:`get_dist` also reads ``action`` and returns the distributions of
    all agents from one pass, with gradient.

    If the data holds ``(group, "order")``, ``[*batch, N]``, :meth:`get_dist` decodes agents in this order, a
    permutation of ``0 .. N - 1``. The authors of Sable and MAGPO draw an order in each epoch but act in the fixed
    order, so the first ratios differ from 1.

    Args:
        encoder: encoder of observations with appended one-hot agent ids.
        decoder: decoder of actions.
        space: action space, which converts decoder inputs and outputs.
        shape: shape of the group.
        observes: inputs of the encoder besides the ids.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        space: ActionSpace,
        shape: GroupSpec,
        *,
        observes: Observes = "observation",
    ) -> None:
        name = shape.name
        in_keys: dict[str, NestedKey] = {key: (name, key) for key in space.parameter_names}
        if shape.masked:
            in_keys["mask"] = (name, "action_mask")
        super().__init__(
            _ParallelPass(encoder, decoder, space, shape, observes),  # pyright: ignore[reportArgumentType]
            in_keys=in_keys,  # pyright: ignore[reportArgumentType]
            out_keys=[(name, "action")],
            distribution_class=space.distribution_class,
            distribution_kwargs=space.distribution_kwargs,
            return_log_prob=True,
            log_prob_key=(name, "action_log_prob"),
        )

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Sample actions agent by agent.

        Args:
            tensordict: single steps of any batch shape; it is changed.

        Returns:
            The same TensorDict, with the entries that the class names.

        Raises:
            KeyError: if the state is missing: act in :func:`~torchrl_marl.modules.with_recurrent_state`.
        """
        if tensordict.batch_dims != 1:
            return tensordict.update(self(tensordict.reshape(-1)).reshape(tensordict.batch_size))
        networks = cast("_ParallelPass", self[0])
        group, space = networks.group, networks.space
        encoding, encoder_state = networks.encoder.act(
            _observed(tensordict, networks.observed_keys, networks.num_agents),
            _state(tensordict, networks.encoder, group),
        )
        noise = space.noise(encoding) if exploration_type() is ExplorationType.RANDOM else None
        mask = tensordict.get((group, "action_mask")) if networks.masked else None
        actions: list[Tensor] = []

        def choose(agent: int, output: Tensor) -> Tensor:
            noise_of_agent, mask_of_agent = (None if x is None else x[:, agent] for x in (noise, mask))
            actions.append(space.choose(output, noise_of_agent, mask_of_agent))
            return space.decoder_input(actions[-1])

        output, decoder_state = networks.decoder.act(
            encoding, space.start(encoding), choose, _state(tensordict, networks.decoder, group)
        )
        action = torch.stack(actions, 1)
        tensordict.set((group, "action"), action)
        networks.write(tensordict, output)
        tensordict.set((group, "action_log_prob"), self.build_dist_from_params(tensordict).log_prob(action))
        for name, value in {**encoder_state, **decoder_state}.items():
            tensordict.set(("next", f"{group}_{name}"), value)
        return tensordict

    @property
    def memory_keys(self) -> list[NestedKey]:
        """Large entries of the state, which training needs only at the start of each sequence."""
        networks = cast("_ParallelPass", self[0])
        keys = [*_state_keys(networks.encoder, networks.group), *_state_keys(networks.decoder, networks.group)]
        return [key for key in dict.fromkeys(keys) if key != f"{networks.group}_step"]

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform that carries the state in an environment from step to step and clears it at resets.

        :func:`~torchrl_marl.modules.with_recurrent_state` adds the transform to an environment, and TorchRL's
        :func:`~torchrl.modules.utils.get_primers_from_module` finds it. Without a state, the transform is a no-op.
        """
        networks = cast("_ParallelPass", self[0])
        shapes = {**networks.encoder.state_shapes, **networks.decoder.state_shapes}
        dtype = {"step": torch.long}
        specs = {
            f"{networks.group}_{name}": Unbounded(torch.Size(shape), dtype=dtype.get(name, torch.float32))
            for name, shape in shapes.items()
        }
        return TensorDictPrimer(specs, expand_specs=True)


class AutoregressiveCritic(TensorDictModuleBase):
    """Value of each agent, from the encoder shared with the actor.

    Args:
        encoder: encoder of observations, shared with the actor.
        head: network from encodings ``[*batch, N, E]`` to values ``[*batch, N, 1]``.
        shape: shape of the group.
        value_norm: running statistics of values; the head then predicts normalised values.
        observes: inputs of the encoder besides agents' ids.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: nn.Module,
        shape: GroupSpec,
        *,
        value_norm: ValueNorm | None,
        observes: Observes = "observation",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head if value_norm is None else nn.Sequential(head, Denormalize(value_norm))
        self.group, self.num_agents = shape.name, shape.num_agents
        self.observed_keys = _observed_keys(shape, observes)
        self.in_keys = [*self.observed_keys, *_state_keys(encoder, self.group), (self.group, "encoding")]
        self.out_keys = [(self.group, "state_value")]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``state_value``, ``[*batch, N, 1]``, from the actor's ``encoding`` if present."""
        encoding = tensordict.get((self.group, "encoding"), None)
        if encoding is None:
            encoding = self.encoder(
                _observed(tensordict, self.observed_keys, self.num_agents),
                _state(tensordict, self.encoder, self.group),
            )
        return tensordict.set((self.group, "state_value"), self.head(encoding))

    @torch.no_grad()
    def bootstrap(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``state_value`` of each step and of its next observation, for a value estimator without a network.

        With a memory, the value of an observation depends on earlier steps. At the end of an episode, the next
        observation is not the following row of the data, so an estimator cannot call the critic on ``"next"``.

        Args:
            tensordict: whole sequences, ``[B, T]``; it is changed.

        Returns:
            The same TensorDict.
        """
        observed, observed_next = (
            _observed(rows, self.observed_keys, self.num_agents) for rows in (tensordict, tensordict["next"])
        )
        state = _state(tensordict, self.encoder, self.group)
        encoding, following = self.encoder.bootstrap(observed, observed_next, state)
        tensordict.set(("next", self.group, "state_value"), self.head(following))
        return tensordict.set((self.group, "state_value"), self.head(encoding))


class _ParallelPass(TensorDictModuleBase):
    """Parameters of all agents' distributions, given all observations and actions."""

    def __init__(
        self, encoder: Encoder, decoder: Decoder, space: ActionSpace, shape: GroupSpec, observes: Observes
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.space = encoder, decoder, space
        self.group, self.num_agents, self.masked = shape.name, shape.num_agents, shape.masked
        self.observed_keys = _observed_keys(shape, observes)
        states = [*_state_keys(encoder, self.group), *_state_keys(decoder, self.group)]
        self.in_keys = [*self.observed_keys, (self.group, "action"), *dict.fromkeys(states)]
        self.parameter_keys = [(self.group, key) for key in space.parameter_names]
        self.out_keys = [*self.parameter_keys, (self.group, "encoding")]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        observed = _observed(tensordict, self.observed_keys, self.num_agents)
        encoding = self.encoder(observed, _state(tensordict, self.encoder, self.group))
        tensordict.set((self.group, "encoding"), encoding)
        agents = encoding.ndim - 2
        action = self.space.decoder_input(tensordict.get((self.group, "action")))
        order = tensordict.get((self.group, "order"), None)
        if order is not None:
            encoding, action = _take(encoding, order, agents), _take(action, order, agents)
        start = torch.zeros_like(action.narrow(agents, 0, 1))
        previous = torch.cat([start, action.narrow(agents, 0, action.shape[agents] - 1)], agents)
        output = self.decoder(encoding, previous, _state(tensordict, self.decoder, self.group))
        self.write(tensordict, output if order is None else _take(output, order.argsort(-1), agents))
        return tensordict

    def write(self, tensordict: TensorDictBase, output: Tensor) -> None:
        for key, value in zip(self.parameter_keys, self.space(output), strict=True):
            tensordict.set(key, value)


def _observed_keys(shape: GroupSpec, observes: Observes) -> list[NestedKey]:
    observation: NestedKey = (shape.name, "observation")
    return [observation] if observes == "observation" else [observation, "state"]


def _observed(tensordict: TensorDictBase, keys: Sequence[NestedKey], num_agents: int) -> Tensor:
    """Each agent's observation, the state if among the keys, and a one-hot agent id, ``[*batch, N, O]``."""
    observation, *states = (tensordict[key] for key in keys)
    if observation.shape[-2] != num_agents:
        raise ValueError(
            f"The policy was trained with {num_agents} agents, whose ids it reads, and got {observation.shape[-2]}: "
            "agents that act one after the other are as many as in training; one for any number is trained with "
            "actor=mlp actor.agent_id=false."
        )
    ids = torch.eye(observation.shape[-2], dtype=observation.dtype, device=observation.device)
    common = [*(state.unsqueeze(-2) for state in states), ids]
    return torch.cat([observation, *(x.expand(*observation.shape[:-1], x.shape[-1]) for x in common)], -1)


def _take(values: Tensor, order: Tensor, dim: int) -> Tensor:
    """Reorder agents along ``dim`` by an order ``[*batch, N]``."""
    order = order.reshape(*order.shape, *[1] * (values.ndim - order.ndim))
    return values.gather(dim, order.expand_as(values))


def _state_keys(network: Encoder | Decoder, group: str) -> list[NestedKey]:
    return [f"{group}_{name}" for name in network.state_shapes]


def _state(tensordict: TensorDictBase, network: Encoder | Decoder, group: str) -> dict[str, Tensor]:
    state = {name: tensordict.get(f"{group}_{name}", None) for name in network.state_shapes}
    for name, value in state.items():
        if value is None:
            raise KeyError(f"{group}_{name} is missing: act in with_recurrent_state(env, actor).")
    return state
