"""Residual networks, and the exact bridge: the residual network that a neural ODE's Euler discretization is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurode._errors import InputError
from neurode.nn.mlp import MLP
from neurode.nn.neural_ode import NeuralODE


class ResNet(nn.Module):
    """`y <- y + h f_k(y)`, block after block.

    Args:
        features: size of the state.
        widths: hidden layers of every block.
        num_blocks: number of blocks.
        shared: whether all blocks are one and the same (19.3 times fewer parameters in the study of spirals).
        activation: makes the module between the layers.
        zero_init: start every block as the identity.
        step: h, 1 in an ordinary residual network.

    References:
        K. He et al. (2016), Deep residual learning for image recognition, CVPR, arXiv:1512.03385.

    Example:
        >>> import torch
        >>> ResNet(6, (128, 128), num_blocks=20)(torch.ones(4, 6)).shape
        torch.Size([4, 6])
    """

    def __init__(
        self,
        features: int,
        widths: Sequence[int] = (64, 64),
        num_blocks: int = 20,
        shared: bool = False,
        activation: Callable[[], nn.Module] = nn.Tanh,
        zero_init: bool = True,
        step: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(num_blocks, int) or num_blocks < 1:
            raise InputError(f"num_blocks={num_blocks!r}; a residual network has a whole number of blocks, at least 1.")
        count = 1 if shared else num_blocks
        blocks = [MLP(features, widths, activation, time=False, zero_init=zero_init) for _ in range(count)]
        self.blocks = nn.ModuleList(blocks)
        self.num_blocks, self.shared, self.step = num_blocks, shared, step

    def forward(self, y: Tensor) -> Tensor:
        """Map `(rows, features)` to the same shape."""
        zero = y.new_zeros(())
        for k in range(self.num_blocks):
            block = self.blocks[0 if self.shared else k]
            y = torch.add(y, block(zero, y), alpha=self.step)
        return y

    def extra_repr(self) -> str:
        return f"num_blocks={self.num_blocks}, shared={self.shared}, step={self.step:g}"


class EulerBlock(nn.Module):
    """One step of forward Euler as a residual block: `y + h f(t, y)` at a time of its own.

    Args:
        f: the vector field, shared with the other blocks.
        t: the time at which it is evaluated.
        h: the length of the step.
        batch_dim: as in the solve: with 0, `t` reaches `f` as `(rows, 1, ..., 1)`.
    """

    def __init__(self, f: Callable[..., Any], t: float, h: float, batch_dim: int | None) -> None:
        super().__init__()
        self.f, self.t, self.h, self.batch_dim = f, t, h, batch_dim

    def forward(self, y: Tensor) -> Tensor:
        t = torch.tensor(self.t, dtype=y.dtype.to_real(), device=y.device)
        if self.batch_dim == 0:
            t = t.expand(y.shape[0], *[1] * (y.ndim - 1))
        return torch.add(y, self.f(t, y), alpha=self.h)

    def extra_repr(self) -> str:
        return f"t={self.t:g}, h={self.h:g}"


def as_resnet(layer: NeuralODE) -> nn.Sequential:
    """The residual network that a neural ODE's Euler discretization is: equal outputs and gradients.

    Bit for bit on the eager engine, which performs the network's own operations; the fused engine rounds in another order.

    Args:
        layer: a `NeuralODE` with `method="euler"` and `steps`, and a tensor state.

    Returns:
        `nn.Sequential` of one block a step, which share the layer's vector field.

    Raises:
        InputError: the layer's method is not Euler's with a number of steps; its times are learned or differ by row; or
            it uses what blocks have not (`args`, `has_aux`).

    Example:
        >>> import torch, neurode
        >>> layer = neurode.nn.NeuralODE(neurode.nn.MLP(2, zero_init=False), method="euler", steps=20, engine="eager")
        >>> y = torch.randn(5, 2)
        >>> (as_resnet(layer)(y) - layer(y)).abs().max().item()
        0.0
    """
    if not isinstance(layer, NeuralODE):
        raise InputError(f"layer is of type {type(layer).__name__}; as_resnet takes a neurode.nn.NeuralODE.")
    options = layer.options
    name = getattr(options["method"], "name", options["method"])
    if name != "euler" or options.get("steps") is None:
        raise InputError(
            f"as_resnet needs a NeuralODE with method='euler' and steps=n, but this one has method={name!r}. Type"
            " as_resnet(layer.with_solver(method='euler', steps=20))."
        )
    _refuse_rest(layer)
    t0, t1 = (float(t) for t in layer.t_span)
    steps = options["steps"]
    times = [t0 + (t1 - t0) * k / steps for k in range(steps)] + [t1]
    pairs = zip(times[:-1], times[1:], strict=True)
    return nn.Sequential(*[EulerBlock(layer.f, a, b - a, options["batch_dim"]) for a, b in pairs])


def _refuse_rest(layer: NeuralODE) -> None:
    """What a stack of blocks cannot be equal to, gradients included."""
    for name, t in zip(("t0", "t1"), layer.t_span, strict=True):
        if isinstance(t, Tensor) and (t.requires_grad or t.ndim):
            what = "requires a gradient" if t.requires_grad else f"has shape {tuple(t.shape)}"
            raise InputError(
                f"{name} {what}, but the blocks of a residual network have fixed times. Type"
                " as_resnet(layer.with_solver(t_span=(0.0, 1.0)))."
            )
    if layer.options.get("has_aux"):
        raise InputError(
            "this layer's field returns (dy, aux), and a residual block adds dy alone; wrap the field first."
        )
    if layer.options.get("args"):
        raise InputError(
            "this layer passes args to its field, and a residual block calls f(t, y); bind them to f first."
        )
