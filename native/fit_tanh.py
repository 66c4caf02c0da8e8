"""Fits the polynomials of tanh_table.h and prints that file: `python native/fit_tanh.py > native/tanh_table.h` (needs NumPy).

|x| is cut into 32 intervals, four an octave from 1/16 to 16 (the first one starts at 0). In each, tanh is a polynomial of
degree 5 around the middle, with the least maximum relative error (Lawson's iteration); the largest is 0.2 units of 2^-24.
"""

from __future__ import annotations

import sys

import numpy as np

DEGREE = 5


def fit(low: float, high: float) -> list[float]:
    """The middle and the coefficients of one interval, as float32 numbers."""
    middle = 0.0 if low == 0 else (low + high) / 2
    x = np.linspace(low, high, 2001)[1 if low == 0 else 0 :]
    r, exact = x - middle, np.tanh(x)
    fixed = r if low == 0 else np.zeros_like(r)  # at 0 the slope is 1, so that denormals stay what they are
    powers = np.stack([r**k for k in range(2 if low == 0 else 0, DEGREE + 1)], 1)
    weight = np.ones_like(x)
    for _ in range(100):
        scale = np.sqrt(weight) / exact
        found = np.linalg.lstsq(powers * scale[:, None], (exact - fixed) * scale, rcond=None)[0]
        weight *= np.abs(powers @ found + fixed - exact) / exact + 1e-18
        weight /= weight.sum()
    return [middle, *([0.0, 1.0] if low == 0 else []), *found.tolist()]


def write(text: str) -> None:
    """A line of the header."""
    sys.stdout.write(text + "\n")


def main() -> None:
    """Print the header."""
    edges = [2.0**e * (1 + q / 4) for e in range(-4, 4) for q in range(4)] + [16.0]
    edges[0] = 0.0
    rows = [fit(low, high) for low, high in zip(edges, edges[1:], strict=False)]
    rows[-1] = rows[-2] = rows[-3] = [12.0, 1.0, *[0.0] * DEGREE]  # beyond 10, tanh rounds to 1
    write(
        "// Made by fit_tanh.py, which says what these numbers are: middles, then coefficients from the lowest power up."
    )
    write("#pragma once\n\n// clang-format off")
    write(f"alignas(64) static const float TANH_TABLE[{DEGREE + 2}][32] = {{")
    for column in zip(*rows, strict=True):
        numbers = [
            f"{np.float32(x)!s}f" if "." in str(np.float32(x)) or "e" in str(np.float32(x)) else f"{x}" for x in column
        ]
        write("    {" + ",\n     ".join(", ".join(numbers[i : i + 8]) for i in range(0, 32, 8)) + "},")
    write("};\n// clang-format on")


if __name__ == "__main__":
    main()
