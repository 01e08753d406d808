"""Weights of every kind interleaved and back."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.tensor_networks.forms.layout import (
    deinterleave,
    from_matrix,
    interleave,
    to_matrix,
    unpadded,
    working_dtype,
)
from mpoc.tensor_networks.structure import Structure, low_rank_structure, make_structure
from tests.support.weights import EVERY_KIND, as_one_matrix, random_weight, shape_id, structures

SOME = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_interleave_matches_index_loops() -> None:
    structure = make_structure("linear", (6, 20), factors=((2, 3), (4, 5)))
    weight = random_weight(structure)
    tensor = interleave(weight, structure)
    assert tensor.shape == (8, 15)
    for j1, j2, i1, i2 in itertools.product(range(2), range(3), range(4), range(5)):
        assert tensor[4 * j1 + i1, 5 * j2 + i2] == weight[3 * j1 + j2, 5 * i1 + i2]


def test_taps_come_first() -> None:
    structure = make_structure("conv2d", (4, 6, 3, 2), factors=((2, 2), (3, 2)))
    weight = random_weight(structure)
    tensor = interleave(weight, structure)
    assert tensor.shape == (6, 6, 4)
    for y, x in itertools.product(range(3), range(2)):
        tap = make_structure("linear", (4, 6), factors=((2, 2), (3, 2)))
        assert torch.equal(tensor[2 * y + x], interleave(weight[:, :, y, x], tap))


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_come_first_in_both_orientations(transposed: bool) -> None:
    structure = make_structure("experts", (3, 4, 6), transposed)
    weight = random_weight(structure)
    tensor = interleave(weight, structure)
    for k in range(3):
        matrix = weight[k].T if transposed else weight[k]
        one = make_structure("linear", (structure.outputs, structure.inputs))
        assert torch.equal(tensor[k], interleave(matrix, one))


def test_transposed_structure_transposes_the_weight() -> None:
    conv1d = make_structure("linear", (8, 12), transposed=True)
    linear = make_structure("linear", (12, 8))
    weight = random_weight(conv1d)
    assert torch.equal(interleave(weight, conv1d), interleave(weight.T, linear))


def test_padding_is_zero_and_trailing() -> None:
    structure = make_structure("embedding", (53, 29), sites=2)
    rows, columns = structure.padded
    assert (rows, columns) != (53, 29)
    whole = make_structure("linear", structure.padded, factors=_without_lead(structure))
    padded = torch.zeros(rows, columns, dtype=torch.float64)
    weight = padded[:53, :29] = random_weight(structure)
    assert torch.equal(interleave(weight, structure), interleave(padded, whole))


def _without_lead(structure: Structure) -> tuple[tuple[int, ...], tuple[int, ...]]:
    skip = structure.lead_sites
    return structure.output_factors[skip:], structure.input_factors[skip:]


@SOME
@given(structures(), st.sampled_from(DTYPES))
def test_deinterleave_undoes_interleave(structure: Structure, dtype: torch.dtype) -> None:
    weight = random_weight(structure, dtype)
    tensor = interleave(weight, structure)
    assert tensor.shape == structure.site_sizes and tensor.is_contiguous()
    assert tensor.dtype == working_dtype(dtype)
    back = deinterleave(tensor, structure)
    assert back.is_contiguous()
    assert torch.equal(back, weight.to(working_dtype(dtype)))


@SOME
@given(structures())
def test_interleave_undoes_deinterleave_up_to_padding(structure: Structure) -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(structure.site_sizes, generator=generator, dtype=torch.float64)
    inside = unpadded(structure, tensor.device)
    assert torch.equal(interleave(deinterleave(tensor, structure), structure), tensor * inside)


@SOME
@given(structures())
def test_unpadded_marks_the_entries_of_the_weight(structure: Structure) -> None:
    ones = torch.ones(structure.shape, dtype=torch.float64)
    inside = unpadded(structure, torch.device("cpu"))
    assert inside.dtype == torch.bool
    assert torch.equal(inside.double(), interleave(ones, structure))
    assert int(inside.sum()) == structure.num_original


@pytest.mark.parametrize("structure", EVERY_KIND, ids=shape_id)
def test_from_matrix_undoes_to_matrix(structure: Structure) -> None:
    weight = random_weight(structure)
    matrix = to_matrix(weight, structure)
    assert matrix.shape == (structure.lead, structure.outputs, structure.inputs)
    back = from_matrix(matrix, structure)
    assert torch.equal(back, weight) and back.is_contiguous()


def test_accepts_any_strides() -> None:
    structure = make_structure("conv2d", (8, 4, 3, 3))
    weight = random_weight(structure)
    channels_last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(interleave(channels_last, structure), interleave(weight, structure))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_arithmetic_is_float32_or_better(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert working_dtype(dtype) == expected


ONE_MATRIX = [
    ("linear", (12, 20), False),
    ("linear", (20, 12), True),
    ("embedding", (30, 8), False),
    ("conv1d", (6, 8, 3), False),
    ("conv2d", (6, 8, 3, 2), False),
    ("experts", (4, 10, 6), False),
    ("experts", (4, 10, 6), True),
]


@pytest.mark.parametrize(("kind", "shape", "transposed"), ONE_MATRIX)
def test_matrix_round_trip(kind: str, shape: tuple[int, ...], transposed: bool) -> None:
    structure = low_rank_structure(kind, shape, transposed)
    weight = torch.randn(shape, dtype=torch.float64)
    matrix = to_matrix(weight, structure)
    assert structure.form == "svd"
    assert torch.equal(matrix[0], as_one_matrix(kind, weight, transposed))
    assert torch.equal(from_matrix(matrix, structure), weight)
    assert structure.num_parameters(2) == 2 * (matrix.shape[1] + matrix.shape[2])


def test_other_factors_are_not_svd() -> None:
    assert make_structure("linear", (12, 20), factors=((12, 1), (1, 20))).form == "svd"
    assert make_structure("linear", (12, 20), factors=((1, 12), (20, 1))).form == "mpo"
    assert make_structure("conv2d", (12, 20, 3, 3)).form == "mpo"
