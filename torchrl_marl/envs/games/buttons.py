"""Buttons: agents on a line, who do not see each other, have to press two buttons in the same step."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchrl.data import Categorical

from torchrl_marl.envs.games.pictures import AGENT_COLORS, FAINT, INK, Canvas
from torchrl_marl.envs.games.rules import Rules, State, TimeLimit
from torchrl_marl.envs.games.streams import draw_below
from torchrl_marl.envs.games.tensor_env import GameEnv

__all__ = ["ButtonsEnv", "ButtonsRules"]

_PRESS = 3
_CELL, _MARGIN = 40, 12  # of the picture, in pixels


@dataclass(eq=False, repr=False)
class ButtonsRules(Rules):
    """The rules of :class:`ButtonsEnv`, whose arguments these are."""

    scenario: str = "Buttons-2x5"
    _: KW_ONLY
    press_cost: float = 0.1
    max_steps: int = 50
    time_limit: TimeLimit = "truncate"
    num_agents: int = field(init=False)

    def __post_init__(self) -> None:
        match = re.fullmatch(r"Buttons-([2-9])x([2-9])", self.scenario)
        if match is None:
            raise ValueError(
                f"scenario must be Buttons-NxC (N agents on C cells, 2 to 9 each), such as Buttons-2x5; "
                f"got {self.scenario!r}"
            )
        self.num_agents, self.num_cells = int(match[1]), int(match[2])
        super().__post_init__()
        self._register_tables(moves=torch.tensor([0, -1, 1, 0]))

    @property
    def action_spec(self) -> Categorical:
        """A move or a press of each agent."""
        return Categorical(4, shape=torch.Size([self.num_agents]))

    def init_state(self, random: Tensor) -> dict[str, Tensor]:
        """Put every agent on a random cell."""
        cells = []
        for _ in range(self.num_agents):
            random, cell = draw_below(random, self.num_cells)
            cells.append(cell)
        cell = torch.stack(cells, -1)
        return {"random": random, "cell": cell, "pressed": torch.zeros_like(cell, dtype=torch.bool)}

    def transition(self, state: State, action: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Press where agents stand, then move them; a lonely press costs, presses at both ends win."""
        cell, pressed = state["cell"], action == _PRESS
        first, last = (((cell == end) & pressed).any(-1) for end in (0, self.num_cells - 1))
        won = first & last
        reward = won.float() - self.press_cost * (pressed.any(-1) & ~won)
        cell = (cell + self.moves[action]).clamp(0, self.num_cells - 1)
        return {"cell": cell, "pressed": pressed}, reward, won

    def observe(self, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Show each agent its own cell; the state is the cells of all."""
        place = one_hot(state["cell"], self.num_cells).float()
        return {"observation": place}, {"state": place.flatten(-2)}

    def draw(self, state: State) -> np.ndarray:
        """Draw a lane for each agent, with the buttons at its ends; who presses is framed."""
        canvas = Canvas(2 * _MARGIN + self.num_cells * _CELL, 2 * _MARGIN + self.num_agents * _CELL)
        for agent, (cell, pressed) in enumerate(zip(state["cell"].tolist(), state["pressed"].tolist(), strict=True)):
            for place in range(self.num_cells):
                corner = (_MARGIN + place * _CELL, _MARGIN + agent * _CELL)
                button = place in (0, self.num_cells - 1)
                canvas.rectangle(corner, (_CELL - 2, _CELL - 2), FAINT if button else "#f0f3f8", radius=4)
            center = (_MARGIN + (cell + 0.5) * _CELL - 1, _MARGIN + (agent + 0.5) * _CELL - 1)
            color = AGENT_COLORS[agent % len(AGENT_COLORS)]
            canvas.disc(center, 12, color, edge=INK if pressed else "white", width=3)
        return canvas.pixels()


class ButtonsEnv(GameEnv):
    """Agents press the buttons at both ends of a line in the same step, without seeing each other.

    Each starts on a random cell and sees its own only. A step in which agents on both end cells press gives the team 1
    and terminates the episode; any other press costs ``press_cost``. So agents have to part, and to wait for each
    other: the smallest game of this library that a policy cannot win by what one agent sees, but a team can by habit.

    ==============================  ==============  ===================================================
    key                             shape           content
    ==============================  ==============  ===================================================
    ``("agents", "observation")``   ``[B, N, C]``   the agent's cell as one-hot
    ``("agents", "action")``        ``[B, N]``      0 stay, 1 left, 2 right, 3 press, ``int64``
    ``"state"``                     ``[B, N C]``    the cells of all agents
    ==============================  ==============  ===================================================

    Args:
        scenario: ``Buttons-NxC``, ``N`` agents on ``C`` cells.
        press_cost: of a step in which somebody presses in vain.
        max_steps: time limit of an episode.
        time_limit: how the limit is reported: ``"truncate"`` or ``"terminate"``.
        num_envs, seed, device: see :class:`~torchrl_marl.envs.base.BatchOptions`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> ButtonsEnv("Buttons-3x4", num_envs=2, seed=0).reset()["agents", "observation"].shape
        torch.Size([2, 3, 4])
    """

    rules_type = ButtonsRules
