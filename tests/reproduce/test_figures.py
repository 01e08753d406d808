"""What the figures show, asked of matplotlib itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from mpoc.reproduce.catalogue import StudyChoice
from mpoc.reproduce.experiment import STARTS
from mpoc.reproduce.figures import draw_figures
from mpoc.reproduce.study import Reproduction, StudyRequest, run_study
from tests.reproduce.images import write_digits


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    folder = tmp_path_factory.mktemp("figures")
    digits = write_digits(folder / "digits")
    choice = StudyChoice(bonds=(2, 16), epochs=2)
    asked = StudyRequest("fc2", digits, folder / "out", choice, runs=2, device="cpu")
    return run_study(asked, lambda _: None)


def drawn(done: Reproduction, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of both figures."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any) -> None:
        figures.append(figure)
        save(figure, *arguments)

    monkeypatch.setattr(Figure, "savefig", keep)
    written = draw_figures(done, folder)
    assert [file.name for file in written] == ["fc2.svg", "fc2-curves.svg"]
    assert all(file.stat().st_size > 5000 for file in written)
    return [figure.axes[0] for figure in figures]


@pytest.mark.slow
def test_draws_accuracy_over_bonds(
    done: Reproduction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = drawn(done, tmp_path / "plots", monkeypatch)[0]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["dense, FC2", "dense, the paper's", "MPO-Net, from TT-SVD", "MPO-Net, random start"]
    mean, sigma = done.rows[0].mean("final")
    assert axes.lines[0].get_ydata()[0] == mean and axes.lines[1].get_ydata()[0] == 98.35
    if sigma:
        band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
        assert (band.y0, band.y1) == pytest.approx((mean - sigma, mean + sigma))
    fitted = axes.containers[0].lines[0]
    assert list(fitted.get_xdata()) == [2, 16]
    assert list(fitted.get_ydata()) == [done.rows[1].mean("final")[0], done.rows[3].mean("final")[0]]


@pytest.mark.slow
def test_draws_convergence(done: Reproduction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(done, tmp_path / "plots", monkeypatch)[1]
    assert len(axes.lines) == 5
    for line, row in zip(axes.lines, done.rows, strict=True):
        assert list(line.get_xdata()) == [0, 1, 2]
        assert line.get_ydata()[-1] == pytest.approx(row.mean("final")[0])


def test_curves_of_starts_from_the_dense_network_follow_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = StudyChoice(bonds=(2,), epochs=3, control=True)
    digits = write_digits(tmp_path / "digits")
    asked = StudyRequest("fc2", digits, tmp_path / "out", choice, starts=STARTS, device="cpu")
    axes = drawn(run_study(asked, lambda _: None), tmp_path / "plots", monkeypatch)[1]
    ends = {line.get_label(): (line.get_xdata()[0], line.get_xdata()[-1]) for line in axes.lines}
    assert ends == {
        "dense": (0, 2),
        "dense, control": (0, 3),
        "MPO-Net, from TT-SVD, D = 2": (2, 3),
        "MPO-Net, from TT-SVD rescaled, D = 2": (2, 3),
        "MPO-Net, random start, D = 2": (0, 3),
    }
