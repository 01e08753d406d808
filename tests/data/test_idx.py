from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mpoc.data import open_data
from mpoc.errors import MpocError
from tests.data.samples import pixels, write_idx

Y = [0, 1, 2, 1, 0, 2]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_reads_pixels_and_labels(tmp_path: Path, packed: bool, limit: int) -> None:
    x, x_test = pixels(6, 4, 5), pixels(3, 4, 5, seed=1)
    write_idx(tmp_path, "train", x, Y, packed)
    write_idx(tmp_path, "t10k", x_test, [2, 0, 1], packed)
    data = open_data(tmp_path, limit=limit)
    assert (data.format, data.kind, data.shape, data.classes) == ("idx", "images", (1, 4, 5), ("0", "1", "2"))
    batch = data.splits["train"].batch([4, 0])
    np.testing.assert_array_equal(batch["x"].numpy(), x[[4, 0], None])
    assert batch["y"].tolist() == [0, 0]
    assert batch["y"].dtype == torch.int64
    np.testing.assert_array_equal(data.splits["test"].batch([1])["x"].numpy(), x_test[[1], None])


def test_reads_plain_and_packed_files(tmp_path: Path) -> None:
    for packed in (False, True):
        write_idx(tmp_path, "train", pixels(5, 4, 4), range(5), packed)
    assert len(open_data(tmp_path).splits["train"]) == 5


def test_rejects_mixed_sets(tmp_path: Path) -> None:
    for name in ("emnist-letters-train", "emnist-digits-train"):
        write_idx(tmp_path, name, pixels(5, 4, 4), range(5))
    with pytest.raises(MpocError, match=r"2 sets of train images: emnist-digits.*, emnist-let"):
        open_data(tmp_path)


def test_reads_mnist(data: Path) -> None:
    mnist = open_data(data / "mnist")
    raw = gzip.decompress((data / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert struct.unpack(">4I", raw[:16]) == (0x803, 10_000, 28, 28)
    batch = mnist.splits["test"].batch([0, 9_999])
    for k, row in enumerate((0, 9_999)):
        assert bytes(batch["x"][k].flatten().tolist()) == raw[16 + row * 784 : 16 + (row + 1) * 784]
    labels = gzip.decompress((data / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())
    y = mnist.splits["test"].y
    assert y is not None
    assert bytes(y.tolist()) == labels[8:]
    said = f"{data / 'mnist'}: idx; train 60,000, test 10,000; images 1×28×28; 10 classes (0, 1, 2, …)"
    assert mnist.announce() == said
    assert mnist.notes == ()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [0, 3, 12, 40, -1])
def test_names_a_truncated_file(tmp_path: Path, packed: bool, length: int) -> None:
    file = write_idx(tmp_path, "train", pixels(6, 4, 5), Y, packed)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(MpocError, match=rf"{file.name}: .*(truncated|empty|not an IDX)"):
        open_data(tmp_path)


def test_rejects_differing_counts(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", pixels(6, 4, 5), Y[:5])
    with pytest.raises(
        MpocError, match=r"train-images-idx3-ubyte: 6 images, but train-labels.* has 5 labels"
    ):
        open_data(tmp_path)


def test_rejects_extra_bytes(tmp_path: Path) -> None:
    file = write_idx(tmp_path, "train", pixels(6, 4, 5), Y)
    file.write_bytes(file.read_bytes() + b"12")
    with pytest.raises(MpocError, match="2 bytes more than its header says"):
        open_data(file)


def test_rejects_missing_labels(tmp_path: Path) -> None:
    file = write_idx(tmp_path, "train", pixels(6, 4, 5), Y)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(MpocError, match="no labels beside it: train-labels-idx1-ubyte"):
        open_data(file)


def test_rejects_differing_image_sizes(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", pixels(6, 4, 5), Y)
    write_idx(tmp_path, "t10k", pixels(6, 5, 5), Y)
    with pytest.raises(MpocError, match=r"t10k-images.*\(1, 5, 5\).*train-images.*\(1, 4, 5\)"):
        open_data(tmp_path)
