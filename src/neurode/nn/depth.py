"""Is a trained model an ordinary differential equation, or a residual network that depends on its step size?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurode._errors import InputError
from neurode.nn.neural_ode import NeuralODE

# A model that moves by less than this share of its own displacement when its step goes to zero is an ODE in practice.
CONVERGED = 0.01


@dataclass(frozen=True)
class DepthReport:
    """What `check_depth` found.

    Attributes:
        is_ode: the verdict: the output at the layer's own solver is that of the exact flow.
        deviation: RMS distance of the layer's output from the exact flow's, relative to the RMS distance from input to
            output of the exact flow.
        steps: the depths that were tried.
        deviations: the same relative distance at each of them.
        scores: `score` at each depth, where a score was given.
        score: at the layer's own solver.
        score_exact: with the exact flow.
        tolerance: the relative deviation up to which the verdict is "an ODE".
    """

    is_ode: bool
    deviation: float
    steps: tuple[int, ...]
    deviations: tuple[float, ...]
    scores: tuple[float, ...] = ()
    score: float | None = None
    score_exact: float | None = None
    tolerance: float = CONVERGED

    def __str__(self) -> str:
        verdict = (
            "an ODE: its output is that of the exact flow"
            if self.is_ode
            else "not an ODE but a residual network: its output depends on the step size it was trained with"
        )
        text = f"This model is {verdict} (deviation {self.deviation:.2%}, limit {self.tolerance:.2%})."
        if self.score is not None:
            text += f" Score at its own solver {self.score:.4f}, with the exact flow {self.score_exact:.4f}."
        return text


@torch.no_grad()
def check_depth(
    layer: NeuralODE,
    data: Tensor,
    *,
    steps: Sequence[int] = (1, 2, 5, 10, 20, 40, 80, 160, 320),
    score: Callable[[Tensor], float] | None = None,
    method: Any = None,
    rtol: float = 1e-8,
    tolerance: float = CONVERGED,
) -> DepthReport:
    """Solve a trained layer at other depths, and accurately, and say whether it is an ODE.

    A model trained with a coarse step can use the step's error as a part of its map; solved accurately it is then another
    model (Ott et al. 2020).

    Args:
        layer: the trained layer.
        data: its inputs, `(rows, ...)`; some hundred rows are enough.
        steps: depths to try with the layer's own fixed-step method (`rk4` where it is adaptive).
        score: maps the layer's outputs to a number, such as the accuracy behind a classifier.
        method: the method to try the depths with.
        rtol: tolerance of the reference solve (dopri5, float64); `atol` is the same.
        tolerance: relative deviation up to which the model is called an ODE.

    Returns:
        A `DepthReport`; print it for the verdict.

    References:
        K. Ott, P. Katiyar, P. Hennig, M. Tiemann (2020), ResNet after all? Neural ODEs and their numerical solution,
        arXiv:2007.15386.

    Example:
        >>> import torch, neurode
        >>> layer = neurode.nn.NeuralODE(lambda t, y: -y, method="euler", steps=2)
        >>> print(neurode.nn.check_depth(layer, torch.ones(3, 1), steps=(2, 200)))
        This model is not an ODE but a residual network: its output depends on the step size it was trained with \
(deviation 18.65%, limit 1.00%).
    """
    if not isinstance(layer, NeuralODE):
        raise InputError(f"layer is a {type(layer).__name__}; check_depth takes a neurode.nn.NeuralODE.")
    own = layer(data)
    exact = _reference(layer, data, rtol)
    moved = (exact - data).double().square().mean().sqrt()
    fixed = method or (layer.options["method"] if layer.options.get("steps") else "rk4")
    outputs = [layer.with_solver(method=fixed, steps=n)(data) for n in steps]

    def deviation(y: Tensor) -> float:
        return float((y - exact).double().square().mean().sqrt() / moved.clamp_min(1e-30))

    distance = deviation(own)
    return DepthReport(
        is_ode=distance <= tolerance,
        deviation=distance,
        steps=tuple(steps),
        deviations=tuple(deviation(y) for y in outputs),
        scores=tuple(score(y) for y in outputs) if score else (),
        score=score(own) if score else None,
        score_exact=score(exact) if score else None,
        tolerance=tolerance,
    )


def _reference(layer: NeuralODE, data: Tensor, rtol: float) -> Tensor:
    """The flow solved to `rtol`, or as accurately as the state's dtype can tell."""
    resolved = max(rtol, 8 * torch.finfo(data.dtype).eps)
    return layer.with_solver(method="dopri5", rtol=resolved, atol=resolved)(data)
