from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mpoc.calibrate.evidence import Evidence, LayerEvidence
from mpoc.calibrate.fit import Storage
from mpoc.calibrate.moments import Accumulator, Moments
from mpoc.calibrate.outputs import Replaced
from mpoc.calibrate.share import Costs, Offers, largest_within, share_by_gain
from mpoc.plan import LayerPlan
from mpoc.selection import LinearMap
from mpoc.structure import low_rank_structure, make_structure

SIDES = (16, 24)


def moments(seed: int, count: int = 300) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    sums = Accumulator()
    sums.add(torch.randn(count, SIDES[1], generator=generator, dtype=torch.float64).cumsum(1) + 0.3)
    return sums.moments()


def known(centred: bool = True, weighed: bool = True) -> Evidence:
    probes = torch.randn(40, SIDES[0], generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return LayerEvidence(moments(0), moments(1), probes.T @ probes / 40 if weighed else None, centred)


def weight(seed: int) -> Tensor:
    return torch.randn(SIDES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plan(name: str, bond: int) -> LayerPlan:
    map = LinearMap(f"{name}.weight", "linear", SIDES, "float32", False)
    return LayerPlan(map, low_rank_structure("linear", SIDES), "float32", bond)


class Distance:
    """Stands for the network: the squared errors of its layers summed, each with its own weight."""

    def __init__(self, dense: Mapping[str, Tensor], importance: Mapping[str, float]) -> None:
        self.dense, self.importance, self.asked = dense, importance, 0

    def of(self, layers: Mapping[str, Replaced]) -> float:
        self.asked += 1
        return sum(
            self.importance[name] * float((self.dense[name] - layer.weight).square().sum())
            for name, layer in layers.items()
        )


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("weighed", [True, False])
def test_errors_of_all_ranks_are_those_of_each(centred: bool, weighed: bool) -> None:
    evidence = known(centred, weighed)
    offers = Offers(weight(3), make_structure("linear", SIDES), evidence, ("svd",))
    structure = low_rank_structure("linear", SIDES)
    for rank in (1, 4, 9, 16):
        expected = evidence.felt.squared(weight(3), offers.matrix(Storage(structure, rank)).double())
        assert offers.error(Storage(structure, rank)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_offers_of_every_form_shrink_the_layer_but_for_the_dense_one() -> None:
    structure = make_structure("linear", SIDES, factors=((2, 8), (12, 2)))
    offers = Offers(weight(3), structure, known(), ("svd", "mpo", "svd+mpo"))
    stored = [offer.storage for offer in offers.every if offer.storage is not None]
    assert {(one.structure.form, one.low_rank > 0) for one in stored} == {
        ("svd", False),
        ("mpo", False),
        ("mpo", True),
    }
    assert [offer.error for offer in offers.every if offer.storage is None] == [0.0]
    assert all(offer.parameters < 16 * 24 for offer in offers.every if offer.storage is not None)
    for is_sum in (False, True):
        measured = largest_within(structure, int(0.3 * 16 * 24), is_sum)
        assert measured is not None
        found = [offer.error for offer in offers.every if offer.storage == measured]
        assert found == [pytest.approx(offers.error(measured), rel=1e-4)]
        expected = known().felt.squared(weight(3), offers.matrix(measured).double())
        assert offers.error(measured) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("is_sum", [False, True])
def test_the_largest_within_a_size_is_within_it(is_sum: bool) -> None:
    structure = make_structure("conv2d", (16, 12, 3, 3), factors=((2, 8), (6, 2)))
    for size in (1, 30, 200, 700, 1700):
        found = largest_within(structure, size, is_sum)
        if found is None:
            assert size < 700
            continue
        assert found.num_parameters <= size
        assert Storage(structure, found.bond, found.low_rank + is_sum).num_parameters > size or not is_sum
        assert is_sum or Storage(structure, found.bond + 1).num_parameters > size


def shared(importance: dict[str, float], budget: int) -> Any:
    plans = [plan("a", 4), plan("b", 4), plan("c", 4)]
    dense = {one.map.name: weight(k) for k, one in enumerate(plans)}
    offers = {
        name: Offers(matrix, make_structure("linear", SIDES), known(), ("svd",))
        for name, matrix in dense.items()
    }
    named = {f"{name}.weight": value for name, value in importance.items()}
    costs = dict.fromkeys(offers, Costs())
    return share_by_gain(plans, offers, costs, budget, Distance(dense, named)), plans  # type: ignore[arg-type]


def test_layers_that_matter_to_the_outputs_get_more() -> None:
    found, _ = shared({"a": 100.0, "b": 1.0, "c": 1.0}, 3 * 4 * 40)
    stored = [one.record().num_stored for one in found.plans]
    assert sum(stored) <= 3 * 4 * 40
    assert found.chosen == "equal gain"
    assert stored[0] > max(stored[1:])
    assert found.distances["equal gain"] < found.distances["uniform"]


def test_uniform_shares_stay_where_the_outputs_prefer_them() -> None:
    """Together the layers do not do what they did alone."""

    class Contrary(Distance):
        def of(self, layers: Mapping[str, Replaced]) -> float:
            alone = super().of(layers)
            return alone if len(layers) == 1 else float(self.asked)  # the first asked for is uniform

    plans = [plan("a", 4), plan("b", 4)]
    dense = {one.map.name: weight(k) for k, one in enumerate(plans)}
    offers = {
        name: Offers(matrix, make_structure("linear", SIDES), known(), ("svd",))
        for name, matrix in dense.items()
    }
    distance = Contrary(dense, dict.fromkeys(dense, 1.0))
    found = share_by_gain(plans, offers, dict.fromkeys(offers, Costs()), 320, distance)  # type: ignore[arg-type]
    assert found.chosen == "uniform"
    assert found.plans == plans


def test_a_budget_below_every_offer_leaves_the_plans() -> None:
    found, plans = shared({"a": 1.0, "b": 1.0, "c": 1.0}, 10)
    assert (found.chosen, found.plans) == ("uniform", plans)


def test_layers_that_take_no_part_stay() -> None:
    plans = [plan("a", 4), replace(plan("b", 4), max_bond=None, reason="the recipe leaves it dense")]
    offers = {"a.weight": Offers(weight(0), make_structure("linear", SIDES), known(), ("svd",))}
    distance = Distance({"a.weight": weight(0)}, {"a.weight": 1.0})
    costs = {"a.weight": Costs()}
    found = share_by_gain(plans, offers, costs, 200, distance)  # type: ignore[arg-type]
    assert found.plans[1] == plans[1]
