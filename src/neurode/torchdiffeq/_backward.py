"""The adjoint ODE of Chen et al. (2018) on the tuple `(time's adjoint, *y, *y's adjoint, *parameters' adjoints)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neurode._errors import GradientError
from neurode.torchdiffeq._call import Call, largest_rms, read_call
from neurode.torchdiffeq._states import states


def adjoint_norm(norm: Any, state_norm: Callable[..., Tensor], num: int, tuples: bool) -> Callable[[Any], Tensor]:
    """The norm of the backward solve.

    Args:
        norm: None, `"seminorm"`, or the user's callable on the whole tuple.
        state_norm: norm of the forward state.
        num: number of its entries.
        tuples: whether `state_norm` takes a tuple.
    """
    if callable(norm):
        return norm
    if norm not in (None, "seminorm"):
        raise TypeError(f"adjoint_options['norm']={norm!r}; it must be 'seminorm' or a callable on the adjoint state.")

    def largest(state: tuple[Tensor, ...]) -> Tensor:
        y, adj_y, params = state[1 : num + 1], state[num + 1 : 2 * num + 1], state[2 * num + 1 :]
        values = [state[0].abs(), state_norm(y if tuples else y[0]), state_norm(adj_y if tuples else adj_y[0])]
        if params and norm is None:
            values.append(largest_rms(params))
        return torch.stack(values).amax()

    return largest


def adjoint_tolerance(value: Any, call: Call, params: tuple[Tensor, ...]) -> Any:
    """A tolerance for the backward state: one that differs between entries of y holds for their adjoints too.

    The adjoints of time and of the parameters get the tightest.
    """
    if isinstance(value, Tensor) and value.ndim == 0:
        return float(value)
    if not isinstance(value, Tensor | list | tuple):
        return value
    tuples, total = isinstance(call.y0, tuple), 1 + 2 * len(call.leaves) + len(params)
    if tuples and len(value) == total:
        return tuple(value)
    entries = tuple(value) if tuples else (torch.as_tensor(value, dtype=torch.float64),)
    assert len(entries) == len(call.leaves), "a tolerance for the adjoint needs one number, or one for each entry of y0"
    tightest = min(float(torch.as_tensor(entry).min()) for entry in entries)
    return (tightest, *entries, *entries, *[tightest] * len(params))


class Dynamics:
    """The right-hand side of the adjoint ODE; carries the callbacks that `func` has for it."""

    def __init__(self, call: Call, params: tuple[Tensor, ...], checked: bool) -> None:
        self.call, self.params, self.num = call, params, len(call.leaves)
        self.seen: list[set[Any]] = []
        self.checked = checked
        for name in ("callback_step", "callback_accept_step", "callback_reject_step"):
            callback = getattr(call.func, f"{name}_adjoint", None)
            if callback is not None:
                setattr(self, name, callback)

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, adj_y = state[1 : self.num + 1], state[self.num + 1 : 2 * self.num + 1]
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            y = tuple(part.detach().requires_grad_() for part in y)
            dy = self.call.field(t, y if isinstance(self.call.y0, tuple) else y[0])
            dy = dy if isinstance(dy, tuple) else (dy,)
            inputs = (t, *y, *self.params)
            if self.checked and len(self.seen) < 2:
                self._refuse_lost(dy, inputs)
            pairs = [(d, -a) for d, a in zip(dy, adj_y, strict=True) if d.requires_grad]
            if not pairs:
                return (torch.zeros_like(t), *dy, *map(torch.zeros_like, (*y, *self.params)))
            grads = torch.autograd.grad(
                [d for d, _ in pairs], inputs, [a for _, a in pairs], allow_unused=True, retain_graph=True
            )
        filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]
        return (filled[0], *(d.detach() for d in dy), *filled[1:])

    def _refuse_lost(self, dy: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
        """Raise where `func` uses a tensor that requires grad and is none of its parameters.

        Two evaluations share no node of their graphs but those made outside of `func`.
        """
        known = {id(x) for x in inputs}
        nodes, stack = set(), [d.grad_fn for d in dy]
        while stack:
            node = stack.pop()
            leaf = getattr(node, "variable", None)
            if node is None or node in nodes or (leaf is not None and id(leaf) in known):
                continue
            nodes.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
        outside = set.intersection(nodes, *self.seen) if self.seen else set()
        self.seen.append(nodes)
        if outside:
            names = sorted({node.name() for node in outside})
            raise GradientError(
                "func uses a tensor that requires grad and is not among its parameters"
                f" ({', '.join(names)}), whose gradient the adjoint would lose. Type"
                " adjoint_params=(*func.parameters(), tensor), or use odeint."
            )


class Backward:
    """Solves the adjoint ODE from the last output to the first.

    Args:
        call: the forward solve.
        params: what to differentiate with respect to, besides the state and the times.
        settings: arguments of the backward `odeint`.
        checked: raise where a gradient would be lost.
    """

    def __init__(self, call: Call, params: tuple[Tensor, ...], settings: dict[str, Any], checked: bool) -> None:
        self.call, self.params, self.settings = call, params, settings
        self.num = len(call.leaves)
        self.dynamics = Dynamics(call, params, checked)

    def run(
        self, t: Tensor, ys: tuple[Tensor, ...], grads: tuple[Tensor, ...], t_moves: bool
    ) -> tuple[Tensor | None, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Gradients of the times (or None), of the initial state and of the parameters.

        Args:
            t: the output times.
            ys: the outputs, one tensor `(times, ...)` for each entry of the state.
            grads: their gradients.
            t_moves: whether the times' gradients are wanted.
        """
        with torch.no_grad():
            adj_y = tuple(g[-1] for g in grads)
            adj_t = torch.zeros((), dtype=adj_y[0].abs().dtype, device=t.device)
            adj_params = tuple(map(torch.zeros_like, self.params))
            times = torch.zeros_like(t) if t_moves else None
            for i in range(len(t) - 1, 0, -1):
                y = tuple(part[i] for part in ys)
                if times is not None:
                    times[i] = self._rate(t[i], y, tuple(g[i] for g in grads))
                    adj_t = adj_t - times[i].to(adj_t.dtype)
                adj_t, adj_y, adj_params = self._interval(t, i, y, (adj_t, adj_y, adj_params))
                adj_y = tuple(a + g[i - 1] for a, g in zip(adj_y, grads, strict=True))
            if times is not None:
                times[0] = adj_t
        return times, adj_y, adj_params

    def _rate(self, t: Tensor, y: tuple[Tensor, ...], grad: tuple[Tensor, ...]) -> Tensor:
        """`<grad, func(t, y)>`."""
        dy = self.call.field(t.to(y[0].abs().dtype), y if isinstance(self.call.y0, tuple) else y[0])
        dy = dy if isinstance(dy, tuple) else (dy,)
        return torch.stack([(g.conj() * d).sum().real for g, d in zip(grad, dy, strict=True)]).sum()

    def _interval(self, t: Tensor, i: int, y: tuple[Tensor, ...], adjoints: Any) -> Any:
        """From the i-th output time to the one before."""
        adj_t, adj_y, adj_params = adjoints
        state = (adj_t, *y, *adj_y, *adj_params)
        times = t[i - 1 : i + 1].flip(0)
        # On eager: the state holds the adjoints of all parameters, and the dynamics watch what their own graph reaches.
        call = replace(read_call(self.dynamics, state, times, **self.settings), engine="eager")
        ends = [part[-1] for part in states(call)]
        adj_t = ends[0].real if ends[0].is_complex() else ends[0]
        after_y = ends[self.num + 1 : 2 * self.num + 1]
        params = zip(ends[2 * self.num + 1 :], self.params, strict=True)
        back = tuple((end.real if end.is_complex() and not p.is_complex() else end).to(p.dtype) for end, p in params)
        return adj_t, tuple(after_y), back
