from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.open_checkpoint import look_at, one_ahead, open_checkpoint
from mpoc.io.safetensors_header import TensorInfo
from tests.support.checkpoints import save_directory


class Source:
    """Tensors that say who reads them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.readers, self.read_one = tensors, dict[str, str](), threading.Event()
        infos = {name: TensorInfo(name, "float32", tuple(t.shape)) for name, t in tensors.items()}
        self.checkpoint = Checkpoint(Path("m"), infos, {}, self.read, dict.fromkeys(tensors, Path("m")))

    def read(self, name: str) -> Tensor:
        self.readers[name] = threading.current_thread().name
        self.read_one.set()
        if name == "bad":
            raise MpocError("bad")
        return self.tensors[name]


def test_reads_the_next_tensor_ahead() -> None:
    source = Source({name: torch.ones(3000, 5) for name in "abc"})
    names = one_ahead(source.checkpoint, "abc")
    for name, following in (("a", "b"), ("b", "c")):
        source.read_one.clear()
        assert next(names) == name
        assert source.read_one.wait(30)
        assert source.readers[following].startswith("read-ahead")
    assert list(names) == ["c"]
    assert list(source.readers) == ["b", "c"]  # one ahead, and nothing behind the last


def test_raises_errors_to_the_consumer() -> None:
    source = Source({"a": torch.ones(2), "bad": torch.ones(2), "c": torch.ones(2)})
    assert list(one_ahead(source.checkpoint, ["a", "bad", "c"])) == ["a", "bad", "c"]
    assert list(one_ahead(source.checkpoint, [])) == []


def test_stopping_early_ends_the_thread() -> None:
    source = Source({name: torch.ones(10) for name in "abc"})
    for _ in one_ahead(source.checkpoint, "abc"):
        break
    names = one_ahead(source.checkpoint, "abc")
    next(names)
    names.close()
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
def test_reads_every_kind_of_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"one": torch.ones(70, 90), "none": torch.empty(0, 4), "point": torch.ones(())}
    state = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    checkpoint = open_checkpoint(save_directory(tmp_path / "m", state, config={"model_type": "test"}))
    for name in state:
        look_at(checkpoint, name)
