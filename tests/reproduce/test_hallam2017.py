"""The study of Hallam et al. 2017: parameters against the paper's, cores, and a run of a few steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mpoc.errors import UsageError
from mpoc.models import zoo
from mpoc.reproduce.catalogue import StudyChoice, choose_studies
from mpoc.reproduce.hallam2017 import MERA, baseline_counts, counts
from mpoc.reproduce.networks import channel_order, layer_structure, num_cores_parameters, replace_layers
from mpoc.reproduce.study import StudyRequest, run_study

# Variant and D → parameters of the fully connected layers, and what is printed where that differs.
COUNTS = {
    ("fc-1", 0): (17_041_920, 17_041_920),
    ("fc-2", 0): (4096 * 10 + 10 * 64 + 2_560, 305_664),
    ("fc-2-printed", 0): (305_664, 305_664),
    ("mera", 2): (3_120, 3_112),
    ("mera", 3): (4_342, 4_342),
    ("tt", 3): (3_232, 3_168),
    ("tt", 5): (4_380, 4_380),
    ("tt", 7): (6_088, 6_088),
    ("mera-channels", 2): (3_120, 3_112),
}
CONVOLUTIONS = 296_640


def made(variant: str) -> nn.Module:
    """With its cores at the start."""
    return replace_layers(zoo.make("mera-cnn"), MERA.variants[variant].layers, 2, "random", seed=0)


def on_meta(network: str) -> nn.Module:
    with torch.device("meta"):
        return zoo.make(network)


@pytest.mark.parametrize(("variant", "bond"), COUNTS)
def test_parameter_counts_match_the_paper(variant: str, bond: int) -> None:
    experiment = MERA.variants[variant]
    network = on_meta(experiment.network)
    structures = [layer_structure(network, layer) for layer in experiment.layers]
    dense = sum(structure.num_original for structure in structures)
    cores = sum(num_cores_parameters(structure, bond) for structure in structures)
    whole = sum(parameter.numel() for parameter in network.parameters()) - dense + cores
    found, printed = COUNTS[variant, bond]
    assert counts(MERA, experiment.network, whole).fully_connected == found
    assert counts(MERA, experiment.network, whole).total == found + CONVOLUTIONS
    published = experiment.published.get(bond, experiment.dense)
    assert published.parameters == (printed, printed + CONVOLUTIONS) or variant.startswith("tt")


def test_compression_is_relative_to_the_first_network() -> None:
    found = counts(MERA, "mera-cnn", CONVOLUTIONS + 4_342 - 2_560 + 640).of(baseline_counts(MERA))
    assert (round(found[0]), round(found[1], 2)) == (3925, 57.61)  # the paper's 3924 is cut, not rounded


def test_convolutions_match_the_paper() -> None:
    network = on_meta("mera-cnn")
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert sum(module.weight.numel() for module in convolutions) == CONVOLUTIONS
    names = {name.split(".")[0] for name, _ in network.named_parameters()}
    assert names == {f"conv{k}" for k in range(1, 7)} | {"fc1", "fc2", "head"}


@pytest.mark.slow
def test_features_are_pixels_with_channels() -> None:
    network = zoo.make("mera-cnn").eval()
    seen: list[torch.Tensor] = []
    network.get_submodule("fc1").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network.get_submodule("bn6").register_forward_hook(lambda *_: seen.append(_[2]))
    with torch.no_grad():
        network(torch.randn(2, 3, 32, 32))
    maps, features = seen
    assert torch.equal(features[:, 256 * (4 * 2 + 1) + 7], maps[:, 7, 2, 1])


def test_orders_channels_first_and_neighbours_together() -> None:
    order = channel_order(4, 4, 256)
    features = torch.arange(4 * 4 * 256).reshape(4, 4, 256)
    expected = [features[y, x, 9] for y, x in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2))]
    assert list(order[9 * 16 : 9 * 16 + 5]) == expected
    assert sorted(order) == list(range(4096))


@pytest.mark.slow
def test_order_does_not_change_the_features() -> None:
    other, plain = (made(name).get_submodule("fc1") for name in ("mera-channels", "mera"))
    x = torch.randn(3, 4096)
    with torch.no_grad():
        torch.testing.assert_close(other(x), plain(x[:, channel_order(4, 4, 256)]))
        assert not torch.allclose(other(x), plain(x))


@pytest.mark.slow
def test_initialisation_is_orthogonal_and_keeps_variance() -> None:
    first, second = (made("mera").get_submodule(name) for name in ("fc1", "fc2"))
    x = torch.randn(50, 4096, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(first(x).norm(dim=1), x.norm(dim=1), rtol=1e-4, atol=1e-4)
        assert float(second(first(x)).var()) == pytest.approx(1.0, rel=0.1)


def test_runs_every_variant_by_default() -> None:
    labels = [experiment.label for experiment in choose_studies(MERA, StudyChoice())]
    assert labels == ["FC-1", "FC-2", "FC-2, as printed", "MERA", "TT", "MERA, channels first"]
    words = choose_studies(MERA, StudyChoice(paper=True))[3].training.words()
    assert words.startswith(
        "1000 epochs, batch 50, adam, lr 0.001 constant, no L2, random shifts of 4 pixels"
    )
    assert words.endswith("stopped after 10 evaluations (one every 500 steps) without improvement")


def write_images(path: Path) -> Path:
    random = np.random.default_rng(0)
    parts: dict[str, Any] = {}
    for split, count in (("train", 60), ("test", 20)):
        parts[f"x_{split}"] = random.integers(0, 255, (count, 3, 32, 32), dtype=np.uint8)
        parts[f"y_{split}"] = np.arange(count) % 10
    np.savez(path, allow_pickle=False, **parts)
    return path


@pytest.mark.slow
def test_trains_a_few_steps(tmp_path: Path) -> None:
    data = write_images(tmp_path / "images.npz")
    choice = StudyChoice(variants=("mera",), bonds=(2,))
    asked = StudyRequest("mera", data, tmp_path / "out", choice, quick=True, held_out=0.2, device="cpu")
    done = run_study(asked, lambda _: None)
    assert [(row.experiment.label, row.start, row.bond) for row in done.rows] == [
        ("MERA", "random", 2),
    ]
    row = done.rows[0]
    assert row.results[0].steps == 10 and (row.results[0].milliseconds or 0) > 0
    found = done.as_dict()["rows"][0]
    assert found["as_counted_there"]["fully_connected"] == 3_120
    assert found["structures"][1] == "fc2 MERA(2,2,2,2,2,2,2,2,2,2,2,2→1,2,1,2,1,2,1,2,1,2,1,2)(2)"
    with pytest.raises(UsageError, match="--hold-out 0: these trainings end by their validation split"):
        run_study(replace(asked, held_out=0.0), lambda _: None)
    for starts, words in ((("ttsvd",), "--starts ttsvd"), ((), r"--starts \(\)")):
        with pytest.raises(UsageError, match=f"{words}: no selected variant has such a start"):
            run_study(replace(asked, starts=starts), lambda _: None)
