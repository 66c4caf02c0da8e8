"""Depth chosen at test time: is the trained model an ODE, or a residual network that depends on its step size?"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from neurode.nn import check_depth
from neurode.studies.spirals.models import Classifier

DEPTHS = (1, 2, 5, 10, 20, 40, 80, 160, 320)
NUM_POINTS = 4000  # test points: their accuracy is known to half a percent, differences on the same points far better


def depths(model: Classifier, points: Tensor, labels: Tensor) -> dict[str, Any]:
    """Test accuracy of a trained neural ODE at other depths and solved to 1e-8, with the verdict of `check_depth`."""
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        lifted = double.lift(points[:NUM_POINTS].double())
    target = labels[:NUM_POINTS]

    def score(y: Tensor) -> float:
        return float((double.head(y).argmax(1) == target).double().mean())

    report = check_depth(double.body, lifted, steps=DEPTHS, score=score)
    return {
        "steps": list(DEPTHS),
        "num_points": len(target),
        "accuracies": list(report.scores),
        "accuracy_trained": report.score,
        "accuracy_exact": report.score_exact,
        "deviation": report.deviation,
        "is_ode": report.is_ode,
        "verdict": str(report),
    }
