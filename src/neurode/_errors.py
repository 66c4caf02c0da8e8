"""The exception classes of neurode: few, and each a family that Python users already catch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neurode._solution import Solution


class NeurodeError(Exception):
    """Base of every exception that neurode raises on purpose."""


class InputError(NeurodeError, ValueError):
    """An argument cannot be used as given; the message says what was given, what is needed and what to type."""


class UnknownOptionError(InputError, TypeError):
    """A keyword or a name that does not exist; the message names the nearest one that does."""


class FieldError(NeurodeError, ValueError):
    """The vector field returned something that is not a derivative of the state."""


class GradientError(NeurodeError, RuntimeError):
    """A gradient was asked for that the chosen strategy cannot compute; the message names one that can."""


class EngineError(NeurodeError, RuntimeError):
    """The engine asked for cannot take a solve; the message says why, and which can."""


class SolveError(NeurodeError, RuntimeError):
    """A solve failed while integrating.

    Attributes:
        solution: the incomplete `Solution`; failed rows hold NaN, and its `status` says why.
    """

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest known name, or the empty string where none is near."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
