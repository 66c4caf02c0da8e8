"""Which adaptive method does `method=None` pick? Evaluations of f that each needs for a given accuracy, on DETEST.

    python benchmarks/method_by_tolerance.py [out.json]

For every problem and method, solves at tolerances from 1e-3 to 1e-11 give evaluations as a function of the error reached;
interpolated, they tell what an accuracy costs. Printed: the geometric mean over the problems, relative to the cheapest.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

spec = importlib.util.spec_from_file_location("detest", Path(__file__).with_name("detest.py"))
assert spec is not None and spec.loader is not None
detest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(detest)

METHODS = ["bosh3", "dopri5", "tsit5", "verner7", "dop853", "verner9"]
ACCURACIES = [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9]
TOLERANCES = [10.0**-k for k in range(3, 12)]
# C4 and C5 cost the most and say what C3 and the D class say; the orbit of D5 is lost at crude tolerances.
PROBLEMS = [name for name in detest.PROBLEMS if name not in ("C4", "C5", "D5")]


def cost(name: str, method: str) -> tuple[list[float], list[float]]:
    """Evaluations at each of the accuracies, by interpolation in logarithms (NaN beyond what was reached); and errors."""
    runs = [detest.our_error(name, method, tol) for tol in TOLERANCES if method != "bosh3" or tol >= 1e-7]
    errors = np.minimum.accumulate([max(run[0], 1e-15) for run in runs])
    evaluations = [run[1] for run in runs]
    order = np.argsort(errors)
    x, y = np.log(errors)[order], np.log(np.array(evaluations, dtype=float))[order]
    wanted = np.log(ACCURACIES)
    return np.exp(np.interp(wanted, x, y, left=np.nan)).tolist(), [run[0] for run in runs]


def main(path: str = "method_by_tolerance.json") -> None:
    """Measure, print and save."""
    costs: dict[str, dict[str, list[float]]] = {}
    typical: dict[str, list[float]] = {}
    for method in METHODS:
        found = {name: cost(name, method) for name in PROBLEMS}
        costs[method] = {name: value[0] for name, value in found.items()}
        errors = np.array([value[1] for value in found.values()])
        typical[method] = np.exp(np.log(np.maximum(errors, 1e-16)).mean(0)).tolist()
    means = {method: np.exp(np.nanmean(np.log(list(values.values())), 0)) for method, values in costs.items()}
    print("cost relative to the cheapest, at an accuracy of " + "  ".join(f"{a:.0e}" for a in ACCURACIES))
    best = np.nanmin(np.array(list(means.values())), 0)
    for method, mean in means.items():
        print(f"{method:48}" + "  ".join(f"{r:5.2f}" for r in mean / best))
    print("geometric mean of the error at tolerances " + "  ".join(f"{t:.0e}" for t in TOLERANCES))
    for method, errors in typical.items():
        print(f"{method:42}" + "  ".join(f"{e:.0e}" for e in errors))
    with open(path, "w") as file:
        json.dump(
            {"accuracies": ACCURACIES, "costs": costs, "tolerances": TOLERANCES, "typical": typical}, file, indent=1
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
