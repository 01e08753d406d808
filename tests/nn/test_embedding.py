from __future__ import annotations

from itertools import accumulate, combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mpoc.nn import MPOEmbedding, adopt, use_weights
from mpoc.tensor_networks.forms import chain as module
from mpoc.tensor_networks.forms.cost import cheapest_gather
from mpoc.tensor_networks.forms.mpo import MPO
from tests.nn.layers import gradients, pair, pulled_back, structure_of, with_cores

SIDE = st.integers(1, 60)


@given(SIDE, SIDE, st.integers(2, 4), st.integers(1, 6), st.data())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_matches_the_dense_layer(
    entries: int, width: int, sites: int, bond: int, data: st.DataObject
) -> None:
    padding_idx = data.draw(st.none() | st.integers(-entries, entries - 1))
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
    plain = nn.Embedding(entries, width, padding_idx).double()
    dense, layer = pair(plain, max_bond=bond, sites=sites)
    indices = torch.randint(0, entries, shape)
    expected, found = gradients(dense, indices), gradients(layer, indices)
    torch.testing.assert_close(found[0], expected[0])
    cores = pulled_back(list(layer.cores), layer.structure, expected[1]["weight"])
    torch.testing.assert_close([found[1][f"cores.{k}"] for k in range(len(cores))], cores)


@pytest.mark.parametrize("cuts", [(0, *c, 4) for n in range(4) for c in combinations((1, 2, 3), n)])
def test_every_grouping_agrees(cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    dense, layer = pair(nn.Embedding(101, 24).double())
    assert len(layer.cores) == 4
    indices = torch.arange(101).reshape(1, 101)
    monkeypatch.setattr(module, "_gather_plan", lambda *_: cuts)
    torch.testing.assert_close(layer(indices), dense(indices))


def test_a_table_of_one_row_gives_it_for_every_index() -> None:
    dense, layer = pair(nn.Embedding(1, 24))
    indices = torch.zeros(2, 5, dtype=torch.int64)
    torch.testing.assert_close(layer(indices), dense(indices))


def test_prime_vocabulary_is_padded_and_keeps_its_padding_index() -> None:
    dense, layer = pair(nn.Embedding(1009, 24, padding_idx=7))
    assert type(layer) is MPOEmbedding
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (1009, 24, 7)
    assert len(layer.cores) == 4
    assert max(layer.structure.output_factors) < 16
    indices = torch.tensor([7, 1008, 0])
    torch.testing.assert_close(layer(indices), dense(indices), rtol=0, atol=1e-5)
    layer(torch.tensor([7, 7])).sum().backward()
    assert not any(core.grad.any() for core in layer.cores)


@pytest.mark.parametrize("shape", [(30522, 384), (50257, 768), (32000, 4096), (1009, 32)])
def test_sites_are_narrow_for_every_vocabulary(shape: tuple[int, int]) -> None:
    structure = structure_of(nn.Embedding(*shape, device="meta"))
    assert max(structure.output_factors + structure.input_factors) <= 64


@pytest.mark.parametrize("indices", [[1009], [-1], [5, 10**6]])
def test_rejects_indices_out_of_range(indices: list[int]) -> None:
    layer = with_cores(nn.Embedding(1009, 24))
    assert layer.structure.padded[0] > 1009  # a row of the padding is no row of the table
    with pytest.raises(IndexError, match="for 1009 embeddings"):
        layer(torch.tensor(indices))
    use_weights(layer.eval().requires_grad_(False), "dense")
    with pytest.raises(IndexError):
        layer(torch.tensor(indices))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_accepts_int32_and_int64_indices(dtype: torch.dtype) -> None:
    dense, layer = pair(nn.Embedding(101, 24))
    indices = torch.tensor([0, 100, 50], dtype=dtype)
    torch.testing.assert_close(layer(indices), dense(indices), rtol=0, atol=1e-5)


def test_gradients_match_finite_differences() -> None:
    layer = with_cores(nn.Embedding(11, 6, padding_idx=2).double(), max_bond=2)
    indices = torch.tensor([0, 10, 5, 5])  # not the padding index: finite differences know no exception
    assert torch.autograd.gradcheck(lambda *_: layer(indices), tuple(layer.parameters()))


def test_autocast_keeps_the_dtype() -> None:
    dense, layer = pair(nn.Embedding(101, 24))
    indices = torch.tensor([0, 100])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(indices).dtype == dense(indices).dtype == torch.float32
        torch.testing.assert_close(layer(indices), dense(indices), rtol=0, atol=1e-5)


def test_works_on_the_meta_device() -> None:
    layer = with_cores(nn.Embedding(101, 24)).to("meta")
    assert layer(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, 24)


@pytest.mark.parametrize("kind", ["max_norm", "scale_grad_by_freq"])
def test_rare_options_use_the_rebuilt_table(kind: str) -> None:
    options: dict[str, Any] = {"max_norm": 1.0} if kind == "max_norm" else {"scale_grad_by_freq": True}
    dense, layer = pair(nn.Embedding(101, 24, **options))
    assert isinstance(layer, nn.Embedding)
    assert not isinstance(layer, MPOEmbedding)
    indices = torch.tensor([0, 100, 100])
    with torch.no_grad():
        torch.testing.assert_close(layer(indices), dense(indices), rtol=0, atol=1e-5)


def largest_allocation(layer: nn.Module, indices: torch.Tensor) -> int:
    """Bytes of the largest single allocation in a call without gradients."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        layer(indices)
    return max(event.cpu_memory_usage for event in profiled.events())


def peak_allocation(layer: nn.Module, indices: torch.Tensor) -> int:
    """Bytes held at once in a call without gradients."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        layer(indices)
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = profiled.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


class TestMemory:
    TABLE = 30522 * 384 * 4

    @pytest.mark.parametrize("bond", [4, 16, 32])
    def test_lookup_of_128_tokens_takes_less_than_5_mb(self, bond: int) -> None:
        layer, indices = with_large_cores(bond), torch.randint(0, 30522, (1, 128))
        assert largest_allocation(layer, indices) <= peak_allocation(layer, indices) < 5e6

    @pytest.mark.parametrize("bond", [16, 64])
    def test_lookup_does_not_build_the_table(self, bond: int, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = with_large_cores(bond)
        indices = torch.randint(0, 30522, (1, 128))
        monkeypatch.setattr(MPO, "to_weight", None)
        assert largest_allocation(layer, indices) < self.TABLE / 2

    def test_memory_measurement_detects_a_table(self) -> None:
        layer = with_large_cores(16)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            layer.dense_weight()
        assert max(event.cpu_memory_usage for event in profiled.events()) >= self.TABLE

    def test_many_indices_take_little_more_than_the_table(self) -> None:
        layer = with_large_cores(64)
        assert largest_allocation(layer, torch.randint(0, 30522, (64, 128))) < 2 * self.TABLE


def with_large_cores(bond: int) -> Any:
    """An embedding of 30522×384 with random float32 cores."""
    layer = nn.Embedding(30522, 384, device="meta")
    structure = structure_of(layer)
    sites = zip(
        structure.bonds(bond),
        structure.output_factors,
        structure.input_factors,
        structure.bonds(bond)[1:],
        strict=False,
    )
    adopt(layer, "weight", [torch.randn(site) for site in sites], structure)
    return layer


def test_works_under_vmap() -> None:
    dense, layer = pair(nn.Embedding(50, 12))
    ids = torch.arange(12).reshape(3, 4)
    torch.testing.assert_close(torch.vmap(layer)(ids), dense(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_rejects_indices_of_another_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match="int32 or int64"):
        with_cores(nn.Embedding(50, 12))(torch.ones(3).to(dtype))


def test_gathers_many_rows_from_merged_cores() -> None:
    sites = ((1, 9, 2, 32), (32, 9, 3, 32), (32, 9, 4, 32), (32, 7, 4, 32), (32, 6, 4, 1))
    assert cheapest_gather(sites, 8, False) == (0, 1, 2, 3, 4, 5)
    assert len(cheapest_gather(sites, 16384, False)) < 5
