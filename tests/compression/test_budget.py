"""A budget shared at the same ρ: never exceeded, and used."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.compression.budget import LayerShare, uniform_bonds
from mpoc.tensor_networks.structure import Structure, make_structure

SOME = settings(max_examples=40, deadline=None, derandomize=True)

_SIDE = st.integers(1, 300)
_STRUCTURES = st.one_of(
    st.builds(lambda a, b: make_structure("linear", (a, b)), _SIDE, _SIDE),
    st.builds(lambda a, b: make_structure("conv2d", (a, b, 3, 3)), _SIDE, _SIDE),
)
_COSTS = st.sampled_from([(1, 1), (2, 4), (4, 4), (4, 2)])
SHARES = st.lists(st.builds(lambda s, c: LayerShare(s, *c), _STRUCTURES, _COSTS), min_size=1, max_size=6)


def cost(share: LayerShare, bond: int | None) -> float:
    if bond is None:
        return share.structure.num_original * share.dense_cost
    return share.structure.num_parameters(bond) * share.stored_cost


def total(shares: list[LayerShare], bonds: list[int | None]) -> float:
    return sum(cost(share, bond) for share, bond in zip(shares, bonds, strict=True))


def useful_bonds(structure: Structure) -> list[int | None]:
    """Every cap at which the layer is smaller than the weight; None alone where there is none."""
    caps = range(1, structure.full_bond + 1)
    return [d for d in caps if structure.num_parameters(d) < structure.num_original] or [None]


@pytest.mark.slow
@SOME
@given(SHARES, st.floats(0, 1.2))
def test_fills_the_budget_without_exceeding_it(shares: list[LayerShare], ratio: float) -> None:
    budget = int(ratio * sum(share.structure.num_original * share.dense_cost for share in shares))
    bonds = uniform_bonds(shares, budget)
    if total(shares, [None] * len(shares)) <= budget:
        assert bonds == [None] * len(shares)
        return
    least = total(shares, [useful_bonds(share.structure)[0] for share in shares])
    if bonds is None:
        assert least > budget
        return
    spent = total(shares, bonds)
    assert spent <= budget
    for share, bond in zip(shares, bonds, strict=True):
        allowed = useful_bonds(share.structure)
        assert bond in allowed
        if bond is not None and bond + 1 in allowed:
            assert spent - cost(share, bond) + cost(share, bond + 1) > budget


@pytest.mark.slow
@SOME
@given(SHARES)
def test_smallest_budget_gives_bond_one(shares: list[LayerShare]) -> None:
    smallest = [useful_bonds(share.structure)[0] for share in shares]
    least = total(shares, smallest)
    dense = total(shares, [None] * len(shares))
    assert uniform_bonds(shares, least) == (smallest if least < dense else [None] * len(shares))
    assert uniform_bonds(shares, least - 1) is None


@pytest.mark.slow
@SOME
@given(SHARES)
def test_layers_stay_dense_where_all_fit(shares: list[LayerShare]) -> None:
    dense = total(shares, [None] * len(shares))
    assert uniform_bonds(shares, dense) == [None] * len(shares)
    if any(share.stored_cost <= share.dense_cost and useful_bonds(share.structure)[0] for share in shares):
        assert uniform_bonds(shares, dense - 1) != [None] * len(shares)


@pytest.mark.slow
def test_lists_every_shrinking_bond() -> None:
    for rows, columns in itertools.product(range(1, 20), repeat=2):
        structure = make_structure("linear", (rows, columns))
        largest = useful_bonds(structure)[-1]
        found = uniform_bonds([LayerShare(structure, 1, 1)], structure.num_original - 1)
        assert found == (None if largest is None else [largest])


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5, 0.8])
def test_maximises_the_minimum_share(ratio: float) -> None:
    structures = [make_structure("linear", shape, sites=2) for shape in ((16, 16), (24, 12), (8, 32))]
    shares = [LayerShare(structure, 1, 1) for structure in structures]
    budget = int(ratio * sum(s.num_original for s in structures))

    def worst(bonds: tuple[int | None, ...]) -> float:
        pairs = zip(structures, bonds, strict=True)
        return min(s.num_parameters(bond or 1) / s.num_original for s, bond in pairs)

    every = itertools.product(*map(useful_bonds, structures))
    best = max(worst(bonds) for bonds in every if total(shares, list(bonds)) <= budget)
    found = uniform_bonds(shares, budget)
    assert found is not None and worst(tuple(found)) == best


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.5])
def test_equal_layers_get_nearly_equal_bonds(ratio: float) -> None:
    shares = [LayerShare(make_structure("linear", (768, 768)), 1, 1) for _ in range(7)]
    bonds = uniform_bonds(shares, int(ratio * 7 * 768 * 768))
    assert bonds is not None
    found = [bond or 0 for bond in bonds]
    assert max(found) - min(found) <= 1
    assert found == sorted(found, reverse=True)


def test_layer_that_cannot_shrink_costs_its_dense_bytes() -> None:
    hopeless = LayerShare(make_structure("linear", (7, 5)), 2, 4)
    other = LayerShare(make_structure("linear", (64, 64)), 2, 4)
    dense = 7 * 5 * 4
    least = cost(other, 1)
    assert uniform_bonds([hopeless, other], dense + least) == [None, 1]
    assert uniform_bonds([hopeless, other], dense + least - 1) is None


def test_smaller_dtype_gives_larger_bonds() -> None:
    structure = make_structure("linear", (256, 256))
    (half,) = uniform_bonds([LayerShare(structure, 2, 4)], 60_000) or [None]
    (full,) = uniform_bonds([LayerShare(structure, 4, 4)], 60_000) or [None]
    assert half is not None and full is not None and half > full
    assert structure.num_parameters(half + 1) * 2 > 60_000 >= structure.num_parameters(half) * 2


def test_is_deterministic() -> None:
    shares = [LayerShare(make_structure("linear", (side, 96)), 1, 1) for side in (32, 48, 64, 96, 128)]
    assert uniform_bonds(shares, 9_000) == uniform_bonds(list(shares), 9_000)
