"""Cubic Hermite interpolation for steppers whose method has no interpolant of its own."""

from __future__ import annotations

from torch import Tensor

from neurode._field import Field
from neurode.stepping.explicit import HERMITE_END, HERMITE_RISE, HERMITE_START
from neurode.stepping.step import Piece, Step


def end_derivative(field: Field, step: Step) -> Tensor:
    """The derivative at the end of a step: one evaluation of `f`."""
    (t1,) = step.interval.times((1.0,), step.y1, field.time_dtype)
    return field(t1, step.y1)


def hermite_piece(step: Step, rise: Tensor, start: Tensor, end: Tensor) -> Piece:
    """The cubic through both ends.

    Args:
        step: the step.
        rise: `(y1 - y0) / h`, known without the division.
        start, end: the derivatives at both ends.
    """
    powers = (HERMITE_RISE, HERMITE_START, HERMITE_END)
    return Piece(step.interval, step.y0, step.y1, [rise, start, end], powers)
