"""What each of two processes runs: gradients under DistributedDataParallel and FSDP2 against those of one process.

torchrun --nproc-per-node 2 tests/gradients/parallel.py
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import neurode

STRATEGIES = {
    "autograd": "autograd",
    "discrete": "discrete",
    "stage": neurode.Discrete(alive="stage"),
    "checkpoints": neurode.Discrete(checkpoints=2),
    "continuous": "continuous",
}


class Model(nn.Module):
    """A lift, a flow and a head."""

    def __init__(self, gradient: Any) -> None:
        super().__init__()
        self.lift = nn.Linear(2, 4)
        self.f = neurode.nn.MLP(4, (8,), zero_init=False)
        self.head = nn.Linear(4, 1)
        self.gradient = gradient

    def forward(self, x: Tensor) -> Tensor:
        y1 = neurode.solve(self.f, self.lift(x), (0.0, 1.0), method="rk4", steps=4, gradient=self.gradient).y1
        return self.head(y1)


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


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float64)
    rank, failures = dist.get_rank(), []
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    mine = x[4 * rank : 4 * rank + 4]
    for name, gradient in STRATEGIES.items():
        torch.manual_seed(0)
        model = Model(gradient)
        exact = gradients(copy.deepcopy(model), x)
        for kind in ("ddp", "model", "f", "layers"):
            one = copy.deepcopy(model)
            one = DistributedDataParallel(one) if kind == "ddp" else sharded(one, kind)
            try:
                grads = gradients(one, mine)
            except neurode.GradientError as error:
                verdict = "refused" if kind in ("f", "layers") and "gradient='autograd'" in str(error) else "FAILED"
            else:
                off = max(float((a - b).norm() / a.norm()) for a, b in zip(exact, grads, strict=True))
                verdict = "equal" if off <= 1e-6 else f"FAILED: off by {off:.1e}"
            if name == "autograd" and verdict != "equal":
                verdict = "FAILED"
            failures += [verdict] if verdict.startswith("FAILED") else []
            if rank == 0:
                print(f"{name:12s} {kind:8s} {verdict}", flush=True)
    dist.destroy_process_group()
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
