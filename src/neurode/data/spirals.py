"""Two interleaved Archimedean spirals with noise, and the best accuracy that any classifier can reach on them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neurode._errors import InputError

TURNS = 3 * math.pi  # the largest angle, in radians
NOISE = 0.1  # standard deviation of the noise on x and on y


def spirals(
    num_points: int, *, noise: float = NOISE, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw points of two interleaved spirals, half of each.

    The angle theta is uniform in [0, 3 pi], the radius theta / (3 pi), the noise Gaussian and independent on x and y; the
    second spiral is the first, rotated by pi.

    Args:
        num_points: how many points, at least 2.
        noise: standard deviation of the noise.
        generator: source of randomness; None for torch's own.

    Returns:
        Points `(num_points, 2)`, float32, and labels `(num_points,)`, 0 or 1.

    Example:
        >>> import torch
        >>> points, labels = spirals(1000, generator=torch.Generator().manual_seed(0))
        >>> points.shape, labels.bincount().tolist()
        (torch.Size([1000, 2]), [500, 500])
    """
    if num_points < 2 or noise < 0:
        raise InputError(f"num_points={num_points}, noise={noise}; give at least 2 points and noise >= 0.")
    labels = torch.arange(num_points) % 2
    theta = TURNS * torch.rand(num_points, generator=generator, dtype=torch.float64)
    sign = 1.0 - 2.0 * labels.double()
    arm = torch.stack([theta.cos(), theta.sin()], 1) * (sign * theta / TURNS).unsqueeze(1)
    points = arm + noise * torch.randn(num_points, 2, generator=generator, dtype=torch.float64)
    return points.float(), labels


def _nodes(count: int) -> tuple[Tensor, Tensor]:
    """Angles and weights that average over [0, 3 pi]: Simpson's rule."""
    theta = torch.linspace(0, TURNS, 2 * count + 1, dtype=torch.float64)
    weights = torch.full_like(theta, 2.0)
    weights[1::2] = 4.0
    weights[0] = weights[-1] = 1.0
    return theta, weights / weights.sum()


def densities(x: Tensor, y: Tensor, *, noise: float = NOISE, num_angles: int = 2000) -> tuple[Tensor, Tensor]:
    """The densities of both classes on a grid.

    The Gaussian factorizes over x and y, so that the integral over the angle is a product of matrices.

    Args:
        x, y: coordinates of the grid, `(n,)` and `(m,)`.
        noise: standard deviation of the noise.
        num_angles: intervals of the quadrature.

    Returns:
        Two tensors `(n, m)`, float64.
    """
    theta, weights = _nodes(num_angles)
    radius = theta / TURNS

    def kernel(at: Tensor, centre: Tensor) -> Tensor:
        z = (at.double()[:, None] - centre[None]) / noise
        return torch.exp(-0.5 * z * z) / (math.sqrt(2 * math.pi) * noise)

    first = (kernel(x, radius * theta.cos()) * weights) @ kernel(y, radius * theta.sin()).T
    second = (kernel(x, -radius * theta.cos()) * weights) @ kernel(y, -radius * theta.sin()).T
    return first, second


def bayes_accuracy(noise: float = NOISE, *, spacing: float = 0.005) -> float:
    """The accuracy of the best possible classifier on fresh points: half the integral of the larger density.

    Args:
        noise: standard deviation of the noise, positive.
        spacing: distance of the integration grid's points.

    Example:
        >>> round(100 * bayes_accuracy(), 2)
        87.63
    """
    reach = 1.0 + 6 * noise
    count = math.ceil(2 * reach / spacing)
    axis = (torch.arange(count, dtype=torch.float64) + 0.5) * (2 * reach / count) - reach
    first, second = densities(axis, axis, noise=noise)
    return float(0.5 * torch.maximum(first, second).sum() * (2 * reach / count) ** 2)
