"""The machine that mpoc runs on: processors, memory, disk space and GPUs, and the seeds of its generators.

Memory and disk are checked before a tensor is made or a file is written, so that an error names the size that
is missing instead of a process being killed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpoc.errors import MpocError, UsageError
from mpoc.runtime.distributed import local_rank, num_processes
from mpoc.runtime.formatting import human_bytes

if TYPE_CHECKING:
    import torch

_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container
_MEMORY = Path("/proc/meminfo")
_MMAP_THRESHOLD = -3  # a parameter of mallopt


@dataclass(frozen=True)
class DeviceInfo:
    """A GPU or other accelerator."""

    name: str  # as --device takes it
    title: str  # as its maker calls it
    memory: int | None  # bytes; None: not known
    is_used: bool  # False: torch computes on it, mpoc cannot


def usable_cpus() -> int:
    """Processors that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def memory() -> tuple[int | None, int | None]:
    """Bytes of memory in total (within a container's limit) and free; None: not known on this system."""
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


def release_freed_memory() -> None:
    """Return memory that was freed to the system, where the C library would keep it (glibc)."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def freed_at_once(wanted: bool) -> Iterator[None]:
    """Meanwhile tensors above 4 MB go back to the system as soon as they are freed, if so wanted (glibc).

    Else those of up to 32 MB lie in a heap, of which holes remain.
    """
    if wanted:
        release_freed_memory()
        _set_mmap_threshold(4)
    try:
        yield
    finally:
        if wanted:
            _set_mmap_threshold(32)  # to which it grows by itself


def _set_mmap_threshold(megabytes: int) -> None:
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, megabytes << 20)


@contextmanager
def on_one_thread(wanted: bool) -> Iterator[None]:
    """Meanwhile torch computes on one thread of the processor, if so wanted.

    Threads that share a product of small matrices wait for one another for longer than it takes.
    """
    import torch

    threads = torch.get_num_threads()
    wanted = wanted and threads > 1
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if wanted:
            torch.set_num_threads(threads)


def free_disk() -> dict[str, int]:
    """Bytes free in the temporary folder and in the current one, by their paths.

    Raises:
        OSError: there is no temporary folder that can be written to.
    """
    import tempfile

    folders = dict.fromkeys((tempfile.gettempdir(), str(Path.cwd())))
    return {folder: shutil.disk_usage(folder).free for folder in folders}


def devices() -> tuple[list[DeviceInfo], list[str]]:
    """The GPUs that torch finds, and the reason if there is none.

    Raises:
        ImportError, OSError: torch cannot be imported.
    """
    import torch

    with warnings.catch_warnings(record=True) as warned:  # as of a driver that is too old
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [
        DeviceInfo(
            f"cuda:{k}", torch.cuda.get_device_name(k), torch.cuda.get_device_properties(k).total_memory, True
        )
        for k in range(count)
    ]
    if torch.backends.mps.is_available():
        gpus.append(DeviceInfo("mps", "Apple GPU", None, False))
    built = torch.version.cuda or torch.version.hip
    if gpus or not built:
        return gpus, [] if gpus else ["this torch is built for the CPU alone"]
    return [], [f"torch is built for {built}, but sees no GPU", *(str(warning.message) for warning in warned)]


def require_memory(path: Path, name: str, nbytes: int) -> None:
    """Check that a tensor fits into memory before it is made.

    Args:
        path: path of the file that describes it, for the message.
        name: name of the tensor.
        nbytes: that it takes in memory.

    Raises:
        MpocError: the machine has less memory in all.
    """
    total = _memory()
    if total is not None and nbytes > total:
        raise MpocError(
            f"{path}: tensor {name!r} takes {human_bytes(nbytes)} when it is dense, "
            f"and this machine has {human_bytes(total)} of memory",
            "load it with mpoc.load, which computes with its cores",
        )


def require_disk_space(output: Path, nbytes: int) -> None:
    """Check that a file fits on the disk before it is written.

    Raises:
        MpocError: its disk has less room.
    """
    free = shutil.disk_usage(output.resolve().parent).free
    if nbytes > free:
        raise MpocError(
            f"{output}: would take {human_bytes(nbytes)}, and its disk has {human_bytes(free)} left",
            "make room, or write elsewhere with -o",
        )


def _memory() -> int | None:
    """Bytes of the whole machine; None if the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def choose_device(name: str) -> torch.device:
    """The device of an option: ``auto`` takes a GPU if there is one, a different one for each process.

    Raises:
        UsageError: unknown or not present.
    """
    import torch

    if name == "auto":
        count = torch.cuda.device_count()
        number = local_rank() % count if num_processes() > 1 and count else 0
        return torch.device("cuda", number) if count > 1 else torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: not available here", "--device auto") from error
    return device


def derived_seed(*parts: object) -> int:
    """A seed (0 … 2⁶³−1) that is a function of ``parts``, unlike that of any other parts."""
    import hashlib

    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
