from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from mpoc.data import open_data
from mpoc.errors import MpocError
from tests.data.samples import pixels, write_cifar

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_joins_batches_to_one_split(tmp_path: Path, limit: int) -> None:
    x = pixels(7, 3, 32, 32)
    y = [3, 1, 4, 1, 5, 9, 2]
    write_cifar(tmp_path / "data_batch_1.bin", x[:3], y[:3])
    write_cifar(tmp_path / "data_batch_2.bin", x[3:5], y[3:5])
    write_cifar(tmp_path / "test_batch.bin", x[5:], y[5:])
    (tmp_path / "batches.meta.txt").write_text(CLASSES.replace(" ", "\n") + "\n\n")
    data = open_data(tmp_path, limit=limit)
    assert {split: len(examples) for split, examples in data.splits.items()} == {"train": 5, "test": 2}
    assert data.classes == tuple(CLASSES.split())
    batch = data.splits["train"].batch([4, 0, 3, 2])
    np.testing.assert_array_equal(batch["x"].numpy(), x[[4, 0, 3, 2]])
    assert batch["y"].tolist() == [5, 3, 1, 4]


def test_names_row_of_label_out_of_range(tmp_path: Path) -> None:
    write_cifar(tmp_path / "data_batch_1.bin", pixels(2, 3, 32, 32), [0, 1])
    write_cifar(tmp_path / "data_batch_2.bin", pixels(2, 3, 32, 32), [0, 10])
    with pytest.raises(
        MpocError, match=r"data_batch_2\.bin, row 1: label 10 is out of range: there are 10 cl"
    ):
        open_data(tmp_path)


def test_rejects_partial_rows(tmp_path: Path) -> None:
    file = write_cifar(tmp_path / "data_batch_1.bin", pixels(2, 3, 32, 32), [0, 1])
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(
        MpocError, match=r"data_batch_1\.bin: 6,141 bytes are not whole CIFAR-10 rows of 3073"
    ):
        open_data(file)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_1.bin"])
@pytest.mark.parametrize("whole", [False, True])
def test_rejects_pickled_batches(tmp_path: Path, name: str, whole: bool) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({b"labels": [1], b"data": b""}, protocol=2))
    with pytest.raises(MpocError, match=rf"{name}: a (pickled CIFAR batch|Python pickle)") as caught:
        open_data(tmp_path if whole else tmp_path / name)
    assert "cifar-10-binary.tar.gz" in (caught.value.hint or "")
