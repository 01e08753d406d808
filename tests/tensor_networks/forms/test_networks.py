"""Trees and MERAs against the sum over all legs, and through layers of every kind."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from mpoc.nn import adopt
from mpoc.tensor_networks.forms.contraction import contract_all
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.layout import deinterleave
from mpoc.tensor_networks.forms.mera import Mera
from mpoc.tensor_networks.forms.tree import Tree
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.weights import random_cores

SHAPES = [
    ("linear", (24, 36), False, 3),
    ("linear", (30, 37), True, 4),  # padded
    ("linear", (6, 4), False, 2),
    ("linear", (32, 32), False, 5),
    ("linear", (7, 5), False, 2),  # primes: one site
    ("conv2d", (8, 6, 3, 3), False, 2),
    ("embedding", (37, 12), False, 3),
    ("experts", (3, 8, 12), False, 2),
]


def structure(kind: str, shape: tuple[int, ...], transposed: bool, sites: int, form_name: str) -> Structure:
    return make_structure(kind, shape, transposed, sites, form=form_name)


def brute_force(cores: Sequence[Tensor], structure: Structure, bond: int) -> Tensor:
    """One einsum over every leg at once."""
    wired = structure.cores(structure.bonds(bond))
    numbers = {leg: k for k, leg in enumerate(dict.fromkeys(leg for core in wired for leg in core.legs))}
    operands: list[Tensor | list[int]] = []
    for core, of in zip(cores, wired, strict=True):
        operands += [core, [numbers[leg] for leg in of.legs]]
    sites = range(1, len(structure.site_sizes) + 1)
    interleaved = [numbers[leg] for k in sites for leg in (f"j{k}", f"i{k}")]
    return deinterleave(torch.einsum(*operands, interleaved), structure)


@pytest.mark.parametrize("form_name", ["tree", "mera"])
@pytest.mark.parametrize(("kind", "shape", "transposed", "sites"), SHAPES)
def test_weight_is_the_sum_over_all_legs(
    kind: str, shape: tuple[int, ...], transposed: bool, sites: int, form_name: str
) -> None:
    of = structure(kind, shape, transposed, sites, form_name)
    for bond in (1, 3):
        cores = random_cores(of, bond)
        form = form_of(cores, of)
        assert isinstance(form, Tree if form_name == "tree" else Mera)
        assert form.num_parameters == of.num_parameters(bond) == sum(map(torch.numel, cores))
        assert len(of.site_sizes) < 3 or form.bonds == of.bonds(bond)
        torch.testing.assert_close(form_of(cores, of).to_weight(), brute_force(cores, of, bond))


@pytest.mark.parametrize("form_name", ["tree", "mera"])
def test_gradients_reach_every_core(form_name: str) -> None:
    of = structure("linear", (24, 36), False, 4, form_name)
    cores = [core.requires_grad_() for core in random_cores(of, 2)]
    assert torch.autograd.gradcheck(lambda *given: form_of(given, of).to_weight(), cores, fast_mode=True)


@pytest.mark.parametrize("form_name", ["tree", "mera"])
def test_rejects_cores_of_other_shapes(form_name: str) -> None:
    of = structure("linear", (24, 36), False, 4, form_name)
    cores = random_cores(of, 2)
    for wrong in (cores[:-1], [*cores[:-1], cores[-1][:1]], [core.flatten() for core in cores]):
        with pytest.raises(ValueError):
            form_of(wrong, of)


def test_contraction_matches_einsum() -> None:
    generator = torch.Generator().manual_seed(0)
    legs = [("a", "b"), ("b", "c", "d"), ("e",), ("d", "f", "c"), ("e", "g")]
    sizes = {name: 2 + k for k, name in enumerate("abcdefg")}
    tensors = [torch.randn([sizes[n] for n in names], generator=generator) for names in legs]
    found = contract_all(tensors, legs, ("f", "g", "a"))
    torch.testing.assert_close(found, torch.einsum("ab,bcd,e,dfc,eg->fga", *tensors))


@pytest.mark.parametrize(
    "size", [4, 32]
)  # of a result below and above that for which legs are ordered before
def test_contracts_to_a_large_result(size: int) -> None:
    tensors = [
        torch.randn(size, 3, size).double(),
        torch.randn(3, size, 5, size).double(),
        torch.randn(5).double(),
    ]
    legs = [("a", "x", "b"), ("x", "c", "y", "d"), ("y",)]
    found = contract_all(tensors, legs, ("d", "a", "c", "b"))
    torch.testing.assert_close(found, torch.einsum("axb,xcyd,y->dacb", *tensors))


@pytest.mark.parametrize("form_name", ["tree", "mera"])
@pytest.mark.parametrize("batch", [0, 1, 5, 3000])
def test_linear_layer_matches_its_weight(form_name: str, batch: int) -> None:
    layer = nn.Linear(30, 37).double()
    of = structure("linear", (37, 30), False, 4, form_name)
    adopt(layer, "weight", random_cores(of, 3), of)
    x = torch.randn(batch, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ torch.clone(layer.weight).T + layer.bias)


@pytest.mark.parametrize("form_name", ["tree", "mera"])
@pytest.mark.parametrize(
    ("module", "kind", "given"),
    [
        (nn.Conv2d(6, 8, 3, padding=1), "conv2d", torch.ones(2, 6, 5, 5)),
        (nn.Embedding(37, 12), "embedding", torch.tensor([[0, 5], [36, 7]])),
    ],
)
def test_other_layers_match_dense_layers(form_name: str, module: nn.Module, kind: str, given: Tensor) -> None:
    dense, layer = copy.deepcopy(module), copy.deepcopy(module)
    of = structure(kind, tuple(dense.get_parameter("weight").shape), False, 3, form_name)
    cores = [core.float() for core in random_cores(of, 2)]
    with torch.no_grad():
        dense.get_parameter("weight").copy_(form_of(cores, of).to_weight())
    adopt(layer, "weight", cores, of)
    torch.testing.assert_close(layer(given), dense(given), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form_name", ["mpo", "tree", "mera"])
@pytest.mark.parametrize("batch", [2, 3000])  # through the cores, and through a weight that is built
def test_autocast_matches_a_dense_layer(form_name: str, batch: int) -> None:
    layer = nn.Linear(30, 37)
    of = structure("linear", (37, 30), False, 4, form_name)
    adopt(layer, "weight", [core.float() for core in random_cores(of, 3)], of)
    x = torch.randn(batch, 30, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert all(core.grad is not None for core in layer.parameters())
    found = found.detach()
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("form_name", ["tree", "mera"])
def test_compiles_to_one_graph_for_all_batches(form_name: str) -> None:
    layer = nn.Linear(30, 37)
    of = structure("linear", (37, 30), False, 4, form_name)
    adopt(layer, "weight", [core.float() for core in random_cores(of, 2)], of)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for batch in (4, 9):
        x = torch.randn(batch, 30, generator=torch.Generator().manual_seed(batch))
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-3)
    torch.compiler.reset()
