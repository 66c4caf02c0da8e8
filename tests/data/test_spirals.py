"""The data set, and its Bayes accuracy against an independent estimate."""

from __future__ import annotations

import math

import pytest
import torch

from neurode.data.spirals import TURNS, bayes_accuracy, densities, spirals


def test_bayes_accuracy_is_the_published_one_and_converged() -> None:
    coarse, fine = bayes_accuracy(spacing=0.01), bayes_accuracy(spacing=0.0025)
    assert abs(100 * fine - 87.63) < 0.02
    assert abs(coarse - fine) < 1e-4


def test_bayes_accuracy_agrees_with_a_monte_carlo_estimate() -> None:
    """Classify fresh points by densities summed point by point, without the grid."""
    points, labels = spirals(20_000, generator=torch.Generator().manual_seed(3))
    theta = torch.linspace(0, TURNS, 1500, dtype=torch.float64)
    arm = torch.stack([theta.cos(), theta.sin()], 1) * (theta / TURNS)[:, None]
    arms = torch.cat([arm, -arm])
    near = [torch.exp(torch.cdist(x, arms).square_().div_(-0.02)) for x in points.double().split(250)]
    near = torch.cat([x.reshape(-1, 2, len(theta)).sum(2) for x in near])
    right = (near.argmax(1) == labels).double().mean()
    assert abs(float(right) - bayes_accuracy()) < 3 * math.sqrt(0.8763 * 0.1237 / 20_000)


def test_densities_integrate_to_one() -> None:
    axis = torch.linspace(-1.8, 1.8, 361, dtype=torch.float64)
    for density in densities(axis, axis):
        assert abs(float(density.sum()) * 0.01**2 - 1) < 1e-6


def test_no_noise_is_perfectly_separable_except_at_the_centre() -> None:
    assert bayes_accuracy(0.01, spacing=0.005) > 0.99


def test_points_are_of_the_spiral() -> None:
    points, labels = spirals(4000, noise=0.0, generator=torch.Generator().manual_seed(0))
    radius = points.double().norm(dim=1)
    angle = torch.atan2(points[:, 1].double(), points[:, 0].double()) + math.pi * labels
    turned = (radius * TURNS - angle).remainder(2 * math.pi)
    assert float(torch.minimum(turned, 2 * math.pi - turned).max()) < 1e-4
    assert abs(float(radius.mean()) - 0.5) < 0.02  # theta uniform makes the radius uniform
    assert labels.bincount().tolist() == [2000, 2000]


def test_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="num_points=1"):
        spirals(1)
