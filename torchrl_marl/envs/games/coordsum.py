"""CoordSum: agents choose numbers that add up to a target, and an opponent guesses the first agent's choice."""

from __future__ import annotations

import math
import re
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.data import Categorical

from torchrl_marl.envs.base import check_positive
from torchrl_marl.envs.games.pictures import AGENT_COLORS, FAINT, INK, Canvas
from torchrl_marl.envs.games.rules import Rules, State, TimeLimit
from torchrl_marl.envs.games.streams import draw_below
from torchrl_marl.envs.games.tensor_env import GameEnv
from torchrl_marl.signatures import hands_on_to

__all__ = ["CoordSumEnv", "CoordSumRules", "make_coordsum"]

_WIDTH, _HEIGHT, _MARGIN = 360, 360, 18  # of the image, in pixels
_GOOD, _FAIR, _POOR = "#228833", "#e0862c", "#c1384f"
_SHADES = ("#f0f3f8", "#d3e0ef", "#b0cae4", "#8bb2d8", "#6699c9", "#4477aa")


@dataclass(eq=False, repr=False)
class CoordSumRules(Rules):
    """The rules of :class:`CoordSumEnv`, with the same arguments.

    The opponent's memory is a list with one ballot per round: row and choice of the first agent as one number. A choice
    with ``v`` votes scores ``v K + K - 1 - choice``, so the highest score of a row belongs to its most frequent choice,
    ties to the smallest. Scores only grow: a running maximum per row gives the opponent's guess, and the cost of a step
    does not depend on the number of targets and actions.
    """

    num_agents: int = 3
    num_actions: int = 10
    _: KW_ONLY
    num_targets: int = None  # pyright: ignore[reportAssignmentType] (num_actions)
    num_rows: int = None  # pyright: ignore[reportAssignmentType] (num_targets)
    observe_step: bool = True
    max_steps: int = 100
    time_limit: TimeLimit = "terminate"
    fixed_length = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_targets = self.num_actions if self.num_targets is None else self.num_targets
        self.num_rows = self.num_targets if self.num_rows is None else self.num_rows
        check_positive(num_actions=self.num_actions, num_targets=self.num_targets, num_rows=self.num_rows)
        largest = self.num_actions * max(self.num_rows, self.max_steps + 1)
        self._memory_dtype = torch.int16 if largest < 2**15 else torch.int32
        self._register_tables(actions=torch.arange(self.num_actions))

    @property
    def action_spec(self) -> Categorical:
        """A number for each agent."""
        return Categorical(self.num_actions, shape=torch.Size([self.num_agents]))

    def init_state(self, random: Tensor) -> dict[str, Tensor]:
        """Draw the first target; the opponent remembers nothing."""
        random, target = draw_below(random, self.num_targets)
        ballots = torch.full((*random.shape, self.max_steps), -1, dtype=self._memory_dtype, device=random.device)
        nothing = torch.full_like(target, -1)
        return {
            "random": random,
            "target": target,
            "guess": torch.zeros_like(target),
            "ballots": ballots,
            "leader": ballots.new_full((*random.shape, self.num_rows), self.num_actions - 1),
            "played_target": nothing,
            "played_guess": nothing,
            "played_action": nothing.unsqueeze(-1).expand(*nothing.shape, self.num_agents),
        }

    def transition(self, state: State, action: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Compare the sum with the target and the guess with the first choice; remember the choice; draw a target."""
        target, guess, ballots, leader = (state[name] for name in ("target", "guess", "ballots", "leader"))
        first = action[..., 0]
        reward = (action.sum(-1) == target) * (2.0 - (first == guess).float())

        row = self._row(target)
        ballot = (row * self.num_actions + first.unsqueeze(-1)).to(ballots.dtype)
        votes = 1 + (ballots == ballot).sum(-1, dtype=torch.int32)
        score = (votes * self.num_actions + self.num_actions - 1 - first).to(leader.dtype).unsqueeze(-1)
        leader = leader.scatter(-1, row, score.maximum(leader.gather(-1, row)))
        place = state["step"].clamp(max=self.max_steps - 1).unsqueeze(-1)  # steps after the end are harmless

        random, next_target = draw_below(state["random"], self.num_targets)
        best = leader.gather(-1, self._row(next_target)).squeeze(-1).long()
        changes = {
            "random": random,
            "target": next_target,
            "guess": self.num_actions - 1 - best % self.num_actions,
            "ballots": ballots.scatter(-1, place, ballot),
            "leader": leader,
            "played_target": target,
            "played_guess": guess,
            "played_action": action,
        }
        return changes, reward, torch.zeros_like(target, dtype=torch.bool)

    def observe(self, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the target and optionally the step for every agent; the state adds the opponent's guess."""
        target, step = state["target"].float().unsqueeze(-1), state["step"].unsqueeze(-1) / self.max_steps
        seen = torch.cat([target, step], -1) if self.observe_step else target
        guess = (state["guess"].unsqueeze(-1) == self.actions).float()
        observation = seen.unsqueeze(-2).expand(*target.shape[:-1], self.num_agents, -1).clone()
        return {"observation": observation}, {"state": torch.cat([target, step, guess], -1)}

    def _row(self, target: Tensor) -> Tensor:
        return target.clamp(max=self.num_rows - 1).unsqueeze(-1)

    def draw(self, state: State) -> np.ndarray:
        """Draw the last round and, below it, the opponent's memory."""
        canvas = Canvas(_WIDTH, _HEIGHT)
        _draw_round(canvas, self, state)
        _draw_memory(canvas, self, state)
        return canvas.pixels()


class CoordSumEnv(GameEnv):
    """Agents choose numbers that add up to a target and must not be predictable by an opponent with a memory.

    In each round, all agents see the same target and choose a number in ``0..num_actions - 1`` without communicating.
    If the numbers add up to the target, every agent gets 2, or only 1 if the opponent guesses the first agent's number;
    otherwise 0. The opponent guesses the number that the first agent has chosen most often for this target. The
    opponent learns to predict a fixed split of a target, and independent random choices miss the sum: the agents need
    to randomise jointly.

    Reference: Li et al., Multi-Agent Guided Policy Optimization, 2025, appendix B.

    Details missing in the paper follow the authors' released environment: the opponent's memory is cleared at a reset
    and counts choices of failed rounds; the guess is the smallest of equally frequent numbers, initially 0; targets are
    uniform and independent. The last round also *terminates* an episode, as the number of rounds is part of the game.
    ``time_limit="truncate"`` lets values bootstrap beyond the last round instead.

    ``make_coordsum`` builds the paper's and the released tasks by name.

    ==============================  =============  =====================================================================
    key                             shape          content
    ==============================  =============  =====================================================================
    ``("agents", "observation")``   ``[B, N, 2]``  target; share of the rounds played. The same for all agents
    ``("agents", "action")``        ``[B, N]``     choice, ``int64``
    ``"state"``                     ``[B, 2 + K]``  target, share of the rounds played, the opponent's guess as one-hot
    ==============================  =============  =====================================================================

    Args:
        num_agents: number of agents, ``N``.
        num_actions: number of choices of an agent, ``K``.
        num_targets: targets are ``0..num_targets - 1``; ``None`` for ``num_actions``, the paper's default.
        num_rows: rows of the opponent's memory; target ``m`` uses row ``min(m, num_rows - 1)``. ``None`` for one row
            per target, as in the paper.
        observe_step: whether the observation holds the share of rounds played.
        max_steps: rounds of an episode.
        time_limit: how the end of an episode is reported, see above.
        num_envs, seed, device: see :class:`~torchrl_marl.envs.base.BatchOptions`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> env = CoordSumEnv(num_agents=3, num_actions=10, num_envs=4, seed=0)
        >>> data = env.reset()
        >>> data["agents", "action"] = torch.zeros(4, 3, dtype=torch.int64)
        >>> data["agents", "action"][:, 1] = data["agents", "observation"][:, 1, 0].long()  # one agent plays the target
        >>> env.step(data)["next", "agents", "reward"][:, 0, 0]  # the opponent guesses the first agent's 0
        tensor([1., 1., 1., 1.])
    """

    rules_type = CoordSumRules


@hands_on_to(CoordSumEnv)
def make_coordsum(scenario: str = "CoordSum-3x10", **options: Any) -> CoordSumEnv:
    """Build a CoordSum task by its name.

    ``CoordSum-NxK``: ``N`` agents and ``K`` actions by the paper's rules, with targets ``0..K - 1``. The paper reports
    3x10, 3x30, 5x20 and 8x15. The expected return of a deterministic memoryless policy is at most about 109.0, 128.0,
    118.9 and 114.0 there: only the first visit of a target beats the opponent.

    ``CoordSum-NxK-M``: targets ``0..M - 1``, a memory of ``K`` rows (the last row for all greater targets), and no step
    in the observation, as in the released code, which registers 3x10-30, 3x30-50, 5x20-80 and 8x15-100. The paper's
    scores were probably not measured on these.

    Args:
        scenario: the name.
        options: other arguments of :class:`CoordSumEnv`.

    Returns:
        The environment.

    Raises:
        ValueError: if the name has neither form or an argument is out of its range.

    Example:
        >>> env = make_coordsum("CoordSum-3x10-30", num_envs=2, seed=0)
        >>> env.rules.num_targets, env.rules.num_rows
        (30, 10)
    """
    match = re.fullmatch(r"CoordSum-(\d+)x(\d+)(?:-(\d+))?", scenario)
    if match is None:
        raise ValueError(
            "scenario must be CoordSum-NxK (N agents, K actions) or CoordSum-NxK-M (as released, targets below M), "
            f"such as CoordSum-3x10 or CoordSum-3x10-30; got {scenario!r}"
        )
    num_agents, num_actions = int(match[1]), int(match[2])
    if match[3] is not None:
        options = {"num_targets": int(match[3]), "num_rows": num_actions, "observe_step": False, **options}
    return CoordSumEnv(num_agents, num_actions, **options)


def _draw_round(canvas: Canvas, rules: CoordSumRules, state: State) -> None:
    """Draw the choices as cards, the target and the opponent's guess; before the first round, only the target."""
    played = bool(state["step"] > 0)
    actions = state["played_action"].tolist()
    target, guess = int(state["played_target" if played else "target"]), int(state["played_guess"])
    correct, guessed = sum(actions) == target, guess == actions[0]
    side = min(44.0, (_WIDTH - 150) / rules.num_agents - 6)
    top, middle = 34.0, 34.0 + side / 2
    canvas.text((_MARGIN, 20), "choices", 11, FAINT, "lm")
    for agent, action in enumerate(actions):
        color, left = AGENT_COLORS[agent % len(AGENT_COLORS)], _MARGIN + agent * (side + 6)
        canvas.rectangle((left, top), (side, side), color if played else "white", edge=color, radius=6)
        shown, ink = (str(action), "white") if played else ("?", color)
        canvas.text((left + side / 2, middle), shown, round(side / 2), ink)
    left = _MARGIN + rules.num_agents * (side + 6) + 12
    canvas.text((left, middle), "=", 22)
    if played and not correct:
        canvas.path([(left - 4, middle + 10), (left + 4, middle - 8)], _POOR, 2)
    canvas.rectangle((left + 18, top), (56, side), "#eceff4", edge=INK, radius=6)
    canvas.text((left + 46, middle), str(target), round(side / 2))
    canvas.text((left + 18, 20), "target", 11, FAINT, "lm")
    if played:
        verdict, color = ("fooled", _GOOD) if not guessed else ("right", _FAIR)
        reward, color = (0, _POOR) if not correct else (2 - guessed, color)
        canvas.text((_MARGIN, top + side + 18), f"opponent guesses {guess} for the first: {verdict}", 12, INK, "lm")
        canvas.text((_WIDTH - _MARGIN, top + side + 18), f"+{reward}" if reward else "0", 18, color, "rm")


def _draw_memory(canvas: Canvas, rules: CoordSumRules, state: State) -> None:
    """Draw the first agent's choices (columns) by target (rows): darker is more frequent, the next guess is framed."""
    rows, columns, top = rules.num_rows, rules.num_actions, 128.0
    ballots = state["ballots"]
    counts = torch.bincount(ballots[ballots >= 0].long(), minlength=rows * columns).reshape(rows, columns)
    wide, high = (_WIDTH - 2 * _MARGIN - 16) / columns, (_HEIGHT - top - 30) / rows
    left, gap = _MARGIN + 16.0, 1.5 if min(wide, high) > 8 else 0.5
    canvas.text((_MARGIN, top - 12), "what the opponent remembers: first choice by target", 11, FAINT, "lm")
    leaders = columns - 1 - state["leader"].long() % columns
    for row in range(rows):
        most = max(1, int(counts[row].max()))
        for column in range(columns):
            count = int(counts[row, column])
            corner, size = (left + column * wide, top + row * high), (wide - gap, high - gap)
            canvas.rectangle(corner, size, _SHADES[round((len(_SHADES) - 1) * count / most)], radius=min(2.0, high / 5))
            if count and column == leaders[row]:
                canvas.rectangle(corner, size, None, edge=_FAIR, radius=min(2.0, high / 5), width=min(2.0, high / 5))
        if row % max(1, math.ceil(11 / high)) == 0:
            canvas.text((left - 5, top + (row + 0.5) * high), str(row), 9, FAINT, "rm")
    for column in range(0, columns, max(1, math.ceil(14 / wide))):
        canvas.text((left + (column + 0.5) * wide, _HEIGHT - 20), str(column), 9, FAINT)
