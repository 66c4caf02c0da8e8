"""Events: times and states against closed forms, order in time, restarts, rows, gradients, and how they end."""

from __future__ import annotations

import math

import pytest
import torch

import neurode
from neurode import Event, Status

G = 9.81
FIXED, ADAPTIVE = dict(method="rk4", steps=40), dict(method="dopri5", rtol=1e-9, atol=1e-9)
BOTH = pytest.mark.parametrize("options", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
BATCH = pytest.mark.parametrize("batch_dim", [None, 0])


def fall(t, y):
    """Height and speed of a stone."""
    return torch.stack([y[..., 1], torch.full_like(y[..., 1], -G)], -1)


def height(t, y):
    return y[..., 0]


def bounce(keep):
    """Leave the ground with the share `keep` of the speed."""
    return lambda t, y: torch.stack([torch.zeros_like(y[..., 0]), -keep * y[..., 1]], -1)


def bounce_times(h0, keep, count):
    """The first drop, then flights of `2 v / g`."""
    first = (2 * h0 / G) ** 0.5
    times, v, t = [first], G * first, first
    for _ in range(count - 1):
        v = keep * v
        t = t + 2 * v / G
        times.append(t)
    return times


# ---- a bouncing ball


@BOTH
@pytest.mark.parametrize("keep", [0.9, 0.5])
def test_a_bouncing_ball(options, keep):
    event = Event(height, direction=-1, apply=bounce(keep))
    sol = neurode.solve(fall, [10.0, 0.0], (0, 3.9), events=[event], **options)
    want = [t for t in bounce_times(10.0, keep, 8) if t < 3.9]
    assert sol.events[0].count == len(want) and sol.status is Status.SUCCESS
    assert torch.allclose(sol.events[0].t, torch.tensor(want), rtol=0, atol=1e-9)
    assert sol.events[0].y.shape == (len(want), 2) and sol.events[0].y[:, 0].abs().max() < 1e-9
    s, v = 3.9 - want[-1], keep ** len(want) * G * want[0]
    assert sol.y1[0].item() == pytest.approx(v * s - G * s * s / 2, abs=1e-7)


@BOTH
def test_balls_of_a_batch_bounce_on_their_own(options):
    heights = torch.tensor([10.0, 2.0, 30.0, 5.0])
    y0 = torch.stack([heights, torch.zeros(4)], 1)
    event = Event(height, direction=-1, apply=bounce(0.7))
    ends = torch.tensor([3.0, 2.5, 2.0, 3.5])
    sol = neurode.solve(fall, y0, (0.0, ends), events=[event], batch_dim=0, **options)
    record = sol.events[0]
    for row in range(4):
        want = [t for t in bounce_times(float(heights[row]), 0.7, 12) if t < float(ends[row])]
        assert int(record.count[row]) == len(want)
        assert torch.allclose(record.t[: len(want), row], torch.tensor(want), rtol=0, atol=1e-9)
        assert torch.isnan(record.t[len(want) :, row]).all() and torch.isnan(record.y[len(want) :, row]).all()
        mine = slice(row, row + 1)
        alone = neurode.solve(fall, y0[mine], (0.0, ends[mine]), events=[event], batch_dim=0, **options)
        assert torch.allclose(alone.y1[0], sol.y1[row], rtol=1e-9, atol=1e-9)


@BATCH
def test_outputs_and_dense_output_see_both_sides_of_a_jump(batch_dim):
    """A dose at t = 1 doubles what is left."""
    dose = Event(lambda t, y: (t - 1).reshape(-1) if batch_dim == 0 else t - 1, apply=lambda t, y: 2 * y)
    y0 = torch.tensor([[3.0]])
    times = torch.tensor([0.5, 0.999, 1.001, 1.5])
    sol = neurode.solve(
        lambda t, y: -y, y0, (0, 2), events=[dose], t_eval=times, dense=True, batch_dim=batch_dim, **ADAPTIVE
    )
    want = 3 * torch.exp(-times) * torch.where(times > 1, 2.0, 1.0)
    assert torch.allclose(sol.ys.flatten(), want, rtol=1e-7)
    query = times if batch_dim is None else times.unsqueeze(1)
    assert torch.allclose(sol(query).flatten(), want, rtol=1e-7)
    assert torch.allclose(sol.derivative(query).flatten(), -want, rtol=1e-5)
    assert sol.y1.item() == pytest.approx(6 * math.exp(-2), rel=1e-7)


# ---- which events, and in which order


@BOTH
@BATCH
@pytest.mark.parametrize("way", [1.0, -1.0])
def test_directions_follow_the_integration(options, batch_dim, way):
    """cos(t) falls through zero at pi/2 and rises at 3 pi/2, either way along time."""
    f = lambda t, y: -torch.sin(t) + 0 * y
    g = lambda t, y: y[..., 0] if batch_dim == 0 else y[0, 0]
    events = [Event(g, direction=d) for d in (-1, 0, 1)]
    sol = neurode.solve(f, torch.ones(1, 1), (0, way * 2 * math.pi), events=events, batch_dim=batch_dim, **options)
    half = math.pi / 2
    limit = 1e-6 if "steps" in options else 1e-8
    for event, want in zip(sol.events, ([half], [half, 3 * half], [3 * half]), strict=True):
        assert torch.allclose(event.t.flatten(), way * torch.tensor(want), atol=limit)


@BATCH
@pytest.mark.parametrize("first", [0, 1])
def test_the_earliest_in_time_wins_whatever_the_order_of_the_list(batch_dim, first):
    """Both lie in the one step that there is; the later one must not happen."""

    def at(when):
        return Event(lambda t, y: y.reshape(-1)[:1].reshape(() if batch_dim is None else 1) - when, terminal=True)

    events = [at(0.61), at(0.43)] if first else [at(0.43), at(0.61)]
    sol = neurode.solve(
        lambda t, y: torch.ones_like(y), torch.zeros(1, 1), (0, 1), events=events, method="rk4", steps=1,
        batch_dim=batch_dim,
    )  # fmt: skip
    counts = [int(event.count) for event in sol.events]
    assert counts == ([0, 1] if first else [1, 0])
    assert float(sol.t1) == pytest.approx(0.43, abs=1e-12) and float(sol.y1) == pytest.approx(0.43, abs=1e-12)
    assert sol.status is Status.TERMINATED if batch_dim is None else sol.status[0] is Status.TERMINATED


def test_an_event_that_another_one_s_restart_prevents_does_not_happen():
    """At 0.3 the state is thrown back by 1: it does not reach 0.6 in the same step any more."""
    back = Event(lambda t, y: y - 0.3, direction=1, apply=lambda t, y: y - 1)
    never = Event(lambda t, y: y - 0.6, direction=1)
    sol = neurode.solve(lambda t, y: torch.ones_like(y), 0.0, (0, 1), events=[never, back], method="rk4", steps=1)
    assert sol.events[0].count == 0 and sol.events[1].count == 1
    assert sol.y1.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("start", [0.0, 0.01, 0.1, 0.124, 0.25, 0.33, 0.5, 0.77, 0.86])
def test_crossings_further_apart_than_an_eighth_of_a_step_are_found(start):
    """g passes zero at `start` (or begins there) and back an eighth of the only step later, and a little."""
    a, b = start, start + 0.1251
    both = Event(lambda t, y: (y - a) * (y - b))
    sol = neurode.solve(lambda t, y: torch.ones_like(y), 0.0, (0, 1), events=[both], method="rk4", steps=1)
    want = [x for x in (a, b) if 0 < x < 1]
    assert sol.events[0].t.tolist() == pytest.approx(want, abs=1e-9)


@BATCH
@pytest.mark.parametrize("number", [1, 2, 5, True])
def test_terminal_at_the_nth(batch_dim, number):
    f = lambda t, y: torch.cos(t) + 0 * y
    event = Event(lambda t, y: y if batch_dim is None else y[:, 0], terminal=number)
    y0 = torch.tensor(0.5) if batch_dim is None else torch.tensor([[0.5]])
    sol = neurode.solve(f, y0, (0, 40), events=[event], t_eval=[0.1, 39.0], batch_dim=batch_dim, **ADAPTIVE)
    crossings = sorted(
        t + 2 * math.pi * k for k in range(6) for t in (math.pi + math.asin(0.5), 2 * math.pi - math.asin(0.5))
    )
    assert float(sol.t1) == pytest.approx(crossings[int(number) - 1], abs=1e-6)
    assert int(sol.events[0].count) == int(number)
    assert torch.isnan(sol.ys[1]).all() and not torch.isnan(sol.ys[0]).any()


@BOTH
@BATCH
def test_a_zero_at_the_start_or_just_after_apply_does_not_fire(options, batch_dim):
    g = (lambda t, y: y[0, 0]) if batch_dim is None else height
    y0 = torch.tensor([[0.0, 5.0]])  # on the ground, going up
    sol = neurode.solve(fall, y0, (0, 2), events=[Event(g, apply=bounce(1.0))], batch_dim=batch_dim, **options)
    flight = 10.0 / G
    assert int(sol.events[0].count) == 1
    assert sol.events[0].t.flatten()[0].item() == pytest.approx(flight, abs=1e-9)


@BATCH
def test_an_event_exactly_at_the_end_is_one(batch_dim):
    event = Event(lambda t, y: y - 1 if batch_dim is None else y[:, 0] - 1, terminal=True)
    y0 = torch.tensor(0.0) if batch_dim is None else torch.zeros(1, 1)
    sol = neurode.solve(
        lambda t, y: torch.ones_like(y), y0, (0, 1), events=[event], method="euler", steps=4, batch_dim=batch_dim
    )
    assert int(sol.events[0].count) == 1 and float(sol.t1) == 1.0


@BATCH
def test_a_span_without_length_has_no_events(batch_dim):
    event = Event(lambda t, y: y[..., 0] - 1 if batch_dim == 0 else y[0, 0] - 1, terminal=True)
    sol = neurode.solve(fall, torch.ones(1, 2), (1, 1), events=[event], batch_dim=batch_dim, **ADAPTIVE)
    assert int(sol.events[0].count) == 0 and torch.equal(sol.y1, torch.ones(1, 2))


def test_rows_end_one_by_one_and_the_rest_goes_on():
    y0 = torch.linspace(0.1, 3.0, 30).unsqueeze(1)
    event = Event(lambda t, y: y[:, 0] - 2, terminal=True)
    sol = neurode.solve(lambda t, y: y, y0, (0, 1), events=[event], batch_dim=0, **ADAPTIVE)
    reached = (y0[:, 0] < 2) & (y0[:, 0] * math.e > 2)
    assert [status is Status.TERMINATED for status in sol.status] == reached.tolist()
    assert torch.allclose(sol.t1[reached], torch.log(2 / y0[reached, 0]), atol=1e-8)
    assert torch.equal(sol.ts[0], sol.t1) and torch.allclose(sol.y1[reached], torch.tensor(2.0), atol=1e-8)
    assert torch.allclose(sol.y1[~reached], y0[~reached] * math.e, rtol=1e-7)


def test_arguments_reach_g_and_apply_and_follow_their_rows():
    limit = torch.tensor([[1.5], [2.0], [9.0]])
    seen = []

    def g(t, y, limit):
        seen.append((tuple(t.shape), tuple(y.shape), tuple(limit.shape)))
        return (y - limit)[:, 0]

    event = Event(g, apply=lambda t, y, limit: 0.5 * limit + 0 * y)
    sol = neurode.solve(
        lambda t, y, limit: y, torch.ones(3, 1), (0, 1), args=(neurode.per_row(limit),), events=[event], batch_dim=0,
        **ADAPTIVE,
    )  # fmt: skip
    assert set(seen) == {((3, 1), (3, 1), (3, 1))}
    assert sol.events[0].count.tolist() == [1, 1, 0]
    assert torch.allclose(sol.events[0].t[0, :2], limit[:2, 0].log(), atol=1e-8)
    left = 1 - limit[:2, 0].log()
    assert torch.allclose(sol.y1[:2, 0], 0.5 * limit[:2, 0] * left.exp(), rtol=1e-7)


def test_events_of_a_pytree():
    f = lambda t, y: {"h": y["v"], "v": torch.full_like(y["v"], -G)}
    land = Event(lambda t, y: y["h"], direction=-1, apply=lambda t, y: {"h": torch.zeros_like(y["h"]), "v": -y["v"]})
    sol = neurode.solve(f, {"h": torch.tensor(2.0), "v": torch.tensor(0.0)}, (0, 1), events=[land], **ADAPTIVE)
    assert sol.events[0].t.item() == pytest.approx((4 / G) ** 0.5, abs=1e-9)
    assert sol.events[0].y["v"].item() == pytest.approx(-((4 * G) ** 0.5), abs=1e-7)


def test_events_at_one_time_happen_in_the_order_of_the_list():
    """(1 + 1) * 2; what stops the solve stops what is behind it in the list, too."""
    stay = lambda t, y: 0 * y
    more, twice = (Event(lambda t, y: t - 1, apply=change) for change in (lambda t, y: y + 1, lambda t, y: 2 * y))
    stop = Event(lambda t, y: t - 1, terminal=True)
    run = lambda *events: neurode.solve(stay, torch.ones(1), (0, 3), events=events, **ADAPTIVE)
    assert run(more, twice).y1.item() == 4 and run(twice, more).y1.item() == 3
    sol = run(more, stop, twice)
    assert sol.status is Status.TERMINATED and sol.y1.item() == 2 and [e.count for e in sol.events] == [1, 1, 0]
    rows = neurode.solve(
        lambda t, y: 0 * y, torch.ones(2, 1), (0, torch.tensor([3.0, 0.5])), batch_dim=0,
        events=[Event(lambda t, y: (t - 1)[:, 0], apply=e.apply) for e in (more, twice)], **ADAPTIVE,
    )  # fmt: skip
    assert rows.y1.flatten().tolist() == [4.0, 1.0]


@pytest.mark.parametrize("gradient", ["autograd", "discrete"])
def test_gradients_of_events_at_one_time_are_those_of_their_order(gradient):
    """y1 = 2 (y0 + k)."""
    y0, k = torch.ones(1, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    more, twice = (
        Event(lambda t, y: t - 1, apply=lambda t, y: y + k),
        Event(lambda t, y: t - 1, apply=lambda t, y: 2 * y),
    )
    sol = neurode.solve(lambda t, y: 0 * y * k, y0, (0, 3), events=[more, twice], gradient=gradient, **ADAPTIVE)
    assert [g.item() for g in torch.autograd.grad(sol.y1.sum(), (y0, k))] == pytest.approx([2.0, 2.0])


@BOTH
def test_doses_at_every_whole_time_the_last_at_the_very_end(options):
    """y -> y + 1 at t = 1, ..., 8 and decay between: a geometric sum."""
    e = math.exp(-1)
    want = sum(e**k for k in range(8)) + e**8
    beat = lambda t, y: torch.sin(math.pi * (t + 1e-12))
    sol = neurode.solve(
        lambda t, y: -y, torch.ones(1), (0, 8), events=[Event(beat, apply=lambda t, y: y + 1)], **options
    )
    assert sol.events[0].count == 8 and sol.status is Status.SUCCESS
    assert sol.y1.item() == pytest.approx(want, abs=1e-4 if "steps" in options else 1e-7)


@BOTH
@BATCH
@pytest.mark.parametrize("same_span", [True, False])
def test_an_event_with_apply_exactly_at_the_end(options, batch_dim, same_span):
    g = (lambda t, y: t - 1) if batch_dim is None else (lambda t, y: (t - 1)[:, 0])
    t1 = 1.0 if same_span or batch_dim is None else torch.tensor([1.0, 2.0])
    event = Event(g, apply=lambda t, y: y + 1)
    sol = neurode.solve(
        lambda t, y: 0 * y, torch.ones(2, 1), (0, t1), events=[event], batch_dim=batch_dim, t_eval="steps", **options
    )
    assert sol.y1.flatten().tolist() == [2.0, 2.0] and sol.success
    assert torch.as_tensor(sol.events[0].count).flatten().tolist() == [1] * (1 if batch_dim is None else 2)


# ---- gradients


@BOTH
@BATCH
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_of_the_times_of_bounces(options, batch_dim, which):
    """By the implicit function theorem, through the bounces before: against the closed form."""
    h0, keep = torch.tensor(7.0, requires_grad=True), torch.tensor(0.8, requires_grad=True)
    y0 = torch.stack([h0, 0 * h0])
    y0 = y0 if batch_dim is None else y0.unsqueeze(0)
    event = Event(height, direction=-1, apply=lambda t, y: bounce(keep)(t, y))
    sol = neurode.solve(fall, y0, (0, 5.2), events=[event], batch_dim=batch_dim, **options)
    assert int(sol.events[0].count) == 3
    got = torch.autograd.grad(sol.events[0].t.flatten()[which], (h0, keep), retain_graph=True, allow_unused=True)
    h, e = torch.tensor(7.0, requires_grad=True), torch.tensor(0.8, requires_grad=True)
    want = torch.autograd.grad(bounce_times(h, e, 3)[which], (h, e), allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (0.0 if a is None else a.item()) == pytest.approx(0.0 if b is None else b.item(), abs=1e-6)
    # The state at the end, behind all of them.
    t3 = bounce_times(h, e, 3)[2]
    v = e**3 * (2 * G * h) ** 0.5
    want = torch.autograd.grad(v * (5.2 - t3) - G * (5.2 - t3) ** 2 / 2, (h, e))
    got = torch.autograd.grad(sol.y1.flatten()[0], (h0, keep))
    assert [x.item() for x in got] == pytest.approx([x.item() for x in want], abs=1e-5)


@BOTH
def test_gradient_of_a_terminal_time_and_state_with_respect_to_everything(options):
    """y = y0 exp(k (t - t0)) reaches `level` at t0 + log(level / y0) / k; there, dy/dt moves nothing."""
    values = dict(y0=1.5, k=0.7, level=4.0, t0=0.2)
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    event = Event(lambda t, y: y - leaves["level"], terminal=True)
    sol = neurode.solve(lambda t, y: leaves["k"] * y, leaves["y0"], (leaves["t0"], 3.0), events=[event], **options)
    got = torch.autograd.grad(sol.t1, list(leaves.values()), retain_graph=True)
    y0, k, level, t0 = (torch.tensor(v, requires_grad=True) for v in values.values())
    want = torch.autograd.grad(t0 + torch.log(level / y0) / k, (y0, k, level, t0))
    assert [x.item() for x in got] == pytest.approx([x.item() for x in want], rel=1e-4)
    ends = torch.autograd.grad(sol.y1, list(leaves.values()))
    assert [x.item() for x in ends] == pytest.approx([0, 0, 1, 0], abs=2e-5)


def test_a_smooth_touch_raises_its_gradient():
    y0 = torch.tensor(0.5, requires_grad=True)
    event = Event(lambda t, y: (y - 1) ** 3, terminal=True)
    sol = neurode.solve(lambda t, y: torch.ones_like(y), y0, (0, 1), events=[event], **ADAPTIVE)
    assert sol.t1.item() == pytest.approx(0.5, abs=1e-4)
    with pytest.raises(neurode.GradientError, match="grazing"):
        sol.t1.backward()


# ---- how they end


@BATCH
def test_accumulating_events_end_with_a_status(batch_dim):
    """A ball that keeps half its speed comes to rest after finitely long, and infinitely many bounces."""
    g = (lambda t, y: y[0, 0]) if batch_dim is None else height
    event = Event(g, direction=-1, apply=bounce(0.5))
    y0 = torch.tensor([[1.0, 0.0]])
    sol = neurode.solve(fall, y0, (0, 10), events=[event], batch_dim=batch_dim, on_failure="nan", **ADAPTIVE)
    status = sol.status if batch_dim is None else sol.status[0]
    assert status is Status.EVENTS_ACCUMULATE and torch.isnan(sol.y1).all()
    assert float(sol.t1) == pytest.approx(3 * (2 / G) ** 0.5, rel=1e-6)  # t1 + 2 v/g (1/2 + 1/4 + ...)
    with pytest.raises(neurode.SolveError, match="Zeno"):
        neurode.solve(fall, y0, (0, 10), events=[event], batch_dim=batch_dim, **ADAPTIVE)


@BATCH
def test_more_events_than_max_events_is_a_status(batch_dim):
    event = Event(lambda t, y: y[..., 0] if batch_dim == 0 else y[0, 0])
    f = lambda t, y: torch.cos(9 * t) * 9 + 0 * y
    y0 = torch.full((1, 1), 0.5)
    run = dict(events=[event], max_events=3, batch_dim=batch_dim, **ADAPTIVE)
    with pytest.raises(neurode.SolveError, match="max_events"):
        neurode.solve(f, y0, (0, 10), **run)
    sol = neurode.solve(f, y0, (0, 10), on_failure="nan", **run)
    status = sol.status if batch_dim is None else sol.status[0]
    assert status is Status.EVENT_OVERFLOW


def test_a_row_that_overflows_leaves_the_others():
    rate = torch.tensor([[1.0], [9.0]])
    event = Event(lambda t, y, k: y[:, 0])
    f = lambda t, y, k: k * torch.cos(k * t) + 0 * y
    sol = neurode.solve(
        f, torch.full((2, 1), 0.5), (0, 4), args=(neurode.per_row(rate),), events=[event], max_events=3, batch_dim=0,
        on_failure="nan", **ADAPTIVE,
    )  # fmt: skip
    assert [s.name for s in sol.status] == ["SUCCESS", "EVENT_OVERFLOW"]
    assert sol.y1[0].item() == pytest.approx(0.5 + math.sin(4), abs=1e-6) and torch.isnan(sol.y1[1]).all()


@BATCH
def test_refusals(batch_dim):
    y0 = torch.ones(2, 2)
    with pytest.raises(neurode.FieldError, match=r"event's g\(t, y\) returned shape"):
        neurode.solve(fall, y0, (0, 1), events=[Event(lambda t, y: y)], batch_dim=batch_dim, **ADAPTIVE)
    with pytest.raises(neurode.FieldError, match="returned float"):
        neurode.solve(fall, y0, (0, 1), events=[Event(lambda t, y: 1.0)], batch_dim=batch_dim, **ADAPTIVE)
    with pytest.raises(neurode.FieldError, match=r"y\[0\] - 0\.5, not"):
        g = (lambda t, y: y[0, 0] < 0.5) if batch_dim is None else (lambda t, y: y[:, 0] < 0.5)
        neurode.solve(fall, y0, (0, 1), events=[Event(g)], batch_dim=batch_dim, **ADAPTIVE)
    with pytest.raises(neurode.FieldError, match="returned NaN in the step to"):
        g = (lambda t, y: (y[0, 0] - 9).sqrt()) if batch_dim is None else (lambda t, y: (y[:, 0] - 9).sqrt())
        neurode.solve(fall, y0, (0, 1), events=[Event(g)], batch_dim=batch_dim, **ADAPTIVE)
    with pytest.raises(neurode.FieldError, match=r"event's apply\(t, y\) returned shape"):
        g = (lambda t, y: y[0, 0]) if batch_dim is None else height
        neurode.solve(fall, y0, (0, 9), events=[Event(g, apply=lambda t, y: y[:1])], batch_dim=batch_dim, **ADAPTIVE)
    with pytest.raises(neurode.InputError, match=r"neurode\.Event"):
        neurode.solve(fall, y0, (0, 1), events=[lambda t, y: y], batch_dim=batch_dim, **ADAPTIVE)
    for wrong in (dict(direction=2), dict(terminal=-1), dict(terminal=2.5), dict(apply=3)):
        with pytest.raises(neurode.InputError):
            Event(height, **wrong)
