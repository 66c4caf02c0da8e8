"""A multilayer perceptron as a vector field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurode._errors import InputError


class MLP(nn.Module):
    """`f(t, y)` as a multilayer perceptron on the features of `y`, with time as one more input if wanted.

    Args:
        features: size of the state's last dimension.
        widths: sizes of the hidden layers; may be empty.
        activation: makes the module between the layers, such as `torch.nn.Tanh`.
        time: concatenate `t` to the features, behind them.
        zero_init: start with a last layer of zeros, so that the flow starts as the identity.

    Example:
        The spiral field of the study: Linear(7, 128), tanh, Linear(128, 128), tanh, Linear(128, 6).

        >>> import torch
        >>> f = MLP(6, (128, 128))
        >>> f(torch.tensor(0.5), torch.ones(4, 6)).abs().max().item()
        0.0
        >>> sum(p.numel() for p in f.parameters())
        18310
    """

    def __init__(
        self,
        features: int,
        widths: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.Tanh,
        time: bool = True,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        _refuse_sizes(features, widths)
        self.features, self.time = features, time
        sizes = [features + time, *widths]
        layers: list[nn.Module] = []
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(before, after), _made(activation)]
        last = nn.Linear(sizes[-1], features)
        if zero_init:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, t: Tensor | float, y: Tensor) -> Tensor:
        """The derivative at time `t` (0-d, or broadcasting against `y` as `(..., 1)`) and state `y` `(..., features)`."""
        t = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=y.dtype, device=y.device)
        if y.shape[-1:] != (self.features,) or t.ndim > y.ndim or (t.ndim and t.shape[-1] != 1):
            self._refuse(t, y)
        if not self.time:
            return self.layers(y)
        return self.layers(torch.cat([y, t.expand(*y.shape[:-1], 1)], -1))

    def _refuse(self, t: Tensor, y: Tensor) -> None:
        shape = tuple(y.shape)
        if y.ndim and t.shape == y.shape:  # rows without features, as the solver hands them over
            raise InputError(
                f"y0 has shape {shape}: with batch_dim=0 that is {y.shape[0]} rows without features, and this MLP needs"
                f" (rows, {self.features}). Type y0.unsqueeze(0) for one row, or y0.unsqueeze(1) for rows of one feature."
            )
        if shape and shape[-1] != self.features:
            raise InputError(
                f"y has shape {shape}, but this MLP is a field on {self.features} features: it needs"
                f" (..., {self.features}). Type MLP({shape[-1]}, ...) for this state."
            )
        raise InputError(
            f"t has shape {tuple(t.shape)} and y {shape}; t must be 0-d or (..., 1). The order is f(t, y): time first."
        )


def _made(activation: Any) -> nn.Module:
    try:
        return activation()
    except TypeError:
        raise InputError(
            f"activation={activation!r}; give what makes the module: torch.nn.Tanh, not torch.nn.Tanh() or torch.tanh."
        ) from None


def _refuse_sizes(features: int, widths: Sequence[int]) -> None:
    if isinstance(widths, int):
        raise InputError(f"widths={widths}; give one size for each hidden layer: widths=({widths},).")
    sizes = [features, *widths]
    if not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise InputError(
            f"features={features!r}, widths={tuple(widths)}; all sizes must be whole numbers of at least 1."
        )
