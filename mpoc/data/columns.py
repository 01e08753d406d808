"""Columns of encoded values: images as PNG or JPEG bytes, documents as strings.

A column is read in order (:meth:`Rows.scan`, to check and decode every value once) and by index
(:meth:`Rows.take`, for sets that are larger than memory).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from mpoc.data.base import CHUNKS_AT_ONCE
from mpoc.errors import MpocError

Value = TypeVar("Value", bytes, str)
ROWS_AT_ONCE = 512  # rows that a scan holds in memory


class Rows(ABC, Generic[Value]):
    """Encoded values of one split."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The file and the row in it, for messages."""

    @abstractmethod
    def scan(self) -> Iterator[list[Value]]:
        """All values in order, at most ``ROWS_AT_ONCE`` at a time."""

    @abstractmethod
    def take(self, indices: Sequence[int]) -> list[Value]:
        """The values at these indices, in this order."""

    def chunks(self) -> Tensor | None:
        """(n,) the chunk that holds each row; None where rows are read one by one."""
        return None


class FileRows(Rows[bytes]):
    """One file per row."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The path of the file."""
        return str(self.files[index])

    def scan(self) -> Iterator[list[bytes]]:
        """The bytes of all files, in order."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield self.take(range(start, min(start + ROWS_AT_ONCE, len(self))))

    def take(self, indices: Sequence[int]) -> list[bytes]:
        """The bytes of the files at these indices."""
        return [self._read(self.files[index]) for index in indices]

    @staticmethod
    def _read(file: Path) -> bytes:
        try:
            return file.read_bytes()
        except OSError as error:
            raise MpocError(f"{file}: cannot be read ({error.strerror})") from error


class HeldRows(Rows[bytes]):
    """Values of other rows that were read and stay in memory until they are dropped."""

    def __init__(self, rows: Rows[bytes], values: list[bytes]) -> None:
        self._rows, self._values = rows, values

    def __len__(self) -> int:
        return len(self._values)

    def name(self, index: int) -> str:
        """As the rows name it."""
        return self._rows.name(index)

    def scan(self) -> Iterator[list[bytes]]:
        """All values, in order."""
        yield self._values

    def take(self, indices: Sequence[int]) -> list[bytes]:
        """The values at these indices."""
        return [self._values[index] for index in indices]

    def drop(self, indices: Sequence[int]) -> None:
        """Free the values at these indices."""
        for index in indices:
            self._values[index] = b""


class ParquetRows(Rows[Value]):
    """A column of parquet files, read one row group at a time; the last few groups are cached."""

    def __init__(self, files: list[Path], column: str) -> None:
        import pyarrow.parquet as parquet

        self.files: list[Path] = files
        self.column: str = column
        sizes: list[int] = []
        self._groups: list[tuple[Path, int, int]] = []  # file, group in it, first row in the file
        for file in files:
            metadata = parquet.read_metadata(file)
            first = 0
            for group in range(metadata.num_row_groups):
                self._groups.append((file, group, first))
                rows: int = metadata.row_group(group).num_rows
                sizes.append(rows)
                first += rows
        self._starts = np.cumsum([0, *sizes])
        self._cache: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def name(self, index: int) -> str:
        """File, row and column."""
        group = self._group_of(index)
        file, _, first = self._groups[group]
        return f"{file}, row {first + index - int(self._starts[group])}, column {self.column!r}"

    def chunks(self) -> Tensor:
        """(n,) the row group of each row."""
        sizes = torch.from_numpy(np.diff(self._starts))
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)

    def scan(self) -> Iterator[list[Value]]:
        """All values of the column, in order."""
        import pyarrow
        import pyarrow.parquet as parquet

        start = 0
        for file in self.files:
            try:
                with parquet.ParquetFile(file) as table:
                    for batch in table.iter_batches(ROWS_AT_ONCE, columns=[self.column]):
                        values = self._values(batch.column(0), range(start, start + batch.num_rows))
                        start += batch.num_rows
                        yield values
            except (pyarrow.ArrowException, OSError) as error:
                raise MpocError(f"{file}: damaged parquet near row {start} ({error})") from error

    def take(self, indices: Sequence[int]) -> list[Value]:
        """The values at these indices; each row group is read once."""
        import pyarrow

        wanted: dict[int, list[int]] = {}
        for position, index in enumerate(indices):
            wanted.setdefault(self._group_of(index), []).append(position)
        values_at: dict[int, Value] = {}
        for group in sorted(wanted):
            rows = [indices[position] for position in wanted[group]]
            inside = pyarrow.array([row - int(self._starts[group]) for row in rows])
            values = self._values(self._read_group(group).take(inside), rows)
            values_at.update(zip(wanted[group], values, strict=True))
        return [values_at[position] for position in range(len(indices))]

    def _read_group(self, group: int) -> Any:
        """The column of one row group, from the cache or the file (reopened: workers share no handle)."""
        import pyarrow
        import pyarrow.parquet as parquet

        if group not in self._cache:
            file, inside, _ = self._groups[group]
            try:
                with parquet.ParquetFile(file) as table:
                    column = table.read_row_group(inside, columns=[self.column], use_threads=False).column(0)
            except (pyarrow.ArrowException, OSError) as error:
                raise MpocError(f"{file}: damaged parquet, row group {inside} ({error})") from error
            while len(self._cache) >= CHUNKS_AT_ONCE:
                self._cache.popitem(last=False)
            self._cache[group] = column
        self._cache.move_to_end(group)
        return self._cache[group]

    def _values(self, column: Any, rows: Sequence[int]) -> list[Value]:
        values: list[Value] = []
        for row, value in zip(rows, column.to_pylist(), strict=True):
            content = value["bytes"] if isinstance(value, dict) else value
            if content is None:
                raise MpocError(f"{self.name(row)}: empty (null)", "embed images in the file, as bytes")
            values.append(content)
        return values


class JsonRows(Rows[str]):
    """A text field of JSON lines, read by the offsets of the lines."""

    def __init__(self, files: list[Path], offsets: list[list[int]], column: str) -> None:
        self.files = files
        self.column = column
        self._offsets = np.concatenate([np.asarray(places, np.int64) for places in offsets])
        self._starts = np.cumsum([0, *(len(places) for places in offsets)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, index: int) -> str:
        """File, row (blank lines not counted) and field."""
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self.files[file]}, row {index - int(self._starts[file])}, field {self.column!r}"

    def scan(self) -> Iterator[list[str]]:
        """All values of the field, in order."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield self.take(range(start, min(start + ROWS_AT_ONCE, len(self))))

    def take(self, indices: Sequence[int]) -> list[str]:
        """The values at these indices, parsed again from their lines."""
        owners = np.searchsorted(self._starts, np.asarray(indices), side="right") - 1
        values: dict[int, str] = {}
        for owner in np.unique(owners).tolist():
            with self.files[owner].open("rb") as file:
                for position in np.flatnonzero(owners == owner).tolist():
                    file.seek(int(self._offsets[indices[position]]))
                    values[position] = json.loads(file.readline())[self.column]
        return [values[position] for position in range(len(indices))]
