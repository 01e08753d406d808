from __future__ import annotations

from pathlib import Path

import pytest

from mpoc.data.recognise import FORMATS, files_of, is_data, recognise, split_of
from mpoc.errors import MpocError, UsageError


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("t10k-images-idx3-ubyte.gz", "test"),
        ("docstrings-test.jsonl", "test"),
        ("VAL.npz", "validation"),
        ("my_valid_set.txt", "validation"),
        ("latest.npz", None),
        ("training.npz", "train"),
        ("contest.npz", None),
    ],
)
def test_infers_the_split_from_a_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("names", "form"),
    [
        (["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"], "idx"),
        (["train-images.idx3-ubyte", "train-labels.idx1-ubyte"], "idx"),
        (["data_batch_1.bin", "test_batch.bin", "batches.meta.txt", "readme.html"], "cifar-binary"),
        (["data/train-00000-of-00001.parquet", "README.md", ".gitattributes"], "parquet"),
        (["train.jsonl", "README.txt", "LICENSE.txt"], "jsonl"),
        (["train/a/1.png", "train/b/1.JPG", "list.txt"], "image-folder"),
        (["a/deep/1.png"], "image-folder"),
        (["m.npz"], "npz"),
        (["train/m.safetensors", "test/m.safetensors"], "safetensors"),
        (["a.txt", "b.txt"], "txt"),
    ],
)
def test_recognises_directories(tmp_path: Path, names: list[str], form: str) -> None:
    fill(tmp_path, names)
    assert recognise(tmp_path, None) == form
    assert form in FORMATS


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_lists_files_per_split_in_order(tmp_path: Path) -> None:
    fill(tmp_path, ["train-1.npz", "train-0.npz", "test.npz", "dev.npz", "extra.npz", ".hidden-train.npz"])
    files, notes = files_of(tmp_path, "npz")
    assert {split: [file.name for file in held] for split, held in files.items()} == {
        "train": ["train-0.npz", "train-1.npz"],
        "validation": ["dev.npz"],
        "test": ["test.npz"],
    }
    assert list(files) == ["train", "validation", "test"]
    assert notes == ["ignored, no split in the name: extra.npz"]


def test_recognises_split_folders(tmp_path: Path) -> None:
    fill(tmp_path, ["train/0.npz", "train/1.npz", "testing/0.npz"])
    files, notes = files_of(tmp_path, "npz")
    assert {split: len(held) for split, held in files.items()} == {"train": 2, "test": 1}
    assert notes == []


def test_other_files_are_training_data(tmp_path: Path) -> None:
    fill(tmp_path, ["b.txt", "a.txt"])
    files, notes = files_of(tmp_path, "txt")
    assert [file.name for file in files["train"]] == ["a.txt", "b.txt"]
    assert (list(files), notes) == (["train"], [])
    assert files_of(tmp_path / "a.txt", "txt") == ({"train": [tmp_path / "a.txt"]}, [])


def test_lists_the_files_of_a_set(tmp_path: Path) -> None:
    fill(tmp_path, ["train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz", "readme.txt"])
    (tmp_path / "images" / "cat").mkdir(parents=True)
    fill(tmp_path, ["images/cat/0.png", "images/cat/0.json", "train.npz"])
    assert is_data(tmp_path / "train-images-idx3-ubyte", tmp_path, "idx")
    assert is_data(tmp_path / "train-labels-idx1-ubyte.gz", tmp_path, "idx")
    assert is_data(tmp_path / "train.npz", tmp_path, "npz")
    assert is_data(tmp_path / "images" / "cat" / "0.png", tmp_path / "images", None)
    assert not is_data(tmp_path / "images" / "cat" / "0.json", tmp_path / "images", None)
    assert not is_data(tmp_path / "train.npz", tmp_path, "idx")
    assert not is_data(tmp_path / "train.npz", tmp_path / "images", None)


def test_rejects_mixed_formats(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jsonl", "b.txt"])
    with pytest.raises(UsageError, match="holds several formats: jsonl, txt") as caught:
        recognise(tmp_path, None)
    assert "--format jsonl" in (caught.value.hint or "")
    assert recognise(tmp_path, "txt") == "txt"


def test_rejects_unknown_formats(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or directory"):
        recognise(tmp_path / "none", None)
    with pytest.raises(UsageError, match="unknown format 'parket'; did you mean 'parquet'"):
        recognise(tmp_path, "parket")
    fill(tmp_path, ["a.csv"])
    for path in (tmp_path, tmp_path / "a.csv"):
        with pytest.raises(MpocError, match="not a data set of a known format"):
            recognise(path, None)
    with pytest.raises(MpocError, match="no file of format npz"):
        files_of(tmp_path, "npz")
