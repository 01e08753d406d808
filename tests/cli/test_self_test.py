from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mpoc import load
from mpoc.cli import doctor as module
from mpoc.cli.doctor import self_test
from mpoc.errors import MpocError, UsageError
from mpoc.io.manifest_reader import read_manifest


def test_passes_and_writes_its_files(tmp_path: Path) -> None:
    assert self_test("cpu", tmp_path) < 1e-5
    manifest = read_manifest(tmp_path / "net.mpo.safetensors")
    assert [layer.form for layer in manifest.layers] == ["mpo"] * 3
    assert manifest.rho < 0.2
    assert (tmp_path / "net.dense.safetensors").exists()


def test_detects_a_wrong_bond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module._network

    def noisy() -> nn.Sequential:
        network = made()
        with torch.no_grad():
            network[4].weight.add_(0.1 * torch.randn_like(network[4].weight))  # type: ignore[arg-type, operator]
        return network

    monkeypatch.setattr(module, "_network", noisy)
    with pytest.raises(MpocError, match=r"outputs differ by 0\.\d+ of their norm"):
        self_test("cpu", tmp_path)


@pytest.mark.parametrize("wrong", [float("nan"), 0.0, 100.0])
def test_detects_wrong_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    last = nn.Threshold(float("inf"), wrong)
    monkeypatch.setattr("mpoc.models.loading.load", lambda *given: nn.Sequential(load(*given), last))
    with pytest.raises(MpocError, match="outputs differ by"):
        self_test("cpu", tmp_path)


def test_rejects_unavailable_device(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not available"):
        self_test("cuda:99", tmp_path)
