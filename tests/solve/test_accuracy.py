"""How accurate solves are: global errors against closed forms, of adaptive methods and of all ways to ask for a grid."""

from __future__ import annotations

import math

import pytest
import torch

import neurode

# Five problems with closed forms: name -> (f, y(t), span). Coupled and not, with and without time, forward and backward.
PROBLEMS = {
    "decay": (lambda t, y: -y, lambda t: torch.stack([torch.exp(-t), 2 * torch.exp(-t)]), (0.0, 4.0)),
    "oscillator": (
        lambda t, y: torch.stack([y[1], -4 * y[0]]),
        lambda t: torch.stack([torch.cos(2 * t), -2 * torch.sin(2 * t)]),
        (0.0, 6.0),
    ),
    "logistic": (lambda t, y: y * (1 - y), lambda t: (1 / (1 + 9 * torch.exp(-t))).reshape(1), (0.0, 10.0)),
    "time alone": (lambda t, y: torch.cos(t).expand(1), lambda t: torch.sin(t).reshape(1), (0.5, 8.0)),
    "backward": (
        lambda t, y: -y * torch.tan(t),  # y = cos(t)
        lambda t: torch.cos(t).reshape(1),
        (1.2, -1.0),
    ),
}
ADAPTIVE = [name for name, method in neurode.methods.METHODS.items() if method.adaptive]


@pytest.mark.parametrize("tolerance", [1e-4, 1e-8])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5", "dopri8", "dop853", "verner6", "verner7", "verner9"])
def test_adaptive_global_error(method, problem, tolerance):
    f, exact, (t0, t1) = PROBLEMS[problem]
    times = torch.linspace(t0, t1, 7)
    y0 = exact(times[0])
    sol = neurode.solve(f, y0, (t0, t1), method=method, rtol=tolerance, atol=tolerance, t_eval=times)
    for t, y in zip(times, sol.ys, strict=True):
        true = exact(t)
        assert torch.all((y - true).abs() <= 50 * (tolerance + tolerance * true.abs())), (t, (y - true).abs().max())


@pytest.mark.parametrize("problem", PROBLEMS)
def test_adaptive_heun_at_a_loose_tolerance(problem):
    f, exact, span = PROBLEMS[problem]
    y0, end = (exact(torch.tensor(t)) for t in span)
    y1 = neurode.solve(f, y0, span, method="adaptive_heun", rtol=1e-4, atol=1e-4).y1
    assert torch.all((y1 - end).abs() <= 50 * 1e-4 * (1 + end.abs()))


def test_fehlberg2_falls_with_the_tolerance():
    """Its estimate, made of a first-order weight of 1/512, is too kind for a bound; the error must fall all the same."""
    f, exact, span = PROBLEMS["oscillator"]
    y0, end = (exact(torch.tensor(t)) for t in span)
    errors = []
    for tolerance in (1e-4, 1e-6):
        y1 = neurode.solve(f, y0, span, method="fehlberg2", rtol=tolerance, atol=tolerance).y1
        errors.append(float((y1 - end).abs().max()))
    assert errors[1] < errors[0] / 30 < 0.02


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_row_alone_is_the_joint_solve(method, problem):
    """One row with its own step takes the very steps of a joint solve of the same system."""
    f, exact, span = PROBLEMS[problem]
    y0 = exact(torch.tensor(span[0]))
    g = lambda t, y: f(t.reshape(-1)[0], y[0]).unsqueeze(0)
    joint = neurode.solve(f, y0, span, method=method, rtol=1e-4, atol=1e-5)
    alone = neurode.solve(g, y0[None], span, method=method, rtol=1e-4, atol=1e-5, batch_dim=0)
    assert int(alone.stats.num_accepted[0]) == joint.stats.num_accepted
    assert int(alone.stats.num_rejected[0]) == joint.stats.num_rejected
    again = (
        0 if neurode.methods.get(method).fsal else joint.stats.num_rejected
    )  # a joint step keeps f(t, y) after a rejection
    assert int(alone.stats.num_evaluations[0]) == joint.stats.num_evaluations + again
    # An estimate near rounding moves the steps by a hair, and the result by that share of its error.
    assert torch.allclose(alone.y1[0], joint.y1, rtol=1e-7, atol=1e-7)


def test_the_three_ways_to_a_grid_are_one():
    f = lambda t, y: torch.sin(t) - y
    y0 = torch.tensor([1.0, 2.0])
    one = neurode.solve(f, y0, (0, 2), method="rk4", steps=8).y1
    assert torch.equal(one, neurode.solve(f, y0, (0, 2), method="rk4", step_size=0.25).y1)
    assert torch.equal(one, neurode.solve(f, y0, (0, 2), method="rk4", grid=torch.linspace(0, 2, 9)).y1)
    points = lambda t0, t1: torch.linspace(t0, t1, 9)
    assert torch.equal(one, neurode.solve(f, y0, (0, 2), method="rk4", grid=points).y1)


def test_the_last_step_of_a_step_size_is_shorter():
    sol = neurode.solve(lambda t, y: -y, torch.ones(1), (0, 1), method="euler", step_size=0.3, t_eval="steps")
    assert sol.ts.tolist() == pytest.approx([0, 0.3, 0.6, 0.9, 1.0])
    assert sol.y1.item() == pytest.approx(0.7**3 * 0.9)
    back = neurode.solve(lambda t, y: -y, torch.ones(1), (1, 0), method="euler", step_size=0.3, t_eval="steps")
    assert back.ts.tolist() == pytest.approx([1, 0.7, 0.4, 0.1, 0.0])


def test_euler_by_hand():
    sol = neurode.solve(lambda t, y: t * y, torch.tensor([2.0]), (1, 2), method="euler", steps=2)
    assert sol.y1.item() == 2 * (1 + 0.5 * 1.0) * (1 + 0.5 * 1.5)


def test_outputs_lie_on_the_solution_and_do_not_change_the_steps():
    f, exact, span = PROBLEMS["oscillator"]
    y0 = exact(torch.tensor(span[0]))
    times = torch.linspace(*span, 101)
    plain = neurode.solve(f, y0, span, method="dopri5", rtol=1e-7, atol=1e-7)
    dense = neurode.solve(f, y0, span, method="dopri5", rtol=1e-7, atol=1e-7, t_eval=times)
    assert dense.stats.num_accepted == plain.stats.num_accepted
    assert dense.stats.num_evaluations == plain.stats.num_evaluations
    assert torch.equal(dense.y1, plain.y1) and torch.equal(dense.ys[-1], plain.y1)
    assert (dense.ys - torch.stack([exact(t) for t in times])).abs().max() < 1e-4


def test_reversing_time_returns_to_the_start():
    f, exact, span = PROBLEMS["oscillator"]
    y0 = exact(torch.tensor(span[0]))
    there = neurode.solve(f, y0, span, method="tsit5", rtol=1e-9, atol=1e-9).y1
    back = neurode.solve(f, there, span[::-1], method="tsit5", rtol=1e-9, atol=1e-9).y1
    assert (back - y0).abs().max() < 50 * 2e-9 * 2


def test_a_tighter_tolerance_for_one_leaf_is_kept():
    """The tolerance of an element holds for that element."""
    f = lambda t, y: {"a": torch.cos(3 * t), "b": torch.cos(3 * t)}
    y0 = {"a": torch.tensor(0.0), "b": torch.tensor(0.0)}
    loose = neurode.solve(f, y0, (0, 3), method="bosh3", rtol=0.0, atol=1e-3)
    mixed = neurode.solve(f, y0, (0, 3), method="bosh3", rtol=0.0, atol={"a": 1e-3, "b": 1e-7})
    true = math.sin(9) / 3
    assert mixed.stats.num_accepted > 3 * loose.stats.num_accepted
    assert abs(mixed.y1["b"].item() - true) < 1e-5 < abs(loose.y1["b"].item() - true)
