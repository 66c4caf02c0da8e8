"""What flows cannot do: small models on the line and in the plane, with and without augmentation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from neurode.nn import MLP, Augment, NeuralODE
from neurode.studies.spirals.settings import Settings
from neurode.studies.spirals.train import progress

TIMES = torch.linspace(0, 1, 41)
NUM_JACOBIANS = 500


def _flow(features: int, width: int = 32) -> NeuralODE:
    return NeuralODE(MLP(features, (width, width), zero_init=False), method="rk4", steps=10)


def _fit(parameters: list[nn.Parameter], loss: Any, updates: int, label: str) -> float:
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    value = math.nan
    for _ in progress(iterable=range(updates), desc=label, unit="update", leave=False):
        optimizer.zero_grad()
        out = loss()
        out.backward()
        optimizer.step()
        value = float(out.detach())
    return value


def reflection(settings: Settings) -> dict[str, Any]:
    """`y -> -y` on the line: trajectories would have to cross."""
    start = torch.linspace(-2, 2, 16).unsqueeze(1)
    found: dict[str, Any] = {"start": start[:, 0].tolist()}
    for extra in (0, 1):
        torch.manual_seed(0)
        flow = _flow(1 + extra)
        inputs = Augment(extra)(start) if extra else start
        mse = _fit(
            list(flow.parameters()), lambda f=flow, x=inputs: (f(x)[:, :1] + start).square().mean(),
            settings.toy_updates, f"y -> -y, {1 + extra} dimensions",
        )  # fmt: skip
        with torch.no_grad():
            path = flow.trajectory(inputs, TIMES)
        found["augmented" if extra else "line"] = {
            "mse": mse,
            "path": path.tolist(),
            "crossings": crossings(path[..., 0]),
        }
    return found


def crossings(path: Tensor) -> int:
    """How many pairs of neighbours `(time, points)` on the line change their order."""
    order = (path[:, 1:] - path[:, :-1]).sign()
    return int((order[1:] != order[:1]).any(0).sum())


def annuli(num_points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A disc of radius 0.5, and a ring from 1 to 1.5 around it."""
    labels = torch.arange(num_points) % 2
    draw = torch.rand(num_points, generator=generator)
    radius = torch.where(labels == 0, 0.5 * draw.sqrt(), (1 + 1.25 * draw).sqrt())
    angle = 2 * math.pi * torch.rand(num_points, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), labels


def rings(settings: Settings) -> dict[str, Any]:
    """A disc inside a ring, read off by a linear classifier: in the plane no flow can take the disc out of the ring."""
    generator = torch.Generator().manual_seed(0)
    points, labels = annuli(256, generator)
    fresh, fresh_labels = annuli(2000, generator)
    found: dict[str, Any] = {"labels": labels[:96].tolist()}
    for extra in (0, 1):
        found["augmented" if extra else "plane"] = _separate(
            points, labels, fresh, fresh_labels, extra, settings.toy_updates, f"rings, {2 + extra} dimensions"
        )
    return found


def plane_spirals(
    settings: Settings, points: Tensor, labels: Tensor, fresh: Tensor, fresh_labels: Tensor
) -> dict[str, Any]:
    """The spirals themselves in the plane: possible in principle, since open arms can be unwound; measured here."""
    found = {}
    for extra in (0, 1):
        found["augmented" if extra else "plane"] = _separate(
            points, labels, fresh, fresh_labels, extra, settings.toy_updates, f"spirals, {2 + extra} dimensions"
        )
    return found


def _separate(
    points: Tensor, labels: Tensor, fresh: Tensor, fresh_labels: Tensor, extra: int, updates: int, label: str
) -> dict[str, Any]:
    """Train a flow with a linear classifier behind it."""
    torch.manual_seed(0)
    flow, head = _flow(2 + extra), nn.Linear(2 + extra, 2)
    widen = Augment(extra) if extra else nn.Identity()
    model = nn.Sequential(widen, flow, head)
    loss = _fit(list(model.parameters()), lambda: nn.functional.cross_entropy(model(points), labels), updates, label)
    with torch.no_grad():
        path = flow.trajectory(widen(points[:96]), TIMES)
        right = float((model(fresh).argmax(1) == fresh_labels).double().mean())
    moved = flow.with_solver(batch_dim=None)
    derivative = torch.vmap(torch.func.jacrev(moved))(widen(fresh[:NUM_JACOBIANS])).detach()
    stretch = float(torch.linalg.matrix_norm(derivative, 2).max())
    return {"accuracy": right, "loss": loss, "path": path.tolist(), "stretch": stretch}
