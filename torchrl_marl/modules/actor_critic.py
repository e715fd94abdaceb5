"""Builders of decentralised actors and of critics, as TensorDict modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import NestedKey
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.envs import EnvBase
from torchrl.modules import MLP, MaskedCategorical, MultiAgentMLP, ProbabilisticActor, TanhNormal, ValueNorm

from torchrl_marl.modules.group import GroupShape
from torchrl_marl.modules.value_norm import Denormalize

__all__ = ["make_actor", "make_critic"]

Activation = Literal["tanh", "relu"]
_ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def make_actor(
    env: EnvBase | GroupShape,
    *,
    group: str | None = None,
    hidden_sizes: Sequence[int] = (256, 256),
    activation: Activation = "tanh",
    share_parameters: bool = True,
    agent_id: bool = True,
    device: torch.device | str | None = None,
) -> ProbabilisticActor:
    """Build a decentralised stochastic policy: an MLP from each agent's observation to its action distribution.

    Continuous actions get a Gaussian squashed into their bounds, discrete ones a categorical, masked by
    ``(group, "action_mask")`` where the environment writes it. Weights are orthogonal, the last layer's small.

    Args:
        env: the environment, or the shape of a group (then no environment is needed).
        group: which group of the environment; may be left out if it has just one.
        hidden_sizes: widths of the hidden layers.
        activation: of the hidden layers.
        share_parameters: one network for all agents, or one for each (their parameters are stacked).
        agent_id: append a one-hot agent id to the observation, so that agents that share a network can differ. Agents
            with networks of their own need none and get none.
        device: where parameters live.

    Returns:
        Actor that reads ``(group, "observation")`` and writes ``(group, "action")`` and ``(group, "action_log_prob")``.

    Raises:
        ValueError: if the group or its spaces do not fit, or the activation is unknown.

    Example:
        >>> from tensordict import TensorDict
        >>> actor = make_actor(GroupShape("agents", num_agents=3, observation_size=8, num_actions=5))
        >>> data = TensorDict({"agents": {"observation": torch.zeros(7, 3, 8)}}, batch_size=7)
        >>> actor(data)["agents", "action"].shape
        torch.Size([7, 3])
    """
    shape = _shape(env, group)
    outputs = 2 * len(shape.action_low) if shape.num_actions is None else shape.num_actions
    network = _agent_network(
        shape, shape.observation_size, outputs, hidden_sizes, activation, share_parameters, agent_id
    )
    _initialize(network, activation, output_gain=0.01)
    name = shape.name
    if shape.num_actions is None:
        network = nn.Sequential(network, NormalParamExtractor())
        keys: list[NestedKey] = [(name, "loc"), (name, "scale")]
        bounds = {
            "low": torch.tensor(shape.action_low, device=device),
            "high": torch.tensor(shape.action_high, device=device),
        }
        distribution = {"in_keys": keys, "distribution_class": TanhNormal, "distribution_kwargs": bounds}
    else:
        keys = [(name, "logits")]
        masked = {
            "in_keys": {"logits": keys[0], "mask": (name, "action_mask")},
            "distribution_class": MaskedCategorical,
        }
        distribution = masked if shape.masked else {"in_keys": keys, "distribution_class": Categorical}
    return ProbabilisticActor(
        TensorDictModule(network.to(device), in_keys=[(name, "observation")], out_keys=keys),
        out_keys=[(name, "action")],
        return_log_prob=True,
        log_prob_key=(name, "action_log_prob"),
        **distribution,
    )


def make_critic(
    env: EnvBase | GroupShape,
    *,
    group: str | None = None,
    observes: Literal["joint_observation", "state", "observation"] = "joint_observation",
    hidden_sizes: Sequence[int] = (256, 256),
    activation: Activation = "tanh",
    share_parameters: bool = True,
    agent_id: bool = True,
    value_norm: ValueNorm | None = None,
    device: torch.device | str | None = None,
) -> TensorDictModule:
    """Build a critic: an MLP that values every agent of a group.

    A centralised critic with shared parameters has one body and one output for each agent, so that a step of all agents
    costs one forward pass.

    Args:
        env: the environment, or the shape of a group.
        group: which group of the environment; may be left out if it has just one.
        observes: ``"joint_observation"``, all agents' observations side by side; ``"state"``, the root's ``"state"``;
            ``"observation"``, each agent's own (IPPO).
        hidden_sizes: widths of the hidden layers.
        activation: of the hidden layers.
        share_parameters: one network for all agents, or one for each.
        agent_id: append a one-hot agent id to an agent's own observation (shared ``"observation"`` critics only; a
            centralised critic knows agents by its outputs).
        value_norm: running statistics of values; the network then predicts normalised values, see
            :class:`~torchrl_marl.modules.Denormalize`.
        device: where parameters live.

    Returns:
        Critic that writes ``(group, "state_value")``, ``[*batch, agents, 1]``, in units of the return.

    Raises:
        ValueError: if the group or its spaces do not fit, there is no state, or an option is unknown.

    Example:
        >>> from tensordict import TensorDict
        >>> critic = make_critic(GroupShape("agents", num_agents=3, observation_size=8, num_actions=5))
        >>> data = TensorDict({"agents": {"observation": torch.zeros(7, 3, 8)}}, batch_size=7)
        >>> critic(data)["agents", "state_value"].shape
        torch.Size([7, 3, 1])
    """
    shape = _shape(env, group)
    key = "state" if observes == "state" else (shape.name, "observation")
    if observes == "observation":
        network = _agent_network(shape, shape.observation_size, 1, hidden_sizes, activation, share_parameters, agent_id)
    elif observes in ("joint_observation", "state"):
        network = _central_network(shape, observes, hidden_sizes, activation, share_parameters)
    else:
        raise ValueError(f"observes must be joint_observation, state or observation; got {observes!r}.")
    _initialize(network, activation, output_gain=1.0)
    layers = [network] if value_norm is None else [network, Denormalize(value_norm)]
    return TensorDictModule(nn.Sequential(*layers).to(device), in_keys=[key], out_keys=[(shape.name, "state_value")])


class _OneHotAgentID(nn.Module):
    """Append a one-hot agent id: ``[..., N, O]`` to ``[..., N, O + N]``."""

    ids: Tensor

    def __init__(self, num_agents: int) -> None:
        super().__init__()
        self.register_buffer("ids", torch.eye(num_agents), persistent=False)

    def forward(self, observation: Tensor) -> Tensor:
        ids = self.ids.expand(*observation.shape[:-1], -1)
        return torch.cat([observation, ids], -1)


class _ExpandToAgents(nn.Module):
    """Give every agent the whole input: ``[..., D]`` to ``[..., N, D]``."""

    def __init__(self, num_agents: int) -> None:
        super().__init__()
        self.num_agents = num_agents

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.unsqueeze(-2).expand(*inputs.shape[:-1], self.num_agents, inputs.shape[-1])


def _shape(env: EnvBase | GroupShape, group: str | None) -> GroupShape:
    if not isinstance(env, GroupShape):
        return GroupShape.from_env(env, group)
    if group not in (None, env.name):
        raise ValueError(f"group={group!r}, but the shape given is that of {env.name!r}.")
    return env


def _agent_network(
    shape: GroupShape,
    inputs: int,
    outputs: int,
    hidden_sizes: Sequence[int],
    activation: Activation,
    share_parameters: bool,
    agent_id: bool,
) -> nn.Module:
    """Network applied to each agent's own input, ``[..., N, inputs]`` to ``[..., N, outputs]``."""
    if not share_parameters:
        return MultiAgentMLP(
            n_agent_inputs=inputs,
            n_agent_outputs=outputs,
            n_agents=shape.num_agents,
            centralized=False,
            share_params=False,
            num_cells=list(hidden_sizes),
            activation_class=_activation(activation),
        )
    if not agent_id:
        return _mlp(inputs, outputs, hidden_sizes, activation)
    network = _mlp(inputs + shape.num_agents, outputs, hidden_sizes, activation)
    return nn.Sequential(_OneHotAgentID(shape.num_agents), network)


def _central_network(
    shape: GroupShape, observes: str, hidden_sizes: Sequence[int], activation: Activation, share_parameters: bool
) -> nn.Module:
    """Network applied to what all agents see together, to ``[..., N, 1]``."""
    if observes == "state":
        if shape.state_size is None:
            raise ValueError(
                'observes="state", but the environment has no "state" at the root; use "joint_observation".'
            )
        inputs, joined = shape.state_size, nn.Identity()
    else:
        inputs, joined = shape.num_agents * shape.observation_size, nn.Flatten(-2, -1)
    if not share_parameters:
        network = _agent_network(shape, inputs, 1, hidden_sizes, activation, share_parameters=False, agent_id=False)
        return nn.Sequential(joined, _ExpandToAgents(shape.num_agents), network)
    network = _mlp(inputs, shape.num_agents, hidden_sizes, activation)
    return nn.Sequential(joined, network, nn.Unflatten(-1, (shape.num_agents, 1)))


def _mlp(inputs: int, outputs: int, hidden_sizes: Sequence[int], activation: Activation) -> MLP:
    return MLP(inputs, outputs, num_cells=list(hidden_sizes), activation_class=_activation(activation))


def _activation(name: Activation) -> type[nn.Module]:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}; got {name!r}.")
    return _ACTIVATIONS[name]


@torch.no_grad()
def _initialize(network: nn.Module, activation: Activation, *, output_gain: float) -> None:
    """Orthogonal weights, zero biases; per-agent weights, stacked as ``[N, out, in]``, one agent at a time."""
    weights = [parameter for name, parameter in network.named_parameters() if name.endswith("weight")]
    hidden_gain = math.sqrt(2) if activation == "relu" else nn.init.calculate_gain(activation)
    for weight in weights:
        for matrix in weight.unbind() if weight.ndim == 3 else [weight]:
            nn.init.orthogonal_(matrix, gain=output_gain if weight is weights[-1] else hidden_gain)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
