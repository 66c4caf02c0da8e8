"""Gradients of the state, the times and the parameters, direct and by the adjoint, beside torchdiffeq's and the truth."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchdiffeq as theirs

import neurode.torchdiffeq as ours
from neurode import GradientError

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
GRID = ("euler", "midpoint", "heun2", "heun3", "rk4")
INTERFACES = ("odeint", "odeint_adjoint")


class Field(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = (torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        self.net = torch.nn.Sequential(*layers)
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        return self.net(y) * torch.cos(t) * self.frozen - 0.2 * y


def gradients(lib, interface, ends=(0.0, 2.0), num=4, **kwargs):
    """Gradients of a weighted sum of all outputs with respect to y0, t, and all used parameters at once."""
    field = Field()
    y0 = torch.randn(3, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    t = torch.linspace(*ends, num).requires_grad_()
    ys = getattr(lib, interface)(field, y0, t, **kwargs)
    forward = field.nfe
    weights = torch.cos(torch.arange(ys.numel(), dtype=ys.dtype)).reshape(ys.shape)
    (ys * weights).sum().backward()
    used = torch.cat([p.grad.reshape(-1) for p in field.net.parameters()])
    return (y0.grad, t.grad, used), (forward, field.nfe - forward), field


def close(mine, expected, rtol):
    for a, b in zip(mine, expected, strict=True):
        assert float((a - b).abs().max()) <= rtol * float(b.abs().max())


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("ends", [(0.0, 2.0), (1.0, -1.0)])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive(method, interface, ends):
    tolerance = 1e-6 if method in ("fehlberg2", "adaptive_heun") else 1e-8
    truth, _, _ = gradients(ours, "odeint", ends, method="dopri5", rtol=1e-12, atol=1e-12)
    kwargs = {"method": method, "rtol": tolerance, "atol": tolerance}
    mine, counts, field = gradients(ours, interface, ends, **kwargs)
    original, original_counts, _ = gradients(theirs, interface, ends, **kwargs)
    limit = {"fehlberg2": 2e-3, "adaptive_heun": 1e-4, "bosh3": 1e-4, "dopri5": 1e-5, "dopri8": 1e-4}[method]
    close(mine, truth, limit)
    close(original, truth, 20 * limit)  # the two agree within tolerance
    # Every interval ends with a clipped step, where torchdiffeq may overshoot, reject and try again.
    assert counts[0] == pytest.approx(original_counts[0], abs=26)
    assert counts[1] == pytest.approx(original_counts[1], rel=0.1, abs=26)
    assert (field.unused.grad is None) == (interface == "odeint")
    assert field.frozen.grad is None


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("ends", [(0.0, 2.0), (1.0, -1.0)])
@pytest.mark.parametrize("options", [None, {"step_size": 0.13}], ids=str)
@pytest.mark.parametrize("method", GRID)
def test_on_a_grid(method, options, ends, interface):
    kwargs = {"method": method, "options": options}
    mine, counts, _ = gradients(ours, interface, ends, **kwargs)
    original, original_counts, _ = gradients(theirs, interface, ends, **kwargs)
    close(mine, original, 1e-11)
    assert counts == original_counts


@pytest.mark.parametrize("interface", INTERFACES)
def test_times_on_a_finer_grid(interface):
    """torchdiffeq loses the gradient of an output time that is a point of the grid."""
    decay = torch.tensor(0.7)
    t = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    kwargs = {"adjoint_params": ()} if interface == "odeint_adjoint" else {}
    y = getattr(ours, interface)(lambda t, y: -decay * y, torch.ones(1), t, method="rk4",
                                 options={"step_size": 0.25}, **kwargs)  # fmt: skip
    (y[:, 0] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    exact = torch.exp(-0.7 * t.detach())
    later = -0.7 * exact * torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(t.grad, torch.stack([-later[1:].sum(), later[1], later[2]]), rtol=1e-4, atol=0)


def test_direct_gradients_can_be_differentiated_again():
    y0 = torch.tensor([0.5], requires_grad=True)
    y = ours.odeint(lambda t, y: -(y**2), y0, torch.tensor([0.0, 1.0]), rtol=1e-10, atol=1e-10)[-1]
    (first,) = torch.autograd.grad(y, y0, create_graph=True)
    (second,) = torch.autograd.grad(first, y0)
    torch.testing.assert_close(first, 1 / (1 + y0) ** 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(second, -2 / (1 + y0) ** 3, rtol=1e-5, atol=0)


# ---- the adjoint's own arguments

T = torch.tensor([0.0, 0.5, 1.0])


def loss(field, y0=None, t=T, **kwargs):
    y0 = torch.ones(2) if y0 is None else y0
    return ours.odeint_adjoint(field, y0, t, **kwargs)


def test_needs_a_module_or_parameters():
    for lib in (ours, theirs):
        with pytest.raises(ValueError, match=r"^func must be an instance of nn.Module to specify"):
            lib.odeint_adjoint(lambda t, y: y, torch.ones(1), T)
        with pytest.raises(ValueError, match=r"^If `adjoint_method != method` then"):
            lib.odeint_adjoint(Field(), torch.ones(2), T, method="dopri5", options={"safety": 0.8},
                               adjoint_method="rk4")  # fmt: skip


def test_listed_parameters():
    rate, other = torch.tensor(0.7, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    y = ours.odeint_adjoint(lambda t, y: -rate * y * other, torch.ones(1), T, adjoint_params=iter([rate]))
    y[-1].sum().backward()
    torch.testing.assert_close(rate.grad, -torch.exp(-rate.detach()), rtol=1e-6, atol=0)
    assert other.grad is None  # left out on purpose


def test_unused_parameters_get_zeros_and_frozen_none():
    field = Field()
    loss(field).sum().backward()
    assert torch.equal(field.unused.grad, torch.zeros(3)) and field.frozen.grad is None


@pytest.mark.parametrize("leaf", [True, False])
def test_a_lost_gradient_raises(leaf):
    """torchdiffeq returns a gradient that lacks it, without a word."""

    class Leaky(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.own = torch.nn.Parameter(torch.ones(2))
            self.outside = torch.ones(2, requires_grad=True)
            self.used = self.outside if leaf else 2 * self.outside

        def forward(self, t, y):
            return -self.own * self.used * y

    y = loss(Leaky())
    with pytest.raises(GradientError, match="adjoint_params"):
        y.sum().backward()


def test_leaves_made_inside_func_are_its_own_business():
    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.own = torch.nn.Parameter(torch.ones(2))

        def forward(self, t, y):
            fresh = torch.ones(2, requires_grad=True)
            return -self.own * y * fresh

    field = Inner()
    loss(field)[-1].sum().backward()
    torch.testing.assert_close(field.own.grad, torch.full((2,), -0.36787944), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", [None, "seminorm", "own"])
def test_adjoint_norms(norm):
    seen = []

    def own(state):
        seen.append([part.shape for part in state])
        return torch.stack([part.abs().amax() for part in state if part.numel()]).amax()

    options = {} if norm is None else {"norm": own if norm == "own" else norm}
    counts = []
    for lib in (ours, theirs):
        field = Field()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the frozen parameter, where the norm is a callable
            lib.odeint_adjoint(field, torch.ones(2), T, adjoint_options=options, rtol=1e-6).sum().backward()
        counts.append(field.nfe)
    assert counts[0] == pytest.approx(counts[1], abs=12)
    if norm == "own":
        assert seen[0] == [(), (2,), (2,), *[p.shape for p in Field().parameters() if p.requires_grad]]


def test_frozen_parameters_and_a_callable_norm_warn():
    for lib in (ours, theirs):
        with pytest.warns(UserWarning, match="An adjoint parameter was passed without requiring gradient"):
            lib.odeint_adjoint(Field(), torch.ones(2), T, adjoint_options={"norm": lambda s: s[1].abs().max()})
    with pytest.raises(TypeError, match="seminorm"):
        loss(Field(), adjoint_options={"norm": "maximum"})


def test_adjoint_method_and_tolerances():
    exact, _, _ = gradients(ours, "odeint", method="dopri5", rtol=1e-12, atol=1e-12)
    kwargs = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9, "adjoint_method": "bosh3", "adjoint_rtol": 1e-3}
    loose, (_, few), _ = gradients(ours, "odeint_adjoint", adjoint_atol=1e-3, **kwargs)
    tight, (_, many), _ = gradients(ours, "odeint_adjoint", adjoint_atol=1e-9, **{**kwargs, "adjoint_rtol": 1e-9})
    assert few < many
    close(tight, exact, 1e-6)
    close(loose, exact, 1e-2)


def test_lists_of_tolerances_are_accepted():
    """torchdiffeq fails in the backward pass."""
    field = Field()
    y0 = (torch.ones(2), torch.zeros(1))

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.field = field

        def forward(self, t, y):
            return self.field(t, y[0]), y[0].sum().reshape(1)

    ys = ours.odeint_adjoint(Pair(), y0, T, rtol=[1e-6, 1e-3], atol=(1e-8, 1e-6))
    (ys[0].sum() + ys[1].sum()).backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in field.net.parameters())


def test_callbacks_of_the_adjoint():
    class Watched(Field):
        def __init__(self):
            super().__init__()
            self.steps, self.accepts = [], 0

        def callback_step(self, t0, y0, dt):
            self.steps.append(("forward", y0))

        def callback_step_adjoint(self, t0, y0, dt):
            self.steps.append(("backward", y0))

        def callback_accept_step_adjoint(self, t0, y0, dt):
            self.accepts += 1

    field = Watched()
    ys = loss(field)
    assert {name for name, _ in field.steps} == {"forward"}
    field.steps.clear()
    ys.sum().backward()
    assert {name for name, _ in field.steps} == {"backward"} and field.accepts > 0
    assert type(field.steps[0][1]) is tuple and field.steps[0][1][0].shape == ()


def test_graph_and_modes():
    field = Field()
    ys = loss(field)
    assert type(ys.grad_fn).__name__ == "OdeintAdjointMethodBackward"
    assert "norm" in ys.grad_fn.adjoint_options
    ys.sum().backward(retain_graph=True)
    once = field.net[0].weight.grad.clone()
    ys.sum().backward()
    torch.testing.assert_close(field.net[0].weight.grad, 2 * once)
    with torch.no_grad():
        assert loss(field).grad_fn is None


def test_scipy_forward_with_an_adjoint():
    field = Field()
    ys = ours.odeint_adjoint(field, torch.ones(2), T, method="scipy_solver", rtol=1e-8, atol=1e-8)
    ys[-1].sum().backward()
    mine = field.net[0].weight.grad
    field = Field()
    ours.odeint(field, torch.ones(2), T, rtol=1e-10, atol=1e-10)[-1].sum().backward()
    torch.testing.assert_close(mine, field.net[0].weight.grad, rtol=1e-5, atol=1e-7)


def test_complex_adjoint():
    rate = torch.nn.Parameter(torch.tensor(0.5))
    for interface in (ours.odeint, ours.odeint_adjoint):
        rate.grad = None
        kwargs = {"adjoint_params": (rate,)} if interface is ours.odeint_adjoint else {}
        y = interface(lambda t, y: 1j * rate * y, torch.ones(1, dtype=torch.complex128), T, **kwargs)[-1]
        y.real.sum().backward()
        torch.testing.assert_close(rate.grad, -torch.sin(rate.detach()), rtol=1e-6, atol=0)


class Latent(torch.nn.Module):
    """The latent ODE of Chen et al. in small: a recurrent encoder, an ODE in latent space, a decoder."""

    def __init__(self):
        super().__init__()
        self.encode, self.field, self.decode = torch.nn.GRU(2, 6), torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)

    def loss(self, odeint, seen, times, noise):
        _, hidden = self.encode(seen.flip(0))
        mean, log_variance = hidden[0].chunk(2, -1)
        z0 = mean + noise * (0.5 * log_variance).exp()
        path = odeint(lambda t, z: torch.tanh(self.field(z)), z0, times).permute(1, 0, 2)
        error = (self.decode(path) - seen.permute(1, 0, 2)).square().sum()
        return error + 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()


def test_a_latent_ode_learns_as_with_torchdiffeq():
    """Three updates of Adam: the same losses, and the same parameters at the end."""
    results = []
    for library in (ours, theirs):
        torch.manual_seed(0)
        model, times = Latent(), torch.linspace(0, 2, 9)
        seen, noise = torch.randn(9, 4, 2), torch.randn(4, 3)
        optimizer, losses = torch.optim.Adam(model.parameters(), 0.01), []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model.loss(library.odeint, seen, times, noise)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append([*losses, *(p.detach() for p in model.parameters())])
    for mine, original in zip(*results, strict=True):
        torch.testing.assert_close(mine, original, rtol=1e-6, atol=1e-6)
