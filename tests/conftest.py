"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

THREADS = os.environ.get("MPOC_TEST_THREADS", "1")
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, THREADS)  # before numpy and torch are imported; processes inherit them

import pytest
import torch

from tests.support.checkpoints import network_state, save_directory
from tests.support.process import Here, Mpoc


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start a process with ``run`` are slow: the process imports torch anew."""
    for item in items:
        if "run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    """Tensors are tiny here: more than one thread would only wait; MPOC_TEST_THREADS asks for others."""
    torch.set_num_threads(int(THREADS))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture
def data() -> Path:
    """The folder of real checkpoints and data sets that MPOC_TEST_DATA names."""
    folder = os.environ.get("MPOC_TEST_DATA")
    if not folder:
        pytest.skip("MPOC_TEST_DATA is not set: no real checkpoints to test on")
    return Path(folder)


@pytest.fixture
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The empty folder where ``run`` and ``here`` run commands."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def run(workdir: Path) -> Iterator[Mpoc]:
    """``run("report", file)``: a process of its own, in ``run.folder``."""
    mpoc = Mpoc(workdir)
    yield mpoc
    for process in mpoc.started:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()


@pytest.fixture
def here(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    """``here("report", file)``: in this process, whose folder is ``here.folder``."""
    monkeypatch.chdir(workdir)
    return Here(workdir)


@pytest.fixture(params=["file", "directory", "shards"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small network as a torch file, as a Hugging Face directory, and as one in shards."""
    if request.param == "file":
        torch.save(network_state(), tmp_path / "m.pt")
        return tmp_path / "m.pt"
    return save_directory(tmp_path / "m", network_state(), shards=1 if request.param == "directory" else 3)
