"""Events and dense solutions: closed forms, and torchdiffeq's own."""

from __future__ import annotations

import math

import pytest
import torch
import torchdiffeq as theirs

import neurode
import neurode.torchdiffeq as ours
from neurode.torchdiffeq import _terminal

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")

G = 9.8
METHODS = [
    {"method": "dopri5"},
    {"method": "dopri8"},
    {"method": "bosh3"},
    {"method": "rk4", "options": {"step_size": 0.01}},
    {"method": "midpoint", "options": {"step_size": 0.01, "interp": "cubic"}},
]
INTERFACES = (ours.odeint, ours.odeint_adjoint)


class Fall(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gravity = torch.nn.Parameter(torch.tensor(G))

    def forward(self, t, state):
        height, speed = state
        return speed, -self.gravity + 0 * height


def ground(t, state):
    return state[0]


@pytest.mark.parametrize("kwargs", METHODS, ids=lambda k: k["method"])
@pytest.mark.parametrize("interface", INTERFACES)
def test_a_falling_stone(kwargs, interface):
    field = Fall()
    height, t0 = torch.tensor([10.0], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    t, (h, v) = ours.odeint_event(
        field, (height, torch.zeros(1)), t0, event_fn=ground, odeint_interface=interface, rtol=1e-8, atol=1e-8, **kwargs
    )
    fall = math.sqrt(2 * 10.0 / G)
    assert t.ndim == 0 and t.dtype == t0.dtype and h.shape == v.shape == (2, 1)
    assert float(t) == pytest.approx(0.5 + fall, abs=1e-6)
    assert h.detach().flatten().tolist() == pytest.approx([10.0, 0.0], abs=1e-6)
    assert float(v[1]) == pytest.approx(-G * fall, abs=1e-5)
    (t + 2 * v[-1].sum()).backward()
    # t = t0 + sqrt(2 h / g), v = -sqrt(2 h g)
    assert float(t0.grad) == pytest.approx(1.0, abs=1e-5)
    slope = 1 / (G * fall) - 2 * G / (G * fall)
    assert float(height.grad) == pytest.approx(slope, rel=1e-4)
    assert float(field.gravity.grad) == pytest.approx(-fall / (2 * G) - 2 * fall / 2, rel=1e-4)


@pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
@pytest.mark.parametrize("reverse", [False, True])
def test_as_torchdiffeq(interface, reverse):
    found = []
    for lib in (ours, theirs):
        field = Fall()
        y0 = (torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 2.0], requires_grad=True))
        t, (h, v) = lib.odeint_event(
            field, y0, torch.tensor(0.3), event_fn=lambda t, y: y[0] + 0.1 * t, reverse_time=reverse,
            odeint_interface=getattr(lib, interface), rtol=1e-9, atol=1e-9,
        )  # fmt: skip
        (t + (h[-1] * torch.tensor([1.0, -2.0])).sum() + v[-1].sum()).backward()
        found.append((t.detach(), h.detach(), v.detach(), y0[0].grad, y0[1].grad, field.gravity.grad))
    for mine, original in zip(*found, strict=True):
        torch.testing.assert_close(mine, original, rtol=1e-6, atol=1e-6)


def test_the_bare_interface_stops_the_gradient_of_the_time():
    height = torch.tensor([10.0], requires_grad=True)
    for interface in INTERFACES:
        t, (h, _) = interface(Fall(), (height, torch.zeros(1)), torch.tensor([0.0, 1.0]), event_fn=ground)
        assert h.shape == (2, 1)
        if (
            t.requires_grad
        ):  # it is an output of the adjoint's node, as in torchdiffeq, whose programs call backward on it
            (still,) = torch.autograd.grad(t, height, retain_graph=True)
            assert float(still) == 0.0
        (grad,) = torch.autograd.grad(h[-1].sum(), height)
        assert float(grad) == pytest.approx(1.0, abs=1e-6)  # at a fixed time


def test_first_of_several_and_booleans():
    several = ours.odeint(
        lambda t, y: torch.ones_like(y), torch.zeros(2), torch.tensor([0.0, 1.0]),
        event_fn=lambda t, y: torch.stack([y[0] - 2.0, 0.5 - y[1], y[0] - 1.0]),
    )[0]  # fmt: skip
    assert float(several) == pytest.approx(0.5, abs=1e-6)
    yes_or_no = ours.odeint(
        lambda t, y: torch.ones_like(y), torch.zeros(1), torch.tensor([0.0, 1.0]), event_fn=lambda t, y: y[0] < 0.75
    )[0]
    assert float(yes_or_no) == pytest.approx(0.75, abs=1e-6)


@pytest.mark.parametrize("g", [lambda t, y: y[0] < 0.75, lambda t, y: 0.75 - y[0].detach()])
def test_an_event_without_a_derivative_is_found_and_refuses_its_gradient(g):
    y0 = torch.zeros(1, requires_grad=True)
    t, y = ours.odeint_event(lambda t, y: torch.ones_like(y), y0, torch.tensor(0.0), event_fn=g)
    assert float(t) == pytest.approx(0.75, abs=1e-3) and y.shape == (2, 1)
    y[0].sum().backward(retain_graph=True)  # the start does not move with the event
    assert float(y0.grad) == 1.0
    for value in (t, y[-1].sum()):
        with pytest.raises(neurode.GradientError, match="no derivative there"):
            value.backward(retain_graph=True)


@pytest.mark.parametrize("kwargs", METHODS, ids=lambda k: k["method"])
def test_a_zero_at_the_start_ends_at_once(kwargs):
    t, y = ours.odeint(lambda t, y: torch.ones_like(y), torch.zeros(1), torch.tensor([0.25, 1.0]),
                       event_fn=lambda t, y: y[0], **kwargs)  # fmt: skip
    assert float(t) == 0.25 and torch.equal(y, torch.zeros(2, 1))


def test_refusals(monkeypatch):
    def field(t, y):
        return -y

    y0, t = torch.ones(1), torch.tensor([0.0, 1.0])

    def event(t, y):
        return y[0] - 2.0

    for lib in (ours, theirs):
        with pytest.raises(ValueError, match=r"^We require len\(t\) == 2 when in event handling mode"):
            lib.odeint(field, y0, torch.tensor([0.0, 1.0, 2.0]), event_fn=event)
        with pytest.raises(AssertionError, match=r"^Event handling for fixed step solvers currently requires"):
            lib.odeint(field, y0, t, event_fn=event, method="rk4")
        with pytest.raises(AttributeError):
            lib.odeint_event(field, y0, 0.0, event_fn=event)
    assert _terminal.MAX_GRID_STEPS == 20_000  # theirs; all of them would take half a minute
    monkeypatch.setattr(_terminal, "MAX_GRID_STEPS", 200)
    with pytest.raises(RuntimeError, match="Reached maximum number of iterations 200"):
        ours.odeint(field, y0, t, event_fn=event, method="euler", options={"step_size": 0.1})
    with pytest.raises(ValueError, match="dopri5"):
        ours.odeint(field, y0, t, event_fn=event, method="scipy_solver")


def test_bouncing_ball():
    """Bounces chained through events: their times differentiate through all earlier ones."""
    height = torch.tensor([10.0], requires_grad=True)
    loss, field = 0.2, Fall()
    t, state = torch.tensor(0.0), (height, torch.zeros(1))
    for _ in range(3):
        t, (h, v) = ours.odeint_event(field, state, t, event_fn=ground, rtol=1e-9, atol=1e-9)
        state = (h[-1] + 1e-10, -(1 - loss) * v[-1])
    fall = math.sqrt(2 * 10.0 / G)
    factor = 1 + 2 * 0.8 + 2 * 0.64
    assert float(t) == pytest.approx(fall * factor, rel=1e-6)
    t.backward()
    assert float(height.grad) == pytest.approx(factor * fall / 20.0, rel=1e-5)


# ---- dense


def test_dense_scalar_vector_and_outside():
    y = ours.odeint_dense(lambda t, y: -y * t, torch.ones(3), torch.tensor(0.0), torch.tensor(2.0))
    original = theirs.odeint_dense(lambda t, y: -y * t, torch.ones(3), torch.tensor(0.0), torch.tensor(2.0))
    torch.testing.assert_close(y(torch.tensor(1.3)), original(torch.tensor(1.3)), rtol=1e-6, atol=1e-6)
    times = torch.linspace(0, 2, 6).reshape(2, 3)
    assert y(times).shape == (2, 3, 3)
    torch.testing.assert_close(y(times)[..., 0], torch.exp(-(times**2) / 2), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="extrapolate"):
        y(torch.tensor(2.5))


@pytest.mark.parametrize("kwargs", [{}, {"method": "rk4", "options": {"step_size": 0.01}}], ids=["dopri5", "rk4"])
def test_dense_backward_in_time_for_tuples_with_gradient(kwargs):
    y0 = torch.ones(2, requires_grad=True)
    y = ours.odeint_dense(lambda t, y: (y[1], -y[0]), (torch.zeros(2), y0), torch.tensor(1.0), torch.tensor(0.0),
                          **kwargs)  # fmt: skip
    sine, _ = y(torch.tensor(0.25))
    assert sine.shape == (2,)
    torch.testing.assert_close(sine, torch.full((2,), math.sin(-0.75)), rtol=1e-6, atol=0)
    sine.sum().backward()
    torch.testing.assert_close(y0.grad, torch.full((2,), math.sin(-0.75)), rtol=1e-6, atol=0)
