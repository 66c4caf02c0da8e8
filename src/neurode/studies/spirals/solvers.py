"""What the solvers do: orders, the bridge to residual networks, memory, the adjoint's error, inversion."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

import neurode
from neurode import methods
from neurode.gradients import STRATEGIES
from neurode.nn import MLP, NeuralODE, as_resnet
from neurode.report.memory import peak_memory
from neurode.studies.spirals.models import STATE, Classifier
from neurode.studies.spirals.settings import Settings

ORDER_STEPS = (20, 40, 80, 160, 320, 640)
ADJOINT_STEPS = (20, 40, 80, 160, 320, 640)
INVERSE_STEPS = (5, 10, 20, 40, 80, 160, 320)
NUM_JACOBIANS = 32


def fixed_methods() -> list[str]:
    """The explicit one-step methods of fixed steps."""
    return [name for name, m in methods.METHODS.items() if m.kind == "explicit" and not m.adaptive]


def orders() -> dict[str, Any]:
    """Error at the end of `y' = y cos t`, whose solution is `exp(sin t)`, against the step size, with fitted slopes."""
    end, found = 2.0, {}
    for name in fixed_methods():
        errors = []
        for steps in ORDER_STEPS:
            y0 = torch.ones((), dtype=torch.float64)
            y1 = neurode.solve(lambda t, y: y * torch.cos(t), y0, (0, end), method=name, steps=steps).y1
            errors.append(abs(float(y1) - math.exp(math.sin(end))))
        sizes = [end / steps for steps in ORDER_STEPS]
        found[name] = {"errors": errors, "slope": slope(sizes[2:], errors[2:]), "order": methods.get(name).order}
    return {"sizes": [end / steps for steps in ORDER_STEPS], "methods": found}


def slope(x: list[float], y: list[float]) -> float:
    """The slope of the least-squares line through `log y` over `log x`."""
    a, b = (torch.tensor(v, dtype=torch.float64).log() for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a * a).sum())


def bridge(model: Classifier, points: Tensor) -> dict[str, Any]:
    """The largest difference between a neural ODE on Euler's method and the residual network that it is.

    The eager engine performs the network's own operations; the fused one, where it is at hand, sums in another order.
    """
    y = model.lift(points).detach().requires_grad_()
    layer = model.body.with_solver(engine="eager")
    network = as_resnet(layer)
    found: dict[str, Any] = dict(zip(("outputs", "gradients"), _apart(layer, network, layer, y), strict=True))
    with contextlib.suppress(neurode.EngineError):
        fused = model.body.with_solver(engine="fused")
        found["fused outputs"], found["fused gradients"] = _apart(fused, network, layer, y)
    return found


def _apart(one: nn.Module, other: nn.Module, owner: nn.Module, y: Tensor) -> tuple[float, float]:
    """The largest differences of the outputs, and of the gradients of `y` and of the parameters of `owner`.

    Each relative to the largest entry of its tensor; zero is zero in either measure.
    """
    results = []
    for body in (one, other):
        out = body(y)
        results.append((out.detach(), torch.autograd.grad(out.square().sum(), [y, *owner.parameters()])))
    (out, grads), (other_out, other_grads) = results
    gaps = [_gap(a, b) for a, b in zip(grads, other_grads, strict=True)]
    return _gap(out, other_out), max(gaps)


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def memory(settings: Settings) -> dict[str, Any]:
    """Peak live storage of a forward and backward pass against the number of steps."""
    counts = [n for n in (5, 10, 20, 40, 80, 160, 320, 640) if n <= settings.max_memory_steps]
    torch.manual_seed(0)
    field = MLP(STATE, (settings.hidden, settings.hidden), zero_init=False)
    y0 = torch.randn(settings.batch_size, STATE)
    # On the eager engine: what native calls keep is no tensor while they run, and this measure does not see it.
    found: dict[str, dict[str, list[int]]] = {}
    for method in ("euler", "rk4"):
        found[method] = {name: [_peak(field, y0, method, name, n) for n in counts] for name in STRATEGIES}
    return {"steps": counts, "bytes": found}


def _peak(field: nn.Module, y0: Tensor, method: str, gradient: str, steps: int) -> int:
    def run() -> list[Tensor]:
        field.zero_grad()
        start = y0.clone().requires_grad_()
        y1 = neurode.solve(field, start, (0, 1), method=method, steps=steps, gradient=gradient, engine="eager").y1
        y1.square().sum().backward()
        return [y1]

    return peak_memory(run, excluding=[y0, *field.parameters()])


def adjoint_error(model: Classifier, points: Tensor, labels: Tensor) -> dict[str, Any]:
    """Relative error of the continuous adjoint's gradient against the exact one, in float64."""
    points = points.double()
    trained = copy.deepcopy(model).double()
    untrained = _reset(trained)
    found: dict[str, Any] = {"steps": list(ADJOINT_STEPS)}
    for label, each in (("untrained", untrained), ("trained", trained)):
        for method in ("euler", "rk4"):
            found[f"{label} {method}"] = [_adjoint_error(each, points, labels, method, n) for n in ADJOINT_STEPS]
    return found


def _adjoint_error(model: Classifier, points: Tensor, labels: Tensor, method: str, steps: int) -> float:
    grads = {}
    for gradient in ("autograd", "continuous"):
        body = model.body.with_solver(method=method, steps=steps, gradient=gradient, engine="eager")
        loss = nn.functional.cross_entropy(model.head(body(model.lift(points))), labels)
        parts = torch.autograd.grad(loss, list(model.body.parameters()))
        grads[gradient] = torch.cat([g.reshape(-1) for g in parts])
    exact = grads["autograd"]
    return float((grads["continuous"] - exact).norm() / exact.norm())


def inversion(models: dict[str, Classifier], points: Tensor) -> dict[str, Any]:
    """Distance between the lifted points and what solving forward and then backward gives, relative to their size.

    Beside the trained fields, the same with torch's default initialization; and how far the flows contract: the singular
    values of the derivative of the end with respect to the start, at some points.
    """
    found: dict[str, Any] = {"steps": list(INVERSE_STEPS)}
    for name, model in models.items():
        if not isinstance(model.body, NeuralODE):
            continue
        trained = copy.deepcopy(model).double()
        y0 = trained.lift(points.double()).detach()
        found[name] = _reconstruction(trained.body, y0)
        values = _singular_values(trained.body, y0[:NUM_JACOBIANS])
        found[f"{name} singular values"] = [float(values.max()), float(values.min())]
        found[f"{name} untrained"] = _reconstruction(_reset(trained).body, y0)
    return found


@torch.no_grad()
def _reconstruction(body: NeuralODE, y0: Tensor) -> list[float]:
    errors = []
    for steps in INVERSE_STEPS:
        layer = body.with_solver(steps=steps)
        errors.append(float((layer.inverse(layer(y0)) - y0).norm() / y0.norm()))
    return errors


def _singular_values(body: NeuralODE, y0: Tensor) -> Tensor:
    flow = body.with_solver(steps=100, batch_dim=None, engine="eager")
    return torch.linalg.svdvals(torch.vmap(torch.func.jacrev(flow))(y0)).detach()


def _reset(model: Classifier) -> Classifier:
    """A copy with torch's default initialization: with a last layer of zeros the field is 0, and a comparison empty."""
    torch.manual_seed(0)
    other = copy.deepcopy(model)
    for layer in other.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return other
