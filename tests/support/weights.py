"""Weights of every kind for the tests: small structures, random data, and Eq. (5) spelt out in loops."""

import itertools
import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from mpoc.tensor_networks.structure import Structure, make_structure

# One of each: convolutions with C_in / groups = 1 among them, a prime vocabulary (padded), thin sides.
EVERY_KIND = [
    make_structure("linear", (12, 8)),
    make_structure("linear", (8, 12), transposed=True),
    make_structure("linear", (1, 12)),
    make_structure("linear", (12, 1)),
    make_structure("conv1d", (6, 4, 3)),
    make_structure("conv2d", (8, 4, 3, 2)),
    make_structure("conv2d", (12, 1, 3, 3)),
    make_structure("conv2d", (6, 4, 1, 1)),
    make_structure("conv3d", (4, 6, 2, 1, 3)),
    make_structure("embedding", (101, 8), sites=3),
    make_structure("embedding", (53, 29), sites=2),
    make_structure("experts", (3, 8, 4)),
    make_structure("experts", (3, 4, 8), transposed=True),
    make_structure("experts", (1, 4, 8)),
]


def shape_id(structure: Structure) -> str:
    """``conv2d-8x4x3x2``, for the names of parametrised tests."""
    orientation = "-transposed" if structure.transposed else ""
    return f"{structure.kind}-{'x'.join(map(str, structure.shape))}{orientation}"


_SIDE = st.integers(1, 60)
_TAPS = st.integers(1, 3)


def structures() -> st.SearchStrategy[Structure]:
    """Structures of all kinds with sides up to 60, automatic factors and 2 to 4 sites."""
    weights = st.one_of(
        st.tuples(st.sampled_from(["linear", "embedding"]), st.tuples(_SIDE, _SIDE)),
        st.tuples(st.just("conv1d"), st.tuples(_SIDE, _SIDE, _TAPS)),
        st.tuples(st.just("conv2d"), st.tuples(_SIDE, _SIDE, _TAPS, _TAPS)),
        st.tuples(st.just("conv3d"), st.tuples(st.integers(1, 20), _SIDE, _TAPS, _TAPS, _TAPS)),
        st.tuples(st.just("experts"), st.tuples(st.integers(1, 4), _SIDE, _SIDE)),
    )
    return st.builds(_structure, weights, st.booleans(), st.integers(2, 4))


def _structure(weight: tuple[str, tuple[int, ...]], transposed: bool, sites: int) -> Structure:
    kind, shape = weight
    return make_structure(kind, shape, transposed and kind in ("linear", "experts"), sites)


def random_weight(structure: Structure, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Gaussian, of the structure's shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(structure.shape, generator=generator, dtype=torch.float64).to(dtype)


def random_cores(structure: Structure, max_bond: int, seed: int = 0) -> list[Tensor]:
    """Gaussian float64 cores with the structure's capped bonds."""
    generator = torch.Generator().manual_seed(seed)
    shapes = structure.core_shapes(structure.bonds(max_bond))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_eq_5(cores: Sequence[Tensor], structure: Structure) -> Tensor:
    """The weight of these cores, entry by entry: W[j, i] = w⁽¹⁾[j_1, i_1] … w⁽ⁿ⁾[j_n, i_n]."""
    weight = torch.zeros(structure.shape, dtype=torch.float64)
    for js in itertools.product(*map(range, structure.output_factors)):
        for i_s in itertools.product(*map(range, structure.input_factors)):
            place = _place(structure, js, i_s)
            if place is not None:
                product = torch.eye(1, dtype=torch.float64)
                for core, j, i in zip(cores, js, i_s, strict=True):
                    product = product @ core[:, j, i, :].double()
                weight[place] = product.item()
    return weight


def _place(structure: Structure, js: tuple[int, ...], i_s: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where entry (j_1…j_n, i_1…i_n) lies in the weight as stored; None: in the padding."""
    lead, skip = 0, structure.lead_sites
    if skip:
        lead = js[0] if structure.kind == "experts" else i_s[0]
    row = _row_major(js[skip:], structure.output_factors[skip:])
    column = _row_major(i_s[skip:], structure.input_factors[skip:])
    if row >= structure.outputs or column >= structure.inputs:
        return None
    if structure.kind.startswith("conv"):
        return (row, column, *_unravel(lead, structure.shape[2:]))
    sides = (column, row) if structure.transposed else (row, column)
    return (lead, *sides) if structure.kind == "experts" else sides


def _row_major(digits: tuple[int, ...], base: tuple[int, ...]) -> int:
    return sum(digit * math.prod(base[k + 1 :]) for k, digit in enumerate(digits))


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return next(itertools.islice(itertools.product(*map(range, shape)), index, None))


def as_one_matrix(kind: str, weight: Tensor, transposed: bool) -> Tensor:
    """Element by element as the form's words say: taps with the inputs, experts with the outputs."""
    if kind.startswith("conv"):
        rows = []
        for output in weight:
            taps = output.flatten(1)  # (C_in, taps)
            rows.append(torch.stack([taps[c, t] for t in range(taps.shape[1]) for c in range(len(taps))]))
        return torch.stack(rows)
    blocks = weight.reshape(-1, *weight.shape[-2:])
    return torch.cat([block.T if transposed else block for block in blocks])
