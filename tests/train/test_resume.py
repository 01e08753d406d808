"""What stays of a training that ends early, and what may go on from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from mpoc.data.base import Batch
from mpoc.data.documents import Documents
from mpoc.errors import MpocError, UsageError
from mpoc.models import zoo
from mpoc.train.finetune import finetune
from mpoc.train.settings import CheckpointInterval, DataOptions, FinetuneRequest, Settings
from tests.data.samples import write_jsonl


@pytest.mark.slow
def test_damaged_data_keep_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(zoo.make("picogpt").state_dict(), tmp_path / "gpt.safetensors")
    data = DataOptions(
        write_jsonl(tmp_path / "a.jsonl", [{"text": f"to be {k}"} for k in range(40)]), block=4
    )
    request = FinetuneRequest(
        tmp_path / "gpt.safetensors", data, Settings(steps=6, batch=4), tmp_path / "out.safetensors",
        arch="picogpt", device="cpu", checkpoint_every=CheckpointInterval(steps=2),
    )  # fmt: skip
    calls, whole = count(1), Documents.batch

    def broken(self: Documents, indices: Sequence[int] | Tensor) -> Batch:
        if next(calls) > 6:
            raise MpocError("damaged")
        return whole(self, indices)

    with monkeypatch.context() as patched:
        patched.setattr(Documents, "batch", broken)
        with pytest.raises(MpocError, match="damaged"):
            finetune(request)
    assert request.checkpoint.exists()
    with pytest.raises(UsageError, match="another data: block 4 there, 5 here"):
        finetune(replace(request, resume=True, data=replace(data, block=5)))
    assert data.path is not None
    good = data.path.read_text()
    data.path.write_text(good.replace("to be 17", "to be 71"))
    with pytest.raises(UsageError, match=r"another data: fingerprint [0-9a-f]{16} there, [0-9a-f]{16} here"):
        finetune(replace(request, resume=True))
    data.path.write_text(good)
    assert finetune(replace(request, resume=True)).training["steps"] == 6
    assert not request.checkpoint.exists()


@pytest.mark.slow
def test_diverging_training_leaves_nothing(tmp_path: Path) -> None:
    save_file(zoo.make("picogpt").state_dict(), tmp_path / "gpt.safetensors")
    (tmp_path / "a.txt").write_text("to be or not to be " * 20)
    settings = Settings(steps=60, batch=4, optimizer="sgd", lr=1e25)
    data = DataOptions(tmp_path / "a.txt", block=8)
    request = FinetuneRequest(
        tmp_path / "gpt.safetensors", data, settings, tmp_path / "out.safetensors", arch="picogpt",
        device="cpu", checkpoint_every=CheckpointInterval(steps=1),
    )  # fmt: skip
    with pytest.raises(MpocError, match="the loss is"):
        finetune(request)
    assert {file.name for file in tmp_path.iterdir()} == {"gpt.safetensors", "a.txt"}
