"""What each of two processes runs: gradients under DistributedDataParallel and FSDP2 against those of one process.

torchrun --nproc-per-node 2 tests/gradients/parallel.py [strategy ...]

Each strategy, on a fixed grid and with every row its own steps, in four arrangements: DDP, and `fully_shard` on the model, on
`f`, on the layers of `f`. The verdict is "equal" (to 1e-6 of each gradient's norm, in float64), or "refused" where the error
names a strategy that works.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import neurode
from neurode.fused.native import library
from neurode.fused.refusal import CannotLower

STRATEGIES = {
    "autograd": "autograd",
    "discrete": "discrete",
    "stage": neurode.Discrete(alive="stage"),
    "checkpoints": neurode.Discrete(checkpoints=2),
    "reversible": "reversible",
    "continuous": neurode.Continuous(),
    "interpolate": neurode.Continuous(interpolate=True),
    "quadrature": neurode.Continuous(quadrature=True),
    "auto": "auto",
    "fused": "auto",
}
SOLVES: dict[str, dict[str, Any]] = {
    "grid": {"method": "rk4", "steps": 4},
    "rows": {"method": "bosh3", "rtol": 1e-3, "batch_dim": 0},
}
TAPED = ("autograd", "auto", "fused")  # those that keep the tape where modules are sharded inside of f
# Strategies run on the eager engine; "fused" is engine="auto", which is the native one where that is built.
ENGINE = {"fused": "auto"}
MEMORY = 8_000  # for auto: less than the tape takes


class Model(nn.Module):
    """A lift, a flow and a head."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.lift = nn.Linear(2, 4)
        self.f = neurode.nn.MLP(4, (8,), zero_init=False)
        self.head = nn.Linear(4, 1)
        strategy = STRATEGIES[name]
        if isinstance(strategy, neurode.Continuous) and "rtol" in options:
            # An adjoint's own steps depend on the loss's scale, a mean over fewer rows here; tight, it does not show.
            strategy = replace(strategy, rtol=1e-6, atol=1e-9)
        self.options = {"gradient": strategy, "engine": ENGINE.get(name, "eager"), **options}
        self.options |= {"memory": MEMORY} if name == "auto" else {}
        self.said = ""

    def forward(self, x: Tensor) -> Tensor:
        solution = neurode.solve(self.f, self.lift(x), (0.0, 1.0), **self.options)
        self.said = f"{solution.stats.gradient}; {solution.stats.engine}"
        return self.head(solution.y1)


def sharded(model: Model, where: str) -> nn.Module:
    """`fully_shard` on the model, on `f`, or on the layers of `f`."""
    if where == "f":
        fully_shard(model.f)
    if where == "layers":
        for layer in model.f.modules():
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
    return fully_shard(model)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of one step, whole on every process."""
    model(x).square().mean().backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None for g in grads), "a gradient is missing"
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


def library_is_built() -> bool:
    """Whether there is a native engine to speak of."""
    try:
        library()
    except CannotLower:
        return False
    return True


def verdict(name: str, model: Model, kind: str, exact: list[Tensor], x: Tensor) -> str:
    """How one arrangement of one strategy compares with one process."""
    one = copy.deepcopy(model)
    one: Any = DistributedDataParallel(one) if kind == "ddp" else sharded(one, kind)
    try:
        grads = gradients(one, x)
    except neurode.GradientError as error:
        inside = kind in ("f", "layers") and name not in TAPED
        return "refused" if inside and "gradient='autograd'" in str(error) else f"FAILED: {error}"
    said = (one.module if isinstance(one, DistributedDataParallel) else one).said
    if name == "auto" and not said.startswith("autograd" if kind in ("f", "layers") else "discrete"):
        return f"FAILED: {said}"
    if name == "fused" and library_is_built() and ("; fused" in said) != (kind in ("ddp", "model")):
        return f"FAILED: {said}"
    off = max(float((a - b).norm() / a.norm()) for a, b in zip(exact, grads, strict=True))
    return "equal" if off <= 1e-6 else f"FAILED: off by {off:.1e}"


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore", RuntimeWarning)  # auto: that the memory cannot be kept where f is sharded
    rank, failures = dist.get_rank(), 0
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    for how, options in SOLVES.items():
        for name in sys.argv[1:] or STRATEGIES:
            torch.manual_seed(0)
            model = Model(name, options)
            exact = gradients(copy.deepcopy(model), x)
            for kind in ("ddp", "model", "f", "layers"):
                said = verdict(name, model, kind, exact, x[4 * rank : 4 * rank + 4])
                failures += said.startswith("FAILED")
                if rank == 0:
                    print(f"{name:12s} {how:6s} {kind:8s} {said}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(
        failures > 0
    )  # without the interpreter's end, where threads of gloo that are still there abort one run in ten


if __name__ == "__main__":
    main()
