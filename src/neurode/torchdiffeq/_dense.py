"""`odeint_dense`: a solution as a function of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from neurode.torchdiffeq._call import read_call
from neurode.torchdiffeq._states import adaptive_settings, grid_of, run


def odeint_dense(
    func: Callable[..., Any],
    y0: Any,
    t0: Any,
    t1: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[[Any], Any]:
    """Solve from t0 to t1, and return the solution as a function.

    Args:
        func, y0, rtol, atol, method, options: as for `odeint`; any method but `"scipy_solver"`, any state.
        t0, t1: the ends, numbers or tensors, in either order.

    Returns:
        A function of a time between t0 and t1, or a tensor of times, whose shape then comes before the state's.

    Example:
        >>> import torch
        >>> y = odeint_dense(lambda t, y: -y, torch.ones(1), torch.tensor(0.0), torch.tensor(1.0))
        >>> round(float(y(torch.tensor(0.5))), 4)
        0.6065
    """
    t = torch.stack([torch.as_tensor(t0).reshape(()), torch.as_tensor(t1).reshape(())])
    t = t if t.is_floating_point() else t.to(torch.get_default_dtype())
    call = read_call(func, y0, t, rtol, atol, method, options)
    if call.solver.kind == "scipy":
        raise ValueError("scipy_solver has no dense output; type method='dopri5'.")
    if call.solver.kind == "adaptive":
        return run(call, t[0], t[1], dense=True, **adaptive_settings(call))
    grid = grid_of(call)
    return run(call, grid[0], grid[-1], grid=grid, dense=True, on_failure="nan")
