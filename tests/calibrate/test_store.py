"""A dense pass on disk and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mpoc.calibrate.dense import DensePass, dense_pass
from mpoc.calibrate.store import fingerprint, load_moments, save_moments
from mpoc.calibrate.trace import trace
from mpoc.errors import MpocError
from mpoc.train.call import Call
from tests.calibrate.networks import Stopped, encoder, texts, weights


@pytest.fixture(scope="module")
def found() -> DensePass:
    network, batch = encoder(1), texts()
    call = Call.of(network)
    return dense_pass(network, call, [batch], trace(network, call, batch, weights(network)))


def test_there_and_back(tmp_path: Path, found: DensePass) -> None:
    save_moments(tmp_path / "m.safetensors", "abc", found)
    again = load_moments(tmp_path / "m.safetensors", "abc")
    assert again is not None
    assert list(again.moments) == list(found.moments) and list(again.gradients) == list(found.gradients)
    for name, moments in found.moments.items():
        assert again.moments[name].rows == moments.rows
        assert torch.equal(again.moments[name].mean, moments.mean)
        assert torch.equal(again.moments[name].cross, moments.cross)
        assert torch.equal(again.gradients[name], found.gradients[name])
    self_ = "encoder.layer.0.attention.self"
    assert again.moments[f"{self_}.query.weight"] is again.moments[f"{self_}.key.weight"]
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_reasons_are_kept(tmp_path: Path) -> None:
    network, batch = Stopped().eval(), {"x": torch.randn(5, 4)}
    call = Call.of(network)
    result = dense_pass(network, call, [batch], trace(network, call, batch, weights(network)))
    save_moments(tmp_path / "m.safetensors", "abc", result)
    again = load_moments(tmp_path / "m.safetensors", "abc")
    assert again is not None and again.reasons == result.reasons and len(again.reasons) == 2


def test_what_is_not_taken(tmp_path: Path, found: DensePass) -> None:
    path = tmp_path / "m.safetensors"
    assert load_moments(path, "abc") is None
    save_moments(path, "abc", found)
    assert load_moments(path, "another") is None
    save_moments(path, "another", found)  # replaces it
    assert load_moments(path, "another") is not None
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(MpocError, match="truncated"):
        load_moments(path, "another")
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(MpocError, match="holds no moments"):
        load_moments(path, "another")


def test_fingerprints() -> None:
    torch.manual_seed(6)
    network, batches = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), [texts(), texts(seed=1)]
    key = fingerprint(network, batches, probes=1)
    assert key == fingerprint(network, [texts(), texts(seed=1)], probes=1)
    keys = {
        key,
        fingerprint(network, batches, probes=2),
        fingerprint(network, batches[::-1], probes=1),
        fingerprint(network, batches[:1], probes=1),
        fingerprint(network.half(), batches, probes=1),
    }
    network.float()
    network.get_buffer("1.running_mean").add_(1e-3)
    assert fingerprint(network, batches, probes=1) not in keys and len(keys) == 5
