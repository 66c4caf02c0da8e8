"""The numerical methods: numbers that check themselves, and their names.

`get` turns a name, or an object that is a method already, into a method; `table` lists what there is.
"""

from __future__ import annotations

from typing import Any

from neurode._errors import InputError, UnknownOptionError, did_you_mean
from neurode.methods.bosh3 import bosh3
from neurode.methods.dopri5 import dopri5
from neurode.methods.euler import euler
from neurode.methods.heun import heun
from neurode.methods.midpoint import midpoint
from neurode.methods.ralston import ralston
from neurode.methods.rk4 import rk4
from neurode.methods.tableau import ButcherTableau
from neurode.methods.tsit5 import tsit5

METHODS: dict[str, Any] = {
    method.name: method for method in (euler, midpoint, heun, ralston, rk4, bosh3, dopri5, tsit5)
}


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
                f"method={method!r} is a {type(method).__name__}; give a name such as 'dopri5', "
                "or a neurode.methods.ButcherTableau"
            )
        return method
    if method not in METHODS:
        raise UnknownOptionError(
            f"unknown method {method!r}.{did_you_mean(method, METHODS)} There are: {', '.join(METHODS)}."
        )
    return METHODS[method]


def table() -> list[dict[str, Any]]:
    """List the methods, one dict each: name, orders, stages, evaluations, FSAL, dense order, adaptive, source."""
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


__all__ = ["METHODS", "ButcherTableau", "get", "table"]
