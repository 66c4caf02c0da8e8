"""A solve taken again on PyTorch's tape, for the derivatives that a strategy's own backward pass does not give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neurode._loop import Outcome, integrate
from neurode._problem import Problem
from neurode._solution import Stats
from neurode.gradients.inputs import Inputs, Replayed, inputs_of, uncached_autocast
from neurode.gradients.totals import still

# `function(*xs) -> (outs, wanted)`: outs computed on the tape from `xs` cut from what made them, and the tensors that
# stand for `xs` in that tape, None where one needs no gradient.
Function = Callable[..., tuple[Sequence[Tensor], Sequence[Any]]]


class _Derivative(torch.autograd.Function):
    """A function of tensors by its own tape, so that its derivative of any order is one more of these.

    What reaches it from outside is cut: a tensor that `y0` was computed from, and that `f` uses too, gets each part of its
    gradient once.
    """

    @staticmethod
    def forward(ctx: Any, function: Function, *xs: Any) -> Any:
        ctx.function, ctx.given = function, [isinstance(x, Tensor) for x in xs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(x for x in xs if isinstance(x, Tensor)))
        with torch.enable_grad():
            ctx.outs, ctx.wanted = function(*xs)
        return tuple(out.detach() for out in ctx.outs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            saved = iter(ctx.saved_tensors)
            xs = [next(saved) if given else None for given in ctx.given]
            return None, *derivative(ctx.function, xs, grads)
        outs = [
            (out, grad) for out, grad in zip(ctx.outs, grads, strict=True) if grad is not None and out.requires_grad
        ]
        return None, *_gradients(outs, ctx.wanted, retain_graph=True)


def _gradients(outs: list[tuple[Tensor, Tensor]], wanted: Sequence[Any], **options: Any) -> list[Tensor | None]:
    """One gradient for each of `wanted`, None for None."""
    targets = [x for x in wanted if x is not None]
    if not outs or not targets:
        return [None] * len(wanted)
    values, cotangents = zip(*outs, strict=True)
    found = iter(torch.autograd.grad(values, targets, cotangents, allow_unused=True, **options))
    return [None if x is None else next(found) for x in wanted]


def derivative(function: Function, xs: Sequence[Any], grads: Sequence[Any]) -> list[Any]:
    """The vector-Jacobian product of a function, with a derivative of its own in `xs` and `grads`.

    Args:
        function: see `Function`.
        xs: what it is given; None where an argument is absent.
        grads: cotangents of its outputs; None for one that nothing depends on.
    """
    count = len(xs)
    places: list[int] = []

    def product(*both: Any) -> tuple[list[Tensor], list[Any]]:
        outs, wanted = function(*both[:count])
        cotangents = [None if g is None else g.detach().requires_grad_() for g in both[count:]]
        pairs = [(o, g) for o, g in zip(outs, cotangents, strict=True) if g is not None and o.requires_grad]
        found = _gradients(pairs, wanted, create_graph=True)
        places[:] = [i for i, grad in enumerate(found) if grad is not None]
        return [found[i] for i in places], [*wanted, *cotangents]  # pyrefly: ignore[bad-return]  None was left out

    flat = _Derivative.apply(product, *xs, *grads)
    result: list[Any] = [None] * count
    for i, grad in zip(places, flat, strict=True):
        result[i] = grad
    return result


def on_tape(
    problem: Problem,
    inputs: Inputs,
    autocast: Any,
    times: Sequence[Any],
    xs: Sequence[Any],
    grads: Sequence[Any],
    read: Callable[[Outcome], list[Tensor]],
) -> list[Any]:
    """The gradients of a solve with a graph of their own (`create_graph=True`), by solving again on the tape.

    Args:
        problem: what was solved.
        inputs: what its field depends on.
        autocast: the autocast of the forward solve.
        times: t0, t1, grid and t_eval as they were solved with.
        xs: y0, then those of the times that need a gradient (None for others), then the values of `inputs`.
        grads: cotangents of what `read` returns; None where nothing came.
        read: takes from an outcome what is differentiated.

    Returns:
        A gradient for each of `xs`.
    """

    def solve(y0: Tensor, *rest: Any) -> tuple[list[Tensor], list[Any]]:
        y0 = y0.detach().requires_grad_()
        cut = [None if t is None else t.detach().requires_grad_() for t in rest[:4]]
        t0, t1, grid, t_eval = (still if moving is None else moving for still, moving in zip(times, cut, strict=True))
        if cut[2] is not None and not isinstance(problem.grid, Tensor):
            grid = list(grid.unbind())
        replayed = Replayed(problem.field, inputs, list(rest[4:]))
        again = replace(problem, field=replayed.field, y0=y0, t0=t0, t1=t1, grid=grid, t_eval=t_eval, recorder=None)
        with replayed.outer(), uncached_autocast(autocast):
            outcome = integrate(again)
        return read(outcome), [y0, *cut, *replayed.wanted]

    return derivative(solve, xs, grads)


def of_native(
    problem: Problem, y0: Tensor, moving: Sequence[Any], grads: Sequence[Any], read: Callable[[Outcome], list[Tensor]]
) -> tuple[list[Any], dict[int, Tensor | None]]:
    """The same for a solve that the fused engine did.

    Args:
        problem: what was solved.
        y0: the inner state that it was solved from.
        moving: t0, t1, grid and t_eval; None for those that need no gradient.
        grads: cotangents of what `read` returns.
        read: takes from an outcome what is differentiated.

    Returns:
        Gradients of `y0` and of `moving`, and those of all that the field depends on, by the identity of the tensors.
    """
    inputs = inputs_of(problem, "discrete")
    times = [still(t) for t in (problem.t0, problem.t1, problem.grid, problem.t_eval)]
    autocast = ("cpu", False, None)  # the engine takes no solve under another
    found = on_tape(problem, inputs, autocast, times, [y0, *moving, *inputs.all], grads, read)
    return found[:5], {id(x): grad for x, grad in zip(inputs.all, found[5:], strict=True)}


def recomputed(stats: Stats, strategy: str) -> Stats:
    """What the statistics of the backward pass say then."""
    return Stats(
        method=stats.method,
        gradient=f"autograd (auto: create_graph=True, which {strategy} does not give: solved again on PyTorch's tape)",
        engine="eager",
    )
