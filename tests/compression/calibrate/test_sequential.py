"""Compressing a checkpoint on data, from the file to the file."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mpoc
from mpoc.compression.calibrate import allocation
from mpoc.compression.calibrate.allocation import WAYS
from mpoc.compression.calibrate.calibrated_fit import Storage
from mpoc.compression.calibrate.calibration_data import CalibrationRequest
from mpoc.compression.calibrate.candidates import Candidates
from mpoc.compression.calibrate.output_distance import OutputDistance, Replacement
from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.compression.recipe_syntax import parse_input_shape, parse_shape
from mpoc.compression.write import Compression
from mpoc.errors import MpocError, UsageError
from mpoc.io import keyed_store
from mpoc.io.manifest_reader import read_manifest
from mpoc.runtime import distributed
from mpoc.runtime.formatting import human_bytes
from mpoc.tensor_networks.structure import Structure
from tests.compression.calibrate.toy_networks import arch, make
from tests.support.marks import slow_except


class Case:
    """A network, its checkpoint and data in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.network = make(name).eval()
        torch.save(self.network.state_dict(), folder / "m.pt")
        generator = torch.Generator().manual_seed(0)
        if name == "conv":
            self.x = (torch.rand(200, 3, 16, 16, generator=generator).cumsum(2) * 15).byte()
        elif name in ("words", "tied"):
            self.x = (60 * torch.rand(400, 7, generator=generator) ** 3).floor()
        else:
            self.x = torch.randn(400, 5, generator=generator) @ torch.randn(5, 24, generator=generator) + 0.5
        np.savez(
            folder / "data.npz", x_train=self.x[::2].numpy(), y_train=np.zeros(len(self.x) // 2, np.int64)
        )

    @property
    def arch(self) -> str:
        return arch(self.name)

    def compress(
        self,
        samples: int = 200,
        out: str = "o",
        moments: Path | None = None,
        refine: bool = False,
        scratch: Path | None = None,
        **options: Any,
    ) -> Compression:
        recipe = make_recipe(None, {"device": "cpu", **options})
        request = CalibrationRequest(self.folder / "data.npz", samples, refine, moments, scratch=scratch)
        path = self.folder / f"{out}.safetensors"
        return compress_checkpoint(self.folder / "m.pt", path, recipe, arch=self.arch, calibrate=request)

    def plain(self, **options: Any) -> Compression:
        recipe = make_recipe(None, {"device": "cpu", **options})
        path = self.folder / "plain.safetensors"
        return compress_checkpoint(self.folder / "m.pt", path, recipe, arch=self.arch)

    def unseen(self) -> Tensor:
        return self.x[1::2].float() / (255 if self.name == "conv" else 1)

    @torch.no_grad()
    def error(self, done: Compression) -> float:
        """Relative, of outputs on inputs that the calibration has not seen."""
        loaded = mpoc.load(done.output, make(self.name)).eval()
        ours, dense = (net(self.unseen()).log_softmax(1) for net in (loaded, self.network))
        return float((ours - dense).norm() / (dense - dense.mean(0)).norm())


@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("form", slow_except(["svd", "mpo", "tree", "auto"], "svd"))
def test_calibration_reduces_output_errors(tmp_path: Path, name: str, form: str) -> None:
    case = Case(tmp_path, name)
    options: dict[str, Any] = {"ratio": 0.4}
    done = case.compress(form=form, **options)
    plain = case.plain(form="svd" if form == "auto" else form, **options)
    assert done.manifest.rho_selected <= 0.4
    assert case.error(done) < 0.9 * case.error(plain)
    if form != "auto":
        assert {layer.form for layer in done.manifest.replaced} == {form}


def test_manifest_records_the_calibration(tmp_path: Path) -> None:
    done = Case(tmp_path, "mlp").compress(ratio=0.4)
    manifest = read_manifest(done.output)
    assert manifest == done.manifest
    facts = manifest.calibration
    distances = facts["shares"]["distances"]
    assert (facts["data"]["name"], facts["samples"], facts["held_out"]) == ("data.npz", 175, 17)
    assert facts["shares"]["chosen"] == min(distances, key=distances.get)
    for layer in manifest.replaced:
        assert layer.output_error is not None and layer.held_out_error is not None
        assert layer.relative_error is not None and layer.output_error < layer.relative_error
    assert [layer.name for layer in manifest.layers] == ["0.weight", "2.weight", "4.weight", "5.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["grid", "coded"])
def test_rounded_cores_carry_the_calibration(tmp_path: Path, storage: str) -> None:
    case = Case(tmp_path, "mlp")
    options: dict[str, Any] = {"ratio": 0.4, "form": "svd", "bits": 8, "storage": storage}
    done = case.compress(**options)
    assert read_manifest(done.output) == done.manifest
    assert case.error(done) < 0.9 * case.error(case.plain(**options))
    dense = mpoc.load(done.output, make(case.name)).state_dict()
    for layer in done.manifest.layers:
        assert layer.storage and layer.storage[0]["kind"] == storage
        if layer.form == "dense":
            weight = case.network.state_dict()[layer.name]
            error = float((weight - dense[layer.name]).norm() / weight.norm())
            assert layer.relative_error == pytest.approx(error, rel=1e-3, abs=1e-5)
        else:
            assert layer.output_error is not None and layer.held_out_error is not None


def test_rejects_refinement_of_rounded_layers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--refine trains floats"):
        Case(tmp_path, "mlp").compress(refine=True, bond=3, form="svd", bits=4)


def test_biases_absorb_the_mean_error(tmp_path: Path) -> None:
    case = Case(tmp_path, "mlp")
    done = case.compress(bond=3, form="svd")
    stored = load_file(done.output)
    before = case.network.state_dict()
    for name in ("0.bias", "2.bias", "5.bias"):
        assert stored[name].dtype == before[name].dtype
        assert not torch.equal(stored[name], before[name])
    loaded = mpoc.load(done.output, make(case.name)).eval()
    with torch.no_grad():
        x = case.x[::2]
        assert float((loaded(x) - case.network(x)).mean(0).abs().max()) < 0.02


def test_running_means_absorb_the_mean_error_without_a_bias(tmp_path: Path) -> None:
    case = Case(tmp_path, "conv")
    stored = load_file(case.compress(bond=4, form="svd").output)
    before = case.network.state_dict()
    kept = stored.keys() & before.keys()
    assert {name for name in kept if not torch.equal(stored[name], before[name])} == {
        "1.running_mean",
        "4.running_mean",
        "6.bias",
        "8.bias",
    }


def test_each_expert_is_fitted_to_its_own_rows(tmp_path: Path) -> None:
    case = Case(tmp_path, "experts")
    options: dict[str, Any] = {"ratio": 0.5, "form": "svd", "layers": ("experts.*",)}
    done = case.compress(**options)
    assert case.error(done) < 0.8 * case.error(case.plain(**options))
    unused = [layer.name for layer in done.manifest.layers if layer.output_error is None]
    assert {"experts.4.0.weight", "experts.4.2.weight"} == set(unused)
    assert any("experts.4.0 (the network does not reach it)" in note for note in done.notes)


@pytest.mark.parametrize(
    ("effort", "forms"), [("balanced", {"svd"}), ("thorough", {"mera", "svd", "mpo", "svd+mpo"})]
)
def test_large_kernels_are_two_factors_unless_all_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effort: str, forms: set[str]
) -> None:
    monkeypatch.setattr(allocation, "LARGE_KERNEL", 0)
    tried: set[str] = set()
    monkeypatch.setattr(allocation, "Candidates", _spied_candidates(tried))
    Case(tmp_path, "conv").compress(ratio=0.5, effort=effort, layers=("0", "3"))
    assert tried == forms


@pytest.mark.parametrize(("largest", "effort"), [(0, "balanced"), (0, "thorough"), (1 << 16, "balanced")])
def test_sums_of_small_matrices_are_fitted_to_know_their_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int, effort: str
) -> None:
    measured: list[bool] = []

    class Spied(Candidates):
        def __init__(self, *args: Any, **options: Any) -> None:
            measured.append(options["measures_sums"])
            super().__init__(*args, **options)

    monkeypatch.setattr(allocation, "_SMALL", largest)
    monkeypatch.setattr(allocation, "Candidates", Spied)
    Case(tmp_path, "mlp").compress(ratio=0.5, effort=effort)
    assert set(measured) == {largest > 0 or effort == "thorough"}


def _spied_candidates(tried: set[str]) -> type[Candidates]:
    class Spied(Candidates):
        def __init__(
            self, matrix: Tensor, structures: Sequence[Structure], *args: Any, **options: Any
        ) -> None:
            tried.update(structure.form for structure in structures)
            super().__init__(matrix, structures, *args, **options)

    return Spied


@pytest.mark.parametrize("options", [{"ratio": 0.5, "form": "svd"}, {"bits": 3}])
def test_a_scratch_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    case = Case(tmp_path, "residual")
    held = case.compress(**options)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    written: list[Path] = []

    def save(tensors: dict[str, Tensor], path: Path) -> None:
        written.append(path)
        save_file(tensors, path)

    monkeypatch.setattr(keyed_store, "_HELD_BYTES", 0)
    monkeypatch.setattr(keyed_store, "save_file", save)
    for number, folder in enumerate([scratch, None]):  # that is asked for, and that beside the output
        written.clear()
        spilled = case.compress(out=f"spilled-{number}", scratch=folder, **options)
        assert spilled.output.read_bytes() == held.output.read_bytes()
        assert len(written) > 20 and {path.parent.parent for path in written} == {folder or tmp_path}
        assert not list(scratch.iterdir()) and not list(tmp_path.glob(".mpoc-*"))


@pytest.mark.parametrize("options", [{"ratio": 0.5, "form": "svd"}, {"bits": 3}])
def test_a_scratch_holds_weights_that_are_replaced_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    found: list[bool] = []
    replaced = OutputDistance._replaced

    def spied(distance: OutputDistance, layers: dict[str, Replacement]) -> AbstractContextManager[None]:
        if len(layers) > 1:
            found.extend(_is_in_file(layer.weight, tmp_path) for layer in layers.values())
        return replaced(distance, layers)

    monkeypatch.setattr(OutputDistance, "_replaced", spied)
    monkeypatch.setattr(keyed_store, "_HELD_BYTES", 0)
    Case(tmp_path, "mlp").compress(scratch=tmp_path, **options)
    assert len(found) > 2 and all(found)


def _is_in_file(tensor: Tensor, folder: Path) -> bool:
    """Whether a tensor is mapped into memory from a file, removed perhaps, in a folder."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.partition(" ")[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return str(folder) in line
    return False


@pytest.mark.slow
def test_output_is_deterministic(tmp_path: Path) -> None:
    case = Case(tmp_path, "mlp")
    first, again = (case.compress(ratio=0.5, out=out).output.read_bytes() for out in ("a", "b"))
    assert first == again


@pytest.mark.parametrize("name", slow_except(["conv", "mlp"], "mlp"))
def test_layers_fitted_at_once_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, name: str
) -> None:
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    case, fitted = Case(tmp_path, name), set[str]()
    map_one = Candidates.matrix

    def spied(candidates: Candidates, storage: Storage) -> Tensor:
        fitted.add(threading.current_thread().name)
        return map_one(candidates, storage)

    monkeypatch.setattr(Candidates, "matrix", spied)
    at_once = case.compress(ratio=0.5, out="a", scratch=tmp_path).output.read_bytes()
    assert any(name.startswith("ThreadPoolExecutor") for name in fitted)
    monkeypatch.setattr(distributed, "_AT_ONCE", 1)
    assert case.compress(ratio=0.5, out="b").output.read_bytes() == at_once


def test_exact_at_full_bond(tmp_path: Path) -> None:
    case = Case(tmp_path, "mlp")
    assert case.error(case.compress(bond=10**6, form="svd", allow_growth=True)) < 1e-4


def test_dry_run_plans_the_same_shares(tmp_path: Path) -> None:
    case = Case(tmp_path, "mlp")
    recipe = make_recipe(None, {"ratio": 0.5, "device": "cpu", "form": "svd"})
    request = CalibrationRequest(tmp_path / "data.npz", 200)
    planned = compress_checkpoint(
        tmp_path / "m.pt",
        tmp_path / "o.safetensors",
        recipe,
        dry_run=True,
        arch=case.arch,
        calibrate=request,
    )
    done = case.compress(ratio=0.5, form="svd")
    assert done.nbytes <= planned.nbytes
    assert [layer.bonds for layer in planned.manifest.layers] == [
        layer.bonds for layer in done.manifest.layers
    ]


@pytest.mark.parametrize("goal", ["max_error", "discard"])
def test_rejects_unsupported_goals(tmp_path: Path, goal: str) -> None:
    with pytest.raises(UsageError, match=f"--{goal.replace('_', '-')} limits the error of weights"):
        Case(tmp_path, "mlp").compress(**{goal: 0.1})  # type: ignore[arg-type]


def test_auto_requires_calibration(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="requires --calibrate"):
        Case(tmp_path, "mlp").plain(bond=4, form="auto")


def test_auto_requires_a_budget(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="requires a budget: --ratio"):
        Case(tmp_path, "mlp").compress(bond=4, form="auto")


def test_auto_is_rejected_in_memory() -> None:
    with pytest.raises(UsageError, match="requires calibrate"):
        mpoc.compress(nn.Linear(8, 8), ratio=0.5, form="auto")


def test_rejects_files_without_a_network(tmp_path: Path) -> None:
    case = Case(tmp_path, "mlp")
    request = CalibrationRequest(tmp_path / "data.npz")
    with pytest.raises(UsageError, match="not the network's code"):
        compress_checkpoint(
            tmp_path / "m.pt", tmp_path / "o.safetensors", make_recipe(None, {"bond": 3}), calibrate=request
        )
    assert case.folder.joinpath("o.safetensors").exists() is False


def test_rejects_a_single_example(tmp_path: Path) -> None:
    with pytest.raises(MpocError, match="at least 2"):
        Case(tmp_path, "mlp").compress(samples=1, bond=3)


def test_rejects_max_error_for_one_layer(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('ratio = 0.5\n[layer."0"]\nmax-error = 0.1\n')
    case = Case(tmp_path, "mlp")
    request = CalibrationRequest(tmp_path / "data.npz")
    recipe = make_recipe(tmp_path / "recipe.toml", {})
    output = tmp_path / "o.safetensors"
    with pytest.raises(UsageError, match="--max-error limits the error of weights"):
        compress_checkpoint(tmp_path / "m.pt", output, recipe, arch=case.arch, calibrate=request)


def test_rejects_networks_with_non_finite_outputs(tmp_path: Path) -> None:
    case = Case(tmp_path, "mlp")
    state = {**case.network.state_dict(), "0.bias": torch.full((48,), float("nan"))}
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(MpocError, match="not finite on these data"):
        case.compress(ratio=0.5)


@pytest.mark.slow
def test_whole_maps_are_fitted_by_their_weights(tmp_path: Path) -> None:
    case = Case(tmp_path, "conv")
    recipe = make_recipe(
        None, {"ratio": 0.6, "conv": "map", "input_shape": (parse_input_shape("3=16x16:stride=2,padding=0"),),
               "layers": ("3", "8"), "device": "cpu"}
    )  # fmt: skip
    request = CalibrationRequest(tmp_path / "data.npz", 60)
    output = tmp_path / "o.safetensors"
    done = compress_checkpoint(tmp_path / "m.pt", output, recipe, arch=case.arch, calibrate=request)
    kinds = {layer.name: layer.kind for layer in done.manifest.layers}
    assert kinds["8.weight"] == "linear"


def test_dry_run_reports_the_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CalibrationStatistics, "scratch_bytes", 0)  # but for the weights that fits find
    case = Case(tmp_path, "mlp")
    recipe = make_recipe(None, {"ratio": 0.5, "device": "cpu", "form": "svd"})
    request = CalibrationRequest(tmp_path / "data.npz", 60)
    output = tmp_path / "o.safetensors"
    planned = compress_checkpoint(
        tmp_path / "m.pt", output, recipe, dry_run=True, arch=case.arch, calibrate=request
    )
    assert planned.manifest.calibration["shares"]["chosen"] in WAYS
    weights = human_bytes(4 * sum(layer.num_original for layer in planned.manifest.layers))
    said = f" and up to {weights} of files meanwhile"
    assert any(note.endswith(said) for note in planned.notes), planned.notes


@pytest.mark.slow
def test_keeps_requested_sites_and_factors(tmp_path: Path) -> None:
    case = Case(tmp_path, "mlp")
    done = case.compress(ratio=0.5, shape=(parse_shape("2=6x8:8x6"),))
    found = {layer.name: layer.input_factors for layer in done.manifest.replaced}
    assert found["2.weight"] == (6, 8)
    done = case.compress(ratio=0.5, sites=3, out="p")
    assert {len(layer.input_factors) for layer in done.manifest.replaced} <= {2, 3}
    assert {layer.form for layer in done.manifest.replaced} == {"mpo"}


def test_shared_bias_stays_unchanged(tmp_path: Path) -> None:
    """What one layer's mean needs is not what the other's does."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def shared():\n"
        "    net = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))\n"
        "    net[2].bias = net[0].bias\n"
        "    return net\n"
    )
    network = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    network[2].bias = network[0].bias
    torch.save(network.state_dict(), tmp_path / "m.pt")
    x = torch.randn(60, 24)
    np.savez(tmp_path / "data.npz", x_train=x.numpy(), y_train=x[:, :24].numpy())
    request = CalibrationRequest(tmp_path / "data.npz", 60)
    spec, output = f"{tmp_path}/net.py:shared", tmp_path / "o.safetensors"
    recipe = make_recipe(None, {"bond": 4, "form": "svd", "device": "cpu"})
    compress_checkpoint(tmp_path / "m.pt", output, recipe, arch=spec, calibrate=request)
    assert torch.equal(load_file(output)["0.bias"], network.state_dict()["0.bias"])


@pytest.mark.slow
def test_size_is_kept_and_allocated(tmp_path: Path) -> None:
    case = Case(tmp_path, "mlp")
    done = case.compress(size=20_000, storage="float")
    assert 0.9 * 20_000 < done.nbytes <= 20_000
    assert done.manifest.calibration["shares"]["chosen"] in WAYS
    half = case.compress(out="half", size=12_000, dtype="bfloat16")
    assert half.nbytes <= 12_000
    few = case.compress(out="few", size=9_000, bits=4)
    assert 0.75 * 9_000 < few.nbytes <= 9_000
    assert few.manifest.calibration["shares"]["chosen"] in WAYS
    assert {part.get("bits") for layer in few.manifest.layers for part in layer.storage} == {4}


@pytest.mark.parametrize(
    ("name", "refine"), slow_except([("mlp", False), ("conv", False), ("residual", True)], ("mlp", False))
)
def test_cached_moments_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, refine: bool
) -> None:
    monkeypatch.setattr("mpoc.compression.calibrate.block_refinement._STEPS", 40)
    case, kept = Case(tmp_path, name), tmp_path / "moments"
    options: dict[str, Any] = {"ratio": 0.5, "form": "svd", "refine": refine}
    without = case.compress(64, **options).output.read_bytes()
    said = []
    for out in ("first", "again"):
        done = case.compress(64, out=out, moments=kept, **options)
        said += [note for note in done.notes if note.startswith("moments: ")]
        assert done.output.read_bytes() == without
    assert said == [f"moments: 56 examples kept in {kept}", f"moments: 56 examples read from {kept}"]
    assert ("refined" in done.manifest.calibration) == refine
    assert done.manifest.calibration["samples"] == 56


@pytest.mark.slow
def test_cached_moments_depend_on_data_not_goal(tmp_path: Path) -> None:
    case, kept = Case(tmp_path, "mlp"), tmp_path / "moments"
    case.compress(moments=kept, ratio=0.5, form="svd")
    before = kept.read_bytes()
    done = case.compress(out="a", moments=kept, ratio=0.3, form="mpo")
    assert f"moments: 175 examples read from {kept}" in done.notes and kept.read_bytes() == before
    done = case.compress(100, out="b", moments=kept, ratio=0.3, form="svd")
    assert f"moments: 88 examples kept in {kept}, which was of other data: measured again" in done.notes
    done = case.compress(100, out="c", moments=kept, ratio=0.3, form="svd", seed=1)
    assert done.notes[-1].endswith("which was of other data, other options: measured again")
    done = case.compress(100, out="d", moments=kept, ratio=0.3, form="svd", seed=1, exclude=("0",))
    assert done.notes[-1].endswith("which was of other options: measured again")


@pytest.mark.parametrize("form", slow_except(["svd", "mpo", "tree", "auto"], "svd"))
def test_calibration_improves_embeddings(tmp_path: Path, form: str) -> None:
    case = Case(tmp_path, "words")
    options: dict[str, Any] = {"ratio": 0.6, "embeddings": True, "layers": ("table",), "form": form}
    done = case.compress(**options)
    plain = case.plain(**options | {"form": "svd" if form == "auto" else form})
    (layer,) = done.manifest.layers
    assert (layer.kind, layer.form) == ("embedding", form if form != "auto" else layer.form)
    assert layer.output_error is not None and layer.same_size is not None
    assert case.error(done) < 0.8 * case.error(plain)


def test_tied_table_is_fitted_by_its_weights(tmp_path: Path) -> None:
    done = Case(tmp_path, "tied").compress(ratio=0.6, embeddings=True, form="svd")
    (layer,) = done.manifest.layers
    assert layer.form == "svd" and layer.output_error is None
    assert any("not calibrated" in note and "tied" in note for note in done.notes)


@pytest.mark.slow
def test_layer_rule_with_a_bond_gives_an_mpo(tmp_path: Path) -> None:
    case = Case(tmp_path, "mlp")
    (tmp_path / "recipe.toml").write_text('ratio = 0.5\n[layer."2"]\nbond = 3\n')
    recipe = make_recipe(tmp_path / "recipe.toml", {"device": "cpu"})
    request = CalibrationRequest(tmp_path / "data.npz", 200)
    done = compress_checkpoint(
        tmp_path / "m.pt", tmp_path / "o.safetensors", recipe, arch=case.arch, calibrate=request
    )
    second = next(layer for layer in done.manifest.layers if layer.layer == "2")
    assert second.form == "mpo" and max(second.bonds) == 3 and len(second.output_factors) > 2


@pytest.mark.parametrize("form", ["auto", "svd+mpo"])
def test_auto_rejects_a_bond(tmp_path: Path, form: str) -> None:
    (tmp_path / "recipe.toml").write_text(f'ratio = 0.5\n[layer."2"]\nform = "{form}"\nbond = 3\n')
    with pytest.raises(UsageError, match="takes a share of a budget, not a bond"):
        make_recipe(tmp_path / "recipe.toml", {})


def test_rejects_data_of_another_kind(tmp_path: Path) -> None:
    case = Case(tmp_path, "conv")
    np.savez(tmp_path / "data.npz", x_train=np.zeros((9, 5), np.float32), y_train=np.zeros(9, np.int64))
    with pytest.raises(UsageError, match=r"the network does not take x of shape \(1, 5\)"):
        case.compress(ratio=0.5)
    assert not (tmp_path / "o.safetensors").exists()
