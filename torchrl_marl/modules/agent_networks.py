"""One network for each agent: evaluated in one batch to act, separately to update one agent."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import torch
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["AgentNetworks", "agent_policy"]


class AgentNetworks(nn.Module):
    """Networks of one architecture, one for each agent: ``[..., N, I]`` to ``[..., N, O]``, index i by network i.

    Networks with several inputs, such as a recurrent unit, take as many tensors, each with a dimension of agents.
    Agents listed with the same network share it: ``AgentNetworks([a, b, a])``.

    A forward pass is one batched operation per layer, over temporarily stacked parameters. The parameters themselves
    are separate leaves: an objective of agent i alone (see :func:`agent_policy`) leaves ``grad`` of all other agents at
    ``None``, and optimisers skip these parameters and their momentum. Parameters that are stored stacked, as in
    :class:`torchrl.modules.MultiAgentMLP`, get zero gradients instead, and Adam still updates them by momentum.

    Args:
        networks: one network for each agent, ``[..., I]`` to ``[..., O]``, identical except for parameter values.

    Raises:
        ValueError: if there is no network, or parameters differ in name or shape; in ``forward``, if an input has
            another number of agents.

    Example:
        >>> networks = AgentNetworks([nn.Linear(4, 2) for _ in range(3)])
        >>> networks(torch.zeros(7, 3, 4)).shape
        torch.Size([7, 3, 2])
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        shapes = [
            {name: value.shape for name, value in [*network.named_parameters(), *network.named_buffers()]}
            for network in networks
        ]
        if not shapes or any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"Agents' networks must be alike, one for each agent; their parameters are {shapes}.")
        self.networks = nn.ModuleList(networks)
        self._names = list(shapes[0])

    def __len__(self) -> int:
        return len(self.networks)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Apply network i to ``[..., i, :]`` of each input, for all agents at once."""
        for tensor in inputs:
            if tensor.shape[-2] != len(self):
                raise ValueError(f"Inputs must be [..., {len(self)} agents, size], got {tuple(tensor.shape)}.")
        if torch.compiler.is_compiling() and not getattr(self.networks[0], "compiles_under_vmap", True):
            outputs = (network(*(x[..., i, :] for x in inputs)) for i, network in enumerate(self.networks))
            return torch.stack([*outputs], -2)
        stacked = {name: torch.stack([_get(network, name) for network in self.networks]) for name in self._names}
        return torch.vmap(self._apply_network, in_dims=(0, *(-2 for _ in inputs)), out_dims=-2)(stacked, *inputs)

    def for_export(self, agent: int | None) -> nn.Module:
        """Return one agent's network, or all networks without ``functional_call``, which cannot be exported.

        See :class:`~torchrl_marl.modules.protocols.Exportable`.
        """
        return _OneByOne(self.networks) if agent is None else self.networks[agent]

    def _apply_network(self, tensors: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        return functional_call(self.networks[0], tensors, inputs)


class _OneByOne(nn.Module):
    """The computation of :class:`AgentNetworks`, one network after another."""

    def __init__(self, networks: nn.ModuleList) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, *inputs: Tensor) -> Tensor:
        slots = zip(*(values.unbind(-2) for values in inputs), strict=True)
        return torch.stack([network(*own) for network, own in zip(self.networks, slots, strict=True)], -2)


def agent_policy(actor: ProbabilisticTensorDictSequential, agent: int) -> ProbabilisticTensorDictSequential:
    """Return the policy of one agent, applied to all agents of a group.

    The policy reads and writes the keys of the group's actor, for any number of agents ``[B, S, ...]``, and applies the
    network of ``agent`` to each. It can thus evaluate ``agent`` on another agent's experience. It shares the parameters
    of ``actor``.

    Args:
        actor: actor whose parameters all belong to :class:`AgentNetworks`.
        agent: index of the agent in the group.

    Raises:
        ValueError: if agents share parameters, or there is no such agent.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl_marl.modules import GroupSpec, make_actor
        >>> shape = GroupSpec("agents", num_agents=3, observation_size=8, num_actions=5)
        >>> second = agent_policy(make_actor(shape, share_parameters=False), 1)
        >>> second.get_dist(TensorDict({"agents": {"observation": torch.zeros(7, 2, 8)}}, batch_size=7)).probs.shape
        torch.Size([7, 2, 5])
    """
    num_agents = count_agents(actor)
    if not 0 <= agent < num_agents:
        raise ValueError(f"There is no agent {agent}: the actor has agents 0 to {num_agents - 1}.")
    memo: dict[int, object] = {}  # objects that deepcopy shares: all but the containers of AgentNetworks
    for module in actor.modules():
        if isinstance(module, AgentNetworks):
            memo[id(module)] = module.networks[agent]
        elif not any(isinstance(child, AgentNetworks) for child in module.modules()):
            memo[id(module)] = module
    return copy.deepcopy(actor, memo)


def count_agents(actor: nn.Module) -> int:
    """Return the number of agents with a separate network in ``actor``.

    Raises:
        ValueError: if agents share a parameter, or the actor has no :class:`AgentNetworks`.
    """
    stacks = [module for module in actor.modules() if isinstance(module, AgentNetworks)]
    networks = [network for stack in stacks for network in stack.networks]
    owners = Counter(id(parameter) for network in networks for parameter in network.parameters())
    shared = [name for name, parameter in actor.named_parameters() if owners[id(parameter)] != 1]
    if shared or len({len(stack) for stack in stacks}) != 1:
        raise ValueError(
            "Every agent needs a network of its own: build the actor with make_actor(..., share_parameters=False), or "
            f"hold the agents' networks in AgentNetworks. Parameters that agents share: {', '.join(shared) or 'none'}."
        )
    return len(stacks[0])


def _get(network: nn.Module, name: str) -> Tensor:
    """A parameter or buffer, or its replacement by tensordict, which the module does not list as either."""
    path, _, name = name.rpartition(".")
    return getattr(network.get_submodule(path), name)
