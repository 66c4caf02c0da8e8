"""Whether rows that have ended may leave the batch: `f` must give the rest the same derivative, and the same gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Two evaluations that differ only in the batch size agree to rounding; a coupling of rows shows far above this.
AGREEMENT = {torch.float64: 1e-10, torch.complex128: 1e-10}
AGREEMENT_SINGLE = 1e-4


def safe(problem: Any, pace: Any, y: Tensor, keep: Tensor) -> bool:
    """Probe whether `f` treats rows independently and tolerates a subset of them.

    Compares `f` on the rows `keep` alone with `f` on all present rows: the derivative and, under a tape, the gradient of
    a random functional with respect to the state and to every parameter (a zero-initialized last layer would hide a
    coupling from the derivative alone).

    Args:
        problem: the problem; `compact=True` skips the probe.
        pace: the rows' pace.
        y: present states.
        keep: indices of the rows that would stay.
    """
    if problem.compact:
        return True
    field, t = problem.field, pace.t.to(problem.field.time_dtype)
    y = y.detach()
    try:
        whole = _evaluate(field, t, y, keep)
        field.take(pace.rows[keep])
        part = _evaluate(field, t[keep], y.detach()[keep], None)
    except Exception:
        return False
    finally:
        field.take(pace.rows)
    limit = AGREEMENT.get(y.dtype, AGREEMENT_SINGLE)
    return len(whole) == len(part) and all(map(_close, whole, part, [limit] * len(whole)))


def _evaluate(field: Any, t: Tensor, y: Tensor, keep: Tensor | None) -> list[Tensor | None]:
    """The derivative of the rows `keep`, and the gradients of a fixed random functional of it."""
    if not torch.is_grad_enabled():
        dy = field(t, y)
        return [dy if keep is None else dy[keep]]
    y = y.requires_grad_()
    dy = field(t, y)
    dy = dy if keep is None else dy[keep]
    if not dy.requires_grad:
        return [dy]
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(dy.shape, generator=generator, dtype=torch.float64).to(dy)
    inputs = [y, *leaves_of(dy, y)]
    # The graph of a tensor computed outside of f is not ours to free.
    grads = torch.autograd.grad(dy, inputs, cotangent, allow_unused=True, retain_graph=True)
    first = grads[0] if keep is None or grads[0] is None else grads[0][keep]
    return [dy.detach(), first, *grads[1:]]


def leaves_of(value: Tensor, without: Tensor) -> list[Tensor]:
    """The leaf tensors that `value`'s graph reaches, except one, in a fixed order."""
    found, stack, seen = {}, [value.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and leaf is not without:
            found[id(leaf)] = leaf
        stack.extend(parent for parent, _ in node.next_functions)
    return list(found.values())


def _close(a: Tensor | None, b: Tensor | None, limit: float) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape:
        return False
    return bool((a - b).abs().max() <= limit * (1e-30 + a.abs().max())) if a.numel() else True
