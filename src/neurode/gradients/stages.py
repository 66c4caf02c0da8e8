"""A field whose every evaluation keeps its inputs and not its activations, so that one evaluation is alive at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurode.gradients.inputs import Replayed, refuse_unlisted
from neurode.gradients.pull import pull


def add(totals: list[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Add gradients to their sums, in place; None is a zero."""
    pairs = [(total, grad) for total, grad in zip(totals, grads, strict=True) if grad is not None]
    if pairs:
        torch._foreach_add_([total for total, _ in pairs], [grad for _, grad in pairs])


class StageField:
    """A field that is evaluated without a tape, and again on one when its derivative is asked for.

    Args:
        inputs: the field, and what it depends on.
        totals: where the gradients of the inputs are summed, without a way through the tape of the step.
    """

    def __init__(self, inputs: Replayed, totals: list[Tensor]) -> None:
        self.inputs, self.totals = inputs, totals
        self.layout, self.time_dtype = inputs.field.layout, inputs.field.time_dtype

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate the field; see `Field`."""
        return _Stage.apply(self, t, y)

    def vjp(self, t: Tensor, y: Tensor, grad: Tensor, time: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """The transposed Jacobian of `f` times `grad`; what belongs to the inputs is added to the totals.

        Args:
            t, y: where.
            grad: like `f(t, y)`.
            time: whether the gradient of t is wanted.

        Returns:
            The gradients of t (None where not wanted) and of y; None for a zero.
        """
        inputs = self.inputs
        moving = [y.detach().requires_grad_(), *((t.detach().requires_grad_(),) if time else ())]
        with torch.enable_grad(), inputs.outer():
            if inputs.args:
                inputs.take(inputs.rows)
            dy = inputs.field(moving[1] if time else t, moving[0])
        if not dy.requires_grad:
            return None, None
        refuse_unlisted(dy, inputs.listed.union(map(id, moving)))
        found = pull([dy], [grad], [*moving, *inputs.wanted])
        add(self.totals, found[len(moving) :])
        return found[1] if time else None, found[0]


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stages: StageField, t: Tensor, y: Tensor) -> Tensor:
        ctx.stages, ctx.rows = stages, stages.inputs.rows
        ctx.save_for_backward(t, y)
        return stages.inputs.field(t, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        stages: StageField = ctx.stages
        t, y = ctx.saved_tensors
        stages.inputs.rows = ctx.rows
        return None, *stages.vjp(t, y, grads[0], ctx.needs_input_grad[1])
