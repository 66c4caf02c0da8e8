"""DETEST (Hull et al. 1972), classes A-E: global errors beside SciPy's methods of the same tableau. The whole study, all
methods and tolerances, is `benchmarks/detest.py`; here is what runs in seconds.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

import neurode

SOURCE = Path(__file__).parents[1] / "benchmarks" / "detest.py"
spec = importlib.util.spec_from_file_location("detest", SOURCE)
assert spec is not None and spec.loader is not None
detest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(detest)

PAIRS = [
    ("bosh3", 1e-3),
    ("bosh3", 1e-5),
    ("dopri5", 1e-3),
    ("dopri5", 1e-6),
    ("dopri5", 1e-8),
    ("dop853", 1e-6),
    ("dop853", 1e-9),
]


@pytest.fixture(scope="module", autouse=True)
def _scipy():
    pytest.importorskip("scipy")


@pytest.mark.parametrize(("method", "tolerance"), PAIRS)
def test_by_default_no_error_is_twice_scipy_s(method, tolerance, record_property):
    """The default controller is that of SciPy's Runge-Kutta methods: the same steps."""
    ratios = {
        name: detest.our_error(name, method, tolerance)[0] / detest.scipy_error(name, method, tolerance)
        for name in detest.PROBLEMS
    }
    record_property("ratios", ratios)
    # At the tightest tolerances class C is stiff enough for dop853 that its steps hover at the edge of stability: rounding, which
    # differs between processors, decides the last one's error. It differs by 30 between 0.9 and 1.1 times the tolerance,
    # for SciPy as for us.
    hovering = method == "dop853" and tolerance < 1e-7
    steady = {name: ratio for name, ratio in ratios.items() if not (hovering and name[0] == "C")}
    assert max(steady.values()) <= 2, ratios
    assert np.median(list(ratios.values())) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("method", "tolerance"), PAIRS)
def test_with_pi_control_errors_are_scipy_s_or_smaller_on_most_problems(method, tolerance, record_property):
    """On single ones they are larger, at single tolerances, by luck of signs; on Kepler's orbits of D3 and D4, where errors
    of equal steps cancel around the orbit, by up to six.
    """
    ratios = {
        name: detest.our_error(name, method, tolerance, controller=neurode.PID.pi())[0]
        / detest.scipy_error(name, method, tolerance)
        for name in detest.PROBLEMS
    }
    record_property("ratios", ratios)
    assert np.median(list(ratios.values())) <= 1.0
    assert np.exp(np.mean(np.log(list(ratios.values())))) <= 1.0
    assert max(ratios.values()) <= 7 and sum(ratio > 2 for ratio in ratios.values()) <= 3, ratios


@pytest.mark.parametrize("method", ["tsit5", "verner6", "verner7", "dopri8", "verner9"])
def test_the_error_falls_in_proportion_to_the_tolerance(method, record_property):
    """Where SciPy has no such method: over five decades of tolerance, the error falls by five, give or take one."""
    slopes = {}
    for name in detest.PROBLEMS:
        if name == "D5":
            continue  # eccentricity 0.9: at 1e-3 the orbit is lost altogether
        loose, tight = (detest.our_error(name, method, tolerance)[0] for tolerance in (1e-4, 1e-9))
        slopes[name] = math.log10(loose / tight) / 5
    record_property("decades of error for a decade of tolerance", slopes)
    # High orders take so few steps at 1e-4 that they end below it: the error then falls by less.
    assert 0.75 <= np.median(list(slopes.values())) <= 1.25
    assert min(slopes.values()) > 0.5, slopes
