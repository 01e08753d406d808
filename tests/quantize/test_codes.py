"""Matrices in codes: their numbers, their tensors in a file, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.quantize.codes import CodedTensor, GridTensor, QuantizedTensor, quantized_from_tensors
from mpoc.quantize.storage import GRID_BITS, Coded, Grid, Storage

SHAPE = 6, 128
NAME = "fc.weight"


def a_grid(spec: Grid) -> GridTensor:
    generator = torch.Generator().manual_seed(spec.bits)
    sizes = SHAPE[0], spec.groups(SHAPE[1])

    def integers(size: tuple[int, int]) -> Tensor:
        return torch.randint(0, spec.levels, size, generator=generator, dtype=torch.uint8)

    scale = torch.rand(sizes, generator=generator).half()
    return GridTensor(integers(SHAPE), scale, None if spec.symmetric else integers(sizes), spec)


def a_coded() -> CodedTensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-9, 10, SHAPE, generator=generator, dtype=torch.int8)
    by_row, by_column = (
        torch.randint(0, 16, (size,), generator=generator, dtype=torch.int8) for size in SHAPE
    )
    return CodedTensor(codes, by_row, by_column, 0.125)


GRIDS = [
    Grid(bits, group, symmetric) for bits in GRID_BITS for group in (32, None) for symmetric in (True, False)
]
MATRICES: list[tuple[Storage, QuantizedTensor]] = [
    *((spec, a_grid(spec)) for spec in GRIDS),
    (Coded(), a_coded()),
]


@pytest.mark.parametrize(
    ("spec", "matrix"), MATRICES, ids=lambda value: str(value) if isinstance(value, Storage) else ""
)
def test_file_gives_the_same_numbers(spec: Storage, matrix: QuantizedTensor) -> None:
    tensors = matrix.tensors(NAME)
    again = quantized_from_tensors(tensors, NAME, spec, SHAPE)
    assert torch.equal(again.values(), matrix.values())
    assert torch.equal(again.codes, matrix.codes)
    assert matrix.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    multiples = torch.where(matrix.steps() > 0, matrix.values() / matrix.steps(), 0).round()
    if isinstance(matrix, GridTensor):
        assert torch.equal(matrix.of_multiples(matrix.lowest()).codes, torch.zeros_like(matrix.codes))
    assert torch.equal(matrix.of_multiples(multiples).values(), matrix.values())


def test_values_of_a_grid() -> None:
    matrix = a_grid(Grid(4, 32))
    assert matrix.zero_point is not None
    for i in range(SHAPE[0]):
        for j in range(SHAPE[1]):
            difference = int(matrix.codes[i, j]) - int(matrix.zero_point[i, j // 32])
            assert matrix.values()[i, j] == difference * matrix.scale[i, j // 32].float()
            assert matrix.steps()[i, j] == matrix.scale[i, j // 32].float()
    symmetric = a_grid(Grid(4, symmetric=True))
    assert torch.equal(symmetric.values(), (symmetric.codes.float() - 8) * symmetric.scale.float())


def test_values_of_coded() -> None:
    matrix = a_coded()
    for i in range(SHAPE[0]):
        for j in range(SHAPE[1]):
            step = 0.125 * 2 ** ((int(matrix.row_exponents[i]) + int(matrix.column_exponents[j])) / 2)
            assert float(matrix.steps()[i, j]) == pytest.approx(step, rel=1e-6)
            assert float(matrix.values()[i, j]) == pytest.approx(int(matrix.codes[i, j]) * step, rel=1e-6)


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.pop("fc.weight_scale"), "'fc.weight_scale' is missing"),
        (lambda file: file.pop("fc.weight_zero_point"), "'fc.weight_zero_point' is missing"),
        (
            lambda file: file.update({"fc.weight_packed": file["fc.weight_packed"][:, 1:]}),
            r"'fc.weight_packed': has shape \(6, 15\), expected \(6, 16\)",
        ),
        (
            lambda file: file.update({"fc.weight_packed": file["fc.weight_packed"].long()}),
            "has dtype torch.int64, expected torch.int32",
        ),
        (lambda file: file["fc.weight_scale"].fill_(float("nan")), "negative or not finite"),
        (lambda file: file["fc.weight_scale"].fill_(-1.0), "negative or not finite"),
        (lambda file: file["fc.weight_shape"].fill_(7), r"says \(7, 7\), expected \(6, 128\)"),
    ],
)
def test_rejects_other_tensors_of_a_grid(change: Change, message: str) -> None:
    spec = Grid(4, 32)
    tensors = {name: tensor.clone() for name, tensor in a_grid(spec).tensors(NAME).items()}
    change(tensors)
    with pytest.raises(MpocError, match=message):
        GridTensor.from_tensors(tensors, NAME, spec, SHAPE)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "'fc.weight_coded' is missing"),
        ({"fc.weight_coded": torch.zeros(9)}, "has dtype torch.float32, expected torch.uint8"),
        ({"fc.weight_coded": torch.zeros(3, 3, dtype=torch.uint8)}, "expected one dimension"),
        ({"fc.weight_coded": a_coded().stream[:-1]}, "'fc.weight_coded': the coded stream is damaged"),
    ],
)
def test_rejects_other_coded_tensors(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(MpocError, match=message):
        CodedTensor.from_tensors(tensors, NAME, SHAPE)
