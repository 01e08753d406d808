"""What the cores tell of their bonds, against direct SVDs of the weight."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mpoc.compression.expand import dense_weight
from mpoc.errors import MpocError
from mpoc.io.manifest import Spectrum
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.open_checkpoint import open_compressed
from mpoc.reporting.contents import read_file, read_files
from mpoc.tensor_networks.forms.layout import interleave
from tests.reporting.files import compressed, rewritten
from tests.support.checkpoints import network_state
from tests.support.sums import RANK, compress_to_sums


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed(tmp_path_factory.mktemp("file"), bond=5)


def direct_spectra(weight: torch.Tensor, path: Path, place: int) -> list[np.ndarray]:
    """Singular values of every bipartition, of unit norm."""
    structure = read_manifest(path).layers[place - 1].structure
    tensor = interleave(weight.double(), structure).numpy()
    lefts = [math.prod(structure.site_sizes[:k]) for k in range(1, len(structure.site_sizes))]
    values = [np.linalg.svd(tensor.reshape(left, -1), compute_uv=False) for left in lefts]
    return [one / np.linalg.norm(one) for one in values]


def assert_points_of(spectrum: Spectrum, values: np.ndarray) -> None:
    for index, value in spectrum:
        assert value == pytest.approx(values[index - 1], abs=2e-5)


def test_spectra_and_entropies_match_the_bipartitions(path: Path) -> None:
    stored = open_compressed(path, read_manifest(path))
    layers = read_file(path).layers
    assert len(layers) == len(read_manifest(path).replaced) > 2
    for layer in layers:
        weight = dense_weight(stored, layer.record)
        for k, (bond, values) in enumerate(
            zip(layer.bonds, direct_spectra(weight, path, layer.place), strict=True)
        ):
            assert bond.kept == layer.record.bonds[k + 1]
            assert len(bond.stored) == bond.kept
            if layer.record.dtype == "float32" and not any(layer.record.padding):
                assert_points_of(bond.stored, values)
                p = values[values > 1e-7] ** 2
                assert bond.entropy == pytest.approx(-(p * np.log(p)).sum(), abs=1e-6)
            assert bond.entropy == pytest.approx(layer.record.entropies[k], abs=1e-2)


def test_original_spectrum_matches_the_source(path: Path) -> None:
    state = network_state()
    found = 0
    for layer in read_file(path).layers:
        for bond, values in zip(
            layer.bonds, direct_spectra(state[layer.record.name], path, layer.place), strict=True
        ):
            if bond.original is not None:
                found += 1
                assert_points_of(bond.original, values)
                error = layer.record.relative_error
                assert error is not None and bond.scale == pytest.approx(math.sqrt(1 - error**2))
    assert found >= 3


def test_sum_lists_bonds_of_both_terms(tmp_path: Path) -> None:
    torch.save(network_state(), tmp_path / "m.pt")
    compress_to_sums(tmp_path / "m.pt", tmp_path / "s.safetensors")
    for layer in read_file(tmp_path / "s.safetensors").layers:
        *chain, added = layer.bonds
        assert (added.title, added.kept) == ("low-rank part", RANK)
        assert [bond.kept for bond in chain] == list(layer.record.bonds[1:-1])


def test_tree_lists_its_branches(tmp_path: Path) -> None:
    path = compressed(tmp_path, {"a.weight": torch.randn(48, 60)}, bond=5, form="tree", sites=3)
    (layer,) = read_file(path).layers
    structure = layer.record.structure
    weight = interleave(
        dense_weight(open_compressed(path, read_manifest(path)), layer.record).double(), structure
    ).numpy()
    tensor = weight.reshape(structure.site_sizes)
    assert [bond.title for bond in layer.bonds] == [
        "branch 1: site 1",
        "branch 2: site 2",
        "branch 3: sites 1–2",
    ]
    for bond, front in zip(layer.bonds, ([0], [1], [0, 1]), strict=True):
        rest = [axis for axis in range(3) if axis not in front]
        rows = math.prod(structure.site_sizes[axis] for axis in front)
        values = np.linalg.svd(tensor.transpose(*front, *rest).reshape(rows, -1), compute_uv=False)
        values /= np.linalg.norm(values)
        assert len(bond.stored) == bond.kept == 5
        assert_points_of(bond.stored, values)
        p = values[:5] ** 2
        assert bond.entropy == pytest.approx(-(p * np.log(p)).sum(), abs=1e-6)


@pytest.mark.slow
def test_mera_has_no_spectra(tmp_path: Path) -> None:
    path = compressed(tmp_path, {"a.weight": torch.randn(16, 16)}, bond=2, form="mera", sites=4)
    assert read_file(path).layers[0].bonds == ()


def test_names_distinguish_files(tmp_path: Path) -> None:
    paths = [compressed(tmp_path / name) for name in ("a", "b")]
    assert [file.name for file in read_files(paths[0], paths[1:])] == [
        "a/m.mpo.safetensors",
        "b/m.mpo.safetensors",
    ]
    assert [file.name for file in read_files(paths[0], [])] == ["m.mpo.safetensors"]
    same = read_files(paths[0], [paths[0]])
    assert [file.name for file in same] == [str(paths[0].resolve())] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_names_non_finite_cores(path: Path, tmp_path: Path, value: float) -> None:
    broken = tmp_path / "m.mpo.safetensors"
    data = bytearray(path.read_bytes())
    name = read_manifest(path).replaced[0].core_names[0]
    core = open_compressed(path, read_manifest(path)).read(name)
    at = data.index(core.numpy().tobytes())
    data[at : at + 4] = np.float32(value).tobytes()
    broken.write_bytes(data)
    with pytest.raises(MpocError, match=r"core .* holds NaN or infinite values"):
        read_file(broken)


def test_names_cores_that_contradict_the_manifest(path: Path, tmp_path: Path) -> None:
    other = compressed(tmp_path / "other", bond=3)
    broken = rewritten(path, read_manifest(other))
    with pytest.raises(MpocError, match="the manifest says"):
        read_file(broken)
