"""How a weight becomes a matrix and its sides factors: counts of the papers, padding, bonds."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpoc.errors import UsageError
from mpoc.tensor_networks.factors import balanced_factors, default_sites, mera_sites
from mpoc.tensor_networks.structure import Structure, make_structure

SOME = settings(max_examples=60, deadline=None, derandomize=True)

SIDES = st.integers(1, 1500)
WEIGHTS = st.one_of(
    st.tuples(st.just("linear"), st.tuples(SIDES, SIDES)),
    st.tuples(st.just("embedding"), st.tuples(SIDES, SIDES)),
    st.tuples(st.just("conv1d"), st.tuples(SIDES, SIDES, st.integers(1, 7))),
    st.tuples(st.just("conv2d"), st.tuples(SIDES, SIDES, st.integers(1, 7), st.integers(1, 7))),
    st.tuples(st.just("experts"), st.tuples(st.integers(1, 64), SIDES, SIDES)),
)


def linear(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Structure:
    shape = (math.prod(outputs), math.prod(inputs))
    return make_structure("linear", shape, factors=(outputs, inputs))


def eq_6(inputs: tuple[int, ...], outputs: tuple[int, ...], bond: int) -> int:
    """N_mpo of Gao et al. 2020, Eq. (6), every bond nominal."""
    sizes = [i * j for i, j in zip(inputs, outputs, strict=True)]
    return sum(size * bond**2 for size in sizes[1:-1]) + (sizes[0] + sizes[-1]) * bond


# Table I and the supplement of Gao et al. 2020: M(inputs -> outputs)(bond).
PAPER = [
    ((4, 7, 7, 4), (4, 4, 4, 4), 16, 14_848),
    ((4, 4, 4, 4), (1, 1, 10, 1), 4, 736),
    ((2, 8, 8, 8, 2), (2, 8, 8, 8, 2), 4, 3_104),
    ((4, 4, 4, 4, 2), (4, 4, 8, 8, 4), 4, 1_376),
    ((4, 4, 8, 8, 4), (4, 4, 8, 8, 4), 4, 2_432),
    ((4, 4, 8, 8, 4), (1, 10, 1, 1, 1), 4, 928),
]


@pytest.mark.parametrize(("inputs", "outputs", "bond", "count"), PAPER)
def test_parameter_counts_match_the_papers(
    inputs: tuple[int, ...], outputs: tuple[int, ...], bond: int, count: int
) -> None:
    structure = linear(inputs, outputs)
    assert structure.num_parameters(bond) == eq_6(inputs, outputs, bond) == count


def test_vgg_total_matches_the_paper() -> None:
    counts = [linear(i, o).num_parameters(d) for i, o, d, _ in PAPER[2:]]
    assert counts[0] + sum(counts) == 10_944  # two whole-map convolutions, three linear layers


def test_taps_site_adds_its_own_parameters() -> None:
    structure = make_structure("conv2d", (64, 32, 3, 3), factors=((8, 8), (4, 8)))
    assert structure.output_factors == (1, 8, 8)
    assert structure.input_factors == (9, 4, 8)
    assert structure.num_parameters(5) == 9 * 5 + 5 * 32 * 5 + 5 * 64


@pytest.mark.parametrize(
    ("kind", "shape", "transposed", "expected"),
    [
        ("linear", (6, 10), False, (1, 6, 10)),
        ("linear", (6, 10), True, (1, 10, 6)),
        ("embedding", (101, 8), False, (1, 101, 8)),
        ("conv1d", (6, 10, 5), False, (5, 6, 10)),
        ("conv1d", (6, 10, 2), False, (2, 6, 10)),
        ("conv2d", (6, 1, 3, 3), False, (9, 6, 1)),
        ("conv3d", (6, 10, 3, 2, 5), False, (30, 6, 10)),
        ("experts", (4, 6, 10), False, (4, 6, 10)),
        ("experts", (4, 6, 10), True, (4, 10, 6)),
    ],
)
def test_every_kind_has_lead_outputs_and_inputs(
    kind: str, shape: tuple[int, ...], transposed: bool, expected: tuple[int, int, int]
) -> None:
    structure = make_structure(kind, shape, transposed)
    assert (structure.lead, structure.outputs, structure.inputs) == expected
    assert structure.num_original == math.prod(shape)


def test_lead_site_carries_taps_as_inputs_and_experts_as_outputs() -> None:
    conv = make_structure("conv2d", (16, 16, 3, 3))
    experts = make_structure("experts", (8, 16, 16))
    assert (conv.output_factors[0], conv.input_factors[0]) == (1, 9)
    assert (experts.output_factors[0], experts.input_factors[0]) == (8, 1)
    for two in (make_structure("conv1d", (16, 16, 2)), make_structure("experts", (2, 16, 16))):
        assert (two.site_sizes[0], two.lead_sites, two.padded) == (2, 1, (16, 16))
    for flat in (make_structure("conv2d", (16, 16, 1, 1)), make_structure("experts", (1, 16, 16))):
        assert flat.lead_sites == 0
        assert flat.output_factors == make_structure("linear", (16, 16)).output_factors


@SOME
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=5))
def test_full_bonds_are_the_ranks_of_unfoldings(factors: list[tuple[int, int]]) -> None:
    outputs, inputs = (tuple(side) for side in zip(*factors, strict=True))
    structure = linear(inputs, outputs)
    tensor = np.random.default_rng(0).standard_normal(structure.site_sizes)
    lefts = [math.prod(structure.site_sizes[:k]) for k in range(1, len(factors))]
    ranks = [int(np.linalg.matrix_rank(tensor.reshape(left, -1))) for left in lefts]
    assert structure.bonds(10**6) == (1, *ranks, 1)
    assert structure.full_bond == max(ranks)


@SOME
@given(WEIGHTS, st.integers(1, 200))
def test_bonds_obey_the_cap_and_parameters_count_the_cores(
    weight: tuple[str, tuple[int, ...]], bond: int
) -> None:
    structure = make_structure(*weight)
    bonds = structure.bonds(bond)
    assert bonds[0] == bonds[-1] == 1 and max(bonds) <= bond
    assert bonds == tuple(min(bond, full) for full in structure.bonds(10**9))
    cores = zip(bonds[:-1], structure.output_factors, structure.input_factors, bonds[1:], strict=True)
    assert structure.num_parameters(bond) == sum(math.prod(core) for core in cores)


@SOME
@given(WEIGHTS)
def test_full_bond_is_the_smallest_neutral_cap(weight: tuple[str, tuple[int, ...]]) -> None:
    structure = make_structure(*weight)
    full = structure.full_bond
    assert structure.bonds(full) == structure.bonds(10**9)
    assert full == 1 or structure.bonds(full - 1) != structure.bonds(full)


@SOME
@given(WEIGHTS)
def test_padding_is_at_most_a_tenth_of_a_side(weight: tuple[str, tuple[int, ...]]) -> None:
    structure = make_structure(*weight)
    assume(structure.form == "mpo")  # experts of one number each have the factors of a low-rank form
    skip = structure.lead_sites
    sides = (structure.outputs, structure.output_factors), (structure.inputs, structure.input_factors)
    for side, factors in sides:
        own = factors[skip:]
        assert side <= math.prod(own) <= 1.1 * side
        if len(own) > 1:
            assert min(own) >= 2
            assert sum(own) <= 2.5 * len(own) * side ** (1 / len(own))
    assert structure.output_factors[skip:] == tuple(sorted(structure.output_factors[skip:], reverse=True))
    assert structure.input_factors[skip:] == tuple(sorted(structure.input_factors[skip:]))


@pytest.mark.parametrize("size", [1009, 30522, 50257])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_awkward_sizes_get_balanced_factors(size: int, count: int) -> None:
    factors = balanced_factors(size, count)
    assert len(factors) == count
    assert size <= math.prod(factors) <= 1.05 * size
    assert max(factors) <= 1.3 * size ** (1 / count)


def test_factors_ten_as_two_times_five() -> None:
    structure = make_structure("linear", (10, 64))
    assert structure.output_factors == (5, 2)
    assert structure.padding == (0, 0)


@pytest.mark.parametrize("size", [64, 256, 384, 768, 784, 1024, 3072, 4096, 11008, 262144])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_smooth_sizes_are_not_padded(size: int, count: int) -> None:
    assert math.prod(balanced_factors(size, count)) == size


@SOME
@given(st.integers(2, 120), st.integers(2, 4))
def test_exact_factorisation_has_the_smallest_sum(size: int, count: int) -> None:
    def brute(rest: int, left: int, least: int) -> list[tuple[int, ...]]:
        if left == 1:
            return [(rest,)] if rest >= least else []
        return [
            (f, *tail)
            for f in range(least, rest + 1)
            if rest % f == 0
            for tail in brute(rest // f, left - 1, f)
        ]

    found = balanced_factors(size, count)
    if math.prod(found) == size and found:
        assert sum(found) == min(map(sum, brute(size, count, 2)))


@pytest.mark.parametrize(
    ("outputs", "inputs", "sites"),
    [(256, 784, 4), (1023, 1023, 4), (1024, 64, 5), (4096, 4096, 5), (8, 4096, 3), (2, 9000, 1), (1, 5, 1)],
)
def test_default_sites_match_the_papers(outputs: int, inputs: int, sites: int) -> None:
    assert default_sites(outputs, inputs) == sites


@pytest.mark.parametrize("sites", [2, 3, 4, 5])
def test_requested_sites_exclude_the_lead_site(sites: int) -> None:
    assert len(make_structure("linear", (256, 784), sites=sites).output_factors) == sites
    assert len(make_structure("conv2d", (64, 64, 3, 3), sites=sites).output_factors) == sites + 1


def test_small_sides_get_fewer_sites() -> None:
    assert make_structure("linear", (6, 4096), sites=5).output_factors == (3, 2)
    assert make_structure("linear", (7, 4096)).output_factors == (7,)


def test_given_factors_may_include_the_lead_site() -> None:
    without = make_structure("experts", (4, 6, 10), factors=((3, 2), (2, 5)))
    assert without == make_structure("experts", (4, 6, 10), factors=((4, 3, 2), (1, 2, 5)))
    assert without.output_factors == (4, 3, 2)


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        (((2, 3), (2, 4)), "2×4 = 8 inputs and 2×3 = 6 outputs, but the layer has 10 and 6"),
        (((2, 3), (10,)), "1 input factors and 2 output factors"),
    ],
)
def test_rejects_factors_with_a_wrong_product(
    factors: tuple[tuple[int, ...], tuple[int, ...]], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        make_structure("linear", (6, 10), factors=factors)


@SOME
@given(WEIGHTS)
def test_is_deterministic(weight: tuple[str, tuple[int, ...]]) -> None:
    first = make_structure(*weight)
    balanced_factors.cache_clear()
    assert make_structure(*weight) == first


@pytest.mark.parametrize(
    ("outputs", "inputs", "sites"), [(4096, 4096, 6), (384, 384, 5), (1536, 384, 6), (10, 64, 3), (1, 64, 1)]
)
def test_a_mera_has_sites_of_about_four(outputs: int, inputs: int, sites: int) -> None:
    assert mera_sites(outputs, inputs) == sites
    made = make_structure("linear", (outputs, inputs), form="mera")
    assert len(made.output_factors) == sites or outputs == 10  # whose factors do not reach
