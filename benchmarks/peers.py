"""One problem on every library: the state (or all outputs) and, where asked for, the gradients of its mean square."""

from __future__ import annotations

import copy
import importlib.util
import os
from typing import Any

import torch
from contest import Candidate
from problems import Problem
from torch import Tensor

import neurode

PEERS = ("torchdiffeq", "torchode", "diffrax")


def installed(name: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(name) is not None


def _torch(problem: Problem, solve: Any, note: str = "") -> Candidate:
    """A candidate from `solve(y0) -> outputs` on PyTorch tensors."""
    y0 = problem.y0.clone().requires_grad_(problem.gradients)
    wanted = [y0, *problem.parameters]

    def run_() -> list[Tensor]:
        with torch.set_grad_enabled(problem.gradients):
            out = solve(y0)
        if not problem.gradients:
            return [out]
        return [out.detach(), *torch.autograd.grad(out.square().mean(), wanted)]

    return Candidate(run_, lambda found: found[:1] + _one(found[1:]), note)


def _one(gradients: list[Tensor]) -> list[Tensor]:
    """All gradients as one vector, or nothing."""
    return [torch.cat([g.reshape(-1) for g in gradients])] if gradients else []


def neurode_solve(problem: Problem, engine: str = "fused", **kwargs: Any) -> Candidate:
    """neurode, the whole Python call."""
    asked = {"batch_dim": 0 if problem.per_sample or problem.steps else None, "engine": engine, **kwargs}
    if problem.steps:
        asked |= {"method": problem.method, "steps": problem.steps}
    else:
        asked |= {"method": problem.method, "rtol": problem.tolerance, "atol": problem.tolerance}

    def solve(y0: Tensor) -> Tensor:
        return neurode.solve(problem.field, y0, problem.span, t_eval=problem.t_eval, **asked).ys

    return _torch(problem, solve)


def truth(problem: Problem) -> list[Tensor]:
    """The answer in float64: RK4 on five times the steps, or dopri5 with a tolerance thousands of times smaller."""
    field = copy.deepcopy(problem.field).double() if isinstance(problem.field, torch.nn.Module) else problem.field
    steps = problem.steps and 5 * problem.steps
    exact = Problem(
        **{**problem.__dict__, "field": field, "y0": problem.y0.double(), "steps": steps, "tolerance": 1e-10}
    )
    if exact.t_eval is not None:
        exact = Problem(**{**exact.__dict__, "t_eval": exact.t_eval.double()})
    candidate = neurode_solve(exact, engine="eager")
    return candidate.read(candidate.run())


def torchdiffeq(problem: Problem, adjoint: bool = False) -> Candidate:
    """torchdiffeq: one step for the batch. Its "rk4" is the 3/8 rule: as many evaluations, another method of order 4."""
    from torchdiffeq import odeint, odeint_adjoint

    times = torch.tensor(problem.span, dtype=problem.y0.dtype) if problem.t_eval is None else problem.t_eval
    options: dict[str, Any] = {"method": "dopri5", "rtol": problem.tolerance, "atol": problem.tolerance}
    if problem.steps:
        options = {"method": "rk4", "options": {"step_size": (problem.span[1] - problem.span[0]) / problem.steps}}
    integrate = odeint_adjoint if adjoint else odeint

    def solve(y0: Tensor) -> Tensor:
        out = integrate(problem.field, y0, times, **options)
        return out[-1:] if problem.t_eval is None else out

    return _torch(problem, solve, "3/8 rule" if problem.steps else "dopri5, joint step")


def torchode(problem: Problem) -> Candidate:
    """torchode: every row its own step; adaptive alone."""
    import torchode as to

    times = torch.tensor([problem.span[1]]) if problem.t_eval is None else problem.t_eval
    times = times.to(problem.y0.dtype).expand(len(problem.y0), -1)
    start, end = (torch.full((len(problem.y0),), t, dtype=problem.y0.dtype) for t in problem.span)
    term = to.ODETerm(lambda t, y: problem.field(t[:, None], y))
    step = {"dopri5": to.Dopri5, "tsit5": to.Tsit5}[problem.method](term=term)
    adjoint = to.AutoDiffAdjoint(step, to.IntegralController(atol=problem.tolerance, rtol=problem.tolerance, term=term))

    def solve(y0: Tensor) -> Tensor:
        found = adjoint.solve(to.InitialValueProblem(y0=y0, t_start=start, t_end=end, t_eval=times))
        return found.ys.transpose(0, 1)

    return _torch(problem, solve, f"{problem.method}, per sample, not compiled")


def diffrax(problem: Problem, per_sample: bool = False) -> Candidate:
    """diffrax under `jax.jit`; gradients by its recommended adjoint with a checkpoint for every step."""
    import diffrax as dfx
    import jax
    import jax.numpy as jnp

    y0, parameters = _to_jax(problem.y0), [_to_jax(p) for p in problem.parameters]
    dtype = y0.dtype
    t0, t1 = (jnp.asarray(t, dtype) for t in problem.span)
    saveat = (
        dfx.SaveAt(t1=True) if problem.t_eval is None else dfx.SaveAt(ts=_to_jax(problem.t_eval.to(problem.y0.dtype)))
    )
    term = dfx.ODETerm(problem.jax_field)
    solver = {"rk4": _rk4, "dopri5": dfx.Dopri5, "tsit5": dfx.Tsit5}[problem.method]()
    if problem.steps:
        control, h0 = dfx.ConstantStepSize(), (t1 - t0) / problem.steps
    else:
        control, h0 = dfx.PIDController(rtol=problem.tolerance, atol=problem.tolerance), None

    def integrate(y: Any, theta: Any, most: int) -> Any:
        adjoint = dfx.RecursiveCheckpointAdjoint(checkpoints=most)
        one = lambda x: dfx.diffeqsolve(
            term,
            solver,
            t0,
            t1,
            h0,
            x,
            theta,
            saveat=saveat,
            stepsize_controller=control,
            max_steps=most,
            adjoint=adjoint,
        )
        return jax.vmap(one, out_axes=0)(y) if per_sample else one(y)

    # As many steps as there are, and no more: both its memory and its time on the way back grow with the most allowed.
    most = (problem.steps or 0) + 1
    if not problem.steps:
        found = jax.jit(lambda y, theta: integrate(y, theta, 16384).stats["num_steps"])(y0, parameters)
        most = int(found.max()) + 1

    def loss(y: Any, theta: Any) -> Any:
        out = integrate(y, theta, most).ys
        return jnp.mean(out**2), out

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    def values(y: Any, theta: Any) -> Any:
        if not problem.gradients:
            return [integrate(y, theta, most).ys]
        (_, out), (gy, gtheta) = both(y, theta)
        return [out, gy, *gtheta]

    jitted = jax.jit(values)

    def read(found: Any) -> list[Tensor]:
        assert all(x.dtype == dtype for x in found), [x.dtype for x in found]
        tensors = [_from_jax(x) for x in found]
        out = tensors[0].transpose(0, 1) if per_sample else tensors[0]
        return [out, *_one(tensors[1:])]

    note = f"{problem.method}, {'per sample' if per_sample else 'joint step'}, {most - 1} steps at the most"
    return Candidate(lambda: jax.block_until_ready(jitted(y0, parameters)), read, "" if problem.steps else note)


def _rk4() -> Any:
    """The classical method for diffrax, which has no fourth-order method of four stages."""
    import diffrax as dfx
    import numpy as np

    class RK4(dfx.AbstractERK):
        tableau = dfx.ButcherTableau(
            a_lower=(np.array([0.5]), np.array([0, 0.5]), np.array([0.0, 0, 1])),
            b_sol=np.array([1, 2, 2, 1]) / 6,
            b_error=np.zeros(4),
            c=np.array([0.5, 0.5, 1]),
        )
        interpolation_cls = dfx.ThirdOrderHermitePolynomialInterpolation.from_k

        def order(self, terms: Any) -> int:
            return 4

    return RK4()


def setup_jax() -> None:
    """Before the first import of JAX: the processor, float64 where it is asked for, and one thread a product."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_ENABLE_X64", "1")
    if torch.get_num_threads() == 1:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")


def _to_jax(x: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(x.detach().numpy().copy())


def _from_jax(x: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(x))


__all__ = ["PEERS", "diffrax", "installed", "neurode_solve", "setup_jax", "torchdiffeq", "torchode", "truth"]
