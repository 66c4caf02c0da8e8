"""What a call of a tiny fused solve costs around the solve itself: the watch over `f`, the dispatch, the native call, apart.

    python benchmarks/overhead.py [--small] [--out benchmarks/results/overhead.json]

RK4 x 4 on one row of two numbers, float64, without gradients and with; medians of rounds in turn on one core. *native* is the
call into the library alone, *guards* the look at everything that `f` reaches and at what surrounds the call, *dispatch* all else
between `solve` and its solution. With gradients the whole is a solve and the derivative of its end, by PyTorch's engine.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import contest
import torch
from torch import Tensor, nn

import neurode
from neurode.fused import guards, watch
from neurode.fused.native import Machine, library

BARS = {"solve on a plain function": 45.0, "a layer of ten modules": 60.0}  # microseconds of the whole call


@dataclass(frozen=True)
class Parts:
    """Microseconds of one call."""

    whole: float
    guards: float
    native: float

    @property
    def dispatch(self) -> float:
        """What is neither."""
        return self.whole - self.guards - self.native


def predators(t: Tensor, y: Tensor) -> Tensor:
    """Lotka-Volterra."""
    prey, hunters = y[..., 0], y[..., 1]
    return torch.stack([1.5 * prey - prey * hunters, prey * hunters - 3.0 * hunters], -1)


class Ten(nn.Module):
    """A field of ten modules beside itself: a container, five linear layers and four activations."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [m for _ in range(4) for m in (nn.Linear(2, 2), nn.Tanh())]
        self.net = nn.Sequential(*hidden, nn.Linear(2, 2)).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


def calls() -> dict[str, tuple[Any, Callable[[Tensor], Tensor]]]:
    """For each row of the table the field, and the call."""
    options = {"method": "rk4", "steps": 4, "batch_dim": 0, "engine": "fused"}
    layer = neurode.nn.NeuralODE(Ten(), **options)
    function = lambda y: neurode.solve(predators, y, (0.0, 1.0), **options).y1
    return {"solve on a plain function": (predators, function), "a layer of ten modules": (layer.f, layer)}


def microseconds(run: Callable[[], Any], repeats: int) -> float:
    """Of one run, over some in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return 1e6 * (time.perf_counter() - start) / repeats


def look(field: Any) -> bool:
    """The guards of a call."""
    parts = watch.parts_of(field)
    watched = watch.find(parts)
    assert watched is not None, "the call is not one that is watched"
    return not guards.unusual_surroundings() and watched.holds(parts)


def native(run: Callable[[], Any], repeats: int) -> float:
    """Microseconds in the library in one run."""
    spent = []

    def timed(name: str) -> Any:
        call = getattr(Machine, name)

        def inner(self: Machine, solve: Any) -> None:
            start = time.perf_counter()
            call(self, solve)
            spent.append(time.perf_counter() - start)

        return inner

    kept = Machine.forward, Machine.backward
    Machine.forward, Machine.backward = timed("forward"), timed("backward")  # type: ignore[method-assign]
    try:
        for _ in range(repeats):
            run()
    finally:
        Machine.forward, Machine.backward = kept  # type: ignore[method-assign]
    return 1e6 * sum(spent) / repeats


def measure(field: Any, call: Callable[[Tensor], Tensor], gradients: bool, rounds: int, repeats: int) -> Parts:
    """Medians of the parts of one call."""
    y = torch.ones(1, 2, dtype=torch.float64, requires_grad=gradients)
    wanted = [y, *field.parameters()] if isinstance(field, nn.Module) else [y]

    def run() -> Any:
        with torch.set_grad_enabled(gradients):
            y1 = call(y)
            return torch.autograd.grad(y1, wanted, torch.ones_like(y1)) if gradients else y1

    for _ in range(4):
        run()
    found = [
        (microseconds(run, repeats), microseconds(lambda: look(field), repeats), native(run, repeats))
        for _ in range(rounds)
    ]
    return Parts(*map(statistics.median, zip(*found, strict=True)))


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="three short rounds: whether it runs, not how fast")
    parser.add_argument("--out", type=pathlib.Path, help="where to write the figures as JSON")
    asked = parser.parse_args()
    contest.one_core()
    torch.set_num_threads(1)
    rounds, repeats = (3, 10) if asked.small else (60, 200)
    print(f"{library().nd_isa().decode()}; microseconds a call; load {contest.load():.1f}")
    print(f"{'':40s} {'whole':>8s} {'guards':>8s} {'native':>8s} {'dispatch':>8s}")
    rows = []
    for name, (field, call) in calls().items():
        for gradients in (False, True):
            parts = measure(field, call, gradients, rounds, repeats)
            label = name + (", gradients" if gradients else "")
            bar = None if gradients else BARS[name]
            met = None if bar is None or asked.small else parts.whole < bar
            note = "" if met is None else f"  bar: {bar:g}, {'met' if met else 'MISSED'}"
            print(f"{label:40s} {parts.whole:8.1f} {parts.guards:8.1f} {parts.native:8.1f} {parts.dispatch:8.1f}{note}")
            rows.append({"row": label, **asdict(parts), "dispatch": parts.dispatch, "bar": bar, "met": met})
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps({"small": asked.small, "load": contest.load(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
