"""Agents of LDSA: a recurrent ability state that selects a subtask, and one value function per subtask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn import functional
from torchrl.envs import EnvBase, ExplorationType
from torchrl.envs.utils import exploration_type
from torchrl.modules import ProbabilisticActor

from torchrl_marl.modules.layers import Activation, Networks, activation_class, initialize, make_policy
from torchrl_marl.modules.recurrent import MultiAgentGRU, RecurrentModule
from torchrl_marl.modules.spec import GroupSpec, group_shape

__all__ = ["SubtaskHead", "make_ldsa_actor"]


class SubtaskHead(nn.Module):
    """Select a subtask for each agent, and compute its action values with the subtask's value function.

        x_j = tanh(W e_j),   p(j) = softmax_j(x_j^T z),   Q(a) = sum_j c_j [h^T W(x_j) + b(x_j)]_a

    ``z`` is a linear function of the agent's ability state, ``h`` is its policy state, and ``c`` is the one-hot
    selection: sampled from ``p`` with the straight-through Gumbel softmax under ``ExplorationType.RANDOM``, otherwise
    the most likely subtask. As in the authors' code, the hyper-networks pass no gradient to the representations ``x``;
    the tanh bounds the distances between these.

    Reference: Yang et al., LDSA, 2022, https://arxiv.org/abs/2205.02561, section 3.

    Args:
        recurrent_size: size of the ability state and of the policy state, which are concatenated.
        num_actions: ``A``.
        num_subtasks: ``K``.
        subtask_size: size of a representation.
    """

    def __init__(self, recurrent_size: int, num_actions: int, num_subtasks: int, subtask_size: int) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.ability = nn.Linear(recurrent_size, subtask_size)
        self.encoder = nn.Linear(num_subtasks, subtask_size, bias=False)
        self.weight = nn.Linear(subtask_size, recurrent_size * num_actions)
        self.bias = nn.Linear(subtask_size, num_actions)

    def subtasks(self) -> Tensor:
        """Representations ``x``, ``[K, subtask_size]``: encodings of the one-hot subtask identities."""
        return self.encoder.weight.T.tanh()

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return selection logits, ``[..., K]``, and action values, ``[..., A]``, from the concatenated states."""
        ability, memory = state.chunk(2, -1)
        subtasks = self.subtasks()
        logits = self.ability(ability) @ subtasks.T
        if exploration_type() == ExplorationType.RANDOM:
            choice = functional.gumbel_softmax(logits, hard=True)
        else:
            choice = functional.one_hot(logits.argmax(-1), len(subtasks)).to(logits.dtype)
        weight = self.weight(subtasks.detach()).unflatten(-1, (-1, self.num_actions))
        values = torch.einsum("...h,kha->...ka", memory, weight) + self.bias(subtasks.detach())
        return logits, (choice.unsqueeze(-1) * values).sum(-2)


class _TwoMemories(nn.Module):
    """Two recurrent units in parallel; each reads half of the inputs and half of the state."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(MultiAgentGRU(size, size) for _ in range(2))

    def forward(self, inputs: Tensor, state: Tensor, restart: Tensor | None = None) -> Tensor:
        halves = zip(self.units, inputs.chunk(2, -1), state.chunk(2, -1), strict=True)
        return torch.cat([unit(own, before, restart) for unit, own, before in halves], -1)


def make_ldsa_actor(
    env: EnvBase | GroupSpec,
    *,
    group: str | None = None,
    hidden_sizes: Sequence[int] = (),
    recurrent_size: int = 64,
    num_subtasks: int = 4,
    subtask_size: int = 64,
    activation: Activation = "relu",
    agent_id: bool = True,
    device: torch.device | str | None = None,
) -> ProbabilisticActor:
    """Build LDSA's agents, which share all parameters; their action values are the logits of a policy.

    The environment must be wrapped in :func:`~torchrl_marl.modules.with_recurrent_state`. Train the actor with
    :class:`~torchrl_marl.objectives.LDSALoss`.

    Args:
        env: the environment, or the shape of a group (then no environment is needed).
        group: name of the group; optional if the environment has one group.
        hidden_sizes: widths of the layers before the input layer of the recurrent units.
        recurrent_size: size of the ability state and of the policy state.
        num_subtasks: number of subtasks.
        subtask_size: size of a subtask's representation.
        activation: activation of the layers before the recurrent units.
        agent_id: append a one-hot agent id to the observation.
        device: device of the parameters.

    Returns:
        Actor that reads ``(group, "observation")`` and ``(group, "recurrent_state")`` and writes
        ``(group, "subtask_logits")``, ``(group, "action_value")``, ``(group, "action")`` and
        ``("next", group, "recurrent_state")``.

    Raises:
        ValueError: if actions are continuous, or ``num_subtasks`` is below 2.
    """
    shape = group_shape(env, group)
    if shape.num_actions is None:
        raise ValueError(f"LDSA needs discrete actions, but {shape.name!r} has continuous ones.")
    if num_subtasks < 2:
        raise ValueError(f"num_subtasks must be at least 2; got {num_subtasks}.")
    inputs = Networks(shape, hidden_sizes, activation, True, agent_id).each(shape.observation_size, 2 * recurrent_size)
    initialize(inputs, activation)
    memory = RecurrentModule(
        nn.Sequential(inputs, activation_class(activation)()),
        _TwoMemories(recurrent_size),
        in_key=(shape.name, "observation"),
        state_key=(shape.name, "recurrent_state"),
        state_shape=(shape.num_agents, 2 * recurrent_size),
    )
    head = TensorDictModule(
        SubtaskHead(recurrent_size, shape.num_actions, num_subtasks, subtask_size),
        in_keys=memory.out_keys,
        out_keys=[(shape.name, "subtask_logits"), (shape.name, "action_value")],
    )
    return make_policy(
        shape, (shape.name, "action_value"), nn.Identity(), memory.to(device), head.to(device), device=device
    )
