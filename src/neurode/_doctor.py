"""What this machine gives neurode, and what to type for what it lacks."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from neurode._errors import InputError
from neurode.fused import native

# The import names that each extra of pyproject.toml stands for.
EXTRAS = {
    "cli": ("tyro", "tqdm"),
    "plot": ("matplotlib", "PIL"),
    "study": ("tyro", "tqdm", "matplotlib", "PIL", "numpy", "safetensors"),
    "scipy": ("scipy",),
}
COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Checkup:
    """What `neurode.doctor` found; printing it shows everything, with what to type for each lack.

    Attributes:
        version: of neurode.
        python, machine: version of Python; operating system and processor.
        torch, threads: version of PyTorch, and how many threads it computes with.
        openmp: the OpenMP runtime that PyTorch has loaded, empty where there is none or it cannot be told.
        library: file of the native library, None where the fused engine has none; everything runs on eager then.
        abi: number of the native interface that this version of neurode speaks.
        isa, isas: the instruction set in use, and those that the library has for this machine.
        reason: why there is no native library, or why it cannot be used; empty otherwise.
        compiler: a C++ compiler on the path, None for none. Only a build from source needs one.
        missing: by extra, its packages that are not installed.
        advice: what to type, one lack each.
    """

    version: str
    python: str
    machine: str
    torch: str
    threads: int
    openmp: str
    library: Path | None
    abi: int
    isa: str
    isas: tuple[str, ...]
    reason: str
    compiler: str | None
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    advice: tuple[str, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether the fused engine can run."""
        return self.library is not None and not self.reason

    def __str__(self) -> str:
        engine = f"fused, on {self.isa}" if self.fused else "eager alone"
        lines = {
            "neurode": f"{self.version}, Python {self.python}, {self.machine}",
            "torch": f"{self.torch}, {self.threads} threads{f', OpenMP runtime {self.openmp}' if self.openmp else ''}",
            "engine": engine + (f" (the library has: {', '.join(self.isas)})" if self.isas else ""),
            "library": f"{self.library}, interface {self.abi}" if self.library else "none",
            "compiler": self.compiler or "none on the path (needed only to build the native library)",
            "extras": ", ".join(f"{name}: {self._extra(name)}" for name in EXTRAS),
        }
        shown = [f"{name:<10}{value}" for name, value in lines.items()]
        if self.reason:
            shown += ["", f"The fused engine is off: {self.reason}."]
        if self.advice:
            shown += ["", *self.advice]
        return "\n".join(shown)

    def _extra(self, name: str) -> str:
        return f"without {', '.join(self.missing[name])}" if name in self.missing else "all there"


def doctor() -> Checkup:
    """Look at this machine as neurode sees it: engine, native library, threads, compiler, extras.

    Returns:
        A `Checkup`; print it.

    Example:
        >>> import neurode
        >>> neurode.doctor().version == neurode.__version__
        True
    """
    import neurode

    found, reason, isa = native.search(), "", ""
    try:
        isa = native.isa()
    except InputError as error:
        reason = str(error).removesuffix(".")
    reason = found.reason or reason
    compiler = _compiler()
    absent = {extra: tuple(n for n in names if importlib.util.find_spec(n) is None) for extra, names in EXTRAS.items()}
    missing = {extra: names for extra, names in absent.items() if names}
    return Checkup(
        version=neurode.__version__,
        python=platform.python_version(),
        machine=f"{platform.system()} on {platform.machine()}",
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        openmp=_openmp(),
        library=found.path if found.library is not None else None,
        abi=native.ABI,
        isa=isa,
        isas=tuple(native.isas()),
        reason=reason,
        compiler=compiler,
        missing=missing,
        advice=tuple(_advice(found, compiler, missing)),
    )


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next((found for name in ([named] if named else COMPILERS) if (found := shutil.which(name))), None)


def _openmp() -> str:
    """The runtime among the libraries of this process where the system lists them, else what PyTorch was built with."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        loaded = re.findall(r"/(lib(?:gomp|omp|iomp5)[^/\s]*)$", maps.read_text(), re.MULTILINE)
        return ", ".join(sorted(set(loaded)))
    built = re.search(r"OpenMP (\S+)", torch.__config__.parallel_info())
    return built.group(1) if built and torch.backends.openmp.is_available() else ""


def _advice(found: native.Found, compiler: str | None, missing: dict[str, tuple[str, ...]]) -> list[str]:
    said = []
    if found.library is None and not os.environ.get("NEURODE_NATIVE"):
        if compiler is None:
            tool = (
                "xcode-select --install"
                if sys.platform == "darwin"
                else "apt install g++ (or what your system calls it)"
            )
            said.append(f"A C++ compiler, to build the native library with:  {tool}")
        again = "make native" if native.checkout() else "pip install --force-reinstall --no-deps --no-cache-dir neurode"
        said.append(f"{'Then build it' if compiler is None else 'To build the native library'}:  {again}")
    said += [f"For the extra {extra}:  pip install 'neurode[{extra}]'" for extra in missing if extra != "study"]
    return said


__all__ = ["Checkup", "doctor"]
