"""A training step of programs written for torchdiffeq, on torchdiffeq and on the drop-in, in turns in one run.

    python benchmarks/dropin.py                        # with the fused engine where it serves
    NEURODE_NATIVE=none python benchmarks/dropin.py    # on the eager engine alone

The fields are those of its examples: ode_demo.py's spiral (20 states of shape (1, 2)) and a flow with its log-density as a
tuple. One thread; forward, loss and backward to all parameters; medians.
"""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

import neurode.torchdiffeq

ROUNDS = 11


class Spiral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y**3)


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 32), nn.Linear(32, 2)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.a(state[0]))
        trace = ((1 - h * h) * (self.a.weight * self.b.weight.T).sum(1)).sum(1, keepdim=True)
        return self.b(h), -trace


def step(library: Any, name: str, field: nn.Module, y0: Any, **options: Any) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    t = torch.linspace(0.0, 1.0, 10)
    out = getattr(library, name)(field, y0, t, rtol=1e-5, atol=1e-6, **options)
    loss = sum(x[-1].square().mean() for x in (out if isinstance(out, tuple) else (out,)))
    torch.autograd.grad(loss, list(field.parameters()))
    return time.perf_counter() - start


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spiral, flow = (Spiral(), torch.randn(20, 1, 2)), (Flow(), (torch.randn(512, 2), torch.zeros(512, 1)))
    cases = {
        "spiral, dopri5": ("odeint", *spiral, {"method": "dopri5"}),
        "spiral, rk4": ("odeint", *spiral, {"method": "rk4"}),
        "spiral, dopri5, adjoint": ("odeint_adjoint", *spiral, {"method": "dopri5"}),
        "flow of 512, dopri5": ("odeint", *flow, {"method": "dopri5"}),
        "flow of 512, rk4, step 0.05": ("odeint", *flow, {"method": "rk4", "options": {"step_size": 0.05}}),
        "flow of 512, dopri5, adjoint": ("odeint_adjoint", *flow, {"method": "dopri5"}),
    }
    print("| training step | torchdiffeq 0.2.5, ms | here, ms | ratio |\n| --- | --- | --- | --- |")
    for case, (name, field, y0, options) in cases.items():
        found: dict[Any, list[float]] = {torchdiffeq: [], neurode.torchdiffeq: []}
        for round_ in range(ROUNDS + 2):
            for library, times in found.items():
                seconds = step(library, name, field, y0, **options)
                if round_ > 1:
                    times.append(1e3 * seconds)
        theirs, ours = (statistics.median(times) for times in found.values())
        print(f"| {case} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.1f} |")


if __name__ == "__main__":
    main()
