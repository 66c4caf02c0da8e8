"""Going back algebraically: rounding, memory and time of `gradient="reversible"` against the number of steps.

    python benchmarks/reversible.py [--small]

The field is that of the trained spiral classifier. Rounding is the distance from the gradient on PyTorch's tape through the same
scheme, `neurode.Reversible("rk4")`, as a share of its norm. Times are medians of
the processor time of interleaved forward and backward passes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from continuous import BATCH, SPAN, Classifier, classifier, in_double, train
from torch import Tensor

import neurode
from neurode import Reversible
from neurode.report.memory import peak_memory

ROUNDING, MEMORY, TIMED = (20, 40, 80, 160, 320, 640, 1280), (20, 160, 640, 2560), 100


def single(model: Classifier) -> Classifier:
    """The trained classifier as it is."""
    return model


def rounding(model: Classifier, steps: tuple[int, ...], coupling: float) -> list[float]:
    """Distance from the tape, for every number of steps; NaN where the strategy refuses what rounding would drown."""
    found = []
    method = Reversible("rk4", coupling)
    for count in steps:
        exact = _gradient(model, count, "autograd", method)
        try:
            other = _gradient(model, count, "reversible", method)
        except neurode.GradientError:
            found.append(float("nan"))
            continue
        found.append(float((other - exact).norm() / exact.norm()))
    return found


def _gradient(model: Classifier, steps: int, gradient: Any, method: Any) -> Tensor:
    y0 = model.lift(model.points[:BATCH]).detach().requires_grad_()
    y1 = neurode.solve(model.field, y0, SPAN, method=method, steps=steps, gradient=gradient, engine="eager").y1
    loss = torch.nn.functional.cross_entropy(model.head(y1), model.labels[:BATCH])
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [y0, *model.field.parameters()])])


def medians(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median processor seconds of each, in turn: others on the machine take their share of the clock, not of these."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            gc.collect()
            start = time.process_time()
            run()
            if round_:  # the first warms up
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report_times(model: Classifier, rounds: int) -> None:
    """Forward and backward, beside the tape through the same scheme and through the base method."""
    pairs = {
        "rk4 on the tape": ("autograd", "rk4"),
        "Reversible('rk4') on the tape": ("autograd", Reversible("rk4")),
        "reversible": ("reversible", "rk4"),
    }
    runs = {name: (lambda g=g, m=m: _gradient(model, TIMED, g, m)) for name, (g, m) in pairs.items()}
    times = medians(runs, rounds)
    base, coupled = (times[name] for name in list(pairs)[:2])
    print(f"\nforward and backward, {TIMED} steps, {torch.get_num_threads()} thread(s)")
    for name, seconds in times.items():
        print(f"  {name:32s}{1e3 * seconds:8.1f} ms {seconds / base:6.2f}x {seconds / coupled:6.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a smaller field, trained for a moment, at few steps")
    small = parser.parse_args().small
    model = classifier(16, 256) if small else classifier(64, 1024)
    print(f"trained to a loss of {train(model, 5 if small else 60):.3f}")
    steps, memory = (ROUNDING[:2], MEMORY[:2]) if small else (ROUNDING, MEMORY)
    print("\nrounding against the tape through the same scheme\n  " + " " * 24 + "".join(f"{n:>10d}" for n in steps))
    for dtype, of in (("float64", in_double), ("float32", single)):
        for coupling in (0.999, 0.9):
            values = rounding(of(model), steps, coupling)
            print(f"  {dtype}, coupling {coupling:<7g}" + "".join(f"{value:10.1e}" for value in values))
    print("\npeak live storage, KB\n  " + " " * 24 + "".join(f"{n:>10d}" for n in memory))
    peaks = [peak_memory(lambda n=n: [_gradient(model, n, "reversible", "rk4")]) / 1e3 for n in memory]
    print(f"  {'reversible':24s}" + "".join(f"{peak:10.0f}" for peak in peaks))
    report_times(model, 2 if small else 9)


if __name__ == "__main__":
    main()
