"""Values that no gradient goes through, and what takes their place where one must."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def constant(x: Tensor, source: Tensor, *zero: Tensor) -> Tensor:
    """`x` as a constant, so that `backward()` goes through it and brings nothing.

    Args:
        x: the value.
        source: what it was computed from, whose graph gets no gradient, not even a zero: that might meet a NaN.
        zero: tensors that get a zero gradient.
    """
    return _Constant.apply(x.detach(), source, *zero)


def instead(x: Tensor, gone: Tensor, which: Tensor | None = None) -> Tensor:
    """Rows of `x`, with those of the first that is not `gone`, as constants, in the rows `which` (all that are)."""
    good = int((~gone).nonzero()[0])
    mask = (gone if which is None else which).reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(mask, x[good].detach(), x)


class _Constant(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, source: Tensor, *zero: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *map(torch.zeros_like, ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])
