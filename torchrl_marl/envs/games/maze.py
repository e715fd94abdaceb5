"""Two mazes whose agents share most of the way and must part where only some colours may pass."""

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
_CELL, _MARGIN = 38, 9  # of the image, in pixels
_CELL_COLORS = {"#": "#4c566a", "R": "#f2b8b5", "B": "#a9afbc", "T": "#b3d4ee"}
_AGENT_COLORS = {"red": "#d1353f", "black": "#23262e", "blue": "#2f74c0"}


@dataclass(eq=False, repr=False)
class MazeRules(Rules):
    """The rules of :class:`MazeEnv`, with the same arguments: lookup tables of the cells."""

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
        """A move for each agent."""
        return Categorical(len(MOVES), shape=torch.Size([self.num_agents]))

    def init_state(self, random: Tensor) -> dict[str, Tensor]:
        """Put all agents at the start."""
        cell = torch.full((*random.shape, self.num_agents), self.start, device=random.device)
        path = torch.full((*cell.shape, self.max_steps + 1), self.start, dtype=torch.uint8, device=random.device)
        return {"cell": cell, "path": path}

    def transition(self, state: State, action: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Move each agent by table lookup; agents at the goal stay there."""
        before = state["cell"]
        cell = self.successor.take(self.agent_offset + before * len(MOVES) + action)
        on_the_way, arrived = before != self.goal, cell == self.goal
        reward = ((on_the_way & arrived).float() - self.step_cost * on_the_way).mean(-1)
        step = state["step"].clamp(max=self.max_steps - 1)[..., None, None] + 1
        path = state["path"].scatter(-1, step.expand(*cell.shape, 1), cell.to(torch.uint8).unsqueeze(-1))
        return {"cell": cell, "path": path}, reward, arrived.all(-1)

    def observe(self, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the surroundings and position of each agent; the state is the map and all positions."""
        observation = embedding(state["cell"], self.view)
        places = observation[..., -2 * _SIZE :].flatten(-2)
        codes = self.codes.expand(*places.shape[:-1], -1)
        agents = {"observation": observation, "mask": state["cell"] != self.goal}
        return agents, {"state": torch.cat([codes, places], -1)}

    def outcome(self, state: State) -> dict[str, Tensor]:
        """Return the share of agents that have arrived."""
        return {"arrived": (state["cell"] == self.goal).float().mean(-1)}

    def draw(self, state: State) -> np.ndarray:
        """Draw the maze and the path of each agent."""
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
    """Agents of different colours find paths to the same goal, past cells that only some colours may enter.

    In ``"black_red"`` a red agent may enter red cells and a black agent black cells. Each has a shortest path of 10
    steps; the shortest path that both can take has 14 steps. ``"black_blue_red"`` adds a blue agent, which may enter
    neither, nor the blue trap cell that the other two may enter: the shortest paths have 10, 10 and 12 steps, the
    shortest path for all 12. Agents that share a policy converge to the shared path: where their paths part, they have
    the same observation and need opposite actions.

    Reference: Chen et al., Off-Agent Trust Region Policy Optimization, IJCAI 2024, section 6.1 and figures 3 and 5,
    which give the rules for colours, the 9 x 9 map, the 3 x 3 views, the state and the five actions.

    All other details are our choice, as the paper's appendix on the maze was not published. Each agent has a unique
    shortest path; the paths are separate in the middle and shared at both ends. All agents start in the same cell in
    every episode. Agents share cells and do not see each other, so they differ only in colour. A forbidden move has no
    effect; there is no action mask, as it would reveal the colour. Agents stay at the goal, and their later steps are
    masked. The team's reward is the mean over agents of 1 on arrival minus ``step_cost`` for each step before arrival,
    so returns distinguish short paths, long paths and none. The arrival of all agents terminates the episode. Within
    the limit of 100 steps, 1 in 11 random walks arrives.

    ==============================  =====================  =============================================================
    key                             shape                  content
    ==============================  =====================  =============================================================
    ``("agents", "observation")``   ``[B, N, 72]``         one-hot: kind of the 3 x 3 cells around, row, column
    ``("agents", "mask")``          ``[B, N]``             whether the agent has yet to arrive (``bool``)
    ``("agents", "action")``        ``[B, N]``             0 up, 1 down, 2 left, 3 right, 4 stay
    ``"state"``                     ``[B, 81 + 18 N]``     kind of every cell / 5, then row and column of every agent
    ``("info", "arrived")``         ``[B, 1]``             share of the agents that have arrived
    ==============================  =====================  =============================================================

    Kinds: 0 wall or outside, 1 open, 2 red, 3 black, 4 blue trap, 5 goal. The order of agents is red, black, blue. The
    sum of ``mask`` over an episode is the step in which an agent arrives. The game is deterministic: seeds have no
    effect.

    Args:
        maze: ``"black_red"`` or ``"black_blue_red"``.
        step_cost: cost of a step.
        max_steps: time limit of an episode.
        time_limit: how the limit is reported: ``"truncate"`` or ``"terminate"``.
        num_envs, seed, device: see :class:`~torchrl_marl.envs.base.BatchOptions`; ``seed`` has no effect.

    Raises:
        ValueError: if the maze is unknown or an argument is out of its range.

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
    """Build a maze with the arguments of :class:`MazeEnv`, where ``scenario`` is the ``maze``.

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
