"""The papers' structures, against the numbers that the papers print."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpoc.errors import UsageError
from mpoc.models import zoo
from mpoc.reproduce.catalogue import PARAMETERS, STUDIES
from mpoc.reproduce.experiment import Experiment, ReplacedLayer
from mpoc.reproduce.networks import (
    fitted_cores,
    layer_structure,
    nominal_bonds,
    num_cores_parameters,
    random_cores,
    replace_layers,
)
from mpoc.reproduce.run import dense_sizes
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import Structure

ALL = [(study, name) for study in STUDIES.values() for name in study.variants]


def meta(experiment: Experiment) -> nn.Module:
    with torch.device("meta"):
        return zoo.make(experiment.network)


def counts(experiment: Experiment, bond: int = 0) -> tuple[int, int]:
    """N_mpo and N_ori over the replaced layers."""
    network = meta(experiment)
    structures = [(layer_structure(network, layer), layer.bond or bond) for layer in experiment.layers]
    replaced = sum(num_cores_parameters(structure, own) for structure, own in structures)
    return replaced, dense_sizes(experiment)[1]


def experiment(study: str, variant: str | None = None) -> Experiment:
    variants = STUDIES[study].variants
    return variants[variant or next(iter(variants))]


def test_fc2_matches_the_paper() -> None:
    fc2 = experiment("fc2")
    assert counts(fc2, 2) == (1_024, 203_264)  # "only 1024 parameters, about 200 times less"
    replaced, original = counts(fc2, 16)
    assert replaced / original < 0.08


def test_lenet5_matches_the_paper() -> None:
    assert counts(experiment("lenet5")) == (2_860, 58_920)  # ρ ≈ 0.05


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
def test_vgg_matches_the_paper(name: str) -> None:
    assert counts(experiment(name), 4) == (10_944, 23_633_920)  # ρ ≈ 0.0005


@pytest.mark.parametrize(("study", "variant"), ALL, ids=lambda value: getattr(value, "name", value))
def test_structures_reach_the_ratios_of_the_paper(study: object, variant: str) -> None:
    found = study.variants[variant]  # type: ignore[attr-defined]
    for bond in found.bonds or (0,):
        replaced, original = counts(found, bond)
        published = found.published.get(bond)
        if published is not None and published.rho is not None and variant != "convolution":
            assert replaced / original == pytest.approx(published.rho, rel=0.1)


@pytest.mark.parametrize("bond", [4, 8, 16, 32])
def test_picogpt_matches_the_paper_code(bond: int) -> None:
    network = meta(experiment("picogpt"))
    whole, original = dense_sizes(experiment("picogpt"))
    assert whole == sum(p.numel() for p in network.parameters()) == PARAMETERS[0]
    assert whole - original + counts(experiment("picogpt"), bond)[0] == PARAMETERS[bond]


def linear(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Structure:
    rows, columns = 1, 1
    for j, i in zip(outputs, inputs, strict=True):
        rows, columns = rows * j, columns * i
    return Structure("linear", (rows, columns), False, outputs, inputs)


def test_random_cores_keep_the_nominal_bond() -> None:
    structure = linear((4, 4, 8, 8, 4), (1, 10, 1, 1, 1))
    assert max(structure.bonds(4)[-2:-1]) == 4 and structure.bonds(100)[-2] < 100
    form = MPO(random_cores(structure, 100, seed=0), structure)
    assert form.bonds == nominal_bonds(5, 100) == (1, 100, 100, 100, 100, 1)
    assert form.num_parameters == num_cores_parameters(structure, 100)


def test_random_cores_have_glorot_variance_and_a_seed() -> None:
    structure = linear((16, 16, 16), (16, 16, 16))
    cores = random_cores(structure, 8, seed=3)
    assert float(cores[1].std()) == pytest.approx((2 / (8 * 16 + 16 * 8)) ** 0.5, rel=0.03)
    assert float(cores[0].std()) == pytest.approx((2 / (16 + 16 * 8)) ** 0.5, rel=0.03)
    again = random_cores(structure, 8, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(cores, again, strict=True))
    assert not torch.equal(cores[0], random_cores(structure, 8, seed=4)[0])


def test_tt_svd_at_full_bond_is_the_dense_network() -> None:
    network, x = zoo.make("lenet5"), torch.rand(4, 1, 28, 28)
    before = network(x)
    layers = [
        ReplacedLayer("fc2", (2, 5, 6, 2), (2, 3, 7, 2)),
        ReplacedLayer("fc3", (2, 3, 7, 2), (1, 5, 2, 1)),
    ]
    replace_layers(network, layers, 10_000, "ttsvd", seed=0)
    torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        (nn.Linear(64, 48), ReplacedLayer("0", (4, 4, 4), (4, 3, 4))),
        (nn.Conv2d(4, 8, 3, padding=1), ReplacedLayer("0", (4, 4, 4), (4, 4, 8), size=(4, 4))),
        (nn.Linear(8, 8), ReplacedLayer("0", (2, 4), (2, 4))),  # nothing is truncated: the same cores
    ],
    ids=["linear", "map", "lossless"],
)
def test_rescaled_cores_have_the_norm_of_the_weight(module: nn.Module, layer: ReplacedLayer) -> None:
    network = nn.Sequential(module)
    structure = layer_structure(network, layer)
    weight = module.get_parameter("weight").detach()
    fitted, rescaled = (fitted_cores(weight, structure, 4, 0, rescaled=way) for way in (False, True))
    dense = MPO(fitted_cores(weight, structure, 10_000, 0), structure).norm()
    assert MPO(rescaled, structure).norm() == pytest.approx(dense, rel=1e-5)
    ratios = [float(one.norm() / other.norm()) for one, other in zip(rescaled, fitted, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios)) and ratios[0] >= 1 - 1e-6
    replace_layers(network, [layer], 4, "rescaled", seed=0)
    placed = network.get_submodule("0").state_dict()
    assert all(torch.equal(placed[f"cores.{k}"], core) for k, core in enumerate(rescaled))


def test_padded_map_at_full_bond_is_the_convolution() -> None:
    """DenseNet's factors make more inputs than there are; zeros follow them."""
    network = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1))
    x = torch.randn(2, 5, 4, 4)
    before = network(x)
    layer = ReplacedLayer("0", (4, 4, 6), (4, 4, 6), size=(4, 4))  # 96 inputs for 80
    replace_layers(network, [layer], 10_000, "ttsvd", seed=0)
    torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-5)


def test_rejects_wrong_factors() -> None:
    with pytest.raises(UsageError, match="783 inputs and 256 outputs, but the layer has 784 and 256"):
        layer_structure(zoo.make("fc2"), ReplacedLayer("fc1", (27, 29), (16, 16)))
