"""Builders of decentralised actors and of critics, as TensorDict modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor, ValueNorm

from torchrl_marl.modules.layers import Activation, Networks, initialize, make_policy, num_outputs
from torchrl_marl.modules.observation_norm import ObservationNorm
from torchrl_marl.modules.spec import GroupSpec, group_shape
from torchrl_marl.modules.value_norm import Denormalize

__all__ = ["make_actor", "make_critic"]


def make_actor(
    env: EnvBase | GroupSpec,
    *,
    group: str | None = None,
    hidden_sizes: Sequence[int] = (256, 256),
    activation: Activation = "tanh",
    share_parameters: bool | Sequence[int] = True,
    agent_id: bool = True,
    normalize_observations: bool = False,
    device: torch.device | str | None = None,
) -> ProbabilisticActor:
    """Build a decentralised stochastic policy: an MLP from each agent's observation to its action distribution.

    Continuous actions follow a Gaussian squashed into their bounds. Discrete actions follow a categorical, masked by
    ``(group, "action_mask")`` if the environment writes an action mask. Weights are initialised orthogonally, with a
    small gain in the last layer.

    Args:
        env: the environment, or the shape of a group (then no environment is needed).
        group: name of the group; optional if the environment has one group.
        hidden_sizes: widths of the hidden layers.
        activation: activation of the hidden layers.
        share_parameters: one network for all agents, or one for each
            (:class:`~torchrl_marl.modules.AgentNetworks`); or the cluster of each agent, such as ``[0, 1, 0]``, for one
            network per cluster (see :func:`~torchrl_marl.modules.cluster_agents`).
        agent_id: append a one-hot agent id to the observation, so that agents with a shared network can differ. Agents
            with separate networks, or networks per cluster, get no id.
        normalize_observations: whether to normalise observations by running statistics
            (:class:`~torchrl_marl.modules.ObservationNorm`).
        device: device of the parameters.

    Returns:
        Actor that reads ``(group, "observation")`` and writes ``(group, "action")`` and ``(group, "action_log_prob")``.

    Raises:
        ValueError: if the group or its spaces are not supported, or the activation is unknown.

    Example:
        >>> from tensordict import TensorDict
        >>> actor = make_actor(GroupSpec("agents", num_agents=3, observation_size=8, num_actions=5))
        >>> data = TensorDict({"agents": {"observation": torch.zeros(7, 3, 8)}}, batch_size=7)
        >>> actor(data)["agents", "action"].shape
        torch.Size([7, 3])
    """
    shape = group_shape(env, group)
    networks = Networks(shape, hidden_sizes, activation, share_parameters, agent_id)
    network = networks.each(shape.observation_size, num_outputs(shape))
    initialize(network, activation, output_gain=0.01)
    key = (shape.name, "observation")
    if normalize_observations:
        network = nn.Sequential(ObservationNorm(key, shape.observation_size), network)
    return make_policy(shape, key, network, device=device)


def make_critic(
    env: EnvBase | GroupSpec,
    *,
    group: str | None = None,
    observes: Literal["joint_observation", "state", "observation"] = "joint_observation",
    hidden_sizes: Sequence[int] = (256, 256),
    activation: Activation = "tanh",
    share_parameters: bool | Sequence[int] = True,
    agent_id: bool = True,
    normalize_observations: bool = False,
    value_norm: ValueNorm | None = None,
    device: torch.device | str | None = None,
) -> TensorDictModule:
    """Build a critic: an MLP that predicts the value of every agent of a group.

    A centralised critic with shared parameters has one body and one output for each agent, so one forward pass gives
    the values of all agents.

    Args:
        env: the environment, or the shape of a group.
        group: name of the group; optional if the environment has one group.
        observes: ``"joint_observation"``, the concatenated observations of all agents; ``"state"``, the global state at
            the root; ``"observation"``, each agent's own observation (IPPO).
        hidden_sizes: widths of the hidden layers.
        activation: activation of the hidden layers.
        share_parameters: one network for all agents, for each agent, or for each cluster, as for actors.
        agent_id: append a one-hot agent id to an agent's own observation (shared ``"observation"`` critics only; a
            centralised critic has separate outputs for agents).
        normalize_observations: whether to normalise the critic's inputs by running statistics
            (:class:`~torchrl_marl.modules.ObservationNorm`).
        value_norm: running statistics of values; the network then predicts normalised values, see
            :class:`~torchrl_marl.modules.Denormalize`.
        device: device of the parameters.

    Returns:
        Critic that writes ``(group, "state_value")``, ``[*batch, agents, 1]``, in units of the return.

    Raises:
        ValueError: if the group or its spaces are not supported, the state is missing, or an option is unknown.

    Example:
        >>> from tensordict import TensorDict
        >>> critic = make_critic(GroupSpec("agents", num_agents=3, observation_size=8, num_actions=5))
        >>> data = TensorDict({"agents": {"observation": torch.zeros(7, 3, 8)}}, batch_size=7)
        >>> critic(data)["agents", "state_value"].shape
        torch.Size([7, 3, 1])
    """
    shape = group_shape(env, group)
    key = "state" if observes == "state" else (shape.name, "observation")
    networks = Networks(shape, hidden_sizes, activation, share_parameters, agent_id)
    if observes == "observation":
        network = networks.each(shape.observation_size, 1)
    else:
        inputs, joined = networks.joint_input(observes)
        network = nn.Sequential(*joined, *networks.values(inputs))
    initialize(network, activation, output_gain=1.0)
    size = shape.state_size if observes == "state" else shape.observation_size
    layers: list[nn.Module] = [ObservationNorm(key, size or 0)] if normalize_observations else []
    layers += [network] if value_norm is None else [network, Denormalize(value_norm)]
    return TensorDictModule(nn.Sequential(*layers).to(device), in_keys=[key], out_keys=[(shape.name, "state_value")])
