"""`gradient="discrete"` is the gradient of the tape, to rounding, for every input, with every way of choosing steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neurode
from neurode import Discrete, GradientError, solve

METHODS = {
    "euler": dict(method="euler", step_size=0.13),
    "rk4": dict(method="rk4", steps=7),
    "bosh3": dict(method="bosh3", rtol=1e-4),
    "dopri5": dict(method="dopri5", rtol=1e-5),
    "tsit5": dict(method="tsit5", rtol=1e-4),
    "dop853": dict(method="dop853", rtol=1e-6),
}
KINDS = {"step": Discrete(), "stage": Discrete(alive="stage"), "three": Discrete(checkpoints=3)}
WANTED = 1e-11  # times are differences of nearly equal numbers: their gradients agree to some 1e-12


def agree(a: Any, b: Any, limit: float = WANTED) -> None:
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert (x - y).norm() <= limit * max(float(x.norm()), 1e-3)


class Problem:
    """A network, a weight made by another tensor and passed as an argument, times of all kinds."""

    def __init__(self, rows: str | None) -> None:
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        self.p = torch.randn(3, 3, requires_grad=True)
        self.y0 = torch.randn(12, 3, requires_grad=True)
        self.rows = rows
        if rows == "own":
            self.t0, self.t1 = torch.linspace(0, 0.2, 12), torch.linspace(1, 3.1, 12)
        else:
            self.t0, self.t1 = torch.tensor(0.1), torch.tensor(1.3)

    def field(self, t: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(self.net(y) @ w) * torch.cos(t) - 0.1 * y

    def gradients(self, gradient: Any, outputs: str | None, times_move: bool, options: Any) -> Any:
        t0, t1 = (t.clone().requires_grad_(times_move) for t in (self.t0, self.t1))
        wanted = [self.y0, self.p, *self.net.parameters(), *([t0, t1] if times_move else [])]
        t_eval = None
        if outputs:
            t_eval = torch.tensor([0.2, 0.5, 0.5, 0.9, 1.0] if self.rows == "own" else [0.1, 0.3, 0.5, 0.50001, 1.3])
            if outputs == "moving":
                wanted.append(t_eval.requires_grad_())
        solution = solve(
            self.field, self.y0, (t0, t1), args=(self.p * 2,), t_eval=t_eval, gradient=gradient,
            batch_dim=None if self.rows is None else 0, **options,
        )  # fmt: skip
        loss = solution.y1.sin().sum() + solution.ys.square().sum() + solution.ts.sin().sum()
        return solution, torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [None, "same", "own"])
@pytest.mark.parametrize("outputs", [None, "still", "moving"])
@pytest.mark.parametrize("times_move", [False, True])
def test_equals_the_tape(method: str, rows: str | None, outputs: str | None, times_move: bool) -> None:
    case, options = Problem(rows), METHODS[method]
    solution, exact = case.gradients("autograd", outputs, times_move, options)
    for kind in KINDS.values():
        other, grads = case.gradients(kind, outputs, times_move, options)
        torch.testing.assert_close(other.ys, solution.ys, rtol=1e-12, atol=1e-12)
        agree(exact, grads)


def test_rows_that_leave_the_batch() -> None:
    y0 = torch.randn(40, 2, requires_grad=True)
    t1 = torch.where(torch.arange(40) % 2 == 0, 0.3, 6.0).requires_grad_()
    rate, w = torch.rand(40, 1).requires_grad_(), torch.randn(2, 2, requires_grad=True)
    f = lambda t, y, k, w: -k * y + torch.sin(3 * y @ w)
    grads = []
    for gradient in ("autograd", *KINDS.values()):
        solution = solve(
            f, y0, (torch.zeros(40), t1), args=(neurode.per_row(rate), w), batch_dim=0, compact=True, gradient=gradient
        )
        grads.append(torch.autograd.grad(solution.y1.square().sum(), (y0, rate, w, t1)))
    for other in grads[1:]:
        agree(grads[0], other)


def test_jumps_pytrees_and_time_backward() -> None:
    w = torch.tensor(0.7, requires_grad=True)
    a, b = torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)

    def f(t: Tensor, y: Any) -> Any:
        return {"a": w * torch.sin(y["a"]) * torch.where(t < 0.4, 1.0, -2.0), "b": -y["b"] * w}

    grads = []
    for gradient in ("autograd", *KINDS.values()):
        y1 = solve(f, {"a": a, "b": b}, (1.0, 0.0), method="dopri5", jump_at=[0.4], gradient=gradient).y1
        grads.append(torch.autograd.grad(y1["a"].sin().sum() + y1["b"].sum(), (w, a, b)))
    for other in grads[1:]:
        agree(grads[0], other)


def test_single_precision() -> None:
    torch.manual_seed(0)
    net, y0 = neurode.nn.MLP(2, (16,), zero_init=False).float(), torch.randn(32, 2, dtype=torch.float32)
    exact, grads = (
        torch.autograd.grad(
            solve(net, y0, (0, 2), method="rk4", steps=40, gradient=g).y1.sin().sum(), list(net.parameters())
        )
        for g in ("autograd", "discrete")
    )
    agree(exact, grads, 1e-5)


def test_backward_twice_over_one_graph_and_counts() -> None:
    w = torch.tensor(0.5, requires_grad=True)
    for kind in KINDS.values():
        solution = solve(lambda t, y: w * y, [1.0], (0.0, 1.0), method="rk4", steps=10, gradient=kind)
        first = torch.autograd.grad(solution.y1.sum(), w, retain_graph=True)
        assert torch.autograd.grad(solution.y1.sum(), w) == first
        assert solution.stats.backward.num_accepted == 10 and solution.stats.backward.num_calls >= 40


# ---- what cannot be differentiated is refused


def refused(f: Any, match: str, **options: Any) -> None:
    options = {"method": "rk4", "steps": 4, "gradient": "discrete", **options}
    with pytest.raises(GradientError, match=match) as error:
        solve(f, torch.ones(4, 3, requires_grad=True), (0.0, 1.0), **options)
    assert "gradient='autograd'" in str(error.value)


def test_second_derivatives_and_transforms_are_refused() -> None:
    w = torch.tensor(0.5, requires_grad=True)
    end = lambda y: solve(lambda t, y: w * y, y, (0.0, 1.0), method="rk4", steps=4, gradient="discrete").y1.sum()
    with pytest.raises(GradientError, match="autograd"):
        torch.autograd.grad(end(torch.ones(2)), w, create_graph=True)
    with pytest.raises(GradientError, match="autograd"):
        torch.func.grad(end)(torch.ones(2))


def test_a_tensor_used_later_only_is_refused_not_forgotten() -> None:
    early, late = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    y1 = solve(
        lambda t, y: y * (early if t < 0.5 else late),
        torch.ones(1),
        (0.0, 1.0),
        method="rk4",
        steps=4,
        gradient="discrete",
    ).y1
    with pytest.raises(GradientError, match="at some times"):
        y1.sum().backward()


def test_memory_grows_by_the_states_alone_or_not_at_all() -> None:
    """Peak live storage, as the reports measure it: RK4, a state of 3 KB, more and more steps."""
    from neurode.report.memory import peak_memory

    torch.manual_seed(0)
    net, y0 = neurode.nn.MLP(6, (64, 64), zero_init=False).float(), torch.randn(128, 6, dtype=torch.float32)

    def peak(gradient: Any, steps: int) -> int:
        def run() -> Any:
            options = {"method": "rk4", "steps": steps, "gradient": gradient, "engine": "eager"}
            return torch.autograd.grad(solve(net, y0, (0.0, 2.0), **options).y1.sum(), list(net.parameters()))

        return peak_memory(run)

    state = y0.numel() * y0.element_size()
    for kind in (Discrete(), Discrete(alive="stage")):
        grown = peak(kind, 120) - peak(kind, 20)
        assert 0.95 * 100 * state < grown < 1.05 * 100 * state
    few = [peak(Discrete(checkpoints=16), steps) for steps in (20, 60, 120)]
    assert max(few) < 1.1 * min(few)
    assert peak("autograd", 120) > 5.5 * peak("autograd", 20)
