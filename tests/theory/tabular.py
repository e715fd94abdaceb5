"""Cooperative Markov games small enough to enumerate, with policies that are tables: every expectation is a sum.

A batch of *rows* holds each pair of a state and a joint action once. Its advantages are multiplied by how often the
old policy comes to that pair, so that a loss with ``reduction="sum"`` is the exact expectation of what it estimates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from torchrl_marl.modules import GroupSpec, make_actor, make_critic

EXACT = {"functional": False, "normalize_advantage": False, "entropy_coeff": 0.0, "reduction": "sum"}


class Evaluation(NamedTuple):
    """What a joint policy is worth: its return from the start, values, advantages, discounted visits of each state."""

    ret: Tensor  # []
    value: Tensor  # [S]
    advantage: Tensor  # [S, J]
    visits: Tensor  # [S], summing to 1 / (1 - discount)


class Game:
    """A cooperative Markov game of S states, N agents and K actions each, all of whom see the state.

    Args:
        reward: ``[S, J]`` with ``J = K ** N`` joint actions, the last agent's action counting fastest.
        transition: ``[S, J, S]``; by default the game ends after one step.
    """

    def __init__(self, reward: Tensor, num_agents: int, transition: Tensor | None = None, discount: float = 0.5):
        self.num_states, joint = reward.shape
        self.num_agents, self.num_actions = num_agents, round(joint ** (1 / num_agents))
        self.reward, self.discount = reward.double(), discount
        self.transition = torch.zeros(*reward.shape, len(reward)).double() if transition is None else transition
        self.start = torch.full((self.num_states,), 1 / self.num_states, dtype=torch.float64)
        self.actions = torch.tensor(list(itertools.product(range(self.num_actions), repeat=num_agents)))  # [J, N]

    def joint(self, policies: Tensor) -> Tensor:
        """Joint policy ``[S, J]`` of independent agents' ``[N, S, K]``."""
        return torch.stack([policies[agent][:, self.actions[:, agent]] for agent in range(self.num_agents)]).prod(0)

    def evaluate(self, joint: Tensor) -> Evaluation:
        """Solve Bellman's equation for a joint policy ``[S, J]``."""
        follows = torch.einsum("sj,sjt->st", joint, self.transition)
        inverse = torch.linalg.inv(torch.eye(self.num_states) - self.discount * follows)
        value = inverse @ (joint * self.reward).sum(-1)
        action_value = self.reward + self.discount * self.transition @ value
        return Evaluation(self.start @ value, value, action_value - value[:, None], self.start @ inverse)

    def rows(self, policies: Tensor, joint: Tensor | None = None) -> TensorDict:
        """Every state with every joint action, acted by independent policies ``[N, S, K]``, advantages weighted.

        Args:
            joint: who weights and judges the rows instead of the product of ``policies``, ``[S, J]``.
        """
        joint = self.joint(policies) if joint is None else joint
        states, choices = torch.arange(self.num_states), torch.arange(len(self.actions))
        state, choice = torch.cartesian_prod(states, choices).unbind(-1)
        evaluation, action = self.evaluate(joint), self.actions[choice]
        log_prob = torch.stack([policies[agent][state, action[:, agent]] for agent in range(self.num_agents)], -1).log()
        weight = (evaluation.visits[:, None] * joint).flatten()
        one_hot = torch.eye(self.num_states, dtype=torch.float64)[state]
        agents = {"observation": one_hot[:, None].expand(-1, self.num_agents, -1), "action": action}
        rows = TensorDict({"agents": {**agents, "action_log_prob": log_prob}}, batch_size=len(state))
        rows["value_target"] = torch.zeros(*log_prob.shape, 1).double()  # of the critic, which a loss of all turns asks
        return rows.update({"advantage": (weight * evaluation.advantage.flatten())[:, None], "weight": weight})

    def networks(self, policies: Tensor) -> tuple[nn.Module, nn.Module]:
        """An actor whose agents' tables are ``[N, S, K]``, and a critic that no theorem here asks anything."""
        spec = GroupSpec("agents", self.num_agents, self.num_states, num_actions=self.num_actions)
        actor = make_actor(spec, hidden_sizes=(), share_parameters=False).double()
        for agent, table in enumerate(policies):
            write(actor, agent, table)
        return actor, make_critic(spec, hidden_sizes=()).double()

    def policies(self, actor: nn.Module) -> Tensor:
        """Read the tables ``[N, S, K]`` off an actor."""
        seen = torch.eye(self.num_states, dtype=torch.float64)[:, None].expand(-1, self.num_agents, -1)
        data = TensorDict({"agents": {"observation": seen}}, batch_size=self.num_states)
        with torch.no_grad():
            return actor.get_dist(data).probs.transpose(0, 1)


def write(actor: nn.Module, agent: int, table: Tensor) -> None:
    """Give an agent the policy ``[S, K]``."""
    weight, bias = actor.module[0].module.networks[agent].parameters()
    with torch.no_grad():
        weight.copy_(table.log().T)
        bias.zero_()


def random_game(seed: int, *, states: int = 3, agents: int = 3, actions: int = 2, discount: float = 0.5) -> Game:
    """Rewards from a normal distribution and transitions to all states."""
    generator = torch.Generator().manual_seed(seed)
    shape = (states, actions**agents)
    reward = torch.randn(shape, generator=generator, dtype=torch.float64)
    transition = torch.rand((*shape, states), generator=generator, dtype=torch.float64) ** 3
    return Game(reward, agents, transition / transition.sum(-1, keepdim=True), discount)


def random_policies(game: Game, seed: int, *, near: Tensor | None = None, distance: float = 1.0) -> Tensor:
    """Tables ``[N, S, K]`` around others, or around uniform ones."""
    generator = torch.Generator().manual_seed(seed)
    shape = (game.num_agents, game.num_states, game.num_actions)
    noise = distance * torch.randn(shape, generator=generator, dtype=torch.float64)
    return (noise if near is None else near.log() + noise).softmax(-1)


def ascend(objective: Callable[[], Tensor], parameters: Iterable[Tensor], *, steps: int = 40, lr: float = 0.1) -> None:
    """Maximise an objective over parameters with Adam."""
    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr=lr, maximize=True)
    for _ in range(steps):
        for parameter, gradient in zip(parameters, torch.autograd.grad(objective(), parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
