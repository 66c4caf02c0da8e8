"""The native library, as these tests call it. `NEURODE_ISA=avx2 pytest tests/native` tests another instruction set."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from neurode.fused.native import available

sys.path.insert(0, str(Path(__file__).parent))  # the systems beside this file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the library there is nothing to test; `make native` builds it."""
    if available():
        return
    skip = pytest.mark.skip(reason="the native library is not built; type make native")
    for item in items:
        if "tests/native" in str(item.path):
            item.add_marker(skip)
