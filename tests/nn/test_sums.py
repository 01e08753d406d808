"""Layers whose weight is an MPO plus a low-rank part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpoc.nn import MPOEmbedding, MPOLinear, adopt, use_weights
from mpoc.nn.adopt import unstack
from mpoc.nn.conv_map import geometry_of
from mpoc.nn.linear import MPOConv1D
from mpoc.tensor_networks.forms import chain as module
from mpoc.tensor_networks.forms.chain import contract
from mpoc.tensor_networks.forms.cost import CPU, GPU, Plan, cheapest, ways
from mpoc.tensor_networks.structure import make_structure
from tests.nn.layers import gradients, pulled_back, with_cores
from tests.nn.test_experts import Experts
from tests.support.sums import random_sum, sum_of, sum_weight
from tests.support.weights import by_eq_5, random_cores

LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(24, 18), torch.randn(2, 5, 24)),
    "linear, padded": lambda: (nn.Linear(53, 29), torch.randn(7, 53)),
    "conv1d": lambda: (nn.Conv1d(6, 8, 3), torch.randn(2, 6, 9)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2), torch.randn(2, 4, 7, 6)),
    "transposed conv2d": lambda: (nn.ConvTranspose2d(6, 4, 3, stride=2), torch.randn(2, 6, 3, 4)),
    "embedding": lambda: (nn.Embedding(101, 24, padding_idx=3), torch.tensor([[3, 0, 100], [3, 7, 7]])),
    "embedding bag": lambda: (nn.EmbeddingBag(60, 16), torch.randint(0, 60, (3, 4))),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_matches_the_dense_layer(kind: str) -> None:
    dense, x = LAYERS[kind]()
    layer = with_cores(copy.deepcopy(dense), low_rank=2)
    cores = list(layer.cores)
    structure = vars(layer).get("structure") or vars(layer)["_weight_structure"]
    with torch.no_grad():
        dense.get_parameter("weight").copy_(sum_weight(cores, structure))
    expected, found = gradients(dense, x), gradients(layer, x)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-5)
    got = [found[1][f"cores.{k}"] for k in range(len(cores))]
    wanted = pulled_back(cores, structure, expected[1]["weight"])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert all(float(gradient.abs().max()) > 0 for gradient in got)


def test_matches_a_transposed_linear_layer() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer, x = pytorch_utils.Conv1D(18, 24), torch.randn(3, 24)
    structure = make_structure("linear", (24, 18), transposed=True)
    cores = [core.float() for core in random_sum(structure)]
    adopt(layer, "weight", cores, sum_of(structure))
    assert isinstance(layer, MPOConv1D)
    torch.testing.assert_close(layer(x), x @ sum_weight(cores, structure).float(), rtol=1e-5, atol=1e-4)


def test_rebuilds_weights_of_recurrent_layers() -> None:
    layer: Any = nn.LSTM(8, 12)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        with_cores(layer, name=name, low_rank=2)
    dense = nn.LSTM(8, 12)
    with torch.no_grad():
        for name, value in dense.named_parameters():
            if name.startswith("bias"):
                value.copy_(getattr(layer, name))
            else:
                cores, structure = list(getattr(layer, f"{name}_cores")), vars(layer)[f"_{name}_structure"]
                value.copy_(sum_weight(cores, structure))
    x = torch.randn(5, 2, 8)
    torch.testing.assert_close(layer(x)[0], dense(x)[0], rtol=1e-5, atol=1e-5)
    layer(x)[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_matches_unstacked_experts() -> None:
    experts = Experts()
    unstack(experts, "gate_up_proj", ("w1", "w3"))
    structure = make_structure("linear", (4, 6), sites=2)
    cores = [core.float() for core in random_sum(structure)]
    adopt(experts.get_submodule("1.w3"), "weight", cores, sum_of(structure))
    expected = sum_weight(cores, structure).float()
    torch.testing.assert_close(experts.gate_up_proj[1, 4:], expected)
    experts(torch.randn(5, 6)).sum().backward()
    assert all(core.grad is not None for core in experts.get_submodule("1.w3").cores.parameters())  # type: ignore[union-attr]


def test_matches_stacked_experts() -> None:
    experts = Experts()
    structure = make_structure("experts", (3, 8, 6))
    cores = [core.float() for core in random_sum(structure)]
    adopt(experts, "gate_up_proj", cores, sum_of(structure))
    torch.testing.assert_close(experts.gate_up_proj, sum_weight(cores, structure).float())


def plans(count: int) -> list[Plan]:
    cuts = [(0, count), (0, 2, count), tuple(range(count + 1))]
    chains = [Plan(at, False, rows, 0.0) for at in cuts for rows in (2, 100)]
    cuts = [(0, count), *((0, cut, count) for cut in range(1, count))]
    return chains + [Plan(at, True, rows, 0.0) for at in cuts for rows in (1, 2, 100)]


@pytest.mark.parametrize("plan", plans(4), ids=str)
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_every_plan_agrees(plan: Plan, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = make_structure("linear", (18, 36), factors=((2, 3, 1, 3), (3, 1, 4, 3)))
    every = [core.requires_grad_() for core in random_sum(structure)]
    x = torch.randn(batch, 36, dtype=torch.float64)
    monkeypatch.setattr(module, "_plan", lambda *_: plan)
    expected = x @ sum_weight([core.detach() for core in every], structure).T
    y = contract(x, every[:4], every[4:])
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), every)
    weight_gradient = 2 * expected.T @ x
    torch.testing.assert_close(list(found), pulled_back(every, sum_of(structure), weight_gradient))


class TestThePlan:
    SITES = ((1, 12, 12, 48), (48, 64, 64, 1))

    @pytest.mark.parametrize("rates", [CPU, GPU])
    def test_low_rank_part_raises_the_cost(self, rates: Any) -> None:
        alone = {(way.cuts, way.rebuild): way.seconds for way in ways(self.SITES, 64, rates)}
        added = {(way.cuts, way.rebuild): way.seconds for way in ways(self.SITES, 64, rates, 32)}
        assert added.keys() - alone.keys() == {((0, 2), True)}  # the whole weight, to be added to
        assert all(added[way] > seconds for way, seconds in alone.items())

    def test_rank_can_change_the_plan(self) -> None:
        """A rank that makes two products dearer than adding it to the weight turns the choice."""
        batches = [1 << power for power in range(14)]
        alone = [cheapest(self.SITES, batch, False).rebuild for batch in batches]
        added = [cheapest(self.SITES, batch, False, 256).rebuild for batch in batches]
        assert alone != added
        assert all(more or not less for less, more in zip(alone, added, strict=True))

    def test_layer_plans_with_its_rank(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[int] = []

        def seen(sites: Any, batch: int, on_gpu: bool, rank: int) -> Plan:
            asked.append(rank)
            return cheapest(sites, batch, on_gpu, rank)

        monkeypatch.setattr(module, "_plan", seen)
        for rank in (0, 3):
            with_cores(nn.Linear(24, 18), low_rank=rank)(torch.randn(2, 24))
        assert asked == [0, 3]


def test_embedding_gathers_both_parts() -> None:
    structure = make_structure("embedding", (101, 24), sites=3)
    cores = [core.float() for core in random_sum(structure)]
    table = sum_weight(cores, structure).float()
    layer = nn.Embedding(101, 24)
    adopt(layer, "weight", cores, sum_of(structure))
    assert isinstance(layer, MPOEmbedding)
    for count in (1, 20_000):
        indices = torch.randint(0, 101, (count,))
        torch.testing.assert_close(layer(indices), table[indices], rtol=1e-5, atol=1e-5)


def test_repr_and_held_weight() -> None:
    layer = with_cores(nn.Linear(24, 18), low_rank=2).eval()
    assert isinstance(layer, MPOLinear)
    assert layer.extra_repr().endswith("bonds=(1, 3, 3, 1), low_rank=2")
    assert "low_rank" not in repr(with_cores(nn.Linear(24, 18)))
    x = torch.randn(3, 24)
    expected = layer(x)
    use_weights(layer.requires_grad_(False), "dense")
    torch.testing.assert_close(layer(x), expected)
    weight = sum_weight(list(layer.cores), layer.structure).float()
    torch.testing.assert_close(torch.clone(layer.weight), weight)


def test_works_under_autocast() -> None:
    layer = with_cores(nn.Linear(24, 18), low_rank=2)
    x = torch.randn(3, 24)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(x)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected, rtol=0.05, atol=0.3)


def test_rejects_whole_maps() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    structure = make_structure("convmap", (4, 4, 3, 3), geometry=geometry_of(layer, (4, 4)))
    added = [torch.ones(1, 64, 1, 2), torch.ones(2, 1, 64, 1)]
    with pytest.raises(ValueError, match="a whole map has no low-rank part"):
        adopt(layer, "weight", [*random_cores(structure, 2), *added], sum_of(structure))
    assert type(layer) is nn.Conv2d


def test_reference_is_the_sum() -> None:
    structure = make_structure("linear", (4, 6), sites=2)
    *chain, left, right = cores = random_sum(structure)
    expected = by_eq_5(chain, structure) + left[0, :, 0] @ right[:, 0, :, 0]
    torch.testing.assert_close(sum_weight(cores, structure), expected)
