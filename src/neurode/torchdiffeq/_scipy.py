"""`method="scipy_solver"`: SciPy's solvers on the flattened state, in float64, without gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from neurode.torchdiffeq._call import Call


def scipy_states(call: Call) -> Any:
    """The states at `call.t` by `scipy.integrate.solve_ivp`.

    Raises:
        ImportError: SciPy is not installed.
        ValueError: no number serves as tolerance of all elements.
        RuntimeError: SciPy's solver gave up.
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise ImportError("method='scipy_solver' needs SciPy. Type: pip install scipy") from error
    options, t = call.options, call.t.detach().double()
    name = options.get("solver", "LSODA")
    limits = {"max_step": float(options.get("max_step", math.inf))}
    if name == "LSODA":  # the only one of SciPy's that has it
        limits["min_step"] = float(options.get("min_step", 0.0))
    start = _flat(call.leaves)
    like = call.leaves[0]

    def rhs(time: float, y: Any) -> Any:
        state = _split(torch.as_tensor(y, device=like.device).to(like.dtype), call, ())
        with torch.no_grad():
            dy = call.field(torch.as_tensor(time, dtype=like.abs().dtype, device=like.device), state)
        return _flat(dy if isinstance(dy, tuple) else (dy,))

    tolerances = {key: _number(key, value) for key, value in (("rtol", call.rtol), ("atol", call.atol))}
    result = solve_ivp(
        rhs, (float(t[0]), float(t[-1])), start, method=name, t_eval=t.cpu().numpy(), **tolerances, **limits
    )
    if not result.success:
        raise RuntimeError(f"scipy_solver ({name}) stopped at t = {result.t[-1]:.6g}: {result.message}")
    ys = torch.as_tensor(result.y.T.copy(), device=like.device).to(like.dtype)
    return _split(ys, call, (len(t),))


def _number(name: str, value: Any) -> Any:
    if isinstance(value, float):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy().reshape(-1)
    raise ValueError(f"scipy_solver takes one number as {name} for a tuple; given: {value!r}.")


def _flat(leaves: Any) -> Any:
    return torch.cat([y.detach().reshape(-1) for y in leaves]).cpu().resolve_conj().numpy()


def _split(flat: Tensor, call: Call, lead: tuple[int, ...]) -> Any:
    parts = flat.split([y.numel() for y in call.leaves], dim=-1)
    states = tuple(part.reshape(lead + y.shape) for part, y in zip(parts, call.leaves, strict=True))
    return states if isinstance(call.y0, tuple) else states[0]
