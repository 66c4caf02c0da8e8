"""Vector-Jacobian products of a graph that was just made, and is used once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What `torch.autograd.grad` calls when it has checked the shapes of cotangents, a check that takes as long as the derivative of
# a small layer; the engine checks them again.
_run_backward = torch.autograd.Variable._execution_engine.run_backward  # pyrefly: ignore[missing-attribute]


def pull(values: Sequence[Tensor], cotangents: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of `<values, cotangents>` with respect to `wanted`, None where nothing depends on one; frees the graph.

    Args:
        values: results that require grad.
        cotangents: one of the same shape for each of them.
        wanted: leaves.
    """
    return _run_backward(tuple(values), tuple(cotangents), False, False, tuple(wanted), True, accumulate_grad=False)
