"""Whole checkpoints: the same layers and factors as ``mpoc compress``, and both sides of a compression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpoc.compression.entanglement import as_dict, entanglement_of
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.compression.recipe_syntax import parse_shape
from mpoc.errors import MpocError, UsageError
from tests.support.checkpoints import network_state, save_directory


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    torch.save(network_state(), tmp_path / "m.pt")
    return tmp_path / "m.pt"


@pytest.fixture
def stored(dense: Path) -> Path:
    output = dense.with_name("m.safetensors")
    compress_checkpoint(dense, output, make_recipe(None, {"bond": 5}))
    return output


@pytest.mark.parametrize("options", [{}, {"sites": 3}, {"exclude": ("fc1",), "embeddings": True}], ids=str)
def test_uses_the_factors_of_compress(dense: Path, options: dict[str, Any]) -> None:
    recipe = make_recipe(None, {"bond": 1, "allow_growth": True, **options})
    done = compress_checkpoint(dense, Path("unwritten.safetensors"), recipe, dry_run=True)
    found = entanglement_of(dense, options)
    assert [profile.structure for profile in found.profiles] == [
        layer.structure for layer in done.manifest.layers
    ]
    for profile in found.profiles:
        assert profile.stored is None and profile.weight is not None
        assert len(profile.weight) == len(profile.structure.site_sizes) - 1


def test_uses_given_factors(dense: Path) -> None:
    options = {"shape": (parse_shape("fc1=6x8:8x8"),), "layers": ("fc1",)}
    (profile,) = entanglement_of(dense, options).profiles
    assert profile.structure.input_factors == (6, 8)
    assert [cut.full_bond for cut in profile.weight or ()] == [48]


def test_entropies_match_the_report(dense: Path, stored: Path) -> None:
    done = compress_checkpoint(dense, stored, make_recipe(None, {"bond": 5}), force=True)
    found = entanglement_of(dense, {}, against=stored)
    assert found.left == 1  # tiny
    for profile, layer in zip(found.profiles, done.manifest.replaced, strict=True):
        assert profile.record == layer
        assert profile.weight is not None and profile.stored is not None
        after = [cut.entropy for cut in profile.stored]
        assert after == pytest.approx(list(layer.entropies), rel=1e-2 if layer.dtype == "bfloat16" else 1e-4)
        assert [cut.full_bond for cut in profile.weight] == [cut.full_bond for cut in profile.stored]
        for cut, value in zip(profile.weight, layer.entropies_of_weight, strict=False):
            assert value is None or cut.entropy == pytest.approx(value, rel=1e-4)


def test_accepts_a_compressed_file(stored: Path) -> None:
    found = entanglement_of(stored, {"layers": ("fc*",), "exclude": ("fc2",)})
    assert [profile.layer for profile in found.profiles] == ["fc1"]
    assert found.profiles[0].stored and not found.profiles[0].weight
    (layer,) = as_dict(found)["layers"]
    assert layer["cuts"] is None
    assert [cut["effective_bond"] <= 5 for cut in layer["cuts_stored"]] == [True] * 3


def test_accepts_a_directory(tmp_path: Path) -> None:
    source = save_directory(tmp_path / "model", network_state())
    assert len(entanglement_of(source, {}).profiles) == 5
    compress_checkpoint(source, tmp_path / "small", make_recipe(None, {"bond": 5}))
    found = entanglement_of(source, {}, against=tmp_path / "small")
    assert all(profile.weight and profile.stored for profile in found.profiles)


def test_reports_progress_per_layer(dense: Path) -> None:
    told: list[tuple[str, int, int]] = []
    entanglement_of(dense, {"layers": ("fc*",)}, progress=lambda *said: told.append(said))
    assert told == [("fc1", 1, 2), ("fc2", 2, 2)]


@pytest.mark.parametrize("kept", [0.0, 1.0, -1.0, float("nan")])
def test_rejects_weight_out_of_range(dense: Path, kept: float) -> None:
    with pytest.raises(UsageError, match="--weight"):
        entanglement_of(dense, {}, kept=kept)


@pytest.mark.parametrize("options", [{"sites": 3}, {"embeddings": True}, {"conv": "map"}], ids=str)
def test_compressed_file_keeps_its_factors(stored: Path, options: dict[str, Any]) -> None:
    option = next(iter(options))
    with pytest.raises(UsageError, match=f"--{option}: the layers and their factors are those"):
        entanglement_of(stored, options)


def test_rejects_patterns_without_a_match(stored: Path) -> None:
    with pytest.raises(UsageError, match="'nothing' matches no tensor"):
        entanglement_of(stored, {"layers": ("nothing",)})
    with pytest.raises(UsageError, match="no compressed layer is chosen"):
        entanglement_of(stored, {"exclude": ("*",)})


def test_rejects_a_file_of_another_model(tmp_path: Path, stored: Path) -> None:
    torch.save({**network_state(), "fc1.weight": torch.randn(64, 47)}, tmp_path / "other.pt")
    with pytest.raises(MpocError, match=r"'fc1.weight' is of shape \(64, 47\), but \(64, 48\) in "):
        entanglement_of(tmp_path / "other.pt", {}, against=stored)
    with pytest.raises(MpocError, match="already compressed"):
        entanglement_of(stored, {}, against=stored)


def test_rejects_non_finite_values(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.full((8, 8), torch.nan)}, tmp_path / "m.pt")
    with pytest.raises(MpocError, match=r"'fc.weight' holds NaN"):
        entanglement_of(tmp_path / "m.pt", {})


def test_is_deterministic(dense: Path) -> None:
    assert as_dict(entanglement_of(dense, {})) == as_dict(entanglement_of(dense, {}))
