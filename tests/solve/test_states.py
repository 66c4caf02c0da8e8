"""States of every kind: any shape, pytrees, complex numbers, lower precision inside f."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.utils._pytree as pytree

import neurode

OPTIONS = [dict(method="rk4", steps=6), dict(method="tsit5", rtol=1e-8, atol=1e-10)]
BOTH = pytest.mark.parametrize("options", OPTIONS, ids=["fixed", "adaptive"])


@dataclasses.dataclass
class Body:
    place: torch.Tensor
    speed: torch.Tensor


pytree.register_dataclass(Body)


@BOTH
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4, 5), (1, 1)])
def test_tensors_of_any_shape(options, shape):
    y0 = torch.randn(shape)
    sol = neurode.solve(lambda t, y: -y, y0, (0, 1), t_eval=[0.0, 0.25, 1.0], **options)
    assert sol.ys.shape == (3, *shape) and sol.y1.shape == shape
    assert torch.equal(sol.ys[0], y0) and torch.allclose(sol.y1, y0 * torch.exp(torch.tensor(-1.0)), rtol=1e-4)


@BOTH
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (4, 2, 3)])
def test_rows_of_any_shape_and_the_shape_of_t(options, shape):
    seen = set()

    def f(t, y):
        seen.add((tuple(t.shape), t.dtype))
        return -y * t

    y0 = torch.randn(shape)
    sol = neurode.solve(f, y0, (0, 1), t_eval=[0.5, 1.0], batch_dim=0, **options)
    assert seen == {((4, *[1] * (len(shape) - 1)), torch.float64)}
    assert sol.ys.shape == (2, *shape)
    assert torch.allclose(sol.y1, y0 * torch.exp(torch.tensor(-0.5)), rtol=1e-4)


def test_t_is_a_tensor_of_the_real_dtype():
    seen = []
    f = lambda t, y: (seen.append((t.shape, t.dtype)), -y)[1]
    for dtype, real in (
        (torch.float32, torch.float32),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
    ):
        seen.clear()
        neurode.solve(f, torch.ones(2, dtype=dtype), (0, 1), method="rk4", steps=2)
        assert set(seen) == {(torch.Size([]), real)}


def structures():
    a, b = torch.randn(3, 2), torch.randn(3)
    return {
        "dict": ({"a": a, "b": b}, lambda t, y: {"a": -y["a"], "b": -2 * y["b"]}),
        "tuple": ((a, b), lambda t, y: (-y[0], -2 * y[1])),
        "nested": ({"x": [a, {"y": b}]}, lambda t, y: {"x": [-y["x"][0], {"y": -2 * y["x"][1]["y"]}]}),
        "dataclass": (Body(a, b), lambda t, y: Body(-y.place, -2 * y.speed)),
    }


@BOTH
@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("name", ["dict", "tuple", "nested", "dataclass"])
def test_pytrees_in_and_out(name, batch_dim, options):
    y0, f = structures()[name]
    sol = neurode.solve(f, y0, (0, 1), t_eval=[0.0, 0.5, 1.0], batch_dim=batch_dim, **options)
    assert pytree.tree_structure(sol.y1) == pytree.tree_structure(sol.ys) == pytree.tree_structure(y0)
    a, b = pytree.tree_leaves(sol.ys)
    start_a, start_b = pytree.tree_leaves(y0)
    assert a.shape == (3, 3, 2) and b.shape == (3, 3)
    times = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(a, start_a * torch.exp(-times)[:, None, None], rtol=1e-3)
    assert torch.allclose(b, start_b * torch.exp(-2 * times)[:, None], rtol=1e-3)


def test_a_pytree_is_its_vector():
    """Packing changes no step: the same solve as that of the concatenated vector, bit for bit."""
    a, b = torch.randn(3), torch.randn(2)
    f = lambda t, y: (torch.sin(y[0]) * t, y[1] * y[0].sum())

    def g(t, y):
        return torch.cat(f(t, y.split([3, 2])))

    tree = neurode.solve(f, (a, b), (0, 2), method="dopri5", rtol=1e-7)
    flat = neurode.solve(g, torch.cat([a, b]), (0, 2), method="dopri5", rtol=1e-7)
    assert torch.equal(torch.cat(tree.y1), flat.y1) and tree.stats.num_evaluations == flat.stats.num_evaluations


@BOTH
@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_states(dtype, batch_dim, options):
    options = dict(options, rtol=1e-5, atol=1e-6) if "rtol" in options else options
    y0 = torch.tensor([[1.0 + 1j], [0.5 - 2j]], dtype=dtype)
    sol = neurode.solve(lambda t, y: 1j * y, y0, (0, 1), t_eval=[0.5, 1.0], batch_dim=batch_dim, **options)
    turn = torch.exp(1j * torch.tensor([0.5, 1.0])).reshape(2, 1, 1).to(dtype)
    assert sol.ys.dtype == dtype and torch.allclose(sol.ys, y0 * turn, rtol=2e-4)
    pair = lambda t, y: torch.stack([-y[..., 1], y[..., 0]], -1)
    real = neurode.solve(pair, torch.view_as_real(y0), (0, 1), t_eval=[0.5, 1.0], batch_dim=batch_dim, **options)
    assert torch.allclose(torch.view_as_real(sol.ys), real.ys, rtol=2e-4, atol=2e-4)


@BOTH
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_f_under_autocast_keeps_state_time_and_error_in_float32(low, options):
    options = dict(options, rtol=1e-2, atol=1e-2) if "rtol" in options else options
    layer = torch.nn.Linear(4, 4, dtype=torch.float32)
    seen = []

    def f(t, y):
        with torch.autocast("cpu", dtype=low):
            dy = torch.tanh(layer(y))
        seen.append((t.dtype, y.dtype, dy.dtype))
        return dy

    y0 = torch.randn(3, 4, dtype=torch.float32)
    sol = neurode.solve(f, y0, (0, 1), **options)
    assert set(seen) == {(torch.float32, torch.float32, low)} and sol.y1.dtype == torch.float32
    exact = neurode.solve(lambda t, y: torch.tanh(layer(y)), y0, (0, 1), **options).y1
    assert torch.allclose(sol.y1, exact, atol=0.05)
    sol.y1.sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and torch.isfinite(layer.weight.grad).all()


def test_numbers_lists_and_arrays():
    import numpy as np

    for y0, shape in ((1.0, ()), (2, ()), ([1.0, 2.0], (2,)), ([[1, 2], [3, 4]], (2, 2)), (np.ones(3), (3,))):
        sol = neurode.solve(lambda t, y: -y, y0, (0, 1), method="rk4", steps=2)
        assert sol.y1.shape == shape and sol.y1.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("norm", ["rms", "max"])
def test_norms_by_name_and_by_hand(norm):
    f = lambda t, y: {"a": -y["a"], "b": torch.sin(20 * t) + 0 * y["b"]}
    y0 = {"a": torch.ones(50), "b": torch.zeros(1)}
    by_hand = {
        "rms": lambda y: torch.cat([y["a"], y["b"]]).square().mean().sqrt(),
        "max": lambda y: torch.maximum(y["a"].abs().max(), y["b"].abs().max()),
    }
    named = neurode.solve(f, y0, (0, 1), method="dopri5", norm=norm)
    called = neurode.solve(f, y0, (0, 1), method="dopri5", norm=by_hand[norm])
    assert named.stats.num_accepted == called.stats.num_accepted
    assert torch.allclose(named.y1["b"], called.y1["b"], rtol=1e-9)
    other = neurode.solve(f, y0, (0, 1), method="dopri5", norm="max" if norm == "rms" else "rms")
    assert (named.stats.num_accepted < other.stats.num_accepted) == (norm == "rms")


def test_a_user_s_tableau_is_a_method():
    butcher = neurode.ButcherTableau(
        name="my_heun", order=2, a=((), (1,)), b=(0.5, 0.5), c=(0, 1), source="this test"
    )  # fmt: skip
    mine = neurode.solve(lambda t, y: -y * t, torch.ones(2), (0, 1), method=butcher, steps=9)
    theirs = neurode.solve(lambda t, y: -y * t, torch.ones(2), (0, 1), method="heun", steps=9)
    assert torch.equal(mine.y1, theirs.y1) and mine.stats.method == "my_heun"


def test_an_unregistered_dataclass_says_how_to_register_it():
    @dataclasses.dataclass
    class Plain:
        place: torch.Tensor

    with pytest.raises(neurode.InputError, match=r"register_dataclass\(Plain\)"):
        neurode.solve(lambda t, y: y, Plain(torch.ones(2)), (0, 1))
