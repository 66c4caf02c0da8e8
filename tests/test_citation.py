"""BibTeX of what a call used: every method has an entry, and every entry is well formed."""

from __future__ import annotations

import re

import pytest
import torch

import neurode
from neurode.methods import METHODS


def entries(text: str) -> dict[str, dict[str, str]]:
    """The entries by key, with their fields; braces must balance."""
    assert text.count("{") == text.count("}")
    found = {}
    for block in text.split("\n\n"):
        head = re.match(r"@(?:misc|software)\{(\w+),\n", block)
        assert head is not None and block.endswith("\n}"), block
        found[head[1]] = dict(re.findall(r"^  (\w+) = \{(.*)\},$", block, re.MULTILINE))
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_source(name: str) -> None:
    found = entries(neurode.citation(name))
    assert set(found) >= {"neurode", "chen2018"} and len(found) == 3
    (fields,) = [fields for key, fields in found.items() if key not in ("neurode", "chen2018")]
    assert re.fullmatch(r"\d{4}", fields["year"]) and fields["note"].endswith(f"In neurode: {name}")
    assert fields["title"] in METHODS[name].source and fields["author"].split(" and ")[0] in METHODS[name].source


def test_a_call_cites_its_method_and_its_gradient() -> None:
    y0 = torch.ones(2, requires_grad=True)
    adjoint = neurode.solve(lambda t, y: -y, y0, (0, 1), method="tsit5", gradient="continuous")
    assert set(entries(neurode.citation(adjoint))) == {"neurode", "chen2018", "tsitouras2011"}
    back = neurode.solve(lambda t, y: -y, y0, (0, 1), method="rk4", steps=2, gradient="reversible")
    assert set(entries(neurode.citation(back.stats))) == {"neurode", "chen2018", "kutta1901", "mccallum2024"}


def test_several_things_at_once_are_cited_once() -> None:
    layer = neurode.nn.NeuralODE(neurode.nn.MLP(2, (4,)), method="rk4", steps=2)
    layer(torch.ones(3, 2))
    assert set(entries(neurode.citation(layer, "rk4", neurode.methods.get("rk4_38")))) == {
        "neurode",
        "chen2018",
        "kutta1901",
    }


def test_what_was_not_used_cannot_be_cited() -> None:
    with pytest.raises(neurode.InputError, match="after its first call"):
        neurode.citation(neurode.nn.NeuralODE(neurode.nn.MLP(2), method="rk4", steps=2))
    with pytest.raises(neurode.UnknownOptionError, match="Did you mean 'dopri5'"):
        neurode.citation("dopri55")
