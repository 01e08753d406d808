"""The report: totals by hand, JSON, CSV, sentences."""

import csv
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.io.manifest import LayerRecord, Manifest, Source, storage_record
from mpoc.io.training_history import Measured
from mpoc.io.weight_files import output_bytes
from mpoc.quantize.storage import Coded
from mpoc.reporting.remarks import headline
from mpoc.reporting.summary import Report, report_dict, summary, to_csv, to_json
from mpoc.runtime.formatting import human_bytes, times

SOME = settings(max_examples=80, deadline=None, derandomize=True)


def mpo(name: str, before: int, after: int, error: float | None = 0.05) -> LayerRecord:
    return LayerRecord(
        name,
        "linear",
        (before // 10, 10),
        "float32",
        "mpo",
        before,
        after,
        "bfloat16",
        output_factors=(before // 20, 2),
        input_factors=(5, 2),
        bonds=(1, 4, 1),
        relative_error=error,
        entropies=(0.5,),
        entropies_of_weight=(0.75,),
    )


def dense(name: str, count: int) -> LayerRecord:
    return LayerRecord(
        name, "linear", (count // 10, 10), "float32", "dense", count, count, "float32", 'too small, "tiny"'
    )


def in_few_bits(name: str, error: float) -> LayerRecord:
    storage = (storage_record(Coded()),)
    return replace(dense(name, 1000), reason="", relative_error=error, storage=storage, nbytes=600)


def manifest(*layers: LayerRecord) -> Manifest:
    return Manifest(
        source=Source("modèle.pt", 4_200_000, 1_050_000, "ab" * 32),
        layers=layers,
        options={"bond": 4, "seed": 0},
        kinds_from="names and shapes",
        left_alone={"wte.weight": "embedding"},
        vectors=3,
        tied={"head.weight": "wte.weight"},
        tool="mpoc 0.1.0",
    )


WHOLE = manifest(mpo("a.weight", 1000, 300), mpo("b.weight", 4000, 450, 0.3), dense("c.weight", 20))


def test_totals_match_hand_computed_sums() -> None:
    assert report_dict(WHOLE, 987)["totals"] == {
        "rho": 750 / 5000,  # Eq. (9): replaced layers alone
        "rho_selected": 770 / 5020,
        "layers_replaced": 2,
        "layers_selected": 3,
        "parameters_replaced_before": 5000,
        "parameters_replaced_after": 750,
        "parameters_before": 1_050_000,
        "parameters_after": 1_050_000 - 700 - 3550,
        "bytes_before": 4_200_000,
        "bytes_after": 987,
        "bytes_selected_before": 4 * 5020,
        "bytes_selected_after": 2 * 750 + 4 * 20,
        "bits_per_weight": pytest.approx(8 * 1580 / 5020),
    }


@SOME
@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6), st.booleans()), max_size=6))
def test_totals_are_sums_over_layers(counts: list[tuple[int, int, bool]]) -> None:
    layers = [
        dense(f"l{k}", before) if left else mpo(f"l{k}", before, after)
        for k, (before, after, left) in enumerate(counts)
    ]
    report = json.loads(to_json(report_dict(manifest(*layers), 1)))
    totals, rows = report["totals"], report["layers"]
    replaced = [row for row in rows if row["form"] != "dense"]
    for side, key in (("before", "num_original"), ("after", "num_stored")):
        assert totals[f"parameters_replaced_{side}"] == sum(row[key] for row in replaced)
    if replaced:
        weighted = sum(row["rho"] * row["num_original"] for row in replaced)
        assert totals["rho"] == pytest.approx(weighted / sum(row["num_original"] for row in replaced))
    saved = sum(row["num_original"] - row["num_stored"] for row in rows)
    assert totals["parameters_before"] - totals["parameters_after"] == saved
    assert (totals["layers_selected"], totals["layers_replaced"]) == (len(rows), len(replaced))


def test_json_holds_every_field_of_every_layer() -> None:
    text = to_json(report_dict(WHOLE, 987))
    assert '\n  "source": {\n    "name": "modèle.pt",' in text
    report = json.loads(text)
    assert report["schema"] == "mpoc.report/1"
    assert report["source"] == asdict(WHOLE.source)
    assert (report["options"], report["tool"], report["kinds_from"]) == (
        {"bond": 4, "seed": 0},
        "mpoc 0.1.0",
        "names and shapes",
    )
    assert (report["left_alone"], report["vectors_left_alone"], report["tied"]) == (
        {"wte.weight": "embedding"},
        3,
        {"head.weight": "wte.weight"},
    )
    for row, layer in zip(report["layers"], WHOLE.layers, strict=True):
        values = json.loads(json.dumps(asdict(layer)))
        nbytes = layer.num_stored * (4 if layer.form == "dense" else 2)
        stored: dict[str, Any] = {"nbytes": nbytes, "bits_per_weight": 8 * nbytes / layer.num_original}
        stored["stored_as"] = layer.stored_dtype
        assert row == values | {"layer": layer.layer, "rho": layer.rho} | stored


def test_seconds_appear_only_after_a_fit() -> None:
    report = report_dict(WHOLE, 987, {"a.weight": 1.23456})
    assert [row["seconds"] for row in report["layers"]] == [1.2346, 0.0, 0.0]
    assert "seconds" not in report_dict(WHOLE, 987)["layers"][0]


def test_csv_has_one_line_per_layer() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(WHOLE))))
    assert [row["layer"] for row in rows] == ["a", "b", "c"]
    assert rows[0] == {
        "layer": "a",
        "kind": "linear",
        "form": "mpo",
        "shape": "100×10",
        "output_factors": "50×2",
        "input_factors": "5×2",
        "bonds": "1×4×1",
        "low_rank": "0",
        "num_original": "1000",
        "num_stored": "300",
        "rho": "0.3",
        "relative_error": "0.05",
        "output_error": "",
        "held_out_error": "",
        "stored_dtype": "bfloat16",
        "stored_as": "bfloat16",
        "nbytes": "600",
        "bits_per_weight": "4.8",
        "reason": "",
    }
    assert (rows[2]["bonds"], rows[2]["relative_error"], rows[2]["reason"]) == ("", "", 'too small, "tiny"')


def test_summary_gives_both_ratios_and_totals() -> None:
    ratios, whole, weights, *_ = summary(WHOLE, 4_183_000, predicted=False)
    assert weights == "weights of 3 selected layers 20.1 kB → 1.58 kB (7.9%), 2.52 bits a weight"
    assert "ρ = 0.1500 over 2 replaced layers (5,000 → 750)" in ratios
    assert "0.1534 over the 3 selected" in ratios
    assert "1,050,000 → 1,045,750 parameters" in whole
    assert "on disk 4.2 MB → 4.18 MB" in whole
    assert "predicted at most 4.2 MB" in summary(WHOLE, 4_183_000, predicted=True)[1]


def test_warns_about_large_errors() -> None:
    (advice,) = summary(WHOLE, 1, predicted=False)[3:]
    assert advice.startswith("1 of 2 replaced layers has a relative error above 10% (worst 30%)")
    fine = replace(WHOLE, layers=(mpo("a.weight", 1000, 300, 0.1), mpo("b.weight", 1000, 300, None)))
    assert len(summary(fine, 1, predicted=False)) == 3


@pytest.mark.parametrize(
    ("options", "advice"), [({"size": 20_000}, "A larger --size"), ({"bits": 2}, "More --bits")]
)
def test_warns_about_large_errors_of_rounded_layers(options: dict[str, int], advice: str) -> None:
    rounded = replace(
        WHOLE, layers=(in_few_bits("a.weight", 0.2), in_few_bits("b.weight", 0.05)), options=options
    )
    (line,) = summary(rounded, 1, predicted=False)[2:]
    assert line.startswith("1 of 2 rounded layers has a relative error above 10% (worst 20%)")
    assert f"{advice}, or --calibrate DATA" in line
    data = {"data": {"name": "x.npz"}, "samples": 8, "held_out": 2}
    calibrated = [replace(layer, held_out_error=0.4) for layer in rounded.layers]
    line = summary(replace(rounded, layers=tuple(calibrated), calibration=data), 1, predicted=False)[-1]
    assert line.startswith("2 of 2 fitted layers have a held-out error above 30%")
    assert f"{advice}, more --calibration-samples" in line


def test_compares_rounded_layers_at_equal_bytes() -> None:
    errors = {"this": 0.1, "rounded to nearest": 0.2}
    floats = replace(WHOLE.layers[0], same_size={"this": 0.5, "plain svd": 0.75})
    layers = (replace(in_few_bits("b.weight", 0.05), same_size=errors), floats)
    said = summary(replace(WHOLE, layers=layers), 1, predicted=False)
    title = "output-weighted held-out error, mean over 1 layer: "
    assert f"{title}0.1000; in the same bytes: rounded to nearest 0.2000" in said
    assert f"{title}0.5000; other methods storing as many numbers: plain svd 0.7500" in said


def test_short_report_gives_bits_of_rounded_layers() -> None:
    rounded = Report(replace(WHOLE, layers=(in_few_bits("a.weight", 0.1),)), 600)
    reached = "4.2 MB → 600 B (0.0%), 4.80 bits a weight"
    assert repr(rounded).splitlines()[0] == f"Report: {reached}"
    facts = {"this": {"agreement": 98.125, "kl": 0.01234}, "GPTQ": {"agreement": 97.0, "kl": 0.5}}
    calibrated = replace(rounded.manifest, calibration={"likeness": facts})
    said = summary(calibrated, 600, predicted=True)
    assert said[0] == f"predicted at most {reached}"
    assert "likeness of the outputs in the same bytes: GPTQ: agreement 97.00 %, KL 0.5" in said
    assert repr(Report(calibrated, 600)).splitlines()[0].endswith("; held out: agreement 98.12 %, KL 0.0123")
    assert "bits a weight" not in repr(Report(WHOLE, 600))


def test_headline_tells_scores_and_likeness() -> None:
    measured = Measured(metric="accuracy", data="digits.npz", split="test", examples=539)
    measured |= {"before": {"loss": 0.1, "accuracy": 98.9}, "after": {"accuracy": 98.5}}
    likeness = {"data": {"name": "x.npz"}, "held_out": 1, "likeness": {"this": {"cosine": 0.98765}}}
    assert headline(WHOLE) == ""
    said = headline(replace(WHOLE, measured=measured, calibration=likeness))
    assert said == (
        "accuracy 98.90 % before compression, 98.50 % after it (test of digits.npz, 539 examples); "
        "outputs beside the original's: cosine 0.9877 (1 held-out example of x.npz)"
    )
    assert report_dict(replace(WHOLE, measured=measured), 1)["headline"] == said.partition("; ")[0]
    ruined = replace(WHOLE, measured=measured | {"after": {"accuracy": None}})
    assert headline(ruined) == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (3_471_733, "3.47 MB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (999_999_999, "1 GB"),
        (14_500_000_000, "14.5 GB"),
        (10**15, "1000 TB"),
        (123_456 * 10**12, "123456 TB"),
    ],
)
def test_formats_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@SOME
@given(st.integers(0, 10**18))
def test_formatted_bytes_are_within_half_a_percent(count: int) -> None:
    number, unit = human_bytes(count).split()
    assert "e" not in number
    size = float(number) * 1000 ** ["B", "kB", "MB", "GB", "TB"].index(unit)
    assert size == pytest.approx(count, rel=0.005)


def test_joins_factors_by_times() -> None:
    assert times((4, 8, 8)) == times([4, 8, 8]) == "4×8×8"
    assert times(()) == ""


def test_sums_bytes_of_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"123")
    assert output_bytes(tmp_path / "a") == 5
    assert output_bytes(tmp_path) == 8


def test_report_is_deterministic() -> None:
    def everything() -> tuple[Any, ...]:
        return to_json(report_dict(WHOLE, 5)), to_csv(WHOLE), summary(WHOLE, 5, predicted=False)

    assert everything() == everything()
