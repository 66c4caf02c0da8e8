"""Initial value problems as every library gets them: one field for PyTorch, the same for JAX, and what is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import neurode


@dataclass(frozen=True)
class Problem:
    """What is solved. Fields take rows: `(batch, features)`.

    Attributes:
        field: `field(t, y)` for PyTorch; a module's parameters get gradients where `gradients` says so.
        jax_field: makes the same for JAX, `field(t, y, parameters)`, of rows or of a single row.
        y0: the states `(batch, features)`.
        span: beginning and end.
        method: `"rk4"`, `"dopri5"` or `"tsit5"`.
        steps: of a fixed grid; None: adaptive.
        tolerance: relative and absolute.
        per_sample: every row has its own steps; else one step for the batch.
        t_eval: outputs; None: the end alone.
        gradients: of the mean square of all outputs, for `y0` and the parameters.
        products: multiply-adds of one evaluation of one row in matrix products; 0: no figure in GFLOP/s.
    """

    field: Callable[[Tensor, Tensor], Tensor]
    jax_field: Callable[[Any, Any, Any], Any]
    y0: Tensor
    span: tuple[float, float] = (0.0, 1.0)
    method: str = "rk4"
    steps: int | None = None
    tolerance: float = 1e-5
    per_sample: bool = False
    t_eval: Tensor | None = None
    gradients: bool = False
    products: int = 0

    @property
    def parameters(self) -> list[Tensor]:
        """What the field trains."""
        return list(self.field.parameters()) if isinstance(self.field, nn.Module) else []

    @property
    def flops(self) -> float:
        """Floating-point operations in matrix products on a grid of RK4 steps; a gradient costs three times the value."""
        return 2.0 * self.products * len(self.y0) * 4 * (self.steps or 0) * (3 if self.gradients else 1)


def spiral(batch: int = 128, hidden: int = 128, **asked: Any) -> Problem:
    """The spiral field: Linear(7, hidden), tanh, Linear(hidden, hidden), tanh, Linear(hidden, 6), in float32."""
    torch.manual_seed(0)
    field = neurode.nn.MLP(6, (hidden, hidden), zero_init=False)
    products = 7 * hidden + hidden * hidden + hidden * 6
    asked = {"method": "rk4", "steps": 20, **asked}
    return Problem(field, jax_mlp, torch.randn(batch, 6), products=products, **asked)


def jax_mlp(t: Any, y: Any, parameters: Any) -> Any:
    """The spiral field for JAX: weights and biases in PyTorch's order."""
    import jax.numpy as jnp

    w1, b1, w2, b2, w3, b3 = parameters
    time = jnp.broadcast_to(t, (*y.shape[:-1], 1)).astype(y.dtype)
    h = jnp.tanh(jnp.concatenate([y, time], -1) @ w1.T + b1)
    return jnp.tanh(h @ w2.T + b2) @ w3.T + b3


def van_der_pol(batch: int = 256, outputs: int = 200, **asked: Any) -> Problem:
    """The Van der Pol oscillator with mu = 2 on [0, 10], float32: every row its own steps, many outputs."""
    generator = torch.Generator().manual_seed(0)

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[..., 1], 2 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)

    def jax_field(t: Any, y: Any, parameters: Any) -> Any:
        import jax.numpy as jnp

        return jnp.stack([y[..., 1], 2 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)

    y0, t_eval = torch.randn(batch, 2, generator=generator), torch.linspace(0, 10, outputs)
    asked = {"method": "dopri5", "per_sample": True, **asked}
    return Problem(field, jax_field, y0, (0.0, 10.0), t_eval=t_eval, **asked)


def lotka_volterra(batch: int, **asked: Any) -> Problem:
    """Predators and prey on [0, 20], float64: a field of seven operations."""
    generator = torch.Generator().manual_seed(0)

    def field(t: Tensor, y: Tensor) -> Tensor:
        u, v = y[..., 0], y[..., 1]
        return torch.stack([1.5 * u - u * v, u * v - 3 * v], -1)

    def jax_field(t: Any, y: Any, parameters: Any) -> Any:
        import jax.numpy as jnp

        u, v = y[..., 0], y[..., 1]
        return jnp.stack([1.5 * u - u * v, u * v - 3 * v], -1)

    y0 = 0.5 + 2 * torch.rand(batch, 2, generator=generator, dtype=torch.float64)
    asked = {"method": "tsit5", "tolerance": 1e-6, "per_sample": "steps" not in asked, **asked}
    return Problem(field, jax_field, y0, (0.0, 20.0), **asked)


__all__ = ["Problem", "jax_mlp", "lotka_volterra", "spiral", "van_der_pol"]
