from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from mpoc.errors import UsageError
from mpoc.reproduce.figures import METHODS, draw_image_figures
from mpoc.reproduce.image_states import ImageStates, ImageStatesRequest, approximate, measure_images
from tests.reproduce.images import write_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits", train=20, test=40)


@pytest.fixture(scope="module")
def done(digits: Path) -> ImageStates:
    return measure_images(ImageStatesRequest(digits, (16, 1, 4, 12)), lambda _: None)


def test_counts_match_the_cores(done: ImageStates) -> None:
    for found in done.states.values():
        assert [at.kept for at in found] == [1, 4, 12, 16]
        assert [at.numbers for at in found] == [20, 224, 992, 2 * 16 + 2 * 256 + 1024]
    assert done.pixels == 784 and done.split == "test" and len(done.images) == 40


def test_error_falls_with_the_bond_to_zero(done: ImageStates) -> None:
    for found in (*done.states.values(), *done.peers.values()):
        decibels = [at.decibels for at in found]
        assert decibels == sorted(decibels)
        assert decibels[-1] == pytest.approx(10 * math.log10(12 * 255**2))


def test_decibels_average_over_images(done: ImageStates) -> None:
    near, numbers = approximate(done.images, "morton", 4)
    errors = np.square((near - done.images).numpy()).reshape(40, -1).mean(1)
    at = done.states["morton"][1]
    assert numbers == at.numbers
    assert at.decibels == pytest.approx(np.mean(-10 * np.log10(errors)))
    assert at.sigma == pytest.approx(np.std(-10 * np.log10(errors), ddof=1))
    assert at.of_mean_error == pytest.approx(-10 * np.log10(errors.mean()))


def test_baselines_use_no_more_numbers(done: ImageStates) -> None:
    for found in done.peers.values():
        for at, state in zip(found, done.states["morton"], strict=True):
            assert at.numbers <= state.numbers
    assert [at.kept for at in done.peers["svd"]] == [0, 4, 17, 28]
    assert [at.kept for at in done.peers["dct-own"]] == [10, 112, 496, 784]


def test_raster_order_separates_rows_and_columns(tmp_path: Path) -> None:
    """Images that are the same in all columns."""
    x = np.repeat(np.random.default_rng(0).integers(0, 255, (10, 1, 32, 1), dtype=np.uint8), 32, 3)
    np.savez(tmp_path / "bars.npz", allow_pickle=False, x=x, y=np.arange(10))
    done = measure_images(ImageStatesRequest(tmp_path / "bars.npz", (8,)), lambda _: None)
    assert done.entropies["raster"][3] == pytest.approx(0, abs=1e-6)
    assert done.entropies["morton"][3] > 0.01
    assert done.peers["svd"][0].decibels > 58


def test_colour_is_the_first_site(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 255, (10, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "colours.npz", allow_pickle=False, x=x, y=np.arange(10))
    done = measure_images(ImageStatesRequest(tmp_path / "colours.npz", (2,)), lambda _: None)
    assert done.states["raster"][0].numbers == 3 * 2 + 2 * 4 * 2 + 2 * 4 * 2 + 2 * 4
    assert len(done.entropies["raster"]) == 3


def test_choice_of_images_is_seeded(digits: Path) -> None:
    def run(seed: int) -> ImageStates:
        return measure_images(ImageStatesRequest(digits, (2,), seed), lambda _: None)

    assert torch.equal(run(0).images, run(0).images) and run(0).as_dict() == run(0).as_dict()
    assert not torch.equal(run(0).images, run(1).images)


def test_report_round_trips_json(done: ImageStates) -> None:
    report: dict[str, Any] = json.loads(json.dumps(done.as_dict()))
    assert report["schema"] == "mpoc.image-states/1" and report["numbers_of_an_image"] == 784
    assert report["states"]["morton"][0]["numbers"] == 20 and len(report["entropies"]["raster"]) == 4


@pytest.mark.slow
def test_draws_figures(done: ImageStates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []

    def keep(figure: Figure, target: Path) -> None:
        figures.append(figure)
        target.touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    written = draw_image_figures(done, tmp_path / "plots")
    names = ["mps-images.svg", "mps-images-entropy.svg", "mps-images-examples.svg"]
    assert [file.name for file in written] == names and all(file.exists() for file in written)
    quality, entropy, examples = (figure.axes for figure in figures)
    assert [line.get_label() for line in quality[0].lines[:5]] == [*METHODS.values()]
    assert list(quality[0].lines[0].get_ydata()) == [at.decibels for at in done.states["morton"]]
    assert list(quality[0].lines[2].get_xdata()) == [at.numbers / 784 for at in done.peers["svd"] if at.kept]
    assert list(entropy[0].lines[1].get_ydata()) == list(done.entropies["raster"])
    assert [axes.get_ylabel() for axes in examples[::8]] == [
        "image",
        "Morton order, D = 4",
        "raster order, D = 4",
    ]


def test_rejects_bad_data_and_bonds(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words " * 500)
    with pytest.raises(UsageError, match="mps-images takes images, not txt"):
        measure_images(ImageStatesRequest(tmp_path / "text.txt"), lambda _: None)
    with pytest.raises(UsageError, match="each at least 1"):
        measure_images(ImageStatesRequest(digits, (0, 2)), lambda _: None)
