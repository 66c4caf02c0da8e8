"""Where the fused engine stops paying: both engines on fields of growing size, beside the bytes of the narrowest tile.

    python benchmarks/cost_model.py [--rounds 5]

One thread, both engines in turn, medians. `engine="auto"` leaves to PyTorch what is larger than `cost.LARGEST_TILE`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import neurode
from neurode.fused import cost

STEPS = 4


class Convolutions(nn.Module):
    """The block of an ODE-Net (Chen et al. 2018) without its norms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(y)))


def dense(hidden: int) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    return lambda: neurode.nn.MLP(6, (hidden, hidden), zero_init=False), (6,)


FIELDS = {
    "MLP 6-64-64-6": dense(64),
    "MLP 6-512-512-6": dense(512),
    "MLP 6-1024-1024-6": dense(1024),
    "MLP 6-2048-2048-6": dense(2048),
    "two convolutions, 4 x 8 x 8": (lambda: Convolutions(4), (4, 8, 8)),
    "two convolutions, 16 x 8 x 8": (lambda: Convolutions(16), (16, 8, 8)),
    "two convolutions, 16 x 16 x 16": (lambda: Convolutions(16), (16, 16, 16)),
}


def measure(make: Callable[[], nn.Module], shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Milliseconds of forward and backward on either engine."""
    field, y0 = make(), torch.randn(32, *shape)
    found: dict[str, list[float]] = {"fused": [], "eager": []}
    for round_ in range(rounds + 1):
        for engine, times in found.items():
            start = time.perf_counter()
            y1 = neurode.solve(field, y0, (0.0, 1.0), method="rk4", steps=STEPS, batch_dim=0, engine=engine).y1
            torch.autograd.grad(y1.square().sum(), list(field.parameters()))
            if round_:
                times.append(1e3 * (time.perf_counter() - start))
    return {engine: statistics.median(times) for engine, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(
        "| field, batch 32, forward and backward | narrowest tile, KB | fused, ms | eager, ms | eager / fused | auto |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (make, shape) in FIELDS.items():
        program = neurode.explain(make(), torch.randn(2, *shape), batch_dim=0).program
        try:
            times = measure(make, shape, rounds)
        except neurode.EngineError as error:
            print(f"| {name} | | | | | {error} |")
            continue
        size = cost.tile_bytes(program, 4) >> 10 if program else 0
        auto = "fused" if program and not cost.too_large(program, 4) else "eager"
        ratio = times["eager"] / times["fused"]
        print(f"| {name} | {size:,} | {times['fused']:.2f} | {times['eager']:.2f} | {ratio:.2f} | {auto} |", flush=True)


if __name__ == "__main__":
    main()
