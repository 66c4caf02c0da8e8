"""The reversible coupling as a method: its facts, its order, its inverse, and what goes through it."""

from __future__ import annotations

import math

import pytest
import torch

import neurode
from neurode import Event, Reversible
from neurode._field import Field
from neurode._state import read_state
from neurode.methods import METHODS
from neurode.stepping import Interval, stepper

EXPLICIT = [name for name, method in METHODS.items() if method.kind == "explicit"]


def turning(t, y):
    return (1 + t) * (y @ y) * torch.stack([y[1], -y[0]])


def exact(t):
    angle = t + t * t / 2
    return torch.stack([angle.sin(), angle.cos()], -1)


def kepler(t, y):
    return torch.cat([y[2:], -y[:2] / (y[:2] @ y[:2]) ** 1.5])


def kepler_exact(t, e=0.3):
    """Kepler's ellipse of eccentricity e by Newton's iteration (Hairer, Norsett & Wanner 1993, I.16)."""
    a = t.clone()
    for _ in range(30):
        a = a - (a - e * a.sin() - t) / (1 - e * a.cos())
    r, b = 1 - e * a.cos(), math.sqrt(1 - e * e)
    return torch.stack([a.cos() - e, b * a.sin(), -a.sin() / r, b * a.cos() / r], -1)


def slope(steps, errors):
    """The order by least squares in logarithms."""
    x, y = -torch.log(torch.tensor(steps).double()), torch.log(torch.tensor(errors).double())
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def options_of(name, steps, t1):
    """An adaptive method on equal steps: tolerances that accept whatever comes."""
    h = t1 / steps
    adaptive = dict(rtol=1e6, atol=1e6, first_step=h, max_step=h * (1 + 1e-12))
    return adaptive if METHODS[name].adaptive else dict(steps=steps)


# The order shows where the two states have found their distance, after some 1 / (1 - coupling) steps: at the default
# coupling that takes thousands. With fewer steps the errors of both halves cancel in part, and the error is no power of h.
COUPLING = 0.7
RANGES = {1: [640, 1280, 2560], 2: [160, 320, 640], 3: [120, 160, 240, 320], 4: [96, 128, 192], 5: [60, 80, 120, 160]}
HIGH = (turning, exact, 2.0, [20, 24, 28, 32])  # of the methods of high order, dop853 has a range that is wide enough


@pytest.mark.parametrize("name", [*EXPLICIT[:8], "bosh3", "dopri5", "dop853"])
def test_order_of_the_end_and_of_the_outputs(name, record_property):
    method = Reversible(name, COUPLING)
    f, solution, t1, steps = HIGH if name == "dop853" else (kepler, kepler_exact, 3.0, RANGES[method.order])
    times, y0, end = torch.linspace(0.0, t1, 111), solution(torch.tensor(0.0)), solution(torch.tensor(t1))
    ends, outputs = [], []
    for n in steps:
        sol = neurode.solve(f, y0, (0.0, t1), method=method, t_eval=times, **options_of(name, n, t1))
        assert sol.stats.num_accepted == n
        ends.append(float((sol.y1 - end).abs().max()))
        outputs.append(float((sol.ys - solution(times)).abs().max()))
    record_property("order", (slope(steps, ends), slope(steps, outputs)))
    assert abs(slope(steps, ends) - method.order) <= 0.2
    assert slope(steps, outputs) >= min(method.order, method.dense_order + 1) - 0.2


@pytest.mark.parametrize("name", EXPLICIT)
def test_with_the_default_coupling_it_is_about_as_accurate_as_its_method(name):
    options = options_of(name, 40, 2.0)
    error = lambda method: float(
        (
            neurode.solve(turning, exact(torch.tensor(0.0)), (0, 2), method=method, **options).y1
            - exact(torch.tensor(2.0))
        )
        .abs()
        .max()
    )
    assert error(Reversible(name)) <= 12 * error(name)


@pytest.mark.parametrize("name", EXPLICIT)
def test_a_step_is_undone_exactly(name):
    method = Reversible(name, 0.9)
    stepping, y = stepper(method), torch.tensor([0.3, 0.9])
    layout, y = read_state(y, None)
    field, interval, z = Field(turning, layout), Interval(0.2, 0.5, torch.float64), y + torch.tensor([1e-3, -2e-3])
    step = stepping.step(field, interval, y, z)
    times = interval.times(method.C, y, field.time_dtype)
    back = stepping.down(field, times, step.y1, interval.h)
    z0 = stepping.old_z(step.carry, back, interval.h)
    y0 = stepping.old_y(step.y1, z0, stepping.up(field, times, z0, interval.h), interval.h)
    limit = 1e-12 if name == "verner6" else 1e-14  # whose weights are as large as 176
    assert float((z0 - z).abs().max()) <= limit and float((y0 - y).abs().max()) <= limit
    assert field.num_calls == 2 * method.num_evaluations_per_step


@pytest.mark.parametrize("name", EXPLICIT)
def test_facts(name):
    base, method = METHODS[name], Reversible(name)
    assert (method.order, method.order_error, method.adaptive, method.dense_order) == (
        base.order, base.order_error, base.adaptive, base.dense_order,
    )  # fmt: skip
    sol = neurode.solve(
        turning, [0.0, 1.0], (0, 1), method=method, rtol=1e-4, **({} if method.adaptive else {"steps": 5})
    )
    attempts = sol.stats.num_accepted + sol.stats.num_rejected
    started = 2 if method.adaptive else 0  # the derivative at the start, and one behind it, which choose the first step
    assert sol.stats.num_evaluations == attempts * method.num_evaluations_per_step + started
    assert sol.stats.method == f"reversible({name})"


@pytest.mark.parametrize("name", EXPLICIT)
def test_the_pieces_meet_at_the_steps(name):
    options = {} if METHODS[name].adaptive else {"steps": 9}
    y0 = torch.tensor([[0.0, 1.0], [0.6, -0.3]])
    rows = lambda t, y: (1 + t) * y.square().sum(1, keepdim=True) * torch.stack([y[:, 1], -y[:, 0]], 1)
    sol = neurode.solve(
        rows, y0, (0, 1), method=Reversible(name, 0.9), batch_dim=0, dense=True, t_eval="steps", **options
    )
    for row, count in enumerate(sol.stats.num_accepted.tolist()):
        times = sol.ts[: count + 1, row] if sol.ts.ndim == 2 else sol.ts
        for side in (0.0, 1e-9, -1e-9):
            t = (times + side).clamp(0, 1)
            states = sol(t.unsqueeze(1).expand(-1, 2))[:, row]
            torch.testing.assert_close(states, sol.ys[: count + 1, row], rtol=0, atol=1e-8)


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_events_stop_and_bounce(batch_dim):
    """A ball: the coupled state starts anew from what `apply` returns."""
    fall = lambda t, y: torch.stack([y[..., 1], torch.full_like(y[..., 1], -9.81)], -1)
    y0 = torch.tensor([[10.0, 0.0], [5.0, 0.0]]) if batch_dim == 0 else torch.tensor([10.0, 0.0])
    bounce = Event(lambda t, y: y[..., 0], -1, apply=lambda t, y: y * torch.tensor([1.0, -0.5]))
    kwargs = dict(events=[bounce], batch_dim=batch_dim, rtol=1e-8, atol=1e-10)
    plain = neurode.solve(fall, y0, (0, 3), method="dopri5", **kwargs)
    coupled = neurode.solve(fall, y0, (0, 3), method=Reversible("dopri5"), **kwargs)
    torch.testing.assert_close(coupled.y1, plain.y1, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(coupled.events[0].t, plain.events[0].t, rtol=1e-7, atol=1e-7, equal_nan=True)


def test_rows_do_not_meet_at_jumps_and_events_of_others():
    """A row's numbers are those that it has alone, whatever happens in others."""
    f = lambda t, y: torch.where(t < 0.5, 1.0, -1.0) * torch.stack([y[..., 1], -y[..., 0]], -1)
    y0 = torch.tensor([[1.0, 0.0], [0.2, 0.9], [-0.4, 0.3]])
    t1 = torch.tensor([1.0, 2.0, 0.4])
    event = Event(lambda t, y: t[:, 0] * (1 + y.square().sum(1)) - 0.3, apply=lambda t, y: y.flip(1))
    options = dict(method=Reversible("bosh3"), events=[event], jump_at=[0.5], batch_dim=0, rtol=1e-5)
    together = neurode.solve(f, y0, (torch.zeros(3), t1), **options).y1
    for row in range(3):
        alone = neurode.solve(f, y0[row : row + 1], (torch.zeros(1), t1[row : row + 1]), **options).y1
        torch.testing.assert_close(alone[0], together[row], rtol=1e-12, atol=1e-12)


def test_rows_that_leave_keep_their_numbers():
    f = lambda t, y: torch.stack([y[..., 1], -y[..., 0]], -1) * (1 + y.square().sum(-1, keepdim=True))
    y0, t1 = torch.randn(24, 2), torch.linspace(0.1, 3.0, 24)
    solve = lambda compact: neurode.solve(
        f, y0, (torch.zeros(24), t1), method=Reversible("tsit5"), batch_dim=0, compact=compact, rtol=1e-5
    )
    torch.testing.assert_close(solve(True).y1, solve(False).y1, rtol=1e-12, atol=1e-12)


def test_complex_states_and_backward_time():
    y0 = torch.tensor([1.0 + 0.5j])
    sol = neurode.solve(lambda t, y: (0.3 + 1j) * y, y0, (1.0, 0.0), method=Reversible("rk4"), steps=40)
    torch.testing.assert_close(sol.y1, y0 * torch.exp(torch.tensor(-0.3 - 1j)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["explicit_adams", "leapfrog"])
def test_other_kinds_of_method_are_refused(name):
    with pytest.raises(neurode.InputError, match=r"explicit one-step methods.*Type neurode.Reversible\('rk4'\)"):
        Reversible(name)
    with pytest.raises(neurode.InputError, match="explicit one-step methods"):
        Reversible(Reversible("rk4"))


@pytest.mark.parametrize("coupling", [0, -0.5, 1.01, True, "0.9", None, float("nan")])
def test_couplings_out_of_range_are_refused(coupling):
    with pytest.raises(neurode.InputError, match=r"number in \(0, 1\]"):
        Reversible("rk4", coupling)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(neurode.UnknownOptionError, match="Did you mean 'rk4'"):
        Reversible("rk44")
