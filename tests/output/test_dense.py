"""The continuous solution: shapes, joints of steps, derivative, gradients, refusals."""

from __future__ import annotations

import math

import pytest
import torch

import neurode
from neurode.methods import METHODS

EXPLICIT = [name for name, method in METHODS.items() if method.kind == "explicit"]
OPTIONS = [dict(method="rk4", steps=40), dict(method="dopri5", rtol=1e-8, atol=1e-8), dict(method="dop853", rtol=1e-8)]
SOME = pytest.mark.parametrize("options", OPTIONS, ids=["rk4", "dopri5", "dop853"])


def field(t, y):
    return torch.stack([y[..., 1], -y[..., 0]], -1)


@SOME
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_joint_shapes(options, shape):
    sol = neurode.solve(field, torch.randn(4, 2), (0, 2), dense=True, **options)
    t = torch.rand(shape) * 2
    assert sol(t).shape == sol.derivative(t).shape == (*shape, 4, 2)
    assert sol(1.0).shape == (4, 2)


@SOME
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_row_shapes(options, lead):
    y0 = torch.randn(4, 2)
    sol = neurode.solve(
        field, y0, (torch.zeros(4), torch.tensor([1.0, 2.0, -1.0, 0.5])), batch_dim=0, dense=True, **options
    )
    t = torch.rand(*lead, 4) * torch.tensor([1.0, 2.0, -1.0, 0.5])
    assert sol(t).shape == sol.derivative(t).shape == (*lead, 4, 2)
    start = y0.expand(*lead, 4, 2)
    c, s = t.cos(), t.sin()
    want = torch.stack([start[..., 0] * c + start[..., 1] * s, start[..., 1] * c - start[..., 0] * s], -1)
    assert torch.allclose(sol(t), want, atol=2e-5)
    assert torch.allclose(sol.derivative(t), field(t, want), atol=1e-3)
    with pytest.raises(neurode.InputError, match="last dimension must be 4 rows"):
        sol(torch.zeros(3))


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("method", EXPLICIT)
def test_the_pieces_meet_at_the_steps(method, batch_dim):
    options = dict(steps=7) if not METHODS[method].adaptive else dict(rtol=1e-4, atol=1e-5)
    sol = neurode.solve(
        field,
        torch.tensor([[0.3, 1.0]]),
        (0, 2),
        method=method,
        dense=True,
        t_eval="steps",
        batch_dim=batch_dim,
        **options,
    )
    ts = sol.ts if sol.ts.ndim == 1 else sol.ts[:, 0]
    limit = 1e-9 if "verner" in method else 1e-12  # dense weights up to 1e5 cost digits
    query = ts if batch_dim is None else ts.unsqueeze(1)
    assert (sol(query) - sol.ys).abs().max() < limit
    inner = ts[1:-1]
    for side in (inner - 1e-9, inner + 1e-9):
        query = side if batch_dim is None else side.unsqueeze(1)
        assert (sol(query) - sol.ys[1:-1]).abs().max() < 3e-9


@SOME
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_outputs_and_the_continuous_solution_are_one(options, batch_dim):
    times = torch.linspace(0, 2, 41)
    sol = neurode.solve(field, torch.randn(3, 2), (0, 2), t_eval=times, dense=True, batch_dim=batch_dim, **options)
    query = times if batch_dim is None else times.unsqueeze(1).expand(-1, 3)
    assert torch.allclose(sol(query), sol.ys, rtol=1e-12, atol=1e-13)


@SOME
def test_the_derivative_is_that_of_the_interpolant(options):
    sol = neurode.solve(field, torch.tensor([0.3, 1.0]), (2, 0), dense=True, **options)
    t = torch.linspace(0.1, 1.9, 7, requires_grad=True)
    for part in (0, 1):
        (grad,) = torch.autograd.grad(sol(t)[:, part].sum(), t)
        assert torch.allclose(grad, sol.derivative(t)[:, part], rtol=1e-9, atol=1e-9)


@SOME
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_gradients_reach_the_state_parameters_and_query(options, batch_dim):
    w = torch.tensor([[0.0, 1.0], [-1.0, -0.1]], requires_grad=True)
    y0 = torch.tensor([[0.3, 1.0], [1.0, -1.0]], requires_grad=True)
    query = torch.tensor([[0.31, 0.94]] if batch_dim == 0 else [0.31, 0.94], requires_grad=True)

    def run(y0, w, query):
        sol = neurode.solve(
            lambda t, y: torch.tanh(y @ w.T), y0, (0, 1), dense=True, batch_dim=batch_dim,
            **(options if "steps" in options else options | dict(rtol=1e-9, atol=1e-9)),
        )  # fmt: skip
        return sol(query)

    assert torch.autograd.gradcheck(run, (y0, w, query), eps=1e-4, atol=2e-5, rtol=1e-3)


def test_an_interpolant_does_not_extrapolate():
    sol = neurode.solve(field, torch.ones(2), (0, 1), method="dopri5", dense=True)
    with pytest.raises(neurode.InputError, match=r"asked at 1\.5"):
        sol(1.5)
    with pytest.raises(ValueError, match="dense=True"):
        neurode.solve(field, torch.ones(2), (0, 1), method="dopri5")(0.5)


def test_a_pytree_has_a_continuous_solution():
    f = lambda t, y: {"q": y["p"], "p": -y["q"]}
    sol = neurode.solve(f, {"q": torch.ones(1), "p": torch.zeros(1)}, (0, 3), method="dopri5", rtol=1e-8, dense=True)
    assert sol(math.pi / 2)["p"].item() == pytest.approx(-1.0, abs=1e-4)
    assert sol(torch.zeros(2, 3))["q"].shape == (2, 3, 1)


def test_rows_that_stand_still_have_a_continuous_solution():
    sol = neurode.solve(
        field, torch.ones(2, 2), (torch.zeros(2), torch.tensor([0.0, 1.0])), batch_dim=0, method="dopri5", dense=True
    )
    assert torch.equal(sol(torch.tensor([0.0, 0.0])), torch.ones(2, 2))
