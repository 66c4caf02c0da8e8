"""Fits the polynomials of tanh_table.h and prints that file: `python native/fit_tanh.py > native/tanh_table.h` (needs NumPy).

|x| + 5/8 is cut into 32 intervals, eight an octave, which makes them finest where tanh bends: a sixteenth of |x| wide near 0, one
wide where it is flat. In each, tanh is a polynomial of degree 4 around the middle, with the least maximum relative error
(Lawson's iteration); the largest is 0.4 units of 2^-24. |x| ends at LAST, from where on tanh rounds to 1: the last polynomial
is 1 there.
"""

from __future__ import annotations

import sys

import numpy as np

DEGREE = 4
OFFSET = np.float32(0.625)
LAST = 9.3  # 1 - tanh is a quarter of the last place


def fit(low: float, high: float) -> list[float]:
    """The middle and the coefficients of one interval."""
    # At 0 the slope is 1, so that denormals stay what they are.
    known = [0.0, 1.0] if low == 0 else [1.0] if high == LAST else []
    middle = 0.0 if low == 0 else LAST if high == LAST else (low + high) / 2
    x = np.linspace(low, high, 2001)[1 if low == 0 else 0 :]
    r, exact = x - middle, np.tanh(x)
    powers = np.stack([r**k for k in range(DEGREE + 1)], 1)
    fixed, powers = powers[:, : len(known)] @ np.array(known), powers[:, len(known) :]
    weight = np.ones_like(x)
    for _ in range(100):
        scale = np.sqrt(weight) / exact
        found = np.linalg.lstsq(powers * scale[:, None], (exact - fixed) * scale, rcond=None)[0]
        weight *= np.abs(powers @ found + fixed - exact) / exact + 1e-18
        weight /= weight.sum()
    return [middle, *known, *found.tolist()]


def write(text: str) -> None:
    """A line of the header."""
    sys.stdout.write(text + "\n")


def main() -> None:
    """Print the header."""
    first = int(OFFSET.view(np.int32)) >> 20  # sign, exponent and three bits: the interval's number
    edges = [float(np.int32(first + i << 20).view(np.float32) - OFFSET) for i in range(32)] + [LAST]
    intervals = [fit(low, high) for low, high in zip(edges, edges[1:], strict=False)]
    rows = [intervals[(i - first) % 32] for i in range(32)]  # found by the last five bits of that number
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
