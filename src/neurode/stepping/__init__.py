"""One step of a method, given its numbers: `STEPPERS[method.kind](method)` takes steps; nothing here chooses them."""

from __future__ import annotations

from typing import Any

from neurode.stepping.explicit import ExplicitStepper
from neurode.stepping.interval import Interval, places
from neurode.stepping.step import Piece, Step

STEPPERS = {"explicit": ExplicitStepper}


def stepper(method: Any) -> Any:
    """The stepper for a method's numbers."""
    return STEPPERS[method.kind](method)


__all__ = ["STEPPERS", "ExplicitStepper", "Interval", "Piece", "Step", "places", "stepper"]
