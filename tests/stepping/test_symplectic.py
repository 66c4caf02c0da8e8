"""Symplectic methods: order, evaluations, reversibility, long-time energy, states that do not fit."""

from __future__ import annotations

import math

import pytest
import torch

import neurode

BOTH = pytest.mark.parametrize("name", ["leapfrog", "yoshida4"])
ORDER = {"leapfrog": 2, "yoshida4": 4}


def pendulum(t, state):
    q, p = state
    return p, -torch.sin(q)


def driven(t, state):
    """dq/dt = p (1 + t), dp/dt = -q + sin(t): separable, with time in both."""
    q, p = state
    return p * (1 + t), -q + torch.sin(t)


def solve(name, steps, f=pendulum, t1=3.0, **options):
    y0 = (torch.tensor([1.0, 0.3]), torch.tensor([0.0, -0.5]))
    return neurode.solve(f, y0, (0.0, t1), method=name, steps=steps, **options)


@BOTH
@pytest.mark.parametrize("f", [pendulum, driven])
def test_order(name, f):
    y0 = (torch.tensor([1.0, 0.3]), torch.tensor([0.0, -0.5]))
    want = torch.cat(neurode.solve(f, y0, (0.0, 3.0), method="dop853", rtol=1e-13, atol=1e-14).y1)
    errors = [float((torch.cat(solve(name, n, f).y1) - want).abs().max()) for n in (80, 160, 320)]
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert abs(math.log2(coarse / fine) - ORDER[name]) <= 0.2


@BOTH
def test_order_of_the_output_over_the_interval(name):
    y0 = (torch.tensor([1.0, 0.3]), torch.tensor([0.0, -0.5]))
    times = torch.linspace(0, 3, 53)
    want = torch.cat(
        neurode.solve(pendulum, y0, (0.0, 3.0), method="dop853", rtol=1e-13, atol=1e-14, t_eval=times).ys, 1
    )
    errors = [float((torch.cat(solve(name, n, t_eval=times).ys, 1) - want).abs().max()) for n in (80, 160, 320)]
    assert abs(math.log2(errors[0] / errors[2]) / 2 - ORDER[name]) <= 0.2


@BOTH
def test_evaluations(name):
    per_step = neurode.methods.get(name).num_evaluations_per_step
    sol = solve(name, 10)
    assert sol.stats.num_evaluations == 10 * per_step + 1  # the first kick has none to take over
    dense = solve(name, 10, dense=True)
    assert dense.stats.num_evaluations == 10 * (per_step + 1) + 1  # the whole derivative at every point
    assert torch.equal(torch.cat(dense.y1), torch.cat(sol.y1))


def test_leapfrog_by_hand():
    h, q, p = 0.1, torch.tensor([1.0, 0.3]), torch.tensor([0.0, -0.5])
    for _ in range(3):
        p = p - h / 2 * torch.sin(q)
        q = q + h * p
        p = p - h / 2 * torch.sin(q)
    sol = solve("leapfrog", 3, t1=0.3)
    assert torch.allclose(sol.y1[0], q, rtol=1e-13) and torch.allclose(sol.y1[1], p, rtol=1e-13)


@BOTH
def test_time_runs_back_to_the_start(name):
    there = solve(name, 40)
    back = neurode.solve(pendulum, there.y1, (3.0, 0.0), method=name, steps=40)
    assert torch.allclose(back.y1[0], torch.tensor([1.0, 0.3]), atol=1e-13)


@BOTH
def test_energy_does_not_drift(name):
    """Over 50 periods, the energy of an oscillator stays in a band; a Runge-Kutta method of order 4 loses it."""
    spring = lambda t, s: (s[1], -s[0])
    y0 = (torch.tensor([1.0]), torch.tensor([0.0]))
    span, steps = (0.0, 100 * math.pi), 2000
    with torch.no_grad():
        path = neurode.solve(spring, y0, span, method=name, steps=steps, t_eval="steps").ys
        rk4 = neurode.solve(spring, y0, span, method="rk4", steps=steps).y1
    energy = (path[0] ** 2 + path[1] ** 2).flatten() / 2
    band = (energy - 0.5).abs()
    assert band.max() < 1.05 * band[:200].max()
    assert abs(float(rk4[0] ** 2 + rk4[1] ** 2) / 2 - 0.5) > 20 * band[-200:].min()


@BOTH
def test_rows_with_spans_of_their_own(name):
    y0 = (torch.tensor([[1.0], [0.3]]), torch.tensor([[0.0], [-0.5]]))
    t1 = torch.tensor([2.0, -1.0])
    sol = neurode.solve(pendulum, y0, (torch.zeros(2), t1), method=name, steps=15, batch_dim=0, dense=True)
    for row in (0, 1):
        start = (y0[0][row], y0[1][row])
        alone = neurode.solve(pendulum, start, (0.0, float(t1[row])), method=name, steps=15)
        assert torch.allclose(sol.y1[0][row], alone.y1[0], rtol=1e-12)
        assert torch.allclose(sol.y1[1][row], alone.y1[1], rtol=1e-12)


@BOTH
def test_gradcheck(name):
    q, p, t1 = torch.tensor([1.0], requires_grad=True), torch.tensor([0.2], requires_grad=True), torch.tensor(0.8)

    def run(q, p, t1):
        return neurode.solve(driven, (q, p), (0.1, t1), method=name, steps=6).y1

    assert torch.autograd.gradcheck(run, (q, p, t1.requires_grad_()))


@BOTH
def test_nested_parts(name):
    y0 = {"a": torch.ones(2), "b": torch.zeros(2)}
    f = lambda t, s: {"a": s["b"], "b": -s["a"]}
    out = neurode.solve(f, y0, (0, 1), method=name, steps=50).y1
    assert torch.allclose(out["a"], torch.full((2,), math.cos(1.0)), atol=1e-3)


def test_the_continuous_adjoint_refuses_and_names_another():
    a = torch.tensor(1.0, requires_grad=True)
    f = lambda t, s: (a * s[1], -s[0])
    with pytest.raises(neurode.GradientError, match="autograd"):
        neurode.solve(f, (torch.ones(1), torch.zeros(1)), (0, 1), method="leapfrog", steps=3, gradient="continuous")


def test_states_that_do_not_fit():
    with pytest.raises(neurode.InputError, match=r"two parts, \(q, p\)"):
        neurode.solve(lambda t, y: y, torch.ones(2), (0, 1), method="leapfrog", steps=2)
    with pytest.raises(neurode.InputError, match="2 and 3 elements"):
        neurode.solve(lambda t, y: y, (torch.ones(2), torch.ones(3)), (0, 1), method="leapfrog", steps=2)
