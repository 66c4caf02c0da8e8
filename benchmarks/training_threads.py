"""Two threads against one, inside a training loop: the spiral field, batch 128, RK4 x 20, gradients, an Adam step.

    python benchmarks/training_threads.py [--out benchmarks/results/training_threads.json]

neurode on the fused engine, and torchdiffeq where it is installed; rounds on one thread and on two in turn, medians. Needs two
cores that nothing else uses: `load` says how many processes wanted one.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import contest
import peers
import torch
from problems import spiral
from torch import Tensor

import neurode

STEPS, ROUNDS = 8, 9


def training(solve: Callable[[torch.nn.Module, Tensor], Tensor]) -> Callable[[], None]:
    """A few steps of training with `solve(field, y0)`."""
    problem = spiral()
    field, y0, target = problem.field, problem.y0, torch.randn(128, 6)
    assert isinstance(field, torch.nn.Module)
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            (solve(field, y0) - target).square().mean().backward()
            optimizer.step()

    return run


def loops() -> dict[str, Callable[[], None]]:
    """The training loops by library."""
    span, options = (0.0, 1.0), {"method": "rk4", "steps": 20, "batch_dim": 0, "engine": "fused"}
    found = {"neurode": training(lambda field, y0: neurode.solve(field, y0, span, **options).y1)}
    if peers.installed("torchdiffeq"):
        from torchdiffeq import odeint

        times, step = torch.tensor(span), {"step_size": 0.05}
        found["torchdiffeq"] = training(lambda field, y0: odeint(field, y0, times, method="rk4", options=step)[-1])
    return found


def measure(run: Callable[[], None]) -> dict[int, float]:
    """Median milliseconds of a training step on one thread and on two."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for threads, found in seconds.items():
            torch.set_num_threads(threads)
            run()  # the team awake, the caches warm
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return {threads: 1e3 * statistics.median(found) / STEPS for threads, found in seconds.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="where to write the figures as JSON")
    out = parser.parse_args().out
    print(f"a training step, milliseconds on one thread and on two; load {contest.load():.1f}")
    found = {}
    for name, run in loops().items():
        times = measure(run)
        found[name] = {"one": times[1], "two": times[2], "ratio": times[1] / times[2]}
        print(f"  {name:12s} {times[1]:8.2f} {times[2]:8.2f}   {times[1] / times[2]:.2f}x")
    word = "met" if found["neurode"]["ratio"] >= 1.75 else "MISSED"
    print(f"    bar: neurode on two threads >= 1.75 of one: {found['neurode']['ratio']:.2f}, {word}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"load": contest.load(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
