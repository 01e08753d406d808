from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from mpoc.data import CharacterTokenizer, TextOptions, open_data, shuffled
from mpoc.data.columns import ParquetRows
from mpoc.data.images import EncodedImages, KeptImages
from mpoc.errors import MpocError
from tests.data.samples import pixels, png, write_jsonl, write_parquet

LIMITS = pytest.mark.parametrize("limit", [1 << 30, 0])


def image_columns(images: np.ndarray, y: list[Any]) -> dict[str, list[Any]]:
    return {"image": [{"bytes": png(image), "path": None} for image in images], "label": y}


@LIMITS
def test_reads_images_across_files_and_row_groups(tmp_path: Path, limit: int) -> None:
    x = pixels(11, 4, 5, 3)
    y = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    (tmp_path / "data").mkdir()
    names = ["ant", "bee", "cat"]
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", image_columns(x[:5], y[:5]), 2, names)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", image_columns(x[5:9], y[5:9]), 3, names)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", image_columns(x[9:], y[9:]), 3, names)
    (tmp_path / "README.md").write_text("a card")
    data = open_data(tmp_path, limit=limit)
    assert (data.format, data.shape, data.classes) == ("parquet", (3, 4, 5), ("ant", "bee", "cat"))
    order = [8, 1, 6, 6, 0, 3]
    batch = data.splits["train"].batch(order)
    np.testing.assert_array_equal(batch["x"].numpy(), x[order].transpose(0, 3, 1, 2))
    assert batch["y"].tolist() == [y[k] for k in order]
    assert data.splits["test"].batch([1])["y"].tolist() == [1]
    assert isinstance(data.splits["train"], KeptImages) == (limit > 0)


def test_cifar10_matches_pyarrow_and_pillow(data: Path) -> None:
    file = data / "cifar10" / "test.parquet"
    cifar = open_data(file)
    assert list(cifar.splits) == ["test"]
    assert cifar.classes[:3] == ("airplane", "automobile", "bird")
    rows = parquet.read_table(file).slice(9_990, 5).to_pylist()
    batch = cifar.splits["test"].batch(range(9_990, 9_995))
    for k, row in enumerate(rows):
        image = np.asarray(Image.open(BytesIO(row["img"]["bytes"])).convert("RGB"))
        np.testing.assert_array_equal(batch["x"][k].numpy(), image.transpose(2, 0, 1))
        assert batch["y"][k] == row["label"]


def test_shuffled_pass_reads_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "t.parquet", image_columns(pixels(60, 2, 2), [0] * 60), 5)
    examples = open_data(file, limit=0).splits["train"]
    assert isinstance(examples, EncodedImages)
    assert isinstance(examples.rows, ParquetRows)
    examples.rows._cache.clear()  # the first image was read for its shape
    reads: list[int] = []
    original = ParquetRows._read_group

    def counted(rows: ParquetRows[bytes], group: int) -> Any:
        reads.extend([] if group in rows._cache else [group])
        return original(rows, group)

    monkeypatch.setattr(ParquetRows, "_read_group", counted)
    order = shuffled(examples, torch.Generator().manual_seed(1))
    assert sorted(order.tolist()) == list(range(60))
    assert order.tolist() == shuffled(examples, torch.Generator().manual_seed(1)).tolist()
    for start in range(0, 60, 5):  # four batches to the four groups that are mixed
        examples.batch(order[start : start + 5])
    assert sorted(reads) == list(range(12))
    assert order[:20].tolist() != sorted(order[:20].tolist())


@LIMITS
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_cuts_pads_and_labels_documents(tmp_path: Path, form: str, limit: int) -> None:
    texts = ["bcd", "", "a", "abcdef", " \n"]
    labels = ["no", "no", "yes", "no", "yes"]
    if form == "parquet":
        write_parquet(tmp_path / "train.parquet", {"text": texts, "label": labels}, 2)
    else:
        rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
        write_jsonl(tmp_path / "train.jsonl", rows)
    tokenizer = CharacterTokenizer("abcdef")
    data = open_data(tmp_path, text=TextOptions(tokenizer, block=4), limit=limit)
    assert (data.format, data.kind, data.classes, data.shape) == (form, "text", ("no", "yes"), ())
    assert data.notes == ("train: 2 empty documents skipped",)
    batch = data.splits["train"].batch([2, 0, 1])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [1, 2, 3, 0], [0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["y"].tolist() == [0, 0, 1]
    assert data.splits["train"].batch([1])["input_ids"].shape == (1, 1)


def test_reads_the_docstrings(data: Path) -> None:
    found = open_data(data / "text" / "docstrings-test.jsonl", text=TextOptions(block=10_000))
    assert list(found.splits) == ["test"]
    tokenizer = found.tokenizer
    assert isinstance(tokenizer, CharacterTokenizer)
    text = (data / "text" / "docstrings-test.jsonl").read_text("utf-8")
    batch = found.splits["test"].batch([7])
    assert tokenizer.decode(batch["input_ids"][0].tolist()) in text.splitlines()[7].replace("\\n", "\n")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (image_columns(pixels(2, 3, 3), [0, -1]), r"row 1, 'label': label -1 is negative"),
        (image_columns(pixels(2, 3, 3), [0, None]), r"row 1, 'label': null is not a label"),
        (image_columns(pixels(2, 3, 3), [0, 2]), r"row 1, 'label': label 2 is out of range: there are 2"),
        ({"image": [{"bytes": b"no", "path": "a.png"}]}, r"row 0, column 'image': not an image"),
        ({"image": [{"bytes": None, "path": "a.png"}] * 2}, r"row 0, column 'image': empty \(null\)"),
        ({"a": ["x"], "b": ["y"]}, r"several text columns: a, b"),
        ({"a": [1], "label": [2]}, r"no column of images .* \(found: a, label\)"),
    ],
)
def test_rejects_bad_tables(tmp_path: Path, columns: dict[str, list[Any]], said: str) -> None:
    file = write_parquet(tmp_path / "t.parquet", columns, 1, ["no", "yes"])
    with pytest.raises(MpocError, match=rf"{file}.*{said}"):
        open_data(file)


def test_names_the_file_and_row_of_a_bad_value(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", image_columns(pixels(3, 3, 3), [0, 1, 0]))
    columns = image_columns(pixels(3, 3, 3), [0, 1, -7])
    columns["image"][1]["bytes"] = columns["image"][1]["bytes"][:30]
    write_parquet(tmp_path / "train-1.parquet", columns, 1)
    with pytest.raises(MpocError, match=r"train-1\.parquet, row 2, 'label': label -7"):
        open_data(tmp_path)
    columns["label"] = [0, 1, 0]
    write_parquet(tmp_path / "train-1.parquet", columns, 1)
    with pytest.raises(MpocError, match=r"train-1\.parquet, row 1, column 'image'"):
        open_data(tmp_path)


@pytest.mark.parametrize("length", [0, 20, -1])
def test_names_a_truncated_parquet_file(tmp_path: Path, length: int) -> None:
    file = write_parquet(tmp_path / "t.parquet", image_columns(pixels(2, 3, 3), [0, 1]))
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(MpocError, match=r"t\.parquet: not a parquet file, or a truncated one"):
        open_data(file)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"', r"line 2: not valid JSON"),
        ('["a"]', r"line 2: not a JSON object"),
        ('{"other": "a", "label": 0}', r"line 2: no text in field 'text', where the first line has it"),
        ('{"text": 3, "label": 0}', r"line 2: no text in field 'text'"),
        ('{"text": "a", "label": "b"}', r"row 1, 'label': \"b\" is not a label like the others"),
        ('{"text": "a"}', r"line 2: no label in field 'label', where the first line has it"),
        ('\n{"text": "a", "target": 0}', r"line 3: no label in field 'label'"),
    ],
)
def test_names_bad_lines(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "first", "label": 1}\n' + line + "\n", "utf-8")
    with pytest.raises(MpocError, match=rf"t\.jsonl, {said}"):
        open_data(tmp_path / "t.jsonl")


@pytest.mark.parametrize("first", [{"text": "a"}, {"text": "a", "label": None}, {"text": "a", "label": [1]}])
def test_checks_all_rows_for_labels(tmp_path: Path, first: dict[str, Any]) -> None:
    file = write_jsonl(tmp_path / "t.jsonl", [first, first, {"text": "b", "label": 1}])
    with pytest.raises(
        MpocError, match=r"t\.jsonl, line 3: a label in field 'label', and the first line has none"
    ):
        open_data(file)
    assert open_data(write_jsonl(tmp_path / "u.jsonl", [first, first])).splits["train"].y is None


def test_reads_the_requested_column(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "t.jsonl", [{"a": "x", "b": "yy"}])
    data = open_data(file, text=TextOptions(column="b"))
    assert data.splits["train"].batch([0])["input_ids"].shape == (1, 2)
    with pytest.raises(MpocError, match=r"no text column 'c' \(found: a, b\)"):
        open_data(file, text=TextOptions(column="c"))


def test_rejects_rows_without_text(tmp_path: Path) -> None:
    with pytest.raises(MpocError, match=r"t\.jsonl: no documents with text"):
        open_data(write_jsonl(tmp_path / "t.jsonl", [{"text": ""}]))
    (tmp_path / "t.jsonl").write_text("\n")
    with pytest.raises(MpocError, match=r"t\.jsonl: no examples"):
        open_data(tmp_path / "t.jsonl")
