"""Fields of a few operations, which the native engine runs as straight lists on tapes: against the eager engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import eager, fused
from torch import Tensor, nn

import neurode
from neurode.fused import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not built (make native)")

TIMES = torch.tensor([0.0, 0.13, 0.3, 0.31, 0.6, 1.0], dtype=torch.float64)


def forced(t: Tensor, y: Tensor) -> Tensor:
    """Reads the time; numbers in every place of a product and a sum."""
    x, v = y[..., 0], y[..., 1]
    return torch.stack([v, 2.0 * (1 - x * x) * v - x + torch.sin(3.0 * t.reshape(x.shape if t.ndim else ())) / 2.0], -1)


class Mixed(nn.Module):
    """A small matrix, a sum over features, functions, and a copy of the state as a derivative."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.matrix = nn.Parameter(torch.randn(2, 2, dtype=torch.float64, generator=generator))
        self.rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        pair = torch.tanh(y[..., :2] @ self.matrix.T) - self.rate * y[..., :2]
        last = torch.exp(-(y**2).sum(-1, keepdim=True)) / (1.0 + y[..., 1:2] ** 2)
        return torch.cat([pair, last, y[..., 2:3]], -1)


def agree(f: Any, y0: Tensor, **options: Any) -> None:
    """The same steps, outputs and gradients on both engines."""
    found = []
    for solver in (fused, eager):
        y = y0.clone().requires_grad_()
        solution = solver(f, y, (0.0, 1.0), t_eval=TIMES, **options)
        weights = torch.linspace(0.5, 1.5, solution.ys.numel(), dtype=y.dtype).reshape(solution.ys.shape)
        wanted = [y, *(f.parameters() if isinstance(f, nn.Module) else [])]
        found.append((solution, torch.autograd.grad((solution.ys * weights).sum() + solution.y1.sum(), wanted)))
    (ours, our_grads), (theirs, their_grads) = found
    assert torch.equal(torch.as_tensor(ours.stats.num_accepted), torch.as_tensor(theirs.stats.num_accepted))
    assert torch.equal(torch.as_tensor(ours.stats.num_rejected), torch.as_tensor(theirs.stats.num_rejected))
    for a, b in zip((ours.ys, ours.y1, *our_grads), (theirs.ys, theirs.y1, *their_grads), strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp_min(1e-3)


EXPLICIT = [name for name in neurode.methods.METHODS if neurode.methods.get(name).kind == "explicit"]


@pytest.mark.parametrize("batch_dim", [0, None], ids=["rows", "joint"])
@pytest.mark.parametrize("method", EXPLICIT)
def test_every_explicit_method(method: str, batch_dim: int | None) -> None:
    adaptive = neurode.methods.get(method).adaptive
    options: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7} if adaptive else {"steps": 7}
    y0 = torch.randn(11, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    agree(forced, y0, method=method, batch_dim=batch_dim, **options)


@pytest.mark.parametrize("rows", [1, 3, 70, 200])
@pytest.mark.parametrize(
    "options", [{"method": "tsit5", "rtol": 1e-6}, {"method": "rk4", "steps": 5}], ids=["tsit5", "rk4"]
)
@pytest.mark.parametrize("batch_dim", [0, None], ids=["rows", "joint"])
def test_small_matrices_sums_and_copies(batch_dim: int | None, options: dict[str, Any], rows: int) -> None:
    y0 = torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    agree(Mixed(), y0, batch_dim=batch_dim, **options)


@pytest.mark.parametrize("options", [{"method": "dopri5"}, {"method": "rk4", "steps": 9}], ids=["adaptive", "grid"])
def test_a_row_depends_on_no_other(options: dict[str, Any]) -> None:
    """Bit for bit, wherever it lies and whatever happens to its neighbours; a NaN stays in its row."""
    y0 = torch.randn(150, 2, generator=torch.Generator().manual_seed(4))
    options = {"batch_dim": 0, "t_eval": TIMES, "on_failure": "nan", **options}
    whole = fused(forced, y0, (0.0, 1.0), **options)
    part = fused(forced, y0[77:90].clone(), (0.0, 1.0), **options)
    assert torch.equal(whole.ys[:, 77:90], part.ys) and torch.equal(whole.y1[77:90], part.y1)
    broken = y0.clone()
    broken[80] = float("nan")
    again = fused(forced, broken, (0.0, 1.0), **options)
    others = torch.arange(150) != 80
    assert torch.equal(again.ys[:, others], whole.ys[:, others]) and torch.isnan(again.y1[80]).all()


def test_what_is_recorded_does_not_change_the_numbers() -> None:
    field, y0 = Mixed(), torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    options = {"method": "dopri5", "batch_dim": 0, "t_eval": TIMES}
    recorded = fused(field, y0.clone().requires_grad_(), (0.0, 1.0), **options)
    with torch.no_grad():
        bare = fused(field, y0, (0.0, 1.0), **options)
    assert torch.equal(recorded.ys, bare.ys) and torch.equal(recorded.y1, bare.y1)


@pytest.mark.parametrize("options", [{"method": "dopri5"}, {"method": "rk4", "steps": 9}], ids=["adaptive", "grid"])
def test_a_failed_row_changes_no_gradient(options: dict[str, Any]) -> None:
    """Bit for bit those of the batch without it; and where every row has failed they are zero."""
    field, y0 = Mixed(), torch.randn(150, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    others = torch.arange(150) != 80
    options = {"batch_dim": 0, "t_eval": TIMES, "on_failure": "nan", **options}

    def gradients(start: Tensor, fine: Tensor) -> list[Tensor]:
        y = start.clone().requires_grad_()
        solution = fused(field, y, (0.0, 1.0), **options)
        loss = solution.ys[:, fine].square().sum() + solution.y1[fine].sum()
        of_y0, *of_weights = torch.autograd.grad(loss, [y, *field.parameters()])
        return [of_y0[fine], *of_weights]

    broken = y0.clone()
    broken[80] = float("nan")
    for ours, wanted in zip(gradients(broken, others), gradients(y0[others], others[others]), strict=True):
        assert torch.equal(ours, wanted)
    for nothing in gradients(torch.full_like(y0, float("nan")), others)[1:]:
        assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("options", [{"method": "dopri5"}, {"method": "rk4", "steps": 9}], ids=["adaptive", "grid"])
def test_gradients_of_the_samples_own_data(options: dict[str, Any]) -> None:
    """A field that reads the time, data of each row and a weight that all rows share, outputs anywhere and at both ends."""
    generator = torch.Generator().manual_seed(7)
    y0, rates = (torch.rand(70, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    weight = torch.tensor(0.4, dtype=torch.float64)

    def f(t: Tensor, y: Tensor, rate: Tensor, weight: Tensor) -> Tensor:
        return rate * torch.cos(t) * y - weight * y * y.flip(-1)

    found = []
    for solver in (fused, eager):
        y, r, w = (x.clone().requires_grad_() for x in (y0, rates, weight))
        args = (neurode.per_row(r), w)
        solution = solver(f, y, (0.0, 1.0), args=args, batch_dim=0, t_eval=TIMES, **options)
        found.append(torch.autograd.grad(solution.ys.square().sum() + solution.y1.sum(), [y, r, w]))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
