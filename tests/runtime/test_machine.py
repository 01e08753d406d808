from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from mpoc.runtime import device as machine
from mpoc.runtime.device import DeviceInfo, devices, free_disk, memory, usable_cpus


def test_counts_processors_and_memory() -> None:
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)
    total, free = memory()
    assert total is None or total > 10**8
    assert total is None or free is None or free > 0


def test_respects_container_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("max\n")
    monkeypatch.setattr(machine, "_LIMIT", tmp_path / "max")
    whole = memory()[0]
    (tmp_path / "max").write_text("123456789\n")
    assert memory()[0] == (None if whole is None else 123_456_789)


def test_reports_free_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert free_disk().keys() == {str(tmp_path), tempfile.gettempdir()}
    monkeypatch.chdir(tempfile.gettempdir())
    assert len(free_disk()) == 1


def test_explains_a_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def old_driver() -> bool:
        warnings.warn("the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", old_driver)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert devices() == ([], ["this torch is built for the CPU alone"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert devices() == ([], ["torch is built for 13.0, but sees no GPU", "the driver is too old"])


def test_names_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 10**9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: f"card {k}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda k: Properties)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices() == (
        [
            DeviceInfo("cuda:0", "card 0", 10**9, True),
            DeviceInfo("cuda:1", "card 1", 10**9, True),
            DeviceInfo("mps", "Apple GPU", None, False),
        ],
        [],
    )


HOLES = """
import sys, torch
from mpoc.runtime.device import freed_at_once

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

size = 16 << 20
del (tensors := [torch.ones(size // 4) for _ in range(3)])[:]  # teaches the heap that size
with freed_at_once(sys.argv[1] == "yes"):
    tensors += [torch.ones(size // 4) for _ in range(6)]
    full = anonymous()
    del tensors[::2]
    print((full - anonymous()) / size)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_tensors_leave_no_holes() -> None:
    """Three tensors that are freed below others give their memory back; a heap keeps some of it."""

    def given_back(wanted: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", HOLES, wanted], capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    assert given_back("no") < 2.5 < given_back("yes")
