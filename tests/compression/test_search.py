"""Searches on the demo's network: what is written is what ``--ratio`` writes, and what was measured."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpoc.cli.demo import ARCH
from mpoc.compression import search as smallest
from mpoc.compression.calibrate import bit_allocation
from mpoc.compression.calibrate.calibration_data import CalibrationRequest
from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.plan import LayerPlan
from mpoc.compression.recipe import LayerRule, make_recipe
from mpoc.compression.recipe_syntax import parse_budget
from mpoc.compression.search import SearchCallbacks, SearchRequest, SearchResult, Trial, compress_within
from mpoc.compression.write import record_scores, scores_record
from mpoc.errors import MpocError, UsageError
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.weight_files import output_bytes
from mpoc.train.evaluate_file import evaluate_file
from mpoc.train.settings import DataOptions, EvaluationRequest
from tests.compression.digits import write_network
from tests.support.architectures import tiny
from tests.support.checkpoints import contents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_network(tmp_path)
    return tmp_path


def find(folder: Path, max_drop: float, watch: SearchCallbacks | None = None, **options: Any) -> SearchResult:
    calibration = options.pop("calibrate", None)
    recipe = make_recipe(None, {"max_drop": max_drop, "device": "cpu", **options})
    data = DataOptions(folder / "digits.npz")
    output = folder / "out.safetensors"
    request = SearchRequest(folder / "net.safetensors", output, recipe, data, calibration, ARCH)
    return compress_within(request, watch)


@pytest.mark.parametrize("calibrated", [False, True])
def test_output_matches_the_chosen_ratio(
    folder: Path, calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies: list[CalibrationStatistics] = []
    made = CalibrationStatistics.__init__

    def make(self: CalibrationStatistics, *words: Any) -> None:
        studies.append(self)
        made(self, *words)

    monkeypatch.setattr(CalibrationStatistics, "__init__", make)
    calibration = CalibrationRequest(folder / "digits.npz", 40) if calibrated else None
    told: list[tuple[Trial, bool]] = []
    found = find(
        folder,
        5.0,
        SearchCallbacks(trial=lambda *one: told.append(one)),
        calibrate=calibration,
        layers=("conv2", "fc2"),
        form="svd",
    )
    assert len(studies) == int(calibrated)  # one pass over the dense network for all trials
    search, chosen = found.search, found.search.chosen
    assert chosen is not None and chosen.drop <= 5.0 and chosen is not search.trials[0]
    assert len(found.compression.manifest.replaced) == 2  # the second on what the first one gives
    assert [trial for trial, _ in told] == search.trials
    assert [kept for _, kept in told] == [trial.drop <= 5.0 for trial in search.trials]
    assert {True, False} == {kept for _, kept in told}
    assert chosen.nbytes == found.compression.nbytes == output_bytes(found.compression.output)
    options = read_manifest(found.compression.output).options
    assert options["ratio"] == chosen.budget
    alone = compress_checkpoint(
        folder / "net.safetensors",
        folder / "alone.safetensors",
        make_recipe(
            None, {"ratio": chosen.budget, "device": "cpu", "layers": ("conv2", "fc2"), "form": "svd"}
        ),
        arch=ARCH,
        calibrate=calibration,
        measured=scores_record(found.before),
    )
    assert not read_manifest(alone.output).measured  # evaluation may yet fail
    record_scores(alone, scores_record(found.before, found.after))
    assert found.compression.output.read_bytes() == alone.output.read_bytes()
    again = evaluate_file(
        EvaluationRequest(found.compression.output, DataOptions(folder / "digits.npz"), arch=ARCH)
    )
    assert again.scores == found.after.scores == chosen.scores
    assert found.after.model == found.compression.output


@pytest.mark.parametrize("calibrated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_searches_bytes_where_no_form_is_asked(
    folder: Path, calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []

    def measure(plan: LayerPlan, *rest: Any) -> float:
        moved.append(plan.map.layer)
        return movement(plan, *rest)

    movement = bit_allocation.movement
    monkeypatch.setattr(bit_allocation, "movement", measure)
    calibration = CalibrationRequest(folder / "digits.npz", 40) if calibrated else None
    options: dict[str, Any] = {
        "layers": ("conv2", "fc1"),
        "device": "cpu",
        "effort": "fast" if calibrated else None,
    }
    found = find(folder, 30.0 if calibrated else 2.0, calibrate=calibration, **options)
    both = ["conv2", "conv2", "fc1", "fc1"]  # with and without feedback between rows, once for all trials
    assert moved == (both if calibrated else [])
    search, chosen = found.search, found.search.chosen
    assert chosen is not None and search.goal == "size" and search.keeps(chosen)
    assert {True, False} == {search.keeps(trial) for trial in search.trials}
    source = (folder / "net.safetensors").stat().st_size
    assert all(trial.nbytes <= trial.budget * source for trial in search.trials)
    assert chosen.option == f"--size {100 * chosen.budget:.1f}%"
    alone = compress_checkpoint(
        folder / "net.safetensors",
        folder / "alone.safetensors",
        make_recipe(None, {"size": parse_budget(chosen.option.split()[1]), **options}),
        arch=ARCH,
        calibrate=calibration,
        measured=scores_record(found.before),
    )
    record_scores(alone, scores_record(found.before, found.after))
    assert found.compression.output.read_bytes() == alone.output.read_bytes()


def test_option_of_a_trial_is_its_budget() -> None:
    trials = [Trial(k / 1000, 0, 0.0, {}, "size") for k in range(1, 1001)]
    assert [parse_budget(trial.option.split()[1]) for trial in trials] == [trial.budget for trial in trials]


def test_names_the_smallest_size(folder: Path) -> None:
    source, output = folder / "net.safetensors", folder / "o.safetensors"
    request = CalibrationRequest(folder / "digits.npz", 40)
    with pytest.raises(UsageError, match=r"the output has \d+ bytes") as error:
        compress_checkpoint(source, output, make_recipe(None, {"size": 5200}), arch=ARCH, calibrate=request)
    least = int(str(error.value.hint).split()[1])
    recipe = make_recipe(None, {"size": least, "device": "cpu"})
    done = compress_checkpoint(source, output, recipe, arch=ARCH, calibrate=request)
    assert done.nbytes <= least


@pytest.mark.slow
def test_searches_down_to_the_smallest_size(folder: Path) -> None:
    """Below it, what calibration records does not fit, and the search goes on above."""
    found = find(folder, 100.0, calibrate=CalibrationRequest(folder / "digits.npz", 40))
    assert found.search.chosen is not None
    assert found.search.chosen.budget < 1.1 * found.search.least
    assert found.compression.nbytes == min(trial.nbytes for trial in found.search.trials)


@pytest.mark.slow
def test_measures_the_dense_network_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Path] = []

    def tell(request: EvaluationRequest) -> Any:
        measured.append(request.source)
        return evaluate_file(request)

    monkeypatch.setattr(smallest, "evaluate_file", tell)
    found = find(folder, 5.0)
    assert measured[0] == folder / "net.safetensors"
    assert len(measured) == 1 + len(found.search.trials)
    assert len(set(measured)) == 2


@pytest.mark.slow
def test_output_is_deterministic(folder: Path) -> None:
    first = find(folder, 5.0).compression.output.read_bytes()
    (folder / "out.safetensors").unlink()
    assert find(folder, 5.0).compression.output.read_bytes() == first


@pytest.mark.slow
def test_writes_nothing_where_every_trial_fails(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(
        MpocError,
        match=r"none of \d trials keeps accuracy on digits.npz within 1: the best, --ratio 0.* 98.89 to 97",
    ) as error:
        find(folder, 1.0, layers=("conv1",), sites=8)
    assert "--calibrate DATA" in str(error.value.hint)
    assert contents(folder) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_interrupted_trial_leaves_nothing(folder: Path, error: BaseException) -> None:
    before = contents(folder)

    def stop(trial: Trial, kept: bool) -> None:
        if kept:
            assert len(list(folder.glob(".out.safetensors.*.partial/*"))) == 1
            raise error

    with pytest.raises(type(error)) as caught:
        find(folder, 50.0, SearchCallbacks(trial=stop))
    assert contents(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == ["digits.npz", "net.safetensors"]
    if isinstance(caught.value, OSError):
        assert caught.value.filename == str(folder / "out.safetensors")


@pytest.mark.slow
def test_headless_directory_is_compared_with_the_original(tmp_path: Path) -> None:
    import transformers

    transformers.ViTModel(tiny("vit").config).save_pretrained(tmp_path / "vit")
    images = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=images)
    recipe = make_recipe(None, {"max_drop": 0.5, "device": "cpu", "form": "mpo"})
    found = compress_within(
        SearchRequest(tmp_path / "vit", tmp_path / "out", recipe, DataOptions(tmp_path / "images.npz"))
    )
    chosen = found.search.chosen
    assert chosen is not None
    assert (found.before.metric, found.before.reference) == ("cosine", tmp_path / "vit")
    assert found.before.scores["cosine"] == pytest.approx(1)
    assert 0.5 - 1e-6 <= found.after.scores["cosine"] < 1
    assert chosen.nbytes == output_bytes(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npz", "out", "vit"]
    recipe = make_recipe(None, {"ratio": chosen.budget, "device": "cpu"})
    compress_checkpoint(tmp_path / "vit", tmp_path / "alone", recipe)
    weights = ("out", "alone")
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in weights}) == 1


def test_rejects_layers_that_cannot_shrink(folder: Path) -> None:
    recipe = make_recipe(None, {"max_drop": 1.0, "layers": ("fc1",), "form": "mpo"})
    recipe = replace(recipe, rules=(LayerRule("fc1", dense=True),))
    data = DataOptions(folder / "digits.npz")
    request = SearchRequest(folder / "net.safetensors", folder / "o.safetensors", recipe, data, arch=ARCH)
    with pytest.raises(MpocError, match="with every bond at 1: nothing smaller can be searched"):
        compress_within(request)


def test_compress_checkpoint_rejects_max_drop(folder: Path) -> None:
    recipe = make_recipe(None, {"max_drop": 1.0})
    with pytest.raises(UsageError, match="does not search for a budget"):
        compress_checkpoint(folder / "net.safetensors", folder / "o.safetensors", recipe, arch=ARCH)
    with pytest.raises(UsageError, match="without max_drop"):
        compress_within(
            SearchRequest(
                folder / "net.safetensors", folder / "o.safetensors", make_recipe(None, {"bond": 2}),
                DataOptions(folder / "digits.npz"), arch=ARCH,
            )
        )  # fmt: skip


@pytest.mark.slow
def test_drop_of_a_loss_is_its_rise(tmp_path: Path) -> None:
    from torch import nn

    torch.manual_seed(0)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 3))\n"
    )
    network = nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 3))
    torch.save(network.state_dict(), tmp_path / "m.pt")
    x = torch.randn(80, 12)
    with torch.no_grad():
        np.savez(tmp_path / "d.npz", x_test=x.numpy(), y_test=network(x).numpy())
    recipe = make_recipe(None, {"max_drop": 0.2, "device": "cpu", "form": "svd"})
    data, arch = DataOptions(tmp_path / "d.npz"), f"{tmp_path}/net.py:net"
    request = SearchRequest(tmp_path / "m.pt", tmp_path / "o.safetensors", recipe, data, arch=arch)
    found = compress_within(request)
    assert (found.before.metric, found.before.higher_is_better) == ("loss", False)
    for trial in found.search.trials:
        assert trial.drop == pytest.approx(trial.scores["loss"] - found.before.scores["loss"], rel=1e-4)
    assert found.after.scores["loss"] <= 0.2 + found.before.scores["loss"]
