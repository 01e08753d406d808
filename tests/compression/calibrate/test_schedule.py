from __future__ import annotations

from collections.abc import Sequence

import pytest

from mpoc.compression.calibrate.block_refinement import Schedule
from mpoc.compression.plan import Dense, LayerPlan
from mpoc.compression.run_context import Kind, LayerWork, Workload, runs_again, seconds_of_passes
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


def test_layers_run_again_from_the_start_of_their_piece() -> None:
    groups = [["head"], ["q", "k"], ["o"], ["up"], ["down"]]
    whole = runs_again(groups, lambda name: None)
    assert whole == pytest.approx(
        {"head": 0, "q": 1 / 10, "k": 1 / 10, "o": 2 / 5, "up": 3 / 5, "down": 4 / 5}
    )
    cut = runs_again(groups, {"q": 0, "o": 0, "up": 1, "down": 1}.get)
    assert cut == pytest.approx({"head": 0, "q": 0, "k": 0, "o": 1 / 5, "up": 0, "down": 1 / 5})


def test_work_of_fits_has_what_runs_again() -> None:
    layers = {name: LayerWork(8, 8, 10.0, Kind.MATRIX) for name in "ab"}
    once, twice = (Workload(layers, "fast", again=again) for again in ({}, {"b": 0.5}))
    later = [work.fits(100.0).seconds for work in (once, twice)]
    assert later[1] - later[0] == pytest.approx(seconds_of_passes(100.0) / 2)
    only = [work.fits(100.0, ["a"]).seconds for work in (once, twice)]
    assert only[0] == only[1] < later[0]
    assert twice.after_reading().times > once.after_reading().times


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
