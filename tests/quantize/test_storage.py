"""Storages as plain data: JSON, bytes, and what is refused."""

from __future__ import annotations

import pytest

from mpoc.errors import UsageError
from mpoc.quantize.storage import GRID_BITS, Coded, Grid, Storage, default_grid, storage_from_json

STORAGES: list[Storage | None] = [None, Coded(), Grid(4), Grid(3, 32), Grid(8, 128, symmetric=True)]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_json_round_trip(storage: Storage | None) -> None:
    assert storage_from_json(storage and storage.as_json()) == storage


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kind": "grid", "bits": 7, "group": 64, "symmetric": False}, "one of 2, 3, 4, 5, 6, 8, got 7"),
        ({"kind": "grid", "bits": True, "group": 64, "symmetric": False}, "got True"),
        ({"kind": "grid", "bits": 4, "group": 0, "symmetric": False}, "positive integer, got 0"),
        ({"kind": "grid", "bits": 4, "group": 64, "symmetric": 1}, "true or false, got 1"),
        ({"kind": "grid", "bits": 4}, "must be a grid"),
        ({"kind": "coded", "bits": 4}, "must be a grid"),
        ({"kind": ["coded"]}, "must be a grid"),
        ("coded", "must be an object"),
    ],
)
def test_rejects_other_json(value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        storage_from_json(value)


def test_bits_a_weight_are_those_of_the_formula() -> None:
    rows, columns = 512, 1024
    for bits in GRID_BITS:
        for group in (32, 64, 128):
            asymmetric = Grid(bits, group).stored_bytes(rows, columns) - 16
            symmetric = Grid(bits, group, symmetric=True).stored_bytes(rows, columns) - 16
            assert 8 * asymmetric / (rows * columns) == bits + (16 + bits) / group
            assert 8 * symmetric / (rows * columns) == bits + 16 / group


def test_group_must_divide_the_columns() -> None:
    assert Grid(4, 32).groups(96) == 3
    assert Grid(4).groups(7) == 1
    with pytest.raises(UsageError, match="a group of 32 does not divide 100 columns"):
        Grid(4, 32).groups(100)


@pytest.mark.parametrize(("columns", "group"), [(384, 64), (96, 32), (100, None)])
def test_default_group(columns: int, group: int | None) -> None:
    assert default_grid(4, columns) == Grid(4, group)
