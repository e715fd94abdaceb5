"""Shared parts of the builders: networks over agents, the policy head, and weight initialisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from tensordict import NestedKey
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import MLP, ProbabilisticActor

from torchrl_marl.modules.agent_networks import AgentNetworks
from torchrl_marl.modules.distributions import CensoredTanhNormal, InversionCategorical, InversionMaskedCategorical
from torchrl_marl.modules.spec import GroupSpec

__all__ = [
    "Activation",
    "Chain",
    "Networks",
    "OneHotAgentID",
    "activation_class",
    "initialize",
    "make_policy",
    "num_outputs",
]

Activation = Literal["tanh", "relu"]
_ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def make_policy(
    shape: GroupSpec,
    in_key: NestedKey | list[NestedKey],
    network: nn.Module,
    *before: TensorDictModuleBase,
    device: torch.device | str | None = None,
) -> ProbabilisticActor:
    """Build a policy from a network that reads ``in_key``, with squashed Gaussian or (masked) categorical actions.

    Args:
        shape: shape of the group.
        in_key: entry that the network reads, ``[*batch, agents, size]``, or a list of entries.
        network: network with ``num_outputs(shape)`` outputs for each agent.
        *before: TensorDict modules that run first, such as a module that writes ``in_key``.
        device: device of the parameters.
    """
    name = shape.name
    if shape.num_actions is None:
        network = Chain(network, NormalParamExtractor())
        keys: list[NestedKey] = [(name, "loc"), (name, "scale")]
        bounds = {
            "low": torch.tensor(shape.action_low, device=device),
            "high": torch.tensor(shape.action_high, device=device),
        }
        distribution = {"in_keys": keys, "distribution_class": CensoredTanhNormal, "distribution_kwargs": bounds}
    else:
        keys = [(name, "logits")]
        masked = {
            "in_keys": {"logits": keys[0], "mask": (name, "action_mask")},
            "distribution_class": InversionMaskedCategorical,
        }
        distribution = masked if shape.masked else {"in_keys": keys, "distribution_class": InversionCategorical}
    in_keys = in_key if isinstance(in_key, list) else [in_key]
    head = TensorDictModule(network.to(device), in_keys=in_keys, out_keys=keys)
    return ProbabilisticActor(
        TensorDictSequential([*before, head]) if before else head,
        out_keys=[(name, "action")],
        return_log_prob=True,
        log_prob_key=(name, "action_log_prob"),
        **distribution,
    )


def num_outputs(shape: GroupSpec) -> int:
    """Number of parameters of an agent's action distribution: logits, or a location and a scale per dimension."""
    return 2 * len(shape.action_low) if shape.num_actions is None else shape.num_actions


class Chain(nn.Sequential):
    """A sequence of modules, the first of which may take several inputs."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Pass the inputs to the first module, and its result on."""
        first, *others = self
        result = first(*inputs)
        for module in others:
            result = module(result)
        return result


class Networks(NamedTuple):
    """Architecture and parameter sharing of the multi-layer perceptrons of a group."""

    shape: GroupSpec
    hidden_sizes: Sequence[int]
    activation: Activation
    share_parameters: bool | Sequence[int] = True
    agent_id: bool = False

    def each(self, inputs: int, outputs: int) -> nn.Module:
        """Network of each agent's own input, ``[..., N, inputs]`` to ``[..., N, outputs]``."""
        num_agents = self.shape.num_agents
        if self.share_parameters is not True:
            clusters = list(range(num_agents) if self.share_parameters is False else self.share_parameters)
            if len(clusters) != num_agents:
                raise ValueError(
                    "share_parameters must be True, False or a cluster for each agent; "
                    f"got {clusters} for {num_agents} agents."
                )
            networks = {cluster: self._mlp(inputs, outputs) for cluster in dict.fromkeys(clusters)}
            return AgentNetworks([networks[cluster] for cluster in clusters])
        if not self.agent_id:
            return self._mlp(inputs, outputs)
        return nn.Sequential(OneHotAgentID(num_agents), self._mlp(inputs + num_agents, outputs))

    def joint_input(self, observes: str) -> tuple[int, list[nn.Module]]:
        """Return the size of the joint input and the layers that concatenate it.

        The layers return ``[..., size]`` for a network shared by all agents, otherwise ``[..., N, size]``.
        """
        shape = self.shape
        if observes == "joint_observation":
            size, joined = shape.num_agents * shape.observation_size, nn.Flatten(-2, -1)
        elif observes != "state":
            raise ValueError(f"observes must be joint_observation, state or observation; got {observes!r}.")
        elif shape.state_size is None:
            raise ValueError(
                'observes="state", but the environment has no "state" at the root; use "joint_observation".'
            )
        else:
            size, joined = shape.state_size, nn.Identity()
        return size, [joined] if self.share_parameters is True else [joined, _ExpandToAgents(shape.num_agents)]

    def values(self, inputs: int) -> list[nn.Module]:
        """Value layers for ``[..., inputs]`` (shared body with an output per agent) or ``[..., N, inputs]``."""
        if self.share_parameters is not True:
            return [self._replace(agent_id=False).each(inputs, 1)]
        return [self._mlp(inputs, self.shape.num_agents), nn.Unflatten(-1, (self.shape.num_agents, 1))]

    def _mlp(self, inputs: int, outputs: int) -> MLP:
        if any(size < 1 for size in self.hidden_sizes):
            raise ValueError(f"hidden_sizes must be at least 1 each, got {list(self.hidden_sizes)}.")
        return MLP(
            inputs, outputs, num_cells=list(self.hidden_sizes), activation_class=activation_class(self.activation)
        )


def activation_class(name: Activation) -> type[nn.Module]:
    """Return the activation class named ``name``."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}; got {name!r}.")
    return _ACTIVATIONS[name]


def initialize(network: nn.Module, activation: Activation, *, output_gain: float | None = None) -> None:
    """Initialise every MLP with orthogonal weights and zero biases.

    The last layer has the gain ``output_gain``, or with ``None`` that of hidden layers, if an activation follows.
    """
    hidden_gain = math.sqrt(2) if activation == "relu" else nn.init.calculate_gain(activation)
    last_gain = hidden_gain if output_gain is None else output_gain
    for mlp in (module for module in network.modules() if isinstance(module, MLP)):
        layers = [layer for layer in mlp if isinstance(layer, nn.Linear)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight, gain=last_gain if layer is layers[-1] else hidden_gain)
            nn.init.zeros_(layer.bias)


class OneHotAgentID(nn.Module):
    """Append one-hot agent ids to each agent's input."""

    ids: Tensor

    def __init__(self, num_agents: int) -> None:
        super().__init__()
        self.register_buffer("ids", torch.eye(num_agents), persistent=False)

    def forward(self, observation: Tensor) -> Tensor:
        """Append the ids, ``[..., N, O]`` to ``[..., N, O + N]``."""
        if len(self.ids) not in (1, observation.shape[-2]):
            raise ValueError(
                f"The policy was trained with {len(self.ids)} agents, whose ids it reads, and got "
                f"{observation.shape[-2]}: one for any number of agents is trained with actor.agent_id=false."
            )
        ids = self.ids.expand(*observation.shape[:-1], -1)
        return torch.cat([observation, ids], -1)

    def for_export(self, agent: int | None) -> nn.Module:
        """Keep the id of one agent; see :class:`~torchrl_marl.modules.protocols.Exportable`."""
        self.ids = self.ids if agent is None else self.ids[agent : agent + 1].clone()
        return self


class _ExpandToAgents(nn.Module):
    """Repeat the whole input for every agent, ``[..., D]`` to ``[..., N, D]``."""

    def __init__(self, num_agents: int) -> None:
        super().__init__()
        self.num_agents = num_agents

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.unsqueeze(-2).expand(*inputs.shape[:-1], self.num_agents, inputs.shape[-1])
