from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mpoc.compression.calibrate.allocation import WAYS, Allocation, allocate_by_gain, parameters
from mpoc.compression.calibrate.candidates import Candidates, CandidateTable
from mpoc.compression.calibrate.output_distance import Replacement
from mpoc.compression.plan import LayerPlan
from mpoc.compression.run_context import RunContext
from mpoc.compression.selection import LinearMap
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.structure import low_rank_structure, make_structure
from tests.compression.calibrate.layers import SIDES, known, weight

LOW_RANK = low_rank_structure("linear", SIDES)


def plan(name: str, bond: int) -> LayerPlan:
    map = LinearMap(f"{name}.weight", "linear", SIDES, "float32", False)
    return LayerPlan(map, low_rank_structure("linear", SIDES), "float32", Truncation(bond))


class Distance:
    """Stands for the network: the squared errors of its layers summed, each with its own weight."""

    def __init__(self, dense: Mapping[str, Tensor], importance: Mapping[str, float]) -> None:
        self.dense, self.importance, self.asked = dense, importance, 0
        self.penalty: list[float] = []
        self.of_some = self

    def of(self, layers: Mapping[str, Replacement]) -> float:
        self.asked += 1
        return sum(
            self.importance[name] * float((self.dense[name] - layer.weight).square().sum())
            for name, layer in layers.items()
        )


def chosen_from(plans: list[LayerPlan], offers: Mapping[str, Candidates]) -> CandidateTable:
    part = [plan for plan in plans if plan.map.name in offers]
    return CandidateTable(part, lambda plan: offers[plan.map.name], RunContext(torch.device("cpu")))


def shared(importance: dict[str, float], budget: int) -> Any:
    plans = [plan("a", 4), plan("b", 4), plan("c", 4)]
    dense = {one.map.name: weight(k) for k, one in enumerate(plans)}
    offers = {name: Candidates(matrix, [LOW_RANK], known) for name, matrix in dense.items()}
    named = {f"{name}.weight": value for name, value in importance.items()}
    distance: Any = Distance(dense, named)
    return allocate_by_gain(plans, chosen_from(plans, offers), parameters, budget, distance), plans


def test_important_layers_get_larger_shares() -> None:
    found, _ = shared({"a": 100.0, "b": 1.0, "c": 1.0}, 3 * 4 * 40)
    stored = [one.record().num_stored for one in found.plans]
    assert sum(stored) <= 3 * 4 * 40
    assert found.chosen == "equal gain"
    assert stored[0] > max(stored[1:])
    assert found.distances["equal gain"] < found.distances["uniform"]


def test_layers_that_do_not_move_the_outputs_use_their_share() -> None:
    found, plans = shared(dict.fromkeys("abc", 0.0), 3 * 4 * 40)
    assert found.chosen == "uniform" and set(found.distances.values()) == {0.0}
    assert [one.record().num_stored for one in found.plans] == [one.record().num_stored for one in plans]


def test_keeps_uniform_shares_where_they_are_better() -> None:
    """Together the layers do not do what they did alone."""

    class Contrary(Distance):
        def of(self, layers: Mapping[str, Replacement]) -> float:
            alone = super().of(layers)
            return alone if len(layers) == 1 else float(self.asked)  # the first asked for is uniform

    plans = [plan("a", 4), plan("b", 4)]
    dense = {one.map.name: weight(k) for k, one in enumerate(plans)}
    offers = {name: Candidates(matrix, [LOW_RANK], known) for name, matrix in dense.items()}
    distance = Contrary(dense, dict.fromkeys(dense, 1.0))
    found = allocate_by_gain(plans, chosen_from(plans, offers), parameters, 320, distance)  # type: ignore[arg-type]
    assert found.chosen == "uniform"
    assert found.plans == plans


def test_budget_below_every_candidate_keeps_the_plans() -> None:
    found, plans = shared({"a": 1.0, "b": 1.0, "c": 1.0}, 10)
    assert (found.chosen, found.plans) == ("uniform", plans)


def test_other_layers_keep_their_plans() -> None:
    plans = [plan("a", 4), plan("b", 4).left_dense("the recipe leaves it dense")]
    offers = {"a.weight": Candidates(weight(0), [LOW_RANK], known)}
    distance = Distance({"a.weight": weight(0)}, {"a.weight": 1.0})
    found = allocate_by_gain(plans, chosen_from(plans, offers), parameters, 200, distance)  # type: ignore[arg-type]
    assert found.plans[1] == plans[1]


@pytest.mark.slow
def test_each_single_form_competes() -> None:
    plans = [plan("a", 4), plan("b", 4)]
    dense = {one.map.name: weight(k) for k, one in enumerate(plans)}
    structure = make_structure("linear", SIDES, factors=((2, 8), (12, 2)))
    offers = {name: Candidates(matrix, [LOW_RANK, structure], known) for name, matrix in dense.items()}
    distance: Any = Distance(dense, dict.fromkeys(dense, 1.0))
    found = allocate_by_gain(plans, chosen_from(plans, offers), parameters, 2 * 4 * 40, distance)
    assert tuple(found.distances) == WAYS[:4]
    assert found.distances[found.chosen] == min(found.distances.values())
    assert distance.asked == len(found.distances) + 2 * len(plans)  # what is told at once is not asked again
    one_form = {name: Candidates(matrix, [LOW_RANK], known) for name, matrix in dense.items()}
    assert (
        tuple(
            allocate_by_gain(plans, chosen_from(plans, one_form), parameters, 2 * 4 * 40, distance).distances
        )
        == WAYS[:2]
    )


@pytest.mark.slow
def test_one_form_may_win_alone() -> None:
    class Jealous(Distance):
        """Two forms in one network move its outputs far."""

        def of(self, layers: Mapping[str, Replacement]) -> float:
            alone = super().of(layers)
            return alone if len(layers) == 1 else alone + self.penalty.pop(0)

    plans = [plan("a", 4), plan("b", 4)]
    dense = {one.map.name: weight(k) for k, one in enumerate(plans)}
    structure = make_structure("linear", SIDES, factors=((2, 8), (12, 2)))
    offers = {name: Candidates(matrix, [LOW_RANK, structure], known) for name, matrix in dense.items()}
    distance: Any = Jealous(dense, dict.fromkeys(dense, 1.0))
    distance.penalty = [1e6, 1e6, 0.0, 1e6]
    found = allocate_by_gain(plans, chosen_from(plans, offers), parameters, 2 * 4 * 40, distance)
    assert found.chosen == WAYS[2]
    assert {one.structure.form for one in found.plans if not one.is_dense} == {"mpo"}


def test_reports_a_surprisingly_large_distance() -> None:
    shares = Allocation([], "uniform", {"uniform": 0.01, "equal gain": 0.001})
    assert shares.warnings(0.03) == shares.warnings(0.0) == []
    (said,) = shares.warnings(0.4)
    assert (
        "diverge by 0.4 from the dense network, 40 times as much" in said and "--calibration-samples" in said
    )
    assert Allocation([], "uniform", {"uniform": 0.0}).warnings(1.0) == []
