"""Options of the test suite, and float64 as the default dtype of every test."""

from __future__ import annotations

import pytest
import torch

from neurode import _engines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--dtype", default="float64", choices=("float32", "float64"), help="default dtype of the tests")
    parser.addoption("--capture-after", type=int, help="evaluations of a plain function before auto captures it")
    parser.addoption("--device", default="cpu", help="device of the tests that take one")


@pytest.fixture(autouse=True)
def _torch_defaults(request: pytest.FixtureRequest):
    """Doctests run as a user would run them, in float32; tests in the dtype of the option."""
    before = torch.get_default_dtype()
    doctest = type(request.node).__name__ == "DoctestItem"
    torch.set_default_dtype(torch.float32 if doctest else getattr(torch, request.config.getoption("--dtype")))
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _capture_after(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which engine takes a plain function must not depend on the tests that ran before: eager, or as the option says.

    Modules are captured at once, here as everywhere.
    """
    given = request.config.getoption("--capture-after")
    if request.node.path.name != "test_engines.py":
        monkeypatch.setattr(_engines, "CAPTURE_AFTER", 10**12 if given is None else given)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))
