from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mpoc.tensor_networks.forms import chain as module
from mpoc.tensor_networks.forms.chain import contract, merge_cores
from mpoc.tensor_networks.forms.contraction import planned_batch
from mpoc.tensor_networks.forms.cost import CPU, GPU, Plan, Rates, cheapest, split_batch, ways
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.weights import by_eq_5, random_cores

FACTORS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4)


def of_factors(factors: list[tuple[int, int]]) -> Structure:
    """A linear map with these (J_k, I_k)."""
    outputs, inputs = zip(*factors, strict=True)
    shape = int(torch.tensor(outputs).prod()), int(torch.tensor(inputs).prod())
    return Structure("linear", shape, False, outputs, inputs)


def groupings(count: int) -> list[tuple[int, ...]]:
    return [(0, *c, count) for size in range(count) for c in combinations(range(1, count), size)]


@given(FACTORS, st.integers(1, 5), st.integers(0, 6))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_matches_the_matrix_of_eq_5(factors: list[tuple[int, int]], bond: int, batch: int) -> None:
    structure = of_factors(factors)
    cores = random_cores(structure, bond)
    x = torch.randn(batch, structure.inputs, dtype=torch.float64)
    torch.testing.assert_close(contract(x, cores), x @ by_eq_5(cores, structure).T)


def plans(count: int) -> list[Plan]:
    """Every grouping in a chain and every cut to rebuild from, a few vectors or outputs at a time."""
    chains = [Plan(cuts, False, rows, 0.0) for cuts in groupings(count) for rows in (2, 100)]
    return chains + [Plan((0, cut, count), True, rows, 0.0) for cut in range(1, count) for rows in (1, 100)]


@pytest.mark.parametrize("plan", plans(4), ids=str)
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("trained", [False, True])
def test_every_plan_agrees(plan: Plan, batch: int, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = of_factors([(2, 3), (3, 1), (1, 4), (3, 2)])
    cores = [core.requires_grad_(trained) for core in random_cores(structure, 3)]
    x = torch.randn(batch, structure.inputs, dtype=torch.float64)
    monkeypatch.setattr(module, "_plan", lambda *_: plan)
    torch.testing.assert_close(contract(x, cores), x @ by_eq_5(cores, structure).T)
    if trained:
        found = torch.autograd.grad(contract(x, cores).square().sum(), cores)
        expected = torch.autograd.grad((x @ merge_cores(cores)[0, :, :, 0].T).square().sum(), cores)
        torch.testing.assert_close(found, expected)


def test_accepts_any_input_strides() -> None:
    structure = make_structure("linear", (12, 8))
    cores = random_cores(structure, 3)
    x = torch.randn(8, 5, dtype=torch.float64).T
    torch.testing.assert_close(contract(x, cores), x @ by_eq_5(cores, structure).T)


def test_gradients_match_finite_differences() -> None:
    structure = of_factors([(2, 2), (2, 3), (3, 1)])
    cores = [core.requires_grad_() for core in random_cores(structure, 2)]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *cores: contract(x, cores), (x, *cores))


def test_merging_gives_one_core() -> None:
    structure = of_factors([(2, 3), (3, 2), (2, 2)])
    cores = random_cores(structure, 4)
    merged = [merge_cores(cores[:2]), cores[2]]
    assert merged[0].shape == (1, 6, 6, 4)
    two_sites = of_factors([(6, 6), (2, 2)])
    torch.testing.assert_close(by_eq_5(merged, two_sites), by_eq_5(cores, structure))


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes():
            self.numbers = max(self.numbers, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("plan", "most"),
    [  # an intermediate for one vector: 8 · 16 · 8 numbers; Ŵ: 64 · 64
        (Plan((0, 1, 2), False, 4, 0.0), 4 * 1024),
        (Plan((0, 1, 2), False, 32, 0.0), 32 * 1024),
        (Plan((0, 1, 2), True, 2, 0.0), 2 * 8 * 64),
        (Plan((0, 1, 2), True, 8, 0.0), 64 * 64),
    ],
)
def test_memory_stays_within_the_plan(
    plan: Plan, most: int, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = [core.float().requires_grad_(trained) for core in random_cores(of_factors([(8, 8)] * 2), 16)]
    x = torch.randn(32, 64)
    monkeypatch.setattr(module, "_plan", lambda *_: plan)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        contract(x, cores)
    if trained and not plan.rebuild:
        most = max(most // 4, 1024 * min(plan.rows, 8))
    assert largest.numbers == max(most, 32 * 64)


def test_core_gradients_are_accumulated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = [core.float().requires_grad_() for core in random_cores(of_factors([(16, 16)] * 3), 4)]
    monkeypatch.setattr(module, "_plan", lambda *_: Plan((0, 1, 2, 3), False, 64, 0.0))
    y = contract(torch.randn(8, 4096), cores)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        y.sum().backward()
    assert largest.numbers == 8 * 256 * 4 * 16  # the intermediate; pieces: 8 · 16 · (4 · 16)²


def test_merges_from_the_side_of_small_bonds() -> None:
    assert split_batch(((1, 8, 8, 64), (64, 8, 8, 64), (64, 8, 8, 64))) == 2
    assert split_batch(((64, 8, 8, 64), (64, 8, 8, 64), (64, 8, 8, 1))) == 1


def test_works_on_meta_and_under_autocast() -> None:
    cores = [core.float() for core in random_cores(of_factors([(4, 4)] * 3), 3)]
    assert contract(torch.empty(5, 64, device="meta"), [core.to("meta") for core in cores]).shape == (5, 64)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = contract(x, cores)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), contract(x, cores), rtol=0.05, atol=0.2)


class TestPlan:
    SITES = ((1, 8, 8, 16), (16, 8, 8, 16), (16, 8, 8, 16), (16, 8, 8, 1))

    @pytest.mark.parametrize("on_gpu", [False, True])
    @pytest.mark.parametrize("batch", [1, 64, 1 << 16])
    def test_picks_the_cheapest_plan(self, on_gpu: bool, batch: int) -> None:
        best = cheapest(self.SITES, batch, on_gpu)
        every = list(ways(self.SITES, batch, GPU if on_gpu else CPU))
        assert {plan.cuts for plan in every} == set(groupings(4))
        assert sum(plan.rebuild for plan in every) == 3
        assert 0 < best.seconds == min(plan.seconds for plan in every)
        assert cheapest(self.SITES, batch, on_gpu) is best  # made once

    def test_cost_grows_with_the_batch(self) -> None:
        seconds = [cheapest(self.SITES, 4**k, False).seconds for k in range(9)]
        assert seconds == sorted(seconds)

    def test_large_batch_at_full_bond_rebuilds_the_weight(self) -> None:
        full = ((1, 8, 8, 64), (64, 8, 8, 64), (64, 8, 8, 1))
        assert cheapest(full, 1 << 20, False).rebuild

    @pytest.mark.parametrize("rates", [CPU, GPU])
    def test_intermediates_have_a_limit(self, rates: Rates) -> None:
        sites = ((1, 64, 64, 32), (32, 64, 64, 1))
        for plan in ways(sites, 1 << 20, rates):
            if plan.rebuild:
                assert plan.rows * 64 * 64 * 64 <= rates.block
            elif len(plan.cuts) == 3:
                assert plan.rows * 64 * 32 * 64 <= rates.cache

    def test_few_plans_cover_all_batches(self) -> None:
        batches = {planned_batch(torch.empty(size, 1)) for size in range(1000)}
        assert batches == {2**k for k in range(11)}
