"""The three models of the study: a lift, a body that moves the state, a classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neurode.nn import MLP, Lift, NeuralODE, ResNet
from neurode.studies.spirals.settings import Settings

STATE = 6  # features of the lifted state
HEAD = 64  # width of the classifier


class Classifier(nn.Module):
    """Lift the plane into the state, move it, read off the class.

    Args:
        body: maps `(rows, 6)` to `(rows, 6)`: a `NeuralODE` or a `ResNet`.
    """

    body: Any

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.lift = Lift(2, STATE)
        self.body = body
        self.head = nn.Sequential(nn.Linear(STATE, HEAD), nn.ReLU(), nn.Linear(HEAD, 2))

    def forward(self, points: Tensor) -> Tensor:
        """Logits `(rows, 2)` of points `(rows, 2)`."""
        return self.head(self.body(self.lift(points)))

    @property
    def num_parameters(self) -> int:
        """How many numbers are learned."""
        return sum(p.numel() for p in self.parameters())


def build(name: str, settings: Settings, seed: int) -> Classifier:
    """A fresh model, the same for the same seed."""
    torch.manual_seed(seed)
    widths = (settings.hidden, settings.hidden)
    if name == "resnet":
        # The ordinary one: y + f(y), default initialization. With last layers of zeros and this rate it hardly trains.
        return Classifier(ResNet(STATE, widths, num_blocks=settings.steps, zero_init=False))
    method = {"ode-euler": "euler", "ode-rk4": "rk4"}[name]
    return Classifier(NeuralODE(MLP(STATE, widths), method=method, steps=settings.steps, engine=settings.engine))


def engine_of(model: Classifier) -> str:
    """What computed the model's latest forward pass: `"eager"`, `"fused"`, or `"PyTorch"` where there is nothing to solve."""
    stats = getattr(model.body, "last_stats", None)
    return stats.engine.split()[0] if stats else "PyTorch"


def evaluations(model: Classifier) -> int:
    """Evaluations of the vector field in the model's latest forward pass, as the solver counted them."""
    body = model.body
    return body.last_stats.num_calls if isinstance(body, NeuralODE) and body.last_stats else 0


@torch.no_grad()
def accuracy(model: nn.Module, points: Tensor, labels: Tensor, batch: int = 5000) -> float:
    """Share of points classified rightly."""
    right = sum(
        int((model(p).argmax(1) == t).sum()) for p, t in zip(points.split(batch), labels.split(batch), strict=True)
    )
    return right / len(labels)
