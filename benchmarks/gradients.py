"""Gradients beside their peers: time, memory and error of every strategy and of every peer's, on one trained field in one run.

    python benchmarks/gradients.py [fixed] [adaptive] [memory] [--peers] [--rounds 7] [--out results.json] [--plots docs/images]

The field is that of the spiral classifier, trained, since an untrained one flatters the adjoint; batch 128, float32, one
thread for everybody. Times are medians of the processor time of interleaved forward and backward passes, ratios medians of
those within a round, so that others on the machine take little part in either. Memory is the peak of live tensor
storage, less what lived before; of JAX, which runs no operations of PyTorch's, the temporaries of the compiled program as
XLA plans them. Errors are shares of the gradient's norm: "own" against the exact gradient of the same library's numbers,
"true" against the gradient of the equation, both in float64. Parts that are named are run, and their results put beside
those of the others in the file.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import contest
import peers
import torch
from contest import Candidate
from problems import Problem, spiral
from torch import Tensor, nn

import neurode
from neurode.data import spirals
from neurode.report.memory import peak_memory

STEPS, SWEEP = 100, (20, 40, 80, 160, 320, 640, 1280, 2560)
TOLERANCE, SPAN = 1e-5, (0.0, 1.0)
CHECKPOINTS = 16


@dataclass(frozen=True)
class Found:
    """What one candidate needed, and how far off its gradient is.

    Attributes:
        milliseconds: forward and backward.
        ratio: the same as a multiple of full backpropagation.
        kilobytes: peak memory, or None where nothing tells.
        own, true: errors, or None where there is nothing exact to compare with.
        evaluations: of `f`, forward and backward, where they are counted.
    """

    milliseconds: float
    ratio: float
    kilobytes: float | None
    own: float | None
    true: float | None
    evaluations: int | None = None


# ---- the problem


def trained(hidden: int = 64, iterations: int = 2000) -> Problem:
    """The spiral field and a batch of its states, after training of the whole classifier on RK4 with 20 steps."""
    problem = spiral(128, hidden, steps=STEPS, gradients=True, span=SPAN)
    field: Any = problem.field
    torch.manual_seed(0)
    lift, head = nn.Linear(2, 6), nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 2))
    points, labels = spirals(1024, generator=torch.Generator().manual_seed(0))
    weights = [*field.parameters(), *lift.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for i in range(iterations):
        chosen = slice(128 * (i % 8), 128 * (i % 8) + 128)
        y1 = neurode.solve(field, lift(points[chosen]), SPAN, method="rk4", steps=20, batch_dim=0).y1
        loss = nn.functional.cross_entropy(head(y1), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"the field, trained: loss {loss.item():.3f}", flush=True)  # pyrefly: ignore[unbound-name]
    with torch.no_grad():
        return replace(problem, y0=lift(points[:128]).clone())


# ---- the candidates


def ours(problem: Problem, gradient: Any, **asked: Any) -> Candidate:
    """One of our strategies on the eager engine, or what else is asked for."""
    y0 = problem.y0.clone().requires_grad_()
    how: dict[str, Any] = {"engine": "eager", "gradient": gradient, "method": problem.method, **asked}
    how |= {"steps": problem.steps} if problem.steps else {"rtol": problem.tolerance, "atol": problem.tolerance}
    how |= {"batch_dim": 0} if problem.per_sample else {}
    kept: list[Any] = [None]

    def run() -> list[Tensor]:
        solution = neurode.solve(problem.field, y0, problem.span, **how)
        kept[0] = solution.stats
        loss = solution.y1.square().mean()
        return list(torch.autograd.grad(loss, [y0, *problem.parameters]))

    candidate = Candidate(run, _vector)
    object.__setattr__(candidate, "stats", kept)
    return candidate


def _vector(grads: list[Tensor]) -> list[Tensor]:
    return [torch.cat([g.reshape(-1) for g in grads])]


def strategies(steps: int | None) -> dict[str, Any]:
    """Ours by the names that they are reported under."""
    root = round(steps**0.5) if steps else CHECKPOINTS
    return {
        "autograd": "autograd",
        "discrete": "discrete",
        "discrete, one stage alive": neurode.Discrete(alive="stage"),
        f"discrete, {root} checkpoints": neurode.Discrete(checkpoints=root),
        "reversible": "reversible",
        "continuous": "continuous",
    }


COUPLED_TAPE = "autograd of Reversible(method)"  # what "reversible" is the gradient of


def torchdiffeq(problem: Problem, adjoint: bool) -> Candidate:
    """torchdiffeq, backpropagated or by its adjoint. Its "rk4" is the 3/8 rule: as many evaluations, another method."""
    base = peers.torchdiffeq(problem, adjoint=adjoint)
    return Candidate(base.run, lambda found: _vector(found[1:]), base.note)


class _Rows(nn.Module):
    """The field as torchode calls it: times `(rows,)`, or one row within its own `vmap`."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.field(t.unsqueeze(-1), y)


def torchode(problem: Problem, adjoint: str) -> Candidate:
    """torchode: every row its own step."""
    import torchode as to

    rows, dtype = len(problem.y0), problem.y0.dtype
    start, end = (torch.full((rows,), t, dtype=dtype) for t in problem.span)
    term: Any = to.ODETerm(_Rows(copy.deepcopy(problem.field)))
    step = to.Dopri5(term=term)
    control = to.IntegralController(atol=problem.tolerance, rtol=problem.tolerance, term=term)
    solver: Any = to.AutoDiffAdjoint(step, control)
    if adjoint != "autodiff":
        kind = {"backsolve": to.BacksolveAdjoint, "joint backsolve": to.JointBacksolveAdjoint}[adjoint]
        solver = kind(term, step, control)
    y0, parameters = problem.y0.clone().requires_grad_(), list(term.parameters())

    def run() -> list[Tensor]:
        asked = to.InitialValueProblem(y0=y0, t_start=start, t_end=end, t_eval=torch.stack([start, end], 1))
        y1 = solver.solve(asked).ys[:, -1]
        return list(torch.autograd.grad(y1.square().mean(), [y0, *parameters]))

    return Candidate(run, _vector)


def diffrax(problem: Problem, adjoint: str) -> Candidate:
    """diffrax under `jax.jit`, by the adjoint that it recommends or by solving back; with `.compiled` for its memory."""
    import diffrax as dfx
    import jax
    import jax.numpy as jnp

    y0, theta = peers._to_jax(problem.y0), [peers._to_jax(p) for p in problem.parameters]
    t0, t1 = (jnp.asarray(t, y0.dtype) for t in problem.span)
    term, solver = dfx.ODETerm(problem.jax_field), {"rk4": peers._rk4, "dopri5": dfx.Dopri5}[problem.method]()
    control: Any = dfx.ConstantStepSize()
    h0 = (t1 - t0) / problem.steps if problem.steps else None
    if not problem.steps:
        control = dfx.PIDController(rtol=problem.tolerance, atol=problem.tolerance)

    def integrate(y: Any, theta: Any, most: int) -> Any:
        how = (
            dfx.RecursiveCheckpointAdjoint(checkpoints=_checkpoints(adjoint, most)) if adjoint != "backsolve" else None
        )
        how = how or dfx.BacksolveAdjoint()
        one = lambda x: dfx.diffeqsolve(
            term, solver, t0, t1, h0, x, theta, stepsize_controller=control, max_steps=most, adjoint=how
        )
        return jax.vmap(one)(y) if problem.per_sample else one(y)

    most = (problem.steps or 0) + 1
    if not problem.steps:
        counted = jax.jit(lambda y, theta: integrate(y, theta, 4096).stats["num_steps"])(y0, theta)
        most = int(counted.max()) + 1
        most = 4 * most if adjoint == "backsolve" else most  # the same bound holds for the way back
    loss = lambda y, theta: jnp.mean(integrate(y, theta, most).ys ** 2)
    jitted = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(y0, theta).compile()

    def read(found: Any) -> list[Tensor]:
        return _vector([peers._from_jax(found[0]), *(peers._from_jax(x) for x in found[1])])

    candidate = Candidate(lambda: jax.block_until_ready(jitted(y0, theta)), read)
    object.__setattr__(candidate, "compiled", jitted)
    return candidate


def _checkpoints(adjoint: str, most: int) -> int | None:
    """As many as there are steps, so that nothing is computed again, or its default: some 2 sqrt(steps)."""
    return most if adjoint == "all checkpoints" else None


def others(problem: Problem) -> dict[str, Callable[[], Candidate]]:
    """Every peer's gradient that there is for a problem."""
    made: dict[str, Callable[[], Candidate]] = {}
    if peers.installed("torchdiffeq"):
        made["torchdiffeq backpropagation"] = lambda: torchdiffeq(problem, False)
        made["torchdiffeq adjoint"] = lambda: torchdiffeq(problem, True)
    if peers.installed("torchode") and not problem.steps:
        made["torchode autodiff"] = lambda: torchode(problem, "autodiff")
        made["torchode backsolve"] = lambda: torchode(problem, "joint backsolve")
    if peers.installed("diffrax"):
        made["diffrax, all checkpoints"] = lambda: diffrax(problem, "all checkpoints")
        made["diffrax, default checkpoints"] = lambda: diffrax(problem, "default")
        made["diffrax backsolve"] = lambda: diffrax(problem, "backsolve")
    return made


# ---- what is measured


def memory(candidate: Candidate) -> float:
    """Peak kilobytes."""
    compiled = getattr(candidate, "compiled", None)
    if compiled is not None:
        return compiled.memory_analysis().temp_size_in_bytes / 1e3
    return peak_memory(candidate.run) / 1e3


def rounds_of(candidates: dict[str, Candidate], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round, the candidates in turn so that a slow spell meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate.run()
    for _ in range(rounds):
        for name, candidate in candidates.items():
            gc.collect()
            start = time.process_time()
            candidate.run()
            seconds[name].append(time.process_time() - start)
    return {name: [1e3 * value for value in values] for name, values in seconds.items()}


def ratio(mine: list[float], base: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(mine, base, strict=True))


def exact(problem: Problem, **changes: Any) -> Tensor:
    """The gradient of a problem in float64 on the tape."""
    fine = replace(problem, field=copy.deepcopy(problem.field).double(), y0=problem.y0.double(), **changes)
    candidate = ours(fine, "autograd")
    return candidate.read(candidate.run())[0]


def own(name: str, problem: Problem) -> Tensor | None:
    """The exact gradient of a library's own numbers in float64, where it can be had."""
    fine = replace(problem, field=copy.deepcopy(problem.field).double(), y0=problem.y0.double())
    if name in ("reversible", COUPLED_TAPE):
        candidate = ours(fine, "autograd", method=neurode.Reversible(problem.method))
    elif name.startswith("torchdiffeq"):
        candidate = torchdiffeq(fine, False)
    elif name.startswith("torchode"):
        candidate = torchode(fine, "autodiff")
    elif name.startswith("diffrax"):
        return None  # its programs in float64 would take as long to compile as all else does to run
    else:
        candidate = ours(fine, "autograd")
    return candidate.read(candidate.run())[0]


def table(title: str, problem: Problem, candidates: dict[str, Candidate], rounds: int) -> dict[str, Found]:
    """Measure all, and print."""
    print(f"\n{title}", flush=True)
    truth = exact(problem, steps=None, method="dopri5", tolerance=1e-10, per_sample=False)
    times = rounds_of(candidates, rounds)
    found = {}
    for name, candidate in candidates.items():
        gradient, reference = candidate.read(candidate.run())[0], own(name, problem)
        off = None if reference is None else contest.relative(gradient, reference)
        found[name] = Found(
            statistics.median(times[name]), ratio(times[name], times["autograd"]), memory(candidate), off,
            contest.relative(gradient, truth), _evaluations(candidate),
        )  # fmt: skip
    print(f"  {'':34s} {'ms':>8s} {'ratio':>6s} {'peak KB':>9s} {'off: own':>9s} {'true':>9s} {'evaluations':>12s}")
    for name, row in found.items():
        off = float("nan") if row.own is None else row.own
        print(
            f"  {name:34s} {row.milliseconds:8.1f} {row.ratio:6.2f} {row.kilobytes:9.0f} {off:9.1e}"
            f" {row.true:9.1e} {row.evaluations or '':>12}",
            flush=True,
        )
    tape = ratio(times["reversible"], times[COUPLED_TAPE])
    print(f"  reversible takes {tape:.2f} times the backpropagation of its own scheme", flush=True)
    return found


def _evaluations(candidate: Candidate) -> int | None:
    stats = getattr(candidate, "stats", [None])[0]
    if stats is None:
        return None
    return stats.num_calls + (stats.backward.num_calls if stats.backward else 0)


def sweep(problem: Problem, with_peers: bool, steps: tuple[int, ...]) -> dict[str, list[float]]:
    """Peak kilobytes against the number of steps."""
    print(f"\npeak memory in KB, RK4, steps {', '.join(map(str, steps))}")
    kinds = {**strategies(256), "reversible": "reversible"}
    kinds.pop("discrete, one stage alive")
    made: dict[str, Callable[[int], Candidate]] = {
        name: (lambda n, g=gradient: ours(replace(problem, steps=n), g)) for name, gradient in kinds.items()
    }
    for name in ("torchdiffeq adjoint", "diffrax, default checkpoints") if with_peers else ():
        if name in others(problem):
            made[name] = lambda n, name=name: others(replace(problem, steps=n))[name]()
    rows: dict[str, list[float]] = {}
    for name, make in made.items():
        rows[name] = [memory(make(n)) for n in steps]
        print(f"  {name:34s} " + " ".join(f"{value:9.0f}" for value in rows[name]), flush=True)
    return rows


PARTS = ("fixed", "adaptive", "memory")


def timed(part: str, problem: Problem, with_peers: bool, rounds: int) -> dict[str, Any]:
    """One table."""
    title = f"RK4, {STEPS} steps, batch 128, float32, one thread"
    kinds = strategies(problem.steps)
    if part == "adaptive":
        title = f"dopri5, tolerance {TOLERANCE:g}, every row its own steps (torchdiffeq: one for all)"
        problem = replace(problem, steps=None, method="dopri5", tolerance=TOLERANCE, per_sample=True)
        kinds = strategies(None)
    candidates = {name: ours(problem, gradient) for name, gradient in kinds.items()}
    candidates[COUPLED_TAPE] = ours(problem, "autograd", method=neurode.Reversible(problem.method))
    candidates |= {name: make() for name, make in others(problem).items()} if with_peers else {}
    return {name: asdict(row) for name, row in table(title, problem, candidates, rounds).items()}


def markdown(results: dict[str, Any]) -> None:
    """Print the tables as `docs/gradients.md` has them."""
    for part in ("fixed", "adaptive"):
        if part in results:
            print("\n| | time | ratio | peak memory | off |\n| --- | --- | --- | --- | --- |")
        for name, row in results.get(part, {}).items():
            off = row["true"] if row["own"] is None else row["own"]
            cells = (
                f"{row['milliseconds']:,.0f} ms",
                f"{row['ratio']:.2f}",
                f"{row['kilobytes']:,.0f} KB",
                f"{off:.0e}",
            )
            print(f"| {name} | {' | '.join(cells)} |")
    if "memory" in results:
        print(f"\n| steps | {' | '.join(f'{n:,}' for n in results['memory']['steps'])} |")
        print("| --- " * (1 + len(results["memory"]["steps"])) + "|")
        for name, values in results["memory"]["rows"].items():
            print(f"| {name} | {' | '.join(f'{value:,.0f}' for value in values)} |")


def _kept(path: pathlib.Path | None) -> Problem | None:
    """The problem with a field that was trained before."""
    if path is None or not path.exists():
        return None
    y0, weights = torch.load(path)
    problem = spiral(128, 64, steps=STEPS, gradients=True, span=SPAN)
    problem.field.load_state_dict(weights)  # pyrefly: ignore[missing-attribute]
    return replace(problem, y0=y0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all of them")
    parser.add_argument("--peers", action="store_true", help="also torchdiffeq, torchode and diffrax, where installed")
    parser.add_argument("--rounds", type=int, help="of the timed parts; 7 without it")
    parser.add_argument("--small", action="store_true", help="few steps and rounds, to see that it runs")
    parser.add_argument("--field", type=pathlib.Path, help="keep the trained field in this file, for the next part")
    parser.add_argument("--out", type=pathlib.Path, help="read and write the figures as JSON")
    parser.add_argument("--plots", type=pathlib.Path, help="draw them into this folder")
    asked = parser.parse_args()
    unknown = set(asked.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    contest.one_core()
    peers.setup_jax()
    rounds, steps = (2, (20, 40)) if asked.small else (asked.rounds or 7, SWEEP)
    problem = _kept(asked.field) or trained(iterations=10 if asked.small else 2000)
    if asked.field:
        torch.save((problem.y0, problem.field.state_dict()), asked.field)  # pyrefly: ignore[missing-attribute]
    results = json.loads(asked.out.read_text()) if asked.out and asked.out.exists() else {}
    for part in asked.parts or PARTS:
        if part in ("fixed", "adaptive"):
            results[part] = timed(part, problem, asked.peers, rounds)
        else:
            results[part] = {"steps": steps, "rows": sweep(problem, asked.peers, steps)}
        if asked.out:
            asked.out.write_text(json.dumps(results, indent=1))
    markdown(results)
    if asked.plots:
        import gradients_plots

        gradients_plots.draw(results, asked.plots)


if __name__ == "__main__":
    main()
