"""A file of a kilobyte that describes terabytes: refused before anything is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpoc.compression.expand import expand_checkpoint
from mpoc.errors import MpocError
from mpoc.io.checkpoint import tensor_fingerprint
from mpoc.io.manifest import FORMAT
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.safetensors_header import TensorInfo
from mpoc.runtime.device import require_disk_space, require_memory
from tests.support.checkpoints import contents
from tests.support.process import Mpoc


def chain(folder: Path, sites: int) -> Path:
    """Bond 1 all along: 4 numbers a site make a weight of 2^sites × 2^sites."""
    side, count = 2**sites, 4 * sites
    layer = {
        "name": "fc.weight", "kind": "linear", "shape": [side, side], "dtype": "float32", "form": "mpo",
        "num_original": side * side, "num_stored": count, "stored_dtype": "float32",
        "output_factors": [2] * sites, "input_factors": [2] * sites, "bonds": [1] * (sites + 1),
    }  # fmt: skip
    info = TensorInfo("fc.weight", "float32", (side, side))
    source = {
        "name": "m",
        "nbytes": 1,
        "num_parameters": side * side,
        "fingerprint": tensor_fingerprint([info]),
    }
    manifest = {"format": FORMAT, "source": source, "layers": [layer], "options": {}, "kinds_from": "names"}
    cores = {f"fc.cores.{k}": torch.ones(1, 2, 2, 1) for k in range(sites)}
    save_file(cores, folder / "c.safetensors", {"mpoc": json.dumps(manifest)})
    return folder / "c.safetensors"


def test_expands_a_small_file(tmp_path: Path) -> None:
    expand_checkpoint(chain(tmp_path, 5), tmp_path / "d.safetensors")
    assert (tmp_path / "d.safetensors").stat().st_size > 4 * 32 * 32


def test_rejects_terabytes_from_a_kilobyte(run: Mpoc, tmp_path: Path) -> None:
    source = chain(tmp_path, 20)
    assert source.stat().st_size < 5000
    assert read_manifest(source).rho < 1e-9  # a report can be made of it
    done = run("expand", source)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "tensor 'fc.weight' takes 8.8 TB when it is dense" in done.stderr
    assert contents(run.folder) == {}


def test_rejects_overflowing_sizes(tmp_path: Path) -> None:
    with pytest.raises(MpocError, match="damaged manifest"):
        read_manifest(chain(tmp_path, 32))


def test_accepts_output_that_fits(tmp_path: Path) -> None:
    require_memory(tmp_path, "a", 1000)
    require_disk_space(tmp_path / "out", 1000)
    with pytest.raises(MpocError, match=r"tensor 'a' takes 1e\+03 PB|tensor 'a' takes .* TB"):
        require_memory(tmp_path, "a", 10**18)
    with pytest.raises(MpocError, match=r"out: would take .* TB, and its disk has"):
        require_disk_space(tmp_path / "out", 10**18)
