"""The front door: reads what people have, builds a strict `Problem`, and returns a `Solution`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from neurode import _engines, _integrals, _operator, _options, _times, gradients
from neurode._errors import EngineError, InputError, SolveError, UnknownOptionError, did_you_mean
from neurode._field import Field, misfit
from neurode._loop import Outcome
from neurode._problem import Problem
from neurode._solution import RowStatus, Solution, Stats, Status
from neurode._state import Layout, all_finite, hidden, is_vmapped, number, read_state, unreadable
from neurode.control import PID, Callbacks, standins
from neurode.fused import plan
from neurode.output.along import along
from neurode.output.dense import JointDense, PartlyLost, RowDense, SharedPieces, WhollyLost
from neurode.output.events import Event


def solve(
    f: Callable[..., Any],
    y0: Any,
    t_span: Any,
    *,
    method: Any = None,
    steps: int | None = None,
    step_size: float | None = None,
    grid: Any = None,
    rtol: Any = 1e-4,
    atol: Any = 1e-6,
    t_eval: Any = None,
    args: tuple[Any, ...] = (),
    batch_dim: int | None = None,
    gradient: Any = "auto",
    memory: float | None = None,
    engine: str = "auto",
    controller: PID | None = None,
    norm: Any = None,
    first_step: Any = None,
    min_step: float = 0.0,
    max_step: float = float("inf"),
    step_at: Sequence[float] | Tensor = (),
    jump_at: Sequence[float] | Tensor = (),
    events: Sequence[Event] = (),
    max_events: int = 1024,
    dense: bool = False,
    save: Callable[..., Any] | None = None,
    integrate: Callable[..., Any] | None = None,
    steer_integrals: bool = False,
    estimates: str | tuple[str, ...] = (),
    has_aux: bool = False,
    max_steps: int = 100_000,
    on_failure: str = "raise",
    compact: bool | None = None,
    callbacks: Callbacks | None = None,
    check_tolerance: bool = True,
    **unknown: Any,
) -> Solution:
    """Solve the initial value problem `dy/dt = f(t, y, *args)`, `y(t0) = y0`.

    Args:
        f: the vector field, called as `f(t, y, *args)` with a tensor `t` of the state's real dtype: 0-d, or with
            `batch_dim=0` of shape `(rows, 1, ..., 1)` with the rank of the state. Returns dy/dt like `y`.
        y0: initial state: a floating or complex tensor of any shape, or a pytree of them with one dtype. Numbers, lists and
            arrays become tensors of the default dtype.
        t_span: `(t0, t1)`, numbers or tensors, forward or backward in time; `(rows,)` each with `batch_dim=0`.
        method: a name from `neurode.methods.table()`, a `ButcherTableau`, or None to choose by tolerance.
        steps: number of equal steps of a fixed-step method.
        step_size: length of its steps; the last is shorter.
        grid: its times `(points,)` from t0 to t1, or a callable `grid(t0, t1)` that returns them.
        rtol, atol: tolerances of the error of one step: numbers, tensors that broadcast against the leaves, or pytrees.
        t_eval: output times `(time,)` or, with rows, `(time, rows)`, in the order of the integration; `"steps"` for all
            accepted steps; None for the end alone.
        args: further arguments of `f`. Wrap per-row data in `neurode.per_row`.
        batch_dim: None: the whole state is one system with one step size. 0: each row of dimension 0 is a system of its
            own, with its own span, steps and status.
        gradient: how derivatives come back: `"autograd"` (PyTorch's tape: exact, of any order), `"discrete"` (the steps
            taken again: exact, memory for the states), `"continuous"` (the adjoint ODE of Chen et al. 2018: memory for the
            outputs, inexact), a strategy object such as `neurode.Discrete(checkpoints=16)`, or `"auto"`: of the exact ones
            the fastest that fits `memory`; `solution.stats.gradient` says which and why.
        memory: what may be kept for the backward pass: bytes, or a fraction (0 to 1) of what is free. None: no bound, and no
            evaluation of `f` to measure. Read by `gradient="auto"` and `"discrete"`.
        engine: `"fused"` (a whole solve is one native call that runs `f`, lowered; an error says why where it cannot
            be), `"eager"` (PyTorch runs `f` at every stage), or `"auto"`: fused where it can serve, else eager.
            `solution.stats.engine` says which and why; `neurode.explain(f, y0)` shows the program.
        controller: step size controller of an adaptive method; default `neurode.PID()`, the elementary one with SciPy's
            constants.
        norm: norm of the error: `"rms"` (default), `"leaf-rms"` (the largest of the leaves'), `"max"`, or a
            callable on the state's pytree (one value a row).
        first_step: length of the first step; None chooses it.
        min_step, max_step: bounds of the step's length; a step of `min_step` is accepted whatever its error.
        step_at: times that a step must end on.
        jump_at: times at which `f` jumps: a step ends there, and `f` is evaluated afresh behind. On a fixed grid, those
            of its points at which `f` is to be seen from inside each step.
        events: `neurode.Event`s, located on the dense output; what happened is in `solution.events`.
        max_events: how often one event may happen (in a row) before the solve ends with a status that says so.
        dense: keep a continuous solution: `solution(t)`, `solution.derivative(t)`.
        save: `save(t, y, *args)` returns what to keep of an output (a tensor or pytree of tensors) in place of the state;
            `ys` then holds that, time first.
        integrate: `integrate(t, y, *args)` returns what to integrate over time along the solution (a tensor or pytree of
            tensors, with rows `(rows, ...)`); `solution.integrals` holds the integrals from t0 to each of `ts`. Or a regularizer
            such as `neurode.regularizers.kinetic_energy()`, or a dict, list or tuple of either.
        steer_integrals: whether the errors of the integrals count in the choice of steps.
        estimates: `"local_error"`, `"stiffness"` or both: what the accepted steps themselves estimate, summed in
            `solution.local_error` and `solution.stiffness` (Pal et al. 2021); differentiable with `gradient="autograd"`.
        has_aux: `f` returns `(dy, aux)`; `solution.aux` holds aux at `ts` (one more evaluation of `f` for each).
        max_steps: attempted steps at most (per row).
        on_failure: `"raise"`, or `"nan"` to return NaN in failed rows and leave the rest untouched.
        compact: whether rows that are done leave the batch; None: where a probe shows that it is safe.
        callbacks: what to call at every step of a joint solve, see `neurode.Callbacks`.
        check_tolerance: refuse an `rtol` that the state's dtype cannot resolve.

    Returns:
        A `Solution`: `ts`, `ys` (time first), `y1`, `status`, `stats`.

    Raises:
        InputError: an argument cannot be used; the message says what to type.
        EngineError: `engine="fused"` cannot take the solve; the message says why.
        FieldError: `f` returned something that is not a derivative of the state.
        SolveError: the solve failed and `on_failure="raise"`; it carries `.solution`.

    References:
        R. T. Q. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud (2018), Neural ordinary differential equations, NeurIPS.

    Example:
        >>> import neurode
        >>> sol = neurode.solve(lambda t, y: -y, [1.0, 2.0], (0, 1), method="dopri5", rtol=1e-6)
        >>> [round(v, 4) for v in sol.y1.tolist()]
        [0.3679, 0.7358]
        >>> sol.status
        <Status.SUCCESS: 'reached the end of t_span'>
    """
    options = (
        method, steps, step_size, grid, rtol, atol, args, batch_dim, gradient, memory, engine, controller, norm, first_step,
        min_step, max_step, step_at, jump_at, events, max_events, dense, save, integrate, steer_integrals, estimates, has_aux,
        max_steps, on_failure, compact, callbacks, check_tolerance,
    )  # fmt: skip
    if unknown:
        _refuse_unknown(unknown)
    known = None
    if not torch.compiler.is_compiling():
        made = plan.find(f, y0, t_span, t_eval, options)
        if made is not None:
            done = made.solve(f, y0, t_span, t_eval, on_failure == "nan" and batch_dim == 0)
            if done is not None:
                return _again(made.layout, *done)
        known = plan.ticket(y0, t_span, t_eval, options)
    return _first(f, y0, t_span, t_eval, dict(zip(OPTIONS, options, strict=True)), known)


KEYWORDS = [name for name in inspect.signature(solve).parameters if name != "unknown"]
OPTIONS = [name for name in KEYWORDS if name not in ("f", "y0", "t_span", "t_eval")]


def _again(layout: Layout, work: Any, y1: Tensor, ys: Tensor | None) -> Solution:
    """The solution of a call like one before, see `fused/plan.py`."""
    rest = partial(_rest, work, y1, ys)
    shown = y1 if layout.plain else layout.unpack(y1)
    if ys is None:
        apart = "ys", partial(_end_alone, layout, work, y1)
        return Solution.later(rest, {"y1": shown, "stats": work.stats}, apart)
    return Solution.later(rest, {"y1": shown, "ys": layout.unpack(ys, lead=1), "stats": work.stats})


def _end_alone(layout: Layout, work: Any, y1: Tensor) -> Any:
    """The outputs of a solve that was asked for none: its end."""
    if torch.is_grad_enabled() == work.terms.recording and not torch.is_inference_mode_enabled():
        return layout.unpack(y1.unsqueeze(0), lead=1)
    with torch.inference_mode(False), torch.set_grad_enabled(work.terms.recording):
        return layout.unpack(y1.unsqueeze(0), lead=1)


def _rest(work: Any, y1: Tensor, ys: Tensor | None) -> dict[str, Any]:
    """The fields of a solution that few look at."""
    with torch.set_grad_enabled(work.terms.recording):  # as it was when the solve was made, and not as it is now
        return vars(_solution_of(work.problem, work.outcome(y1, ys), work.stats))


def _first(f: Any, y0: Any, t_span: Any, t_eval: Any, asked: dict[str, Any], known: Any) -> Solution:
    """Read everything, solve, and return what was asked for beside the state."""
    _refuse_words(f, asked)
    compiled = _compiled(f, y0, t_span, t_eval, asked) if torch.compiler.is_compiling() else None
    if compiled is not None:
        return compiled
    problem, stats = _problem(f, y0, t_span, t_eval, asked, known)
    whole, integrals = problem, None
    if asked["integrate"] is not None:
        whole, integrals = _integrals.extend(problem, asked["integrate"], asked["steer_integrals"])
    run = _engines.run if torch.compiler.is_compiling() else _run
    outcome = run(whole, asked["engine"], asked["gradient"], stats)
    solution = _solution_of(whole, outcome, stats)
    solution = solution if integrals is None else integrals.split(solution)
    if asked["has_aux"] or asked["save"] is not None:
        solution = _along(f, solution, problem, asked)
    if asked["on_failure"] == "raise" and not hidden(outcome.y1):
        _raise_failure(solution, problem)
    return solution


def _run(problem: Problem, engine: str, gradient: Any, stats: Stats) -> Outcome:
    """Solve; what only a call of `f` shows, or a value that cannot be read, gets an error of its own."""
    try:
        return _engines.run(problem, engine, gradient, stats)
    except (TypeError, EngineError) as error:
        problem_of_f = misfit(problem.field.f, problem.field.args)
        if problem_of_f is None:
            raise
        hint = "Type lambda t, y: f(y) where it needs no time; what else it needs is given as args=(...)."
        raise InputError(f"{problem_of_f} {hint}") from error
    except RuntimeError as error:
        transform = torch._C._functorch.peek_interpreter_stack()
        within = transform is not None and transform.key() == torch._C._functorch.TransformType.Vmap
        if not within or not any(
            words in str(error) for words in ("data-dependent control flow", ".item()", "data pointer")
        ):
            raise
        raise InputError(
            "torch.vmap over a solve whose steps depend on values: an adaptive method, events, or output times that are mapped."
            " Type batch_dim=0 and args=(neurode.per_row(x),) in place of vmap, or take a fixed-step method."
        ) from error


def _compiled(f: Any, y0: Any, t_span: Any, t_eval: Any, asked: dict[str, Any]) -> Solution | None:
    """The solve as one operator of a compiled graph; None where the compiler sees through the eager loop instead."""
    for name in ("dense", "save", "integrate", "has_aux", "callbacks"):
        if asked[name]:
            return None
    if any(map(_given, (asked["events"], asked["step_at"], asked["jump_at"]))):
        return None
    options = {name: asked[name] for name in COMPILED}
    if isinstance(t_eval, list | tuple):
        t_eval = torch.tensor(t_eval, dtype=torch.float64)
    if not _operator.suits(f, y0, t_span, t_eval, asked["args"], options):
        return None
    return _operator.solve(f, y0, t_span, t_eval, asked["args"], options)


COMPILED = (
    "method", "steps", "step_size", "grid", "rtol", "atol", "batch_dim", "gradient", "memory", "engine", "controller", "norm",
    "first_step", "min_step", "max_step", "max_steps", "on_failure", "compact", "check_tolerance",
)  # fmt: skip


def _problem(f: Any, y0: Any, t_span: Any, t_eval: Any, asked: dict[str, Any], known: Any) -> tuple[Problem, Stats]:
    """The strict problem, and statistics that say how the method was chosen."""
    layout, state = read_state(y0, asked["batch_dim"])
    fixed = any(value is not None for value in (asked["steps"], asked["step_size"], asked["grid"]))
    chosen, method_note = _options.choose_method(asked["method"], fixed, asked["rtol"])
    _refuse_vmap(state, chosen, asked["events"])
    rows = state.shape[0] if layout.batched else 0
    wide = chosen.adaptive or _wide(t_eval) or bool(asked["events"])
    t0, t1 = _times.read_span(t_span, layout, rows, per_row=wide)
    if any(isinstance(t, Tensor) and is_vmapped(t) for t in (t0, t1)):
        plain = asked["batch_dim"] is None and asked["steps"] is not None and t_eval is None and not asked["dense"]
        _refuse_vmapped_span(plain, chosen, asked["events"])
    _refuse_nan(state, layout, asked["on_failure"])
    field = Field(f, layout, asked["args"], asked["has_aux"])
    field.check_rows(rows)
    points = _options.read_grid(chosen, t0, t1, asked["steps"], asked["step_size"], asked["grid"])
    lengths = asked["first_step"], asked["min_step"], asked["max_step"]
    stops = asked["step_at"], asked["jump_at"]
    if chosen.adaptive:
        _options.refuse_no_tolerance(asked["rtol"], asked["atol"])
    lowest = torch.finfo(layout.dtype).eps if chosen.adaptive and asked["check_tolerance"] else 0.0
    problem = Problem(
        field=field,
        layout=layout,
        y0=state,
        t0=t0,
        t1=t1,
        method=chosen,
        grid=points,
        rtol=_options.read_tolerance("rtol", asked["rtol"], layout, state, lowest),
        atol=_options.read_tolerance("atol", asked["atol"], layout, state, 0.0),
        norm=_options.read_norm(asked["norm"], layout),
        **_options.read_control(chosen, points, asked["controller"], *lengths, *stops),
        t_eval=_times.read_t_eval(t_eval, t0, t1, layout, rows),
        events=_events(asked["events"], asked["max_events"]),
        max_events=asked["max_events"],
        dense=asked["dense"],
        max_steps=asked["max_steps"],
        compact=asked["compact"],
        callbacks=_callbacks(asked["callbacks"], chosen, layout),
        estimates=_options.read_estimates(asked["estimates"], chosen),
        memory=gradients.read_memory(asked["memory"], layout.device),
        ticket=known,
    )
    return problem, Stats(method=method_note)


def _refuse_vmap(state: Tensor, method: Any, events: Any) -> None:
    if method.adaptive and is_vmapped(state):
        raise InputError(
            f"torch.vmap over a solve with the adaptive method {method.name!r}: its steps depend on values. Type"
            " batch_dim=0 in place of vmap, or take a fixed-step method."
        )
    if events and is_vmapped(state):
        raise InputError("torch.vmap over a solve with events: where they lie depends on values. Type batch_dim=0.")


def _along(f: Any, solution: Solution, problem: Problem, asked: dict[str, Any]) -> Solution:
    """The solution with what `f` and `save` return at its times."""
    layout, args = problem.layout, problem.field.args
    codes = solution.status.codes if isinstance(solution.status, RowStatus) else solution.status
    failed = None if hidden(pytree.tree_leaves(solution.y1)[0]) else standins.failed(codes)
    start, shaped = (layout.unpack(problem.y0), problem.t0, layout, failed), solution
    if asked["has_aux"]:
        evaluate = lambda t, y: f(t, y, *args)[1]
        shaped = replace(shaped, aux=along(evaluate, solution.ts, solution.ys, *start))
        _count_more(solution.stats, len(solution.ts))
    if asked["save"] is not None:
        try:
            kept = along(lambda t, y: asked["save"](t, y, *args), solution.ts, solution.ys, *start)
        except TypeError as error:
            misfit_of_save = misfit(asked["save"], args, "save")
            if misfit_of_save is None:
                raise
            raise InputError(misfit_of_save) from error
        shaped = replace(shaped, ys=kept)
    return shaped


# What other solvers call it, for whom reads the error: SciPy, torchdiffeq, diffrax, and everyday words.
ELSEWHERE = {
    "adjoint": "gradient", "adjoint_params": "args", "dense_output": "dense", "dt": "step_size", "dt0": "first_step",
    "event_fn": "events", "func": "f", "h": "step_size", "max_num_steps": "max_steps", "min_dt": "min_step",
    "num_steps": "steps", "n_steps": "steps", "options": "step_size", "saveat": "t_eval", "sensitivity": "gradient",
    "solver": "method", "stepsize_controller": "controller", "t": "t_span", "tol": "rtol", "tolerance": "rtol", "ts": "t_eval",
}  # fmt: skip


def _refuse_unknown(unknown: dict[str, Any]) -> None:
    for name in unknown:
        near = f" Did you mean {ELSEWHERE[name]!r}?" if name in ELSEWHERE else did_you_mean(name, KEYWORDS)
        raise UnknownOptionError(f"solve() has no argument {name!r}.{near} It takes: {', '.join(KEYWORDS)}.")


def check_options(options: dict[str, Any]) -> None:
    """Refuse keywords that no solve would take, before there is a state to solve from; for layers that keep them.

    Args:
        options: keywords of `solve` but `f`, `y0` and `t_span`.

    Raises:
        UnknownOptionError: a keyword or a method that does not exist.
        InputError: a fixed-step method without exactly one of `steps`, `step_size` and `grid`, or an adaptive one with any.
    """
    _refuse_unknown({name: value for name, value in options.items() if name not in KEYWORDS})
    given = {name: options.get(name) for name in ("steps", "step_size", "grid")}
    fixed = any(value is not None for value in given.values())
    chosen, _ = _options.choose_method(options.get("method"), fixed, options.get("rtol", 1e-4))
    _options.refuse_grids(chosen, given)


def _refuse_words(f: Any, asked: dict[str, Any]) -> None:
    batch_dim, max_steps, save, args = asked["batch_dim"], asked["max_steps"], asked["save"], asked["args"]
    if not callable(f):
        raise InputError(f"f is of type {type(f).__name__}; it must be a callable f(t, y) that returns dy/dt.")
    if batch_dim not in (None, 0) or batch_dim is False:
        raise InputError(f"batch_dim={batch_dim!r}; it must be None (one system) or 0 (each row a system).")
    _engines.check(asked["engine"])
    if asked["on_failure"] not in ("raise", "nan"):
        raise InputError(f"on_failure={asked['on_failure']!r}; it must be 'raise' or 'nan'.")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise InputError(f"max_steps={max_steps!r}; it must be a whole number of at least 1.")
    if save is not None and not callable(save):
        raise InputError(f"save is of type {type(save).__name__}; it must be a function save(t, y).")
    if not isinstance(args, tuple | list):
        raise InputError(f"args is of type {type(args).__name__}; it must be a tuple: type args=(value,).")


def _refuse_vmapped_span(at_the_end: bool, method: Any, events: Any) -> None:
    """Refuse a span whose values cannot be read, unless nothing about the solve depends on them."""
    if method.adaptive or events or not at_the_end:
        raise InputError(
            "torch.vmap over t_span goes with steps=n and the state at the end alone: everything else depends on the times."
            " Type batch_dim=0 and t_span=(t0, t1) of shape (rows,) each in place of vmap."
        )


def _given(values: Any) -> bool:
    """Whether a list that may be something else, which is refused later, holds anything."""
    return not hasattr(values, "__len__") or len(values) > 0


def _wide(t_eval: Any) -> bool:
    return isinstance(t_eval, Tensor) and t_eval.ndim == 2


def _callbacks(callbacks: Any, method: Any, layout: Layout) -> Callbacks | None:
    if callbacks is None:
        return None
    if not isinstance(callbacks, Callbacks):
        given = type(callbacks).__name__
        raise InputError(f"callbacks is a {given}; type callbacks=neurode.Callbacks(step=function).")
    if layout.batched and method.adaptive:
        raise InputError("callbacks= are called at the steps of a joint solve; with batch_dim=0 rows have their own.")
    return callbacks


def _events(events: Any, max_events: Any) -> tuple[Event, ...]:
    if isinstance(max_events, bool) or not isinstance(max_events, int) or max_events < 1:
        raise InputError(f"max_events={max_events!r}; it must be a whole number of at least 1.")
    try:
        events = (events,) if isinstance(events, Event) else tuple(events)
    except TypeError as error:
        raise InputError(f"events={events!r}; type events=[neurode.Event(g, terminal=True)].") from error
    for event in events:
        if not isinstance(event, Event):
            raise InputError(f"events holds a {type(event).__name__}; type events=[neurode.Event(g, terminal=True)].")
    return events


def _refuse_nan(y0: Tensor, layout: Layout, on_failure: str) -> None:
    if unreadable(y0) or (layout.batched and on_failure == "nan"):
        return
    if not all_finite(y0):
        finite = torch.isfinite(y0.detach())
        where = "" if not layout.batched else f" in rows {_some((~finite.all(1)).nonzero().flatten().tolist())}"
        raise InputError(
            f"y0 holds NaN or infinite values{where}; an initial state must be finite. Leave"
            " such rows out, or type batch_dim=0, on_failure='nan' to have them NaN and the others solved."
        )


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, ... ({len(numbers)} in all)" if len(numbers) > 8 else shown


def _count_more(stats: Stats, calls: int) -> None:
    """Add evaluations of `f` that all rows share."""
    stats.num_calls += calls
    stats.num_evaluations = stats.num_evaluations + calls


def _solution_of(problem: Problem, outcome: Outcome, stats: Stats) -> Solution:
    """Turn inner results into the user's structure."""
    layout = problem.layout
    stats.num_calls = problem.field.num_calls
    stats.num_evaluations = outcome.num_evaluations
    stats.num_accepted, stats.num_rejected = outcome.num_accepted, outcome.num_rejected
    status = RowStatus(outcome.status) if isinstance(outcome.status, Tensor) else outcome.status
    return Solution(
        ts=outcome.ts,
        ys=layout.unpack(outcome.ys, lead=1),
        y1=layout.unpack(outcome.y1),
        status=status,
        stats=stats,
        t1=_times.as_time(outcome.t1, outcome.ts.dtype, outcome.ts.device),
        num_saved=outcome.num_saved,
        events=tuple(replace(record, y=layout.unpack(record.y, lead=1)) for record in outcome.events),
        interpolant=_interpolant(problem, outcome),
        **outcome.estimates or {},
    )


def _interpolant(problem: Problem, outcome: Outcome) -> Any:
    if not problem.dense:
        return None
    if outcome.lost is True:
        return WhollyLost(_interpolant(problem, replace(outcome, lost=None)), problem.y0)
    if not problem.layout.batched:
        return JointDense(problem.layout, problem.y0, number(problem.t0), outcome.pieces)
    dtype, device, rows = outcome.ts.dtype, outcome.ts.device, len(problem.y0)

    def of_rows(pieces: Any, t0: Any, t1: Any) -> RowDense:
        pieces = pieces if problem.per_row else SharedPieces.of(pieces, rows, dtype, device)
        t0, t1 = (_times.as_time(t, dtype, device).expand(rows) for t in (t0, t1))
        return RowDense(problem.layout, problem.y0, t0, t1, torch.where(t1 >= t0, 1.0, -1.0).to(dtype), pieces)

    t1, lost = outcome.t1 if problem.per_row else problem.t1, outcome.lost
    if lost is None:
        return of_rows(outcome.pieces, problem.t0, t1)
    played = of_rows(outcome.pieces, lost.t0, lost.t1 if problem.per_row else problem.t1)
    return PartlyLost(of_rows(lost.reached, problem.t0, t1), played, lost.gone)


def _without_atol(problem: Problem) -> str:
    """What else may have made an error ratio NaN: the tolerance itself, where a component of the state is 0."""
    if problem.grid is not None or not bool((torch.as_tensor(problem.atol) == 0).any()):
        return ""
    return ", or a component of the state is 0, where atol=0 leaves no tolerance: type atol=1e-8"


def _raise_failure(solution: Solution, problem: Problem) -> None:
    status, on_grid = solution.status, problem.grid is not None
    if isinstance(status, Status):
        if status.failed:
            where = f"the solve stopped at t = {float(solution.t1.detach()):.6g}"
            if on_grid and status is Status.NON_FINITE:
                where = f"by t = {float(solution.t1.detach()):.6g}, the end of the fixed grid"
            hint = _without_atol(problem) if status is Status.NON_FINITE else ""
            raise SolveError(f"{where}: {status}{hint}.", solution)
        return
    failed = status.failed
    if not bool(failed.any()):
        return
    rows = failed.nonzero().flatten().tolist()
    t1 = solution.t1.detach().expand(len(failed))
    reasons = {}
    for row in rows:
        reasons.setdefault(status[row], []).append(row)
    lines = [
        f"{len(which)} of {len(failed)} rows (rows {_some(which)}; first at t = {float(t1[which[0]]):.6g}): {reason}"
        + (_without_atol(problem) if reason is Status.NON_FINITE else "")
        for reason, which in reasons.items()
    ]
    message = "; ".join(lines)
    raise SolveError(f"{message}. on_failure='nan' returns the other rows, with NaN in these.", solution)
