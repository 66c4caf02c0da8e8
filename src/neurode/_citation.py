"""What to cite: BibTeX for the numerics that a call used, from the sources that they carry."""

from __future__ import annotations

import re
from typing import Any

from neurode import methods
from neurode._errors import InputError
from neurode._solution import Solution, Stats

NEURODE = """@software{neurode,
  author = {{The neurode developers}},
  title = {neurode: neural ordinary differential equations in PyTorch},
  license = {Apache-2.0},
}"""

NEURAL_ODES = (
    "R. T. Q. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud (2018), Neural ordinary differential equations, NeurIPS,"
    " arXiv:1806.07366"
)
# Strategies whose idea is somebody's; the tape and the replay of steps are nobody's in particular.
GRADIENTS = {
    "continuous": NEURAL_ODES,
    "reversible": "S. McCallum, J. Foster (2024), Efficient, accurate and stable gradients for neural ODEs, arXiv:2410.11648",
}
SOURCE = re.compile(r"(?P<authors>.+?) \((?P<year>\d{4})\), (?P<title>.+?)(?:, (?P<rest>.+))?$", re.DOTALL)


def citation(*used: Any) -> str:
    """BibTeX for neurode, for neural ODEs, and for the method and the gradient of what was used.

    Args:
        *used: what to cite beside neurode: a `Solution`, its `stats`, a layer with `last_stats` (after a call), or a method's
            name or tableau.

    Returns:
        The entries as text; print it.

    Raises:
        InputError: something that says nothing of the numerics that it used.

    Example:
        >>> import neurode
        >>> solution = neurode.solve(lambda t, y: -y, 1.0, (0, 1), method="bosh3")
        >>> print(neurode.citation(solution).split("\\n\\n")[-1])
        @misc{bogacki1989,
          author = {P. Bogacki and L. F. Shampine},
          year = {1989},
          title = {A 3(2) pair of Runge-Kutta formulas},
          note = {Appl. Math. Lett. 2, 321-325. In neurode: bosh3},
        }
    """
    entries = {"": NEURODE}
    for source, what in [(NEURAL_ODES, "neural ODEs"), *(pair for each in used for pair in _sources(each))]:
        key, entry = _entry(source, what)
        entries.setdefault(key, entry)
    return "\n\n".join(entries.values())


def _sources(used: Any) -> list[tuple[str, str]]:
    """Pairs of a source and what it is the source of."""
    stats = used.stats if isinstance(used, Solution) else getattr(used, "last_stats", used)
    if isinstance(stats, Stats):
        name, gradient = stats.method.split(" ")[0], stats.gradient.split(" ")[0]
        found = [(_method(name).source, name)]
        return found + ([(GRADIENTS[gradient], f'gradient="{gradient}"')] if gradient in GRADIENTS else [])
    if isinstance(used, str) or hasattr(used, "kind"):
        method = _method(used)
        return [(method.source, method.name)]
    raise InputError(
        f"citation of a {type(used).__name__} that was not used yet: give a Solution, its stats, a layer after its first call,"
        " or a method's name."
    )


def _method(name: Any) -> Any:
    """A method by name; of a coupling, `reversible(rk4)`, the one that it couples."""
    inner = re.fullmatch(r"\w+\((\w+)\)", name) if isinstance(name, str) else None
    return methods.get(inner[1] if inner else name)


def _entry(source: str, what: str) -> tuple[str, str]:
    """The key and the BibTeX of a source written as `Authors (year), title, where`."""
    match = SOURCE.match(source)
    if match is None:  # a tableau of the user's own
        return source or what, f"@misc{{{what},\n  note = {{{source or 'no source given'}. In neurode: {what}}},\n}}"
    key = re.sub(r"\W", "", match["authors"].split(",")[0].split(" ")[-1]).lower() + match["year"]
    fields = {
        "author": match["authors"].replace(", ", " and "),
        "year": match["year"],
        "title": match["title"],
        "note": f"{match['rest'] + '. ' if match['rest'] else ''}In neurode: {what}",
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return key, "\n".join([f"@misc{{{key},", *lines, "}"])
