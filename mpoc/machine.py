"""What the machine has: processors, memory, devices, room on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container
_MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Device:
    """One that is no CPU."""

    name: str  # as --device takes it
    title: str  # as its maker calls it
    memory: int | None  # bytes; None: not known
    is_used: bool  # False: torch computes on it, mpoc cannot


def usable_cpus() -> int:
    """Processors that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def memory() -> tuple[int | None, int | None]:
    """Bytes of memory in all, a container's limit counted, and bytes free; None: not known here."""
    total: int | None = None
    if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _LIMIT.read_text().strip() if _LIMIT.is_file() else ""
    if total is not None and limit.isdecimal():
        total = min(total, int(limit))
    free = None
    for line in _MEMORY.read_text().splitlines() if _MEMORY.is_file() else ():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return total, free


def free_disk() -> dict[str, int]:
    """Bytes free in the temporary folder and in the current one, by their paths.

    Raises:
        OSError: there is no temporary folder that can be written to.
    """
    folders = dict.fromkeys((tempfile.gettempdir(), str(Path.cwd())))
    return {folder: shutil.disk_usage(folder).free for folder in folders}


def devices() -> tuple[list[Device], list[str]]:
    """GPUs that torch finds, and in words why there is none.

    Raises:
        ImportError, OSError: torch cannot be imported.
    """
    import torch

    with warnings.catch_warnings(record=True) as said:  # as of a driver that is too old
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [
        Device(
            f"cuda:{k}", torch.cuda.get_device_name(k), torch.cuda.get_device_properties(k).total_memory, True
        )
        for k in range(count)
    ]
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU", None, False))
    built = torch.version.cuda or torch.version.hip
    if found or not built:
        return found, [] if found else ["this torch is built for the CPU alone"]
    return [], [f"torch is built for {built}, but sees no GPU", *(str(one.message) for one in said)]
