"""The fused engine beside its peers, in one run: the table of what it promises, with what it reached.

    python benchmarks/engine.py [--rows P1 hidden ...] [--small] [--out benchmarks/results/engine.json]

One core and one thread for everybody (two threads: training_threads.py), candidates in turn, medians of many rounds, errors
against float64 beside every time. Peers that are not installed are named as absent. `make bench-engine` installs them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import contest
import peers
import torch
from contest import Candidate, Result
from problems import Problem, lotka_volterra, spiral, van_der_pol

OURS = "neurode"


@dataclass(frozen=True)
class Bar:
    """A promise: `ours` is at least `factor` times as fast as `peer`, or reaches `factor` of a unit.

    Attributes:
        peer: a candidate's name, `"peak"` (a share of the processor's multiply-adds) or `"GFLOP/s"`.
        factor: the least.
        ours: our candidate.
    """

    peer: str
    factor: float
    ours: str = OURS


@dataclass(frozen=True)
class Row:
    """One row of the table: a problem, who solves it, and what is promised.

    Attributes:
        name: as printed; its first word chooses the row.
        problem: made when the row is run.
        more: further candidates, `name -> make(problem)`.
        without: peers that do not take part.
        bars: the promises.
    """

    name: str
    problem: Callable[[bool], Problem]
    bars: tuple[Bar, ...] = ()
    more: dict[str, Callable[[Problem], Candidate]] = field(default_factory=dict)
    without: tuple[str, ...] = ()


RECOMPUTING = "neurode, recomputing"
JOINT, PER_SAMPLE = "diffrax, joint", "diffrax, per sample"


def spiral_row(name: str, bars: tuple[Bar, ...], batch: int = 128, hidden: int = 128, **rest: Any) -> Row:
    """A row of the spiral field on RK4 x 20."""
    more, without = rest.pop("more", {}), rest.pop("without", ())

    def make(small: bool) -> Problem:
        cut = {"steps": 3} if small else {}
        return spiral(min(batch, 8) if small else batch, min(hidden, 32) if small else hidden, **{**rest, **cut})

    return Row(name, make, bars, more, without)


def adaptive(small: bool) -> Problem:
    """P1a: the spiral field, dopri5, every row its own steps."""
    return spiral(
        8 if small else 128, 32 if small else 128, method="dopri5", steps=None, per_sample=True, gradients=True
    )


def oscillator_row(name: str, bars: tuple[Bar, ...], gradients: bool) -> Row:
    """A row of the Van der Pol oscillator, dopri5 at 1e-5, 200 outputs."""
    return Row(name, lambda small: van_der_pol(8 if small else 256, 20 if small else 200, gradients=gradients), bars)


def predators_row(name: str, bars: tuple[Bar, ...], batch: int, steps: int | None = None) -> Row:
    """A row of the Lotka-Volterra equations: tsit5 at 1e-6, or RK4 on a grid."""

    def make(small: bool) -> Problem:
        grid = {} if steps is None else {"method": "rk4", "steps": 100 if small else steps}
        return lotka_volterra(min(batch, 8) if small else batch, **grid)

    return Row(name, make, bars)


def rows() -> list[Row]:
    """The table. A row more is a line here, and where its field is new, a function in problems.py."""
    adjoint = {"torchdiffeq, adjoint": lambda p: peers.torchdiffeq(p, adjoint=True)}
    # Room for the states of all steps and not for their stages.
    recomputing = {RECOMPUTING: lambda p: peers.neurode_solve(p, memory=64 * (p.steps or 0) * len(p.y0))}
    eager = {"neurode, eager": lambda p: peers.neurode_solve(p, "eager")}
    kept = (Bar("torchdiffeq", 3.7), Bar("diffrax", 2.6))
    again = (Bar("torchdiffeq", 3.0, RECOMPUTING), Bar("diffrax", 2.1, RECOMPUTING))
    grads = {"gradients": True}
    return [
        spiral_row("P1 forward", (Bar("torchdiffeq", 5.0), Bar("diffrax", 1.25), Bar("peak", 0.75))),
        spiral_row("P1 gradients", (*kept, *again), more={**adjoint, **recomputing}, **grads),
        Row(
            "P1a dopri5 1e-5 per sample, gradients",
            adaptive,
            (Bar("torchdiffeq", 5.0), Bar(JOINT, 3.3), Bar(PER_SAMPLE, 5.5)),
        ),
        spiral_row("hidden 32, gradients", (Bar("torchdiffeq", 12.0), Bar("diffrax", 4.0)), hidden=32, **grads),
        spiral_row("hidden 64, gradients", (Bar("torchdiffeq", 6.0), Bar("diffrax", 2.8)), hidden=64, **grads),
        spiral_row("batch 1024, gradients", (Bar("torchdiffeq", 2.6), Bar("diffrax", 1.25)), batch=1024, **grads),
        spiral_row(
            "hidden 512, gradients",
            (Bar("GFLOP/s", 90.0),),
            hidden=512,
            more=eager,
            without=("diffrax", "torchdiffeq"),
            **grads,
        ),
        spiral_row("one row, forward", (Bar("diffrax", 1.2),), batch=1),
        spiral_row("one row, gradients", (Bar("diffrax", 1.2),), batch=1, **grads),
        oscillator_row("Van der Pol, forward", (Bar(PER_SAMPLE, 1.5), Bar("torchdiffeq", 25.0)), gradients=False),
        oscillator_row("Van der Pol, gradients", (Bar(PER_SAMPLE, 4.0), Bar("torchdiffeq", 25.0)), gradients=True),
        predators_row("Lotka-Volterra tsit5, one row", (Bar(JOINT, 1.0), Bar(PER_SAMPLE, 1.0)), 1),
        predators_row("Lotka-Volterra tsit5, batch 1024", (Bar(PER_SAMPLE, 8.0),), 1024),
        predators_row("Lotka-Volterra RK4 x 1000, one row", (Bar("torchdiffeq", 400.0),), 1, 1000),
        predators_row("Lotka-Volterra RK4 x 1000, batch 1024", (Bar("torchdiffeq", 22.0),), 1024, 1000),
    ]


def candidates(row: Row, problem: Problem) -> tuple[dict[str, Candidate], list[str]]:
    """Who takes part, and which peers are absent."""
    found = {OURS: peers.neurode_solve(problem)}
    makers = {"torchdiffeq": {"torchdiffeq": peers.torchdiffeq}, "diffrax": {"diffrax": peers.diffrax}}
    if problem.steps is None:
        makers["torchode"] = {"torchode": peers.torchode}
        makers["diffrax"] = {JOINT: peers.diffrax, PER_SAMPLE: lambda p: peers.diffrax(p, per_sample=True)}
    wanted = {name: made for name, made in makers.items() if name not in row.without}
    absent = [name for name in wanted if not peers.installed(name)]
    for name, made in wanted.items():
        if name not in absent:
            found |= {label: make(problem) for label, make in made.items()}
    found |= {label: make(problem) for label, make in row.more.items() if label.split(",")[0] not in absent}
    return found, absent


def verdict(bar: Bar, results: dict[str, Result], problem: Problem, peak: float) -> dict[str, Any]:
    """What was promised and what was reached."""
    ours = results[bar.ours].milliseconds
    rate = problem.flops / ours / 1e6
    if bar.peer not in results and bar.peer not in ("peak", "GFLOP/s"):
        return {**asdict(bar), "reached": None, "met": None}
    reached = {"peak": rate / peak, "GFLOP/s": rate}.get(bar.peer) or results[bar.peer].milliseconds / ours
    return {**asdict(bar), "reached": reached, "met": reached >= bar.factor}


def measure(row: Row, small: bool, seconds: float) -> dict[str, Any]:
    """One row: times, errors, bars; printed and returned."""
    problem = row.problem(small)
    field, absent = candidates(row, problem)
    double = problem.y0.dtype == torch.float64
    results = contest.contest(field, peers.truth(problem), 3 if small else 30, seconds, double)
    peak = results[OURS].peak
    bars = [verdict(bar, results, problem, peak) for bar in row.bars]
    print(f"\n{row.name}   (peak {peak:.0f} GFLOP/s in the same rounds, load {contest.load():.1f})")
    for name, result in results.items():
        rate = f"{problem.flops / result.milliseconds / 1e6:6.1f} GFLOP/s" if problem.flops else ""
        ratio = result.milliseconds / results[OURS].milliseconds
        errors = " ".join(f"{e:.1e}" for e in result.errors)
        print(f"  {name:22s} {result.milliseconds:9.3f} ms {ratio:7.2f}x {rate:16s} errors {errors}  {result.note}")
    for name in absent:
        print(f"  {name:22s} not installed")
    for bar in [] if small else bars:
        print(f"    {_sentence(bar)}")
    shown = {name: asdict(result) for name, result in results.items()}
    return {"row": row.name, "peak": peak, "load": contest.load(), "results": shown, "absent": absent, "bars": bars}


def _sentence(bar: dict[str, Any]) -> str:
    if bar["reached"] is None:
        return f"bar: {bar['ours']} against {bar['peer']}: not installed"
    word = "met" if bar["met"] else "MISSED"
    return f"bar: {bar['ours']} >= {bar['factor']:g} of {bar['peer']}: {bar['reached']:.2f}, {word}"


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", help="beginnings of the rows' names; all without it")
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes and three rounds: whether it runs, not how fast"
    )
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="most seconds of rounds a row (three rounds at least)"
    )
    parser.add_argument("--out", type=pathlib.Path, help="where to write the figures as JSON")
    asked = parser.parse_args()
    contest.one_core()
    torch.set_num_threads(1)
    peers.setup_jax()
    from neurode.fused.native import library

    machine = f"{platform.processor() or platform.machine()}, {library().nd_isa().decode()}, torch {torch.__version__}"
    print(f"{machine}; one core, one thread; medians of interleaved rounds; load {contest.load():.1f} at the start")
    chosen = [r for r in rows() if not asked.rows or any(r.name.startswith(name) for name in asked.rows)]
    found = [measure(row, asked.small, asked.seconds) for row in chosen]
    bars = [bar for row in found for bar in row["bars"]]
    missed = sum(bar["met"] is False for bar in bars)
    if asked.small:
        print("\nsmall sizes: no bar is judged")
    else:
        print(f"\n{sum(bar['met'] is True for bar in bars)} bars met, {missed} missed, of {len(bars)}")
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps({"machine": machine, "small": asked.small, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
