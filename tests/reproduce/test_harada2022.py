"""Bonds that spectra choose, pixels in another order, and the study of both."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import nn

from mpoc.errors import UsageError
from mpoc.models import zoo
from mpoc.reproduce import study as module
from mpoc.reproduce.catalogue import STUDIES, StudyChoice
from mpoc.reproduce.experiment import ReplacedLayer, open_paper_data
from mpoc.reproduce.figures import draw_figures
from mpoc.reproduce.networks import core_forms, cut_by_weight, num_cores_parameters, replace_layers
from mpoc.reproduce.run import Cell, run_cell
from mpoc.reproduce.study import Reproduction, StudyRequest, run_study
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.fit.tt_svd import tt_svd
from mpoc.tensor_networks.forms.layout import interleave
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import Structure
from tests.reproduce.images import write_digits

SITES = (4, 4, 4, 4, 4)
LAYER = ReplacedLayer("fc1", SITES, SITES, order="morton")
SMALL = Structure("linear", (24, 12), False, (2, 3, 4), (3, 2, 2))


@given(st.integers(0, 1000), st.sampled_from([0.5, 0.1, 0.01, 1e-4]))
@settings(max_examples=20, deadline=None)
def test_bonds_are_the_smallest_within_the_discard(seed: int, discard: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -3, 12, dtype=torch.float64)
    weight = torch.randn(24, 12, dtype=torch.float64, generator=generator) * scales
    whole = tt_svd(weight, SMALL, Truncation(100)).form
    assert isinstance(whole, MPO)
    cut = cut_by_weight(whole, discard)
    tensor = interleave(weight, SMALL).reshape(6, 6, 8).numpy()
    total = np.square(tensor).sum()
    for bond, rows in zip(cut.bonds[1:-1], (6, 36), strict=True):
        squares = np.square(np.linalg.svd(tensor.reshape(rows, -1), compute_uv=False)) / total
        assert bond <= max(1, int((np.cumsum(squares[::-1])[::-1] > discard).sum()))
    error = float((cut.to_matrix() - whole.to_matrix()).square().sum()) / total
    assert error <= 2 * discard * (1 + 1e-9)


def test_bonds_match_the_spectra_without_earlier_truncation() -> None:
    weight = torch.randn(24, 12, dtype=torch.float64) * torch.logspace(0, -3, 12, dtype=torch.float64)
    whole = tt_svd(weight, SMALL, Truncation(100)).form
    assert isinstance(whole, MPO)
    kept = cut_by_weight(whole, 0.05).bonds[1:-1]
    for bond, values in zip(kept, whole.spectra(), strict=True):
        shares = values.square() / values.square().sum()
        assert float(shares[bond:].sum()) <= 0.05 < float(shares[bond - 1 :].sum())


def test_parameter_counts_match_the_network() -> None:
    structure = Structure("linear", (1024, 1024), False, SITES, SITES)
    for bond in (2, 4, 8, 16):
        assert num_cores_parameters(structure, bond) == 2 * 16 * bond + 3 * 16 * bond**2


@pytest.mark.parametrize("order", ["raster", "morton"])
def test_every_pixel_order_is_exact_at_full_bond(order: str) -> None:
    network, x = nn.Sequential(nn.Linear(64, 8)), torch.rand(3, 64)
    before, names = network(x), ["0.bias", *(f"0.cores.{k}" for k in range(3))]
    replace_layers(network, [ReplacedLayer("0", (4, 4, 4), (2, 2, 2), order=order)], 100, "ttsvd", seed=0)
    torch.testing.assert_close(network(x), before)
    assert sorted(network.state_dict()) == names


def test_pixel_orders_differ_below_full_bond() -> None:
    x, found = torch.rand(3, 1, 28, 28), []
    for order in ("raster", "morton"):
        torch.manual_seed(0)
        network = replace_layers(zoo.make("harada"), [replace(LAYER, order=order)], 3, "random", seed=0)
        assert core_forms(network, [LAYER])["fc1"].bonds == (1, 3, 3, 3, 3, 1)
        found.append(network(x))
    assert not torch.allclose(*found)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits", train=100)


def asked(digits: Path, output: Path, *variants: str, starts: tuple[str, ...] = ("random",)) -> StudyRequest:
    choice = StudyChoice(variants, bonds=(4,), epochs=2)
    return StudyRequest("harada", digits, output, choice, starts, device="cpu")


@pytest.mark.slow
def test_automatic_bonds_start_from_the_trained_cores(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, str]] = []

    def counts(cell: Cell, *arguments: Any) -> Any:
        trained.append((cell.experiment.label, cell.start))
        return run_cell(cell, *arguments)

    monkeypatch.setattr(module, "run_cell", counts)
    done = run_study(asked(digits, tmp_path, "morton", "morton-random-0.3"), lambda _: None)
    assert len(trained) == len(set(trained)) == 3  # the fixed network's cores are used again
    dense, fixed, automatic = done.rows
    assert dense.results[0].bonds == {} and fixed.results[0].bonds == {"fc1": [4, 4, 4, 4]}
    bonds = (1, *automatic.results[0].bonds["fc1"], 1)
    assert max(bonds) <= 4 and sum(bonds) < 18
    assert automatic.replaced == sum(16 * a * b for a, b in pairwise(bonds))
    assert automatic.parameters == automatic.replaced + 10 * 1024
    assert automatic.results[0].start > 20  # not from nothing
    entropies = automatic.results[0].entropies["fc1"]
    assert all(0 <= s <= np.log(d) + 1e-5 for s, d in zip(entropies, bonds[1:-1], strict=True))


@pytest.mark.slow
def test_automatic_bonds_train_the_missing_fixed_network(digits: Path, tmp_path: Path) -> None:
    together = run_study(asked(digits, tmp_path / "a", "raster", "raster-random-0.1"), lambda _: None)
    alone = run_study(asked(digits, tmp_path / "b", "raster-random-0.1"), lambda _: None)
    assert alone.rows[1].results[0].curve == together.rows[2].results[0].curve


@pytest.mark.slow
def test_each_automatic_variant_has_its_start(digits: Path, tmp_path: Path) -> None:
    variants = ("raster-dense-0.5", "raster-random-0.3")
    said: list[str] = []
    done = run_study(asked(digits, tmp_path, *variants, starts=("ttsvd",)), said.append)
    assert "note: no start ttsvd: raster order, automatic from random, 0.3" in said
    assert [(row.start, row.experiment.discard) for row in done.rows] == [("dense", 0.5), ("ttsvd", 0.5)]
    assert [row["discard"] for row in done.as_dict()["rows"]] == [0.5, 0.5]
    with pytest.raises(UsageError, match="--starts rescaled: no selected variant has such a start"):
        run_study(asked(digits, tmp_path, *variants, starts=("rescaled",)), lambda _: None)


def test_raster_results_keep_their_keys(digits: Path) -> None:
    material = open_paper_data(digits, "harada", None, 0.0, 0)
    raster, morton = (
        Cell(STUDIES["harada"].variants[order], "random", 4, 0).identity(material)["layers"]
        for order in ("raster", "morton")
    )
    layer = {"name": "fc1", "bond": 4, "inputs": [4] * 5, "outputs": [4] * 5, "size": []}
    assert raster == [layer] and morton == [{**layer, "order": "morton"}]


@pytest.mark.slow
def test_averages_parameters_over_runs(digits: Path, tmp_path: Path) -> None:
    request = replace(asked(digits, tmp_path, "raster-random-0.1"), runs=2)
    row = run_study(request, lambda _: None).rows[1]
    assert row.parameters == round(np.mean([result.parameters for result in row.results]))


@pytest.mark.slow
def test_draws_accuracy_over_parameters(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = ("raster", "raster-random-0.3", "raster-random-0.1")
    done: Reproduction = run_study(asked(digits, tmp_path, *variants), lambda _: None)
    figures: list[Any] = []
    save = Figure.savefig

    def keep(figure: Figure, target: Path) -> None:
        figures.append(figure)
        save(figure, target)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw_figures(done, tmp_path / "plots")
    axes = figures[0].axes[0]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "parameters of the replaced layers"
    series = axes.containers[1].lines[0]
    rows = sorted(done.rows[2:], key=lambda row: row.replaced)
    assert list(series.get_xdata()) == [row.replaced for row in rows]
    assert STUDIES["harada"].axis == "parameters"
