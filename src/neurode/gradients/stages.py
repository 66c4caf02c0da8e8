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
    """

    def __init__(self, inputs: Replayed) -> None:
        self.inputs = inputs
        self.layout, self.time_dtype = inputs.field.layout, inputs.field.time_dtype

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate the field; see `Field`."""
        return _Stage.apply(self.inputs, t, y, *self.inputs.wanted)


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Replayed, t: Tensor, y: Tensor, *wanted: Tensor) -> Tensor:
        ctx.inputs, ctx.rows = inputs, inputs.rows
        ctx.save_for_backward(t, y)
        return inputs.field(t, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs: Replayed = ctx.inputs
        t, y = (x.detach() for x in ctx.saved_tensors)
        t.requires_grad_(ctx.needs_input_grad[1])
        y.requires_grad_(ctx.needs_input_grad[2])
        with torch.enable_grad(), inputs.outer():
            if inputs.args:
                inputs.take(ctx.rows)
            dy = inputs.field(t, y)
        everything = [t, y, *inputs.wanted]
        out: list[Any] = [None] * len(everything)
        places = [i for i, x in enumerate(everything) if x.requires_grad]
        if dy.requires_grad:
            refuse_unlisted(dy, inputs.listed.union(map(id, everything)))
            found = torch.autograd.grad(dy, [everything[i] for i in places], grads[0], allow_unused=True)
            for i, grad in zip(places, found, strict=True):
                out[i] = grad
        return None, *out
