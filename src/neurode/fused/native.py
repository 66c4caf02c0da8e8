"""The native library: where it is, and its C interface (`native/abi.h`) mirrored field by field."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_double, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import neurode.fused
from neurode._errors import InputError
from neurode.fused.program import Program
from neurode.fused.refusal import CannotLower

ABI = 6
INTEGERS = (
    "rows", "threads", "t0_step", "t1_step", "stages", "extra", "degree", "fsal", "points", "grid_point_step", "grid_row_step",
    "joint", "num_groups", "rtols_row_step", "rtols_step", "atols_row_step", "atols_step", "hold", "shrink_accepted", "max_steps",
    "num_eval", "eval_point_step", "eval_row_step", "keep", "memory", "backward_evaluations", "backward_products",
    "most_status", "most_evaluations", "most_accepted", "most_rejected",
)  # fmt: skip
NUMBERS = (
    "order", "rtol", "atol", "proportional", "integral", "derivative", "safety", "min_factor", "max_factor",
    "first_step", "min_step", "max_step", "stretch",
)  # fmt: skip
ORDER = """
rows threads uniforms y0 rowdata t0 t1 t0_step t1_step stages extra degree fsal a c b e e2 p grid points grid_point_step
grid_row_step joint order rtol atol rtols atols rtols_row_step rtols_step atols_row_step atols_step proportional
integral derivative safety min_factor max_factor hold shrink_accepted first_step min_step max_step stretch
num_groups groups max_steps t_eval num_eval eval_point_step eval_row_step y1 ys t_end status evaluations accepted
rejected keep memory trace grad_y1 grad_ys grad_y0 grad_rowdata accumulators grad_t0 grad_t1 grad_grid grad_eval
backward_evaluations backward_products most_status most_evaluations most_accepted most_rejected
"""
FIELDS = tuple(ORDER.split())
PYTHON = ("PyEval_SaveThread", "PyEval_RestoreThread", "PyErr_CheckSignals")  # what nd_python is given


def _kind(name: str) -> Any:
    return c_int64 if name in INTEGERS else c_double if name in NUMBERS else c_void_p


class Solve(ctypes.Structure):
    """`nd_solve`."""

    _fields_ = [(name, _kind(name)) for name in FIELDS]


def checkout() -> Path | None:
    """The folder that this file was checked out into with the native sources; None where it is installed."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "native" / "abi.h").exists() else None


def candidates() -> list[Path]:
    """Where the library may be: `NEURODE_NATIVE` alone where it is set; else the build of a checkout, then beside this file."""
    named = os.environ.get("NEURODE_NATIVE")
    if named:
        return [Path(named)]
    root = checkout()
    folders = [root / "build" / "native"] if root else []
    folders += [Path(folder) for folder in neurode.fused.__path__]  # an editable install has two
    return [
        path
        for folder in folders
        for kind in ("so", "dylib", "dll")
        for path in sorted(folder.glob(f"_native*.{kind}"))
    ]


@dataclass(frozen=True)
class Found:
    """What a search for the library came to.

    Attributes:
        library: loaded and fitting, or None.
        path: its file, or that of the last one that does not fit.
        reason: why there is none.
    """

    library: Any
    path: Path | None
    reason: str


@cache
def search() -> Found:
    """Load the first library that fits; once a process."""
    failed = Found(None, None, "the native library is not built")
    named = os.environ.get("NEURODE_NATIVE")
    if named and not Path(named).is_file():
        return Found(None, None, f"NEURODE_NATIVE names {named!r}, and there is no such file")
    for path in candidates():
        try:
            made = ctypes.PyDLL(str(path))  # lets go of the interpreter itself, and hands it back for Ctrl-C
            made.nd_abi.restype = c_int64
            theirs = made.nd_abi()
        except (OSError, AttributeError) as error:
            failed = Found(None, path, f"the native library {path} cannot be loaded ({error})")
            continue
        if theirs == ABI:
            _declare(made)
            if made.nd_sizeof_solve() == ctypes.sizeof(Solve):
                made.nd_python(*(ctypes.cast(getattr(ctypes.pythonapi, name), c_void_p) for name in PYTHON))
                return Found(made, path, "")
        reason = f"the native library {path} is of another version of neurode (interface {theirs}, needed: {ABI})"
        failed = Found(None, path, reason)
    return failed


@cache
def library() -> Any:
    """The loaded library.

    Raises:
        CannotLower: there is none that fits.
        InputError: `NEURODE_ISA` names an instruction set that this machine does not have.
    """
    found = search()
    if found.library is None:
        raise CannotLower(f"{found.reason}; `neurode doctor` says what to type")
    isa()
    return found.library


def isas() -> list[str]:
    """The instruction sets that the library has and this machine runs, the widest first; empty without a library."""
    made = search().library
    return made.nd_isas().decode().split(",") if made else []


def isa() -> str:
    """The instruction set in use; empty without a library.

    Raises:
        InputError: `NEURODE_ISA` names another than those of `isas()`.
    """
    made = search().library
    taken = made.nd_isa().decode() if made else ""
    if made and not taken:
        names = ", ".join(isas())
        raise InputError(
            f"NEURODE_ISA is {os.environ.get('NEURODE_ISA')!r}; this machine has: {names}. Unset it for the first."
        )
    return taken


def lack() -> str:
    """Why the library cannot be loaded; empty where it can."""
    try:
        library()
    except CannotLower as error:
        return str(error)
    return ""


def available() -> bool:
    """Whether the library can be loaded."""
    return not lack()


def _declare(made: Any) -> None:
    pointers = lambda n: [c_void_p] * n
    made.nd_sizeof_solve.restype = c_int64
    made.nd_isa.restype = made.nd_isas.restype = made.nd_team.restype = made.nd_error.restype = c_char_p
    made.nd_python.restype, made.nd_python.argtypes = None, pointers(3)
    made.nd_program_new.restype = c_void_p
    made.nd_program_new.argtypes = [c_void_p, c_int64, c_void_p, c_int64, c_int64]
    made.nd_program_free.argtypes = pointers(1)
    made.nd_trace_free.argtypes = pointers(2)
    made.nd_eval.argtypes = [c_void_p, c_void_p, c_int64, *pointers(4)]
    made.nd_vjp.argtypes = [c_void_p, c_void_p, c_int64, *pointers(8)]
    made.nd_gather.restype, made.nd_gather.argtypes = None, [c_void_p, c_void_p, c_int64, c_void_p]
    made.nd_same.restype, made.nd_same.argtypes = c_int64, [c_void_p, c_void_p, c_int64, c_void_p, c_int64]
    made.nd_ordered.restype, made.nd_ordered.argtypes = c_int64, [c_void_p, c_int64, c_double, c_double]
    made.nd_peak.restype, made.nd_peak.argtypes = c_double, [c_int64, c_int64]
    made.nd_forward.restype = made.nd_backward.restype = c_int64
    made.nd_forward.argtypes = made.nd_backward.argtypes = [c_void_p, ctypes.POINTER(Solve)]


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor's numbers, None for none."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def gather(parts: Sequence[Tensor]) -> Tensor:
    """The numbers of contiguous tensors of one dtype as one vector."""
    return gatherer(parts)()


def gatherer(parts: Sequence[Tensor]) -> Callable[[], Tensor]:
    """What makes one vector of the present numbers of contiguous tensors of one dtype, which keep their sizes."""
    n, like = len(parts), torch.empty(sum(x.numel() for x in parts), dtype=parts[0].dtype)
    sizes = (c_int64 * n)(*[x.numel() * x.element_size() for x in parts])
    pack, take = struct.Struct(f"{n}P").pack, library().nd_gather

    def made() -> Tensor:
        vector = torch.empty_like(like)
        take(pack(*[x.data_ptr() for x in parts]), sizes, n, vector.data_ptr())
        return vector

    return made


class Machine:
    """A program inside the native library; freed with this object.

    Args:
        program: the tile program.
        double: float64 instead of float32.
    """

    def __init__(self, program: Program, double: bool) -> None:
        self.library = library()
        words, maps = program.pack()
        self.handle = self.library.nd_program_new(
            words.buffer_info()[0], len(words), maps.buffer_info()[0] if len(maps) else None, len(maps), int(double)
        )
        if not self.handle:
            raise CannotLower(f"the native library refused the program: {self.library.nd_error().decode()}")

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.library.nd_program_free(self.handle)

    def forward(self, solve: Solve) -> None:
        """Run `nd_forward`."""
        self._check(self.library.nd_forward(self.handle, ctypes.byref(solve)))

    def backward(self, solve: Solve) -> None:
        """Run `nd_backward`."""
        self._check(self.library.nd_backward(self.handle, ctypes.byref(solve)))

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"the native engine failed: {self.library.nd_error().decode()}")


class Trace:
    """The record that a forward pass leaves for the backward pass; freed with this object."""

    def __init__(self, machine: Machine, handle: int) -> None:
        self.machine, self.handle = machine, handle

    def __del__(self) -> None:
        if self.handle:
            self.machine.library.nd_trace_free(self.machine.handle, self.handle)
            self.handle = 0


__all__ = [
    "ABI",
    "Found",
    "Machine",
    "Solve",
    "Trace",
    "available",
    "checkout",
    "isa",
    "isas",
    "library",
    "pointer",
    "search",
]
