"""Events: scalar functions of time and state whose zeros are found on the dense output, in the order of time.

A joint solve is one lane, a solve with rows has one lane a row; the search is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurode._errors import FieldError, GradientError, InputError
from neurode._field import misfit
from neurode._solution import EventRecord, Status
from neurode._state import Layout, is_transformed, real_dtype
from neurode.output.interpolant import evaluate, weights
from neurode.stepping import Piece

PARTS = 8  # samples a step: crossings further apart than an eighth of a step are told apart
JUST_AFTER = 2.0**-10  # of a step: where a function that is zero at the start shows its sign
SAME_TIME = 64 * torch.finfo(torch.float64).eps  # of a step: events this close happen at once, in the order given
# Two events closer than this share of the span have no time between them: a Zeno point.
ACCUMULATION = 1e-10
MAX_ITERATIONS = 80  # of the bracketing search: it halves the bracket at least every third time
GRAZING = 1e-8  # dg/dt below this share of max|g| / h: the time of the zero does not depend smoothly on anything


@dataclass(frozen=True)
class Event:
    """Something that happens when `g(t, y, *args)` passes through zero.

    A zero at `t0`, or just after `apply`, does not fire. Where several events lie in one step, the earliest in time comes
    first. The time of an event is differentiable (implicit function theorem).

    Args:
        g: the function; returns a 0-d tensor, or `(rows,)` with `batch_dim=0`.
        direction: 1 for zeros where g rises along the integration, -1 where it falls, 0 for both.
        terminal: True or 1 to stop at the first, n to stop at the n-th, False to go on.
        apply: `apply(t, y, *args)` returns the state to go on from (a bounce, a dose, a reset).

    Example:
        When does a falling stone reach the ground?

        >>> import torch, neurode
        >>> fall = lambda t, y: torch.stack([y[1], torch.full_like(y[1], -9.81)])
        >>> ground = neurode.Event(lambda t, y: y[0], direction=-1, terminal=True)
        >>> sol = neurode.solve(fall, [10.0, 0.0], (0, 100), method="dopri5", events=[ground])
        >>> round(float(sol.t1), 4), round((2 * 10 / 9.81) ** 0.5, 4)
        (1.4278, 1.4278)
    """

    g: Callable[..., Any]
    direction: int = 0
    terminal: bool | int = False
    apply: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if not callable(self.g) or (self.apply is not None and not callable(self.apply)):
            raise InputError("Event(g, apply=...) takes functions of (t, y).")
        if self.direction not in (-1, 0, 1):
            raise InputError(f"direction={self.direction!r}; it must be -1 (falling), 0 (both) or 1 (rising).")
        if not isinstance(self.terminal, int) or self.terminal < 0:
            raise InputError(f"terminal={self.terminal!r}; it must be False, True or the number of events to stop at.")

    @property
    def steers(self) -> bool:
        """Whether the event can change the course of the solve."""
        return bool(self.terminal) or self.apply is not None


@dataclass(frozen=True)
class Mark:
    """One event found in one step, in some of its lanes: what it takes to find the same again.

    Attributes:
        event: which.
        lanes: `(lanes,)`, True where it happened.
        x: `(lanes,)` at which fraction of the step.
        scale: `(lanes,)` size of g over the step.
        kept: where in its lanes' records it stands.
        rows: the lanes, counted in the whole batch.
        steered: `(lanes,)`, True where it changed the course.
        applied: `(lanes,)`, True where `apply` was called.
    """

    event: int
    lanes: Tensor
    x: Tensor
    scale: Tensor
    kept: Tensor
    rows: Tensor
    steered: Tensor
    applied: Tensor


@dataclass(frozen=True)
class Catch:
    """The events that change the course of lanes within one step.

    Attributes:
        lanes: `(lanes,)`, True where the lane goes on from an event.
        t: `(lanes,)` the time to go on from, with its gradient.
        before, after: states there, before and after `apply`.
        ended: `(lanes,)` codes of the lanes that end here, -1 elsewhere.
        gap: `(lanes,)` time since the lane was caught before; infinite at the first.
    """

    lanes: Tensor
    t: Tensor
    before: Tensor
    after: Tensor
    ended: Tensor
    gap: Tensor


class Look(NamedTuple):
    """What the functions of events are along one attempt.

    Attributes:
        values: `(events, parts + 1, lanes)`.
        open: `(events, parts, lanes)`, True where one passes through zero.
        lost: `(lanes,)`, True where one is NaN although the state is finite.
        fresh: `(lanes,)`, True where no step was accepted since the start or the last event.
    """

    values: Tensor
    open: Tensor
    lost: Tensor
    fresh: Tensor

    def flags(self, accepted: Tensor | None) -> Tensor:
        """`(3,)`: whether anything crossed in the accepted lanes (all: None), whether lanes stay fresh, whether any is lost."""
        if accepted is None:
            return torch.stack([self.open.any(), torch.zeros_like(self.open.any()), self.lost.any()])
        return torch.stack([(self.open & accepted).any(), (self.fresh & ~accepted).any(), (self.lost & accepted).any()])


class Lanes:
    """How a step's interpolant and the user's functions are evaluated at one time a lane."""

    def __init__(self, field: Any, layout: Layout, batched: bool) -> None:
        self.field, self.layout, self.batched = field, layout, batched
        self.dtype = real_dtype(layout.dtype)

    def span(self, piece: Piece, like: Tensor) -> tuple[Tensor, Tensor]:
        """Start and end of the step, `(lanes,)`."""
        ends = (
            torch.as_tensor(t, dtype=like.dtype, device=like.device) for t in (piece.interval.t0, piece.interval.t1)
        )
        t0, t1 = (t.reshape(-1) for t in ends)
        return t0, t1

    def state(self, piece: Piece, x: Tensor) -> Tensor:
        """The inner state at the fractions `x` `(lanes,)` of the step."""
        x = x.to(self.dtype)
        if not self.batched:
            return evaluate(piece, x)[0]
        w = weights(piece.powers, x).to(piece.y0.dtype)
        total = sum(w[:, i : i + 1] * k for i, k in enumerate(piece.ks))
        return piece.y0 + piece.interval.h * total

    def finite(self, piece: Piece) -> Tensor:
        """`(lanes,)`, whether the step's interpolant is finite: its ends and its derivatives."""
        finite = torch.isfinite(torch.stack([piece.y1, *piece.ks])).all(0)
        return finite.all(1) if self.batched else finite.all().reshape(1)

    def call(self, function: Callable[..., Any], t: Tensor, y: Tensor) -> Any:
        """A user's function at inner time and state."""
        field = self.field
        t = t.to(field.time_dtype)
        t = field.row_time(t, y) if self.batched else t.reshape(())
        try:
            return function(t, self.layout.unpack(y), *field.args)
        except TypeError as error:
            problem = misfit(function, field.args, "an event's function")
            if problem is None:
                raise
            raise InputError(problem) from error

    def value(self, event: Event, t: Tensor, y: Tensor) -> Tensor:
        """`g` as `(lanes,)`."""
        out = self.call(event.g, t, y)
        shape = (y.shape[0],) if self.batched else ()
        if not isinstance(out, Tensor) or out.shape != shape:
            got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise FieldError(f"an event's g(t, y) returned {got}; it must return a tensor of shape {tuple(shape)}.")
        if not out.is_floating_point():
            raise FieldError(
                f"an event's g(t, y) returned {out.dtype}; an event is where a real number passes through zero. Return the"
                " difference: y[0] - 0.5, not y[0] < 0.5."
            )
        return out.reshape(-1)


def values_at(events: tuple[Event, ...], field: Any, t: Tensor, y: Tensor) -> list[Tensor]:
    """What the functions of all events return at one inner time and state."""
    layout, found = field.layout, []
    lanes = Lanes(field, layout, layout.batched)
    for event in events:
        found.append(lanes.value(event, t, y))
        if event.apply is not None:
            found.append(layout.derivative(lanes.call(event.apply, t, y), y))
    return found


class Events:
    """Finds, records and applies the events of one solve.

    Args:
        problem: with `events` and `max_events`.
        t0: `(lanes,)` starts.
        span: `(lanes,)` lengths of the spans.
    """

    def __init__(self, problem: Any, t0: Tensor, span: Tensor) -> None:
        self.events, self.limit = problem.events, problem.max_events
        self.lanes = Lanes(problem.field, problem.layout, problem.layout.batched)
        self.layout, self.span = problem.layout, span
        total = len(t0)
        self.rows = torch.arange(total, device=t0.device)
        self.counts = torch.zeros(len(self.events), total, dtype=torch.int64, device=t0.device)
        self.caught_at = torch.full((len(self.events), total), torch.nan, dtype=t0.dtype, device=t0.device)
        self.previous: Tensor | None = None
        self.fresh = torch.ones(total, dtype=torch.bool, device=t0.device)
        self.any_fresh = True
        self.found: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = [[] for _ in self.events]
        self.marks: tuple[Mark, ...] = ()

    # ---- one step

    @torch.no_grad()
    def look(self, piece: Piece) -> Look:
        """What the functions are along one attempt, without a host read."""
        values = self._sample(piece)
        lost = torch.isnan(values).any(1).any(0) & self.lanes.finite(piece)
        return Look(values, self._crossings(values), lost, self.fresh)

    def scan(
        self, piece: Piece, look: Look | None, accepted: Tensor | None = None, seen: list[Any] | None = None
    ) -> Catch | None:
        """Look through one step.

        Args:
            piece: its interpolant.
            look: what `look` saw along it, where it was called already.
            accepted: `(lanes,)`; all of them where it is None.
            seen: `look.flags(accepted)` where they were read already, beside control's own; None to read them here.

        Returns:
            What changes the course, or None.
        """
        if accepted is None:
            accepted = torch.ones_like(self.fresh)
        look = look or self.look(piece)
        some, self.any_fresh, blind = map(bool, look.flags(accepted).tolist() if seen is None else seen)
        values, open_, lost = look.values, look.open & accepted, look.lost & accepted
        t0, t1 = self.lanes.span(piece, self.span)
        if blind:
            raise FieldError(
                f"an event's g(t, y) returned NaN in the step to t = {float(t1.detach()[lost][0]):.6g}, so that nobody knows"
                " whether it passed through zero. Let g be a number wherever the solution goes."
            )
        caught: Catch | None = None
        self.marks = ()
        while some:
            part, x = self._locate_all(piece, open_)
            first = x.amin(0)
            for i, event in enumerate(self.events):
                mine = torch.isfinite(x[i]) & (x[i] <= first + SAME_TIME)
                if caught is not None:
                    mine = mine & ~(caught.lanes & (caught.ended >= 0))
                if not bool(mine.any()):
                    continue
                where = torch.where(mine, x[i], torch.ones_like(x[i]))
                scale = values[i].abs().amax(0)
                t, y = self._differentiable(event, piece, where, t0, t1, mine, scale)
                y = self._seen(y, mine, caught)
                caught, steered = self._register(i, mine, where, scale, t, y, caught)
                open_[i, part[i], torch.arange(len(mine))] &= ~mine
                open_ = open_ & ~steered
            some = bool(open_.any())
        self._carry_over(values, accepted, caught)
        return caught

    def _sample(self, piece: Piece) -> Tensor:
        """Values `(events, parts + 1, lanes)` of all functions over the step."""
        t0, t1 = self.lanes.span(piece, self.span)
        start = self._values(piece, t0, t1, 0.0) if self.previous is None else self.previous
        columns = [start] + [self._values(piece, t0, t1, part / PARTS) for part in range(1, PARTS + 1)]
        values = torch.stack(columns, 1)
        if self.any_fresh:  # zero at t0 or just after an event: what sign does it leave zero with?
            limit = torch.finfo(self.lanes.dtype).eps ** 0.5 * values.abs().amax(1)
            flat = self.fresh & (start.abs() <= limit)
            values[:, 0] = torch.where(flat, self._values(piece, t0, t1, JUST_AFTER), start)
        return values

    def _values(self, piece: Piece, t0: Tensor, t1: Tensor, part: float) -> Tensor:
        x = torch.full_like(self.span, part)
        y = self.lanes.state(piece, x) if part else piece.y0
        t = t0 + part * (t1 - t0)
        return torch.stack([self.lanes.value(event, t, y).to(self.span.dtype) for event in self.events])

    def _crossings(self, values: Tensor) -> Tensor:
        """`(events, parts, lanes)`: True where a function passes through zero in the wanted direction."""
        before, after = values[:, :-1], values[:, 1:]
        rising, falling = (before < 0) & (after >= 0), (before > 0) & (after <= 0)
        directions = torch.tensor([event.direction for event in self.events], device=values.device)[:, None, None]
        return (rising & (directions >= 0)) | (falling & (directions <= 0))

    def _locate_all(self, piece: Piece, open_: Tensor) -> tuple[Tensor, Tensor]:
        """Every function's first crossing that is still open, located.

        Returns:
            `(events, lanes)`: in which part of the step, and at which fraction of it (infinite for none).
        """
        some, part = open_.any(1), open_.long().argmax(1)
        x = torch.full(some.shape, torch.inf, dtype=self.span.dtype, device=self.span.device)
        for i, event in enumerate(self.events):
            if bool(some[i].any()):
                low = part[i].to(self.span.dtype) / PARTS
                x[i] = torch.where(some[i], self._locate(event, piece, low, low + 1 / PARTS, some[i]), torch.inf)
        return part, x

    def _locate(self, event: Event, piece: Piece, low: Tensor, high: Tensor, mine: Tensor) -> Tensor:
        """The zero inside a bracket, to rounding: regula falsi with the Illinois weights, bisection every third time."""
        with torch.no_grad():
            t0, t1 = self.lanes.span(piece, self.span)

            def g(x: Tensor) -> Tensor:
                value = self.lanes.value(event, t0 + x * (t1 - t0), self.lanes.state(piece, x))
                return value.to(self.span.dtype)

            a, b, at_a, at_b = low, high, g(low), g(high)
            at_a = torch.where((at_a == 0) | (at_a.sign() == at_b.sign()), -at_b, at_a)  # a zero that was left just now
            side = at_a.sign()
            for iteration in range(MAX_ITERATIONS):
                secant = b - at_b * (b - a) / torch.where(at_b == at_a, torch.inf, at_b - at_a)
                middle = 0.5 * (a + b)
                x = torch.where((secant > a) & (secant < b), secant, middle) if iteration % 3 != 2 else middle
                value = g(x)
                left = value.sign() == side
                weight = 0.5 if iteration % 3 != 2 else 1.0
                at_b = torch.where(left, at_b * weight, value)
                at_a = torch.where(left, value, at_a * weight)
                a, b = torch.where(left, x, a), torch.where(left, b, x)
                done = (b - a <= 4 * torch.finfo(b.dtype).eps) | (value == 0) | ~mine
                b = torch.where(value == 0, x, b)
                if bool(done.all()):
                    break
        return torch.where(mine, b, torch.ones_like(b))

    def _differentiable(
        self, event: Event, piece: Piece, x: Tensor, t0: Tensor, t1: Tensor, mine: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Time and state of a located event, with the gradient of the implicit function theorem."""
        t = t0 + x * (t1 - t0)
        exact = t.detach()
        if not torch.is_grad_enabled():
            return exact, self.lanes.state(piece, x)

        # A lane that stands still has no length to divide by; its 0 / 0 would reach gradients that lanes share.
        length_or_one = torch.where(t1 == t0, 1.0, t1 - t0)

        def along(time: Tensor) -> tuple[Tensor, Tensor]:
            y = self.lanes.state(piece, (time - t0) / length_or_one)
            return self.lanes.value(event, time, y).to(self.span.dtype), y

        if is_transformed():
            raise GradientError(
                "torch.func and forward mode do not go through events. Type torch.autograd.grad, or"
                " torch.autograd.functional.jacobian and hessian, in place of the transform."
            )
        moving = exact.clone().requires_grad_()
        value, y = along(moving)
        if not value.requires_grad:  # g hides its derivative (a boolean, no_grad): the time is a constant
            return exact, along(exact)[1]
        (slope,) = torch.autograd.grad(
            value.sum(), moving, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        value, y = along(exact)
        if not value.requires_grad:
            return exact, y
        length = (t1 - t0).detach().abs().clamp_min(1e-300)
        grazing = mine & (slope.abs() * length <= GRAZING * scale)
        safe = torch.where(mine & ~grazing, slope, torch.ones_like(slope))
        shift = torch.where(mine & ~grazing, value - value.detach(), torch.zeros_like(value)) / safe
        t = exact - shift
        if bool(grazing.any()):
            t = _RefuseGradient.apply(t, value)
        return t, along(t)[1]

    def _register(
        self, i: int, mine: Tensor, x: Tensor, scale: Tensor, t: Tensor, y: Tensor, caught: Catch | None
    ) -> tuple[Catch | None, Tensor]:
        """Record an event in its lanes, and steer those whose course it changes."""
        event, rows = self.events[i], self.rows[mine]
        kept = self.counts[i, rows]
        states = y[mine] if self.lanes.batched else y.unsqueeze(0)
        self.found[i].append((kept, rows, t[mine], states))
        self.counts[i, rows] += 1
        count = self.counts[i, self.rows]
        ended = torch.full_like(count, -1)
        if event.terminal:
            ended = torch.where(mine & (count >= int(event.terminal)), Status.TERMINATED.code, ended)
        ended = torch.where(mine & (count > self.limit), Status.EVENT_OVERFLOW.code, ended)
        steered = mine & ((ended >= 0) | (event.apply is not None))
        if not bool(steered.any()):
            self.marks += (Mark(i, mine, x, scale, kept, rows, steered, steered),)
            return caught, steered
        last = self.caught_at[i, self.rows]
        gap = torch.where(torch.isnan(last), torch.inf, (t.detach() - last).abs())
        zeno = steered & (ended < 0) & (gap <= ACCUMULATION * self.span)
        ended = torch.where(zeno, Status.EVENTS_ACCUMULATE.code, ended)
        applied = steered & (ended < 0)
        self.marks += (Mark(i, mine, x, scale, kept, rows, steered, applied),)
        after = self._apply(event, t, y, applied)
        self.caught_at[i, self.rows] = torch.where(steered, t.detach(), last)
        new = Catch(steered, t, y, after, ended, gap)
        return (new if caught is None else self._merge(caught, new)), steered

    def _seen(self, y: Tensor, mine: Tensor, caught: Catch | None) -> Tensor:
        """The state that an event finds: what one before it in the list left, where both happen at one time."""
        return y if caught is None else torch.where(self._wide(mine & caught.lanes), caught.after, y)

    def _apply(self, event: Event, t: Tensor, y: Tensor, which: Tensor) -> Tensor:
        if event.apply is None or not bool(which.any()):
            return y
        out = self.lanes.call(event.apply, t, y.clone())
        try:
            after = self.layout.derivative(out, y)  # the same structure, shapes and dtype as the state
        except FieldError as error:
            text = str(error).replace("f(t, y)", "an event's apply(t, y)").replace("dy/dt", "what it returns")
            raise FieldError(text) from None
        return torch.where(self._wide(which), after, y)

    def _wide(self, mask: Tensor) -> Tensor:
        return mask.unsqueeze(1) if self.lanes.batched else mask.reshape(())

    def _merge(self, old: Catch, new: Catch) -> Catch:
        mask, wide = new.lanes, self._wide(new.lanes)
        return Catch(
            old.lanes | mask,
            torch.where(mask, new.t, old.t),
            torch.where(self._wide(mask & ~old.lanes), new.before, old.before),
            torch.where(wide, new.after, old.after),
            torch.where(mask, new.ended, old.ended),
            torch.where(mask, new.gap, old.gap),
        )

    def again(self, piece: Piece, marks: tuple[Mark, ...]) -> tuple[list[tuple[Tensor, Tensor]], Catch | None]:
        """Find the same events in the same step, and do what they did.

        Returns:
            Time and state of each mark, `(lanes,)` and as the lanes' state; and what changed the course, or None.
        """
        t0, t1 = self.lanes.span(piece, self.span)
        found, caught = [], None
        for mark in marks:
            unread = torch.full_like(
                mark.x, torch.inf
            )  # why lanes ended, and how long after what, the first time settled
            event = self.events[mark.event]
            t, y = self._differentiable(event, piece, mark.x, t0, t1, mark.lanes, mark.scale)
            y = self._seen(y, mark.lanes, caught)
            found.append((t, y))
            if bool(mark.steered.any()):
                after = self._apply(event, t, y, mark.applied)
                new = Catch(mark.steered, t, y, after, unread, unread)
                caught = new if caught is None else self._merge(caught, new)
        return found, caught

    def _carry_over(self, values: Tensor, accepted: Tensor, caught: Catch | None) -> None:
        """The values at the step's end start the next step, except in lanes that go on from an event."""
        if caught is None:
            self.previous = torch.where(accepted, values[:, -1], values[:, 0])
            self.fresh = self.fresh & ~accepted
        else:
            self.previous, self.fresh, self.any_fresh = None, (self.fresh & ~accepted) | caught.lanes, True

    def compact(self, keep: Tensor) -> None:
        """Go on with the lanes `keep`."""
        self.rows, self.span, self.fresh = self.rows[keep], self.span[keep], self.fresh[keep]
        self.previous = None if self.previous is None else self.previous[:, keep]

    # ---- the end

    def records(self, y0: Tensor) -> tuple[EventRecord, ...]:
        """What happened, per event: times and inner states in order, NaN-padded with rows."""
        return tuple(self._record(found, count, y0) for found, count in zip(self.found, self.counts, strict=True))

    def _record(self, found: list[Any], count: Tensor, y0: Tensor) -> EventRecord:
        device, lead = y0.device, y0.shape if self.lanes.batched else (1, *y0.shape)
        length = int(count.max()) if len(count) else 0
        ts = torch.full((length, len(count)), torch.nan, dtype=self.span.dtype, device=device)
        ys = torch.full((length, *lead), torch.nan, dtype=y0.dtype, device=device)
        if found:
            index, rows, times, states = (torch.cat(parts) for parts in zip(*found, strict=True))
            ts, ys = ts.index_put((index, rows), times), ys.index_put((index, rows), states)
        if self.lanes.batched:
            return EventRecord(ts, ys, count)
        return EventRecord(ts[:, 0], ys[:, 0], int(count[0]))


class _RefuseGradient(torch.autograd.Function):
    """Lets a value through, and raises where its gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, value: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        if bool((grad != 0).any()):
            raise GradientError(
                "the gradient of an event time was asked for where g only touches zero (a grazing event): the time does"
                " not depend smoothly on anything there. Detach solution.events[i].t, or move the event's threshold."
            )
        return grad, torch.zeros_like(grad)
