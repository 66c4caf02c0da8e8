"""Measured orders of all methods: the end state, the dense output over a step and over the interval."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

import neurode
from neurode._field import Field
from neurode._state import read_state
from neurode.methods import METHODS
from neurode.stepping import Interval, stepper


def kepler(t, y):
    return torch.cat([y[2:], -y[:2] / (y[:2] @ y[:2]) ** 1.5])


def kepler_exact(t, e=0.3):
    """Kepler's ellipse of eccentricity e by Newton's iteration (Hairer, Norsett & Wanner 1993, I.16)."""
    a = t.clone()
    for _ in range(30):
        a = a - (a - e * a.sin() - t) / (1 - e * a.cos())
    r, b = 1 - e * a.cos(), math.sqrt(1 - e * e)
    return torch.stack([a.cos() - e, b * a.sin(), -a.sin() / r, b * a.cos() / r], -1)


def turning(t, y):
    return (1 + t) * (y @ y) * torch.stack([y[1], -y[0]])


def turning_exact(t):
    angle = t + t * t / 2
    return torch.stack([angle.sin(), angle.cos()], -1)


def growth(t, y):
    return y * torch.cos(t)


def growth_exact(t):
    return torch.exp(t.sin()).unsqueeze(-1)


PROBLEMS = {
    "kepler": (kepler, kepler_exact, 3.0),
    "turning": (turning, turning_exact, 2.0),
    "turning on": (turning, turning_exact, 2.5),
    "growth": (growth, growth_exact, 2.0),
}
EXPLICIT = [name for name, method in METHODS.items() if method.kind == "explicit"]


def slope(steps, errors):
    """The order by least squares in logarithms."""
    x = -torch.log(torch.tensor(steps, dtype=torch.float64))
    y = torch.log(torch.tensor(errors, dtype=torch.float64))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def grid_of(method, steps, t1):
    """An adaptive method on equal steps: tolerances that accept whatever comes."""
    if not METHODS[method].adaptive:
        return dict(steps=steps)
    h = t1 / steps
    return dict(rtol=1e6, atol=1e6, first_step=h, max_step=h * (1 + 1e-12))


def end_error(method, steps, problem="kepler"):
    f, exact, t1 = PROBLEMS[problem]
    sol = neurode.solve(f, exact(torch.tensor(0.0)), (0.0, t1), method=method, **grid_of(method, steps, t1))
    assert sol.stats.num_accepted == steps
    return float((sol.y1 - exact(torch.tensor(t1))).abs().max())


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("ralston", 2), ("rk4", 4)])
def test_fitted_order_of_the_classical_methods(method, order):
    steps = [160, 320, 640, 1280]
    assert abs(slope(steps, [end_error(method, n) for n in steps]) - order) <= 0.1


# Problem and steps in the asymptotic range: the leading term rules, and the error is above rounding. For the high orders,
# whose leading terms are made small by design, that is a narrow range, and not on every problem there is one.
LOW = {1: [640, 1280, 2560], 2: [160, 320, 640], 3: [120, 160, 240, 320], 4: [96, 128, 192]}
RANGES = {
    "dopri5": ("kepler", [60, 80, 120, 160]),
    "tsit5": ("kepler", [40, 60, 80, 120]),
    "verner6": ("turning on", [32, 40, 48, 56]),
    "verner7": ("turning", [24, 28, 32, 40, 48]),
    "dopri8": ("turning", [32, 36, 40]),
    "dop853": ("turning", [20, 24, 28, 32]),
    "verner9": ("kepler", [14, 16, 20, 24, 28]),
}


@pytest.mark.parametrize("method", EXPLICIT)
def test_order_of_the_end_state(method, record_property):
    order = METHODS[method].order
    problem, steps = RANGES.get(method) or ("kepler", LOW[order])
    errors = [end_error(method, n, problem) for n in steps]
    measured = slope(steps, errors)
    record_property("order", measured)
    assert abs(measured - order) <= 0.2, (measured, errors)


# Problem and step sizes for the interpolant of one step. The interpolants of verner6 and verner9 have leading terms so small
# that the next one drowns them until float64's rounding (weights up to 1e5) drowns both: theirs are measured in 32 digits.
WIDTHS = {1: (0.02, 0.01, 0.005), 2: (0.04, 0.02, 0.01), 3: (0.04, 0.02, 0.01), 4: (0.04, 0.02, 0.01)}
STEP_RANGES = {
    "tsit5": ("growth", (0.2, 0.15, 0.1)),
    "verner7": ("kepler", (0.2, 0.15, 0.12, 0.1)),
    "dopri8": ("kepler", (0.06, 0.05, 0.04)),
    "dop853": ("kepler", (0.2, 0.15, 0.12, 0.1)),
}
FINE = {"verner6": [mpmath.mpf(1) / n for n in (10, 20, 40)], "verner9": [mpmath.mpf(1) / n for n in (5, 10, 20)]}
STARTS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
THETAS = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


def step_error(method, h, problem):
    """RMS error of the dense output inside single steps from several points of the solution."""
    f, exact, _ = PROBLEMS[problem]
    options = dict(steps=1) if not METHODS[method].adaptive else dict(rtol=1e9, atol=1e9, first_step=h)
    gaps = []
    for start in STARTS:
        times = start + h * THETAS
        sol = neurode.solve(f, exact(torch.tensor(start)), (start, start + h), method=method, t_eval=times, **options)
        assert sol.stats.num_accepted == 1
        gaps.append(sol.ys - exact(times))
    return float(torch.stack(gaps).square().mean().sqrt())


def fine(number):
    """An exact number of a tableau, as a fraction or an integer, in the present precision of mpmath."""
    return mpmath.mpf(number.numerator) / number.denominator


def fine_step(method, f, t, y, h):
    """A step in mpmath's numbers, from the exact ones of the tableau: the new state, and the interpolant as a function."""
    tableau = METHODS[method]
    rows, nodes = (*tableau.a, *tableau.extra_a), (*tableau.c, *tableau.extra_c)
    ks = []

    def combine(weights):
        return [x + h * sum(w * k[i] for w, k in zip(weights, ks, strict=False) if w) for i, x in enumerate(y)]

    for row, c in zip(rows, nodes, strict=True):
        ks.append(f(t + fine(c) * h, combine([fine(a) for a in row])))
    dense = lambda x: combine([sum(fine(p) * x ** (j + 1) for j, p in enumerate(row)) for row in tableau.dense])
    return combine([fine(b) for b in tableau.b]), dense


def fine_step_error(method, h):
    """`step_error` for the growing exponential in 32 digits."""
    f, exact = lambda t, y: [y[0] * mpmath.cos(t)], lambda t: mpmath.exp(mpmath.sin(t))
    gaps = []
    for start in map(mpmath.mpf, STARTS):
        _, dense = fine_step(method, f, start, [exact(start)], h)
        gaps += [dense(x)[0] - exact(start + h * x) for x in (mpmath.mpf(j) / 10 for j in range(1, 10))]
    return mpmath.sqrt(sum(gap * gap for gap in gaps) / len(gaps))


def fine_interval_error(method, steps):
    """The largest error of the dense output on an oscillation over [0, 2], in 32 digits; every eighth step is looked at."""
    h, y, worst = mpmath.mpf(2) / steps, [mpmath.mpf(0), mpmath.mpf(1)], 0
    for n in range(steps):
        y1, dense = fine_step(method, lambda t, y: [3 * y[1], -3 * y[0]], n * h, y, h)
        if n % 8 == 7:
            worst = max(
                worst, *(abs(dense(x)[0] - mpmath.sin(3 * (n + x) * h)) for x in map(mpmath.mpf, (0.3, 0.6, 0.9)))
            )
        y = y1
    return worst


@pytest.mark.parametrize("method", FINE)
def test_order_of_the_dense_output_over_one_step_in_32_digits(method, record_property):
    with mpmath.workdps(32):
        errors = [float(fine_step_error(method, h)) for h in FINE[method]]
    measured = slope([float(1 / h) for h in FINE[method]], errors)
    record_property("local order", measured)
    assert abs(measured - (METHODS[method].dense_order + 1)) <= 0.2, (measured, errors)


def test_order_of_verner6_over_the_interval_in_32_digits(record_property):
    steps = [160, 240, 320]
    with mpmath.workdps(32):
        errors = [float(fine_interval_error("verner6", n)) for n in steps]
    measured = slope(steps, errors)
    record_property("order", measured)
    assert abs(measured - 6) <= 0.2, (measured, errors)


@pytest.mark.parametrize("method", [name for name in EXPLICIT if name not in FINE])
def test_order_of_the_dense_output_over_one_step(method, record_property):
    dense = METHODS[method].dense_order
    problem, widths = STEP_RANGES.get(method) or ("kepler", WIDTHS[dense])
    errors = [step_error(method, h, problem) for h in widths]
    measured = slope([1 / h for h in widths], errors)
    record_property("local order", measured)
    assert abs(measured - (dense + 1)) <= 0.2, (measured, errors)


INTERVAL_RANGES = RANGES | {
    "dop853": ("kepler", [40, 48, 56]),
    "dopri8": ("kepler", [64, 80, 96]),
    "verner9": ("kepler", [14, 16, 18, 20]),
}


@pytest.mark.parametrize("method", [name for name in EXPLICIT if name != "verner6"])
def test_order_of_the_dense_output_over_the_interval(method, record_property):
    order = min(METHODS[method].order, METHODS[method].dense_order + 1)
    problem, steps = INTERVAL_RANGES.get(method) or ("kepler", LOW[order])
    f, exact, t1 = PROBLEMS[problem]
    times = torch.linspace(0.0, t1, 333)
    errors = []
    for n in steps:
        y0 = exact(torch.tensor(0.0))
        sol = neurode.solve(f, y0, (0.0, t1), method=method, t_eval=times, **grid_of(method, n, t1))
        errors.append(float((sol.ys - exact(times)).abs().max()))
    measured = slope(steps, errors)
    record_property("order", measured)
    assert abs(measured - order) <= 0.2, (measured, errors)


@pytest.mark.parametrize("method", [name for name in EXPLICIT if METHODS[name].adaptive])
def test_the_error_estimate_against_the_true_error_of_one_step(method, record_property):
    """The estimate is of lower order, so that its ratio to the error, which is reported, grows as the step falls."""
    ratios = []
    for h in (0.3, 0.15):
        layout, y0 = read_state(kepler_exact(torch.tensor(0.3)), None)
        stepping = stepper(METHODS[method])
        step = stepping.step(Field(kepler, layout), Interval(0.3, 0.3 + h, torch.float64), y0)
        sizes = [float(e.abs().max()) for e in stepping.errors(step)]
        estimate = sizes[0] if len(sizes) == 1 else sizes[0] ** 2 / math.hypot(sizes[0], 0.1 * sizes[1])
        ratios.append(estimate / float((step.y1 - kepler_exact(torch.tensor(0.3 + h))).abs().max()))
    record_property("estimate over error", ratios)
    assert 0.02 < ratios[0] < 1e4 and ratios[1] > 1.3 * ratios[0], ratios
