"""Values, steps and evaluations beside torchdiffeq's own, for every method and option."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq as theirs

import neurode.torchdiffeq as ours

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
GRID = ("euler", "midpoint", "heun2", "heun3", "rk4")
TOLERANCES = {"rtol": 1e-5, "atol": 1e-6}


class Field(torch.nn.Module):
    """A small network, with counts of evaluations and a record of the steps."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        layers = (torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        self.net = torch.nn.Sequential(*layers).to(dtype)
        self.nfe, self.accepted, self.rejected = 0, [], []

    def forward(self, t, y):
        self.nfe += 1
        turn = torch.stack([y[..., 1], -y[..., 0]], -1)
        return self.net(y) * torch.cos(t) + 0.3 * turn

    def callback_accept_step(self, t0, y0, dt):
        self.accepted.append((float(t0), float(dt)))

    def callback_reject_step(self, t0, y0, dt):
        self.rejected.append((float(t0), float(dt)))


class Silent(Field):
    """The same without callbacks, which methods on a grid do not make."""

    callback_accept_step = callback_reject_step = property()


def start(dtype=torch.float64):
    return torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def both(method, t, options=None, dtype=torch.float64, **tolerances):
    fields, solutions = [], []
    for lib in (ours, theirs):
        field = (Field if method in ADAPTIVE else Silent)(dtype)
        with torch.no_grad():
            solutions.append(lib.odeint(field, start(dtype), t, method=method, options=options, **tolerances))
        fields.append(field)
    return *fields, *solutions


def reference(t):
    return ours.odeint(Silent(), start(), t, method="dopri8", rtol=1e-12, atol=1e-12).detach()


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("ends", [(0.0, 3.0), (2.0, -1.0)])
def test_adaptive_steps_and_evaluations(method, ends):
    t, sign = torch.linspace(*ends, 7), 1.0 if ends[1] > ends[0] else -1.0
    mine, original, ys, expected = both(method, t, **TOLERANCES)
    # All but the last step, which torchdiffeq lets overshoot t[-1] and repeats where that fails.
    steps = min(len(mine.accepted), len(original.accepted)) - 1
    for (t0, dt), (t0_there, dt_there) in zip(mine.accepted[:steps], original.accepted[:steps], strict=True):
        # dopri8's first step is so short that its error is rounding: 1e-4 of it is 1e-5 of the next step.
        close = 1e-4 if method == "dopri8" else 1e-6
        assert t0 == pytest.approx(t0_there, abs=close) and dt == pytest.approx(dt_there, rel=close)
    assert len(mine.accepted) == len(original.accepted)
    before = original.accepted[steps][0] - sign * 1e-4
    late = sum(sign * t0 > sign * before for t0, _ in original.rejected) - sum(
        sign * t0 > sign * before for t0, _ in mine.rejected
    )
    stages = {"dopri8": 13, "dopri5": 6, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 1}[method]
    assert mine.nfe == original.nfe - late * stages
    exact = reference(t)
    # Both are as accurate as the steps that they share; the interpolants and the last step differ.
    assert float((ys - exact).abs().max()) <= 1.5 * float((expected - exact).abs().max())


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_in_float32(method):
    t = torch.linspace(0.0, 3.0, 7, dtype=torch.float32)
    mine, original, ys, expected = both(method, t, dtype=torch.float32, rtol=1e-4, atol=1e-5)
    # What dopri8 estimates here is rounding.
    assert abs(len(mine.accepted) - len(original.accepted)) <= (method == "dopri8")
    torch.testing.assert_close(ys, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", GRID)
@pytest.mark.parametrize("ends", [(0.0, 3.0), (2.0, -1.0)])
@pytest.mark.parametrize(
    "options",
    [
        None,
        {"step_size": 0.1},
        {"step_size": 0.13},
        {"step_size": torch.tensor(0.13)},
        {"step_size": 0.13, "perturb": True},
        {"step_size": 0.13, "interp": "cubic"},
        {"grid_constructor": lambda f, y0, t: torch.cat([t[:1], 0.3 * t[:1] + 0.7 * t[-1:], t[-1:]])},
        {"step_size": 10.0},
    ],
    # Names without addresses: every process of pytest-xdist must collect the same ones.
    ids=lambda options: "-".join(k if callable(v) else f"{k}={v}" for k, v in (options or {"defaults": ""}).items()),
)
def test_methods_on_a_grid(method, ends, options):
    t = torch.linspace(*ends, 7)
    mine, original, ys, expected = both(method, t, options)
    torch.testing.assert_close(ys, expected, rtol=1e-12, atol=1e-13)
    if options is None or options.get("interp") != "cubic":
        assert mine.nfe == original.nfe
    else:  # the derivative at an output's step end starts the next step
        assert mine.nfe <= original.nfe


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "fixed_adams"])
def test_adams(method):
    t, options = torch.linspace(0.0, 3.0, 4), {"step_size": 0.05, "max_order": 4}
    _, _, ys, expected = both(method, t, options)
    exact = reference(t)
    assert float((ys - exact).abs().max()) <= 1.1 * float((expected - exact).abs().max())
    torch.testing.assert_close(ys, expected, rtol=1e-4, atol=1e-4)


def test_adams_default_order_converges():
    """torchdiffeq's default order, 12, does not: its error stays at 2.3e-3."""
    errors = []
    for points in (21, 41):
        t = torch.linspace(0.0, 2.0, points)
        y = ours.odeint(lambda t, y: torch.cos(t) * y, torch.ones(1), t, method="explicit_adams")
        errors.append(abs(float(y[-1]) - float(torch.exp(torch.sin(t[-1])))))
    assert errors[1] < errors[0] / 8 < 1e-3


@pytest.mark.filterwarnings("ignore:The following arguments have no effect for a chosen solver")  # theirs gives it
@pytest.mark.parametrize("solver", ["RK45", "LSODA", "BDF"])
def test_scipy(solver):
    t = torch.linspace(0.0, 3.0, 4)
    _, _, ys, expected = both("scipy_solver", t, {"solver": solver})
    torch.testing.assert_close(ys, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 0.01},
        {"first_step": torch.tensor(0.01), "max_step": 0.2},
        {"min_step": 0.4},
        {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.5},
        {"step_t": [0.5, 2.2, -4.0]},
        {"jump_t": torch.tensor([1.7, 0.9]), "step_t": torch.tensor([1.0])},
        {"norm": lambda y: y.abs().max()},
        {"dtype": torch.float64},
        {"max_num_steps": 20},
    ],
    ids=lambda options: "-".join(options),
)
def test_adaptive_options(options):
    t = torch.linspace(0.0, 3.0, 4)
    mine, original, ys, expected = both("dopri5", t, options, **TOLERANCES)
    for (t0, dt), (t0_there, dt_there) in zip(mine.accepted[:-1], original.accepted[:-1], strict=True):
        assert (t0, dt) == (pytest.approx(t0_there, abs=1e-8), pytest.approx(dt_there, rel=1e-6))
    assert mine.nfe == original.nfe
    torch.testing.assert_close(ys, expected, rtol=1e-2 if "min_step" in options else 2e-4, atol=1e-4)


def test_times_to_hit_when_time_decreases():
    """A list works too; torchdiffeq negates tensors only."""
    starts = []

    class Watched(Silent):
        def callback_step(self, t0, y0, dt):
            starts.append(float(t0))

    for times in ([1.25], torch.tensor([1.25])):
        starts.clear()
        ours.odeint(Watched(), start(), torch.tensor([2.0, 0.0]), options={"step_t": times}, **TOLERANCES)
        assert 1.25 in starts


def test_max_num_steps_counts_from_output_to_output():
    t, options = torch.linspace(0.0, 3.0, 4), {"max_num_steps": 4}
    for lib in (ours, theirs):
        assert len(lib.odeint(Field(), start(), t, options=options, **TOLERANCES)) == 4
        with pytest.raises(AssertionError, match=r"^max_num_steps exceeded \(4>=4\)"):
            lib.odeint(Field(), start(), t[::3], options=options, **TOLERANCES)


def test_tolerances_for_each_element_and_entry():
    t, y0 = torch.linspace(0.0, 2.0, 3), torch.ones(3)
    loose, tight = torch.tensor([1e-2, 1e-2, 1e-9]), torch.full((3,), 1e-9)
    rate = torch.tensor([1.0, 2.0, 3.0])
    for rtol in (loose, loose.tolist()):
        counts = []
        for lib in (ours, theirs):
            calls = []
            lib.odeint(lambda t, y, calls=calls: (calls.append(1), -rate * y)[1], y0, t, rtol=rtol, atol=tight)
            counts.append(len(calls))
        assert counts[0] == counts[1]
    entries = tuple(y0.clone() for _ in range(2))
    ys = [
        lib.odeint(lambda t, y: (-y[0], -5 * y[1]), entries, t, rtol=(1e-3, 1e-9), atol=[1e-6, 1e-9])
        for lib in (ours, theirs)
    ]
    torch.testing.assert_close(ys[0], ys[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_callbacks_get_the_same(method):
    calls = []

    class Watched(torch.nn.Module):
        def forward(self, t, y):
            return (y[1], -y[0])

        def callback_step(self, t0, y0, dt):
            calls.append((t0, y0, dt))

    t = torch.linspace(1.0, 0.0, 3)
    lists = []
    for lib in (ours, theirs):
        calls.clear()
        lib.odeint(Watched(), (torch.zeros(1), torch.ones(1)), t, method=method)
        lists.append(list(calls))
    assert len(lists[0]) == len(lists[1])
    for mine, original in zip(*lists, strict=True):
        assert type(mine[1]) is tuple and float(mine[0]) == pytest.approx(float(original[0]), abs=1e-8)
        torch.testing.assert_close(mine[1], original[1], rtol=1e-6, atol=1e-6)
        assert float(mine[2]) > 0


@pytest.mark.parametrize(("method", "name"), [("rk4", "callback_accept_step"), ("scipy_solver", "callback_step")])
def test_callbacks_that_are_not_made(method, name):
    for lib in (ours, theirs):
        field = Silent()
        object.__setattr__(field, name, lambda t0, y0, dt: None) if name == "callback_step" else None
        if name != "callback_step":
            field = type("Loud", (Silent,), {name: lambda self, t0, y0, dt: None})()
        with pytest.warns(UserWarning, match=f"Solver '{method}' does not support callbacks .*{name}"):
            lib.odeint(field, start(), torch.linspace(0, 1, 3), method=method)
