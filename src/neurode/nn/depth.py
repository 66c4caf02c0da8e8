"""Is a trained model an ordinary differential equation, or a residual network that depends on its step size?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from neurode._errors import InputError
from neurode._solution import Status
from neurode.nn.neural_ode import GRID, NeuralODE

# A model that moves by less than this share of its own displacement when its step goes to zero is an ODE in practice.
CONVERGED = 0.01


@dataclass(frozen=True)
class DepthReport:
    """What `check_depth` found.

    Attributes:
        is_ode: the verdict: the output at the layer's own solver is that of the exact flow.
        deviation: RMS distance of the layer's output from the exact flow's, relative to the RMS distance from input to
            output of the exact flow; infinite where one of the two is not finite.
        steps: the depths that were tried.
        deviations: the same relative distance at each of them.
        scores: `score` at each depth, where a score was given.
        score: at the layer's own solver.
        score_exact: with the exact flow.
        tolerance: the relative deviation up to which the verdict is "an ODE".
        moved: RMS distance from input to output of the exact flow; with 0 the check says nothing.
        failure: why the exact flow does not reach the end, where it does not.
    """

    is_ode: bool
    deviation: float
    steps: tuple[int, ...]
    deviations: tuple[float, ...]
    scores: tuple[float, ...] = ()
    score: float | None = None
    score_exact: float | None = None
    tolerance: float = CONVERGED
    moved: float = 1.0
    failure: str = ""

    def __str__(self) -> str:
        if self.moved == 0.0 and self.deviation == 0.0:
            return "This flow does not move its input (an untrained last layer of zeros?): the check says nothing yet."
        verdict = (
            "an ODE: its output is that of the exact flow"
            if self.is_ode
            else "not an ODE but a residual network: its output depends on the step size it was trained with"
        )
        size = f"{self.deviation:.2%}" if self.deviation < 10 else f"{self.deviation:.3g} times the flow's own way"
        text = f"This model is {verdict} (deviation {size}, limit {self.tolerance:.2%})."
        if self.failure:
            text += f" Solved accurately, it does not reach the end: {self.failure}."
        if self.score is not None:
            text += f" Score at its own solver {self.score:.4f}, with the exact flow {self.score_exact:.4f}."
        return text


@torch.no_grad()
def check_depth(
    layer: NeuralODE,
    data: Any,
    *,
    steps: Sequence[int] = (1, 2, 5, 10, 20, 40, 80, 160, 320),
    score: Callable[[Any], float] | None = None,
    method: Any = None,
    rtol: float = 1e-8,
    tolerance: float = CONVERGED,
) -> DepthReport:
    """Solve a trained layer at other depths, and accurately, and say whether it is an ODE.

    A model trained with a coarse step can use the step's error as a part of its map; solved accurately it is then another
    model (Ott et al. 2020).

    Args:
        layer: the trained layer; in a model, the `NeuralODE` itself.
        data: its inputs, a tensor `(rows, ...)` or a pytree of them; some hundred rows are enough. In float64 (with
            `layer.double()`) the reference is solved to `rtol` in full.
        steps: depths to try with the layer's own fixed-step method (`rk4` where it is adaptive).
        score: maps the layer's outputs to a number, such as the accuracy behind a classifier.
        method: the fixed-step method to try the depths with.
        rtol: tolerance of the reference solve (dopri5); `atol` is the same. No finer than the dtype of `data` resolves.
        tolerance: relative deviation up to which the model is called an ODE.

    Returns:
        A `DepthReport`; print it for the verdict.

    Raises:
        InputError: `layer` is no `NeuralODE`, `data` holds no rows or no finite ones, or `steps` no depths.

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
    data = _inputs(layer, data)
    depths = _depths(steps)
    own = layer.solve(data, on_failure="nan").y1
    exact, failure = _reference(layer, data, rtol)
    fixed = method or (layer.options["method"] if _on_grid(layer) else "rk4")
    outputs = [layer.with_solver(method=fixed, steps=n, on_failure="nan")(data) for n in depths]
    moved = _distance(exact, data)

    def deviation(y: Any) -> float:
        gap = _distance(y, exact)
        return gap / max(moved, 1e-30) if math.isfinite(moved) else math.inf

    distance = deviation(own)
    return DepthReport(
        is_ode=distance <= tolerance,
        deviation=distance,
        steps=depths,
        deviations=tuple(deviation(y) for y in outputs),
        scores=tuple(float(score(y)) for y in outputs) if score else (),
        score=float(score(own)) if score else None,
        score_exact=float(score(exact)) if score else None,
        tolerance=tolerance,
        moved=moved,
        failure=failure,
    )


def _inputs(layer: Any, data: Any) -> Any:
    if not isinstance(layer, NeuralODE):
        raise InputError(
            f"layer is of type {type(layer).__name__}; check_depth takes a neurode.nn.NeuralODE: of a model, that layer,"
            " with what reaches it as data."
        )
    leaves = pytree.tree_leaves(data)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.numel() for leaf in leaves):
        given = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
        raise InputError(
            f"data holds {given}; check_depth needs the layer's inputs: tensors (rows, ...) of at least a row."
        )
    if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
        raise InputError("data holds NaN or infinite values; check_depth needs finite inputs.")
    return data


def _depths(steps: Any) -> tuple[int, ...]:
    depths = (steps,) if isinstance(steps, int) else tuple(steps)
    if not depths:
        raise InputError("steps is empty; give depths to try, such as steps=(5, 20, 80).")
    return depths


def _on_grid(layer: NeuralODE) -> bool:
    return layer.options["method"] is not None and any(layer.options.get(name) is not None for name in GRID)


def _reference(layer: NeuralODE, data: Any, rtol: float) -> tuple[Any, str]:
    """The flow solved to `rtol`, or as accurately as the state's dtype can tell; and why it failed, where it did."""
    dtype = pytree.tree_leaves(data)[0].dtype
    resolved = max(rtol, 8 * torch.finfo(dtype).eps)
    accurate = layer.with_solver(method="dopri5", rtol=resolved, atol=resolved, gradient="auto", on_failure="nan")
    solution = accurate.solve(data)
    status = solution.status
    if isinstance(status, Status):
        return solution.y1, str(status) if status.failed else ""
    failed = status.failed.nonzero().flatten().tolist()
    reason = f"{len(failed)} of {len(status.failed)} rows fail ({status[failed[0]]})" if failed else ""
    return solution.y1, reason


def _distance(a: Any, b: Any) -> float:
    """RMS over all elements of all leaves; infinite where it cannot be formed."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    gaps = torch.cat([(x - y).abs().double().flatten() for x, y in pairs])
    value = float(gaps.square().mean().sqrt())
    return value if math.isfinite(value) else math.inf
