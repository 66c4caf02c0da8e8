"""Gradients: time, memory and error of every strategy, on one problem in one run.

The problem is the spiral field's size, batch 128, RK4 on equal steps. Times are medians of repeated forward and backward
passes, the candidates in turn; memory is the peak of live tensor storage, less what lived before.

    python benchmarks/gradients.py [--peers]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import neurode
from neurode.report.memory import peak_memory

BATCH, REPEATS = 128, 7


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Tensor]:
    """A field of the spiral classifier's shape, far from its initial zeros, and a batch of states."""
    torch.manual_seed(0)
    field = neurode.nn.MLP(6, (64, 64), zero_init=False).to(dtype)
    return field, torch.randn(BATCH, 6, dtype=dtype)


def passes(field: torch.nn.Module, y0: Tensor, steps: int, gradient: Any, method: Any = "rk4") -> Callable[[], Any]:
    """One forward and backward pass."""

    def run() -> tuple[Tensor, ...]:
        y1 = neurode.solve(field, y0, (0.0, 2.0), method=method, steps=steps, gradient=gradient).y1
        return torch.autograd.grad(y1.square().mean(), list(field.parameters()))

    return run


def median_times(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each, taken in turn so that a slow spell meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(REPEATS):
        for name, run in runs.items():
            gc.collect()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def strategies(steps: int) -> dict[str, Any]:
    """The strategies by the names that they are reported under."""
    root = round(steps**0.5)
    return {
        "autograd": "autograd",
        "discrete": "discrete",
        "discrete, alive='stage'": neurode.Discrete(alive="stage"),
        f"discrete, checkpoints={root}": neurode.Discrete(checkpoints=root),
        "continuous": "continuous",
    }


def torchdiffeq_adjoint(field: torch.nn.Module, y0: Tensor, steps: int) -> Callable[[], Any]:
    """torchdiffeq's adjoint on the same problem."""
    from torchdiffeq import odeint_adjoint

    times, options = torch.tensor([0.0, 2.0], dtype=y0.dtype), {"step_size": 2.0 / steps, "perturb": False}

    def run() -> tuple[Tensor, ...]:
        # torchdiffeq's "rk4" is the 3/8 rule: as many evaluations, another method of order 4.
        y1 = odeint_adjoint(field, y0, times, method="rk4", options=options)[-1]
        return torch.autograd.grad(y1.square().mean(), list(field.parameters()))

    return run


def relative(grads: Any, exact: Any) -> float:
    """The error of a gradient, as a share of its norm."""
    off = torch.cat([(g - e).flatten() for g, e in zip(grads, exact, strict=True)]).norm()
    return (off / torch.cat([e.flatten() for e in exact]).norm()).item()


def report_times(steps: int, peers: bool) -> None:
    """Time and error at one number of steps."""
    field, y0 = problem()
    runs = {name: passes(field, y0, steps, gradient) for name, gradient in strategies(steps).items()}
    if peers:
        runs["torchdiffeq adjoint (3/8 rule)"] = torchdiffeq_adjoint(field, y0, steps)
    exact, times = runs["autograd"](), median_times(runs)
    print(f"RK4, {steps} steps, batch {BATCH}, float32, {torch.get_num_threads()} thread(s)")
    for name, seconds in times.items():
        ratio, error = seconds / times["autograd"], relative(runs[name](), exact)
        print(f"  {name:34s} {1e3 * seconds:8.1f} ms  {ratio:5.2f}x  gradient off by {error:.1e}")


def report_memory() -> None:
    """Peak live storage against the number of steps."""
    field, y0 = problem()
    kinds = {**strategies(256), "discrete, checkpoints=16": neurode.Discrete(checkpoints=16)}
    kinds.pop("discrete, alive='stage'")
    print("peak live storage, KB")
    for name, gradient in kinds.items():
        peaks = [peak_memory(passes(field, y0, steps, gradient)) / 1e3 for steps in (20, 80, 320, 1280, 2560)]
        print(f"  {name:34s} " + " ".join(f"{peak:10.0f}" for peak in peaks))


def report_rounding() -> None:
    """The exact strategies against the tape, in both precisions."""
    for dtype in (torch.float64, torch.float32):
        field, y0 = problem(dtype)
        exact = passes(field, y0, 100, "autograd")()
        for name in ("discrete",):
            error = relative(passes(field, y0, 100, name)(), exact)
            print(f"{name} against autograd, 100 steps, {dtype}: {error:.1e} of the gradient's norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", action="store_true", help="time torchdiffeq's adjoint too, which must be installed")
    peers = parser.parse_args().peers
    report_rounding()
    report_times(100, peers)
    report_memory()


if __name__ == "__main__":
    main()
