"""Arrays without a telling name, and token ids in arrays and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mpoc.data import CharacterTokenizer, TextOptions, check_fits, hold_out, open_data
from mpoc.errors import MpocError
from tests.data.samples import pixels, write_jsonl, write_parquet

IDS = [[5, 6, 7], [8], [9, 4, 3, 2]]
MASK = [[1, 1, 0], [1], [0, 1, 1, 1]]
FORMS = pytest.mark.parametrize("form", ["parquet", "jsonl"])


def table(path: Path, form: str, columns: dict[str, list[Any]]) -> Path:
    """A parquet file of two rows a group, or JSON lines."""
    file = path / f"train.{form}"
    if form == "parquet":
        return write_parquet(file, columns, 2)
    return write_jsonl(
        file, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    )


def floats(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("limit", [1 << 30, 0])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_floats(tmp_path: Path, order: Any, limit: int) -> None:
    x = np.asarray(floats(9, 2, 3), order=order)
    np.save(tmp_path / "test.npy", x)
    data = open_data(tmp_path / "test.npy", limit=limit)
    assert data.announce() == f"{tmp_path / 'test.npy'}: npy; test 9; arrays 2×3"
    np.testing.assert_array_equal(data.splits["test"].batch([8, 0])["x"].numpy(), x[[8, 0]])


def test_npy_files_of_a_folder_are_its_splits(tmp_path: Path) -> None:
    x = pixels(6, 5, 4, 3)
    np.save(tmp_path / "train.npy", x)
    np.save(tmp_path / "test.npy", x[:2])
    data = open_data(tmp_path)
    assert (data.kind, data.shape, list(data.splits)) == ("images", (3, 5, 4), ["train", "test"])
    batch = data.splits["test"].batch([1])
    np.testing.assert_array_equal(batch["x"].numpy(), x[[1]].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["arr_0", "embeddings", "features_test"])
def test_a_lone_array_of_an_npz_has_any_name(tmp_path: Path, name: str) -> None:
    x = floats(4, 3)
    np.savez(tmp_path / "m.npz", allow_pickle=False, **{name: x})
    data = open_data(tmp_path / "m.npz")
    split = "test" if "test" in name else "train"
    np.testing.assert_array_equal(data.splits[split].batch([2])["x"].numpy(), x[[2]])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 3), np.float32), "the array has no examples"),
        (np.float32(1), "the array is a single number; one row per example was expected"),
        (np.array([["a"]]), "the array is of type <U1; numbers were expected"),
        (np.array([[1, np.nan]]), "NaN in the array, row 0"),
        (np.array([[3, 1], [2, -7]]), "row 1: token id -7; ids from 0"),
        (np.array([{}, None], dtype=object), "the array holds pickled objects"),
    ],
)
def test_bad_npy_files_are_one_clear_message(tmp_path: Path, array: Any, message: str) -> None:
    np.save(tmp_path / "m.npy", array)
    with pytest.raises(MpocError, match=rf"m\.npy[:,] {message}"):
        open_data(tmp_path / "m.npy")


@pytest.mark.parametrize("length", [0, 9, 100, -1])
def test_a_truncated_npy_file_is_named(tmp_path: Path, length: int) -> None:
    np.save(tmp_path / "m.npy", floats(20, 3))
    content = (tmp_path / "m.npy").read_bytes()
    (tmp_path / "m.npy").write_bytes(content[:length])
    with pytest.raises(MpocError, match=r"m\.npy: not an \.npy file, or a truncated or damaged one"):
        open_data(tmp_path / "m.npy")


@pytest.mark.parametrize("dtype", [np.int64, np.int32, ">i4", np.uint16])
def test_a_matrix_of_integers_is_token_ids(tmp_path: Path, dtype: Any) -> None:
    ids = np.arange(12).reshape(3, 4)
    np.save(tmp_path / "m.npy", ids.astype(dtype))
    np.savez(tmp_path / "m.npz", allow_pickle=False, tokens=ids.astype(dtype))
    for name in ("m.npy", "m.npz"):
        data = open_data(tmp_path / name)
        batch = data.splits["train"].batch([2, 0])
        assert (data.kind, data.tokenizer) == ("text", None)
        assert batch["input_ids"].tolist() == ids[[2, 0]].tolist()
        assert batch["input_ids"].dtype == torch.int64
        assert batch["attention_mask"].tolist() == [[1] * 4] * 2


def test_arrays_named_input_ids_and_attention_mask(tmp_path: Path) -> None:
    ids, mask = np.arange(8).reshape(2, 4), np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    np.savez(tmp_path / "m.npz", input_ids=ids, attention_mask=mask, label=np.array([1, 0]))
    batch = open_data(tmp_path / "m.npz").splits["train"].batch([0, 1])
    assert batch["input_ids"].tolist() == [[0, 1, 2], [4, 5, 0]]  # padding at the end is dropped
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["y"].tolist() == [1, 0]
    np.savez(tmp_path / "m.npz", input_ids=ids, attention_mask=mask[:, :3])
    with pytest.raises(MpocError, match=r"attention_mask is \(2, 3\) int64; integers \(2, 4\) were expected"):
        open_data(tmp_path / "m.npz")
    np.savez(tmp_path / "m.npz", input_ids=ids.astype(np.float32))
    with pytest.raises(
        MpocError, match=r"input_ids is \(2, 4\) float32; integers \(n, tokens\) were expected"
    ):
        open_data(tmp_path / "m.npz")


@FORMS
def test_a_column_of_token_ids(tmp_path: Path, form: str) -> None:
    file = table(tmp_path, form, {"input_ids": IDS, "attention_mask": MASK, "label": ["no", "yes", "no"]})
    data = open_data(file)
    assert data.announce() == f"{file}: {form}; train 3; token ids; 2 classes (no, yes)"
    batch = data.splits["train"].batch([0, 1, 2])
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0], [8, 0, 0, 0], [9, 4, 3, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 1, 1]]
    assert batch["y"].tolist() == [0, 1, 0]
    examples = data.splits["train"]
    assert [examples[k]["input_ids"].tolist() for k in range(3)] == [[5, 6], [8], [9, 4, 3, 2]]


@FORMS
def test_token_ids_without_a_mask_are_cut_to_the_block(tmp_path: Path, form: str) -> None:
    file = table(tmp_path, form, {"text": ["x", "y", "z"], "input_ids": IDS})
    tokenizer = CharacterTokenizer("abcdefghijk")
    data = open_data(file, text=TextOptions(tokenizer, block=2))
    assert data.notes == (
        "column 'input_ids' is read, not 'text' (--column text reads it)",
        "train: 2 of 3 examples are cut to 2 tokens",
    )
    batch = data.splits["train"].batch([0, 1, 2])
    assert batch["input_ids"].tolist() == [[5, 6], [8, 0], [9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0], [1, 1]]
    assert open_data(file, text=TextOptions(column="text")).tokenizer is not None


@FORMS
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": [[1], []]}, "row 1, 'input_ids': no tokens"),
        ({"input_ids": [[1], [-2]]}, "row 1, 'input_ids': token id -2; ids from 0"),
        ({"input_ids": [[1], [1 << 40]]}, "row 1, 'input_ids': token id 1099511627776; ids from 0"),
        ({"input_ids": [1, 2]}, "column 'input_ids': a list of integers per row was expected"),
        ({"input_ids": [[0.5], [1.5]]}, "column 'input_ids': a list of integers per row was expected"),
        (
            {"input_ids": [[1], [2, 3]], "attention_mask": [[1], [1]]},
            "row 1, 'input_ids': 2 token ids, but 1 numbers in attention_mask",
        ),
        (
            {"input_ids": [[1], [2]], "attention_mask": [[1], [2]]},
            "row 1, 'input_ids': attention_mask 2; 0 or 1",
        ),
        (
            {"input_ids": [[1], [2]], "attention_mask": [[1], [0]]},
            "row 1, 'input_ids': attention_mask is 0 for",
        ),
        ({"input_ids": [[1], [2]], "label": [0, -1]}, "row 1, 'label': label -1 is negative"),
    ],
)
def test_bad_token_ids_are_one_clear_message(
    tmp_path: Path, form: str, columns: dict[str, list[Any]], message: str
) -> None:
    with pytest.raises(MpocError, match=rf"train\.{form}[:,] {message}"):
        open_data(table(tmp_path, form, columns))


def test_missing_token_ids_are_named(tmp_path: Path) -> None:
    with pytest.raises(MpocError, match=r"t\.parquet, row 1, 'input_ids': empty \(null\)"):
        open_data(write_parquet(tmp_path / "t.parquet", {"input_ids": [[1], None]}))
    lines = [{"input_ids": [1]}, {"input_ids": [1, None]}]
    with pytest.raises(MpocError, match=r"t\.jsonl, line 2: no list of integers in field 'input_ids'"):
        open_data(write_jsonl(tmp_path / "t.jsonl", lines))


def test_ids_beyond_the_vocabulary_are_named(tmp_path: Path) -> None:
    lines = [{"input_ids": [k, 9]} for k in range(12)]
    data = open_data(write_jsonl(tmp_path / "t.jsonl", lines))
    check_fits(data, vocabulary=12)
    for held in (data, hold_out(data, 0.5, 0)):
        with pytest.raises(
            MpocError, match=r"t\.jsonl, row 10, 'input_ids': token id 10, but the network has 10"
        ):
            check_fits(held, vocabulary=10)
    assert json.loads((tmp_path / "t.jsonl").read_text().splitlines()[10]) == {"input_ids": [10, 9]}
