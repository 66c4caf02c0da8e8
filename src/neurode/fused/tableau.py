"""A Butcher tableau as the native solve loops read it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from neurode.stepping.explicit import HERMITE_END, HERMITE_RISE, HERMITE_START


@dataclass(frozen=True, eq=False)
class NativeTableau:
    """The numbers of an explicit method in float64 tensors.

    Attributes:
        stages, extra: rows of a step, and further rows that only dense output needs.
        a: `(stages + extra, stages + extra)`, zero from the diagonal on.
        b, c, e, e2: as in the tableau.
        p: `(stages + extra, degree)`, the dense output; the cubic Hermite interpolant as numbers where there is no other.
        fsal: whether the last stage is f at the new point.
    """

    stages: int
    extra: int
    a: Tensor
    b: Tensor
    c: Tensor
    e: Tensor | None
    e2: Tensor | None
    p: Tensor
    fsal: bool


@lru_cache(maxsize=64)
def native_tableau(method: Any) -> NativeTableau:
    """Convert a tableau."""
    rows, c = list(method.A), list(method.C)
    if method.P is not None:
        rows, c, p = rows + list(method.extra_A), c + list(method.extra_C), [list(row) for row in method.P]
    else:
        if not method.fsal:
            rows, c = [*rows, method.B], [*c, 1.0]
        p = [[b * x for x in HERMITE_RISE] for b in method.B]
        p += [[0.0] * 3 for _ in range(len(rows) - len(p))]
        p[0] = [x + y for x, y in zip(p[0], HERMITE_START, strict=True)]
        p[-1] = [x + y for x, y in zip(p[-1], HERMITE_END, strict=True)]
    n = len(rows)
    a = torch.zeros(n, n, dtype=torch.float64)
    for i, row in enumerate(rows):
        a[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    stages = method.num_stages
    return NativeTableau(
        stages, n - stages, a, _vector(method.B), _vector(c), _vector(method.E), _vector(method.E2),
        torch.tensor(p, dtype=torch.float64), method.fsal,
    )  # fmt: skip


def _vector(x: Any) -> Any:
    return None if x is None else torch.tensor(list(x), dtype=torch.float64)
