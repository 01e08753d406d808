from __future__ import annotations

from collections.abc import Sequence

from mpoc.compression.calibrate.block_refinement import Schedule
from mpoc.compression.plan import Dense, LayerPlan
from mpoc.compression.selection import LinearMap
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.structure import low_rank_structure

SHAPES = {"a": (48, 48), "b": (48, 48), "c": (96, 48), "d": (48, 96), "e": (48, 48)}


def plans(names: str = "abcde", dense: str = "") -> list[LayerPlan]:
    maps = [LinearMap(name, "linear", SHAPES[name], "float32", False) for name in names]
    return [
        LayerPlan(
            map,
            low_rank_structure("linear", map.shape),
            "float32",
            Dense() if map.name in dense else Truncation(4),
        )
        for map in maps
    ]


def place(group: Sequence[str]) -> tuple[int, int] | None:
    return (0, 1) if group[0] in "cd" else None


SECONDS = {"a": 2.0, "b": 2.0, "c": 8.0, "d": 8.0}
STEPS = Schedule([["b", "a"], ["c"], ["d"]], place, SECONDS.__getitem__, 4.0)  # of e no inputs are known


def test_schedules_blocks_whole_and_groups_singly() -> None:
    assert list(STEPS.of("abcde")) == [(None, [["b", "a"]]), ((0, 1), [["c"], ["d"]])]
    assert list(STEPS.of("ad")) == [(None, [["a"]]), ((0, 1), [["d"]])]
    assert STEPS.units(plans()) == [["e"], ["b", "a"], ["c", "d"]]
    assert STEPS.units(plans("dbe")) == [["e"], ["b"], ["d"]]


def test_first_layer_of_a_unit_carries_its_seconds() -> None:
    costs = STEPS.costs(plans())
    assert 0 < costs.pop("e") < 1  # by its weight alone
    assert costs == {"b": 2 + 2 + 4 / 2, "a": 0, "c": 8 + 8 + 4 / 2, "d": 0}


def test_passes_through_unchanged_layers_fall_to_the_next_unit() -> None:
    assert STEPS.costs(plans(dense="a"))["b"] == 2 + 4 / 2
    costs = STEPS.costs(plans(dense="ab"))
    assert costs["b"] == 0 and costs["c"] == 8 + 8 + 4
    assert STEPS.costs(plans(dense="cd"))["c"] == 0
