"""`odeint_adjoint`: gradients by the adjoint ODE, solved backward by `odeint` from one output to the one before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neurode.torchdiffeq._backward import Backward, adjoint_norm, adjoint_tolerance
from neurode.torchdiffeq._call import Call, read_call
from neurode.torchdiffeq._states import states
from neurode.torchdiffeq._terminal import until_event


@dataclass(frozen=True)
class Plan:
    """What the forward and the backward solve of one call need.

    Attributes:
        call: the forward solve.
        event_fn: where it ends at an event.
        backward: arguments of the backward `odeint`s.
        listed: whether the user listed the parameters.
    """

    call: Call
    event_fn: Callable[..., Any] | None
    backward: dict[str, Any]
    listed: bool


def odeint_adjoint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[..., Any] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """`odeint` whose gradients come from the adjoint ODE: memory for the outputs only, derivatives of first order only.

    The gradient is that of the continuous problem, as accurate as both solves, and not that of the numbers computed.

    Args:
        func, y0, t, rtol, atol, method, options, event_fn: as for `odeint`; `func` must be a Module, unless
            `adjoint_params` are given.
        adjoint_rtol, adjoint_atol, adjoint_method: of the backward solve; None for those of the forward solve.
        adjoint_options: of the backward method; None for `options` without `norm`. `norm` is a callable on the tuple
            `(time's adjoint, *y, *y's adjoint, *parameters' adjoints)`, or `"seminorm"` to leave the parameters out.
        adjoint_params: the tensors to differentiate with respect to; None for the parameters of `func`.

    Returns:
        As `odeint`.

    Raises:
        GradientError: in the backward pass, where `func` uses a tensor that requires grad and is not among the parameters
            of `func`, and `adjoint_params` were not given.

    References:
        R. T. Q. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud (2018), Neural ordinary differential equations, NeurIPS.
        P. Kidger, R. T. Q. Chen, T. Lyons (2021), "Hey, that's not an ODE": faster ODE adjoints via seminorms, ICML.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 2)
        >>> field = type("Field", (torch.nn.Module,), {"forward": lambda self, t, y: self.net(y)})()
        >>> field.net = net
        >>> odeint_adjoint(field, torch.ones(2), torch.tensor([0.0, 1.0]))[-1].sum().backward()
        >>> net.weight.grad.shape
        torch.Size([2, 2])
    """
    found = adjoint_parameters(func, adjoint_params)
    if options is not None and adjoint_options is None and adjoint_method not in (None, method):
        raise ValueError(
            "If `adjoint_method != method` then the options of one method do not serve the other. Type"
            " adjoint_options={...}, or leave options out."
        )
    if event_fn is not None and len(t) != 2:
        raise ValueError(f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}.")
    call = read_call(func, y0, t, rtol, atol, method, options)
    chosen = read_options(options, adjoint_options)
    params = tuple(p for p in found if p.requires_grad)
    if len(params) < len(found) and callable(chosen.get("norm")):
        warnings.warn(
            "An adjoint parameter was passed without requiring gradient. It takes no part in the adjoint solve, and is not"
            " in the tuple that the adjoint norm gets.",
            stacklevel=2,
        )
    forward_norm = call.norm
    chosen["norm"] = adjoint_norm(chosen.get("norm"), forward_norm, len(call.leaves), isinstance(call.y0, tuple))
    backward = {
        "rtol": adjoint_tolerance(call.rtol if adjoint_rtol is None else adjoint_rtol, call, params),
        "atol": adjoint_tolerance(call.atol if adjoint_atol is None else adjoint_atol, call, params),
        "method": adjoint_method or call.solver.name,
        "options": chosen,
    }
    plan = Plan(call, event_fn, backward, adjoint_params is not None)
    outputs = OdeintAdjointMethod.apply(plan, call.t, len(call.leaves), *call.leaves, *params)
    return _arrange(outputs, call, event_fn)


def _arrange(outputs: Any, call: Call, event_fn: Any) -> Any:
    if event_fn is None:
        return _split(outputs, call)
    event_t, states = outputs
    return event_t, _split(states, call)


def _split(ys: Tensor, call: Call) -> Any:
    """The states of a tuple from one flat tensor `(times, elements)`, as views of it; a tensor's are as they are."""
    if not isinstance(call.y0, tuple):
        return ys
    parts, first = [], 0
    for y in call.y0:
        parts.append(ys[..., first : first + y.numel()].view(len(ys), *y.shape))
        first += y.numel()
    return tuple(parts)


def _entries(ys: Tensor, call: Call) -> tuple[Tensor, ...]:
    parts = _split(ys, call)
    return parts if isinstance(parts, tuple) else (parts,)


def _join(ys: Any) -> Tensor:
    return torch.cat([y.reshape(len(y), -1) for y in ys], -1) if isinstance(ys, tuple) else ys


def read_options(options: dict[str, Any] | None, adjoint_options: dict[str, Any] | None) -> dict[str, Any]:
    """Options of the backward solve: the user's, or the forward ones without the norm."""
    if adjoint_options is not None:
        return dict(adjoint_options)
    return {key: value for key, value in (options or {}).items() if key != "norm"}


def adjoint_parameters(func: Callable[..., Any], adjoint_params: Iterable[Tensor] | None) -> tuple[Tensor, ...]:
    """The tensors to differentiate with respect to."""
    if adjoint_params is not None:
        return tuple(adjoint_params)
    if not isinstance(func, nn.Module):
        raise ValueError(
            "func must be an instance of nn.Module to specify the adjoint parameters; for any other callable list them:"
            " adjoint_params=(tensor, ...), or adjoint_params=() where there are none."
        )
    return tuple(find_parameters(func))


def find_parameters(module: nn.Module) -> list[Tensor]:
    """The parameters of a module; those of a replica that `DataParallel` made are plain attributes of it."""
    if not getattr(module, "_is_replica", False):
        return list(module.parameters())
    values = (value for part in module.modules() for value in vars(part).values())
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


class OdeintAdjointMethod(torch.autograd.Function):
    """Forward: `odeint` without a tape. Backward: the adjoint ODE."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, t: Tensor, num: int, *tensors: Tensor) -> Any:
        call = plan.call
        ctx.plan, ctx.adjoint_options = plan, plan.backward["options"]
        ctx.t_moves = t.requires_grad
        call = replace(call, t=t.detach())
        event_t, solution = (None, states(call)) if plan.event_fn is None else until_event(call, plan.event_fn)
        ys = _join(solution)
        times = call.t if event_t is None else torch.stack([call.t[0], event_t])
        ctx.save_for_backward(times, ys, *tensors[num:])
        return ys if event_t is None else (event_t, ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override] - the decorator's names
        plan = ctx.plan
        times, ys, *params = ctx.saved_tensors
        grad = grad_outputs[
            -1
        ].contiguous()  # the time of an event is a constant here; `odeint_event` gives it its gradient
        sweep = Backward(plan.call, tuple(params), plan.backward, checked=not plan.listed)
        outputs, grads = _entries(ys, plan.call), _entries(grad, plan.call)
        adj_t, adj_y, adj_params = sweep.run(times, outputs, grads, ctx.t_moves)
        if adj_t is not None and plan.event_fn is not None:
            adj_t = torch.stack([adj_t[0], torch.zeros_like(adj_t[0])])
        return None, adj_t, None, *adj_y, *adj_params
