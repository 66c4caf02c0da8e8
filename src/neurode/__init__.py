"""neurode: networks without fixed depth, and the solvers that train them."""

from neurode import methods, nn, regularizers
from neurode._citation import citation
from neurode._doctor import Checkup, doctor
from neurode._engines import explain
from neurode._errors import (
    EngineError,
    FieldError,
    GradientError,
    InputError,
    NeurodeError,
    SolveError,
    UnknownOptionError,
)
from neurode._field import per_row
from neurode._solution import EventRecord, RowStatus, Solution, Stats, Status
from neurode._solve import solve
from neurode.control import PID, Callbacks
from neurode.gradients import Continuous, Discrete
from neurode.methods import ButcherTableau, Reversible
from neurode.output.events import Event

__version__ = "0.1.0"

__all__ = [
    "PID",
    "ButcherTableau",
    "Callbacks",
    "Checkup",
    "Continuous",
    "Discrete",
    "EngineError",
    "Event",
    "EventRecord",
    "FieldError",
    "GradientError",
    "InputError",
    "NeurodeError",
    "Reversible",
    "RowStatus",
    "Solution",
    "SolveError",
    "Stats",
    "Status",
    "UnknownOptionError",
    "__version__",
    "citation",
    "doctor",
    "explain",
    "methods",
    "nn",
    "per_row",
    "regularizers",
    "solve",
]
