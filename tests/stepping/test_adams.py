"""Adams methods on grids: order, evaluations, histories on unequal grids, restarts, gradients."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import neurode
from neurode.methods import get

BOTH = pytest.mark.parametrize("name", ["explicit_adams", "implicit_adams"])


def field(t, y):
    return torch.stack([y[1], -y[0]]) * (1 + 0.5 * torch.cos(t)) * (2 - (y * y).sum())


def exact(t):
    s = t + 0.5 * torch.sin(t)
    return torch.stack([torch.sin(s), torch.cos(s)], -1)


def error(method, grid, t1=3.0, **options):
    times = torch.linspace(0.0, t1, 97) if options.pop("dense", False) else None
    sol = neurode.solve(field, exact(torch.tensor(0.0)), (0.0, t1), method=method, t_eval=times, **grid, **options)
    want = exact(torch.tensor([t1])) if times is None else exact(times)
    return float((sol.ys - want).abs().max())


def order(method, steps, grid=None, **options):
    grid = grid or (lambda n: dict(steps=n))
    errors = [error(method, grid(n), **options) for n in steps]
    return math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0]), errors


@BOTH
@pytest.mark.parametrize("max_order", [1, 2, 3, 4, 5, 6, 8])
def test_order(name, max_order):
    method = dataclasses.replace(get(name), max_order=max_order, max_iters=30, tolerance=1e-15)
    steps = {1: (800, 1600), 2: (640, 1280), 3: (320, 640), 4: (200, 400), 5: (160, 320), 6: (160, 240), 8: (100, 140)}
    measured, errors = order(method, steps[max_order])
    assert abs(measured - max_order) <= 0.2, (measured, errors)


@BOTH
def test_the_default_is_of_order_four_and_its_output_of_order_four_over_the_interval(name):
    assert get(name).order == 4
    assert abs(order(name, (200, 400))[0] - 4) <= 0.2
    assert abs(order(name, (200, 400), dense=True)[0] - 4) <= 0.2


def uneven(n):
    """A smooth but unequal grid."""
    x = torch.linspace(0, 1, n + 1)
    points = 3.0 * (x + 0.15 * torch.sin(math.pi * x) ** 2)
    points[0], points[-1] = 0.0, 3.0
    return dict(grid=points)


@BOTH
def test_the_order_holds_on_an_unequal_grid(name):
    assert abs(order(name, (200, 400), uneven)[0] - 4) <= 0.25
    sudden = lambda n: dict(step_size=3.0 / (n - 0.37))
    assert abs(order(name, (200, 400), sudden)[0] - 4) <= 0.25


def test_evaluations():
    f = lambda t, y: -y
    sol = neurode.solve(f, torch.ones(2), (0, 1), method="explicit_adams", steps=20)
    assert sol.stats.num_evaluations == 3 * 4 + 17  # three steps of the start, then one a step
    once = dataclasses.replace(get("implicit_adams"), max_iters=1)
    sol = neurode.solve(f, torch.ones(2), (0, 1), method=once, steps=20)
    assert sol.stats.num_evaluations == 2 * 4 + 18 * 2
    dense = neurode.solve(f, torch.ones(2), (0, 1), method="explicit_adams", steps=20, dense=True)
    assert (
        dense.stats.num_evaluations == sol.stats.num_accepted + 1 + 3 * 3
    )  # f at every point once, and the start's stages


def test_the_iteration_stops_when_it_has_converged():
    slow = neurode.solve(lambda t, y: -3 * y, torch.ones(1), (0, 1), method="implicit_adams", steps=20)
    still = neurode.solve(lambda t, y: 0 * y, torch.ones(1), (0, 1), method="implicit_adams", steps=20)
    assert still.stats.num_evaluations == 2 * 4 + 18 * 2 < slow.stats.num_evaluations <= 2 * 4 + 18 * 5


def test_an_iteration_that_diverges_warns():
    with pytest.warns(RuntimeWarning, match="does not converge at t ="):
        neurode.solve(lambda t, y: -40 * y, torch.ones(1), (0, 1), method="implicit_adams", steps=10)


def test_the_implicit_method_solves_its_equation():
    """Trapezoidal rule on a linear problem: y1 = y0 (1 - h/2) / (1 + h/2)."""
    method = dataclasses.replace(get("implicit_adams"), max_order=2, max_iters=60, tolerance=1e-16)
    y1 = neurode.solve(lambda t, y: -y, torch.ones(1), (0, 1), method=method, steps=5).y1
    assert y1.item() == pytest.approx((0.9 / 1.1) ** 5, rel=1e-13)


@BOTH
def test_dense_output_changes_nothing(name):
    y0 = exact(torch.tensor(0.0))
    plain = neurode.solve(field, y0, (0, 2), method=name, steps=30)
    dense = neurode.solve(field, y0, (0, 2), method=name, steps=30, dense=True, t_eval="steps")
    assert torch.equal(plain.y1, dense.y1)
    assert torch.allclose(dense(dense.ts), dense.ys, rtol=1e-13)
    assert (dense(torch.tensor(1.234)) - exact(torch.tensor(1.234))).abs().max() < 1e-3


@BOTH
@pytest.mark.parametrize("grid", [dict(steps=12), dict(step_size=0.09)], ids=["steps", "step_size"])
def test_rows_are_what_they_are_alone(name, grid):
    f = lambda t, y: torch.sin(y) * torch.cos(t)
    y0, t1 = torch.tensor([[0.5], [1.0], [2.0]]), torch.tensor([1.0, -0.5, 2.0])
    times = torch.linspace(0, 1, 5).unsqueeze(1) * t1
    together = neurode.solve(f, y0, (torch.zeros(3), t1), method=name, batch_dim=0, t_eval=times, **grid)
    for row in range(3):
        alone = neurode.solve(f, y0[row], (0.0, float(t1[row])), method=name, t_eval=times[:, row], **grid)
        assert torch.allclose(together.ys[:, row], alone.ys, rtol=1e-9, atol=1e-11)
        assert int(together.stats.num_accepted[row]) == alone.stats.num_accepted


@BOTH
def test_gradcheck_with_both_ends_of_time(name):
    method = dataclasses.replace(get(name), max_iters=3, tolerance=0.0)
    w = torch.tensor([[-0.4, 0.9], [-1.1, -0.2]], requires_grad=True)
    y0, t0, t1 = torch.tensor([0.3, -0.8]), torch.tensor(0.2), torch.tensor(1.0)
    points = torch.tensor([0.2, 0.35, 0.42, 0.6, 0.8, 1.0])

    def run(grid):
        def solve(y0, w, t0, t1):
            f = lambda t, y: torch.tanh(y @ w.T) + torch.sin(2 * t)
            return neurode.solve(f, y0, (t0, t1), method=method, **grid).y1

        return solve

    leaves = (y0.requires_grad_(), w, t0.requires_grad_(), t1.requires_grad_())
    assert torch.autograd.gradcheck(run(dict(steps=7)), leaves)
    assert torch.autograd.gradcheck(run(dict(step_size=0.12)), leaves)
    fixed = lambda y0, w: run(dict(grid=points))(y0, w, 0.2, 1.0)
    assert torch.autograd.gradcheck(fixed, leaves[:2])


@BOTH
def test_an_event_restarts_the_history(name):
    """A ball: between bounces the motion is a parabola, which every method here has exactly."""
    fall = lambda t, y: torch.stack([y[1], torch.full_like(y[1], -10.0)])
    bounce = neurode.Event(
        lambda t, y: y[0], direction=-1, apply=lambda t, y: torch.stack([torch.zeros_like(y[0]), -0.5 * y[1]])
    )
    sol = neurode.solve(fall, [5.0, 0.0], (0, 1.8), method=name, steps=18, events=[bounce])
    assert sol.events[0].t.tolist() == pytest.approx([1.0])
    assert sol.y1.tolist() == pytest.approx([5 * 0.8 - 5 * 0.64, 5 - 8])
