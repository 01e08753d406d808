from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpoc.errors import MpocError, UsageError
from mpoc.train.training_checkpoint import CheckpointFile, TrainingProgress

TENSORS = {"model/w": torch.arange(12.0).reshape(3, 4), "optimizer/w/step": torch.tensor(7.0)}
BEST = {"w": torch.ones(3, 4)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> CheckpointFile:
    checkpoint = CheckpointFile(tmp_path / "checkpoint.safetensors", {"settings": {"epochs": 3, "name": "é"}})
    checkpoint.extra["runs"] = [1.5]
    checkpoint.save(TrainingProgress(step=7, loss_sum=0.1), TENSORS, BEST, {"scale": 2.0})
    return checkpoint


def test_checkpoint_round_trip(checkpoint: CheckpointFile) -> None:
    saved = checkpoint.load()
    assert saved.progress == TrainingProgress(step=7, loss_sum=0.1)
    assert saved.extra == {"runs": [1.5], "scaler": {"scale": 2.0}}
    for found, given in ((saved.tensors, TENSORS), (saved.best, BEST)):
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], given[name]) for name in given)


@pytest.mark.slow
def test_detects_every_change(checkpoint: CheckpointFile) -> None:
    r"""Of the numbers, or of the words in the header, where \u00e9 is \u00E9."""
    whole, unnoticed = checkpoint.path.read_bytes(), []
    for at in range(len(whole)):
        checkpoint.path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :])
        try:
            assert checkpoint.load().extra == {"runs": [1.5], "scaler": {"scale": 2.0}}
            unnoticed.append(whole[at : at + 1])
        except MpocError as error:
            assert "checkpoint.safetensors" in str(error)
    assert len(unnoticed) <= 1 and set(unnoticed) <= {b"e"}


def test_rejects_checkpoints_of_another_training(checkpoint: CheckpointFile) -> None:
    with pytest.raises(UsageError, match="another settings: epochs 3 there, 4 here"):
        CheckpointFile(checkpoint.path, {"settings": {"epochs": 4, "name": "é"}}).load()
