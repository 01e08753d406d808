"""What is shown of a compressed file: its manifest, and what its cores tell of their bonds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mpoc.checkpoint.base import Checkpoint
from mpoc.errors import MpocError
from mpoc.expand import check_cores, open_compressed
from mpoc.forms.mpo import MPO, entropy
from mpoc.forms.terms import forms_of
from mpoc.manifest import LayerRecord, Manifest
from mpoc.manifest_file import read_manifest
from mpoc.report import output_bytes
from mpoc.spectrum import Spectrum, thinned


@dataclass(frozen=True)
class BondSpectra:
    """One bond of a layer."""

    title: str  # "bond 2", or "low-rank part"
    kept: int  # D_k
    stored: Spectrum  # of the cores; () where they are zero
    original: Spectrum | None  # of the source's weight
    entropy: float  # of the stored weight, or of this term of a sum
    # ‖Ŵ‖/‖W‖, for both spectra to be of one scale; None where it is not known.
    scale: float | None


@dataclass(frozen=True)
class LayerData:
    """A replaced layer."""

    place: int  # among all layers of the file, from 1
    record: LayerRecord
    bonds: tuple[BondSpectra, ...]  # none for forms that are no chains

    @property
    def anchor(self) -> str:
        """Of its part of the page."""
        return f"layer-{self.place}"


@dataclass(frozen=True)
class FileData:
    """A compressed file or directory."""

    name: str
    manifest: Manifest
    nbytes: int
    layers: tuple[LayerData, ...]  # the replaced ones


def read_files(path: Path, others: Sequence[Path]) -> list[FileData]:
    """``path`` whole, and the manifests of ``others``, under names that tell them apart.

    Raises:
        UsageError, MpocError: as :func:`read_file`.
    """
    found = [read_file(path), *(read_file(other, with_bonds=False) for other in others)]
    paths = [one.resolve() for one in (path, *others)]
    for parts in (1, 2):
        names = [str(Path(*one.parts[-parts:])) for one in paths]
        if len(set(names)) == len(names):
            return [replace(file, name=name) for file, name in zip(found, names, strict=True)]
    return [replace(file, name=str(one)) for file, one in zip(found, paths, strict=True)]


def read_file(path: Path, with_bonds: bool = True) -> FileData:
    """Read a compressed file or directory, a layer's cores at a time.

    Args:
        path: of the file.
        with_bonds: compute the spectra of the cores.

    Raises:
        UsageError: there is no such file.
        MpocError: not compressed by mpoc or damaged, or a core does not fit its manifest or is not finite.
    """
    manifest = read_manifest(path)
    layers: list[LayerData] = []
    if with_bonds:
        stored = open_compressed(path)
        for place, record in enumerate(manifest.layers, start=1):
            if record.form != "dense":
                layers.append(LayerData(place, record, _bonds(stored, record)))
    return FileData(path.resolve().name, manifest, output_bytes(path), tuple(layers))


def _bonds(stored: Checkpoint, record: LayerRecord) -> tuple[BondSpectra, ...]:
    check_cores(stored, record)
    return tuple(_of_chains(stored, record))


def _of_chains(stored: Checkpoint, record: LayerRecord) -> Iterator[BondSpectra]:
    """Of the MPO bond by bond, then of an added low-rank part."""
    cores = [stored.read(name) for name in record.core_names]
    for name, core in zip(record.core_names, cores, strict=True):
        if not bool(torch.isfinite(core).all()):
            raise MpocError(f"{stored.path}: core {name!r} holds NaN or infinite values")
    terms = [form for form in forms_of(cores, record.structure) if isinstance(form, MPO)]
    originals = record.spectra_of_weight or (None,) * (len(record.bonds) - 2)
    for term, chain in enumerate(terms):
        for k, values in enumerate(chain.spectra()):
            alone = len(terms) == 1
            title = f"bond {k + 1}" if term == 0 else "low-rank part"
            original = originals[k] if alone else None
            points = thinned(values.tolist(), len(values))
            scale = _scale(record) if original else None
            yield BondSpectra(title, chain.bonds[k + 1], points, original, entropy(values), scale)


def _scale(record: LayerRecord) -> float | None:
    """‖Ŵ‖/‖W‖ of a weight that was cut and not changed since: what was cut is orthogonal to what is left."""
    error = record.relative_error
    return math.sqrt(1 - error**2) if error is not None and error < 1 else None
