"""The fused engine against the eager one: states, counts, statuses, and every gradient."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from engines import eager, fused
from fields import FIELDS
from test_lowering import CNF, convert
from torch import Tensor, nn

import neurode
from neurode.fused import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not built (make native)")
FIXED = {"method": "rk4", "steps": 7}
DOPRI5 = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-8}


class Net(nn.Module):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(size + 1, 8), nn.Linear(8, size)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.cat([t.expand(y.shape[0], 1), y], 1))))


def gradients(solver: Any, f: Any, y: Tensor, span: Any, parameters: list[Tensor], **options: Any) -> list[Tensor]:
    """The solution and the gradients of a weighted sum of it."""
    y = y.clone().requires_grad_()
    leaves = [y, *parameters, *[t for t in span if isinstance(t, Tensor)]]
    if isinstance(options.get("t_eval"), Tensor) and options["t_eval"].requires_grad:
        leaves.append(options["t_eval"])
    sol = solver(f, y, span, **options)
    weight = torch.linspace(0.5, 1.5, sol.ys.numel(), dtype=y.dtype).reshape(sol.ys.shape)
    made = torch.autograd.grad((weight * sol.ys).sum() + (sol.y1**2).sum(), leaves, allow_unused=True)
    return [sol.ys.detach(), sol.y1.detach(), *[torch.zeros(()) if g is None else g for g in made]]


def same(mine: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-2)


def end_times() -> list[Tensor]:
    return [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.1, 0.9)]


@pytest.mark.parametrize("method", neurode.methods.METHODS)
@pytest.mark.parametrize("batch_dim", [0, None])
def test_every_explicit_method_agrees_with_eager(method: str, batch_dim: int | None) -> None:
    tableau = neurode.methods.get(method)
    if tableau.kind != "explicit":
        pytest.skip("not an explicit Runge-Kutta method")
    torch.manual_seed(0)
    f, y = Net().double(), torch.randn(5, 3, dtype=torch.float64)
    options = dict(rtol=1e-4, atol=1e-6) if tableau.adaptive else dict(steps=5)
    t_eval = torch.tensor([0.13, 0.3, 0.35, 0.6, 0.87], dtype=torch.float64)
    results = [
        gradients(
            s, f, y, end_times(), list(f.parameters()), method=method, batch_dim=batch_dim, t_eval=t_eval, **options
        )
        for s in (fused, eager)
    ]
    # Adaptive steps follow from error estimates, cancelling sums with weights up to 1e2 (Verner): rounding moves them.
    same(*results, 1e-9 if tableau.adaptive else 1e-11)


@pytest.mark.parametrize("options", [FIXED, {"method": "dopri5", "rtol": 1e-9, "atol": 1e-11}], ids=["rk4", "dopri5"])
def test_moving_ends_and_outputs_at_the_ends_agree_with_finite_differences(options: Any) -> None:
    torch.manual_seed(0)
    f, y = Net().double(), torch.randn(5, 3, dtype=torch.float64)
    outputs = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)

    def loss(t0: Any, t1: Any, solver: Any = eager) -> Tensor:
        return solver(f, y, (t0, t1), batch_dim=0, t_eval=outputs, **options).ys.pow(2).sum()

    leaves = end_times()
    mine = torch.autograd.grad(loss(*leaves, solver=fused), leaves)
    eps = 1e-6
    with torch.no_grad():
        start = (loss(0.1, 0.9) - loss(0.1 - eps, 0.9)) / eps  # only outwards: outputs must stay inside the span
        end = (loss(0.1, 0.9 + eps) - loss(0.1, 0.9)) / eps
    assert abs(float(mine[0] - start)) < 1e-4 * abs(float(start))
    assert abs(float(mine[1] - end)) < 1e-4 * max(abs(float(end)), 1.0)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [FIXED, DOPRI5], ids=["rk4", "dopri5"])
def test_end_state_and_gradients_agree(options: Any, dtype: torch.dtype, batch_dim: int | None) -> None:
    torch.manual_seed(1)
    f, y = Net().to(dtype), torch.randn(37, 3, dtype=dtype)
    options = {**options, "rtol": 1e-3, "atol": 1e-4} if "rtol" in options else options
    results = [
        gradients(s, f, y, end_times(), list(f.parameters()), batch_dim=batch_dim, **options) for s in (fused, eager)
    ]
    same(*results, 1e-10 if dtype is torch.float64 else 2e-5)


@pytest.mark.parametrize("name", [n for n, c in FIELDS.items() if c.rows])
def test_fields_agree_with_eager(name: str) -> None:
    torch.manual_seed(3)
    case = FIELDS[name]
    f = case.make()
    convert(f, torch.float64)
    y: Any = torch.rand(4, *case.shape, dtype=torch.float64) * 0.5 + 0.1
    made = []
    for solver in (fused, eager):
        y0 = (y, torch.zeros(4, 1, dtype=torch.float64)) if name in CNF else y
        sol = solver(f, y0, (0.0, 0.05), method="rk4", steps=3, batch_dim=0)
        made.append(list(sol.y1) if name in CNF else [sol.y1])
    same(*[[x.detach() for x in m] for m in made], 1e-11)


def test_counts_and_statuses_agree_per_row() -> None:
    f = Net().double()
    y = torch.randn(33, 3, dtype=torch.float64) * torch.linspace(0.1, 3, 33, dtype=torch.float64)[:, None]
    a, b = (s(f, y, (0.0, 2.0), batch_dim=0, method="tsit5", rtol=1e-7, atol=1e-9) for s in (fused, eager))
    for name in ("num_evaluations", "num_accepted", "num_rejected"):
        assert torch.equal(getattr(a.stats, name), getattr(b.stats, name)), name
    assert torch.equal(a.status.codes, b.status.codes)


@pytest.mark.parametrize("options", [FIXED, {"method": "dopri5", "rtol": 1e-4}], ids=["rk4", "dopri5"])
def test_a_row_that_fails_changes_no_bit_of_what_the_others_share(options: Any) -> None:
    torch.manual_seed(5)
    f, y = Net(), torch.randn(128, 3)
    bad = y.clone()
    bad[17] = float("nan")
    keep = torch.arange(128) != 17
    grads = []
    for start, rows in ((bad, keep), (y[keep], slice(None))):
        f.zero_grad()
        sol = fused(f, start, (0.0, 1.0), batch_dim=0, on_failure="nan", **options)
        (sol.y1[rows] ** 2).sum().backward()
        grads.append([p.grad.clone() for p in f.parameters()])
    assert all(map(torch.equal, *grads))


def test_tensors_computed_outside_get_their_gradient() -> None:
    made = []
    for solver in (fused, eager):

        def f(t: Tensor, y: Tensor) -> Tensor:
            return torch.sin(y @ inner)  # noqa: B023

        w = torch.full((3, 3), 0.3, dtype=torch.float64, requires_grad=True)
        inner = torch.tanh(w @ w)
        sol = solver(f, torch.ones(4, 3, dtype=torch.float64), (0.0, 1.0), batch_dim=0, **FIXED)
        sol.y1.sum().backward()
        made.append([sol.y1.detach(), w.grad])
    same(*made, 1e-11)


def test_a_tensor_and_another_computed_from_it_run_on_eager() -> None:
    p = torch.full((3, 3), 0.3, dtype=torch.float64, requires_grad=True)
    w = torch.sin(p * p)
    f = lambda t, y: torch.tanh(y @ w) + 0.1 * y @ p
    with pytest.raises(neurode.EngineError, match="computed from it"):
        fused(f, torch.ones(4, 3), (0.0, 1.0), batch_dim=0, **FIXED)


def test_data_of_single_rows_and_shared_arguments() -> None:
    torch.manual_seed(6)
    y = torch.rand(9, 2, dtype=torch.float64)
    made = []
    for solver in (fused, eager):
        rate = torch.linspace(0.5, 2, 9, dtype=torch.float64)[:, None].requires_grad_()
        gain = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        f = lambda t, y, k, g: -k * y + g * torch.sin(t)
        sol = solver(f, y, (0.0, 1.0), args=(neurode.per_row(rate), gain), batch_dim=0, **DOPRI5)
        sol.y1.sum().backward()
        made.append([sol.y1.detach(), rate.grad, gain.grad])
    same(*made, 1e-10)


def test_pytree_states_keep_their_structure() -> None:
    A = nn.Parameter(torch.tensor([[0.0, 1.0], [-1.0, -0.2]], dtype=torch.float64))
    f = lambda t, y: {"x": y["x"] @ A, "z": y["x"].sum(-1) - y["z"]}
    y = {"x": torch.rand(4, 2, dtype=torch.float64), "z": torch.rand(4, dtype=torch.float64)}
    for batch_dim in (0, None):
        made = []
        for solver in (fused, eager):
            A.grad = None
            sol = solver(f, y, (0.0, 1.0), batch_dim=batch_dim, t_eval=[0.2, 1.0], method="rk4", steps=9)
            (sol.ys["x"].sum() + (sol.ys["z"] ** 2).sum()).backward()
            made.append([sol.ys["x"].detach(), sol.ys["z"].detach(), A.grad.clone()])
        same(*made, 1e-11)


def test_backward_in_time_and_spans_of_each_row() -> None:
    f, y = Net().double(), torch.rand(6, 3, dtype=torch.float64)
    t1 = torch.linspace(0.2, 1.5, 6, dtype=torch.float64)
    for span in ((1.0, 0.0), (0.0, t1), (t1, 0.0)):
        for options in (DOPRI5, FIXED):
            results = [
                gradients(s, f, y, span, list(f.parameters()), batch_dim=0, **options)[:2] for s in (fused, eager)
            ] if not isinstance(span[0], Tensor) and not isinstance(span[1], Tensor) else [
                [s(f, y, span, batch_dim=0, **options).y1.detach()] for s in (fused, eager)
            ]  # fmt: skip
            same(*results, 1e-10)


def test_one_system_without_rows() -> None:
    p = nn.Parameter(torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=torch.float64))

    def f(t: Tensor, y: Tensor) -> Tensor:
        u, v = y
        return torch.stack([p[0] * u - p[1] * u * v, -p[2] * v + p[3] * u * v])

    y = torch.tensor([1.0, 1.0], dtype=torch.float64)
    same(*[gradients(s, f, y, (0.0, 2.0), [p], method="tsit5", rtol=1e-6) for s in (fused, eager)], 1e-9)


def test_too_many_steps_is_a_status() -> None:
    y = torch.ones(3, 1, dtype=torch.float64)
    a, b = (
        s(
            lambda t, y: 50 * torch.cos(50 * t) * y,
            y,
            (0.0, 10.0),
            batch_dim=0,
            max_steps=20,
            on_failure="nan",
            **DOPRI5,
        )
        for s in (fused, eager)
    )
    assert torch.equal(a.status.codes, b.status.codes) and bool(a.y1.isnan().all())


def test_four_threads_solve_four_models() -> None:
    torch.manual_seed(8)
    models, y = [Net().double() for _ in range(4)], torch.randn(9, 3, dtype=torch.float64)
    expected = [eager(m, y, (0.0, 1.0), batch_dim=0, **DOPRI5).y1.detach() for m in models]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(40):
            sol = fused(models[i], y, (0.0, 1.0), batch_dim=0, **DOPRI5)
            sol.y1.sum().backward()
            if not torch.allclose(sol.y1.detach(), expected[i], atol=1e-9):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_backward_twice_needs_and_honours_retain_graph() -> None:
    f, y = Net().double(), torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    loss = fused(f, y, (0.0, 1.0), batch_dim=0, **DOPRI5).y1.sum()
    first = torch.autograd.grad(loss, y, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, y)[0])


def test_a_parameter_changed_in_place_before_backward_is_an_error() -> None:
    f, y = Net().double(), torch.rand(5, 3, dtype=torch.float64)
    loss = fused(f, y, (0.0, 1.0), batch_dim=0, **FIXED).y1.sum()
    with torch.no_grad():
        f.a.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _wrong_shape(t: Any, y: Any) -> Any:
    return y[:, :1]


def _own_error(t: Any, y: Any) -> Any:
    raise LookupError("no such table")


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [(_wrong_shape, neurode.FieldError, r"shape \(4, 1\)"), (_own_error, LookupError, "^no such table$")],
    ids=["wrong shape", "its own error"],
)
def test_a_field_that_fails_on_every_engine_says_so_itself(f: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        neurode.solve(f, torch.ones(4, 2), (0.0, 1.0), method="rk4", steps=4, batch_dim=0, engine="fused")


def test_an_error_of_the_recording_alone_is_no_error_of_the_field() -> None:
    y0 = torch.randn(5, 3, requires_grad=True)

    def f(t: Any, y: Any) -> Any:
        if len(y) != 5:
            raise ValueError("five rows")
        # This needs gradients, as the solve has them.
        return -0.5 * torch.autograd.grad((y**2).sum(), y, create_graph=True)[0]

    with pytest.raises(neurode.EngineError, match="five rows"):
        neurode.solve(f, y0, (0.0, 1.0), batch_dim=0, engine="fused", **FIXED)


NOTHING: dict[str, Any] = {
    "a gain of zero": lambda net, y: -y + 0.0 * net(y),
    "an input of zeros": lambda net, y: net(torch.zeros_like(y)) - y,
    "a sign": lambda net, y: torch.sign(net(y)) - y,
    "a mask": lambda net, y: net(y) * torch.zeros(2, dtype=y.dtype) - y,
    "never chosen": lambda net, y: torch.where(torch.zeros(2, dtype=torch.bool), net(y), -y),
}


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("case", NOTHING)
def test_a_layer_that_gets_no_gradient_has_zeros(case: str, batch_dim: int | None) -> None:
    torch.manual_seed(0)
    net, y0 = nn.Linear(2, 2).double(), torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    found = []
    for solve in (fused, eager):
        out = solve(lambda t, y: NOTHING[case](net, y), y0, (0.0, 1.0), batch_dim=batch_dim, **FIXED).y1
        grads = torch.autograd.grad(out.square().sum(), [y0, *net.parameters()], allow_unused=True)
        found.append([out, *(torch.zeros(1) if g is None else g for g in grads)])
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs.to(mine), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "f", [lambda t, y: y[:, :0].sum(-1, keepdim=True) - y, lambda t, y: y[:, :0] @ torch.ones(0, 2) - y]
)
def test_sums_over_nothing_are_eager(f: Any) -> None:
    with pytest.raises(neurode.EngineError, match="over nothing"):
        neurode.solve(f, torch.ones(3, 2), (0.0, 1.0), engine="fused", **FIXED)
