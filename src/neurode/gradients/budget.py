"""How many bytes a gradient may keep: read from what the user wrote, or from what is free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from neurode._errors import InputError

MEMINFO, CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def read_memory(memory: Any, device: torch.device) -> int | None:
    """The `memory=` of a solve in bytes.

    Args:
        memory: bytes, or a fraction (0 to 1, a float) of what is free on `device`; None where nothing was said.
        device: where the state lives.

    Raises:
        InputError: it is neither, or what is free cannot be found out.
    """
    if memory is None:
        return None
    if isinstance(memory, bool) or not isinstance(memory, int | float) or not memory > 0:
        raise InputError(f"memory={memory!r}; {_WANTED}")
    if isinstance(memory, int) or memory > 1:
        if memory == 1:
            raise InputError("memory=1 is one byte. Type memory=1.0 for all that is free, or a number of bytes.")
        return int(memory)
    free = free_memory(device)
    if free is None:
        raise InputError(
            f"memory={memory!r} is a fraction of what is free, which this system does not say for {device}. Type a number"
            " of bytes, such as memory=2_000_000_000."
        )
    return max(1, int(memory * free))


_WANTED = "it must be a number of bytes, such as 2_000_000_000, or a fraction of what is free, such as 0.5."


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process can still take on a device; None where it is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return None
    known = [free for free in (_available(), _left_in_group()) if free is not None]
    return min(known) if known else None


def _available() -> int | None:
    """What the system can give without swapping."""
    if MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_AVPHYS_PAGES" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left_in_group() -> int | None:
    """What the process's container may still take, where it has a limit (control groups, version 2)."""
    limit, used = CGROUPS / "memory.max", CGROUPS / "memory.current"
    if not (limit.exists() and used.exists()):
        return None
    text = limit.read_text().strip()
    return None if text == "max" else max(0, int(text) - int(used.read_text()))
