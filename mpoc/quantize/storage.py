"""How the numbers of a tensor are stored, as plain data for recipes and manifests.  No torch here.

A stored tensor is read as a matrix (rows, columns) whose columns are the contracted axis.

- :class:`Grid`: integer codes of a fixed width, with a scale (and a zero point) for each group of columns
  of a row.  The layout is that of compressed-tensors ("pack-quantized"), which other software reads.
- :class:`Coded`: integer codes without limits, steps by row and by column, entropy-coded into one stream.
  The smallest file at a given error, since no bits are spent on codes that are rare.

``None`` stands for plain floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mpoc.errors import UsageError, shortened

GRID_BITS = (2, 3, 4, 5, 6, 8)
# What a grid tries first as its group; the first that divides the columns is taken.
GROUPS = (64, 32)


@dataclass(frozen=True)
class Grid:
    """Codes of ``bits`` bits in groups: value = (code − zero point) · scale.

    Symmetric grids store no zero points; theirs is 2^(bits − 1).

    Raises:
        UsageError: the bits are not one of ``GRID_BITS``, or the group is not positive.
    """

    kind: ClassVar[str] = "grid"

    bits: int
    group: int | None = None  # columns that share a scale; None: the whole row
    symmetric: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in GRID_BITS:
            widths = ", ".join(map(str, GRID_BITS))
            raise UsageError(f"the bits of a grid must be one of {widths}, got {shortened(self.bits)}")
        if self.group is not None and (type(self.group) is not int or self.group < 1):
            raise UsageError(f"the group of a grid must be a positive integer, got {shortened(self.group)}")
        if type(self.symmetric) is not bool:
            raise UsageError(f"'symmetric' of a grid must be true or false, got {shortened(self.symmetric)}")

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    def groups(self, columns: int) -> int:
        """Number of groups in a row of ``columns``.

        Raises:
            UsageError: the group does not divide the columns.
        """
        if self.group is None:
            return 1
        if columns % self.group:
            raise UsageError(f"a group of {self.group} does not divide {columns} columns")
        return columns // self.group

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a (rows, columns) matrix in the file: codes, scales, zero points and shape.

        Raises:
            UsageError: the group does not divide the columns.
        """
        groups = self.groups(columns)
        zero_points = 0 if self.symmetric else groups * packed_words(rows, self.bits)
        return 4 * (rows * packed_words(columns, self.bits) + zero_points) + 2 * rows * groups + 16

    def as_json(self) -> dict[str, Any]:
        """Plain data, which :func:`storage_from_json` reads."""
        return {"kind": self.kind, "bits": self.bits, "group": self.group, "symmetric": self.symmetric}


@dataclass(frozen=True)
class Coded:
    """Codes without limits, entropy-coded: value = code · scale · √2^(row exponent + column exponent)."""

    kind: ClassVar[str] = "coded"

    def as_json(self) -> dict[str, Any]:
        """Plain data, which :func:`storage_from_json` reads."""
        return {"kind": self.kind}


Storage = Grid | Coded


def default_grid(bits: int, columns: int) -> Grid:
    """The asymmetric grid of a width: in groups of 64 or 32 if that divides the columns, else by row.

    Raises:
        UsageError: the bits are not one of ``GRID_BITS``.
    """
    return Grid(bits, next((group for group in GROUPS if columns % group == 0), None))


def packed_words(count: int, bits: int) -> int:
    """Words of 32 bits that hold ``count`` codes of ``bits`` bits."""
    return -(-count * bits // 32)


def storage_from_json(value: object) -> Storage | None:
    """The storage that :meth:`Grid.as_json` or :meth:`Coded.as_json` wrote; ``None`` for floats.

    Raises:
        UsageError: the value is not the JSON of a storage.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise UsageError(f"a storage must be an object, got {shortened(value)}")
    fields = dict(value)
    match fields.pop("kind", None), sorted(fields):
        case "coded", []:
            return Coded()
        case "grid", ["bits", "group", "symmetric"]:
            return Grid(**fields)
    raise UsageError(f"a storage must be a grid (bits, group, symmetric) or coded, got {shortened(value)}")
