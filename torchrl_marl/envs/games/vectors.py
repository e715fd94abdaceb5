"""Vectors in space as three tensors."""

from __future__ import annotations

from torch import Tensor

__all__ = ["Frame", "Vector", "cross", "dot", "minus", "plus", "scaled", "turned"]

# East, north and up (or forward, right and up), each of the same shape: three tensors are faster than a last dimension.
Vector = tuple[Tensor, Tensor, Tensor]
# Unit vectors along the nose, to the right wing and out of the cockpit's roof.
Frame = tuple[Vector, Vector, Vector]


def dot(one: Vector, other: Vector) -> Tensor:
    """Return the scalar product."""
    return one[0] * other[0] + one[1] * other[1] + one[2] * other[2]


def cross(one: Vector, other: Vector) -> Vector:
    """Return the vector product."""
    (a, b, c), (x, y, z) = one, other
    return b * z - c * y, c * x - a * z, a * y - b * x


def minus(one: Vector, other: Vector) -> Vector:
    """Return the difference."""
    return one[0] - other[0], one[1] - other[1], one[2] - other[2]


def scaled(factor: Tensor | float, vector: Vector) -> Vector:
    """Return the product with a number."""
    return factor * vector[0], factor * vector[1], factor * vector[2]


def plus(one: Vector, other: Vector) -> Vector:
    """Return the sum."""
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def turned(first: Vector, second: Vector, cos: Tensor, sin: Tensor) -> tuple[Vector, Vector]:
    """Rotate two perpendicular vectors in their plane, the first towards the second."""
    return plus(scaled(cos, first), scaled(sin, second)), plus(scaled(cos, second), scaled(-sin, first))
