"""What to add to a loss so that a learned field is easy to solve; each is one line.

| regularizer | a line | gradient strategies |
| --- | --- | --- |
| kinetic energy, Jacobian | `solve(..., integrate=kinetic_energy())`, then `solution.integrals` | all |
| local error, stiffness | `solve(..., estimates="local_error")`, then `solution.local_error` | autograd |
| the same at one random step | `random_step(f, solution, ...).local_error` | all |
| random end time | `solve(f, y0, (t0, random_end_time(t0, t1, width)))` | all |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from neurode._errors import InputError
from neurode._integrals import Integrand
from neurode._solution import Solution
from neurode._solve import solve


def _squares(tree: Any, batched: bool) -> Tensor:
    """The sum of squares over all elements, or over those of each row."""
    parts = [x.abs().square() for x in pytree.tree_leaves(tree)]
    return sum(x.flatten(1).sum(1) if batched else x.sum() for x in parts)  # pyrefly: ignore[bad-return]


def kinetic_energy() -> Integrand:
    """The integral of `|f(t, y)|^2`: long and winding ways cost; straight ones at even speed are the cheapest.

    Give it as `integrate=`; `solution.integrals` is then the energy from t0 to each of `ts`: `(time,)` of the whole state,
    or `(time, rows)` with `batch_dim=0`. No further evaluation of `f`; every gradient strategy.

    References:
        C. Finlay, J.-H. Jacobsen, L. Nurbekyan, A. Oberman (2020), How to train your neural ODE: the world of Jacobian and
        kinetic regularization, ICML, arXiv:2002.02798, eq. 5.

    Example:
        >>> import torch, neurode
        >>> field, y0 = lambda t, y: torch.ones_like(y), torch.zeros(5, 3)
        >>> energy = neurode.regularizers.kinetic_energy()
        >>> sol = neurode.solve(field, y0, (0, 2), method="rk4", steps=4, batch_dim=0, integrate=energy)
        >>> sol.integrals[-1].tolist()
        [6.0, 6.0, 6.0, 6.0, 6.0]
    """
    return Integrand(lambda y, dy, product, noise, batched: _squares(dy, batched))


def jacobian_frobenius(
    noise: Any = None, *, distribution: str = "rademacher", generator: torch.Generator | None = None
) -> Integrand:
    """The integral of the squared Frobenius norm of the Jacobian `df/dy`, by Hutchinson's estimate with one noise a solve.

    `|e^T df/dy|^2` has the mean `|df/dy|_F^2` over noises `e` of mean 0 and covariance 1. The noise is drawn when a solve
    starts and held, so that the integrand is smooth in time and each strategy sees the same. One vector-Jacobian product for
    each evaluation of `f`; its gradient differentiates `f` twice. Every gradient strategy; not within `torch.func`
    transforms. Rows of `batch_dim=0` must not depend on each other in `f`.

    Args:
        noise: the noise, of the structure and shapes of `y0`; None draws it anew for every solve.
        distribution: `"rademacher"` (entries -1 and 1, the least variance) or `"gaussian"`.
        generator: what to draw from; None for PyTorch's own.

    References:
        C. Finlay, J.-H. Jacobsen, L. Nurbekyan, A. Oberman (2020), How to train your neural ODE, ICML, arXiv:2002.02798,
        eq. 7.
        M. F. Hutchinson (1989), A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines,
        Communications in Statistics 18.

    Example:
        >>> import torch, neurode
        >>> rates = torch.tensor([1.0, 2.0])  # the squares of a diagonal Jacobian sum to 5, whatever the signs
        >>> size = neurode.regularizers.jacobian_frobenius()
        >>> sol = neurode.solve(lambda t, y: rates * y, torch.ones(2), (0, 1), method="rk4", steps=4, integrate=size)
        >>> round(sol.integrals[-1].item(), 4)
        5.0
    """
    if distribution not in ("rademacher", "gaussian"):
        raise InputError(f"distribution={distribution!r}; it must be 'rademacher' or 'gaussian'.")

    def one(x: Tensor) -> Tensor:
        if distribution == "gaussian" or x.is_complex():
            return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        bits = torch.randint(0, 2, x.shape, device=x.device, generator=generator)
        return (2 * bits - 1).to(x.dtype)

    def draw(y0: Any) -> Any:
        if noise is None:
            return pytree.tree_map(one, y0)
        shapes = [tuple(x.shape) for x in pytree.tree_leaves(noise)]
        if shapes != [tuple(x.shape) for x in pytree.tree_leaves(y0)]:
            wanted = [tuple(x.shape) for x in pytree.tree_leaves(y0)]
            raise InputError(f"the noise has the shapes {shapes}; it must have those of y0, {wanted}.")
        return noise

    def value(y: Any, dy: Any, product: Any, noise: Any, batched: bool) -> Tensor:
        return _squares(product(noise), batched)

    return Integrand(value, draw, inside=True)


def random_end_time(
    t0: float,
    t1: float,
    width: float,
    *,
    rows: int | None = None,
    generator: torch.Generator | None = None,
    device: Any = None,
) -> Tensor:
    """An end time drawn evenly from `t1 - width` to `t1 + width`: a field trained so learns to stand still around `t1`.

    Draw one for each solve in training, and solve to `t1` otherwise.

    Args:
        t0, t1: the span.
        width: at most the span's length, so that the end does not pass the start.
        rows: how many rows, each with its own end, for `batch_dim=0`; None for one.
        generator: what to draw from; None for PyTorch's own.
        device: where the state lives; None for PyTorch's default device.

    Returns:
        A time, 0-d or `(rows,)`, float64.

    References:
        A. Ghosh, H. S. Behl, E. Dupont, P. Torr, V. Namboodiri (2020), STEER: simple temporal regularization for neural
        ODEs, NeurIPS, arXiv:2006.10711.

    Example:
        >>> import torch, neurode
        >>> t1 = neurode.regularizers.random_end_time(0.0, 1.0, 0.5, generator=torch.Generator().manual_seed(0))
        >>> sol = neurode.solve(lambda t, y: -y, 1.0, (0.0, t1), method="dopri5")
        >>> round(sol.t1.item(), 2)
        1.47
    """
    if not 0 < width <= abs(t1 - t0):
        raise InputError(f"width={width!r}; it must lie between 0 and the span's length, {abs(t1 - t0):g}.")
    dtype = torch.float32 if torch.device(device or torch.get_default_device()).type == "mps" else torch.float64
    uniform = torch.rand(() if rows is None else rows, dtype=dtype, device=device, generator=generator)
    return t1 + width * (2 * uniform - 1)


def random_step(
    f: Callable[..., Any],
    solution: Solution,
    *,
    length: float,
    method: Any = "tsit5",
    estimates: Any = ("local_error", "stiffness"),
    args: tuple[Any, ...] = (),
    batch_dim: int | None = None,
    generator: torch.Generator | None = None,
) -> Solution:
    """One step of a method from a random output of a solution, for its `.local_error` and `.stiffness`.

    An unbiased sample of what the sums over all steps measure, for the price of one step; since it starts from an output, it
    goes with every gradient strategy and with any method of the solve itself.

    Args:
        f: the vector field.
        solution: solved with `t_eval`, whose outputs are the places to choose from; the last one is left out if there are
            others.
        length: of the step, positive: about the length of the steps that the solve takes.
        method: an explicit Runge-Kutta method that has the estimates.
        estimates: which; see `neurode.solve`.
        args, batch_dim: as in the solve.
        generator: what to draw the place from; None for PyTorch's own.

    References:
        A. Pal, A. Edelman, C. Rackauckas (2023), Locally regularized neural differential equations: some black boxes were
        meant to remain closed!, ICML, arXiv:2303.02262.

    Example:
        >>> import torch, neurode
        >>> f = lambda t, y: -5 * y
        >>> sol = neurode.solve(f, torch.ones(2), (0, 1), method="rk4", steps=20, t_eval=torch.linspace(0, 1, 9))
        >>> step = neurode.regularizers.random_step(f, sol, length=0.05)
        >>> round(step.stiffness.item(), 3)
        5.0
    """
    if not length > 0:
        raise InputError(f"length={length!r}; it must be a positive number, such as (t1 - t0) / steps.")
    places = max(1, len(solution.ts) - 1)
    i = int(torch.randint(places, (), generator=generator, device=None if generator is None else generator.device))
    t, y = solution.ts[i].detach(), pytree.tree_map(lambda x: x[i], solution.ys)
    backward = len(solution.ts) > 1 and bool((solution.ts[-1] < solution.ts[0]).any())
    span = (t, t - length) if backward else (t, t + length)
    return solve(
        f, y, span, method=method, first_step=length, min_step=length, estimates=estimates, args=args, batch_dim=batch_dim,
        gradient="autograd", engine="eager",
    )  # fmt: skip


__all__ = ["Integrand", "jacobian_frobenius", "kinetic_energy", "random_end_time", "random_step"]
