from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from mpoc.data import open_data
from mpoc.data.arrays import Arrays
from mpoc.errors import MpocError
from tests.data.samples import pixels

LIMITS = pytest.mark.parametrize("limit", [1 << 30, 0])


def floats(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def save(file: Path, **arrays: NDArray[Any]) -> Path:
    if file.suffix == ".npz":
        np.savez(file, **arrays)  # type: ignore[arg-type]
    else:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, file)
    return file


@LIMITS
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_keeps_stored_floats(tmp_path: Path, suffix: str, limit: int) -> None:
    x, y = floats(9, 2, 3), np.arange(9) % 3
    data = open_data(save(tmp_path / f"m{suffix}", x=x, y=y), limit=limit)
    assert (data.kind, data.shape, data.classes) == ("arrays", (2, 3), ("0", "1", "2"))
    batch = data.splits["train"].batch([8, 0, 5])
    np.testing.assert_array_equal(batch["x"].numpy(), x[[8, 0, 5]])
    assert batch["x"].dtype == torch.float32
    assert batch["y"].tolist() == [2, 0, 2]


def test_maps_large_npz_files(tmp_path: Path) -> None:
    x = floats(50, 40)
    file = save(tmp_path / "m.npz", x=x)
    mapped = open_data(file, limit=0).splits["train"]
    held = open_data(file).splits["train"]
    assert isinstance(mapped, Arrays)
    assert isinstance(held, Arrays)
    with file.open("r+b") as raw:  # what is written into the file is seen through the mapping alone
        content = file.read_bytes()
        raw.seek(content.index(x[7].tobytes()))
        raw.write(floats(50, 40)[3].tobytes())
    np.testing.assert_array_equal(mapped.batch([7])["x"][0].numpy(), x[3])
    np.testing.assert_array_equal(held.batch([7])["x"][0].numpy(), x[7])


@LIMITS
def test_reads_compressed_fortran_and_big_endian_arrays(tmp_path: Path, limit: int) -> None:
    x = floats(5, 4)
    np.savez_compressed(tmp_path / "train.npz", x=np.asfortranarray(x), y=np.arange(5))
    np.savez(tmp_path / "test.npz", x=np.asfortranarray(x), y=np.arange(5).astype(">i8"))
    data = open_data(tmp_path, limit=limit)
    for split in ("train", "test"):
        batch = data.splits[split].batch([3, 1])
        np.testing.assert_array_equal(batch["x"].numpy(), x[[3, 1]])
        assert batch["y"].tolist() == [3, 1]


@LIMITS
def test_moves_channels_first(tmp_path: Path, limit: int) -> None:
    x = pixels(4, 6, 5, 3)
    data = open_data(save(tmp_path / "m.npz", x=x, y=np.arange(4)), limit=limit)
    assert (data.kind, data.shape) == ("images", (3, 6, 5))
    batch = data.splits["train"].batch([2])
    np.testing.assert_array_equal(batch["x"].numpy(), x[[2]].transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
def test_infers_splits_from_array_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    arrays: list[NDArray[Any]] = [pixels(6, 3, 3), np.arange(6), pixels(2, 3, 3, seed=1), np.array([5, 0])]
    data = open_data(save(tmp_path / "mnist.npz", **dict(zip(names, arrays, strict=True))))
    assert list(data.splits) == ["train", "test"]
    np.testing.assert_array_equal(data.splits["test"].batch([1])["x"][0, 0].numpy(), arrays[2][1])
    assert data.splits["test"].batch([0, 1])["y"].tolist() == [5, 0]
    assert data.notes == ("test: no example of 4 of 6 classes (1, 2, 3, 4)",)


def test_float_targets_have_no_classes(tmp_path: Path) -> None:
    targets = floats(5, 2).astype(np.float64)
    data = open_data(save(tmp_path / "m.npz", x=floats(5, 3), y=targets))
    assert data.classes == ()
    y = data.splits["train"].batch([4])["y"]
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), targets[[4]], rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_names_non_finite_arrays(tmp_path: Path, suffix: str, value: float) -> None:
    x = floats(5, 3)
    x[3, 1] = value
    kind = "NaN" if np.isnan(value) else "infinity"
    with pytest.raises(MpocError, match=rf"m\{suffix}: {kind} in x, row 3"):
        open_data(save(tmp_path / f"m{suffix}", x=x))
    y = np.zeros(5)
    y[2] = value
    with pytest.raises(MpocError, match=r"row 2: the target is not finite"):
        open_data(save(tmp_path / f"m{suffix}", x=floats(5, 3), y=y))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": floats(5, 2), "y": np.arange(4)}, "5 examples in x but 4 labels"),
        ({"x": floats(2, 2), "y": np.array([0, -3])}, "row 1: label -3 is negative"),
        ({"x": floats(2, 2), "y": np.array([0, 1 << 40])}, "row 1: label 1099511627776 is above 1,000,000"),
        ({"x": floats(2, 2), "y": np.zeros((2, 3), int)}, r"integer labels of shape \(2, 3\)"),
        ({"x": floats(0, 2)}, "x has no examples"),
        ({"a": floats(2, 2), "b": floats(2)}, r"no array named x or input_ids \(found: a, b\)"),
        ({"x": floats(2, 2), "inputs": floats(2)}, "both 'inputs' and 'x' could be x"),
    ],
)
def test_rejects_bad_arrays(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(MpocError, match=said) as caught:
        open_data(save(tmp_path / "m.npz", **arrays))
    assert str(tmp_path / "m.npz") in str(caught.value)


def test_rejects_pickled_objects(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", x=np.array([{}, None], dtype=object))
    with pytest.raises(MpocError, match=r"m\.npz: array 'x' holds pickled objects"):
        open_data(tmp_path / "m.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("length", [0, 10, 100, -1])
def test_names_a_truncated_file(tmp_path: Path, suffix: str, length: int) -> None:
    file = save(tmp_path / f"m{suffix}", x=floats(20, 3))
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(MpocError, match=rf"m\{suffix}: not an? {suffix[:1]}?"):
        open_data(file)
