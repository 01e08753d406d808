"""Learnt orders: exchanges against brute force, a mixed weight, never worse than the weight's own."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mpoc.tensor_networks.fit.decompose import exchange, learn_order
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.fit.tt_svd import tt_svd
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.weights import random_cores, random_weight

STRUCTURE = make_structure("linear", (16, 24), factors=((4, 2, 2), (2, 3, 4)))


def error(weight: Tensor, structure: Structure, bond: int, order: tuple[int, ...]) -> float:
    return tt_svd(weight, replace(structure, order=order), Truncation(bond)).relative_error


def test_exchanges_stop_at_a_local_optimum() -> None:
    torch.manual_seed(0)
    products = torch.randn(7, 7, dtype=torch.float64)
    found = exchange(products, torch.arange(7))
    assert sorted(found.tolist()) == list(range(7))

    def value(order: list[int]) -> float:
        return sum(float(products[column, place]) for place, column in enumerate(order))

    reached = value(found.tolist())
    assert reached >= value(list(range(7)))
    for p, q in itertools.combinations(range(7), 2):
        other = found.tolist()
        other[p], other[q] = other[q], other[p]
        assert value(other) <= reached + 1e-9
    best = max(value(list(order)) for order in itertools.permutations(range(7)))
    assert reached >= 0.9 * best


def test_restores_exchanged_columns() -> None:
    torch.manual_seed(0)
    columns = torch.randn(16, 24, dtype=torch.float64)
    mixed = torch.randperm(24)
    found = exchange(columns[:, mixed].T @ columns, torch.arange(24))
    assert torch.equal(columns[:, mixed][:, found], columns)


@pytest.mark.parametrize("transposed", [False, True])
def test_learned_order_reduces_the_error(transposed: bool) -> None:
    weight = MPO(random_cores(STRUCTURE, 2), STRUCTURE).to_weight()
    mixed = weight[:, torch.randperm(24, generator=torch.Generator().manual_seed(1))]
    structure = STRUCTURE
    if transposed:
        mixed, structure = mixed.T.contiguous(), replace(STRUCTURE, shape=(24, 16), transposed=True)
    order = learn_order(mixed, structure, 2)
    assert error(mixed, structure, 2, order) < 0.8 * error(mixed, structure, 2, ())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bond", [1, 4])
def test_never_worse_than_the_original_order(seed: int, bond: int) -> None:
    weight = random_weight(STRUCTURE, torch.float32, seed)
    order = learn_order(weight, STRUCTURE, bond)
    assert sorted(order) == list(range(24))
    assert error(weight, STRUCTURE, bond, order) <= error(weight, STRUCTURE, bond, ()) + 1e-6


def test_keeps_a_good_order() -> None:
    weight = MPO(random_cores(STRUCTURE, 2), STRUCTURE).to_weight()
    assert learn_order(weight, STRUCTURE, 2) == tuple(range(24))


def test_padded_inputs_keep_their_position() -> None:
    structure = Structure("linear", (16, 23), False, (4, 2, 2), (2, 3, 4))
    assert structure.padding == (0, 1)
    weight = random_weight(structure)
    assert sorted(learn_order(weight, structure, 3)) == list(range(23))


def test_is_deterministic() -> None:
    weight = random_weight(STRUCTURE)
    assert learn_order(weight, STRUCTURE, 3) == learn_order(weight, STRUCTURE, 3)
