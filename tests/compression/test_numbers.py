"""Weights with extreme numbers, there and back: each right, or refused with the tensor's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mpoc.compression.calibrate.calibration_data import CalibrationRequest
from mpoc.compression.expand import expand_checkpoint
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError
from mpoc.io.manifest_reader import read_manifest
from tests.support.checkpoints import contents, relative_error

FORMS = pytest.mark.parametrize("form", ["mpo", "svd", "tree"])


def low(rank: int, rows: int = 32, columns: int = 24) -> Tensor:
    return torch.randn(rows, rank) @ torch.randn(rank, columns)


def there_and_back(folder: Path, state: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Compressed, growing where it must, and expanded; the error said is the error made."""
    torch.save(state, folder / "m.pt")
    recipe = make_recipe(None, {"bond": 1000, "allow_growth": True} | options)
    manifest = compress_checkpoint(folder / "m.pt", folder / "c.safetensors", recipe).manifest
    expand_checkpoint(folder / "c.safetensors", folder / "d.safetensors")
    dense = load_file(folder / "d.safetensors")
    for layer in manifest.replaced:
        largest = state[layer.name].double().abs().max()
        if largest:
            made = relative_error(state[layer.name].double() / largest, dense[layer.name].double() / largest)
            eps = torch.finfo(state[layer.name].dtype).eps
            assert layer.relative_error == pytest.approx(made, rel=1e-3, abs=4 * eps), layer.name
    return dense


WEIGHTS = {
    "zero": torch.zeros(32, 24),
    "tiny": 1e-30 * torch.ones(32, 24),
    "denormal": torch.full((32, 24), 1e-40),
    "one denormal": torch.eye(32, 24) * 1e-44,
    "huge": torch.full((32, 24), -3e38),
    "of every size": torch.logspace(-37, 37, 24).expand(32, 24).clone(),
    "of rank one": torch.outer(torch.arange(32.0), torch.arange(24.0)),
    "one number": torch.zeros(32, 24).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(2.0)),
    "1 × N": torch.arange(24.0).reshape(1, 24),
    "N × 1": torch.arange(32.0).reshape(32, 1),
    "1 × 1": torch.tensor([[3e38]]),
    "bfloat16": torch.full((32, 24), 3e38).bfloat16(),
    "float16 at its end": torch.full((32, 24), 60000.0).half(),
    "float64 at its end": torch.full((32, 24), 1e300, dtype=torch.float64),
}


@FORMS
@pytest.mark.parametrize("name", WEIGHTS)
def test_preserves_extreme_weights(tmp_path: Path, name: str, form: str) -> None:
    weight = WEIGHTS[name]
    dense = there_and_back(tmp_path, {"fc.weight": weight}, form=form)["fc.weight"]
    assert (dense.shape, dense.dtype) == (weight.shape, weight.dtype)
    largest = float(weight.double().abs().max())
    assert (
        float((dense.double() - weight.double()).abs().max()) <= 64 * torch.finfo(weight.dtype).eps * largest
    )


@FORMS
@pytest.mark.parametrize("size", [1e-30, 1e-41, 1e35])
def test_reports_errors_of_weights_of_any_scale(tmp_path: Path, form: str, size: float) -> None:
    state = {"fc.weight": (torch.randn(32, 24) * size)}
    dense = there_and_back(tmp_path, state, form=form, bond=4)
    assert 0.3 < relative_error(state["fc.weight"], dense["fc.weight"]) < 0.95


@pytest.mark.parametrize("size", [1e-30, 1e-41, 1e30, 0.0])
def test_fits_meras_of_any_scale(tmp_path: Path, size: float) -> None:
    weight, errors = torch.randn(64, 64), []
    for k, state in enumerate(({"fc.weight": weight}, {"fc.weight": weight * size})):
        (tmp_path / str(k)).mkdir()
        dense = there_and_back(tmp_path / str(k), state, form="mera", bond=3)["fc.weight"]
        errors.append(relative_error(state["fc.weight"], dense) if k == 0 or size else 0.0)
    assert errors[1] == pytest.approx(errors[0], rel=1e-2) if size else not dense.any()


@FORMS
@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (float("-inf"), "infinite values")])
def test_rejects_non_finite_rows(tmp_path: Path, form: str, value: float, said: str) -> None:
    state = {"a.weight": torch.randn(32, 24), "b.weight": torch.randn(32, 24)}
    state["b.weight"][3] = value
    with pytest.raises(MpocError, match=rf"m\.pt: tensor 'b\.weight' holds {said}"):
        there_and_back(tmp_path, state, form=form, bond=2)
    assert set(contents(tmp_path)) == {"m.pt"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rejects_overflowing_approximations(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of rank 1 the nearest matrix has an entry above the largest of the weight."""
    top = torch.finfo(dtype).max
    weight = torch.tensor([[1.0, 1.0], [1.0, 0.0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    state = {"fc.weight": (weight * top).to(dtype)}
    with pytest.raises(MpocError, match=r"m\.pt: tensor 'fc\.weight': its .* overflow"):
        there_and_back(tmp_path, state, form="svd", bond=1, dtype="float32")
    assert set(contents(tmp_path)) == {"m.pt"}


def test_rejects_overflowing_cores(tmp_path: Path) -> None:
    state = {"fc.weight": torch.full((32, 24), 1e30)}
    with pytest.raises(MpocError, match=r"tensor 'fc\.weight': its cores overflow float16"):
        there_and_back(tmp_path, state, form="svd", dtype="float16")


def test_preserves_other_tensors_bit_by_bit(tmp_path: Path) -> None:
    """NaN included: what is not compressed is not looked at."""
    others = {
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "scalar": torch.tensor(3.5),
        "empty.weight": torch.empty(0, 5),
        "long.weight": torch.arange(6).reshape(2, 3),
        "flag": torch.tensor([True, False]),
        "complex.weight": torch.tensor([[1 + 2j, 3 - 4j]], dtype=torch.complex64),
        "eight": torch.randn(4).to(torch.float8_e4m3fn),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "half": torch.tensor([65504.0, 6e-8]).half(),
        "denormal": torch.tensor([1e-45]),
    }
    dense = there_and_back(tmp_path, {"fc.weight": low(2), **others}, bond=4)
    for name, tensor in others.items():
        assert dense[name].dtype == tensor.dtype and dense[name].shape == tensor.shape
        assert dense[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


def test_detects_errors_above_tolerance_at_any_scale(tmp_path: Path) -> None:
    for k, size in enumerate((1.0, 1e-35, 1e35)):
        folder = tmp_path / str(k)
        folder.mkdir()
        torch.manual_seed(0)
        state = {"fc.weight": (low(6) + 0.01 * torch.randn(32, 24)) * size}
        options = {"bond": None, "max_error": 0.1, "form": "svd"}
        dense = there_and_back(folder, state, **options)
        assert 0 < relative_error(state["fc.weight"], dense["fc.weight"]) <= 0.1


NET = """
from torch import nn
def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 6))
"""


@pytest.mark.parametrize("form", ["mpo", "svd", None])
@pytest.mark.parametrize(
    "fault", ["zero", "tiny", "denormal", "large", "rank one", "dead inputs", "huge", "NaN"]
)
def test_calibrates_on_extreme_weights(tmp_path: Path, fault: str, form: str | None) -> None:
    """The layer in the middle; what it does is fitted, or its name is said."""
    (tmp_path / "net.py").write_text(NET)
    arch = f"{tmp_path / 'net.py'}:mlp"
    np.savez(tmp_path / "data.npz", inputs=np.random.default_rng(0).normal(size=(60, 16)).astype("f4"))
    layers = {"0": (32, 16), "2": (24, 32), "4": (6, 24)}
    state = {f"{k}.weight": torch.randn(shape) for k, shape in layers.items()}
    state |= {f"{k}.bias": torch.randn(shape[0]) for k, shape in layers.items()}
    change = {"zero": 0.0, "tiny": 1e-30, "denormal": 1e-42, "large": 1e12, "huge": 1e38, "NaN": float("nan")}
    state["2.weight"] *= change.get(fault, 1.0)
    if fault == "rank one":
        state["2.weight"] = torch.outer(torch.randn(24), torch.randn(32))
    elif fault == "dead inputs":
        state["0.weight"], state["0.bias"] = torch.zeros(32, 16), -torch.ones(32)
    torch.save(state, tmp_path / "m.pt")
    output, request = tmp_path / "c.safetensors", CalibrationRequest(tmp_path / "data.npz", 40)
    recipe = make_recipe(None, {"ratio": 0.6, "form": form, "exclude": ("re:^[04]$",)})
    if fault in ("huge", "NaN"):
        with pytest.raises(MpocError, match=r"not finite|infinite|NaN"):
            compress_checkpoint(tmp_path / "m.pt", output, recipe, arch=arch, calibrate=request)
        assert not output.exists()
        return
    compress_checkpoint(tmp_path / "m.pt", output, recipe, arch=arch, calibrate=request)
    (layer,) = read_manifest(output).replaced
    expand_checkpoint(output, tmp_path / "d.safetensors")
    dense = load_file(tmp_path / "d.safetensors")["2.weight"]
    assert bool(dense.isfinite().all())
    if fault == "zero":
        assert not dense.any()
    if fault == "rank one" and form != "mpo":
        assert layer.relative_error is not None and layer.relative_error < 1e-3
