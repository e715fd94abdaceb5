"""One network for each agent: evaluated together when they act, apart when one of them learns."""

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
    """Networks of one architecture, one for each agent: ``[..., N, I]`` to ``[..., N, O]``, slot i by network i.

    Networks of several inputs, such as a recurrent unit, get as many, and all of these have agents' slots.
    Agents share what stands in both their places: ``AgentNetworks([a, b, a])``.

    A forward pass is one batched operation a layer, over parameters stacked for the occasion. The parameters themselves
    stay apart, as leaves of their own: an objective of agent i alone (see :func:`agent_policy`) leaves ``grad`` of all
    other agents at ``None``, and an optimiser skips what has no gradient, momentum included. Parameters that are stored
    stacked, as in :class:`torchrl.modules.MultiAgentMLP`, get zeros there, on which Adam moves by its momentum.

    Args:
        networks: one for each agent, alike in all but their parameters' values; ``[..., I]`` to ``[..., O]`` each.

    Raises:
        ValueError: if there is no network, or parameters differ in name or shape; in ``forward``, if the inputs are
            not those of so many agents.

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
        stacked = {name: torch.stack([_get(network, name) for network in self.networks]) for name in self._names}
        return torch.vmap(self._apply_network, in_dims=(0, *(-2 for _ in inputs)), out_dims=-2)(stacked, *inputs)

    def for_export(self, agent: int | None) -> nn.Module:
        """Return one agent's network, or all without ``functional_call``, whose tensors are no constants of a program.

        See :class:`~torchrl_marl.modules.protocols.Exportable`.
        """
        return _OneByOne(self.networks) if agent is None else self.networks[agent]

    def _apply_network(self, tensors: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        return functional_call(self.networks[0], tensors, inputs)


class _OneByOne(nn.Module):
    """What :class:`AgentNetworks` computes, network after network."""

    def __init__(self, networks: nn.ModuleList) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, *inputs: Tensor) -> Tensor:
        slots = zip(*(values.unbind(-2) for values in inputs), strict=True)
        return torch.stack([network(*own) for network, own in zip(self.networks, slots, strict=True)], -2)


def agent_policy(actor: ProbabilisticTensorDictSequential, agent: int) -> ProbabilisticTensorDictSequential:
    """Return the policy of one agent of a group, in place of everybody's.

    It reads and writes the keys of the group's actor, with any number of slots ``[B, S, ...]``, and acts in all of them
    as ``agent`` would; so it can be asked what this agent thinks of another one's experience. It shares the parameters
    of ``actor``.

    Args:
        actor: its parameters are those of one or more :class:`AgentNetworks`.
        agent: index in the group.

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
    memo: dict[int, object] = {}  # what deepcopy takes instead of copying: all but the containers on the way
    for module in actor.modules():
        if isinstance(module, AgentNetworks):
            memo[id(module)] = module.networks[agent]
        elif not any(isinstance(child, AgentNetworks) for child in module.modules()):
            memo[id(module)] = module
    return copy.deepcopy(actor, memo)


def count_agents(actor: nn.Module) -> int:
    """Return how many agents have networks of their own in ``actor``.

    Raises:
        ValueError: if any parameter is shared by agents, or there are no networks of their own.
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
    """A parameter or buffer; or what tensordict has put in its place, which the module does not list as either."""
    path, _, name = name.rpartition(".")
    return getattr(network.get_submodule(path), name)
