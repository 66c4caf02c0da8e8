"""The outcome of a solve as values that autograd is given, and given back with their gradients attached."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neurode._constants import instead
from neurode._loop import Outcome, end_time
from neurode._problem import Problem
from neurode._solution import Status
from neurode.gradients.record import Recorder
from neurode.stepping import Piece

# The names of values: "y1", "ys", "catches", ("event t", i), ("event y", i), ("piece", number).
Values = dict[Any, Tensor]


@dataclass(frozen=True)
class Parts:
    """Which values are parts of interpolants.

    Attributes:
        of_step: for each step, pairs of a part (`"y0"`, `"y1"` or the number of a derivative) and the name of its value.
        in_piece: for each piece, its step, and the names of y0, y1 and the derivatives; None for the input y0.
    """

    of_step: dict[int, list[tuple[Any, Any]]]
    in_piece: list[tuple[int, list[Any]]]


def values_of(
    problem: Problem, outcome: Outcome, record: Recorder | None, y0: Tensor, gone: Tensor | None
) -> tuple[Values, Parts]:
    """All that a gradient may come to, by name.

    Args:
        problem: what was solved.
        outcome: of the solve.
        record: its steps; None for what does not need them: no times of catches, no interpolants.
        y0: the initial state that was solved from.
        gone: `(rows,)`, True for rows that failed and are played by good ones; or None.
    """
    values: Values = {"y1": _own(outcome.y1, y0)}
    if problem.t_eval is not None:
        values["ys"] = _own(outcome.ys, y0)
    for i, event in enumerate(outcome.events):
        values["event t", i], values["event y", i] = event.t, event.y
    parts = Parts({}, [])
    if record is None:
        return values, parts
    if record.catches:
        values["catches"] = torch.stack(record.catches)
    if outcome.pieces is not None:
        _name_pieces(outcome.pieces.pieces, record, y0, gone, values, parts)
    return values, parts


def output_times(problem: Problem, outcome: Outcome, end: Any) -> Tensor:
    """The times of the outputs that were asked for, or of the end, with their gradients.

    Args:
        problem: what was solved; not with `t_eval="steps"`.
        outcome: of the solve.
        end: where it ended, with its gradient.
    """
    ts = outcome.ts
    if isinstance(problem.t_eval, Tensor):
        return problem.t_eval
    if problem.per_row:
        return torch.where(outcome.status == Status.TERMINATED.code, end, problem.t1).unsqueeze(0)
    last = end if outcome.status is Status.TERMINATED else problem.t1
    return torch.as_tensor(last, dtype=ts.dtype, device=ts.device).reshape(1)


def _own(y: Tensor, y0: Tensor) -> Tensor:
    """A state that is not the input itself, which autograd would take for it."""
    return y.clone() if y is y0 or y._base is y0 else y


def _name_pieces(
    pieces: list[Piece], record: Recorder, y0: Tensor, gone: Tensor | None, values: Values, parts: Parts
) -> None:
    """Name the parts of the interpolants, each tensor once: the end of a step is the start of the next."""
    steps = {id(interval): n for n, interval in enumerate(record.intervals)}
    names: dict[int, Any] = {id(y0): None}
    for piece in pieces:
        n, mine = steps[id(piece.interval)], []
        for part, value in (("y0", piece.y0), ("y1", piece.y1), *enumerate(piece.ks)):
            if id(value) not in names:
                names[id(value)] = name = ("piece", len(names))
                values[name] = _played(value, gone).detach()
                parts.of_step.setdefault(n, []).append((part, name))
            mine.append(names[id(value)])
        parts.in_piece.append((n, mine))


def _played(x: Tensor, gone: Tensor | None) -> Tensor:
    """Rows that failed, played by one that did not: a query that no one reads must not spoil a gradient."""
    return x if gone is None else instead(x, gone)


@dataclass(frozen=True)
class Attach:
    """Puts the values that autograd knows in the place of those that it does not.

    Args:
        problem: what was solved.
        outcome: of the solve, without its states.
        record: its steps.
        replay: knows where the ends of steps come from.
        values: by name.
        parts: which of them are parts of interpolants.
        gone: `(rows,)`, True for rows that failed and are played by good ones; or None.
    """

    problem: Problem
    outcome: Outcome
    record: Recorder
    replay: Any
    values: Values
    parts: Parts
    gone: Tensor | None

    def all(self) -> Outcome:
        """The outcome as the engine would have returned it on PyTorch's tape."""
        values, outcome, y1 = self.values, self.outcome, self.values["y1"]
        ys = values["ys"] if self.problem.t_eval is not None else y1.unsqueeze(0)
        events = tuple(
            replace(event, t=values["event t", i], y=values["event y", i]) for i, event in enumerate(outcome.events)
        )
        end = end_time(self.problem, outcome.status, self._reached())
        if outcome.pieces is not None:
            outcome.pieces.pieces[:] = self._pieces(outcome.pieces.pieces)
        return replace(outcome, y1=y1, ys=ys, ts=self._ts(end), t1=end, events=events)

    @property
    def times(self) -> dict[str, Any]:
        """The times that ends of steps come from."""
        problem = self.problem
        return {"t0": problem.t0, "t1": problem.t1, "grid": problem.grid, "catches": self.values.get("catches")}

    def _reached(self) -> Any:
        """Where the solve stopped, with the gradient of the event that stopped it."""
        ended, reached, catches = self.record.ended, self.outcome.t1, self.values.get("catches")
        if catches is None:
            return reached
        if not isinstance(ended, Tensor):
            return catches[ended] if ended >= 0 else reached
        rows = torch.arange(len(ended), device=ended.device)
        return torch.where(ended >= 0, catches[ended.clamp_min(0), rows], reached)

    def _ts(self, end: Any) -> Tensor:
        """The times of the outputs."""
        problem, ts = self.problem, self.outcome.ts
        if isinstance(problem.t_eval, str):
            return ts if problem.per_row else self._saved(ts)
        return output_times(problem, self.outcome, end)

    def _saved(self, ts: Tensor) -> Tensor:
        """The times of all accepted steps of a joint solve."""
        if not self.replay.moves:
            return ts
        saved = [self.problem.t0, *(self.replay.end(n, self.times) for n in range(len(self.record.strides)))]
        return torch.stack([torch.as_tensor(t, dtype=ts.dtype, device=ts.device) for t in saved])

    def _pieces(self, pieces: list[Piece]) -> list[Piece]:
        start, moves = _played(self.problem.y0, self.gone), self.replay.moves
        attached = []
        for piece, (n, names) in zip(pieces, self.parts.in_piece, strict=True):
            interval = self.replay.attached(n, self.times) if moves else piece.interval
            y0, y1, *ks = (start if name is None else self.values[name] for name in names)
            attached.append(Piece(interval, y0, y1, ks, piece.powers))
        return attached
