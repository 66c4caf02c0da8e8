"""The continuous adjoint beyond the contract: its forms, its counts, rows of their own, failed rows, and what it refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import neurode
from neurode import Continuous
from neurode.report.memory import peak_memory

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import continuous

FORMS = {
    "plain": Continuous(),
    "interpolate": Continuous(interpolate=True),
    "quadrature": Continuous(quadrature=True),
    "both": Continuous(interpolate=True, quadrature=True),
}


def test_the_benchmark_in_small():
    """The error of every form falls with the fourth power of the steps, on a field that has been trained a little."""
    found = continuous.run(16, 256, 6, (10, 20))
    for name in FORMS:
        coarse, fine = found["trained"][name]
        assert 0 < fine < coarse / 10 < 1e-4
    evaluations = {name: count for name, (count, _) in found["costs"].items()}
    peaks = {name: peak for name, (_, peak) in found["costs"].items()}
    assert evaluations == {"plain": 80, "interpolate": 80, "quadrature": 160, "both": 160}
    assert peaks["quadrature"] < peaks["plain"] < peaks["interpolate"]


def field(t, y, w, x):
    return torch.tanh(y @ w) * x + 0.1 * torch.sin(3 * t) * y


def data(rows=6):
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return draw(rows, 2), draw(2, 2), draw(rows, 2), torch.linspace(0.3, 2.0, rows)


def gradients(gradient, keep=None, f=field, **options):
    y0, w, x, t1 = data()
    keep = [*range(6)] if keep is None else keep
    leaves = [leaf.clone().requires_grad_() for leaf in (y0[keep], w, x[keep], t1[keep])]
    sol = neurode.solve(
        f, leaves[0], (torch.zeros(len(keep)), leaves[3]), args=(leaves[1], neurode.per_row(leaves[2])), batch_dim=0,
        gradient=gradient, on_failure="nan", **options,
    )  # fmt: skip
    return sol, torch.autograd.grad(torch.cat([sol.ys, sol.y1[None]]).square().nansum(), leaves)


@pytest.mark.parametrize("form", FORMS)
def test_rows_take_adjoint_steps_of_their_own(form):
    """A row's gradient is the one that it has alone, whatever the others need."""
    options = dict(method="dopri5", rtol=1e-6, atol=1e-8)
    sol, together = gradients(FORMS[form], **options)
    back = sol.stats.backward
    assert back.num_accepted.shape == (6,) and len(set(back.num_accepted.tolist())) > 1
    for row in (0, 5):
        _, alone = gradients(FORMS[form], [row], **options)
        for i in (0, 2, 3):
            torch.testing.assert_close(alone[i][0], together[i][row], rtol=1e-12, atol=1e-12)
    _, exact = gradients("autograd", **options)
    for a, b in zip(exact, together, strict=True):
        assert float((a - b).norm() / a.norm()) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_leave_keep_the_gradients_of_their_data(form):
    generator = torch.Generator().manual_seed(7)
    y0, w, x = (torch.randn(*shape, generator=generator) for shape in ((24, 2), (2, 2), (24, 2)))
    t1 = torch.linspace(0.1, 2.0, 24)

    def run(gradient, compact):
        leaves = [leaf.clone().requires_grad_() for leaf in (y0, w, x)]
        y1 = neurode.solve(
            field, leaves[0], (torch.zeros(24), t1), args=(leaves[1], neurode.per_row(leaves[2])), batch_dim=0, method="tsit5",
            rtol=1e-5, gradient=gradient, compact=compact,
        ).y1  # fmt: skip
        return torch.autograd.grad(y1.square().sum(), leaves)

    for a, b in zip(run(FORMS[form], None), run(FORMS[form], False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_share_a_grid_may_go_back_adaptively(form):
    y0, w, x, _ = data()

    def run(gradient):
        leaves = [leaf.clone().requires_grad_() for leaf in (y0, w, x)]
        sol = neurode.solve(
            field, leaves[0], (0.0, 1.0), args=(leaves[1], neurode.per_row(leaves[2])), batch_dim=0, method="rk4", steps=60,
            gradient=gradient,
        )  # fmt: skip
        return sol, torch.autograd.grad(sol.y1.square().sum(), leaves)

    settings = replace(FORMS[form], method="dopri5", rtol=1e-9, atol=1e-9)
    (_, exact), (sol, found) = run("autograd"), run(settings)
    assert sol.stats.backward.num_accepted.shape == (6,) and sol.stats.backward.method == "dopri5"
    for a, b in zip(exact, found, strict=True):
        assert float((a - b).norm() / a.norm()) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [dict(method="dopri5"), dict(method="rk4", steps=12)], ids=str)
def test_rows_that_fail_leave_shared_gradients_alone(options, form):
    marked = float(data()[2][2, 0])

    def failing(t, y, w, x):
        bad = (x[:, :1] == marked) & (t > 0.2)
        return torch.where(bad, torch.log(-y.square() - 1), field(t, y, w, x))

    good = [0, 1, 3, 4, 5]
    sol, (gy0, gw, gx, _) = gradients(FORMS[form], f=failing, **options)
    _, (ry0, rw, rx, _) = gradients(FORMS[form], good, f=failing, **options)
    assert sol.status.failed.tolist() == [False, False, True, False, False, False]
    torch.testing.assert_close(gw, rw, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gy0[good], ry0, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gx[good], rx, rtol=1e-10, atol=1e-12)
    assert not gy0[2].any() and not gx[2].any()


def test_interpolation_goes_back_where_the_state_cannot():
    """A field that contracts by e^-40: solved backward, the state blows up with the rounding of its end."""
    w = torch.tensor(-40.0, requires_grad=True)
    f, options = lambda t, y: w * (y - torch.cos(t)), dict(method="dopri5", rtol=1e-8, atol=1e-7)
    exact = neurode.solve(f, [2.0], (0, 1), **options).y1
    (want,) = torch.autograd.grad(exact.sum(), w)
    errors = {}
    for name in ("plain", "interpolate"):
        y1 = neurode.solve(f, [2.0], (0, 1), gradient=FORMS[name], **options).y1
        errors[name] = abs(float((torch.autograd.grad(y1.sum(), w)[0] - want) / want))
    assert errors["interpolate"] < 1e-5 < errors["plain"]


@pytest.mark.parametrize("form", ["plain", "quadrature"])
def test_memory_does_not_grow_with_the_steps(form):
    model, y0 = neurode.nn.MLP(2, (32, 32), zero_init=False), torch.randn(64, 2)

    def peak(steps):
        def run():
            y1 = neurode.solve(model, y0, (0, 1), method="rk4", steps=steps, gradient=FORMS[form]).y1
            return torch.autograd.grad(y1.square().mean(), list(model.parameters()))

        return peak_memory(run, excluding=list(model.parameters()))

    assert peak(160) <= 1.1 * peak(20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(norm="l2"), "must be 'all' or 'seminorm'"),
        (dict(norm="all", quadrature=True), r"no part of the ODE.*norm='seminorm'"),
        (dict(interpolate=1), "interpolate=1; it must be True or False"),
        (dict(rtol=-1.0), "must be a number that is not negative"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(neurode.InputError, match=message):
        Continuous(**settings)


def test_what_a_problem_rules_out():
    solve = lambda gradient, **options: neurode.solve(
        lambda t, y: -y, torch.ones(3, 1), (0, 1), batch_dim=0, gradient=gradient, **options
    )
    with pytest.raises(neurode.InputError, match=r"belong to none of them. Type norm='seminorm'"):
        solve(Continuous(norm="all"), method="dopri5")
    with pytest.raises(neurode.InputError, match="explicit one-step method"):
        solve(Continuous(method="explicit_adams"), method="rk4", steps=3)
    with pytest.raises(neurode.InputError, match="no grid to go back on"):
        solve(Continuous(method="rk4"), method="dopri5")
    with pytest.raises(neurode.GradientError, match=r"does not go through dense=True.*gradient='autograd'"):
        solve("continuous", method="dopri5", dense=True)


def falls(gradient, batch_dim):
    """A ball that bounces twice and is stopped at the third touch: the time of each touch moves with everything before it."""
    gravity, loss = torch.tensor(9.81, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    y0 = torch.tensor([[1.0, 0.3], [2.0, -0.2]], requires_grad=True)
    fall = lambda t, y, g, loss: torch.stack([y[..., 1], -g.expand(y.shape[:-1])], -1)
    touch = neurode.Event(
        lambda t, y, g, loss: y[..., 0], direction=-1, terminal=3,
        apply=lambda t, y, g, loss: torch.stack([-0.0 * y[..., 0], -loss * y[..., 1]], -1),
    )  # fmt: skip
    start = y0 if batch_dim == 0 else y0[0]
    sol = neurode.solve(
        fall, start, (0.0, 9.0), args=(gravity, loss), events=[touch], batch_dim=batch_dim, method="dopri5", rtol=1e-9,
        atol=1e-9, gradient=gradient, t_eval=[0.1, 0.6, 1.0],
    )  # fmt: skip
    return sol, (gravity, loss, y0)


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("form", FORMS)
def test_over_bounces_to_a_closed_form(form, batch_dim):
    """Between touches a ball flies for 2 v / g, and each touch takes a share of its speed."""
    sol, leaves = falls(FORMS[form], batch_dim)
    found = torch.autograd.grad(sol.t1.sum(), leaves, retain_graph=True)
    gravity, loss, y0 = leaves
    height, speed = (y0 if batch_dim == 0 else y0[:1]).unbind(-1)
    down = torch.sqrt(speed.square() + 2 * gravity * height)
    end = (speed + down) / gravity + 2 * down * (loss + loss.square()) / gravity
    torch.testing.assert_close(sol.t1.reshape(-1), end, rtol=1e-9, atol=1e-9)
    for a, b in zip(found, torch.autograd.grad(end.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    record = sol.events[0]
    total = sol.ys.nansum() + record.t.square().nansum() + record.y[..., 1].nansum()
    exact, at = falls("autograd", batch_dim)
    other = exact.ys.nansum() + exact.events[0].t.square().nansum() + exact.events[0].y[..., 1].nansum()
    for a, b in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(other, at), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
