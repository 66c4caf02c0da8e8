"""One step of a method, given its numbers: `STEPPERS[method.kind](method)` takes steps; nothing here chooses them."""

from __future__ import annotations

from typing import Any

from neurode.stepping.adams import AdamsStepper
from neurode.stepping.explicit import ExplicitStepper
from neurode.stepping.interval import Interval, places, stamped
from neurode.stepping.reversible import ReversibleStepper
from neurode.stepping.step import Piece, Step
from neurode.stepping.symplectic import SymplecticStepper

STEPPERS: dict[str, Any] = {
    "explicit": ExplicitStepper,
    "adams": AdamsStepper,
    "symplectic": SymplecticStepper,
    "reversible": ReversibleStepper,
}
# Kinds whose carry is part of the state: it outlives a jump of `f`, and an event sets it as it sets the state.
COUPLED = frozenset({"reversible"})


def stepper(method: Any) -> Any:
    """The stepper for a method's numbers."""
    return STEPPERS[method.kind](method)


__all__ = [
    "COUPLED",
    "STEPPERS",
    "AdamsStepper",
    "ExplicitStepper",
    "Interval",
    "Piece",
    "ReversibleStepper",
    "Step",
    "SymplecticStepper",
    "places",
    "stamped",
    "stepper",
]
