"""A field whose every evaluation keeps its inputs and not its activations, so that one evaluation is alive at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurode.gradients.inputs import Replayed, refuse_unlisted


class StageField:
    """A field that is evaluated without a tape, and again on one when its derivative is asked for.

    Args:
        field: the field.
        inputs: what it depends on.
    """

    def __init__(self, field: Any, inputs: Replayed) -> None:
        self.field, self.inputs = field, inputs
        self.layout, self.time_dtype = field.layout, field.time_dtype

    @property
    def num_calls(self) -> int:
        """How often the user's function was called."""
        return self.field.num_calls

    def take(self, index: Any) -> None:
        """Be called with these rows from now on."""
        self.field.take(index)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return _Stage.apply(self, t, y, *self.inputs.wanted)


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stage: StageField, t: Tensor, y: Tensor, *inputs: Tensor) -> Tensor:
        ctx.stage = stage
        ctx.save_for_backward(t, y)
        return stage.field(t, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        stage: StageField = ctx.stage
        t, y = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad(), stage.inputs.outer():
            dy = stage.field(t, y)
        wanted = [t, y, *stage.inputs.wanted]
        if not dy.requires_grad:
            return None, *[None] * len(wanted)
        refuse_unlisted(dy, stage.inputs.listed.union(map(id, wanted)))
        return None, *torch.autograd.grad(dy, wanted, grads[0], allow_unused=True)


