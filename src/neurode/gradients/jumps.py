"""Where the adjoint ODE stops on its way back: at outputs, and at events, over which the adjoint jumps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurode._loop import time_dtype
from neurode._problem import Problem
from neurode.output.events import SAME_TIME, Mark
from neurode.stepping import Step


class Happenings:
    """Notes the events of a forward solve.

    Attributes:
        noted: number of the step, events found in it, and `(lanes,)` its length.
    """

    def __init__(self) -> None:
        self.noted: list[tuple[int, Mark, Tensor]] = []
        self.steps = 0

    def joint(self, step: Step, marks: tuple[Mark, ...], catch: Any) -> None:
        """Note an accepted step of a joint solve."""
        self._note(step, marks)

    def rows(self, pace: Any, step: Step, marks: tuple[Mark, ...], catch: Any) -> None:
        """Note an attempt of rows."""
        self._note(step, marks)

    def _note(self, step: Step, marks: tuple[Mark, ...]) -> None:
        self.steps += 1
        for mark in marks:
            length = torch.as_tensor(step.interval.t1 - step.interval.t0, dtype=mark.x.dtype, device=mark.x.device)
            self.noted.append((self.steps, mark, length.reshape(-1)))

    def reached(self, end: Any, times: Sequence[Tensor]) -> Any:
        """Where the solve stopped, with the gradient of the event that stopped it.

        Args:
            end: where it stopped, a number or `(rows,)`.
            times: of the records of all events.
        """
        for _, mark, _ in self.noted:
            ended = (mark.steered & ~mark.applied)[mark.lanes]
            if not bool(ended.any()):
                continue
            t, kept = times[mark.event], mark.kept[ended]
            if not isinstance(end, Tensor) or end.ndim == 0:
                return t[kept[0]]
            rows = mark.rows[ended]
            end = end.index_put((rows,), t[kept, rows])
        return end


@dataclass(frozen=True)
class Stop:
    """One stop of the way back, which each lane makes at a time of its own.

    Attributes:
        here: `(lanes,)`, True for those that have anything here.
        t: `(lanes,)` when.
        output: `(lanes,)` the number of an output, -1 for none.
        marks: the events here, all lanes of the batch counted, at the start of their intervals.
        length: `(lanes,)` of the steps in which they happened.
    """

    here: Tensor
    t: Tensor
    output: Tensor
    marks: tuple[Mark, ...]
    length: Tensor


def stops(
    problem: Problem, end: Any, happenings: Happenings | None, times: Sequence[Tensor], apart: bool, gone: Any
) -> Iterator[Stop]:
    """All stops, from the last to the first.

    Args:
        problem: what was solved.
        end: where it stopped.
        happenings: its events; None where there are none to be looked for.
        times: of the records of all events.
        apart: whether every row is a lane; else there is one.
        gone: `(rows,)`, True for rows that failed, which stop nowhere where rows are lanes; or None.
    """
    device, dtype = problem.y0.device, time_dtype(problem.y0.device)
    lanes = problem.y0.shape[0] if apart else 1
    ends = (problem.t0, problem.t1, end)
    start, last, end = (torch.as_tensor(t, dtype=dtype, device=device).detach().expand(lanes) for t in ends)
    sign = torch.where(last >= start, 1.0, -1.0).to(dtype)
    parts = [_outputs(problem, end, sign)]
    parts += [] if happenings is None else [_events(note, times, lanes) for note in happenings.noted]
    table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if gone is not None and apart:
        keep = ~gone[table["lane"]]
        table = {name: column[keep] for name, column in table.items()}
    order = torch.argsort(
        table["t"] * sign[table["lane"]], stable=True
    )  # outputs first: they see what is before an event
    order = order[torch.argsort(table["lane"][order], stable=True)]
    table = {name: column[order] for name, column in table.items()}
    back = _from_behind(table)
    order, counts = torch.argsort(back, stable=True), torch.bincount(back).tolist()
    columns = [column[order].split(counts) for column in table.values()]
    for here in zip(*columns, strict=True):
        yield _stop(dict(zip(table, here, strict=True)), lanes, start, len(times))


def _outputs(problem: Problem, end: Tensor, sign: Tensor) -> dict[str, Tensor]:
    """The outputs that were reached, as rows of a table."""
    at = torch.zeros(0, dtype=end.dtype, device=end.device) if problem.t_eval is None else problem.t_eval.detach()
    at = at.to(end.dtype)
    at = at.unsqueeze(1).expand(-1, len(end)) if at.ndim == 1 else at
    output, lane = (at * sign <= end * sign).nonzero(as_tuple=True)
    none, zero = torch.full_like(lane, -1), torch.zeros_like(lane)
    some = torch.zeros_like(zero, dtype=end.dtype)
    return {
        "lane": lane, "t": at[output, lane], "output": output, "event": none, "step": none, "kept": zero, "x": some,
        "scale": some, "length": some, "steered": zero.bool(), "applied": zero.bool(),
    }  # fmt: skip


def _events(note: tuple[int, Mark, Tensor], times: Sequence[Tensor], lanes: int) -> dict[str, Tensor]:
    """The lanes in which an event was found in one step, as rows of the same table."""
    step, mark, length = note
    here, of_all = mark.lanes, torch.full_like(mark.kept, 1)
    t = times[mark.event]
    t = t[mark.kept] if t.ndim == 1 else t[mark.kept, mark.rows]
    return {
        "lane": mark.rows if lanes > 1 else 0 * mark.kept, "t": t.detach(), "output": -of_all, "event": mark.event * of_all,
        "step": step * of_all, "kept": mark.kept, "x": mark.x[here], "scale": mark.scale[here],
        "length": length.expand(len(here))[here], "steered": mark.steered[here], "applied": mark.applied[here],
    }  # fmt: skip


def _from_behind(table: dict[str, Tensor]) -> Tensor:
    """Which stop of its lane each row of the sorted table belongs to, counted from the last; events at one time are one."""
    lane, step, x = table["lane"], table["step"], table["x"]
    if not len(lane):
        return lane
    apart = (lane[1:] != lane[:-1]) | (step[1:] != step[:-1]) | (step[1:] < 0) | (x[1:] > x[:-1] + SAME_TIME)
    group = torch.cat([torch.zeros_like(lane[:1]), apart.long().cumsum(0)])
    last = torch.zeros(int(lane.max()) + 1, dtype=lane.dtype, device=lane.device).scatter_reduce(0, lane, group, "amax")
    return last[lane] - group


def _stop(table: dict[str, Tensor], lanes: int, like: Tensor, num_events: int) -> Stop:
    """One stop, spread over all lanes."""
    lane = table["lane"]

    def spread(mine: Tensor, values: Any, empty: Tensor) -> Tensor:
        return empty.index_put((lane[mine],), values)

    every, numbers = torch.ones_like(lane, dtype=torch.bool), torch.full((lanes,), -1, device=like.device)
    zeros, nowhere = torch.zeros_like(like), torch.zeros(lanes, dtype=torch.bool, device=like.device)
    marks = []
    for event in range(num_events):
        mine = table["event"] == event
        if not bool(mine.any()):
            continue
        of = {name: spread(mine, table[name][mine], nowhere) for name in ("steered", "applied")}
        here, scale = spread(mine, every[mine], nowhere), spread(mine, table["scale"][mine], zeros)
        kept = spread(mine, table["kept"][mine], numbers)[here]
        marks.append(Mark(event, here, zeros, scale, kept, here.nonzero().squeeze(1), of["steered"], of["applied"]))
    outputs = table["output"] >= 0
    return Stop(
        spread(every, every, nowhere), spread(every, table["t"], zeros),
        spread(outputs, table["output"][outputs], numbers), tuple(marks), spread(every, table["length"], zeros),
    )  # fmt: skip


__all__ = ["Happenings", "Stop", "stops"]
