"""One step of a method, given its numbers: `STEPPERS[method.kind](method)` takes steps; nothing here chooses them."""

from __future__ import annotations

from typing import Any

from neurode.stepping.adams import AdamsStepper
from neurode.stepping.explicit import ExplicitStepper
from neurode.stepping.interval import Interval, places
from neurode.stepping.step import Piece, Step
from neurode.stepping.symplectic import SymplecticStepper

STEPPERS: dict[str, Any] = {
    "explicit": ExplicitStepper,
    "adams": AdamsStepper,
    "symplectic": SymplecticStepper,
}


def stepper(method: Any) -> Any:
    """The stepper for a method's numbers."""
    return STEPPERS[method.kind](method)


__all__ = [
    "STEPPERS",
    "AdamsStepper",
    "ExplicitStepper",
    "Interval",
    "Piece",
    "Step",
    "SymplecticStepper",
    "places",
    "stepper",
]
