"""Lookup tables of games on square grids, whose cells are numbered row by row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["MOVES", "side_by_side", "successors", "windows"]

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))  # up, down, left, right, none; row 0 is on top


def side_by_side(layouts: str) -> list[str]:
    r"""Return the cells, row by row, of layouts written side by side.

    Example:
        >>> side_by_side("#.  .#\n##  ..")
        ['#.##', '.#..']
    """
    return ["".join(rows) for rows in zip(*map(str.split, layouts.strip().splitlines()), strict=True)]


def successors(blocked: Tensor, size: int) -> Tensor:
    """Return the cell that each move leads to from each cell; a move into a blocked cell has no effect.

    Args:
        blocked: whether a cell cannot be entered, ``[..., size**2]``; the border must be blocked or unreachable.
        size: side of the grid.

    Returns:
        Cells by cell and move, ``[..., size**2, 5]``.

    Example:
        >>> corridor = torch.tensor([True, True, True, False, False, False, True, True, True])
        >>> successors(corridor, 3)[4]  # from the middle up, down, left, right
        tensor([4, 4, 3, 5, 4])
    """
    cells = torch.arange(size * size).unsqueeze(-1)
    ahead = (cells + torch.tensor([size * down + right for down, right in MOVES])).clamp(0, size * size - 1)
    return torch.where(blocked[..., ahead], cells, ahead)


def windows(kinds: Tensor, size: int, *, radius: int, outside: int) -> Tensor:
    """Return the kinds of the cells around each cell.

    Args:
        kinds: kinds of all cells, ``[L, size**2]``.
        size: side of the grid.
        radius: number of cells in each direction.
        outside: kind of the cells outside the grid.

    Returns:
        Kinds by cell and place in its window, ``[L, size**2, (2 radius + 1)**2]``.
    """
    side = 2 * radius + 1
    padded = pad(kinds.reshape(-1, size, size), (radius,) * 4, value=outside)
    return padded.unfold(1, side, 1).unfold(2, side, 1).reshape(len(kinds), size * size, side * side)
