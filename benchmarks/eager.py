"""The eager engine against torchdiffeq and torchode: same problem, same process, interleaved, medians.

    python benchmarks/eager.py [--out benchmarks/results/eager.json]

torchode joins where it is installed. CPU, float32, one thread; the machine's load is printed with the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq

import neurode

try:
    import torchode
except ImportError:  # an optional peer
    torchode = None

TOLERANCE = 1e-5


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, one round after the other so that the machine's drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def forward(solve: Callable[[torch.Tensor], torch.Tensor], y0: torch.Tensor) -> Callable[[], object]:
    def run() -> torch.Tensor:
        with torch.no_grad():
            return solve(y0)

    return run


def backward(solve: Callable[[torch.Tensor], torch.Tensor], y0: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        start = y0.clone().requires_grad_()
        solve(start).sum().backward()

    return run


def van_der_pol(rounds: int) -> dict[str, Any]:
    """Van der Pol, mu = 2, batch 256, 200 outputs, dopri5 at 1e-5."""
    torch.manual_seed(0)
    y0, times = torch.randn(256, 2), torch.linspace(0, 10, 200)

    def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([y[:, 1], 2 * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], 1)

    options = {"method": "dopri5", "rtol": TOLERANCE, "atol": TOLERANCE}
    solvers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "torchdiffeq": lambda y: torchdiffeq.odeint(f, y, times, **options),
        "neurode, joint": lambda y: neurode.solve(f, y, (0, 10), t_eval=times, engine="eager", **options).ys,
        "neurode, per sample": lambda y: (
            neurode.solve(f, y, (0, 10), t_eval=times, batch_dim=0, engine="eager", **options).ys
        ),
    }
    if torchode is not None:
        term = torchode.ODETerm(f)
        control = torchode.IntegralController(atol=TOLERANCE, rtol=TOLERANCE, term=term)
        adjoint = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
        wide = times.expand(256, 200)
        solvers["torchode"] = lambda y: adjoint.solve(torchode.InitialValueProblem(y0=y, t_eval=wide)).ys
    return {
        "forward": interleaved({name: forward(s, y0) for name, s in solvers.items()}, rounds),
        "forward and backward": interleaved({name: backward(s, y0) for name, s in solvers.items()}, rounds),
    }


def spiral_field(rounds: int) -> dict[str, Any]:
    """RK4 x 20 on the field of the spiral classifier, batch 128, beside a bare chain of 80 evaluations of f."""
    torch.manual_seed(0)
    field, y0, ends = neurode.nn.MLP(6, (128, 128), zero_init=False), torch.randn(128, 6), torch.tensor([0.0, 1.0])
    zero = torch.zeros(())

    def chain(y: torch.Tensor) -> torch.Tensor:
        for _ in range(80):
            y = 0.5 * y + field(zero, y)  # the half keeps numbers, and gradients, of ordinary size
        return y

    def bare(y: torch.Tensor) -> torch.Tensor:
        for _ in range(80):
            y = field(zero, y)
        return y

    step = {"method": "rk4", "options": {"step_size": 0.05}}
    solvers = {
        "torchdiffeq": lambda y: torchdiffeq.odeint(field, y, ends, **step)[-1],
        "neurode": lambda y: neurode.solve(field, y, (0, 1), method="rk4", steps=20, engine="eager").y1,
    }
    return {
        "forward": interleaved({n: forward(s, y0) for n, s in {**solvers, "bare chain": bare}.items()}, rounds),
        "forward and backward": interleaved(
            {n: backward(s, y0) for n, s in {**solvers, "chain": chain}.items()}, rounds
        ),
    }


def show(title: str, found: dict[str, Any]) -> None:
    for mode, medians in found.items():
        print(f"\n{title}, {mode} (ms)")
        for name, value in medians.items():
            ratios = "  ".join(f"{other / value:5.2f}x {peer}" for peer, other in medians.items() if peer != name)
            print(f"  {name:22}{value:9.2f}   {ratios if name.startswith('neurode') else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }
    print(machine)
    results = {
        "machine": machine,
        "van der Pol": van_der_pol(arguments.rounds),
        "spiral field": spiral_field(arguments.rounds),
    }
    show("Van der Pol mu=2, batch 256, 200 outputs, dopri5 1e-5", results["van der Pol"])
    show("Spiral field, batch 128, RK4 x 20", results["spiral field"])
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
