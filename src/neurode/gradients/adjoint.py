"""The backward solve of the continuous adjoint: of one system, or of rows that take adjoint steps of their own."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from neurode._errors import GradientError
from neurode._field import Field, per_row
from neurode._loop import integrate, time_dtype
from neurode._options import rms, row_rms
from neurode._problem import Problem
from neurode._solution import RowStatus, Stats
from neurode._state import Layout, number, real_dtype
from neurode.gradients.inputs import Inputs, Replayed, refuse_unlisted
from neurode.gradients.jumps import Stop
from neurode.gradients.pull import pull
from neurode.gradients.stages import add
from neurode.output.events import Events
from neurode.output.interpolant import coefficients, evaluate, fractions, horner, weights
from neurode.stepping import Interval, Piece, Step, stepper
from neurode.stepping.step import increment

LINE = ((1.0,),)  # the powers of an interpolant that is a straight line


class JointPath:
    """The forward solution of a joint solve at any time, from the interpolants of its steps."""

    def __init__(self, problem: Problem, pieces: Any) -> None:
        self.pieces, self.dtype = pieces.pieces, real_dtype(problem.y0.dtype)
        self.sign = 1.0 if number(problem.t1) >= number(problem.t0) else -1.0
        self.keys = [self.sign * t for t in pieces.ends]
        self.first, self.last = 0, len(self.pieces) - 1

    def within(self, low: float, high: float) -> None:
        """Be asked between two times from now on, the earlier of them first; at an event on the side that lies between."""
        self.last = min(bisect.bisect_left(self.keys, self.sign * high), len(self.pieces) - 1)
        self.first = min(bisect.bisect_right(self.keys, self.sign * low), self.last)

    def __call__(self, t: Tensor, rows: Tensor | None) -> Tensor:
        """The state at time `t`."""
        at = float(t)
        piece = self.pieces[max(self.first, min(bisect.bisect_left(self.keys, self.sign * at), self.last))]
        return evaluate(piece, fractions(piece, [at], self.dtype))[0]


class RowPath:
    """The same of rows: each has a time of its own."""

    def __init__(self, problem: Problem, pieces: Any) -> None:
        y0, parts = problem.y0, pieces.pieces
        rows, dtype = len(y0), time_dtype(y0.device)
        spread = lambda t: torch.as_tensor(t, dtype=dtype, device=y0.device).expand(rows)
        self.t0 = torch.stack([spread(piece.interval.t0) for piece in parts])
        self.t1 = torch.stack([spread(piece.interval.t1) for piece in parts])
        self.y0 = torch.stack([piece.y0 for piece in parts])
        self.polynomials = coefficients(parts).view(len(parts), -1, *y0.shape)
        self.sign = torch.where(spread(problem.t1) >= spread(problem.t0), 1.0, -1.0).to(dtype)
        self.ends = (torch.stack([spread(end) for end in pieces.ends]) * self.sign).T.contiguous()
        self.first: Tensor = torch.zeros(rows, 1, dtype=torch.int64, device=y0.device)
        self.last = torch.full_like(self.first, len(parts) - 1)

    def within(self, low: Tensor, high: Tensor) -> None:
        """See `JointPath.within`."""
        low, high = ((t * self.sign).unsqueeze(1) for t in (low, high))
        self.last = torch.searchsorted(self.ends, high).clamp_max(self.ends.shape[1] - 1)
        self.first = torch.minimum(torch.searchsorted(self.ends, low, right=True), self.last)

    def __call__(self, t: Tensor, rows: Tensor | None) -> Tensor:
        """The states of `rows` (all where it is None) at their times `t`."""
        every = torch.arange(len(self.ends), device=t.device)
        rows = every if rows is None else rows
        t = t.to(self.ends.dtype)
        which = torch.searchsorted(self.ends[rows], (t * self.sign[rows]).unsqueeze(1))
        which = torch.maximum(self.first[rows], torch.minimum(which, self.last[rows])).squeeze(1)
        t0, t1 = self.t0[which, rows], self.t1[which, rows]
        h = (t1 - t0).to(real_dtype(self.y0.dtype))
        x = ((t - t0) / torch.where(t1 == t0, 1.0, t1 - t0)).to(h.dtype)
        return self.y0[which, rows] + h.unsqueeze(1) * horner(self.polynomials[which, :, rows], x)


@lru_cache(maxsize=16)
def gauss_legendre(count: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights on [0, 1] (Golub & Welsch 1969: the eigenvalues of the Jacobi matrix)."""
    k = torch.arange(1, count, dtype=torch.float64)
    beside = k / torch.sqrt(4 * k * k - 1)
    values, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return tuple(zip(((values + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True))


class Quadrature:
    """The gradients of the inputs, an integral along the adjoint solution, summed over its accepted steps.

    Nothing in the adjoint ODE depends on them, so that they need not be part of it. Without `gauss` the nodes are the
    stages of the method: the sum is then what the method would have made of the integral as a part of its state. With
    it they are those of Gauss and Legendre on the step's interpolant, as many as integrate beyond the method's order.

    Args:
        sweep: the backward pass; takes each node's part.
        field: of the adjoint ODE.
        gauss: which nodes.
    """

    def __init__(self, sweep: Sweep, field: Field, gauss: bool) -> None:
        self.sweep, self.field, self.gauss = sweep, field, gauss
        self.method = sweep.method
        self.stepper = stepper(self.method)

    def joint(self, step: Step, *events: Any) -> None:
        """Add an accepted step of a joint solve."""
        for t, state, weight in self._nodes(step):
            self.sweep.add(t, state, weight, None, None)

    def rows(self, pace: Any, step: Step, *events: Any) -> None:
        """Add an attempt of rows, those that were accepted."""
        rows, moved = None if pace.whole else pace.rows, pace.accepted
        if not bool(moved.any()):
            return
        for t, state, weight in self._nodes(step):
            self.sweep.add(t, state, torch.where(moved.unsqueeze(1), weight, 0.0), rows, moved)

    def _nodes(self, step: Step) -> Iterator[tuple[Tensor, Tensor, Any]]:
        return self._gauss_nodes(step) if self.gauss else self._stages(step)

    def _stages(self, step: Step) -> Iterator[tuple[Tensor, Tensor, Any]]:
        method, h = self.method, step.interval.h
        times = step.interval.times(method.C, step.y0, self.field.time_dtype)
        for t, a, b in zip(times, method.A, method.B, strict=True):
            if b:
                yield t, increment(step.y0, step.ks, a, h), h * b

    def _gauss_nodes(self, step: Step) -> Iterator[tuple[Tensor, Tensor, Any]]:
        nodes = gauss_legendre(self.method.order // 2 + 1)
        piece, _ = self.stepper.piece(self.field, step)
        h, dtype = step.interval.h, real_dtype(step.y0.dtype)
        times = step.interval.times(tuple(x for x, _ in nodes), step.y0, self.field.time_dtype)
        for t, (x, weight) in zip(times, nodes, strict=True):
            factors = weights(piece.powers, torch.tensor(x, dtype=dtype)).tolist()
            yield t, increment(step.y0, piece.ks, tuple(factors), h), h * weight


class Sweep:
    """The backward pass: state, adjoint and, where they are a part of the ODE, the gradients of the inputs.

    Args:
        problem: the problem.
        settings: the strategy.
        method: the method of the backward solve.
        inputs: what `f` depends on.
        values: the same tensors as autograd has kept them.
        path: the forward solution where it is not solved backward.
        stand: who plays the rows that failed; or None.
        events: of the problem, to be found again; None where it has none.

    Attributes:
        a: the adjoint at the time reached.
        totals: gradients of the inputs.
        stats: counts.
    """

    def __init__(
        self, problem: Problem, settings: Any, method: Any, inputs: Inputs, values: list[Tensor], path: Any, stand: Any,
        events: Events | None = None,
    ) -> None:  # fmt: skip
        self.problem, self.settings, self.method, self.path, self.stand = problem, settings, method, path, stand
        self.gone = None if stand is None else stand.gone
        self.events = events
        self.apart = apart(problem, method)
        self.replayed = Replayed(problem.field, inputs, values, stand)
        self.inputs = self.replayed.wanted
        self.carried = not self.apart and not settings.quadrature
        y0 = problem.y0
        self.shape, self.size = y0.shape, y0[0].numel() if self.apart else y0.numel()
        self.extra = sum(x.numel() for x in self.inputs) if self.carried else 0
        width = self.size * (1 if path is not None else 2) + self.extra
        self.layout = Layout(None, (torch.Size([width]),), y0.dtype, y0.device, self.apart)
        self.a = torch.zeros_like(y0.detach())
        self.theta = torch.zeros(self.extra, dtype=y0.dtype, device=y0.device)
        self.sums, self.jumps = ([torch.zeros_like(x) for x in self.inputs] for _ in range(2))  # integrals; at events
        self.rows = torch.arange(len(y0) if self.apart else 0, device=y0.device)
        self.stats = Stats(gradient="continuous", engine="eager")
        self.calls_before = self.replayed.field.num_calls

    # ---- from the end to the start

    def run(self, stops: Iterable[Stop], end: Any, values: dict[Any, Tensor], grads: dict[Any, Tensor]) -> Tensor:
        """Solve from the end to the start; at outputs and events the adjoint jumps.

        Args:
            stops: where, from the last to the first.
            end: where the solve stopped.
            values: y1, ys, and of events times and states, by name.
            grads: what came to them.

        Returns:
            The gradient of the output times: `(time,)`, or `(time, rows)` where rows go back apart.
        """
        t, y = self._time(end), self.played(values["y1"])
        self.a = self.a + self.played(grads["y1"], 0.0)
        ys = values.get("ys", y.new_empty(0))
        lanes = self.rows.shape if self.apart else ()
        grad_times = torch.zeros(len(ys), *lanes, dtype=time_dtype(y.device), device=y.device)
        for stop in stops:
            target = torch.where(stop.here, stop.t, t) if self.apart else float(stop.t)
            self._segment(t, target, y)
            t = target
            if bool((stop.output >= 0).any()):
                y = self._output(t, stop.output, y, ys, grads["ys"], grad_times)
            if stop.marks:
                y = self._event(t, stop, y, values, grads)
        self._segment(t, self._time(self.problem.t0), y)
        return grad_times

    def _output(self, t: Any, output: Tensor, y: Tensor, ys: Tensor, grad_ys: Tensor, grad_times: Tensor) -> Tensor:
        """Add the gradient of an output; returns the state there."""
        if not self.apart:
            i = int(output)
            y, grad = self.played(ys[i]), self.played(grad_ys[i], 0.0)
            grad_times[i] = self.time_gradient(t, y, grad)
        else:
            mine, i = output >= 0, output.clamp_min(0)
            rows = self.rows
            y = torch.where(mine.unsqueeze(1), ys[i, rows], y)
            grad = torch.where(mine.unsqueeze(1), grad_ys[i, rows], 0.0)
            grad_times[i[mine], rows[mine]] = self.time_gradient(t, y, grad)[mine]
        self.a = self.a + grad
        return y

    def _event(self, t: Any, stop: Stop, y: Tensor, values: dict[Any, Tensor], grads: dict[Any, Tensor]) -> Tensor:
        """Let the adjoint jump over the events of one time; returns the states before them.

        Near an event the solution is `y + (t - t_event) f`, which is all that first derivatives see. On it the events are found
        again as in any step, so that the implicit function theorem, `apply`, and the order of events at one time stand in one
        place (`Events.again`). What the time of an event moves behind it is the start of the next stretch.
        """
        assert self.events is not None
        before = self._before(stop, y, values)
        self._take(None)
        field = self.replayed.field
        clock = torch.as_tensor(t, dtype=field.time_dtype, device=y.device)
        with torch.no_grad():
            slope = field(clock, before)
        end = t + stop.length if self.apart else t + float(stop.length)
        with torch.enable_grad():
            start = before.detach().requires_grad_()
            piece = Piece(Interval(t, end, field.time_dtype), start, start, [slope], LINE)
            self.events.lanes.field = field
            found, catch = self.events.again(piece, stop.marks)
            pairs = []
            for mark, (when, where) in zip(stop.marks, found, strict=True):
                place = (mark.kept, mark.rows) if self.apart else (mark.kept,)
                pairs.append((when[mark.lanes], grads["event t", mark.event][place]))
                state = where[mark.lanes] if self.apart else where.unsqueeze(0)
                pairs.append((state, grads["event y", mark.event][place]))
        a = self.a
        if catch is not None:
            caught = catch.lanes.unsqueeze(1) if self.apart else catch.lanes.reshape(())
            pairs.append((catch.after, torch.where(caught, a, 0.0)))
            pairs.append((catch.t, -self._behind(t, stop, catch, before, torch.where(caught, a, 0.0))))
            a = torch.where(caught, 0.0, a)
        pairs = [(value, grad) for value, grad in pairs if value.requires_grad]
        if pairs:
            seen, cotangents = zip(*pairs, strict=True)
            refuse_unlisted(seen, self.replayed.listed | {id(start)})
            into, *rest = pull(seen, cotangents, [start, *self.inputs])
            a = a if into is None else a + into
            add(self.jumps, rest)
        self.a = a
        return before

    def _before(self, stop: Stop, y: Tensor, values: dict[Any, Tensor]) -> Tensor:
        """The states before the events of one time: what the first of them found."""
        for mark in reversed(stop.marks):
            found = values["event y", mark.event]
            if not self.apart:
                y = found[int(mark.kept)]
            else:
                y = y.index_copy(0, mark.rows, found[mark.kept, mark.rows])
        return y

    def _behind(self, t: Any, stop: Stop, catch: Any, before: Tensor, a: Tensor) -> Tensor:
        """`(lanes,)`, `<a, f>` behind the events: how the start of the next stretch moves its end; 0 where the solve ended."""
        goes_on = torch.zeros_like(stop.here)
        for mark in stop.marks:
            goes_on = torch.where(mark.steered, mark.applied, goes_on)
        after = torch.where(catch.lanes.unsqueeze(1), catch.after, before) if self.apart else catch.after
        moved = self.time_gradient(t, after.detach(), a)
        return torch.where(goes_on, moved, 0.0).to(catch.t.dtype)

    def _time(self, t: Any) -> Any:
        """A number, or `(rows,)` where rows go back apart."""
        if not self.apart:
            return number(t)
        t = torch.as_tensor(t, dtype=time_dtype(self.a.device), device=self.a.device).detach().expand(len(self.a))
        return t if self.stand is None else self.stand.times(t)

    def played(self, x: Tensor, instead: float | None = None) -> Tensor:
        """States, or anything with rows; in the place of those that failed their stand-ins, or a number."""
        if self.gone is None:
            return x
        if instead is not None:
            return torch.where(self.gone.reshape(-1, *[1] * (x.ndim - 1)), instead, x)
        return self.stand.states(x)

    def _segment(self, t: Any, target: Any, y: Tensor) -> None:
        """Solve from one time to an earlier one."""
        if self.gone is not None and self.apart:
            target = torch.where(self.gone, t, target)  # a row that failed has nothing to go back over
        if not bool((t != target).any() if self.apart else t != target):
            return
        if self.path is not None:
            self.path.within(target, t)
        field = Field(self._dynamics, self.layout, (per_row(self.rows),) if self.apart else ())
        recorder = None if self.carried or not self.inputs else Quadrature(self, field, self.settings.quadrature)
        parts = [self.a] if self.path is not None else [y, self.a]
        backward = replace(
            self.problem, field=field, layout=self.layout, y0=self._pack(*parts), t0=t, t1=target,
            grid=self._grid(t, target), method=self.method, rtol=self._tolerance("rtol"), atol=self._tolerance("atol"),
            norm=self._norm, t_eval=None, first_step=None, callbacks=None, recorder=recorder, events=(),
        )  # fmt: skip
        outcome = integrate(backward)
        self._refuse_failure(outcome)
        self.a, self.theta = self._parts(outcome.y1)[1:]
        self.a = self.a.reshape(self.shape)
        self.stats.num_accepted = self.stats.num_accepted + outcome.num_accepted
        self.stats.num_rejected = self.stats.num_rejected + outcome.num_rejected
        self.stats.num_evaluations = self.stats.num_evaluations + outcome.num_evaluations

    def _refuse_failure(self, outcome: Any) -> None:
        if not isinstance(outcome.status, Tensor):
            if outcome.status.failed:
                self._raise(f"stopped at t = {float(outcome.t1):.6g}: {outcome.status}")
            return
        failed = RowStatus(outcome.status).failed
        if bool(failed.any()):
            row = int(failed.nonzero()[0])
            self._raise(f"stopped in row {row} at t = {float(outcome.t1[row]):.6g}: {RowStatus(outcome.status)[row]}")

    def _raise(self, what: str) -> None:
        hint = "" if self.settings.interpolate else " Continuous(interpolate=True) does not solve the state backward;"
        raise GradientError(
            f"the adjoint solve of gradient='continuous' {what}. The field is unstable backward in time.{hint}"
            f" {'T' if not hint else 't'}ype gradient='autograd' for the exact gradient."
        )

    def _grid(self, t: Any, target: Any) -> Any:
        """The forward grid's points between two times, backward."""
        grid = self.problem.grid
        if grid is None or self.method.adaptive:
            return None
        if self.apart:
            low, high = torch.minimum(t, target), torch.maximum(t, target)
            points = grid.detach().flip(0)
            inside = points[((points > low) & (points < high)).any(1)]
            return torch.cat([t.unsqueeze(0), inside.clamp(low, high), target.unsqueeze(0)])
        low, high = min(t, target), max(t, target)
        inside = [s for s in map(number, grid) if low < s < high]
        return [t, *reversed(inside), target]

    # ---- the ODE

    def _pack(self, *parts: Tensor) -> Tensor:
        """The state of the backward solve."""
        if self.apart:
            return torch.cat(parts, 1)
        return torch.cat([*(part.reshape(-1) for part in parts), self.theta])

    def _parts(self, state: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """y (None where it is interpolated), the adjoint, and the gradients of the inputs."""
        if self.path is not None:
            a, theta = state.split([self.size, self.extra], -1)
            return None, a, theta
        y, a, theta = state.split([self.size, self.size, self.extra], -1)
        return y, a, theta

    def _dynamics(self, t: Tensor, state: Tensor, rows: Tensor | None = None) -> Tensor:
        rows = self._present(rows)
        t, y, a = self._point(t, state, rows)
        wanted = self.inputs if self.carried else []
        dy, grads = self._vjp(t, y, a, wanted)
        parts = [-grads[0], *(-g.reshape(-1).to(state.dtype) for g in grads[1:])]
        parts = parts if self.path is not None else [dy, *parts]
        return torch.cat(parts, 1) if self.apart else torch.cat([part.reshape(-1) for part in parts])

    def _present(self, rows: Tensor | None) -> Tensor | None:
        """Which rows `f` is to be called with from now on; None for all."""
        rows = None if rows is None or len(rows) == len(self.a) else rows
        self._take(rows)
        return rows

    @torch.enable_grad()
    def _take(self, rows: Tensor | None) -> None:
        """Rows are cut from the data of `args` on the tape, one cut for each pass of autograd."""
        self.replayed.take(rows)

    def _point(self, t: Tensor, state: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Time, state and adjoint as `f` and its derivative take them."""
        y, a, _ = self._parts(state)
        if self.apart:
            t = t.reshape(-1)
        else:
            a = a.reshape(self.shape)
            y = y if y is None else y.reshape(self.shape)
        return t, self._along(t, rows) if y is None else y, a

    def _along(self, t: Tensor, rows: Tensor | None) -> Tensor:
        """The forward solution at a time; where a row failed, its stand-in's."""
        y = self.path(t, rows)
        return y if self.stand is None else self.stand.states(y, rows)

    def _vjp(self, t: Tensor, y: Tensor, a: Tensor, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The derivative, and the gradients of `<a, f(t, y)>` with respect to y and `inputs`."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            dy = self.replayed.field(t, y)
            refuse_unlisted(dy, self.replayed.listed | {id(y)})
            if not dy.requires_grad:
                return dy.detach(), [torch.zeros_like(x) for x in (y, *inputs)]
            grads = pull([dy], [a], [y, *inputs])
        filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, (y, *inputs), strict=True)]
        return dy.detach(), filled

    def add(self, t: Tensor, state: Tensor, weight: Any, rows: Tensor | None, moved: Tensor | None) -> None:
        """Add one node's part to the gradients of the inputs."""
        self._take(rows)
        t, y, a = self._point(t, state, rows)
        with torch.enable_grad():
            dy = self.replayed.field(t, y.detach())
            known = self.replayed.listed
            refuse_unlisted(dy, known)
            if not dy.requires_grad:
                return
            grads = pull([dy], [a * -weight], self.inputs)
        for total, grad in zip(self.sums, grads, strict=True):
            if grad is not None:
                total.add_(grad)
        self._count(rows, moved)

    def _count(self, rows: Tensor | None, moved: Tensor | None) -> None:
        """Charge an evaluation that is not the backward solve's own."""
        if moved is None:
            self.stats.num_evaluations = self.stats.num_evaluations + 1
            return
        count = torch.zeros(len(self.a), dtype=torch.int64, device=moved.device)
        count.index_add_(0, self.rows if rows is None else rows, moved.long())
        self.stats.num_evaluations = self.stats.num_evaluations + count

    def _tolerance(self, name: str) -> Any:
        """A tolerance for each element of the state holds for its adjoint too; the inputs get the tightest."""
        own = getattr(self.settings, name)
        tolerance = getattr(self.problem, name) if own is None else own
        if not isinstance(tolerance, Tensor):
            return tolerance
        copies = 1 if self.path is not None else 2
        if self.apart:
            return torch.cat([tolerance.expand(*tolerance.shape[:-1], self.size)] * copies, -1)
        wide = tolerance.expand(self.shape).reshape(-1)
        return torch.cat([*[wide] * copies, wide.min().expand(self.extra)])

    def _norm(self, x: Tensor) -> Tensor:
        """The largest RMS of the blocks, so that many parameters do not drown the state; or of all but the last."""
        y, a, theta = self._parts(x)
        blocks = [block for block in (y, a) if block is not None]
        if self.apart:
            return torch.stack([row_rms(block) for block in blocks]).amax(0)
        blocks += [theta] if self.settings.norm != "seminorm" and self.extra else []
        return torch.stack([rms(block) for block in blocks]).amax()

    # ---- what comes out

    def time_gradient(self, t: Any, y: Tensor, a: Tensor) -> Tensor:
        """`<a, f(t, y)>`, of each row where rows go back apart: how a value that has the gradient `a` moves with its time."""
        self.replayed.take(None)
        field = self.replayed.field
        with torch.no_grad():
            time = torch.as_tensor(t, dtype=field.time_dtype, device=y.device)
            product = (a.conj() * field(time, y)).real.double()
        return product.sum(1) if self.apart else product.sum()

    def totals(self) -> list[Tensor]:
        """The gradients of the inputs."""
        parts = self.theta.split([x.numel() for x in self.inputs]) if self.carried else self.sums
        return [
            (part if x.is_complex() or not part.is_complex() else part.real).reshape(x.shape).to(x.dtype) + jump
            for part, jump, x in zip(parts, self.jumps, self.inputs, strict=True)
        ]

    def report(self, method: str) -> Stats:
        """The counts of the backward pass."""
        self.stats.num_calls = self.replayed.field.num_calls - self.calls_before
        self.stats.method = method
        return self.stats


def apart(problem: Problem, method: Any) -> bool:
    """Whether rows go back with steps of their own."""
    return problem.layout.batched and (problem.per_row or method.adaptive)
