"""Van der Pol, mu = 25, 256 samples: what each needs on its own, in a batch of its own steps, and under a joint step.

    python benchmarks/per_sample.py [--rows 256] [--out benchmarks/results/per_sample.json]

float64, t in [0, 50], 2,048 outputs, dopri5 at rtol = atol = 1e-5, y0 ~ N(0, 1) from seed 0. torchode joins where installed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import torch
import torchdiffeq

import neurode

MU, END, OUTPUTS = 25.0, 50.0, 2048
OPTIONS: dict[str, Any] = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5}


def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([y[:, 1], MU * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], 1)


def peers(y0: torch.Tensor, times: torch.Tensor) -> dict[str, str]:
    calls = []

    def counted(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return field(t, y)

    torchdiffeq.odeint(counted, y0, times, **OPTIONS)
    found = {"torchdiffeq (joint step)": f"{len(calls)} evaluations for every row"}
    try:
        import torchode
    except ImportError:
        return found
    term = torchode.ODETerm(field)
    control = torchode.IntegralController(atol=1e-5, rtol=1e-5, term=term)
    adjoint = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
    stats = adjoint.solve(torchode.InitialValueProblem(y0=y0, t_eval=times.expand(len(y0), -1))).stats
    accepted = stats["n_accepted"].double()
    found["torchode (per sample)"] = f"accepted {accepted.mean():.0f} on average, {int(accepted.max())} at the most;"
    found["torchode (per sample)"] += f" {int(stats['n_f_evals'].max())} evaluations for every row"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256, help="how many rows are also solved alone")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    y0, times = torch.randn(256, 2, generator=generator), torch.linspace(0, END, OUTPUTS)
    with torch.no_grad():
        batch = neurode.solve(field, y0, (0, END), t_eval=times, batch_dim=0, engine="eager", **OPTIONS)
        joint = neurode.solve(field, y0, (0, END), t_eval=times, engine="eager", **OPTIONS).stats
        worst = {"steps": 0.0, "evaluations": 0.0, "states": 0.0}
        for row in range(arguments.rows):
            alone = neurode.solve(field, y0[row : row + 1], (0, END), batch_dim=0, engine="eager", **OPTIONS)
            pairs = {
                "steps": (alone.stats.num_accepted[0], batch.stats.num_accepted[row]),
                "evaluations": (alone.stats.num_evaluations[0], batch.stats.num_evaluations[row]),
            }
            for name, (a, b) in pairs.items():
                worst[name] = max(worst[name], abs(int(a) - int(b)) / int(a))
            worst["states"] = max(worst["states"], float((alone.y1[0] - batch.y1[row]).abs().max()))
        others = peers(y0, times)
    accepted, evaluations = batch.stats.num_accepted.double(), batch.stats.num_evaluations.double()
    print(f"neurode, per sample: accepted {accepted.mean():.0f} on average, {int(accepted.max())} at the most;")
    print(f"  evaluations {evaluations.mean():.0f} on average, {int(evaluations.max())} at the most")
    print(f"  largest relative difference from a batch of one ({arguments.rows} rows): {worst}")
    print(f"neurode, joint step: accepted {joint.num_accepted}, {joint.num_evaluations} evaluations for every row")
    for name, text in others.items():
        print(f"{name}: {text}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        found = {
            "mean accepted": float(accepted.mean()), "most accepted": int(accepted.max()), "joint accepted": joint.num_accepted,
            "mean evaluations": float(evaluations.mean()), "joint evaluations": joint.num_evaluations, "worst": worst, **others,
        }  # fmt: skip
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
