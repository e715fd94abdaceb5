"""LDSA's agents: a memory of their ability, by which they choose a subtask, and one value function for each subtask."""

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
    """Choose a subtask for each agent and value its actions by that subtask's function.

        x_j = tanh(W e_j),   p(j) = softmax_j(x_j^T z),   Q(a) = sum_j c_j [h^T W(x_j) + b(x_j)]_a

    ``z`` is a linear function of the agent's ability memory, ``h`` its policy memory, ``c`` a one-hot choice: drawn
    from ``p`` with the straight-through Gumbel softmax when exploring (``ExplorationType.RANDOM``), else the most
    likely. Hyper-networks see the representations ``x`` as constants, as in the authors' code; the tanh bounds how far
    these can be pushed apart.

    Reference: Yang et al., LDSA, 2022, https://arxiv.org/abs/2205.02561, section 3.

    Args:
        recurrent_size: of each of the two memories, which lie side by side in the state.
        num_actions: ``A``.
        num_subtasks: ``K``.
        subtask_size: length of a representation.
    """

    def __init__(self, recurrent_size: int, num_actions: int, num_subtasks: int, subtask_size: int) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.ability = nn.Linear(recurrent_size, subtask_size)
        self.encoder = nn.Linear(num_subtasks, subtask_size, bias=False)
        self.weight = nn.Linear(subtask_size, recurrent_size * num_actions)
        self.bias = nn.Linear(subtask_size, num_actions)

    def subtasks(self) -> Tensor:
        """Representations ``x``, ``[K, subtask_size]``: the encoder of one-hot identities."""
        return self.encoder.weight.T.tanh()

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of the choice, ``[..., K]``, and action values, ``[..., A]``, of the two memories."""
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
    """Two recurrent units side by side: each has half of the inputs and half of the state."""

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

    Act in :func:`~torchrl_marl.modules.with_recurrent_state`; train with :class:`~torchrl_marl.objectives.LDSALoss`.

    Args:
        env: the environment, or the shape of a group (then no environment is needed).
        group: which group of the environment; may be left out if it has just one.
        hidden_sizes: widths of layers before the one that feeds both memories.
        recurrent_size: length of each memory.
        num_subtasks: number of subtasks.
        subtask_size: length of their representations.
        activation: of the layers before the memories.
        agent_id: append a one-hot agent id to the observation.
        device: where parameters live.

    Returns:
        Actor that reads ``(group, "observation")`` and ``(group, "recurrent_state")`` and writes
        ``(group, "subtask_logits")``, ``(group, "action_value")``, ``(group, "action")`` and
        ``("next", group, "recurrent_state")``.

    Raises:
        ValueError: if actions are continuous, or there are not two subtasks.
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
