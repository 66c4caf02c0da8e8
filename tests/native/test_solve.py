"""The native solve loops and their adjoint, on hand-written programs: against SciPy, PyTorch's tape, and themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from systems import NativeSolve, System, lotka_volterra, perceptron

import neurode

DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# An error estimate is what is left when stages cancel, so its rounding is large beside it, and moves the steps by some 1e-10 of
# their length; the solutions, whose error is 1e-5, then differ by a part in 1e4 or less of that share.
ADAPTIVE = 1e-9
SPAN = (0.0, 1.0)
TIMES = torch.tensor([0.0, 0.05, 0.3, 0.3, 0.77, 1.0], dtype=torch.float64)
SHAPES = [(1, 3, 5), (7, 3, 20), (33, 2, 64), (100, 5, 13)]  # rows, size, hidden


def close(a: Tensor | Any, b: Any, tolerance: float) -> None:
    """Equal, relative to the largest element."""
    assert (a - b).abs().max() <= tolerance * b.abs().max()


Tensor = torch.Tensor


def gradients(system: System, y0: Tensor, weights: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Gradients of y0 and of all parameters through the eager engine, whose tape is the reference."""
    y0 = y0.clone().requires_grad_()
    solution = neurode.solve(system.f, y0, SPAN, gradient="autograd", **options)
    made = torch.autograd.grad((solution.ys * weights).sum(), [y0, *system.leaves])
    return made[0], torch.cat([g.reshape(-1) for g in made[1:]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["euler", "rk4", "heun", "dopri5"])
@pytest.mark.parametrize("memory", [0, 1 << 28], ids=["recomputed", "kept"])
def test_fixed_grid(method: str, shape: tuple[int, int, int], dtype: str, memory: int) -> None:
    rows, size, hidden = shape
    system = perceptron(size, hidden, DTYPES[dtype])
    y0 = torch.randn(rows, size, dtype=DTYPES[dtype])
    solve = NativeSolve(system, y0, SPAN, method, steps=6, keep=True, memory=memory)
    grid = torch.linspace(*SPAN, 7, dtype=torch.float64) if method == "dopri5" else None
    options: dict[str, Any] = {"grid": grid} if grid is not None else {"steps": 6}
    options |= {"method": neurode.methods.get(method), "batch_dim": 0}
    if method == "dopri5":
        options["method"] = as_fixed(method)
    weights = torch.randn(1, rows, size, dtype=DTYPES[dtype])
    close(solve.y1, neurode.solve(system.f, y0, SPAN, **options).y1.detach(), TOLERANCE[y0.dtype])
    for got, wanted in zip(solve.backward(weights[0]), gradients(system, y0, weights, **options), strict=True):
        close(got, wanted, TOLERANCE[y0.dtype])


def as_fixed(name: str) -> Any:
    """A method of an adaptive pair without its error estimate."""
    from dataclasses import replace

    return replace(neurode.methods.get(name), b_error=None, order_error=None)


@pytest.mark.parametrize("joint", [False, True], ids=["rows", "joint"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5", "dop853", "adaptive_heun"])
def test_adaptive(method: str, shape: tuple[int, int, int], joint: bool) -> None:
    """The same steps, the same outputs and the same gradients as the eager engine."""
    rows, size, hidden = shape
    system = perceptron(size, hidden, torch.float64)
    y0 = torch.randn(rows, size, dtype=torch.float64)
    options = {"rtol": 1e-5, "atol": 1e-7}
    solve = NativeSolve(system, y0, SPAN, method, t_eval=TIMES, joint=joint, keep=True, **options)
    eager: dict[str, Any] = {"method": method, "t_eval": TIMES, "controller": neurode.PID.i(), **options}
    eager["batch_dim"] = None if joint else 0
    expected = neurode.solve(system.f, y0, SPAN, **eager)
    assert torch.equal(solve.accepted, torch.as_tensor(expected.stats.num_accepted).expand(rows))
    assert torch.equal(solve.rejected, torch.as_tensor(expected.stats.num_rejected).expand(rows))
    assert (solve.status == 0).all() and (solve.t_end == 1.0).all()
    close(solve.ys, expected.ys.detach(), ADAPTIVE)
    close(solve.y1, expected.y1.detach(), ADAPTIVE)
    weights = torch.randn(len(TIMES), rows, size, dtype=torch.float64)
    for got, wanted in zip(solve.backward(None, weights), gradients(system, y0, weights, **eager), strict=True):
        close(got, wanted, ADAPTIVE)


def test_lotka_volterra_against_scipy() -> None:
    system = lotka_volterra(torch.float64)
    y0 = torch.rand(21, 2, dtype=torch.float64) + 0.5
    solve = NativeSolve(system, y0, (0.0, 10.0), "tsit5", rtol=1e-10, atol=1e-10)
    for row in (0, 20):
        f = lambda t, s: [1.5 * s[0] - s[0] * s[1], s[0] * s[1] - 3 * s[1]]
        reference = solve_ivp(f, (0, 10), y0[row].numpy(), "DOP853", rtol=1e-12, atol=1e-12)
        assert np.allclose(solve.y1[row].numpy(), reference.y[:, -1], rtol=1e-7)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit: every lane is an equation of its own, wherever it lies."""
    system = perceptron(3, 16, torch.float32)
    y0 = torch.randn(77, 3, dtype=torch.float32)
    whole = NativeSolve(system, y0, SPAN, "dopri5", t_eval=TIMES)
    part = NativeSolve(system, y0[50:60].clone(), SPAN, "dopri5", t_eval=TIMES)
    assert torch.equal(whole.y1[50:60], part.y1) and torch.equal(whole.ys[:, 50:60], part.ys)
    assert torch.equal(whole.accepted[50:60], part.accepted)


@pytest.mark.parametrize("memory", [0, 1 << 28], ids=["recomputed", "kept"])
@pytest.mark.parametrize("steps", [None, 5], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("bad", [0, 60, 127])
def test_a_row_of_nan_changes_no_bit_of_the_shared_gradients(bad: int, steps: int | None, memory: int) -> None:
    system = perceptron(4, 24, torch.float32)
    y0 = torch.randn(128, 4, dtype=torch.float32)
    g = torch.randn(128, 4, dtype=torch.float32)
    method = "dopri5" if steps is None else "rk4"
    rest = [i for i in range(128) if i != bad]
    without = NativeSolve(system, y0[rest].clone(), SPAN, method, steps, keep=True, memory=memory)
    expected = without.backward(g[rest].clone())
    y0[bad] = float("nan")
    solve = NativeSolve(system, y0, SPAN, method, steps, keep=True, memory=memory)
    assert solve.status.tolist() == [4 if i == bad else 0 for i in range(128)]
    assert torch.isnan(solve.y1[bad]).all() and torch.equal(solve.y1[rest], without.y1)
    grad_y0, parameters = solve.backward(g)
    assert torch.equal(parameters, expected[1])
    assert torch.equal(grad_y0[rest], expected[0]) and not grad_y0[bad].any()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", ["joint", "alike", "different"])
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "dop853"])
def test_stages_that_adaptive_steps_kept_change_no_bit(method: str, rows: str, threads: int) -> None:
    """All of them, as many as a little memory holds, none; with rejected attempts and outputs within steps."""
    system = perceptron(4, 24, torch.float64)
    spread = 1.0 if rows == "different" else 1e-3
    y0 = torch.randn(4, dtype=torch.float64) + spread * torch.randn(90, 4, dtype=torch.float64)
    times = torch.tensor([0.6, 1.0], dtype=torch.float64)
    weights = torch.randn(2, 90, 4, dtype=torch.float64)

    def solved(memory: int) -> tuple[Tensor, Tensor, int]:
        options: dict[str, Any] = {"t_eval": times, "rtol": 1e-6, "atol": 1e-8, "joint": rows == "joint"}
        options |= {"first_step": 1.0, "threads": threads}
        solve = NativeSolve(system, y0, SPAN, method, keep=True, memory=memory, **options)
        assert not solve.status.any() and solve.rejected.any()
        assert (len(set(solve.accepted.tolist())) > 1) == (rows == "different")
        grad_y0, parameters = solve.backward(None, weights)
        return grad_y0, parameters, solve.solve.backward_evaluations

    none, some, whole = (solved(memory) for memory in (0, 1_000_000, 1 << 28))
    assert none[2] >= some[2] >= whole[2]
    if rows == "joint" or (rows == "alike" and threads == 1):  # else by chance: lanes go apart, or to other threads
        assert none[2] > whole[2]
    for kept in (some, whole):
        assert torch.equal(kept[0], none[0]) and torch.equal(kept[1], none[1])


@pytest.mark.parametrize("joint", [False, True], ids=["rows", "joint"])
def test_too_many_steps(joint: bool) -> None:
    solve = NativeSolve(
        lotka_volterra(torch.float64),
        torch.ones(3, 2, dtype=torch.float64),
        (0.0, 10.0),
        "tsit5",
        max_steps=5,
        joint=joint,
    )
    assert (solve.status == 2).all() and (solve.t_end < 10).all() and torch.isnan(solve.y1).all()
    assert (solve.accepted + solve.rejected == 5).all()


@pytest.mark.parametrize("joint", [False, True], ids=["rows", "joint"])
@pytest.mark.parametrize("span", [(0.0, 0.0), (1.0, 0.0)], ids=["empty", "reversed"])
def test_other_spans(span: tuple[float, float], joint: bool) -> None:
    system, y0 = lotka_volterra(torch.float64), torch.rand(5, 2, dtype=torch.float64) + 0.5
    times = torch.linspace(*span, 4, dtype=torch.float64)
    solve = NativeSolve(system, y0, span, "dopri5", t_eval=times, joint=joint)
    expected = neurode.solve(
        system.f, y0, span, method="dopri5", t_eval=times, batch_dim=None if joint else 0, controller=neurode.PID.i()
    )
    close(solve.ys, expected.ys, 1e-13)
    close(solve.y1, expected.y1, 1e-13)


def test_no_rows() -> None:
    solve = NativeSolve(
        perceptron(3, 8, torch.float64), torch.zeros(0, 3, dtype=torch.float64), SPAN, "dopri5", keep=True
    )
    _, parameters = solve.backward(torch.zeros(0, 3, dtype=torch.float64))
    assert not parameters.any()
