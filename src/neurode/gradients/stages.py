"""A field whose every evaluation keeps its inputs and not its activations, so that one evaluation is alive at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurode.gradients.inputs import Replayed, refuse_unlisted


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


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stages: StageField, t: Tensor, y: Tensor) -> Tensor:
        ctx.stages, ctx.rows = stages, stages.inputs.rows
        ctx.save_for_backward(t, y)
        return stages.inputs.field(t, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs: Replayed = ctx.stages.inputs
        t, y = (x.detach() for x in ctx.saved_tensors)
        moving = [x.requires_grad_() for x, need in zip((t, y), ctx.needs_input_grad[1:], strict=True) if need]
        with torch.enable_grad(), inputs.outer():
            if inputs.args:
                inputs.take(ctx.rows)
            dy = inputs.field(t, y)
        if not dy.requires_grad:
            return None, None, None
        wanted = [*moving, *inputs.wanted]
        refuse_unlisted(dy, inputs.listed.union(map(id, moving)))
        found = torch.autograd.grad(dy, wanted, grads[0], allow_unused=True)
        for total, grad in zip(ctx.stages.totals, found[len(moving) :], strict=True):
            if grad is not None:
                total.add_(grad)
        back = iter(found)
        return None, *[next(back) if need else None for need in ctx.needs_input_grad[1:]]
