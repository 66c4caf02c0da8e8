"""The numerical methods: numbers that check themselves, and their names.

`get` turns a name, or an object that is a method already, into a method; `table` lists what there is.
"""

from __future__ import annotations

from typing import Any

from neurode._errors import InputError, UnknownOptionError, did_you_mean
from neurode.methods.adams import AdamsFamily, explicit_adams, implicit_adams
from neurode.methods.adaptive_heun import adaptive_heun
from neurode.methods.bosh3 import bosh3
from neurode.methods.dop853 import dop853
from neurode.methods.dopri5 import dopri5
from neurode.methods.dopri8 import dopri8
from neurode.methods.euler import euler
from neurode.methods.fehlberg2 import fehlberg2
from neurode.methods.heun import heun
from neurode.methods.heun3 import heun3
from neurode.methods.midpoint import midpoint
from neurode.methods.ralston import ralston
from neurode.methods.reversible import Reversible
from neurode.methods.rk4 import rk4
from neurode.methods.rk4_38 import rk4_38
from neurode.methods.ssprk3 import ssprk3
from neurode.methods.symplectic import SymplecticTableau, leapfrog, yoshida4
from neurode.methods.tableau import ButcherTableau
from neurode.methods.tsit5 import tsit5
from neurode.methods.verner6 import verner6
from neurode.methods.verner7 import verner7
from neurode.methods.verner9 import verner9

FIXED = (euler, midpoint, heun, ralston, heun3, ssprk3, rk4, rk4_38)
PAIRS = (adaptive_heun, fehlberg2, bosh3, dopri5, tsit5, verner6, verner7, dopri8, dop853, verner9)
OTHERS = (explicit_adams, implicit_adams, leapfrog, yoshida4)

METHODS: dict[str, Any] = {method.name: method for method in (*FIXED, *PAIRS, *OTHERS)}


def get(method: Any) -> Any:
    """Return the method of that name; an object that is a method is returned as it is.

    Args:
        method: a name (see `table()`), or a `ButcherTableau` or another object with the facts of a method.

    Raises:
        UnknownOptionError: no method has that name; the message names the nearest.
        InputError: neither a name nor a method.

    Example:
        >>> get("rk4").order
        4
    """
    if not isinstance(method, str):
        if getattr(method, "kind", None) is None:
            raise InputError(
                f"method={method!r} is of type {type(method).__name__}; give a name such as 'dopri5', "
                "or a neurode.methods.ButcherTableau"
            )
        return method
    if method not in METHODS:
        raise UnknownOptionError(
            f"unknown method {method!r}.{did_you_mean(method, METHODS)} There are: {', '.join(METHODS)}."
        )
    return METHODS[method]


def table() -> list[dict[str, Any]]:
    """List the methods, one dict each, with the facts that choose among them.

    Returns:
        For each method `name`, `kind`, `order`, `error order` (of the embedded solution, None for fixed
        steps), `stages`, `evaluations per step`, `FSAL`, `dense order`, `adaptive` and `source`.
    """
    return [
        {
            "name": method.name,
            "kind": method.kind,
            "order": method.order,
            "error order": method.order_error,
            "stages": method.num_stages,
            "evaluations per step": method.num_evaluations_per_step,
            "FSAL": method.fsal,
            "dense order": method.dense_order,
            "adaptive": method.adaptive,
            "source": method.source,
        }
        for method in METHODS.values()
    ]


def format_table() -> str:
    """Return the table as text, one line a method, as `neurode methods` prints it."""
    columns = (
        "name",
        "kind",
        "order",
        "error order",
        "stages",
        "evaluations per step",
        "FSAL",
        "dense order",
        "steps",
    )
    lines: list[tuple[str, ...]] = [columns]
    for row in table():
        facts = row | {
            "error order": "-" if row["error order"] is None else row["error order"],
            "FSAL": "yes" if row["FSAL"] else "no",
            "steps": "adaptive" if row["adaptive"] else "fixed",
        }
        lines.append(tuple(str(facts[column]) for column in columns))
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


__all__ = [
    "METHODS",
    "AdamsFamily",
    "ButcherTableau",
    "Reversible",
    "SymplecticTableau",
    "format_table",
    "get",
    "table",
]
