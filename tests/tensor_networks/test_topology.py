from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpoc.tensor_networks.topology import CHAIN, MERA, TREE, Topology, branches, halves, mera

SIDES = st.integers(1, 13).flatmap(
    lambda sites: st.tuples(*[st.lists(st.integers(1, 4), min_size=sites, max_size=sites)] * 2)
)


@pytest.mark.parametrize("bond", [2, 3])
def test_mera_parameters_match_hallam(bond: int) -> None:
    """Both layers, 4096 → 4096 → 64, hold 6 D⁴ + 28 D³ + 60 D²."""
    first = mera((2,) * 12, (2,) * 12, bond)
    second = mera((1, 2) * 6, (2,) * 12, bond)  # the outputs of the first isometries are fixed
    assert len(first) == len(second) == 19
    count = sum(math.prod(core.shape) for core in (*first, *second))
    assert count == 6 * bond**4 + 28 * bond**3 + 60 * bond**2
    assert count == {2: 560, 3: 1782}[bond]


def test_mera_intermediates_are_small() -> None:
    size = largest = 2**12
    for core in mera((2,) * 12, (2,) * 12, 3):
        size = size * math.prod(core.shape[:2]) // math.prod(core.shape[2:])
        largest = max(largest, size)
    assert largest < 70_000 < 4 * 3**10  # the latter level by level


@pytest.mark.slow
@given(SIDES, st.sampled_from([CHAIN, TREE, MERA]))
def test_every_leg_is_connected(sides: tuple[list[int], list[int]], topology: Topology) -> None:
    outputs, inputs = map(tuple, sides)
    bonds = (3,) * topology.num_bonds(len(outputs))
    if topology is CHAIN:
        bonds = (1, *bonds[1:-1], 1)
    assert topology.fits(bonds, len(outputs)) and not topology.fits((*bonds, 1), len(outputs))
    ends: dict[str, list[int]] = {}
    cores = topology.cores(outputs, inputs, bonds)
    assert len(topology.places(cores)) == len(set(topology.places(cores))) == len(cores)
    for core in cores:
        assert len(set(core.legs)) == len(core.legs) == len(core.shape)
        for leg, size in zip(core.legs, core.shape, strict=True):
            ends.setdefault(leg, []).append(size)
    open_legs = {leg: sizes[0] for leg, sizes in ends.items() if len(sizes) == 1}
    expected = {f"j{k + 1}": size for k, size in enumerate(outputs)}
    expected |= {f"i{k + 1}": size for k, size in enumerate(inputs)}
    if topology is CHAIN:
        expected |= {"b0": 1, f"b{len(outputs)}": 1}
    assert open_legs == expected
    assert all(len(set(sizes)) == 1 and len(sizes) <= 2 for sizes in ends.values())


@pytest.mark.slow
@given(SIDES)
def test_mera_cores_find_their_inputs(sides: tuple[list[int], list[int]]) -> None:
    outputs, inputs = sides
    there = {f"i{k + 1}" for k in range(len(inputs))}
    for core in mera(tuple(outputs), tuple(inputs), 2):
        upper, lower = (
            (core.legs[:2], core.legs[2:]) if len(core.legs) == 4 else (core.legs[:1], core.legs[1:])
        )
        assert there.issuperset(lower)
        there = there - set(lower) | set(upper)
    assert there == {f"j{k + 1}" for k in range(len(outputs))}


@given(st.integers(2, 40))
def test_tree_branches_list_children_first(sites: int) -> None:
    found = branches(sites)
    assert len(found) == TREE.num_bonds(sites) == 2 * sites - 3
    for k, span in enumerate(found):
        assert len(span) == 1 or set(halves(span)) <= set(found[:k])
