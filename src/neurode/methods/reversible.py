"""The algebraically reversible coupling of any explicit Runge-Kutta method (McCallum & Foster 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from neurode._errors import InputError
from neurode.methods.tableau import ButcherTableau, Floats


@dataclass(frozen=True)
class Reversible:
    """An explicit method, coupled to a second state so that a step can be undone exactly.

    Beside y runs a second approximation z of the same solution, which starts at the same state. With `Psi_h(t, y)`, what
    the method adds to y in a step of length h from t, a step is

        y_new = l y + (1 - l) z + Psi_h(t, z)
        z_new = z - Psi_{-h}(t + h, y_new)

    with the coupling l. Both lines can be solved for the old states, whatever the method, so that a gradient needs
    neither stored states nor stored activations (`gradient="reversible"`). y is the solution, of the method's own order.

    Properties: order, error estimate and interpolant of the method; twice its evaluations of `f` a step, none carried from one
    step to the next (no FSAL). The step's error is estimated from the stages of `Psi_h(t, z)`. The interpolant is the
    method's own on those stages (cubic Hermite where it has none), moved by the share of y - z that the step takes
    away; the derivative at its end is the first stage of `Psi_{-h}` and costs nothing. Stability is bought with l < 1: at
    l = 1 it has none. Going back multiplies rounding by 1 / l a step.

    Args:
        method: a name, or a `ButcherTableau`.
        coupling: l, in (0, 1]. The default is that of the paper.

    Raises:
        InputError: the method is not an explicit Runge-Kutta method, or the coupling is out of range.

    References:
        S. McCallum, J. Foster (2024), Efficient, accurate and stable gradients for neural ODEs, arXiv:2410.11648.

    Example:
        >>> import neurode
        >>> method = neurode.Reversible("rk4")
        >>> method.name, method.order, method.num_evaluations_per_step
        ('reversible(rk4)', 4, 8)
        >>> sol = neurode.solve(lambda t, y: -y, [1.0], (0, 1), method=method, steps=10)
        >>> round(sol.y1.item(), 5)
        0.36788
    """

    method: Any
    coupling: float = 0.999

    kind: ClassVar[str] = "reversible"
    fsal: ClassVar[bool] = False
    base: ButcherTableau = field(init=False, repr=False, compare=False)
    name: str = field(init=False, repr=False, compare=False)
    order: int = field(init=False, repr=False, compare=False)
    order_error: int | None = field(init=False, repr=False, compare=False)
    adaptive: bool = field(init=False, repr=False, compare=False)
    num_half: int = field(init=False, repr=False, compare=False)
    num_stages: int = field(init=False, repr=False, compare=False)
    num_evaluations_per_step: int = field(init=False, repr=False, compare=False)
    dense_order: int = field(init=False, repr=False, compare=False)
    source: str = field(init=False, repr=False, compare=False)
    C: Floats = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from neurode.methods import get  # the registry holds this class too

        base, coupling = get(self.method), self.coupling
        if base.kind != "explicit":
            raise InputError(
                f"Reversible({base.name!r}): the coupling is of explicit one-step methods, and this one is {base.kind}. Type"
                " neurode.Reversible('rk4') or neurode.Reversible('dopri5')."
            )
        if isinstance(coupling, bool) or not isinstance(coupling, int | float) or not 0 < coupling <= 1:
            raise InputError(f"Reversible(coupling={coupling!r}): it must be a number in (0, 1], such as 0.999.")
        half = base.num_stages - base.fsal  # an FSAL stage is no part of a step: it is the next step's
        nodes = base.C[:half]
        facts = {
            "base": base,
            "name": f"reversible({base.name})",
            "order": base.order,
            "order_error": base.order_error,
            "adaptive": base.adaptive,
            "num_half": half,
            "num_stages": 2 * half,
            "num_evaluations_per_step": 2 * half,
            "dense_order": base.dense_order,
            "source": f"McCallum and Foster (2024), arXiv:2410.11648, on {base.source}",
            "C": (*nodes, *(1.0 - c for c in nodes)),
        }
        for name, value in facts.items():
            object.__setattr__(self, name, value)
