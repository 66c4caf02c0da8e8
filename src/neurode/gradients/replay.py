"""How one accepted step is taken again on the tape, with all that came out of it the first time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from neurode._state import number, real_dtype
from neurode.control.standins import StandIns
from neurode.gradients.outputs import JointOutputs, RowOutputs
from neurode.gradients.record import Recorder, RowStride, State, put
from neurode.gradients.totals import Times
from neurode.output.events import Events
from neurode.stepping import COUPLED, Interval, Step, stamped, stepper
from neurode.stepping.adams import History

BLOCK = 16  # steps whose times are made in one operation


@dataclass
class Taken:
    """A step on the tape.

    Attributes:
        y, past: leaves: what it started from.
        times: leaves for moving times, each with where its gradient goes: the name of a total, and the place in it.
        after: the state that the next step starts from.
        carry: the derivatives that it remembers.
        outputs: whatever else came out: a value, the name of the output and the place in it.
    """

    y: Tensor
    past: tuple[Tensor, ...]
    times: list[tuple[Tensor, str, Any]] = field(default_factory=list)
    after: Any = None
    carry: tuple[Tensor, ...] = ()
    outputs: list[tuple[Tensor, Any, Any]] = field(default_factory=list)

    def put(self, value: Tensor, name: Any, place: Any = ...) -> None:
        """Note an output."""
        self.outputs.append((value, name, place))


class Replay:
    """What the replays of joint steps and of rows' steps share.

    Args:
        problem: as it was solved.
        inputs: its field, and what that depends on.
        record: the notes of its forward pass.
        times: the totals of the moving times' gradients; those without one are None.
        stand: who plays the rows that failed; or None.
        parts: which parts of a step's interpolant are outputs: `"y0"`, `"y1"` or the number of a derivative, and the name.
    """

    def __init__(
        self,
        problem: Any,
        inputs: Any,
        record: Recorder,
        times: Times,
        stand: StandIns | None,
        parts: dict[int, Any],
    ) -> None:
        self.problem, self.inputs, self.strides = problem, inputs, record.strides
        self.times, self.stand, self.parts = times, stand, parts
        self.gone = None if stand is None else stand.gone
        self.stepper = stepper(problem.method)
        self.coupled = problem.method.kind in COUPLED
        self.saves = isinstance(problem.t_eval, str)
        self.outputs: Any = None
        # Whether a step gives nothing but the next state where nothing happens in it.
        self.quiet = not (self.moves or self.saves or self.stepper.remembers)
        self.events: Events | None = None
        if problem.events:
            ends = torch.as_tensor(problem.t0, dtype=times.dtype, device=problem.y0.device).detach().reshape(-1)
            self.events = Events(problem, ends, torch.ones_like(ends))

    @property
    def moves(self) -> bool:
        """Whether an end of any step has a gradient."""
        times = self.times
        return any(total is not None for total in (times.t0, times.t1, times.grid, times.catches))

    # ---- what differs between joint steps and rows

    def lanes(self, n: int) -> tuple[Tensor | None, Tensor | None]:
        """Which rows step n has (None for all), and which of them it moves and counts for (None for all)."""
        raise NotImplementedError

    def state(self, n: int, kept: State) -> State:
        """What step n is to be taken from; a row that failed is played by one that did not."""
        raise NotImplementedError

    def advance(self, n: int, state: State, field: Any) -> State:
        """What the step after step n starts from, all rows, without a tape."""
        raise NotImplementedError

    def attached(self, n: int, times: dict[str, Any]) -> Interval:
        """Step n's interval, its ends with the gradients of what they come from."""
        raise NotImplementedError

    def _ends(self, n: int, taken: Taken) -> list[Any]:
        """Both ends of step n, leaves where they move."""
        raise NotImplementedError

    def _cut(self, n: int, catch: Any, step: Step, taken: Taken) -> tuple[Tensor, Tensor]:
        """The states before and after the events that changed the course in step n, whose times are noted."""
        raise NotImplementedError

    def _second_after(self, catch: Any, step: Step) -> Tensor:
        """The second state of a coupling behind the events of a step: it starts anew where they changed the first."""
        raise NotImplementedError

    def _put_mark(self, mark: Any, t: Tensor, y: Tensor, taken: Taken) -> None:
        """Note time and state of an event."""
        raise NotImplementedError

    def _put_saved(self, n: int, end: Tensor, taken: Taken) -> None:
        """Note the state after step n."""
        raise NotImplementedError

    # ---- one step

    def take(self, n: int, state: State, field: Any) -> Taken:
        """Step n on the tape.

        Args:
            n: which step.
            state: leaves, the present rows' as `state` returns them.
            field: the field to call.
        """
        taken = Taken(state.y, state.past)
        known = len(state.past) if self.stepper.remembers else 0
        step = self._step(n, state, self._ends(n, taken), self._past_times(n, known, taken), field)
        piece = cache(lambda: self.stepper.piece(field, step)[0])
        end = taken.after = step.y1
        catch = self._find_events(n, piece, taken)
        if catch is not None:
            end, taken.after = self._cut(n, catch, step, taken)
        if self.stepper.remembers:
            taken.carry = step.carry.ks
        if self.coupled:
            taken.carry = (step.carry if catch is None else self._second_after(catch, step),)
        for part, name in self.parts.get(n, ()):
            taken.put(piece().ks[part] if isinstance(part, int) else {"y0": state.y, "y1": end}[part], name)
        self.put_outputs(n, step, end, piece, taken)
        return taken

    def put_outputs(self, n: int, step: Step, end: Tensor, piece: Any, taken: Taken) -> None:
        """Note the outputs in a step.

        Args:
            n: which step.
            step: the step on the tape.
            end: the state that it ended in.
            piece: a function that returns its interpolant.
            taken: where to note them.
        """
        if self.saves:
            self._put_saved(n, end, taken)
        if self.outputs is not None:
            found, leaves = self.outputs.take(n, self.strides[n], step, end, piece, self.times)
            taken.outputs += [(value, "ys", place) for value, place in found]
            taken.times += leaves

    def at_start(self, grad_ys: Tensor) -> Any:
        """The gradient of the outputs that are the initial state itself."""
        return grad_ys[0] if self.saves else self.outputs.at_start(grad_ys)

    def is_plain(self, n: int) -> bool:
        """Whether nothing comes out of step n but the next state, and no end of it moves."""
        return (
            self.quiet
            and not (self.strides[n].marks or n in self.parts)
            and (self.outputs is None or not self.outputs.within(n, self.strides[n]))
        )

    def interval(self, n: int, dtype: torch.dtype) -> Interval:
        """Step n's interval, of constants."""
        stride = self.strides[n]
        return Interval(stride.t0, stride.t1, dtype, *stride.jumps)

    def between(self, n: int, ends: list[Any], dtype: torch.dtype) -> Interval:
        """Step n's interval between its ends as `_ends` returns them."""
        if any(isinstance(t, Tensor) for t in ends):
            return Interval(ends[0], ends[1], dtype, *self.strides[n].jumps)
        return self.interval(n, dtype)

    def _step(self, n: int, state: State, ends: list[Any], times: Any, field: Any) -> Step:
        interval = self.between(n, ends, field.time_dtype)
        if self.coupled:
            return self.stepper.step(field, interval, state.y, *state.past)
        return self.stepper.step(field, interval, state.y, History(state.past, times) if state.past else None)

    def _past_times(self, n: int, count: int, taken: Taken) -> tuple[Any, ...]:
        """The times of the derivatives that are remembered: those at which the steps before began."""
        return tuple(self._ends(i, taken)[0] for i in range(n - 1, n - 1 - count, -1))

    def _find_events(self, n: int, piece: Any, taken: Taken | None) -> Any:
        """Find the events of step n again, and note them; returns what they changed, or None."""
        marks = self._marks(n)
        if not marks:
            return None
        assert self.events is not None
        self.events.lanes.field = self.inputs.field
        found, catch = self.events.again(piece(), marks)
        if taken is not None:
            for mark, (t, y) in zip(marks, found, strict=True):
                self._put_mark(mark, t, y, taken)
        return catch

    def _marks(self, n: int) -> tuple[Any, ...]:
        return self.strides[n].marks


class JointReplay(Replay):
    """Takes the steps of a joint solve again."""

    def __init__(self, problem: Any, *rest: Any) -> None:
        super().__init__(problem, *rest)
        self.t1 = number(problem.t1)
        self.outputs = JointOutputs(problem, self.strides) if isinstance(problem.t_eval, Tensor) else None
        self.block: tuple[int, list[Interval]] = (-1, [])  # from which step on, and the intervals

    def lanes(self, n: int) -> tuple[None, None]:
        """See `Replay.lanes`."""
        return None, None

    def state(self, n: int, kept: State) -> State:
        """See `Replay.state`."""
        if self.stand is None:
            return kept
        return State(self.stand.states(kept.y), tuple(map(self.stand.states, kept.past)))

    def advance(self, n: int, state: State, field: Any) -> State:
        """See `Replay.advance`."""
        known = len(state.past) if self.stepper.remembers else 0
        before = tuple(self._plain_ends(i)[0] for i in range(n - 1, n - 1 - known, -1))
        step = self._step(n, state, self._plain_ends(n), before, field)
        catch = self._find_events(n, lambda: self.stepper.piece(field, step)[0], None)
        if catch is not None:
            return State(catch.after, (catch.after,) if self.coupled else ())
        if self.coupled:
            return State(step.y1, (step.carry,))
        return State(step.y1, step.carry.ks if self.stepper.remembers and not self._fresh(n + 1) else ())

    def interval(self, n: int, dtype: torch.dtype) -> Interval:
        """Step n's interval, of constants; the times of the stages of several steps are made together."""
        stride, nodes = self.strides[n], getattr(self.problem.method, "C", None)
        if nodes is None or any(stride.jumps):
            return super().interval(n, dtype)
        start = n - n % BLOCK
        if self.block[0] != start:
            strides = [self.strides[i] for i in range(start, min(start + BLOCK, len(self.strides)))]
            ends = [(s.t0, s.t1) for s in strides]
            self.block = start, stamped(ends, nodes, dtype, self.problem.y0.device)[1]
        made = self.block[1][n - start]
        times = made.times(nodes, self.problem.y0, dtype)
        # An `f` may have changed a time in place, or asked for its gradient.
        spent = times[0]._version or any(t.requires_grad for t in times)
        return super().interval(n, dtype) if spent else made

    def _fresh(self, n: int) -> bool:
        """Whether step n starts without a memory: behind an event or a jump."""
        return n < len(self.strides) and (self.strides[n].resumed is not None or bool(self.strides[n].jumps[0]))

    def source(self, n: int, end: int) -> tuple[str, Any] | None:
        """Where one end of step n comes from: the name of a time of the solve, and the place in it; None for a constant."""
        stride, times = self.strides[n], self.times
        if end == 0 and stride.resumed is not None:
            return "catches", stride.resumed
        if times.grid is not None:
            return "grid", stride.point - 1 + end
        if end == 0:
            return ("t0", ...) if n == 0 and times.t0 is not None else None
        return ("t1", ...) if stride.t1 == self.t1 and times.t1 is not None else None

    def _ends(self, n: int, taken: Taken) -> list[Any]:
        stride = self.strides[n]
        ends: list[Any] = [stride.t0, stride.t1]
        for i in range(2):
            source = self.source(n, i)
            if source is not None:
                ends[i] = torch.tensor(ends[i], dtype=self.times.dtype, device=taken.y.device, requires_grad=True)
                taken.times.append((ends[i], *source))
        return ends

    def _plain_ends(self, n: int) -> list[Any]:
        """Both ends as the forward pass had them: tensors where the user's own times are, for the same rounding."""
        stride = self.strides[n]
        ends: list[Any] = [stride.t0, stride.t1]
        for i in range(2):
            source = self.source(n, i)
            if source is not None and source[0] != "catches":
                ends[i] = torch.tensor(ends[i], dtype=self.times.dtype, device=self.problem.y0.device)
        return ends

    def _cut(self, n: int, catch: Any, step: Step, taken: Taken) -> tuple[Tensor, Tensor]:
        taken.put(catch.t[0], "catches", self.strides[n].caught)
        return catch.before, catch.after

    def _second_after(self, catch: Any, step: Step) -> Tensor:
        return catch.after

    def _put_mark(self, mark: Any, t: Tensor, y: Tensor, taken: Taken) -> None:
        taken.put(t, ("event t", mark.event), mark.kept)
        taken.put(y.unsqueeze(0), ("event y", mark.event), mark.kept)

    def _put_saved(self, n: int, end: Tensor, taken: Taken) -> None:
        taken.put(end, "ys", n + 1)

    def attached(self, n: int, times: dict[str, Any]) -> Interval:
        """See `Replay.attached`."""
        stride = self.strides[n]
        sources = (self.source(n, 0), self.source(n, 1))
        ends = [
            t if source is None else times[source[0]][source[1]]
            for t, source in zip((stride.t0, stride.t1), sources, strict=True)
        ]
        return Interval(ends[0], ends[1], real_dtype(self.problem.y0.dtype))

    def end(self, n: int, times: dict[str, Any]) -> Any:
        """Where the solve went on from after step n, with its gradient."""
        caught = self.strides[n].caught
        return self.attached(n, times).t1 if caught is None else times["catches"][caught]


class RowReplay(Replay):
    """Takes the steps of rows with times of their own again."""

    def __init__(self, problem: Any, *rest: Any) -> None:
        super().__init__(problem, *rest)
        self.span = (problem.t0.detach(), problem.t1.detach())
        self.outputs = RowOutputs(problem, self.gone) if isinstance(problem.t_eval, Tensor) else None
        self.positions = self._positions() if self.saves else []

    def _positions(self) -> list[Tensor]:
        """Where among the saved steps each attempt of the present rows stands."""
        count, found = torch.ones_like(self.span[0], dtype=torch.int64), []
        for stride in self.strides:
            found.append(count[stride.rows])
            count = count.index_add(0, stride.rows, stride.accepted.long())
        return found

    def lanes(self, n: int) -> tuple[Tensor | None, Tensor]:
        """See `Replay.lanes`."""
        stride = self.strides[n]
        moved = stride.accepted if self.gone is None else stride.accepted & ~self.gone[stride.rows]
        return None if stride.whole else stride.rows, moved

    def state(self, n: int, kept: State) -> State:
        """See `Replay.state`."""
        stride = self.strides[n]

        def present(x: Tensor) -> Tensor:
            x = x if stride.whole or len(x) == len(stride.rows) else x.index_select(0, stride.rows)
            return x if self.stand is None else self.stand.states(x, stride.rows)

        return State(present(kept.y), tuple(map(present, kept.past)))

    def _times_of(self, stride: RowStride, t: Tensor) -> Tensor:
        return t if self.stand is None else self.stand.times(t, stride.rows)

    def interval(self, n: int, dtype: torch.dtype) -> Interval:
        """See `Replay.interval`."""
        stride = self.strides[n]
        return Interval(self._times_of(stride, stride.t0), self._times_of(stride, stride.t1), dtype, *stride.jumps)

    def advance(self, n: int, state: State, field: Any) -> State:
        """See `Replay.advance`."""
        stride, here = self.strides[n], self.state(n, state)
        ends = [self._times_of(stride, stride.t0), self._times_of(stride, stride.t1)]
        known = len(here.past) if self.stepper.remembers else 0
        before = tuple(self._times_of(s, s.t0) for s in reversed(self.strides[n - known : n]))
        step = self._step(n, here, ends, before, field)
        catch = self._find_events(n, lambda: self.stepper.piece(field, step)[0], None)

        def after(old: Tensor, new: Tensor, whole: Tensor) -> Tensor:
            new = torch.where(stride.accepted.unsqueeze(1), new, old)
            new = new if catch is None else torch.where(catch.lanes.unsqueeze(1), catch.after, new)
            return put(whole, stride, new)

        y = after(here.y, step.y1, state.y)
        if self.coupled:
            return State(y, (after(here.past[0], step.carry, state.past[0]),))
        return State(y, step.carry.ks if self.stepper.remembers and catch is None else ())

    def _marks(self, n: int) -> tuple[Any, ...]:
        """The events of a step, without those of rows that failed later."""
        stride = self.strides[n]
        if self.gone is None:
            return stride.marks
        stays = ~self.gone[stride.rows]
        return tuple(_without(mark, stays) for mark in stride.marks)

    def _ends(self, n: int, taken: Taken) -> list[Any]:
        stride = self.strides[n]
        ends = [self._times_of(stride, stride.t0), self._times_of(stride, stride.t1)]
        for i in range(2):
            sources = row_sources(stride, i, self.span, self.times)
            if sources:
                ends[i] = ends[i].clone().requires_grad_()
                taken.times += [(ends[i], *source) for source in sources]
        return ends

    def _cut(self, n: int, catch: Any, step: Step, taken: Taken) -> tuple[Tensor, Tensor]:
        stride, wide = self.strides[n], catch.lanes.unsqueeze(1)
        taken.put(catch.t[catch.lanes], "catches", (stride.caught, stride.rows[catch.lanes]))
        return torch.where(wide, catch.before, step.y1), torch.where(wide, catch.after, step.y1)

    def _second_after(self, catch: Any, step: Step) -> Tensor:
        return torch.where(catch.lanes.unsqueeze(1), catch.after, step.carry)

    def _put_mark(self, mark: Any, t: Tensor, y: Tensor, taken: Taken) -> None:
        taken.put(t[mark.lanes], ("event t", mark.event), (mark.kept, mark.rows))
        taken.put(y[mark.lanes], ("event y", mark.event), (mark.kept, mark.rows))

    def _put_saved(self, n: int, end: Tensor, taken: Taken) -> None:
        stride = self.strides[n]
        mine = stride.accepted
        taken.put(end[mine], "ys", (self.positions[n][mine], stride.rows[mine]))

    def attached(self, n: int, times: dict[str, Any]) -> Interval:
        """See `Replay.attached`."""
        stride = self.strides[n]
        ends = [stride.t0, stride.t1]
        for i in range(2):
            for name, (mask, place) in row_sources(stride, i, self.span, self.times):
                ends[i] = torch.where(mask, times[name][place], ends[i])
        return Interval(ends[0], ends[1], real_dtype(self.problem.y0.dtype))


def row_sources(stride: RowStride, end: int, span: tuple[Tensor, Tensor], times: Times) -> list[tuple[str, Any]]:
    """Where one end of a step of rows comes from.

    Args:
        stride: the step.
        end: 0 for its start, 1 for its end.
        span: `(all rows,)` t0 and t1.
        times: where gradients of times are summed.

    Returns:
        Names of totals, each with the rows for which it counts and the place in it.
    """
    found, mine = [], stride.accepted
    if end == 0 and times.catches is not None:
        resumed = (stride.resumed >= 0) & mine
        if bool(resumed.any()):
            found.append(("catches", (resumed, (stride.resumed.clamp_min(0), stride.rows))))
            mine = mine & ~resumed
    name, here = ("t0", stride.t0) if end == 0 else ("t1", stride.t1)
    if times.grid is not None:
        point = (stride.point - 1 + end).clamp_max(len(times.grid) - 1)
        found.append(("grid", (mine, (point, stride.rows))))
    elif getattr(times, name) is not None:
        found.append((name, (mine & (here == span[end][stride.rows]), (stride.rows,))))
    return found


def _without(mark: Any, stays: Tensor) -> Any:
    """An event in those of its lanes that stay."""
    kept = stays[mark.lanes]
    return replace(
        mark, lanes=mark.lanes & stays, kept=mark.kept[kept], rows=mark.rows[kept], steered=mark.steered & stays,
        applied=mark.applied & stays,
    )  # fmt: skip


__all__ = ["JointReplay", "Replay", "RowReplay", "Taken", "row_sources"]
