"""Layers rounded to what they do, against rounding to nearest and against the bytes that were written."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mpoc
from mpoc.cli.demo import ARCH
from mpoc.compression.calibrate import bit_allocation, calibrated_rounding, moments
from mpoc.compression.calibrate.bit_allocation import allocate_bits, are_nearly_exact
from mpoc.compression.calibrate.calibrated_rounding import longer_record, round_calibrated
from mpoc.compression.calibrate.calibration_data import CalibrationRequest
from mpoc.compression.calibrate.output_distance import OutputDistance
from mpoc.compression.plan import Dense, LayerPlan
from mpoc.compression.recipe import make_recipe
from mpoc.compression.run_context import RunContext
from mpoc.compression.selection import LinearMap
from mpoc.compression.size_prediction import LONGEST_FIGURE
from mpoc.compression.source import open_source
from mpoc.compression.write import make_job, write_compressed
from mpoc.demo.network import DigitsNet, load_network
from mpoc.io.coded_parts import Rounding
from mpoc.io.manifest import LayerRecord
from mpoc.io.safetensors_header import encode_header, storage_order
from mpoc.runtime.device import choose_device
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.structure import low_rank_structure
from tests.compression.calibrate.layers import SIDES, known, weight
from tests.compression.calibrate.test_sequential import Case
from tests.compression.calibrate.toy_networks import make
from tests.compression.digits import write_network
from tests.io.test_manifest import WHOLE


def plan(
    name: str = "fc.weight", sides: tuple[int, int] = SIDES, storage: str = "coded", bits: float = 3
) -> LayerPlan:
    layer, structure = LinearMap(name, "linear", sides, "float32", False), low_rank_structure("linear", sides)
    return LayerPlan(layer, structure, "float32", Dense(), rounding=Rounding(storage, bits))


def bits_of(plans: list[LayerPlan]) -> dict[str, float]:
    return {plan.map.layer: plan.rounding.bits for plan in plans if plan.rounding is not None}


@pytest.mark.parametrize("rounding", [Rounding("grid", 3), Rounding("coded", 2.5)])
def test_feedback_beats_rounding_to_nearest(rounding: Rounding) -> None:
    matrix, objective = weight(3), known()
    record = replace(plan(), rounding=rounding).record()
    nearest = rounding.codes(record, [matrix])
    found = round_calibrated(matrix, record, rounding, objective, nearest)
    assert found.same_size["this"] < 0.9 * found.same_size["rounded to nearest"]
    made = found.codes[0].values().double()
    error = objective.fit_error.relative(matrix.double(), made)
    assert found.judged.output_error == pytest.approx(error, rel=1e-6)
    assert sum(codes.nbytes for codes in found.codes) <= record.stored_bytes


@pytest.mark.parametrize("name", ["mlp", "conv", "words"])
@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 2, "storage": "coded"}])
def test_calibrated_rounding_beats_plain(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    case = Case(tmp_path, name)
    options = {**options, "embeddings": name == "words"}
    calibrated, plain = case.compress(**options), case.plain(**options)
    assert case.error(calibrated) < case.error(plain)
    assert calibrated.nbytes < case.folder.joinpath("m.pt").stat().st_size


@pytest.mark.parametrize(
    ("storage", "share"),
    [
        ("grid", 0.28),
        ("coded", 0.22),
        pytest.param("coded", 0.2, marks=pytest.mark.slow),
        pytest.param("coded", 0.28, marks=pytest.mark.slow),
    ],
)
def test_size_is_kept_and_shared_out(tmp_path: Path, storage: str, share: float) -> None:
    case = Case(tmp_path, "mlp")
    whole = case.folder.joinpath("m.pt").stat().st_size
    size = int(share * whole)
    done = case.compress(size=size, storage=storage)
    assert 0.8 * size < done.output.stat().st_size <= size
    assert {layer.form for layer in done.manifest.layers} == {"dense"}
    assert {part["kind"] for layer in done.manifest.layers for part in layer.storage} == {storage}
    likeness = done.manifest.calibration["likeness"]
    assert likeness["this"]["kl"] < 0.8 * likeness["rounded to nearest"]["kl"]
    assert likeness.keys() == {"this", "rounded to nearest", "GPTQ"}
    again = case.compress(size=size, storage=storage, out="again")
    assert again.output.read_bytes() == done.output.read_bytes()


def test_reported_errors_are_those_of_the_file(tmp_path: Path) -> None:
    case = Case(tmp_path, "mlp")
    done = case.compress(bits=2)
    loaded = mpoc.load(done.output, make(case.name))
    for layer in done.manifest.layers:
        dense, stored = (one.get_parameter(layer.name).detach() for one in (case.network, loaded))
        error = float((dense - stored).norm() / dense.norm())
        assert layer.relative_error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("storage", ["grid", "coded"])
def test_factors_are_rounded_for_each_other(tmp_path: Path, storage: str) -> None:
    case = Case(tmp_path, "mlp")
    options: dict[str, Any] = {"form": "svd", "bond": 6, "bits": 4, "storage": storage}
    done = case.compress(**options)
    assert {layer.form for layer in done.manifest.replaced} == {"svd"}
    assert case.error(done) < case.error(case.plain(**options))


def test_bits_follow_what_a_layer_moves() -> None:
    plans = [plan("a.weight"), plan("b.weight"), plan("c.weight", (8, 12))]
    shared = allocate_bits(plans, {"a.weight": 4.0, "b.weight": 1.0}, trust=1.0)
    bits = bits_of(shared)
    assert bits["a"] - bits["b"] == pytest.approx(1.0)  # ½ log₂ 4
    assert bits["c"] == pytest.approx((bits["a"] + bits["b"]) / 2)  # not measured: as the mean
    total = math.prod(SIDES) * (bits["a"] + bits["b"]) + 96 * bits["c"]
    assert total == pytest.approx(3 * (2 * 384 + 96) - 8 * 3)  # bits round up to whole bytes
    same = allocate_bits(plans, {"a.weight": 4.0, "b.weight": 1.0}, spare=3, trust=0.0)
    assert bits_of(same) == pytest.approx(bits_of(plans))


@pytest.mark.parametrize(("bits", "other", "exact"), [(8, 7, True), (8, 6.9, False), (8, None, True)])
def test_layers_follow_the_dense_network_where_all_keep_many_bits(
    bits: float, other: float | None, exact: bool
) -> None:
    second = replace(plan(), rounding=None) if other is None else plan(bits=other)
    assert are_nearly_exact([plan(bits=bits), second]) == exact


def test_a_layer_that_moves_nothing_keeps_some_bits() -> None:
    """κ is measured at three bits, and does not hold where hardly any are left."""
    plans = [plan("a.weight"), plan("b.weight")]
    before = bits_of(plans)["a"]
    bits = bits_of(allocate_bits(plans, {"a.weight": 1.0, "b.weight": 1e-9}, spare=2))
    assert bits["b"] == pytest.approx(0.4 * before) and bits["a"] == pytest.approx(1.6 * before)


def test_grids_stay_within_the_bytes() -> None:
    plans = [plan(f"{k}.weight", storage="grid", bits=4) for k in range(4)]
    moved = {"0.weight": 100.0, "1.weight": 1e-3, "2.weight": 1.0, "3.weight": 1.0}
    shared = allocate_bits(plans, moved, trust=1.0)
    before, after = (sum(one.record().stored_bytes for one in each) for each in (plans, shared))
    assert after <= before
    bits = bits_of(shared)
    assert bits["0"] > bits["2"] >= bits["1"]


def test_few_rows_of_many_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their moment is kept as rows; of more columns than can be formed only the diagonal counts."""
    monkeypatch.setattr(moments, "_NARROW", 8)
    case = Case(tmp_path, "mlp")
    for widest in (8192, 4):
        monkeypatch.setattr(calibrated_rounding, "_WIDEST", widest)
        assert case.error(case.compress(samples=20, bits=4, out=f"o{widest}")) < 0.5


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    folder = tmp_path_factory.mktemp("digits")
    write_network(folder)
    return Digits(folder)


class Digits:
    """The demo's network, calibrated once, and its outputs on the test images, which no choice has seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        recipe = make_recipe(None, {"size": 1.0, "effort": "fast"})
        self.source = open_source(folder / "net.safetensors", recipe, ARCH, calibrated=True)
        request = CalibrationRequest(folder / "digits.npz")
        self.context = RunContext(choose_device("cpu"))
        self.statistics = self.source.statistics(request, self.context)
        with np.load(folder / "digits.npz") as data:
            self.images = torch.from_numpy(data["x_test"]).float()
        self.dense = self.outputs(load_network())

    def outputs(self, network: nn.Module) -> Tensor:
        with torch.no_grad():
            return network.eval()(self.images).log_softmax(-1)

    def compress(self, **options: Any) -> tuple[int, float, dict[str, float]]:
        """Bytes of the file, KL in nats on the test images, and KL on held-out ones by way."""
        recipe = make_recipe(None, {"effort": "fast", **options}).with_form(calibrated=True)
        job = make_job(self.source, recipe, self.source.plan(recipe), self.context, self.statistics)
        assert job.calibrated is not None
        job.calibrated.compares_gptq = True
        file = self.folder / f"{len(list(self.folder.iterdir()))}.safetensors"
        done = write_compressed(job, file)
        made = self.outputs(mpoc.load(file, DigitsNet()))
        likeness = done.manifest.calibration["likeness"]
        kl = float((self.dense.exp() * (self.dense - made)).sum(-1).mean())
        return done.nbytes, kl, {way: found["kl"] for way, found in likeness.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 3},
        {"bits": 2, "storage": "coded"},
        {"ratio": 0.15, "form": "svd", "bits": 4, "storage": "coded"},
        {"ratio": 0.3, "form": "svd", "bits": 4, "storage": "coded"},
    ],
    ids=str,
)
def test_no_single_choice_is_better_in_the_same_bytes(digits: Digits, options: dict[str, Any]) -> None:
    nbytes, loss, _ = digits.compress(**options)
    ours, kl, ways = digits.compress(size=nbytes - 100)  # beside which the likeness of GPTQ is written
    assert ours <= nbytes and kl < loss
    assert ways.pop("this") <= max(min(ways.values()), 1e-5)  # below which 64 images tell nothing


@pytest.mark.parametrize("between", [1.0, 3.0])
def test_errors_move_between_rows_where_outputs_move_less(
    digits: Digits, monkeypatch: pytest.MonkeyPatch, between: float
) -> None:
    recipe = make_recipe(None, {"effort": "fast", "bits": 4})
    plan = next(p for p in digits.source.plan(recipe) if p.map.layer == "fc1")
    monkeypatch.setattr(bit_allocation, "movement", lambda *given: between if given[-1] is True else 2.0)
    monkeypatch.setitem(digits.statistics.kept, "movements", {})
    distance = OutputDistance(digits.statistics)
    source = digits.statistics, digits.source.checkpoint
    assert bit_allocation.errors_move_between_rows(plan, *source, distance, 0) == (between < 2.0)


@pytest.mark.parametrize("name", ["fc.weight", f"{'a_long_name' * 20}.weight"])
def test_two_factors_take_no_more_than_is_reserved(name: str) -> None:
    dense = plan(name, (4096, 16384), bits=1)
    factors = replace(dense, structure=low_rank_structure("linear", (4096, 16384)), goal=Truncation(1000))
    figures: dict[str, Any] = dict.fromkeys(("relative_error", "output_error"), LONGEST_FIGURE)

    def taken(record: LayerRecord) -> int:
        record = replace(record, **figures, entropies=(LONGEST_FIGURE,) * (len(record.bonds) > 0))
        manifest = replace(WHOLE, layers=(record,))
        infos = [info for part in record.coded_parts for info in part.file_infos(10**7)]
        return len(encode_header(storage_order(infos), {"mpoc": manifest.to_json()}))

    more = taken(factors.record()) - taken(dense.record())
    assert longer_record(name, False) - 150 < more <= longer_record(name, False)


def test_a_coded_dense_layer_becomes_two_factors_where_they_are_nearer(digits: Digits) -> None:
    recipe = make_recipe(None, {"effort": "fast", "size": 9000}).with_form(calibrated=True)
    done = write_compressed(
        make_job(digits.source, recipe, digits.source.plan(recipe), digits.context, digits.statistics),
        digits.folder / "factors.safetensors",
    )
    layer = next(layer for layer in done.manifest.layers if layer.form == "svd")
    assert done.nbytes <= 9000
    assert layer.num_stored < layer.num_original and len(layer.storage) == 2
    assert len(layer.entropies) == 1 and layer.relative_error is not None
