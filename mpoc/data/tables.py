"""Tables in the layout of Hugging Face data sets: ``.parquet`` and ``.jsonl``.

Examples are a column of images, of text, or of token ids (``input_ids``, with ``attention_mask`` where there
is one); a label column may stand beside it.  Images in parquet are a struct of the encoded ``bytes`` and a
``path``, and the names of the classes are in the schema's metadata:
https://huggingface.co/docs/datasets/image_dataset.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpoc.data.arrays import Column, Where
from mpoc.data.base import Data, DataSource
from mpoc.data.columns import JsonRows, ParquetRows, Rows
from mpoc.data.documents import StoredTokens, assemble_documents, assemble_tokens
from mpoc.data.images import assemble_images
from mpoc.errors import MpocError

_IMAGES = ("image", "img")
_TEXTS = ("text", "sentence", "content", "document")
_LABELS = ("label", "labels", "fine_label", "target", "y")
_IDS, _MASK = "input_ids", "attention_mask"


@dataclass(frozen=True)
class _Columns:
    """The columns of a table that are read."""

    examples: str
    kind: str  # "image", "text" or "tokens"
    label: str | None
    mask: str | None = None  # of token ids
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [name for name in (self.examples, self.mask, self.label) if name]


def _choose(file: Path, kinds: dict[str, str], source: DataSource) -> _Columns:
    """Choose columns by kind and name; ``kinds`` says what each column of the table can serve as.

    Raises:
        MpocError: no column for the examples, or several and none with a usual name.
    """
    label = next((name for name in _LABELS if kinds.get(name) in ("number", "text")), None)
    wanted = source.text.column if source.text else None
    if wanted:
        if kinds.get(wanted) != "text":
            raise MpocError(f"{file}: no text column {wanted!r} (found: {', '.join(kinds)})")
        return _Columns(wanted, "text", label if label != wanted else None)
    if _IDS in kinds:
        if kinds[_IDS] != "tokens" or kinds.get(_MASK, "tokens") != "tokens":
            name = _MASK if kinds[_IDS] == "tokens" else _IDS
            raise MpocError(f"{file}: column {name!r}: a list of integers per row was expected")
        text = next((name for name in _TEXTS if kinds.get(name) == "text"), None)
        notes = (f"column {_IDS!r} is read, not {text!r} (--column {text} reads it)",) if text else ()
        return _Columns(_IDS, "tokens", label, _MASK if _MASK in kinds else None, notes)
    for kind, usual in (("image", _IMAGES), ("text", _TEXTS)):
        candidates = [name for name, other in kinds.items() if other == kind and name != label]
        named = [name for name in usual if name in candidates]
        if len(candidates) == 1 or named:
            return _Columns((named or candidates)[0], kind, label)
        if candidates:
            hint = "choose one with --column" if kind == "text" else f"call one of them {usual[0]!r}"
            raise MpocError(f"{file}: several {kind} columns: {', '.join(candidates)}", hint)
    listed = ", ".join(kinds) or "nothing"
    raise MpocError(
        f"{file}: no column of images (a struct with bytes), of text, or of token ids (input_ids) "
        f"(found: {listed})"
    )


def _noted(source: DataSource, chosen: _Columns) -> DataSource:
    return replace(source, notes=(*source.notes, *chosen.notes))


def _locator(files: list[Path], counts: list[int], column: str) -> Where:
    """Names the file, the row in it and the column of a row of a split."""
    starts = np.cumsum([0, *counts])

    def where(row: int) -> str:
        k = int(np.searchsorted(starts, row, side="right")) - 1
        return f"{files[k]}, row {row - int(starts[k])}, {column!r}"

    return where


def open_parquet(source: DataSource) -> Data:
    """Open parquet files with images (struct with bytes, or bytes), text or token ids, and labels if any.

    Raises:
        MpocError: pyarrow is missing, a damaged file, no such column or several, an empty cell, a bad label.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise MpocError("reading parquet needs pyarrow", "pip install 'mpoc[train]'") from error
    schemas = {file: _schema(file) for files in source.files.values() for file in files}
    first, schema = next(iter(schemas.items()))
    chosen = _choose(first, {field.name: _kind(field.type) for field in schema}, source)
    for file, other in schemas.items():
        for name in chosen.names:
            if name not in other.names or other.field(name).type != schema.field(name).type:
                raise MpocError(f"{file}: column {name!r} is missing, or of another type than in {first}")
    columns = {}
    if chosen.label:
        columns = {split: _parquet_labels(files, chosen.label) for split, files in source.files.items()}
    names = _class_names(schema, chosen.label)
    if chosen.kind == "tokens":
        tokens = {split: _parquet_tokens(files, chosen) for split, files in source.files.items()}
        return assemble_tokens(_noted(source, chosen), "parquet", tokens, columns, names)
    if chosen.kind == "image":
        images: dict[str, Rows[bytes]] = {
            split: ParquetRows(files, chosen.examples) for split, files in source.files.items()
        }
        return assemble_images(source, "parquet", images, columns, names)
    texts: dict[str, Rows[str]] = {
        split: ParquetRows(files, chosen.examples) for split, files in source.files.items()
    }
    return assemble_documents(source, "parquet", texts, columns, names)


def _schema(file: Path) -> Any:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        return parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise MpocError(f"{file}: not a parquet file, or a truncated one ({error})") from error


def _kind(arrow_type: Any) -> str:
    """The role that a column of this type can have."""
    from pyarrow import types

    if types.is_struct(arrow_type):
        fields = {arrow_type.field(k).name for k in range(arrow_type.num_fields)}
        return "image" if "bytes" in fields else "other"
    if types.is_binary(arrow_type) or types.is_large_binary(arrow_type):
        return "image"
    if types.is_string(arrow_type) or types.is_large_string(arrow_type):
        return "text"
    if types.is_integer(arrow_type) or types.is_boolean(arrow_type) or types.is_floating(arrow_type):
        return "number"
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if any(is_kind(arrow_type) for is_kind in lists) and types.is_integer(arrow_type.value_type):
        return "tokens"
    return "other"


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """The class names in Hugging Face's metadata; () where there are none."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        info = json.loads(text)["info"]["features"][label] if text and label else {}
        names = info.get("names") or ()
    except (ValueError, KeyError, TypeError, AttributeError):
        return ()  # metadata of another tool: labels then count for themselves
    return tuple(map(str, names))


def _read_column(files: list[Path], column: str) -> list[Any]:
    """A column of each file, as an arrow array."""
    import pyarrow
    import pyarrow.parquet as parquet

    arrays = []
    for file in files:
        try:
            arrays.append(parquet.read_table(file, columns=[column]).column(0).combine_chunks())
        except (pyarrow.ArrowException, OSError) as error:
            raise MpocError(f"{file}: column {column!r} cannot be read ({error})") from error
    return arrays


def _parquet_labels(files: list[Path], label: str) -> tuple[Column, Where]:
    return _label_column(files, [array.to_pylist() for array in _read_column(files, label)], label)


def _parquet_tokens(files: list[Path], chosen: _Columns) -> StoredTokens:
    ids, lengths = _flattened(files, chosen.examples)
    where = _locator(files, [len(counts) for counts in lengths], chosen.examples)
    tokens = np.concatenate(lengths)
    if chosen.mask is None:
        return StoredTokens(ids, tokens, None, where)
    mask, mask_lengths = _flattened(files, chosen.mask)
    _check_mask_lengths(tokens, np.concatenate(mask_lengths), where)
    return StoredTokens(ids, tokens, mask, where)


def _flattened(files: list[Path], column: str) -> tuple[Any, list[Any]]:
    """The integers of a column of lists (sum of lengths,), and for each file the lengths of its rows."""
    import pyarrow.compute as compute

    values, lengths = [], []
    for file, array in zip(files, _read_column(files, column), strict=True):
        flat = array.flatten()
        if array.null_count or flat.null_count:
            nulls = [row is None or None in row for row in array.to_pylist()]
            raise MpocError(f"{file}, row {nulls.index(True)}, {column!r}: empty (null)")
        values.append(flat.to_numpy(zero_copy_only=False).astype(np.int64))
        lengths.append(compute.list_value_length(array).to_numpy(zero_copy_only=False).astype(np.int64))
    return np.concatenate(values), lengths


def _check_mask_lengths(tokens: Any, mask: Any, where: Where) -> None:
    different = np.flatnonzero(tokens != mask)
    if len(different):
        row = int(different[0])
        raise MpocError(f"{where(row)}: {tokens[row]} token ids, but {mask[row]} numbers in attention_mask")


def _label_column(files: list[Path], values: list[list[Any]], label: str) -> tuple[Column, Where]:
    """The labels of all files of a split as one array, none missing and all of one type."""
    where = _locator(files, [len(labels) for labels in values], label)
    flat = [value for labels in values for value in labels]
    known = {str: "text", bool: "number", int: "number", float: "number"}
    for row, value in enumerate(flat):
        if known.get(type(value)) != known.get(type(flat[0])) or type(value) not in known:
            raise MpocError(
                f"{where(row)}: {json.dumps(value, default=str)[:40]} is not a label like the others"
            )
    return np.asarray(flat), where


def open_jsonl(source: DataSource) -> Data:
    """Open files of JSON objects, one per line, with a field of text or of token ids, and labels if any.

    Raises:
        MpocError: a line that is no JSON object, no such field or several, a missing value, a bad label.
    """
    first = next(iter(source.files.values()))[0]
    head = next(_lines(first), None)
    if head is None:
        raise MpocError(f"{first}: no examples")
    kinds = {name: _json_kind(value) for name, value in head[2].items()}
    chosen = _choose(first, kinds, source)
    absent = [name for name in _LABELS if kinds.get(name) not in ("text", "number")]
    texts: dict[str, Rows[str]] = {}
    tokens: dict[str, StoredTokens] = {}
    columns: dict[str, tuple[Column, Where]] = {}
    for split, files in source.files.items():
        read = [_read_lines(file, chosen, absent) for file in files]
        if chosen.label:
            columns[split] = _label_column(files, [lines.labels for lines in read], chosen.label)
        if chosen.kind == "tokens":
            tokens[split] = _json_tokens(files, read, chosen)
        else:
            texts[split] = JsonRows(files, [lines.offsets for lines in read], chosen.examples)
    if chosen.kind == "tokens":
        return assemble_tokens(_noted(source, chosen), "jsonl", tokens, columns, ())
    return assemble_documents(source, "jsonl", texts, columns, ())


@dataclass(frozen=True)
class _Lines:
    """The kept fields of a file of JSON lines."""

    offsets: list[int]
    labels: list[Any]
    ids: list[list[int]]  # [] for text
    masks: list[list[int]]


def _read_lines(file: Path, chosen: _Columns, absent: list[str]) -> _Lines:
    """Read a file; ``absent`` are the label fields that the first line lacks."""
    lines = _Lines([], [], [], [])
    for number, offset, row in _lines(file):
        _check_fields(f"{file}, line {number}", row, chosen, absent)
        lines.offsets.append(offset)
        lines.labels.append(row.get(chosen.label) if chosen.label else None)
        if chosen.kind == "tokens":
            lines.ids.append(row[_IDS])
            lines.masks.append(row[_MASK] if chosen.mask else [])
    return lines


def _check_fields(where: str, row: dict[str, Any], chosen: _Columns, absent: list[str]) -> None:
    """Check that a line has its example and label in the fields of the first line.

    Raises:
        MpocError: it has not.
    """
    for name in filter(None, (chosen.examples, chosen.mask)):
        if _json_kind(row.get(name)) != chosen.kind:
            what = "text" if chosen.kind == "text" else "list of integers"
            raise MpocError(f"{where}: no {what} in field {name!r}, where the first line has it")
    if chosen.label is not None and row.get(chosen.label) is None:
        raise MpocError(f"{where}: no label in field {chosen.label!r}, where the first line has it")
    other = next((name for name in absent if _json_kind(row.get(name)) in ("text", "number")), None)
    if other is not None and chosen.label is None:
        raise MpocError(
            f"{where}: a label in field {other!r}, and the first line has none",
            "give every line a label, or none",
        )


def _json_tokens(files: list[Path], read: Sequence[_Lines], chosen: _Columns) -> StoredTokens:
    rows = [ids for lines in read for ids in lines.ids]
    where = _locator(files, [len(lines.ids) for lines in read], chosen.examples)
    lengths = np.array([len(ids) for ids in rows], np.int64)
    masks = [mask for lines in read for mask in lines.masks]
    if chosen.mask:
        _check_mask_lengths(lengths, np.array([len(mask) for mask in masks], np.int64), where)
    return StoredTokens(_integers(rows), lengths, _integers(masks) if chosen.mask else None, where)


def _integers(rows: list[list[int]]) -> Any:
    """The numbers of all rows, (sum of lengths,) int64; those that int64 cannot hold are clamped."""
    least, most = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    return np.array([min(max(value, least), most) for row in rows for value in row], np.int64)


def _json_kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(type(number) is int for number in value):
        return "tokens"
    return "number" if isinstance(value, int | float) else "other"


def _lines(file: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(number of the line from 1, its offset, its object) for every line that is not blank."""
    offset = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise MpocError(f"{file}, line {number}: not valid JSON ({error})") from error
                if not isinstance(row, dict):
                    raise MpocError(f"{file}, line {number}: not a JSON object")
                yield number, offset, row
            offset += len(line)
