from __future__ import annotations

import pytest

from mpoc.compression.calibrate.calibrated_fit import Storage
from mpoc.compression.calibrate.candidates import Candidates, largest_within
from mpoc.tensor_networks.structure import low_rank_structure, make_structure
from tests.compression.calibrate.layers import SIDES, known, weight


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("weighed", [True, False])
def test_errors_of_all_ranks_match_single_fits(centred: bool, weighed: bool) -> None:
    objective = known(centred, weighed)
    offers = Candidates(weight(3), [low_rank_structure("linear", SIDES)], lambda: objective)
    structure = low_rank_structure("linear", SIDES)
    for rank in (1, 4, 9):
        expected = objective.output_weighted_error.squared(
            weight(3), offers.matrix(Storage(structure, rank)).double()
        )
        assert offers.error(Storage(structure, rank)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_every_compressed_candidate_shrinks_the_layer() -> None:
    structure = make_structure("linear", SIDES, factors=((2, 8), (12, 2)))
    forms = [structure.as_form(form) for form in ("svd", "mpo", "svd+mpo")]
    offers = Candidates(weight(3), forms, known)
    stored = [offer.storage for offer in offers.every if offer.storage is not None]
    assert {(one.structure.form, one.rank > 0) for one in stored} == {
        ("svd", False),
        ("mpo", False),
        ("svd+mpo", True),
    }
    assert [offer.error for offer in offers.every if offer.storage is None] == [0.0]
    assert all(offer.parameters < 16 * 24 for offer in offers.every if offer.storage is not None)
    for form in ("mpo", "svd+mpo"):
        measured = largest_within(structure.as_form(form), int(0.3 * 16 * 24))
        assert measured is not None
        found = [offer.error for offer in offers.every if offer.storage == measured]
        assert found == [pytest.approx(offers.error(measured), rel=1e-4)]
        expected = known().output_weighted_error.squared(weight(3), offers.matrix(measured).double())
        assert offers.error(measured) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("form", ["mpo", "svd+mpo"])
def test_largest_within_a_size_fits(form: str) -> None:
    structure = make_structure("conv2d", (16, 12, 3, 3), factors=((2, 8), (6, 2))).as_form(form)
    for size in (1, 30, 200, 700, 1700):
        found = largest_within(structure, size)
        if found is None:
            assert size < 700
            continue
        assert found.num_parameters <= size
        larger = (found.bond, found.rank + 1) if structure.parts else (found.bond + 1, 0)
        assert Storage(structure, *larger).num_parameters > size


@pytest.mark.slow
def test_extra_structure_is_a_candidate() -> None:
    structure = make_structure("linear", SIDES)
    mera = make_structure("linear", SIDES, form="mera")
    offers = Candidates(weight(3), [structure.as_low_rank(), structure, mera], known)
    offered = [one for one in offers.every if one.storage is not None and one.storage.structure == mera]
    assert offered
    storage = largest_within(mera, int(0.4 * 16 * 24))
    assert storage is not None
    (one,) = (offer for offer in offered if offer.storage == storage)
    assert one.error == pytest.approx(offers.error(storage), rel=1e-4)
    expected = known().output_weighted_error.squared(weight(3), offers.matrix(storage).double())
    assert offers.error(storage) == pytest.approx(expected, rel=1e-4)
