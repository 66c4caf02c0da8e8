"""Every Python block of the README and the docs runs, top to bottom, in a namespace of its file."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page: pathlib.Path) -> None:
    torch.set_default_dtype(torch.float32)
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), namespace)


def test_readme_has_an_example() -> None:
    assert BLOCK.findall((ROOT / "README.md").read_text())


PROSE = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "native" / "README.md"]


def test_make_commands_are_targets() -> None:
    """Every `make ...` that a page tells the reader to type exists."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for page in PROSE for target in re.findall(r"(?:^|`)make (\w+)", page.read_text(), re.MULTILINE)}
    assert named >= {"demo", "test", "check", "native"}
    assert not named - targets
