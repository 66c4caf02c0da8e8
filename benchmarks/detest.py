"""DETEST: global errors on the 25 non-stiff problems of Hull et al. (1972), beside SciPy's methods of the same tableau.

    python benchmarks/detest.py [out.json] [method ...]

Writes, for every method, problem and tolerance, the largest error over twenty output times, for us and for SciPy where it
has the method, and prints the ratios.

References:
    T. E. Hull, W. H. Enright, B. M. Fellen, A. E. Sedgwick (1972), Comparing numerical methods for ordinary differential
    equations, SIAM J. Numer. Anal. 9(4), 603-637, doi:10.1137/0709052.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

import neurode

END = 20.0
TIMES = np.linspace(0.0, END, 21)[1:]
SCIPY = {"bosh3": "RK23", "dopri5": "RK45", "dop853": "DOP853"}
TOLERANCES = {"fehlberg2": (1e-3, 1e-4, 1e-5), "adaptive_heun": (1e-3, 1e-4, 1e-5), "bosh3": (1e-3, 1e-5, 1e-7)}
METHODS = [
    "bosh3",
    "dopri5",
    "tsit5",
    "verner6",
    "verner7",
    "dopri8",
    "dop853",
    "verner9",
    "fehlberg2",
    "adaptive_heun",
]


def _tridiagonal(size: int, low: float, middle: float, high: float) -> torch.Tensor:
    matrix = torch.diag(torch.full((size,), middle, dtype=torch.float64))
    matrix += torch.diag(torch.full((size - 1,), low, dtype=torch.float64), -1)
    return matrix + torch.diag(torch.full((size - 1,), high, dtype=torch.float64), 1)


def _chain(rates: torch.Tensor) -> torch.Tensor:
    """A radioactive chain: y_i' = rate_{i-1} y_{i-1} - rate_i y_i; the last element only gains."""
    size = len(rates) + 1
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for i, rate in enumerate(rates.tolist()):
        matrix[i, i] -= rate
        matrix[i + 1, i] += rate
    return matrix


def _linear(matrix: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda t, y: matrix @ y


def _first(size: int) -> list[float]:
    return [1.0] + [0.0] * (size - 1)


def _planets(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """C5: the five outer planets around the sun; masses, positions and velocities as in the paper."""
    place, speed = y[:15].reshape(3, 5), y[15:]
    m0 = 1.00000597682
    m = y.new_tensor(
        [0.000954786104043, 0.000285583733151, 0.0000437273164546, 0.0000517759138449, 0.00000277777777778]
    )
    r3 = (place * place).sum(0) ** 1.5
    gaps = place.unsqueeze(1) - place.unsqueeze(2)  # [i, j, k] = place[i, k] - place[i, j]
    d3 = (gaps * gaps).sum(0) ** 1.5 + torch.eye(5, dtype=y.dtype)
    direct = (m * gaps / d3).sum(2)
    others = (m * place / r3).sum(1, keepdim=True) - m * place / r3
    pull = 2.95912208286 * (-(m0 + m) * place / r3 + direct - others)
    return torch.cat([speed, pull.reshape(-1)])


PLANETS = [
    3.42947415189, 6.64145542550, 11.2630437207, -30.1552268759, -21.1238353380,
    3.35386959711, 5.97156957878, 14.6952576794, 1.65699966404, 28.4465098142,
    1.35494901715, 2.18231499728, 6.27960525067, 1.43785752721, 15.3882659679,
    -0.557160570446, -0.415570776342, -0.325325669158, -0.0240476254170, -0.176860753121,
    0.505696783289, 0.365682722812, 0.189706021964, -0.287659532608, -0.216393453025,
    0.230578543901, 0.169143213293, 0.0877265322780, -0.117219543175, -0.0148647893090,
]  # fmt: skip


def _kepler(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.cat([y[2:], -y[:2] / (y[0] ** 2 + y[1] ** 2) ** 1.5])


def _orbit(e: float) -> list[float]:
    return [1 - e, 0.0, 0.0, math.sqrt((1 + e) / (1 - e))]


def _second(acceleration: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda t, y: torch.stack([y[1], acceleration(t, y[0], y[1])])


def _rotation(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]])


def _surface(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    r = torch.sqrt(y[0] ** 2 + y[1] ** 2)
    return torch.stack([-y[1] - y[0] * y[2] / r, y[0] - y[1] * y[2] / r, y[0] / r])


def _predators(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([2 * (y[0] - y[0] * y[1]), -(y[1] - y[0] * y[1])])


def _reaction(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([-y[0], y[0] - y[1] ** 2, y[1] ** 2])


PROBLEMS: dict[str, tuple[Callable[..., Any], list[float]]] = {
    "A1": (lambda t, y: -y, [1.0]),
    "A2": (lambda t, y: -(y**3) / 2, [1.0]),
    "A3": (lambda t, y: y * torch.cos(t), [1.0]),
    "A4": (lambda t, y: y / 4 * (1 - y / 20), [1.0]),
    "A5": (lambda t, y: (y - t) / (y + t), [4.0]),
    "B1": (_predators, [1.0, 3.0]),
    "B2": (_linear(torch.tensor([[-1.0, 1, 0], [1, -2, 1], [0, 1, -1]], dtype=torch.float64)), [2.0, 0.0, 1.0]),
    "B3": (_reaction, [1.0, 0.0, 0.0]),
    "B4": (_surface, [3.0, 0.0, 0.0]),
    "B5": (_rotation, [0.0, 1.0, 1.0]),
    "C1": (_linear(_chain(torch.ones(9))), _first(10)),
    "C2": (_linear(_chain(torch.arange(1.0, 10.0))), _first(10)),
    "C3": (_linear(_tridiagonal(10, 1.0, -2.0, 1.0)), _first(10)),
    "C4": (_linear(_tridiagonal(51, 1.0, -2.0, 1.0)), _first(51)),
    "C5": (_planets, PLANETS),
    "D1": (_kepler, _orbit(0.1)),
    "D2": (_kepler, _orbit(0.3)),
    "D3": (_kepler, _orbit(0.5)),
    "D4": (_kepler, _orbit(0.7)),
    "D5": (_kepler, _orbit(0.9)),
    "E1": (_second(lambda t, y, v: -v / (t + 1) - (1 - 0.25 / (t + 1) ** 2) * y), [0.6713967071418030, 0.09540051444747446]),
    "E2": (_second(lambda t, y, v: (1 - y**2) * v - y), [2.0, 0.0]),
    "E3": (_second(lambda t, y, v: y**3 / 6 - y + 2 * torch.sin(2.78535 * t)), [0.0, 0.0]),
    "E4": (_second(lambda t, y, v: 0.032 - 0.4 * v**2), [30.0, 0.0]),
    "E5": (_second(lambda t, y, v: torch.sqrt(1 + v**2) / (25 - t)), [0.0, 0.0]),
}  # fmt: skip


def numpy_field(name: str) -> Callable[..., np.ndarray]:
    """The problem as SciPy calls it."""
    f = PROBLEMS[name][0]
    return lambda t, y: f(torch.tensor(t, dtype=torch.float64), torch.from_numpy(np.ascontiguousarray(y))).numpy()


def scipy_solve(name: str, method: str, rtol: float, atol: float) -> np.ndarray:
    """SciPy's solution at the output times."""
    from scipy.integrate import solve_ivp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns where it raises rtol to what float64 resolves
        result = solve_ivp(numpy_field(name), (0, END), PROBLEMS[name][1], method, TIMES, rtol=rtol, atol=atol)
    return result.y.T


@cache
def reference(name: str) -> np.ndarray:
    """The solution at the output times to some 1e-12."""
    return scipy_solve(name, "DOP853", 3e-14, 1e-15)


def our_error(name: str, method: str, tolerance: float, controller: Any = None) -> tuple[float, int]:
    """Largest error of neurode over the output times, and its evaluations; infinite where it gives up."""
    f, y0 = PROBLEMS[name]
    start = torch.tensor(y0, dtype=torch.float64)
    with torch.no_grad(), contextlib.suppress(neurode.SolveError):
        sol = neurode.solve(
            f, start, (0.0, END), method=method, rtol=tolerance, atol=tolerance, t_eval=torch.from_numpy(TIMES),
            engine="eager", controller=controller,
        )  # fmt: skip
        return float(np.abs(sol.ys.numpy() - reference(name)).max()), int(sol.stats.num_evaluations)
    return math.inf, 0


def scipy_error(name: str, method: str, tolerance: float) -> float:
    """The same for SciPy's method of the same tableau."""
    return float(np.abs(scipy_solve(name, SCIPY[method], tolerance, tolerance) - reference(name)).max())


def measure(method: str, name: str, tolerance: float) -> dict[str, Any]:
    """One method on one problem: its error, and SciPy's where it has the method."""
    error, evaluations = our_error(name, method, tolerance)
    row = dict(method=method, problem=name, tolerance=tolerance, error=error, evaluations=evaluations)
    if method in SCIPY:
        row["scipy_error"] = scipy_error(name, method, tolerance)
        row["error_with_pi"] = our_error(name, method, tolerance, neurode.PID.pi())[0]
    return row


def summary(rows: list[dict[str, Any]], tolerance: float) -> str:
    """A line on one method at one tolerance."""
    over = [row["error"] / tolerance for row in rows]
    text = f"{rows[0]['method']:14} {tolerance:.0e}  error/tolerance: median {np.median(over):9.2f}, worst {max(over):9.2f}"
    for key, title in (("error", "to SciPy's"), ("error_with_pi", "with PID.pi()")):
        if "scipy_error" in rows[0]:
            ratios = [row[key] / row["scipy_error"] for row in rows]
            worst = rows[int(np.argmax(ratios))]["problem"]
            text += f"; {title}: median {np.median(ratios):.2f}, worst {max(ratios):.2f} ({worst})"
    return text


def main(path: str = "detest.json", *methods: str) -> None:
    """Run all methods, or those named, on all problems at all tolerances."""
    rows: list[dict[str, Any]] = []
    for method in methods or METHODS:
        for tolerance in TOLERANCES.get(method, (1e-3, 1e-5, 1e-7, 1e-9)):
            found = [measure(method, name, tolerance) for name in PROBLEMS]
            print(summary(found, tolerance), flush=True)
            rows += found
    with open(path, "w") as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
