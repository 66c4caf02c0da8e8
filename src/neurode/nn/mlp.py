"""A multilayer perceptron as a vector field."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
        if features < 1 or any(width < 1 for width in widths):
            raise InputError(f"features={features}, widths={tuple(widths)}; all sizes must be at least 1.")
        self.features, self.time = features, time
        sizes = [features + time, *widths]
        layers: list[nn.Module] = []
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(before, after), activation()]
        last = nn.Linear(sizes[-1], features)
        if zero_init:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The derivative at time `t` (0-d, or broadcasting against `y` as `(..., 1)`) and state `y` `(..., features)`."""
        if not self.time:
            return self.layers(y)
        return self.layers(torch.cat([y, t.expand(*y.shape[:-1], 1)], -1))
