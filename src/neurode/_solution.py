"""What a solve returns: states, times, counts, and a status whose value is its message."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Status(enum.Enum):
    """How the solve of one row ended; the value is the message."""

    SUCCESS = "reached the end of t_span"
    TERMINATED = "stopped at a terminal event"
    MAX_STEPS = "took max_steps steps before it reached the end; raise max_steps or loosen rtol and atol"
    UNDERFLOW = (
        "the step size fell below the resolution of time; the problem may be singular or stiff here, or the"
        " tolerances tighter than the dtype resolves"
    )
    NON_FINITE = "f(t, y) or the state became NaN or infinite"
    EVENT_OVERFLOW = "more events than max_events occurred; raise max_events"
    EVENTS_ACCUMULATE = "events follow one another without progress in time (a Zeno point)"

    @property
    def code(self) -> int:
        """A small integer, for tensors of statuses; 0 is success."""
        return _CODES[self]

    @property
    def failed(self) -> bool:
        """True where the result is not to be used."""
        return self not in (Status.SUCCESS, Status.TERMINATED)

    def __str__(self) -> str:
        return self.value


_ORDERED = tuple(Status)
_CODES = {status: code for code, status in enumerate(_ORDERED)}


@dataclass(frozen=True, eq=False)
class RowStatus:
    """The statuses of all rows: a sequence of `Status`, kept as one tensor of codes.

    Attributes:
        codes: `(rows,)` integers, `Status.code`.
    """

    codes: Tensor

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: int) -> Status:
        return _ORDERED[int(self.codes[row])]

    def __iter__(self) -> Iterator[Status]:
        return (_ORDERED[code] for code in self.codes.tolist())

    @property
    def failed(self) -> Tensor:
        """`(rows,)` booleans, True where the row's result is NaN."""
        return self.codes > Status.TERMINATED.code

    def __repr__(self) -> str:
        seen = {status: sum(s is status for s in self) for status in dict.fromkeys(self)}
        return "RowStatus(" + ", ".join(f"{n} x {status.name}" for status, n in seen.items()) + ")"


class Later:
    """What is made when it is first looked at: a solve of microseconds pays for the fields that are read.

    `later` makes an object with some of its fields, and a function that returns a dictionary of all that are missing.
    """

    @classmethod
    def later(
        cls, make: Callable[[], dict[str, Any]], now: dict[str, Any], apart: tuple[str, Callable[[], Any]] | None = None
    ) -> Any:
        """An object with the fields `now`; `make` is called for the others, once.

        Args:
            make: returns them.
            now: the fields that there are.
            apart: a field that is made by itself, where it is the first that is looked at.
        """
        made = object.__new__(cls)
        fields = made.__dict__
        fields.update(now)
        fields["_make"], fields["_apart"] = make, apart
        return made

    def __getattr__(self, name: str) -> Any:
        apart = self.__dict__.get("_apart")
        if apart is not None and apart[0] == name:
            self.__dict__[name] = apart[1]()
        elif not name.startswith("__"):
            self._finish()
        if name not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.__dict__[name]

    def _finish(self) -> None:
        make = self.__dict__.get("_make")
        if make is not None:
            with torch.inference_mode(False):
                found = make()
            for field_, value in found.items():
                self.__dict__.setdefault(field_, value)
            self.__dict__.pop("_make", None)
            self.__dict__.pop("_apart", None)

    def __getstate__(self) -> dict[str, Any]:
        self._finish()
        return self.__dict__


@dataclass
class Stats(Later):
    """Exact counts of the work of one solve.

    Attributes:
        num_calls: how often the user's `f` was called.
        num_evaluations: evaluations of `f`; an int, or `(rows,)` where rows have their own steps.
        num_accepted: accepted steps, likewise.
        num_rejected: rejected steps, likewise.
        method: name of the method, and why where it was chosen for the user.
        gradient: name of the gradient strategy, and why.
        engine: name of the engine, and why.
        backward: the same counts for the backward pass, once it ran.
    """

    # Defaults by functions, so that the class has none of its own and a field that is not there yet is looked for.
    num_calls: int = field(default_factory=int)
    num_evaluations: int | Tensor = field(default_factory=int)
    num_accepted: int | Tensor = field(default_factory=int)
    num_rejected: int | Tensor = field(default_factory=int)
    method: str = ""
    gradient: str = ""
    engine: str = ""
    backward: Stats | None = field(default=None, repr=False)

    @property
    def nfe(self) -> int | Tensor:
        """Alias of `num_evaluations`."""
        return self.num_evaluations


@dataclass(frozen=True)
class EventRecord:
    """Where one event happened.

    Attributes:
        t: times `(count,)`; with rows `(max_events, rows)`, padded with NaN.
        y: states there, time first, in the structure of the state.
        count: how many; an int, or `(rows,)`.
    """

    t: Tensor
    y: Any
    count: int | Tensor


@dataclass(frozen=True)
class Solution(Later):
    """The solution of an initial value problem.

    Attributes:
        ts: output times `(time,)`, or `(time, rows)` where rows differ.
        ys: states at `ts`, time first: every leaf is `(time, *leaf.shape)`.
        y1: the state at the end (or at the terminal event), shaped like `y0`.
        status: a `Status`, or a `RowStatus` with `batch_dim=0`.
        stats: exact counts, and what was chosen.
        t1: time at which the solve ended: 0-d, or `(rows,)`.
        events: one `EventRecord` an event.
        aux: auxiliary outputs of `f` at `ts`, where `has_aux=True`.
        integrals: running integrals at `ts`, where `integrate=` was given.
        local_error: with `estimates="local_error"`, the sum over the accepted steps of `|error| |h|`, RMS norm, not scaled by
            tolerances: 0-d, or `(rows,)`; differentiable.
        stiffness: with `estimates="stiffness"`, the sum of `|f(t, a) - f(t, b)| / |a - b|` over two stages at one time of
            each accepted step, likewise.
        num_saved: accepted steps saved per row, with `t_eval="steps"`.
    """

    ts: Tensor
    ys: Any
    y1: Any
    status: Status | RowStatus
    stats: Stats
    t1: Tensor
    events: tuple[EventRecord, ...] = ()
    aux: Any = None
    integrals: Any = None
    local_error: Tensor | None = None
    stiffness: Tensor | None = None
    num_saved: int | Tensor | None = None
    interpolant: Callable[..., Any] | None = field(default=None, repr=False)

    def __call__(self, t: float | Tensor) -> Any:
        """The state at any time inside the solved span, from the dense output.

        Args:
            t: a number or tensor of any shape; with `batch_dim=0` its last dimension counts rows, or it is a number.

        Returns:
            The state, `t`'s shape in front (for rows: `(*t.shape[:-1], rows, ...)`).

        Raises:
            ValueError: the solve was made without `dense=True`, or `t` lies outside the span.
        """
        return self._dense()(t, derivative=False)

    def derivative(self, t: float | Tensor) -> Any:
        """The time derivative of the interpolant at `t`; arguments and shapes as in calling the solution."""
        return self._dense()(t, derivative=True)

    def _dense(self) -> Callable[..., Any]:
        if self.interpolant is None:
            raise ValueError("this solution has no dense output; type solve(..., dense=True).")
        return self.interpolant

    @property
    def success(self) -> bool:
        """True where no row failed."""
        if isinstance(self.status, Status):
            return not self.status.failed
        return not bool(torch.any(self.status.failed))
