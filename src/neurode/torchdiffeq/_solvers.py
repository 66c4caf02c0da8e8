"""torchdiffeq's method names: which method of neurode each one is, the options it knows and the callbacks it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from neurode import methods

STEP_CALLBACK = frozenset({"callback_step"})
ALL_CALLBACKS = frozenset({"callback_step", "callback_accept_step", "callback_reject_step"})

CONTROL = {"first_step", "safety", "ifactor", "dfactor", "max_num_steps", "min_step", "max_step"}
ADAPTIVE = frozenset(CONTROL | {"dtype", "step_t", "jump_t", "norm"})
FIXED = frozenset({"step_size", "grid_constructor", "interp", "perturb", "norm"})
ADAMS = FIXED | {"max_order", "max_iters", "implicit"}
SCIPY = frozenset({"solver", "min_step", "max_step", "norm", "grid_points", "eps"})

# Adams methods of higher orders are stable for very small steps only; torchdiffeq's own default of 12 diverges on
# y' = cos(t) y with 40 steps. Orders up to 5 do not, and higher ones are taken as 5.
HIGHEST_ADAMS_ORDER = 5
DEFAULT_ADAMS_ORDER = 4
ADAMS_TOLERANCE = 1e-7  # torchdiffeq's default rtol

# torchdiffeq starts every step from the last stage before, also where that was evaluated at a predicted state. Its dopri5
# compares with the fourth-order solution of Shampine (1986), p. 148: two thirds of Dormand and Prince's estimate.
VARIANTS = {name: replace(methods.get(name), reuse_last=True) for name in ("adaptive_heun", "fehlberg2")}
VARIANTS["dopri5"] = replace(
    methods.get("dopri5"), b_error=[Fraction(2, 3) * weight for weight in methods.get("dopri5").b_error]
)


@dataclass(frozen=True)
class Solver:
    """One of torchdiffeq's methods.

    Attributes:
        name: what users type there.
        title: the name of its class there, which its warnings carry.
        kind: `"adaptive"`, `"fixed"`, `"adams"` or `"scipy"`.
        method: name of neurode's method; None for SciPy's.
        options: keys that it knows.
        callbacks: callbacks that it makes.
    """

    name: str
    title: str
    kind: str
    method: str | None
    options: frozenset[str]
    callbacks: frozenset[str]

    def method_for(self, options: Mapping[str, Any], rtol: Any) -> Any:
        """The numbers of the method, with the options and the tolerance that shape it."""
        if self.kind != "adams":
            return VARIANTS.get(self.name) or methods.get(self.method)
        name = self.method if options.get("implicit", True) else "explicit_adams"
        order = min(int(options.get("max_order", DEFAULT_ADAMS_ORDER)), HIGHEST_ADAMS_ORDER)
        if order < DEFAULT_ADAMS_ORDER:
            return methods.get("rk4_38")  # as torchdiffeq does, with its warning
        # torchdiffeq stops correcting where the change is below rtol; one number is enough of a tolerance list for that.
        tolerance = rtol if isinstance(rtol, float) else ADAMS_TOLERANCE
        iterations = int(options.get("max_iters", methods.get(name).max_iters))
        return replace(methods.get(name), max_order=order, max_iters=iterations, tolerance=tolerance)


def _adaptive(name: str, title: str) -> Solver:
    return Solver(name, title, "adaptive", name, ADAPTIVE, ALL_CALLBACKS)


def _fixed(name: str, title: str, method: str) -> Solver:
    return Solver(name, title, "fixed", method, FIXED, STEP_CALLBACK)


def _adams(name: str, title: str, method: str) -> Solver:
    return Solver(name, title, "adams", method, ADAMS, STEP_CALLBACK)


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        _adaptive("dopri8", "Dopri8Solver"),
        _adaptive("dopri5", "Dopri5Solver"),
        _adaptive("tsit5", "Tsit5Solver"),  # not in 0.2.5, but in its repository since
        _adaptive("bosh3", "Bosh3Solver"),
        _adaptive("fehlberg2", "Fehlberg2"),
        _adaptive("adaptive_heun", "AdaptiveHeunSolver"),
        _fixed("euler", "Euler", "euler"),
        _fixed("midpoint", "Midpoint", "midpoint"),
        _fixed("heun2", "Heun2", "heun"),
        _fixed("heun3", "Heun3", "heun3"),
        _fixed("rk4", "RK4", "rk4_38"),
        _adams("explicit_adams", "AdamsBashforth", "explicit_adams"),
        _adams("implicit_adams", "AdamsBashforthMoulton", "implicit_adams"),
        _adams("fixed_adams", "AdamsBashforthMoulton", "implicit_adams"),
        Solver("scipy_solver", "ScipyWrapperODESolver", "scipy", None, SCIPY, frozenset()),
    )
}
