"""Small data sets in every format, written by hand."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def pixels(*shape: int, seed: int = 0) -> Pixels:
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(folder: Path, stem: str, x: Pixels, y: Sequence[int], packed: bool = False) -> Path:
    """``<stem>-images-idx3-ubyte`` and its labels; the images' path."""
    images = struct.pack(">4B3I", 0, 0, 8, 3, *x.shape) + x.tobytes()
    labels = struct.pack(">4BI", 0, 0, 8, 1, len(y)) + bytes(y)
    suffix = ".gz" if packed else ""
    for name, content in (("images-idx3", images), ("labels-idx1", labels)):
        file = folder / f"{stem}-{name}-ubyte{suffix}"
        file.write_bytes(gzip.compress(content) if packed else content)
    return folder / f"{stem}-images-idx3-ubyte{suffix}"


def write_cifar(file: Path, x: Pixels, y: Sequence[int]) -> Path:
    """Rows of a label and 3072 pixels."""
    file.write_bytes(b"".join(bytes([label]) + row.tobytes() for label, row in zip(y, x, strict=True)))
    return file


def png(array: Pixels) -> bytes:
    """An (H, W) or (H, W, 3) array as a PNG."""
    out = BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def write_folder(folder: Path, classes: dict[str, list[Pixels]]) -> Path:
    """``<class>/<number>.png``."""
    for name, images in classes.items():
        (folder / name).mkdir(parents=True)
        for number, array in enumerate(images):
            (folder / name / f"{number:03}.png").write_bytes(png(array))
    return folder


def write_parquet(
    file: Path, columns: dict[str, list[Any]], rows_a_group: int = 1000, names: list[str] | None = None
) -> Path:
    """A table, with the names of the classes in Hugging Face's metadata."""
    import pyarrow
    import pyarrow.parquet as parquet

    table = pyarrow.table(columns)
    if names:
        features = {"label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, file, row_group_size=rows_a_group)
    return file


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    """An object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def write_tokenizer(folder: Path, words: list[str]) -> Path:
    """Make a directory a BERT tokenizer of these words, the first of which are the special ones."""
    from transformers import BertTokenizer

    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
