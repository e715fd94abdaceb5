"""Two mazes whose agents share most of the way and must part where their colours open different doors."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, one_hot
from torchrl.data import Categorical

from torchrl_marl.envs.games.grid import MOVES, side_by_side, successors, windows
from torchrl_marl.envs.games.pictures import FAINT, Canvas
from torchrl_marl.envs.games.rules import Rules, State, TimeLimit
from torchrl_marl.envs.games.tensor_env import GameEnv
from torchrl_marl.signatures import hands_on_to

__all__ = ["MazeEnv", "MazeRules", "make_maze"]


_AGENTS = {"black_red": ("red", "black"), "black_blue_red": ("red", "black", "blue")}
_LAYOUTS = """
    ####S####  ####S####
    ####.####  ####.####
    #.......#  #.......#
    #.#R#B#.#  #.#R#B.##
    #.#R#B#.#  #.#R#T.##
    #.#R#B#.#  #.#R#B.##
    #.......#  #.......#
    ####.####  ####.####
    ####*####  ####*####
"""  # "#" wall, "." open, "R", "B" red and black grids, "T" blue trap, "S" start, "*" goal
_CELLS = dict(zip(_AGENTS, side_by_side(_LAYOUTS), strict=True))
_SIZE = 9
_CODES = {"#": 0, ".": 1, "S": 1, "R": 2, "B": 3, "T": 4, "*": 5}
_FORBIDDEN = {"red": "#B", "black": "#R", "blue": "#RBT"}
_CELL, _MARGIN = 38, 9  # of the picture, in pixels
_CELL_COLORS = {"#": "#4c566a", "R": "#f2b8b5", "B": "#a9afbc", "T": "#b3d4ee"}
_AGENT_COLORS = {"red": "#d1353f", "black": "#23262e", "blue": "#2f74c0"}


@dataclass(eq=False, repr=False)
class MazeRules(Rules):
    """The rules of :class:`MazeEnv`, whose arguments these are: tables of the cells, and a lookup in each per step."""

    maze: str = "black_red"
    _: KW_ONLY
    step_cost: float = 0.02
    max_steps: int = 100
    time_limit: TimeLimit = "truncate"
    num_agents: int = field(init=False)

    def __post_init__(self) -> None:
        if self.maze not in _AGENTS:
            raise ValueError(f"maze must be one of {', '.join(_AGENTS)}; got {self.maze!r}")
        letters, colors = _CELLS[self.maze], _AGENTS[self.maze]
        self.num_agents = len(colors)
        super().__post_init__()
        self.start, self.goal = letters.index("S"), letters.index("*")
        codes, cells = torch.tensor([_CODES[letter] for letter in letters]), torch.arange(len(letters))
        blocked = torch.tensor([[letter in _FORBIDDEN[color] for letter in letters] for color in colors])
        successor = successors(blocked, _SIZE)
        successor[:, self.goal] = self.goal
        around = windows(codes.unsqueeze(0), _SIZE, radius=1, outside=_CODES["#"])[0]
        parts = [one_hot(around, len(set(_CODES.values()))).flatten(1)]
        parts += [one_hot(cells // _SIZE, _SIZE), one_hot(cells % _SIZE, _SIZE)]
        self._register_tables(
            codes=codes / max(_CODES.values()),
            successor=successor.flatten(),
            agent_offset=torch.arange(self.num_agents) * len(letters) * len(MOVES),
            view=torch.cat(parts, -1).float(),
        )

    @property
    def action_spec(self) -> Categorical:
        """A move of each agent."""
        return Categorical(len(MOVES), shape=torch.Size([self.num_agents]))

    def init_state(self, random: Tensor) -> dict[str, Tensor]:
        """Put all agents at the start."""
        cell = torch.full((*random.shape, self.num_agents), self.start, device=random.device)
        path = torch.full((*cell.shape, self.max_steps + 1), self.start, dtype=torch.uint8, device=random.device)
        return {"cell": cell, "path": path}

    def transition(self, state: State, action: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Look up where each agent gets to; who was at the goal stays there."""
        before = state["cell"]
        cell = self.successor.take(self.agent_offset + before * len(MOVES) + action)
        on_the_way, arrived = before != self.goal, cell == self.goal
        reward = ((on_the_way & arrived).float() - self.step_cost * on_the_way).mean(-1)
        step = state["step"].clamp(max=self.max_steps - 1)[..., None, None] + 1
        path = state["path"].scatter(-1, step.expand(*cell.shape, 1), cell.to(torch.uint8).unsqueeze(-1))
        return {"cell": cell, "path": path}, reward, arrived.all(-1)

    def observe(self, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Show each agent its surroundings and its place; the state is the map and all places."""
        observation = embedding(state["cell"], self.view)
        places = observation[..., -2 * _SIZE :].flatten(-2)
        codes = self.codes.expand(*places.shape[:-1], -1)
        agents = {"observation": observation, "mask": state["cell"] != self.goal}
        return agents, {"state": torch.cat([codes, places], -1)}

    def outcome(self, state: State) -> dict[str, Tensor]:
        """Return the share of agents that have arrived."""
        return {"arrived": (state["cell"] == self.goal).float().mean(-1)}

    def draw(self, state: State) -> np.ndarray:
        """Draw the maze and the way that each agent has gone."""
        canvas = Canvas(2 * _MARGIN + _SIZE * _CELL, 2 * _MARGIN + _SIZE * _CELL)
        for cell, letter in enumerate(_CELLS[self.maze]):
            _draw_cell(canvas, cell, letter)
        colors = [_AGENT_COLORS[color] for color in _AGENTS[self.maze]]
        shifts = [7 * (agent - (self.num_agents - 1) / 2) for agent in range(self.num_agents)]  # side by side
        length = min(int(state["step"]), self.max_steps) + 1
        for path, color, shift in zip(state["path"].tolist(), colors, shifts, strict=True):
            canvas.path([_center(cell, shift) for cell in path[:length]], color, 3)
        for cell, color, shift in zip(state["cell"].tolist(), colors, shifts, strict=True):
            canvas.disc(_center(cell, shift), 9, color, edge="white", width=2)
        return canvas.pixels()


class MazeEnv(GameEnv):
    """Agents of different colours find their ways to the same star, past grids that only some of them may enter.

    In ``"black_red"`` a red agent may enter red grids and a black one black grids; each has its own shortest way of 10
    steps, and 14 steps are the shortest for a way that both can go. ``"black_blue_red"`` adds a blue agent, which may
    enter neither, nor the blue trap grid that the other two may: 10, 10 and 12 steps, and 12 for a way that all can go.
    Agents that share a policy end on the shared way; where they must part they see the same and need opposite actions.

    Reference: Chen et al., Off-Agent Trust Region Policy Optimization, IJCAI 2024, section 6.1 and figures 3 and 5,
    which give the colours' rights, the 9 x 9 map, the 3 x 3 views, the state and the five actions.

    The rest is our choice, as the paper's appendix on it was not published. The layouts have unique shortest ways for
    each agent, apart in the middle and shared at both ends. All agents start at the same place in every episode; they
    share cells and do not see each other, so that only colours make them differ. A forbidden move leaves an agent where
    it is; there is no action mask, which would tell the colour. Who has arrived stays, and its later steps are masked.
    The team's reward is the mean over agents of 1 on arrival less ``step_cost`` for each step that an agent begins
    before it has arrived: returns tell a short way from a long one, and a long one from none. Everyone's arrival
    terminates the episode; the limit of 100 steps is long enough for random walks to arrive (1 in 11).

    ==============================  =====================  =============================================================
    key                             shape                  content
    ==============================  =====================  =============================================================
    ``("agents", "observation")``   ``[B, N, 72]``         one-hot: kind of the 3 x 3 cells around, row, column
    ``("agents", "mask")``          ``[B, N]``             whether the agent has yet to arrive (``bool``)
    ``("agents", "action")``        ``[B, N]``             0 up, 1 down, 2 left, 3 right, 4 stay
    ``"state"``                     ``[B, 81 + 18 N]``     kind of every cell / 5, then row and column of every agent
    ``("info", "arrived")``         ``[B, 1]``             share of the agents that have arrived
    ==============================  =====================  =============================================================

    Kinds: 0 wall or outside, 1 open, 2 red, 3 black, 4 blue trap, 5 goal. Agents are in the order red, black, blue. The
    sum of ``mask`` over an episode is the step in which an agent arrives. Nothing is random: seeds make no difference.

    Args:
        maze: ``"black_red"`` or ``"black_blue_red"``.
        step_cost: cost of a step.
        max_steps: time limit of an episode.
        time_limit: how the limit is reported: ``"truncate"`` or ``"terminate"``.
        num_envs, seed, device: see :class:`~torchrl_marl.envs.base.BatchOptions`; the seed is taken for uniformity.

    Raises:
        ValueError: if there is no such maze or an argument is out of its range.

    Example:
        >>> env = MazeEnv("black_red", num_envs=1)
        >>> data = env.reset()
        >>> for red, black in zip("ddlddddrdd", "ddrddddldd"):
        ...     data["agents", "action"] = torch.tensor([["udlr".index(red), "udlr".index(black)]])
        ...     data = env.step_mdp(env.step(data))
        >>> data["terminated"], data["agents", "episode_reward"][0, :, 0]
        (tensor([[True]]), tensor([0.8000, 0.8000]))
    """

    rules_type = MazeRules


@hands_on_to(MazeEnv)
def make_maze(scenario: str = "black_red", **options: Any) -> MazeEnv:
    """Build a maze; the arguments are those of :class:`MazeEnv`, whose ``maze`` is called ``scenario`` here.

    Example:
        >>> make_maze("black_blue_red", num_envs=2).group_map
        {'agents': ['agent_0', 'agent_1', 'agent_2']}
    """
    return MazeEnv(scenario, **options)


def _center(cell: int, shift: float = 0) -> tuple[float, float]:
    return _MARGIN + (cell % _SIZE + 0.5) * _CELL + shift, _MARGIN + (cell // _SIZE + 0.5) * _CELL + shift


def _draw_cell(canvas: Canvas, cell: int, letter: str) -> None:
    x, y = _center(cell)
    corner = (x - _CELL / 2, y - _CELL / 2)
    if letter == "#":
        canvas.rectangle(corner, (_CELL + 0.5, _CELL + 0.5), _CELL_COLORS[letter])
    else:
        canvas.rectangle(corner, (_CELL - 1, _CELL - 1), _CELL_COLORS.get(letter, "#f4f6f9"), radius=3)
    if letter == "*":
        tips = [(16 if tip % 2 == 0 else 7, math.pi * (tip / 5 - 0.5)) for tip in range(10)]
        canvas.polygon([(x + r * math.cos(angle), y + r * math.sin(angle)) for r, angle in tips], "#ebb62f")
    elif letter == "S":
        canvas.text((x, y - 12), "start", 9, FAINT)
