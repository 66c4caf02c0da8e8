"""What every gradient strategy is held to: a table of strategies, a table of problems, and the trained fields they share.

A new strategy is one row in `STRATEGIES`; `test_contract.py` does the rest. On every problem a strategy gives the gradient of
its baseline, or, where the problem has a feature that is not among its `handles`, raises at the start and names one that can.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import neurode
from neurode import Continuous, Discrete, Event

# ---- the strategies


@dataclass(frozen=True)
class Row:
    """One strategy of the suite.

    Args:
        gradient: what to type for it.
        limits: the error allowed, as a share of the gradient's norm, for float64 and float32.
        retraces: whether it finds the states of the forward solve again, to rounding only.
        options: turns the options of a problem into those that this strategy is run and compared with (an inexact
            strategy needs finer steps).
        baseline: turns those into the options of the solve on PyTorch's tape that it must agree with.
    """

    gradient: Any
    limits: tuple[float, float] = (1e-12, 1e-5)
    options: Callable[[dict[str, Any]], dict[str, Any]] = lambda options: options
    baseline: Callable[[dict[str, Any]], dict[str, Any]] = lambda options: options
    retraces: bool = False

    @property
    def handles(self) -> frozenset[str]:
        """The features that the strategy goes through."""
        strategy = neurode.gradients.STRATEGIES[self.gradient] if isinstance(self.gradient, str) else self.gradient
        return strategy.handles


def eager(options: dict[str, Any]) -> dict[str, Any]:
    """The same problem on the eager engine."""
    return options | {"engine": "eager"}


# On a grid: an order that converges in few steps.
GRID = dataclasses.replace(
    neurode.methods.METHODS["dop853"], name="dop853 on a grid", b_error=None, b_error2=None, order_error=None
)


def fine(options: dict[str, Any]) -> dict[str, Any]:
    """The same problem so accurately that what converges has converged."""
    method = neurode.methods.get(options["method"])
    if method.kind == "reversible":
        return options  # refused, whatever the steps
    if method.adaptive:
        return options | {"method": "dop853", "rtol": 1e-10, "atol": 1e-10}
    return options | {"method": GRID, "steps": 16}


def coupled(options: dict[str, Any]) -> dict[str, Any]:
    """The same problem by the reversible coupling of its method."""
    method = options["method"]
    return options | {"method": method if isinstance(method, neurode.Reversible) else neurode.Reversible(method)}


STRATEGIES: dict[str, Row] = {
    "discrete": Row("discrete", options=eager),  # the fused engine's is held to it by tests/fused/test_engine.py
    "discrete, one stage alive": Row(Discrete(alive="stage")),
    "discrete, 3 checkpoints": Row(Discrete(checkpoints=3)),
    "discrete, 1 checkpoint, one stage alive": Row(Discrete(checkpoints=1, alive="stage")),
    "reversible": Row("reversible", retraces=True, baseline=coupled),
    "continuous": Row("continuous", (1e-6, 1e-3), options=fine),
    "continuous, seminorm": Row(Continuous(norm="seminorm"), (1e-6, 1e-3), options=fine),
    "continuous, interpolated": Row(Continuous(interpolate=True), (1e-6, 1e-3), options=fine),
    "continuous, quadrature": Row(Continuous(quadrature=True), (1e-6, 1e-3), options=fine),
    "continuous, both": Row(Continuous(interpolate=True, quadrature=True), (1e-6, 1e-3), options=fine),
}


# ---- trained fields


class Field(nn.Module):
    """A field of time and state with a weight that is an argument and a data vector for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 2))

    def forward(self, t: Tensor, y: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return self.net(y) @ w * (1 + 0.2 * torch.sin(2 * t)) + 0.1 * x


class Pendulum(nn.Module):
    """A separable field of (q, p) for the splitting methods."""

    def __init__(self) -> None:
        super().__init__()
        self.force = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, t: Tensor, state: Any, w: Tensor, x: Tensor) -> Any:
        q, p = state
        return p @ w, self.force(q) + 0.1 * x


@functools.cache
def trained(kind: type[nn.Module]) -> dict[str, Tensor]:
    """The weights of a field trained to carry a cloud of points around a spiral: far from their initial values."""
    torch.manual_seed(0)
    model = kind().double()
    start = torch.randn(32, 2, dtype=torch.float64)
    turn = torch.tensor([[0.2, -1.3], [1.3, 0.2]], dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    one, none = torch.eye(2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    for _ in range(80):
        y0 = (start, torch.zeros_like(start)) if kind is Pendulum else start
        y1 = neurode.solve(model, y0, (0.0, 1.0), method="rk4", steps=4, args=(one, none)).y1
        loss = ((y1[0] if kind is Pendulum else y1) - start @ turn).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Rounded to 2^-20: every processor and engine has the same field, whatever its training rounded.
    return {name: (value.detach() * 2**20).round() / 2**20 for name, value in model.state_dict().items()}


# ---- the problems

ROWS = 5


@dataclass(frozen=True)
class Case:
    """One problem.

    Args:
        options: of `solve`: the method and its steps.
        rows: None: one step for the whole state; `"shared"`: `batch_dim=0` on one span; `"own"`: a span for each row.
        times: whether t0 and t1 require grad.
        outputs: None, `"still"` or `"moving"` times, `"steps"`, or `"dense"`.
        events: None, `"watch"`, `"stop"` or `"bounce"`.
        symplectic: a state of (q, p).
        more: further arguments of `solve`.
        rounding: how many times larger the error may be, where the problem itself amplifies rounding.
        retraced: the same for a strategy that finds states again.
    """

    options: dict[str, Any]
    rows: str | None = None
    times: bool = False
    outputs: str | None = None
    events: str | None = None
    symplectic: bool = False
    more: dict[str, Any] = field(default_factory=dict)
    rounding: float = 1.0
    retraced: float = 1.0

    @property
    def features(self) -> set[str]:
        """What a strategy must handle, by the names of `neurode.gradients.features`."""
        present = {
            "events": self.events is not None,
            "dense": self.outputs == "dense",
            "steps": self.outputs == "steps",
            "rows": self.per_row,
            "adams": neurode.methods.get(self.options["method"]).kind == "adams",
            "coupled": neurode.methods.get(self.options["method"]).kind == "reversible",
            "symplectic": self.symplectic,
        }
        return {name for name, here in present.items() if here}

    @property
    def per_row(self) -> bool:
        """Whether rows take steps of their own."""
        adaptive = neurode.methods.get(self.options["method"]).adaptive
        return self.rows == "own" or (self.rows is not None and (adaptive or self.events is not None))


@dataclass
class Leaves:
    """Everything that a case differentiates."""

    y0: Tensor
    made: Tensor
    x: Tensor
    t0: Tensor
    t1: Tensor
    times: Tensor
    level: Tensor
    loss: Tensor
    model: nn.Module

    def wanted(self, case: Case) -> dict[str, Tensor]:
        """The leaves by name."""
        found = {"y0": self.y0, "made": self.made, "x": self.x, **dict(self.model.named_parameters())}
        found |= {"t0": self.t0, "t1": self.t1} if case.times else {}
        found |= {"t_eval": self.times} if case.outputs == "moving" else {}
        return found | ({"level": self.level, "loss": self.loss} if case.events else {})


def leaves(case: Case, dtype: torch.dtype) -> Leaves:
    """Fresh tensors for one solve, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    model = Pendulum() if case.symplectic else Field()
    model.load_state_dict(trained(type(model)))
    model = model.to(dtype)
    t0, t1 = torch.tensor(0.1, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)
    if case.rows == "own":
        t0 = torch.linspace(0.0, 0.2, ROWS, dtype=torch.float64)
        t1 = torch.linspace(0.9, 1.6, ROWS, dtype=torch.float64)
    times = torch.tensor([0.25, 0.4, 0.4, 0.7001, 0.9], dtype=torch.float64)
    made = torch.eye(2, dtype=dtype) + 0.1 * draw(2, 2)
    parts = Leaves(
        draw(ROWS, 2), made, draw(ROWS, 2), t0, t1, times, torch.tensor(0.3, dtype=dtype), torch.tensor(0.8, dtype=dtype),
        model,
    )  # fmt: skip
    for leaf in parts.wanted(case).values():
        leaf.requires_grad_()
    return parts


def run(case: Case, gradient: Any, options: dict[str, Any], parts: Leaves) -> neurode.Solution:
    """Solve a case; the weight that `f` takes is computed from another tensor, outside."""
    batched, joint = case.rows is not None, case.rows is None
    args: tuple[Any, ...] = (torch.tanh(parts.made) + parts.made, neurode.per_row(parts.x) if batched else parts.x)
    y0 = (parts.y0, parts.y0.flip(1)) if case.symplectic else parts.y0
    outputs = {"steps": "steps", "still": parts.times, "moving": parts.times}.get(case.outputs or "")
    return neurode.solve(
        parts.model, y0, (parts.t0, parts.t1) if case.times or case.rows == "own" else (0.1, 1.3), args=args,
        batch_dim=None if joint else 0, t_eval=outputs, dense=case.outputs == "dense", events=events(case, parts),
        gradient=gradient, **options, **case.more,
    )  # fmt: skip


def events(case: Case, parts: Leaves) -> list[Event]:
    """The events of a case: a level that is crossed, with a reset that keeps a part of the state."""
    if case.events is None:
        return []
    first = (lambda y: y[:, 0]) if case.rows is not None else (lambda y: y[0, 0])
    level = lambda t, y, w, x: first(y) - parts.level * (1 + 0.1 * w.sum())
    late = Event(lambda t, y, w, x: t.reshape(-1)[: 1 if t.ndim == 0 else None].reshape(first(y).shape) - 0.77)
    steer: dict[str, Any] = {"watch": {}, "stop": {"terminal": 2}}.get(case.events, {})
    if case.events == "bounce":
        steer = {"apply": lambda t, y, w, x: torch.cat([-parts.loss * y[:, :1] - 0.05, y[:, 1:] * torch.cos(t)], 1)}
    return [Event(level, **steer), late]


def total(case: Case, solution: neurode.Solution) -> Tensor:
    """A smooth function of everything that a solution holds."""
    tensors: list[Tensor] = []
    collect = lambda tree: tensors.extend(torch.utils._pytree.tree_leaves(tree))
    collect((solution.y1, solution.ys, solution.t1, solution.ts))
    for record in solution.events:
        collect((record.t, record.y))
    if case.outputs == "dense":
        end = solution.t1.detach().max() if case.rows is None else solution.t1.detach().min()
        for t in (0.3, torch.tensor(0.55), end * 1.0):
            collect((solution(t), solution.derivative(t)))
    loss = torch.zeros(())
    for i, x in enumerate(tensors):
        loss = loss + (torch.sin(x.double() * (1 + 0.3 * i)) + 0.1 * x.double()).nansum() if x.requires_grad else loss
    return loss


@dataclass(frozen=True)
class Result:
    """The numbers and the gradients of one strategy on one case."""

    solution: neurode.Solution
    grads: dict[str, Tensor]


def differentiate(
    case: Case, gradient: Any, options: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64
) -> Result:
    """Solve and differentiate; an input that nothing depends on has a zero gradient."""
    parts = leaves(case, dtype)
    solution = run(case, gradient, case.options if options is None else options, parts)
    wanted = parts.wanted(case)
    grads = torch.autograd.grad(total(case, solution), list(wanted.values()), allow_unused=True, materialize_grads=True)
    return Result(solution, dict(zip(wanted, grads, strict=True)))


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The distance of two gradients as a share of the first one's norm: of all inputs together, and of the worst alone.

    An input whose gradient is a thousandth of the whole or less is measured against that thousandth.
    """
    norms = {name: float(x.double().norm()) for name, x in a.items()}
    whole = sum(x * x for x in norms.values()) ** 0.5
    off = {name: float((a[name].double() - b[name].double()).norm()) for name in a}
    together = sum(x * x for x in off.values()) ** 0.5 / whole
    return max(together, *(off[name] / max(norms[name], 1e-3 * whole) for name in a))


# ---- the table of problems

FIXED, ADAPTIVE = {"method": "rk4", "steps": 6}, {"method": "dopri5", "rtol": 1e-4}


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for kind, options in (("fixed", FIXED), ("adaptive", ADAPTIVE)):
        for rows in (None, "shared", "own"):
            name = f"{kind}, {'joint' if rows is None else f'rows, {rows} span'}"
            cases[name] = Case(options, rows)
            cases[f"{name}, moving times"] = Case(options, rows, times=True, outputs="moving")
            cases[f"{name}, outputs"] = Case(options, rows, outputs="still")
            cases[f"{name}, t_eval='steps'"] = Case(options, rows, times=True, outputs="steps")
            cases[f"{name}, dense"] = Case(options, rows, times=True, outputs="dense")
            for what in ("watch", "stop", "bounce"):
                cases[f"{name}, events: {what}"] = Case(options, rows, events=what)
            cases[f"{name}, moving times, events: bounce"] = Case(options, rows, True, "moving", "bounce")
            cases[f"{name}, dense, events: bounce"] = Case(options, rows, True, "dense", "bounce")
            cases[f"{name}, t_eval='steps', events: stop"] = Case(options, rows, True, "steps", "stop")
    jumps = {"jump_at": (0.4, 0.7), "step_at": (0.6,)}
    cases |= _coupled()
    cases["adaptive, joint, jumps"] = Case(ADAPTIVE, None, True, "still", more=jumps)
    cases["adaptive, rows, jumps"] = Case(ADAPTIVE, "own", True, "still", more=jumps)
    return cases


def _coupled() -> dict[str, Case]:
    """A coupling as the method: its second state is a part of what a step starts from."""
    fixed = FIXED | {"method": neurode.Reversible("rk4")}
    adaptive = ADAPTIVE | {"method": neurode.Reversible("dopri5")}
    return {
        "coupled, fixed, joint, moving times": Case(fixed, None, times=True, outputs="moving"),
        "coupled, fixed, joint, dense, events: bounce": Case(fixed, None, True, "dense", "bounce"),
        "coupled, fixed, rows, own span": Case(fixed, "own"),
        "coupled, adaptive, joint, events: bounce": Case(adaptive, None, True, "moving", "bounce"),
        "coupled, adaptive, rows, outputs": Case(adaptive, "shared", outputs="still"),
        "coupled, adaptive, rows, own span, moving times, events: bounce": Case(
            adaptive, "own", True, "moving", "bounce"
        ),
        "coupled, adaptive, rows, own span, dense": Case(adaptive, "own", True, "dense"),
    }


def interpolated(method: Any) -> float:
    """What rounding leaves of a sum over an interpolant's coefficients, half an ulp of each: 7e-11 of verner6's, 3e-11 of
    verner9's, some 1e-12 of verner7's and dop853's, less of others'."""
    rows = getattr(method, "dense", None) or ()
    return torch.finfo(torch.float64).eps / 2 * sum(abs(float(x)) for row in rows for x in row)


def _methods() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for name, method in neurode.methods.METHODS.items():
        options = {"method": name, "rtol": 1e-3} if method.adaptive else {"method": name, "steps": 7}
        split = method.kind == "symplectic"
        rounding = max(1.0, interpolated(method) / 1e-12)  # outputs and their gradients are such sums
        cases[f"{name}, joint"] = Case(options, None, not split, "still", symplectic=split, rounding=rounding)
        # Few, long steps, whose weights reach 187 and cancel: 1.2e-12 was seen.
        retraced = 3.0 if name == "verner7" else 1.0
        cases[f"{name}, rows"] = Case(
            options, "own", not split, "still", symplectic=split, rounding=rounding, retraced=retraced
        )
        # A step back of verner6 multiplies rounding by its weights, which are as large as 176 and cancel.
        retraced = 20.0 if name == "verner6" else 1.0
        cases[f"{name}, no outputs"] = Case(options, None, not split, symplectic=split, retraced=retraced)
    return cases


CASES = _cases()
METHODS = _methods()
