"""PaxMen: a team spreads from a hub into the corridors of a maze drawn for each episode, and eats dots."""

from __future__ import annotations

import math
import re
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding
from torchrl.data import Categorical

from torchrl_marl.envs.base import check_positive
from torchrl_marl.envs.games.grid import MOVES, side_by_side, successors, windows
from torchrl_marl.envs.games.pictures import AGENT_COLORS, Canvas
from torchrl_marl.envs.games.rules import Rules, State, TimeLimit
from torchrl_marl.envs.games.streams import draw_below
from torchrl_marl.envs.games.tensor_env import GameEnv
from torchrl_marl.signatures import hands_on_to

__all__ = ["PaxMenEnv", "PaxMenRules", "make_paxmen"]

# "#" wall, "." corridor, "o" corridor with a dot, digits: start cells of the agents, in order.
_MAZES = side_by_side("""
    ###############  ###############  ###############
    ###ooo...ooo###  ###oo...#######  #######...ooo##
    #######.#######  ###o###.##o##o#  #####o#.#######
    #o#####.#######  ##o####..oo##o#  #####o#.####oo#
    #o#####.###ooo#  ##o####.#####o#  #####o..#####o#
    #o...##.###.###  ##o####.#####.#  ##ooo##.#####.#
    ####.#405##.###  ##.###405####.#  ####.#405####.#
    ##....3.1...###  ##....3.1.....#  #.....3.1.....#
    ##.###726##.###  ####.#726#.####  #.####726##.###
    ##o####.###.###  #o...##.##ooo##  #.#####.###o###
    ##o####..o#ooo#  #o#####.#######  #o#####.###oo##
    ##o####.#o#####  #o#####.#######  #o##o.....o####
    #######.#o#####  #######.#######  #o##o#####o####
    ##ooo...#######  ###ooo...ooo###  ####o#####o####
    ###############  ###############  ###############
""")
_SIZE = 15
_NUM_CELLS = _SIZE * _SIZE
_NUM_DOTS = 24
_FLOOR, _WALL = _NUM_DOTS, _NUM_DOTS + 1  # kinds of cells beyond the dots 0..23
_MAX_AGENTS = 8
_EAT = 4  # the move that stays in place

_CELL = 24  # of the image, in pixels
_BACKGROUND, _BLOCK, _FLOOR_COLOR, _LIT, _DOT = "#10142b", "#28357a", "#10142b", "#2b3050", "#ffd86b"


@dataclass(eq=False, repr=False)
class PaxMenRules(Rules):
    """The rules of :class:`PaxMenEnv`, with the same arguments.

    A cell's kind is the index of its dot, or floor, or wall. Dots are flags by index, with one additional flag that is
    never set for each of the other two kinds: a lookup of the kinds around an agent, and of their flags, gives the
    visible dots.
    """

    num_agents: int = 4
    _: KW_ONLY
    view_radius: int = 2
    step_cost: float = 0.025
    max_steps: int = 200
    time_limit: TimeLimit = "truncate"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(view_radius=self.view_radius)
        if self.num_agents > _MAX_AGENTS:
            raise ValueError(f"num_agents must be at most {_MAX_AGENTS}, the cells of the hub; got {self.num_agents}")
        kinds = _layouts()
        self.num_layouts = len(kinds)
        hub = _MAZES[0]
        cells = torch.arange(_NUM_CELLS)
        self._register_tables(
            successor=successors(kinds == _WALL, _SIZE).flatten(),
            kind=kinds.flatten(),
            view=windows(kinds, _SIZE, radius=self.view_radius, outside=_WALL).flatten(0, 1),
            offset=_offsets(self.view_radius).flatten(),
            layout_code=torch.eye(self.num_layouts),
            place=torch.stack([cells // _SIZE, cells % _SIZE], -1) / (_SIZE - 1),
            start=torch.tensor([hub.index(str(agent)) for agent in range(self.num_agents)]),
            # Numbers instead of bools, for which compiled scattering is slow.
            all_dots=(torch.arange(_NUM_DOTS + 2) < _NUM_DOTS).float(),
            self_pairs=torch.eye(self.num_agents, dtype=torch.bool),
        )

    @property
    def action_spec(self) -> Categorical:
        """A move for each agent; the last move eats."""
        return Categorical(len(MOVES), shape=torch.Size([self.num_agents]))

    def init_state(self, random: Tensor) -> dict[str, Tensor]:
        """Draw a layout and place the agents in the hub, with no dot eaten."""
        random, layout = draw_below(random, self.num_layouts)
        cell = self.start.expand(*random.shape, -1)
        dots = self.all_dots.expand(*random.shape, -1)
        return {"random": random, "layout": layout, "cell": cell, "facing": torch.full_like(cell, 3), "dots": dots}

    def transition(self, state: State, action: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Eat and move simultaneously: a dot that several agents eat counts once."""
        index = self._index(state)
        bite = torch.where(action == _EAT, self.kind.take(index), _FLOOR)
        left = state["dots"].scatter(-1, bite, 0.0)
        reward = (state["dots"] - left).sum(-1) - self.step_cost
        changes = {
            "cell": self.successor.take(index * len(MOVES) + action),
            "dots": torch.where(left.any(-1, keepdim=True), left, self.all_dots),
            "facing": torch.where(action == _EAT, state["facing"], action),
        }
        return changes, reward, torch.zeros_like(state["layout"], dtype=torch.bool)

    def observe(self, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the walls, dots and other agents around each agent; the state holds everything."""
        cell, dots = state["cell"], state["dots"]
        kinds = embedding(self._index(state), self.view)
        dots_around = dots.gather(-1, kinds.flatten(-2)).reshape(kinds.shape)
        pair = self.offset.take(cell.unsqueeze(-1) * _NUM_CELLS + cell.unsqueeze(-2))
        out_of_view = kinds.shape[-1]
        pair = pair.masked_fill(self.self_pairs, out_of_view)
        nobody = dots.new_zeros(*cell.shape, out_of_view + 1)
        others = nobody.scatter(-1, pair, torch.ones_like(pair, dtype=dots.dtype))[..., :-1]
        observation = torch.cat([(kinds == _WALL).float(), dots_around, others], -1)
        layout = embedding(state["layout"], self.layout_code)
        places = embedding(cell, self.place).flatten(-2)
        return {"observation": observation}, {"state": torch.cat([layout, dots[..., :_NUM_DOTS], places], -1)}

    def outcome(self, state: State) -> dict[str, Tensor]:
        """Return eaten dots as a share of the maze's dots, above 1 once the dots have reappeared."""
        return {"eaten": (state["episode_reward"] + self.step_cost * state["step"]).round() / _NUM_DOTS}

    def _index(self, state: State) -> Tensor:
        return state["layout"].unsqueeze(-1) * _NUM_CELLS + state["cell"]

    def draw(self, state: State) -> np.ndarray:
        """Draw the maze, the dots and the agents, with visible cells lit."""
        canvas = Canvas(_SIZE * _CELL, _SIZE * _CELL, _BACKGROUND)
        layout, cells = int(state["layout"]), state["cell"].tolist()
        kinds = self.kind.reshape(-1, _SIZE, _SIZE)[layout].tolist()
        near = [divmod(cell, _SIZE) for cell in cells]
        for row, column in ((row, column) for row in range(_SIZE) for column in range(_SIZE)):
            kind = kinds[row][column]
            lit = any(max(abs(row - r), abs(column - c)) <= self.view_radius for r, c in near)
            _draw_cell(canvas, row, column, kind, lit)
            if kind < _NUM_DOTS and state["dots"][kind]:
                canvas.disc(_center(row, column), 4.5, _DOT)
        for agent, (row, column) in enumerate(near):
            together = [other for other in range(self.num_agents) if cells[other] == cells[agent]]
            shift = 4 * (together.index(agent) - (len(together) - 1) / 2)  # so that all agents in a cell are visible
            _draw_agent(canvas, _center(row, column, shift), AGENT_COLORS[agent], int(state["facing"][agent]))
        return canvas.pixels()


class PaxMenEnv(GameEnv):
    """A team of Pac-Men that needs to split up: exploration under partial observability with shared rewards.

    Agents start in the hub at the middle of a maze, from which four corridors branch into eight dead ends. An agent in
    a cell with a dot can eat the dot. Each eaten dot gives the team 1, regardless of how many agents eat it at once;
    each step costs the team ``step_cost``. All dots reappear once all have been eaten. Every agent gets the team's
    reward and sees only nearby cells. Moves into walls have no effect; agents share cells and do not block each other.

    Reference: the MARS paper, appendix C.2 (after Li et al., Celebrating diversity in shared multi-agent reinforcement
    learning, 2021), which gives the hub, branching corridors of varying orientation and length, a fixed set of
    topologies drawn by episode, teams of four to six, the five actions, the local grid and the rewards.

    All other details are our choice, as we know of no released code. There are three mazes of 15 x 15 cells in eight
    orientations each: 24 layouts, equally likely. Each has 24 dots in groups of three at its dead ends, 7 to 11 steps
    from the middle. There are more dead ends than agents, so roles keep changing. The view of 5 x 5 cells has three
    planes, as one number per cell could not represent an agent on a dot. The cost of a step counts once for a team of
    any size. Agents start in distinct cells of the hub. Episodes end only by the time limit; 200 steps give a good team
    several rounds of dots.

    ==============================  ====================  ==============================================================
    key                             shape                 content
    ==============================  ====================  ==============================================================
    ``("agents", "observation")``   ``[B, N, 75]``        planes of the 5 x 5 cells around: wall, dot, another agent
    ``("agents", "action")``        ``[B, N]``            0 up, 1 down, 2 left, 3 right, 4 eat
    ``"state"``                     ``[B, 48 + 2 N]``     layout as one-hot, dots left, row and column of agents in 0..1
    ``("info", "eaten")``           ``[B, 1]``            dots eaten in the episode / 24; above 1 once dots reappear
    ==============================  ====================  ==============================================================

    Args:
        num_agents: number of agents, ``N``, at most 8.
        view_radius: number of visible cells in each direction; an observation has ``3 (2 view_radius + 1)**2`` entries.
        step_cost: the team's cost of a step.
        max_steps: time limit of an episode.
        time_limit: how the limit is reported: ``"truncate"`` or ``"terminate"``.
        num_envs, seed, device: see :class:`~torchrl_marl.envs.base.BatchOptions`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> env = PaxMenEnv(num_agents=5, num_envs=2, seed=0)
        >>> data = env.rand_step(env.reset())
        >>> data["agents", "observation"].shape, data["next", "agents", "reward"][0, 0]  # there are no dots in the hub
        (torch.Size([2, 5, 75]), tensor([-0.0250]))
    """

    rules_type = PaxMenRules


@hands_on_to(PaxMenEnv)
def make_paxmen(scenario: str = "PaxMen-4", **options: Any) -> PaxMenEnv:
    """Build a PaxMen task by its name.

    Args:
        scenario: ``PaxMen-N`` for ``N`` agents; the paper has 4, 5 and 6.
        options: other arguments of :class:`PaxMenEnv`.

    Returns:
        The environment.

    Raises:
        ValueError: if the name has another form or an argument is out of its range.

    Example:
        >>> len(make_paxmen("PaxMen-6", num_envs=2, seed=0).group_map["agents"])
        6
    """
    match = re.fullmatch(r"PaxMen-(\d+)", scenario)
    if match is None:
        raise ValueError(f"scenario must be PaxMen-N for N agents, such as PaxMen-4; got {scenario!r}")
    return PaxMenEnv(int(match[1]), **options)


def _layouts() -> Tensor:
    """The kinds of the cells of every maze in its eight orientations, ``[layouts, cells]``."""
    layouts = []
    for letters in _MAZES:
        numbers = iter(range(_NUM_DOTS))
        kinds = [_WALL if letter == "#" else next(numbers) if letter == "o" else _FLOOR for letter in letters]
        square = torch.tensor(kinds).reshape(_SIZE, _SIZE)
        for side in (square, square.T):
            layouts += [side.rot90(turns).flatten() for turns in range(4)]
    return torch.stack(layouts)


def _offsets(radius: int) -> Tensor:
    """Index of every cell in the window around every cell, ``[cells, cells]``; beyond the last index if outside."""
    side, cells = 2 * radius + 1, torch.arange(_NUM_CELLS)
    place = torch.stack([cells // _SIZE, cells % _SIZE], -1)
    down, right = (place - place.unsqueeze(1) + radius).unbind(-1)
    inside = (down >= 0) & (down < side) & (right >= 0) & (right < side)
    return torch.where(inside, side * down + right, side * side)


def _center(row: int, column: int, shift: float = 0) -> tuple[float, float]:
    return (column + 0.5) * _CELL + shift, (row + 0.5) * _CELL + shift


def _draw_cell(canvas: Canvas, row: int, column: int, kind: int, lit: bool) -> None:
    corner = (column * _CELL, row * _CELL)
    if kind == _WALL:
        canvas.rectangle((corner[0] + 1, corner[1] + 1), (_CELL - 2, _CELL - 2), _BLOCK, radius=5)
    elif lit:
        canvas.rectangle(corner, (_CELL + 0.5, _CELL + 0.5), _LIT)


def _draw_agent(canvas: Canvas, center: tuple[float, float], color: str, facing: int) -> None:
    """Draw a disc with its mouth open in the direction of its last move."""
    (down, right), radius = MOVES[facing], 9.5
    angle = math.atan2(down, right)
    canvas.disc(center, radius, color)
    lips = [(1.1 * radius * math.cos(angle + turn), 1.1 * radius * math.sin(angle + turn)) for turn in (-0.6, 0, 0.6)]
    canvas.polygon([center, *((center[0] + x, center[1] + y) for x, y in lips)], _LIT)
