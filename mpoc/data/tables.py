"""A document an example: token numbers, cut at the block length and padded to the longest of a batch.

Tables in Hugging Face layout: ``.parquet`` and ``.jsonl`` with an image or a text column, and labels.

https://huggingface.co/docs/datasets/image_dataset gives the layout of images in parquet: a struct of the
encoded ``bytes`` and a ``path``; names of the classes stand in the schema's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpoc.data.base import Batch, Data, DataSource, Examples
from mpoc.data.columns import JsonRows, ParquetRows, Rows
from mpoc.data.images import assemble_images
from mpoc.data.labels import Column, Where, number_labels
from mpoc.data.text import CharacterTokenizer, TextOptions, Tokenizer
from mpoc.errors import MpocError

TOKENIZED_AT_ONCE = 50_000_000

_IMAGES = ("image", "img")
_TEXTS = ("text", "sentence", "content", "document")
_LABELS = ("label", "labels", "fine_label", "target", "y")


"""Documents with at most this many characters in all are tokenized once, before training (about half a
minute with a fast tokenizer); those of a larger set whenever a batch asks for them."""


class Documents(Examples):
    """Documents tokenized already, one behind the other."""

    def __init__(self, tokens: Tensor, starts: Tensor, pad_id: int, y: Tensor | None) -> None:
        self.tokens = tokens  # (sum of lengths,) int32
        self.starts = starts  # (n + 1,) int64: where each begins, and the end
        self.pad_id = pad_id
        self.y = y

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """``input_ids`` and ``attention_mask`` (n, T) int64, T the longest of them, and ``y``."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        lengths = self.starts[chosen + 1] - self.starts[chosen]
        places = torch.arange(int(lengths.max()))
        mask = places < lengths[:, None]  # (n, T)
        where = (self.starts[chosen][:, None] + places).clamp(max=len(self.tokens) - 1)
        ids = self.tokens[where].to(torch.int64).masked_fill(~mask, self.pad_id)
        batch = {"input_ids": ids, "attention_mask": mask.to(torch.int64)}
        return batch if self.y is None else batch | {"y": self.y[chosen]}

    def lengths(self) -> Tensor:
        """Tokens of each."""
        return self.starts.diff()


class LazyDocuments(Examples):
    """Documents that are read and tokenized when a batch asks for them."""

    def __init__(
        self, rows: Rows[str], kept: Tensor, tokenizer: Tokenizer, block: int, y: Tensor | None
    ) -> None:
        self.rows = rows
        self.kept = kept  # (n,) int64: the rows that are not empty
        self.tokenizer = tokenizer
        self.block = block
        self.y = y

    def __len__(self) -> int:
        return len(self.kept)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """As of :class:`Documents`."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        encoded = self.tokenizer.encode_documents(self.rows.take(self.kept[chosen].tolist()), self.block)
        y = None if self.y is None else self.y[chosen]
        return _held(encoded, self.tokenizer.pad_id, y).batch(range(len(encoded)))

    def chunks(self) -> Tensor | None:
        """Those of the file."""
        chunks = self.rows.chunks()
        return None if chunks is None else chunks[self.kept]


def _held(encoded: list[list[int]], pad_id: int, y: Tensor | None) -> Documents:
    starts = torch.tensor([0, *map(len, encoded)], dtype=torch.int64).cumsum(0)
    tokens = np.fromiter((token for tokens in encoded for token in tokens), np.int32, int(starts[-1]))
    return Documents(torch.from_numpy(tokens), starts, pad_id, y)


def assemble_documents(
    source: DataSource,
    form: str,
    rows: dict[str, Rows[str]],
    columns: dict[str, tuple[Column, Where]],
    names: tuple[str, ...],
) -> Data:
    """A checked data set of documents; ``columns`` are the labels of each split.

    Documents of white space alone are left out, and that is said.

    Raises:
        MpocError: no documents, a character that training has not, or a bad label.
    """
    options = source.text or TextOptions()
    labels, classes, notes = number_labels(columns, names)
    train = rows.get("train") or next(iter(rows.values()))
    tokenizer = options.tokenizer or CharacterTokenizer.of(text for texts in train.scan() for text in texts)
    splits: dict[str, Examples] = {}
    for split, held in rows.items():
        lengths = torch.tensor([len(text.strip()) for texts in held.scan() for text in texts])
        kept = torch.nonzero(lengths > 0).flatten()
        if len(kept) == 0:
            raise MpocError(f"{source.files[split][0]}: no documents with text in them")
        if len(kept) < len(held):
            notes.append(f"{split}: {len(held) - len(kept):,} empty documents left out")
        y = labels[split][kept] if split in labels else None
        if int(lengths.sum()) <= min(TOKENIZED_AT_ONCE, source.limit):
            splits[split] = _held(list(_encoded(held, tokenizer, options.block)), tokenizer.pad_id, y)
        else:
            splits[split] = LazyDocuments(held, kept, tokenizer, options.block, y)
    return Data(source.path, form, "text", splits, classes, (), (*source.notes, *notes), tokenizer)


def _encoded(rows: Rows[str], tokenizer: Tokenizer, block: int) -> Iterator[list[int]]:
    """The tokens of every document with text in it."""
    start = 0
    for texts in rows.scan():
        full = [(start + k, text) for k, text in enumerate(texts) if text.strip()]
        try:
            yield from tokenizer.encode_documents([text for _, text in full], block) if full else []
        except MpocError as error:
            raise MpocError(f"{rows.name(full[0][0])} or soon after: {error}", error.hint) from error
        start += len(texts)


def open_parquet(source: DataSource) -> Data:
    """Images (struct with bytes, or bytes) or text, with a label column where there is one.

    Raises:
        MpocError: pyarrow is missing, a damaged file, no such column or several, an empty cell, a bad label.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise MpocError("reading parquet needs pyarrow", "pip install 'mpoc[train]'") from error
    schemas = {file: _schema(file) for files in source.files.values() for file in files}
    first, schema = next(iter(schemas.items()))
    column, kind, label = _choose(first, {field.name: _kind(field.type) for field in schema}, source)
    for file, other in schemas.items():
        for name in (column, label):
            if name and (name not in other.names or other.field(name).type != schema.field(name).type):
                raise MpocError(f"{file}: column {name!r} is not there, or of another type than in {first}")
    columns = {}
    if label:
        columns = {split: _parquet_labels(files, label) for split, files in source.files.items()}
    names = _class_names(schema, label)
    if kind == "image":
        images: dict[str, Rows[bytes]] = {k: ParquetRows(files, column) for k, files in source.files.items()}
        return assemble_images(source, "parquet", images, columns, names)
    texts: dict[str, Rows[str]] = {k: ParquetRows(files, column) for k, files in source.files.items()}
    return assemble_documents(source, "parquet", texts, columns, names)


def _schema(file: Path) -> Any:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        return parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise MpocError(f"{file}: not a parquet file, or a truncated one ({error})") from error


def _kind(arrow_type: Any) -> str:
    """What a column of this type can serve as."""
    from pyarrow import types

    if types.is_struct(arrow_type):
        inside = {arrow_type.field(k).name for k in range(arrow_type.num_fields)}
        return "image" if "bytes" in inside else "other"
    if types.is_binary(arrow_type) or types.is_large_binary(arrow_type):
        return "image"
    if types.is_string(arrow_type) or types.is_large_string(arrow_type):
        return "text"
    if types.is_integer(arrow_type) or types.is_boolean(arrow_type) or types.is_floating(arrow_type):
        return "number"
    return "other"


def _choose(file: Path, kinds: dict[str, str], source: DataSource) -> tuple[str, str, str | None]:
    """The column of the examples, its kind, and the column of the labels.

    Raises:
        MpocError: no column for the examples, or several and none with a usual name.
    """
    label = next((name for name in _LABELS if kinds.get(name) in ("number", "text")), None)
    wanted = source.text.column if source.text else None
    if wanted:
        if kinds.get(wanted) != "text":
            raise MpocError(f"{file}: no text column {wanted!r} (found: {', '.join(kinds)})")
        return wanted, "text", label if label != wanted else None
    for kind, usual in (("image", _IMAGES), ("text", _TEXTS)):
        found = [name for name, other in kinds.items() if other == kind and name != label]
        named = [name for name in usual if name in found]
        if len(found) == 1 or named:
            return (named or found)[0], kind, label
        if found:
            hint = "say which with --column" if kind == "text" else f"call one of them {usual[0]!r}"
            raise MpocError(f"{file}: several {kind} columns: {', '.join(found)}", hint)
    listed = ", ".join(kinds) or "nothing"
    raise MpocError(f"{file}: no column of images (a struct with bytes) or of text (found: {listed})")


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """The names that Hugging Face's metadata gives the labels; () where there are none."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        info = json.loads(text)["info"]["features"][label] if text and label else {}
        names = info.get("names") or ()
    except (ValueError, KeyError, TypeError, AttributeError):
        return ()  # metadata of another tool: labels then count for themselves
    return tuple(map(str, names))


def _parquet_labels(files: list[Path], label: str) -> tuple[Column, Where]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        values = [parquet.read_table(file, columns=[label]).column(0).to_pylist() for file in files]
    except (pyarrow.ArrowException, OSError) as error:
        raise MpocError(f"{files[0].parent}: labels cannot be read ({error})") from error
    return _label_column(files, values, label)


def _label_column(files: list[Path], values: list[list[Any]], label: str) -> tuple[Column, Where]:
    """The labels of all files of a split as one array, every one there and of one type."""
    starts = np.cumsum([0, *(len(held) for held in values)])

    def where(row: int) -> str:
        k = int(np.searchsorted(starts, row, side="right")) - 1
        return f"{files[k]}, row {row - int(starts[k])}, {label!r}"

    flat = [value for held in values for value in held]
    known = {str: "text", bool: "number", int: "number", float: "number"}
    for row, value in enumerate(flat):
        if known.get(type(value)) != known.get(type(flat[0])) or type(value) not in known:
            raise MpocError(
                f"{where(row)}: {json.dumps(value, default=str)[:40]} is not a label like the others"
            )
    return np.asarray(flat), where


def open_jsonl(source: DataSource) -> Data:
    """A JSON object a line: a text field, and a label field where there is one.

    Raises:
        MpocError: a line that is no JSON object, no text field or several, a missing value, a bad label.
    """
    first = next(iter(source.files.values()))[0]
    head = next(_lines(first), None)
    if head is None:
        raise MpocError(f"{first}: no examples")
    column, _, label = _choose(first, {name: _json_kind(value) for name, value in head[2].items()}, source)
    absent = [name for name in _LABELS if _json_kind(head[2].get(name)) == "other"]
    texts: dict[str, Rows[str]] = {}
    columns: dict[str, tuple[Column, Where]] = {}
    for split, files in source.files.items():
        offsets: list[list[int]] = []
        values: list[list[Any]] = []
        for file in files:
            offsets.append([])
            values.append([])
            for number, place, row in _lines(file):
                _refuse_other_fields(f"{file}, line {number}", row, column, label, absent)
                offsets[-1].append(place)
                values[-1].append(row.get(label) if label else None)
        texts[split] = JsonRows(files, offsets, column)
        if label:
            columns[split] = _label_column(files, values, label)
    return assemble_documents(source, "jsonl", texts, columns, ())


def _refuse_other_fields(
    where: str, row: dict[str, Any], column: str, label: str | None, absent: list[str]
) -> None:
    """Text and label must lie where they lie in the first line; ``absent`` are label fields that it lacks.

    Raises:
        MpocError: they do not.
    """
    if not isinstance(row.get(column), str):
        raise MpocError(f"{where}: no text in field {column!r}, where the first line has it")
    if label is not None and row.get(label) is None:
        raise MpocError(f"{where}: no label in field {label!r}, where the first line has it")
    other = next((name for name in absent if _json_kind(row.get(name)) != "other"), None)
    if other is not None and label is None:
        raise MpocError(
            f"{where}: a label in field {other!r}, and the first line has none",
            "give every line a label, or none",
        )


def _json_kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "number" if isinstance(value, int | float) else "other"


def _lines(file: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(number of the line from 1, its offset, its object) for every line that is not blank."""
    place = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise MpocError(f"{file}, line {number}: not valid JSON ({error})") from error
                if not isinstance(row, dict):
                    raise MpocError(f"{file}, line {number}: a JSON object was expected")
                yield number, place, row
            place += len(line)
