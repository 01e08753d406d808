from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpoc.errors import MpocError
from mpoc.io.checkpoint import open_safetensors
from tests.support.checkpoints import contents, mlp_state


def test_reads_files_of_the_library(tmp_path: Path) -> None:
    state = {
        **mlp_state(),
        "half": torch.randn(3, 4).half(),
        "brain": torch.randn(3, 4).bfloat16(),
        "double": torch.randn(3, dtype=torch.float64),
        "steps": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }
    file = tmp_path / "m.safetensors"
    save_file(state, file, {"format": "pt"})
    before = contents(tmp_path)
    checkpoint = open_safetensors(file, [file], None)
    assert checkpoint.infos.keys() == state.keys()
    for name, tensor in state.items():
        info = checkpoint.infos[name]
        assert (info.name, info.shape, f"torch.{info.dtype}") == (
            name,
            tuple(tensor.shape),
            str(tensor.dtype),
        )
        torch.testing.assert_close(checkpoint.read(name), tensor, rtol=0, atol=0)
    assert (checkpoint.tied, checkpoint.notes, checkpoint.weight_files) == ({}, [], [file])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_strips_wrapper_prefixes(tmp_path: Path, prefix: str) -> None:
    state = mlp_state()
    file = tmp_path / "m.safetensors"
    save_file({prefix + name: tensor for name, tensor in state.items()}, file)
    checkpoint = open_safetensors(file, [file], None)
    assert checkpoint.infos.keys() == state.keys()
    torch.testing.assert_close(checkpoint.read("fc1.weight"), state["fc1.weight"], rtol=0, atol=0)


def test_reads_tensors_from_the_indexed_file(tmp_path: Path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, first)
    save_file({"a": torch.ones(2)}, second)
    checkpoint = open_safetensors(tmp_path, [first, second], {"b": first, "a": second})
    assert checkpoint.read("a").tolist() == [1, 1]
    assert checkpoint.read("b").tolist() == [0, 0]
    assert checkpoint.files == {"a": second, "b": first}
    assert list(checkpoint.infos) == ["b", "a"]


def test_rejects_index_naming_a_missing_tensor(tmp_path: Path) -> None:
    file = tmp_path / "1.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(MpocError, match=r"puts tensor 'b' into 1\.safetensors, which lacks it"):
        open_safetensors(tmp_path, [file], {"a": file, "b": file})


def test_rejects_truncation_at_every_length(tmp_path: Path) -> None:
    save_file(mlp_state(), tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [*range(0, 500, 7), *range(500, len(whole), 997), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(MpocError) as caught:
            open_safetensors(cut, [cut], None)
        assert str(cut) in str(caught.value)
    cut.write_bytes(whole[:-1])
    with pytest.raises(MpocError, match=r"truncated: 1 bytes missing at its end \(tensor 'fc2\.weight'\)"):
        open_safetensors(cut, [cut], None)


def test_reports_truncation_after_opening(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file(mlp_state(), file)
    checkpoint = open_safetensors(file, [file], None)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        MpocError, match=r"m\.safetensors: changed while it was read \(tensor 'fc2\.weight'\)"
    ):
        checkpoint.read("fc2.weight")


def test_reads_tensors_at_odd_offsets(tmp_path: Path) -> None:
    """Headers of other writers need not end at a multiple of the dtype's bytes."""
    values = torch.arange(6, dtype=torch.float32)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    for padding in range(4):
        file = tmp_path / f"{padding}.safetensors"
        text = header + b" " * padding
        file.write_bytes(struct.pack("<Q", len(text)) + text + values.numpy().tobytes())
        assert torch.equal(open_safetensors(file, [file], None).read("w"), values.view(2, 3))


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x00" * 64])
def test_rejects_other_files(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(content)
    with pytest.raises(MpocError, match=r"m\.safetensors: not a safetensors file"):
        open_safetensors(file, [file], None)


def test_names_the_tensor_of_an_unknown_dtype(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F3", "shape": [4], "data_offsets": [0, 2]}}).encode()
    file = tmp_path / "m.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\x00\x00")
    with pytest.raises(MpocError, match="tensor 'w' has dtype F3"):
        open_safetensors(file, [file], None)


def test_tensor_outlives_its_mapping(tmp_path: Path) -> None:
    state = mlp_state()
    file = tmp_path / "m.safetensors"
    save_file(state, file)
    checkpoint = open_safetensors(file, [file], None)
    tensors = [checkpoint.read(name) for name in state]
    file.unlink()
    for tensor, expected in zip(tensors, state.values(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    with pytest.raises(FileNotFoundError):
        load_file(file)
