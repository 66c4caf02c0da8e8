"""Every strategy on every problem: the gradient of the tape to rounding, or an error that names a strategy that can."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from contract import CASES, METHODS, STRATEGIES, Case, Result, Row, differentiate, distance, leaves, run

import neurode


@functools.cache
def on_tape(name: str, row: str, dtype: torch.dtype) -> Result:
    """The gradient to agree with, computed once."""
    case, kind = (CASES | METHODS)[name], STRATEGIES[row]
    return differentiate(case, "autograd", kind.baseline(resolved(kind.options(case.options), dtype)), dtype)


def resolved(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Tolerances that the dtype resolves."""
    if dtype is torch.float64 or "rtol" not in options:
        return options
    return options | {"rtol": max(options["rtol"], 1e-5), "atol": max(options.get("atol", 1e-6), 1e-6)}


def same_tape(row: Row, dtype: torch.dtype, name: str) -> Result:
    """Rows that are compared on the same options share one solve on the tape."""
    options = (CASES | METHODS)[name].options
    first = next(
        k for k, r in STRATEGIES.items() if r.baseline(r.options(options)) == row.baseline(row.options(options))
    )
    return on_tape(name, first, dtype)


def check(name: str, row: Row, dtype: torch.dtype = torch.float64) -> None:
    """A strategy on one problem."""
    case: Case = (CASES | METHODS)[name]
    options = resolved(row.options(case.options), dtype)
    if not case.features <= row.handles:
        refuses(case, row, options)
        return
    exact, other = same_tape(row, dtype, name), differentiate(case, row.gradient, options, dtype)
    rounding = max(case.rounding, case.retraced if row.retraces else 1.0)
    limit = row.limits[dtype is torch.float32] * rounding
    assert distance(exact.grads, other.grads) <= limit
    for a, b in zip(_numbers(exact.solution), _numbers(other.solution), strict=True):
        # rounding: times that move are tensors, the others numbers
        near = rounding * (1e-12 if a.dtype is torch.float64 else 1e-6)
        torch.testing.assert_close(a, b, equal_nan=True, rtol=near, atol=near)


def _numbers(solution: neurode.Solution) -> list[Any]:
    trees = (solution.y1, solution.ys, solution.ts, solution.t1, [(e.t, e.y) for e in solution.events])
    return [x.detach() for x in torch.utils._pytree.tree_leaves(trees)]


def refuses(case: Case, row: Row, options: dict[str, Any]) -> None:
    """An error before anything is computed, and what it says to type works."""
    with pytest.raises(neurode.GradientError, match="does not go through") as error:
        run(case, row.gradient, options, leaves(case, torch.float64))
    named = re.findall(r"gradient='(\w+)'", str(error.value))[1:]
    assert "autograd" in named
    for other in named:
        assert case.features <= neurode.gradients.STRATEGIES[other].handles


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_is_that_of_the_tape(strategy: str, name: str) -> None:
    check(name, STRATEGIES[strategy])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("strategy", [name for name, row in STRATEGIES.items() if row.limits[0] <= 1e-11])
def test_every_method(strategy: str, name: str) -> None:
    check(name, STRATEGIES[strategy])


@pytest.mark.parametrize("name", ["fixed, joint", "adaptive, rows, own span", "fixed, rows, shared span, outputs"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_single_precision(strategy: str, name: str) -> None:
    check(name, STRATEGIES[strategy], torch.float32)


@pytest.mark.parametrize("strategy", ["continuous", "continuous, interpolated"])
def test_a_cubic_interpolant_converges_too(strategy: str) -> None:
    """Where the table refines a grid the interpolant is of order 7; RK4's, on which events are found, is of order 3."""
    case, row = CASES["fixed, rows, shared span, events: bounce"], STRATEGIES[strategy]
    options = case.options | {"steps": 200}
    exact, other = (differentiate(case, gradient, options) for gradient in ("autograd", row.gradient))
    assert distance(exact.grads, other.grads) <= row.limits[0]


def test_every_registered_strategy_is_held_to_the_contract() -> None:
    named = {row.gradient for row in STRATEGIES.values() if isinstance(row.gradient, str)}
    assert named | {"autograd"} == set(neurode.gradients.STRATEGIES)


def failing(
    a: torch.Tensor, y0: torch.Tensor, gradient: Any, options: dict[str, Any], events: Any = ()
) -> neurode.Solution:
    """Five rows, the third of which leaves the domain of the square root and becomes NaN."""
    k = torch.tensor([1.0, 1.0, 40.0, 1.0, 1.0]).reshape(-1, 1)
    f = lambda t, y, k: a * k * (0.1 + torch.sqrt(1.5 - 0.1 * y))
    return neurode.solve(
        f, y0, (0.0, 2.0), args=(neurode.per_row(k),), batch_dim=0, on_failure="nan", t_eval=[0.0, 0.1, 2.0],
        gradient=gradient, events=events, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["fixed", "adaptive", "adaptive, events", "fixed, events"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_failed_rows_touch_no_gradient(strategy: str, kind: str) -> None:
    row, watches = STRATEGIES[strategy], "events" in kind
    if (watches and "events" not in row.handles) or (kind != "fixed" and "rows" not in row.handles):
        pytest.skip("refused at the start, which the table of problems shows")
    options = row.options({"method": "rk4", "steps": 50} if "fixed" in kind else {"method": "dopri5", "rtol": 1e-4})
    events = [
        neurode.Event(lambda t, y, k: y[:, 0] - 1.2),
        neurode.Event(lambda t, y, k: y[:, 0] - 3.0 * k[:, 0], terminal=True),
    ]
    found = []
    for gradient, way in (("autograd", row.baseline(options)), (row.gradient, options)):
        a, y0 = torch.ones(1, requires_grad=True), torch.ones(5, 1, requires_grad=True)
        solution = failing(a, y0, gradient, way, events if watches else ())
        assert solution.status.failed.tolist() == [False, False, True, False, False]
        loss = solution.y1.nansum() + solution.ys.nansum() + sum(e.t.nansum() + e.y.nansum() for e in solution.events)
        grads = torch.autograd.grad(loss, (a, y0))
        found.append(dict(zip(("a", "y0"), grads, strict=True)))
        assert all(torch.isfinite(g).all() for g in found[-1].values())
        assert found[-1]["y0"][2] == 0
    assert distance(*found) <= max(row.limits[0], 1e-9 if row.retraces else 0.0)


# How a row fails: its rate, its start, and what else is set. From 1e300 a sum of a step's stages overflows whatever its length.
FAILURES: dict[str, tuple[float, float, dict[str, Any]]] = {
    "max_steps": (90.0, 0.4, {"max_steps": 40}),
    "underflow": (4.0, 0.4, {}),
    "max_steps, near the largest float": (30.0, 1e300, {"max_steps": 40}),
    "underflow, near the largest float": (30.0, 1e300, {}),
}
OUTPUTS: dict[str, dict[str, Any]] = {
    "times": {"t_eval": [0.0, 0.001, 0.5, 1.0]},
    "steps": {"t_eval": "steps"},
    "dense": {"dense": True},
    "events": {"events": [neurode.Event(lambda t, y, a, k: y[:, 0] - 0.401)]},
    "save": {"t_eval": [0.0, 0.001, 1.0], "save": lambda t, y, a, k: a * y},
}


ONE_OF_A_KIND = ("discrete", "discrete, one stage alive", "discrete, 3 checkpoints", "reversible", "continuous")


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("strategy", ["autograd", *ONE_OF_A_KIND])
def test_what_a_failed_row_reached_is_a_constant(strategy: str, failure: str, outputs: str) -> None:
    """However a row fails: what it reached stays, no gradient goes through it, and the others' are as without it."""
    row, (rate, start, more) = STRATEGIES.get(strategy, Row("autograd")), FAILURES[failure]
    if outputs in ("steps", "dense", "events") and outputs not in row.handles:
        pytest.skip("refused at the start, which the table of problems shows")
    options = {"method": "tsit5", "rtol": 1e-5, "atol": 1e-8, "first_step": 1e-3, **OUTPUTS[outputs], **more}
    f = lambda t, y, a, k: a * k * (y * y if failure == "underflow" else y)

    def solve(keep: list[int]) -> tuple[neurode.Solution, list[torch.Tensor], list[torch.Tensor]]:
        k = torch.tensor([1.0, 0.5, rate, 0.3]).reshape(-1, 1)[keep]
        y0 = torch.tensor([0.2, 0.3, start, 0.5]).reshape(-1, 1)[keep].requires_grad_(torch.is_grad_enabled())
        a = torch.ones(1, requires_grad=True)
        solution = neurode.solve(
            f, y0, (0.0, 1.0), args=(a, neurode.per_row(k)), batch_dim=0, on_failure="nan", gradient=row.gradient,
            **({"engine": "eager"} | row.options(options)),
        )  # fmt: skip
        seen = [solution.y1, solution.ys, *[x for e in solution.events for x in (e.t, e.y)]]
        seen += [solution(2e-4), solution.derivative(2e-4)] if outputs == "dense" and "near" not in failure else []
        return solution, seen, [a, y0]

    solution, seen, inputs = solve([0, 1, 2, 3])
    with torch.no_grad():
        _, known, _ = solve([0, 1, 2, 3])
    assert solution.status.failed.tolist() == [False, False, True, False] and solution.y1[2].isnan()
    for x, y in zip(seen, known, strict=True):
        torch.testing.assert_close(x.detach(), y, rtol=1e-14, atol=0, equal_nan=True)
    _, others, fewer = solve([0, 1, 3])
    grads, without = (
        torch.autograd.grad(sum(x.nansum() for x in values), leaves)
        for values, leaves in ((seen, inputs), (others, fewer))
    )
    assert grads[1][2] == 0
    for found, exact in zip((grads[0], grads[1][[0, 1, 3]]), without, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("strategy", ["autograd", *ONE_OF_A_KIND])
def test_a_solve_that_fails_whole_brings_nothing(strategy: str, failure: str, batch_dim: int | None) -> None:
    """`backward()` goes through, and leaves no gradient; what was reached is there."""
    row, (rate, start, more) = STRATEGIES.get(strategy, Row("autograd")), FAILURES[failure]
    f = lambda t, y, a: a * rate * (y * y if failure == "underflow" else y)
    y0, a = torch.full((2, 1), start, requires_grad=True), torch.ones(1, requires_grad=True)
    options = {"method": "tsit5", "rtol": 1e-5, "atol": 1e-8, "first_step": 1e-3, "t_eval": [0.0, 1e-4, 1.0], **more}
    for wanted in ((y0, a), (a,)):
        solution = neurode.solve(
            f, y0 if len(wanted) == 2 else y0.detach(), (0.0, 1.0), args=(a,), batch_dim=batch_dim, on_failure="nan",
            gradient=row.gradient, **({"engine": "eager"} | row.options(options)),
        )  # fmt: skip
        assert solution.y1.isnan().all() and torch.equal(solution.ys[0], y0) and solution.ys[2].isnan().all()
        (solution.y1.nansum() + solution.ys.nansum()).backward()
        assert all(x.grad is None or not x.grad.any() for x in wanted)
