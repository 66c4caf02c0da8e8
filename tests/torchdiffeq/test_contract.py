"""What goes in and comes out: the contract of torchdiffeq 0.2.5, from its description."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import namedtuple

import pytest
import torch
import torchdiffeq as theirs

import neurode.torchdiffeq as ours

T = torch.linspace(0.0, 1.0, 3, dtype=torch.float64)
NAMES = ("odeint", "odeint_adjoint", "odeint_event", "odeint_dense")
METHODS = tuple(sys.modules["torchdiffeq._impl.odeint"].SOLVERS)


def decay(t, y):
    return -y


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    mine, original = (inspect.signature(getattr(lib, name)).parameters for lib in (ours, theirs))
    assert list(mine) == list(original)
    for key, parameter in original.items():
        assert mine[key].kind == parameter.kind
        if key != "odeint_interface":
            assert mine[key].default == parameter.default


def test_version():
    assert ours.__version__ == theirs.__version__


def test_arguments_by_keyword_and_not_by_position():
    assert ours.odeint(func=decay, y0=torch.ones(2), t=T).shape == (3, 2)
    with pytest.raises(TypeError):
        ours.odeint(decay, torch.ones(2), T, 1e-3)


@pytest.mark.parametrize("interface", [ours.odeint, ours.odeint_adjoint])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 3)])
def test_tensor_state(interface, shape):
    y0 = torch.randn(shape, requires_grad=True)
    kwargs = {"adjoint_params": ()} if interface is ours.odeint_adjoint else {}
    ys = interface(decay, y0, T, **kwargs)
    assert type(ys) is torch.Tensor and ys.shape == (3, *shape) and ys.dtype == y0.dtype
    assert torch.equal(ys[0], y0)
    torch.testing.assert_close(ys[-1], y0 * torch.exp(-T[-1]), rtol=1e-6, atol=1e-8)
    (grad,) = torch.autograd.grad(ys[0].sum() + ys[-1].sum(), y0)
    torch.testing.assert_close(grad, torch.full(shape, 1 + float(torch.exp(-T[-1]))), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("interface", [ours.odeint, ours.odeint_adjoint])
def test_tuple_state(interface):
    seen = []

    def func(t, y):
        seen.append((t, y))
        return [y[1], -y[0].reshape(-1), 0 * y[2]]  # a list, and another shape of the same size

    y0 = (torch.zeros(2, 1), torch.ones(2), torch.ones((), dtype=torch.float32))
    kwargs = {"adjoint_params": ()} if interface is ours.odeint_adjoint else {}
    ys = interface(func, y0, T, **kwargs)
    assert type(ys) is tuple and [y.shape for y in ys] == [(3, 2, 1), (3, 2), (3,)]
    assert {y.dtype for y in ys} == {torch.float64}  # promoted to one
    torch.testing.assert_close(ys[0][:, 0, 0], torch.sin(T), rtol=1e-6, atol=1e-8)
    t, y = seen[-1]
    assert t.ndim == 0 and t.dtype == torch.float64 and not t.requires_grad
    assert type(y) is tuple and [part.shape for part in y] == [(2, 1), (2,), ()]


def test_namedtuple_comes_back_as_a_tuple():
    State = namedtuple("State", "a b")
    ys = ours.odeint(lambda t, y: (y[1], -y[0]), State(torch.zeros(1), torch.ones(1)), T)
    assert type(ys) is tuple


def test_views_of_the_state_may_require_grad_inside_func():
    def divergence(t, state):
        z, _ = state
        with torch.enable_grad():
            z = z.requires_grad_(True)
            dz = torch.sin(z)
            (slope,) = torch.autograd.grad(dz.sum(), z)
        return dz.detach(), -slope

    with torch.no_grad():
        z, log = ours.odeint(divergence, (torch.ones(3), torch.zeros(3)), T)
    assert z.shape == log.shape == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float64])
def test_dtypes(dtype, t_dtype):
    times = []

    def func(t, y):
        times.append(t)
        return -y

    ys = ours.odeint(func, torch.ones(2, dtype=dtype), T.to(t_dtype), rtol=1e-5, atol=1e-6)
    assert ys.dtype == dtype
    assert {t.dtype for t in times} == {dtype.to_real()}


def test_complex_values():
    y0 = torch.ones(2, dtype=torch.complex128)
    ys = ours.odeint(lambda t, y: 1j * y, y0, T)
    torch.testing.assert_close(ys[:, 0], torch.exp(1j * T), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["euler", "rk4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_grid(method, dtype):
    with torch.inference_mode():
        y0, t = torch.ones(4, dtype=dtype), T.to(dtype)
        ys = ours.odeint(decay, y0, t, method=method)
        reference = theirs.odeint(decay, y0, t, method=method)
    assert ys.dtype == dtype
    torch.testing.assert_close(ys, reference, rtol=2e-2, atol=0)


def test_what_func_returns_is_cast():
    ys = ours.odeint(lambda t, y: -y.double(), torch.ones(2, dtype=torch.float32), T, rtol=1e-5, atol=1e-6)
    assert ys.dtype == torch.float32


def test_default_tolerances_below_float32_are_accepted():
    ys = ours.odeint(decay, torch.ones(2, dtype=torch.float32), T)
    torch.testing.assert_close(ys[-1], torch.full((2,), 0.36787944, dtype=torch.float32), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "scipy_solver"])
def test_one_time(method):
    y0 = torch.ones(2)
    assert torch.equal(ours.odeint(decay, y0, T[:1], method=method), y0[None])


@pytest.mark.parametrize("method", [m for m in METHODS if m != "scipy_solver"])
def test_decreasing_times(method):
    times = []

    def func(t, y):
        times.append(float(t))
        return y * torch.cos(t)

    t = torch.linspace(2.0, 1.0, 41)
    ys = ours.odeint(func, torch.ones(1), t, method=method, rtol=1e-6, atol=1e-8)
    exact = torch.exp(torch.sin(t) - torch.sin(t[0]))[:, None]
    assert min(times) >= 1.0 - 1e-6 and max(times) <= 2.0  # true times, nothing beyond the span
    limit = 2e-2 if method == "euler" else 1e-3
    assert float((ys - exact).abs().max()) < limit


BAD = [
    ({"y0": [torch.ones(1)]}, AssertionError, "y0 must be either a torch.Tensor or a tuple"),
    ({"t": torch.tensor([0, 1])}, TypeError, "must be a floating point Tensor"),
    ({"t": [0.0, 1.0]}, AssertionError, "t must be a torch.Tensor"),
    ({"t": torch.tensor(1.0)}, AssertionError, "t must be one dimensional"),
    ({"t": torch.ones(2, 2)}, AssertionError, "t must be one dimensional"),
    ({"t": torch.tensor([0.0, 0.0])}, AssertionError, "t must be strictly increasing or decreasing"),
    ({"t": torch.tensor([0.0, 1.0, 0.5])}, AssertionError, "t must be strictly increasing or decreasing"),
    ({"t": torch.tensor([0.0, float("nan")])}, AssertionError, "t must be strictly increasing or decreasing"),
    ({"t": torch.empty(0)}, IndexError, ""),
    ({"method": "adams"}, ValueError, 'Invalid method "adams". Must be one of {'),
    ({"rtol": torch.tensor(1e-3, requires_grad=True)}, AssertionError, "rtol cannot require gradient"),
    ({"atol": torch.tensor(1e-3, requires_grad=True)}, AssertionError, "atol cannot require gradient"),
    (
        {"y0": (torch.ones(1), torch.ones(1)), "rtol": [1e-3]},
        AssertionError,
        "If using tupled rtol it must have the same length as the tuple y0",
    ),
    ({"options": {"max_num_steps": 1}, "rtol": 1e-10}, AssertionError, "max_num_steps exceeded"),
    ({"options": {"step_t": [0.5], "jump_t": [0.5]}}, ValueError, "must not have any repeated elements"),
    ({"y0": torch.tensor([float("inf")])}, AssertionError, "non-finite values in state"),
    (
        {"method": "rk4", "options": {"step_size": 0.1, "grid_constructor": lambda f, y, t: t}},
        ValueError,
        "step_size and grid_constructor are mutually exclusive arguments.",
    ),
    ({"method": "rk4", "options": {"interp": "x"}}, ValueError, "Unknown interpolation method x"),
    ({"method": "rk4", "options": {"grid_constructor": lambda f, y, t: t[1:]}}, AssertionError, ""),
    ({"method": "implicit_adams", "options": {"max_order": 13}}, AssertionError, "max_order must be at most 12"),
]


@pytest.mark.parametrize("interface", [ours.odeint, ours.odeint_adjoint])
@pytest.mark.parametrize(("change", "error", "text"), BAD)
def test_refusals(interface, change, error, text):
    arguments = {"y0": torch.ones(1), "t": T, **change}
    if interface is ours.odeint_adjoint:
        arguments["adjoint_params"] = ()
    y0, t = arguments.pop("y0"), arguments.pop("t")
    func = (lambda t, y: tuple(-x for x in y)) if isinstance(y0, tuple) else decay
    with pytest.raises(error) as caught:
        interface(func, y0, t, **arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_derivative_is_named(bad):
    with pytest.raises(AssertionError, match=r"^non-finite"):
        ours.odeint(lambda t, y: torch.where(t > 0.5, bad, -y), torch.ones(1), T)


def test_underflow():
    with pytest.raises(AssertionError, match=r"^underflow in dt"):
        ours.odeint(lambda t, y: y * y, torch.ones(1), torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("dopri5", {"nonsense": 1}, "Dopri5Solver: Unexpected arguments {'nonsense': 1}"),
        ("rk4", {"first_step": 1}, "RK4: Unexpected arguments {'first_step': 1}"),
        ("euler", {"grid_points": 1}, "Euler: Unexpected arguments {'grid_points': 1}"),
        ("implicit_adams", {"max_order": 3}, "max_order is below 4, so the solver reduces to `rk4`."),
    ],
)
def test_warnings_are_the_same(method, options, text):
    given = dict(options)
    for lib in (ours, theirs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lib.odeint(decay, torch.ones(1), T, method=method, options=options)
        assert [(w.category, str(w.message)) for w in caught] == [(UserWarning, text)]
    assert options == given  # never modified


def test_no_convergence_of_the_functional_iteration():
    for lib in (ours, theirs):
        with pytest.warns(UserWarning, match="Functional iteration did not converge"):
            lib.odeint(lambda t, y: -40 * y, torch.ones(1), torch.linspace(0, 2, 21), method="implicit_adams",
                       options={"max_order": 4})  # fmt: skip


def test_norm_is_ignored_on_a_grid():
    ours.odeint(decay, torch.ones(1), T, method="rk4", options={"norm": None})


def test_missing_scipy_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        ours.odeint(decay, torch.ones(1), T, method="scipy_solver")


def test_nothing_is_silently_broadcast():
    with pytest.raises(ValueError, match="shape"):
        ours.odeint(lambda t, y: -y[None], torch.ones(3), T)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_state_without_elements_stays_one(method):
    """The rest of a data set may leave a batch of none; torchdiffeq's methods on a grid go through."""
    t = torch.linspace(0, 1, 4)
    assert ours.odeint(lambda t, y: -y, torch.ones(0, 3), t, method=method).shape == (4, 0, 3)
    a, b = ours.odeint(lambda t, y: y, (torch.ones(0), torch.ones(2, 0)), t, method=method)
    assert a.shape == (4, 0) and b.shape == (4, 2, 0)
