"""Random streams of a batch of environments, as a tensor: SplitMix64 in integer arithmetic.

A stream is one ``int64``. Drawing is a pure function of the stream: it runs inside a compiled step and gives the same
numbers on every device, and an environment depends only on its own stream, not on other environments.

Reference: Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014, Figure 14 with Stafford's
variant 13 of the mixing function, as in Java's ``SplittableRandom``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_below", "draw_uniform", "random_streams"]


def _signed(value: int) -> int:
    """The ``int64`` with the bits of an unsigned number."""
    return (value + 2**63) % 2**64 - 2**63


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def random_streams(seed: int, num_streams: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the streams of a batch, ``[num_streams]``, which start far apart.

    Args:
        seed: any integer; taken modulo ``2**64``.
        num_streams: number of environments. Each stream is independent of this number.
        device: device of the streams.

    Returns:
        The first ``num_streams`` outputs of SplitMix64 seeded with ``seed``, as ``int64``.

    Example:
        >>> random_streams(1234567, 2)
        tensor([6457827717110365317, 3203168211198807973])
    """
    return _mix(_signed(seed) + _GAMMA * torch.arange(1, num_streams + 1, device=device))


def draw_below(stream: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Draw one integer of ``0..bound - 1`` from every stream.

    The upper half of the 64 bits is scaled, not divided: no value is more likely than another by more than a factor of
    ``1 + bound / 2**32``.

    Args:
        stream: ``int64``, any shape.
        bound: at least 1, below ``2**31``.

    Returns:
        The streams after the draw, and the integers, ``int64``; both of the shape of ``stream``.

    Example:
        >>> stream = random_streams(0, 4)
        >>> stream, dice = draw_below(stream, 6)
        >>> dice
        tensor([3, 1, 5, 1])
    """
    stream = stream + _GAMMA
    return stream, (_shift_right(_mix(stream), 32) * bound) >> 32


def draw_uniform(stream: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw numbers of [0, 1) from every stream, multiples of ``2**-24``, two from each 64 bits.

    Args:
        stream: ``int64``, any shape ``[*B]``.
        count: numbers per stream.

    Returns:
        The streams after the draws, and the numbers, ``float32`` of shape ``[*B, count]``.

    Example:
        >>> stream, numbers = draw_uniform(random_streams(0, 2), 3)
        >>> numbers.shape
        torch.Size([2, 3])
    """
    outputs = (count + 1) // 2
    bits = _mix(stream.unsqueeze(-1) + _GAMMA * torch.arange(1, outputs + 1, device=stream.device))
    numbers = torch.stack([bits >> 40, bits >> 16], -1).flatten(-2)[..., :count] & (2**24 - 1)
    return stream + _signed(_GAMMA * outputs), numbers.float() * 2.0**-24


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _FIRST
    bits = (bits ^ _shift_right(bits, 27)) * _SECOND
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, places: int) -> Tensor:
    """Shift in zeros; Torch's own shift copies the sign."""
    return (bits >> places) & (2 ** (64 - places) - 1)
