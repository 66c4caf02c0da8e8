"""Control of the step: times to be hit, jumps, bounds, controllers, first steps."""

from __future__ import annotations

import math

import pytest
import torch

import neurode
from neurode import PID

BATCH = pytest.mark.parametrize("batch_dim", [None, 0])
OPTIONS = dict(method="dopri5", rtol=1e-8, atol=1e-10)


def accepted(sol):
    """The times of all accepted steps, of the first row."""
    return sol.ts if sol.ts.ndim == 1 else sol.ts[:, 0][~torch.isnan(sol.ts[:, 0])]


def switched(t, y):
    """dy/dt jumps from 1 to -2 at t = 0.4, and to 5 at t = 1.1."""
    return torch.where(t < 0.4, 1.0, torch.where(t < 1.1, -2.0, 5.0)) + 0 * y


def switched_exact(t):
    return min(t, 0.4) - 2 * (min(t, 1.1) - min(t, 0.4)) + 5 * max(t - 1.1, 0.0)


@BATCH
@pytest.mark.parametrize("span", [(0.0, 2.0), (2.0, 0.0)])
def test_jump_at_solves_a_switched_field_exactly(batch_dim, span):
    """Between jumps the field is constant, so with the jumps known there is no error and no rejected step."""
    times = torch.linspace(*span, 21)
    start = torch.full((2, 1), switched_exact(span[0]))
    sol = neurode.solve(switched, start, span, jump_at=[1.1, 0.4], t_eval=times, batch_dim=batch_dim, **OPTIONS)
    want = torch.tensor([switched_exact(t) for t in times.tolist()])
    assert (sol.ys[:, 0, 0] - want).abs().max() < 1e-12
    assert torch.as_tensor(sol.stats.num_rejected).max() == 0
    blind = neurode.solve(switched, start, span, batch_dim=batch_dim, **OPTIONS)
    assert torch.as_tensor(blind.stats.num_rejected).min() > 5


@BATCH
def test_jump_at_drops_the_derivative_known_from_before(batch_dim):
    """FSAL would carry the derivative of the left side into the step on the right."""
    calls = []

    def f(t, y):
        calls.append(float(t.flatten()[0]))
        return switched(t, y)

    neurode.solve(f, torch.zeros(1, 1), (0, 1), jump_at=[0.4], batch_dim=batch_dim, **OPTIONS)
    near = sorted(t for t in calls if abs(t - 0.4) < 1e-12)
    assert near[0] < 0.4 < near[-1]  # seen from both sides, never at the jump itself
    assert 0.4 not in calls


@BATCH
def test_step_at_ends_steps_there_and_evaluates_nothing_more(batch_dim):
    f, y0 = lambda t, y: -y, torch.ones(1, 1)
    stops = [0.31, 0.77, -1.0, 5.0]
    sol = neurode.solve(f, y0, (0, 1), step_at=stops, t_eval="steps", batch_dim=batch_dim, **OPTIONS)
    times = accepted(sol).tolist()
    assert 0.31 in times and 0.77 in times and -1.0 not in times and 5.0 not in times
    attempts = int(torch.as_tensor(sol.stats.num_accepted + sol.stats.num_rejected).max())
    assert int(torch.as_tensor(sol.stats.num_evaluations).max()) == 2 + 6 * attempts
    assert sol.y1.item() == pytest.approx(math.exp(-1), rel=1e-8)


@BATCH
def test_a_step_cut_short_does_not_shorten_the_next(batch_dim):
    f, y0 = lambda t, y: torch.cos(t) + 0 * y, torch.zeros(1, 1)
    plain = neurode.solve(f, y0, (0, 10), batch_dim=batch_dim, **OPTIONS)
    cut = neurode.solve(f, y0, (0, 10), step_at=[3.0, 3.0 + 1e-7, 6.0], batch_dim=batch_dim, **OPTIONS)
    more = torch.as_tensor(cut.stats.num_accepted - plain.stats.num_accepted)
    assert 1 <= int(more.max()) <= 6
    forgetful = neurode.solve(
        f, y0, (0, 10), step_at=[3.0, 3.0 + 1e-7, 6.0], controller=PID(retain=False), batch_dim=batch_dim, **OPTIONS
    )
    assert torch.as_tensor(forgetful.stats.num_accepted).max() > torch.as_tensor(cut.stats.num_accepted).max()


@BATCH
def test_max_step_and_min_step_bound_the_steps(batch_dim):
    f, y0 = lambda t, y: -y, torch.ones(1, 1)
    sol = neurode.solve(f, y0, (0, 1), max_step=0.05, t_eval="steps", batch_dim=batch_dim, method="dopri5")
    assert accepted(sol).diff().max() <= 0.05 * 1.0101 and int(torch.as_tensor(sol.stats.num_accepted).max()) >= 20
    sol = neurode.solve(
        f, y0, (0, 1), min_step=0.1, t_eval="steps", batch_dim=batch_dim, method="bosh3", rtol=1e-12, atol=1e-14
    )
    assert accepted(sol).diff()[:-1].min() >= 0.1 - 1e-12 and sol.success


@BATCH
def test_the_first_step_given_is_taken(batch_dim):
    sol = neurode.solve(
        lambda t, y: -y, torch.ones(1, 1), (0, 1), first_step=1e-3, t_eval="steps", batch_dim=batch_dim, **OPTIONS
    )
    assert accepted(sol)[1].item() == 1e-3


CONTROLLERS = {"i": PID.i(), "pi": PID.pi(), "pi34": PID.pi34(), "h312": PID.h312(), "pid": PID(0.1, 0.3, 0.05)}


@BATCH
@pytest.mark.parametrize("name", CONTROLLERS)
def test_every_controller_keeps_the_tolerance(name, batch_dim):
    f = lambda t, y: torch.stack([y[..., 1], 5 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)
    y0 = torch.tensor([[2.0, 0.0]])
    want = neurode.solve(f, y0, (0, 10), method="dop853", rtol=1e-12, atol=1e-12).y1
    sol = neurode.solve(
        f, y0, (0, 10), controller=CONTROLLERS[name], batch_dim=batch_dim, method="tsit5", rtol=1e-7, atol=1e-7
    )
    assert (sol.y1 - want).abs().max() < 1e-4
    assert torch.as_tensor(sol.stats.num_rejected).max() < 0.25 * torch.as_tensor(sol.stats.num_accepted).max()


def test_the_elementary_controller_by_hand():
    """err = C h^k exactly, so one step after another has the size that makes the ratio safety^k."""
    control = PID.i()
    assert control.grow(0.5, (), 5.0, False) == pytest.approx(0.9 * 0.5 ** (-1 / 5))
    assert control.shrink(32.0, 5.0) == pytest.approx(0.45)
    assert control.shrink(float("inf"), 5.0) == 0.2 and control.grow(0.0, (), 5.0, False) == 10.0


def test_the_pi_controller_by_hand():
    """DOPRI5: fac = 0.9 err^-0.17 err_old^0.04."""
    control = PID.pi()
    assert control.grow(0.5, (0.25,), 5.0, False) == pytest.approx(0.9 * 0.5**-0.17 * 0.25**0.04)
    assert control.remember(0.5, (0.25,)) == (0.5,) and control.remember(1e-9, ()) == (1e-4,)
    assert control.grow(1e-3, (0.25,), 5.0, True) == 1.0  # no growth directly after a rejection


def test_float_and_tensor_control_agree():
    for control in CONTROLLERS.values():
        history = (0.3, 0.6)[: control.memory]
        wide = tuple(torch.tensor([h]) for h in history)
        for ratio in (1e-6, 0.4, 1.0):
            one = control.grow(ratio, history, 5.0, False)
            many = control.grow(torch.tensor([ratio]), wide, 5.0, torch.tensor([False]))
            assert one == pytest.approx(many.item(), rel=1e-14)
        assert control.shrink(7.0, 4.0) == pytest.approx(control.shrink(torch.tensor([7.0]), 4.0).item(), rel=1e-14)


def test_the_first_step_is_hairer_s():
    """II.4 by hand for y' = -y, y0 = 1, rtol = atol = 1e-6: d0 = d1 = 5e5, h0 = 0.01, d2 = 5e5, h1 = (0.01 / 5e5)^(1/5)."""
    sol = neurode.solve(
        lambda t, y: -y,
        torch.ones(1),
        (0, 10),
        method="dopri5",
        rtol=1e-6,
        atol=1e-6,
        t_eval="steps",
        controller=PID.i(),
    )
    h1 = (0.01 / 5e5) ** 0.2
    assert sol.ts[1].item() == pytest.approx(h1, rel=1e-9)


def test_a_row_s_own_tolerance():
    f, y0 = lambda t, y: -y, torch.ones(2, 1)
    sol = neurode.solve(
        f,
        y0,
        (0, 3),
        batch_dim=0,
        method="dopri5",
        rtol=torch.tensor([[1e-3], [1e-10]]),
        atol=torch.tensor([[1e-4], [1e-12]]),
    )
    errors = (sol.y1 - math.exp(-3)).abs().flatten()
    assert errors[1] < 1e-9 < errors[0] and sol.stats.num_accepted[1] > 4 * sol.stats.num_accepted[0]
    for row, (rtol, atol) in enumerate(((1e-3, 1e-4), (1e-10, 1e-12))):
        alone = neurode.solve(f, y0[row], (0, 3), method="dopri5", rtol=rtol, atol=atol)
        assert int(sol.stats.num_accepted[row]) == alone.stats.num_accepted
    with pytest.raises(neurode.InputError, match="rows or columns"):
        neurode.solve(f, torch.ones(2, 2), (0, 3), batch_dim=0, rtol=torch.tensor([1e-3, 1e-4]))
