"""Symplectic compositions: order, time reversal and area on the harmonic oscillator; refusals."""

import math

import pytest

from neurode.methods import SymplecticTableau, get

METHODS = [get("leapfrog"), get("yoshida4")]


def step(method, h, dq, dp, t, q, p):
    for kick, kick_time, drift, drift_time in zip(
        method.kick, method.kick_times, method.drift, method.drift_times, strict=True
    ):
        p = p + h * kick * dp(t + kick_time * h, q)
        q = q + h * drift * dq(t + drift_time * h, p)
    return q, p


def error(method, num_steps):
    """Of q'' = -q + cos(3 t), with half of the force given to each equation as functions of time."""

    def dq(t, p):
        return p + math.sin(2 * t)

    def dp(t, q):
        return -q + math.cos(3 * t)

    def exact(t):
        # q'' + q = cos 3t + 2 cos 2t
        q = -math.cos(3 * t) / 8 - 2 * math.cos(2 * t) / 3
        return q, 3 * math.sin(3 * t) / 8 + 4 * math.sin(2 * t) / 3 - math.sin(2 * t)

    q, p = exact(0.0)
    for i in range(num_steps):
        q, p = step(method, 1 / num_steps, dq, dp, i / num_steps, q, p)
    return math.hypot(q - exact(1.0)[0], p - exact(1.0)[1])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_order_with_time_dependent_forces(method):
    assert math.log2(error(method, 20) / error(method, 40)) == pytest.approx(method.order, abs=0.2)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_time_reversal_and_area(method):
    def dq(t, p):
        return p

    def dp(t, q):
        return -q

    q, p = step(method, 0.3, dq, dp, 0.0, 0.7, 0.2)
    q, p = step(method, -0.3, dq, dp, 0.3, q, p)
    assert (q, p) == pytest.approx((0.7, 0.2), abs=1e-15)
    columns = [step(method, 0.3, dq, dp, 0.0, *unit) for unit in ((1.0, 0.0), (0.0, 1.0))]
    assert columns[0][0] * columns[1][1] - columns[0][1] * columns[1][0] == pytest.approx(1.0, abs=1e-15)


def test_facts():
    leapfrog, yoshida4 = METHODS
    assert (leapfrog.order, leapfrog.fsal, leapfrog.num_evaluations_per_step) == (2, True, 2)
    assert (yoshida4.order, yoshida4.fsal, yoshida4.num_evaluations_per_step) == (4, True, 6)
    assert leapfrog.kick_times == (0.0, 1.0)
    assert leapfrog.drift_times == (0.5, 1.0)
    assert yoshida4.kick_times[-1] == pytest.approx(1.0)


REFUSED = [
    ({"order": 3}, "condition of order 3 .* missed .* order=2"),
    ({"kick": (0.5, 0.4)}, "condition of order 1 for p"),
    ({"drift": (1.0, 0.1)}, "condition of order 1 for q"),
    ({"kick": (1.0,)}, "`kick` has 1 numbers and `drift` 2"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses(change, message):
    good = {"name": "mine", "order": 2, "kick": (0.5, 0.5), "drift": (1.0, 0.0)}
    assert SymplecticTableau(**good).fsal
    with pytest.raises(ValueError, match=f"mine: .*{message}"):
        SymplecticTableau(**good | change)
