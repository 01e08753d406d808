"""What the charts hold, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpoc.io.manifest import LayerRecord, Manifest, Source
from mpoc.reporting.charts import (
    ErrorKind,
    best_error,
    common_layers,
    comparison_charts,
    entropy_chart,
    entropy_text,
    layer_charts,
    mean_error,
    shared_error,
    spectrum_chart,
    training_charts,
)
from mpoc.reporting.contents import BondSpectra, FileData, LayerData
from tests.reporting.files import TRAINING


def layer(name: str, stored: int, error: float | None = None, **changes: Any) -> LayerRecord:
    form = "dense" if stored == 100 else "svd"
    record = LayerRecord(
        name, "linear", (10, 10), "float32", form, 100, stored, "float32", relative_error=error
    )
    return replace(record, **changes)


def manifest(*layers: LayerRecord) -> Manifest:
    return Manifest(Source("m.pt", 400, 300, "ab"), layers, {}, "names and shapes")


WHOLE = manifest(layer("a.weight", 40, 0.5), layer("b.weight", 60, 0.1), layer("c.weight", 100))
CALIBRATED = manifest(layer("a.weight", 40, 0.5, held_out_error=0.3), layer("c.weight", 100))


def bond(stored: tuple[tuple[int, float], ...], **changes: Any) -> BondSpectra:
    return replace(BondSpectra("bond 1", len(stored), stored, None, 0.7, None), **changes)


def test_layers_keep_the_order_of_the_file() -> None:
    sizes, ratio, errors = layer_charts(WHOLE)
    assert [series.points for series in sizes.series] == [
        ((1, 100), (2, 100), (3, 100)),
        ((1, 40), (2, 60), (3, 100)),
    ]
    assert ratio.series[0].points == ((1, 0.4), (2, 0.6), (3, 1.0))
    assert errors.series[0].points == ((1, 0.5), (2, 0.1), (3, 0.0))


def test_charts_of_rounded_layers_are_in_bytes() -> None:
    rounded = layer("a.weight", 100, 0.5, storage=({"kind": "coded"},), nbytes=50)
    sizes, ratio, _ = layer_charts(manifest(rounded, layer("c.weight", 100)))
    assert sizes.title == "Bytes" and [series.points for series in sizes.series] == [
        ((1, 400), (2, 400)),
        ((1, 50), (2, 400)),
    ]
    assert ratio.series[0].points == ((1, 4.0), (2, 32.0))


def test_omits_charts_without_data() -> None:
    assert len(layer_charts(manifest(layer("a.weight", 40)))) == 2
    assert len(layer_charts(manifest(layer("a.weight", 100)))) == 2
    assert layer_charts(manifest()) == []


def test_picks_an_error_that_all_layers_have() -> None:
    assert best_error(CALIBRATED) == ErrorKind("held_out_error")
    assert shared_error([WHOLE]) == shared_error([WHOLE, CALIBRATED]) == ErrorKind("relative_error")
    assert shared_error([CALIBRATED]) == ErrorKind("held_out_error")
    assert shared_error([WHOLE, manifest(layer("a.weight", 40))]) is None
    assert shared_error([manifest()]) is None


def test_mean_counts_dense_layers() -> None:
    names = common_layers([WHOLE])
    assert mean_error(WHOLE, ErrorKind("relative_error"), names) == pytest.approx(0.2)
    assert mean_error(CALIBRATED, ErrorKind("held_out_error"), names) == pytest.approx(0.15)


def test_means_use_layers_common_to_all_files() -> None:
    less = manifest(layer("a.weight", 40, 0.3), layer("c.weight", 30, 0.7), layer("d.weight", 30, 0.9))
    whole, _ = comparison_charts([FileData("a", WHOLE, 200, ()), FileData("b", less, 300, ())])
    assert [one.points[0][1] for one in whole.series[:2]] == pytest.approx([0.25, 0.5])
    assert "the 2 layers" in whole.caption
    other = manifest(layer("d.weight", 30, 0.9))
    assert len(comparison_charts([FileData("a", WHOLE, 200, ()), FileData("b", other, 300, ())])) == 1


def test_spectra_share_a_scale_and_omit_noise() -> None:
    original = ((1, 0.8), (2, 0.6), (3, 1e-9))
    chart = spectrum_chart(bond(((1, 1.0),), original=original, scale=0.8))
    assert chart is not None and chart.mark is not None
    assert {one.name: one.points for one in chart.series} == {
        "original": ((1, 0.8), (2, 0.6)),
        "stored": ((1, 0.8),),
    }
    assert (chart.mark.x, chart.mark.label) == (1, "D = 1")
    assert spectrum_chart(bond(((1, 0.0),))) is None
    assert spectrum_chart(bond(())) is None


def test_draws_entropies_with_their_bound() -> None:
    record = layer("a.weight", 40, entropies_of_weight=(None, 1.5))
    bonds = (bond(((1, 0.8), (2, 0.6))), bond(((1, 1.0),), entropy=0.0))
    chart = entropy_chart(LayerData(1, record, bonds))
    assert chart is not None
    points = {one.name: one.points for one in chart.series}
    assert points["ln D"] == ((1.0, math.log(2)), (2.0, 0.0))
    assert points["original"] == ((2, 1.5),)
    assert points["stored"] == ((1, 0.7), (2, 0.0))
    assert entropy_text(LayerData(1, record, bonds)) == ""


def test_single_bond_entropy_is_text() -> None:
    single = LayerData(1, layer("a.weight", 40, entropies_of_weight=(1.5,)), (bond(((1, 0.8), (2, 0.6))),))
    assert entropy_chart(single) is None
    assert entropy_text(single) == "0.7 nats, of the original 1.5"


def test_tree_branches_are_not_joined() -> None:
    record = layer("a.weight", 40, form="tree")
    bonds = (bond(((1, 0.8), (2, 0.6))),) * 3
    chart = entropy_chart(LayerData(1, record, bonds))
    assert chart is not None and chart.x.label == "branch"
    assert {one.style for one in chart.series} == {"dots"}


def test_draws_all_trainings_in_order() -> None:
    loss, accuracy = training_charts(TRAINING)
    assert [one.points for one in loss.series] == [
        ((0.5, 1.5), (1.0, 0.7)),
        ((0.0, 2.3), (0.5, 1.2), (1.0, 0.9)),
    ]
    assert accuracy.series[0].points == ((0.0, 10.0), (0.5, 60.0), (1.0, 80.0))
    earlier = {"data": {"name": "before"}, "evaluations": [{"epoch": 1, "loss": 3.0}]}
    charts = training_charts({**TRAINING, "earlier": earlier})
    assert "before" in charts[0].caption and len(charts) == 3


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"evaluations": 3},
        {"evaluations": [3, None, {"epoch": "x", "loss": 1.0}, {"epoch": 1, "loss": math.inf}]},
        {"data": 3, "split": [], "evaluations": [{"loss": math.nan, "epoch": 1}], "earlier": 7},
    ],
)
def test_damaged_trainings_have_no_curves(damaged: dict[str, Any]) -> None:
    assert training_charts(damaged) == []


def test_draws_comparisons() -> None:
    files = [FileData(name, WHOLE, nbytes, ()) for name, nbytes in (("a", 200), ("b", 300))]
    whole, layers = comparison_charts(files)
    assert [(one.name, one.points) for one in whole.series] == [
        ("a", ((200, pytest.approx(0.2)),)),
        ("b", ((300, pytest.approx(0.2)),)),
        ("dense", ((400, 0.0),)),
    ]
    assert [one.points for one in layers.series] == [((0.4, 0.5), (0.6, 0.1))] * 2
    unknown = FileData("c", manifest(layer("a.weight", 40)), 100, ())
    assert comparison_charts([*files, unknown]) == []


def test_curves_need_no_file(tmp_path: Path) -> None:
    many = [FileData(str(k), WHOLE, 100, ()) for k in range(9)]
    tones = [one.tone for one in comparison_charts(many)[0].series]
    assert tones[:7] == [*(f"file {k}" for k in range(1, 7)), "file 1"]
