"""The library as a file: found, refused where it does not fit, its instruction sets apart from each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from neurode.fused import native

COMPILER = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
REPORT = """
from neurode.fused import native
found = native.search()
print(found.library is not None, native.isa() if found.library else "", found.reason, sep="|")
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process, where the library is looked for again."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("isa", native.isas())
def test_every_instruction_set_can_be_forced(isa: str) -> None:
    assert python(REPORT, NEURODE_ISA=isa).stdout == f"True|{isa}|\n"


def test_an_unknown_instruction_set_is_an_error_that_names_those_there() -> None:
    ran = python("from neurode.fused.native import library; library()", NEURODE_ISA="avx1024")
    assert f"InputError: NEURODE_ISA is 'avx1024'; this machine has: {', '.join(native.isas())}." in ran.stderr


def test_a_named_library_that_is_not_there() -> None:
    assert python(REPORT, NEURODE_NATIVE="/no/such.so").stdout == (
        "False||NEURODE_NATIVE names '/no/such.so', and there is no such file\n"
    )


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "_native.so").write_text("not a library")
    assert "cannot be loaded" in python(REPORT, NEURODE_NATIVE=str(tmp_path / "_native.so")).stdout


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_a_stale_library_is_refused_with_both_numbers(tmp_path: Path) -> None:
    assert COMPILER
    source, stale = tmp_path / "stale.cpp", tmp_path / "_native.so"
    source.write_text('extern "C" long long nd_abi() { return -7; }')
    subprocess.run([COMPILER, "-shared", "-fPIC", str(source), "-o", str(stale)], check=True)
    assert python(REPORT, NEURODE_NATIVE=str(stale)).stdout == (
        f"False||the native library {stale} is of another version of neurode (interface -7, needed: {native.ABI})\n"
    )


OBJECTS = sorted(Path(__file__).parents[2].glob("build/native/CMakeFiles/neurode_engines.dir/engine_*.o*"))


@pytest.mark.skipif(not OBJECTS or shutil.which("nm") is None, reason="needs the objects of make native, and nm")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_no_function_is_shared_between_instruction_sets(path: Path) -> None:
    """A shared inline function could leave its widest copy to a machine that has no such registers."""
    isa = re.sub(r"engine_(\w+)\..*", r"\1", path.name)
    listed = subprocess.run(
        ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout
    shared = [line for line in listed.splitlines() if re.search(r" [TWVuBD] ", line) and f"{isa}::" not in line]
    assert [re.sub(r".* [TWVuBD] ", "", line) for line in shared if "DW.ref." not in line] == [
        f"neurode::engine_{isa}(int)"
    ]


@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="needs nm, on Linux")
def test_the_library_exports_its_interface_alone() -> None:
    path = native.search().path
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[-1][:3] for line in listed.splitlines()} == {"nd_"}
