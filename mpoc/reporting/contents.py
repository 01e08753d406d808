"""The contents of a compressed file as a report shows them: its manifest, and the spectra of its cores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mpoc.errors import MpocError
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import LayerRecord, Manifest, Spectrum, thinned
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.open_checkpoint import check_cores, open_compressed
from mpoc.io.weight_files import output_bytes
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.mpo import entropy


@dataclass(frozen=True)
class BondSpectra:
    """One bond of a layer."""

    title: str  # "bond 2", "branch 3: sites 1–2", or "low-rank part"
    kept: int  # D_k
    stored: Spectrum  # of the cores; () where they are zero
    original: Spectrum | None  # of the source's weight
    entropy: float  # of the stored weight, or of this term of a sum
    # ‖Ŵ‖/‖W‖, which brings both spectra to one scale; None: unknown.
    scale: float | None


@dataclass(frozen=True)
class LayerData:
    """A replaced layer."""

    place: int  # among all layers of the file, from 1
    record: LayerRecord
    bonds: tuple[BondSpectra, ...]  # none of a MERA: it has loops

    @property
    def anchor(self) -> str:
        """The id of its section on the HTML page."""
        return f"layer-{self.place}"


@dataclass(frozen=True)
class FileData:
    """A compressed file or directory."""

    name: str
    manifest: Manifest
    nbytes: int
    layers: tuple[LayerData, ...]  # the replaced ones


def read_files(path: Path, others: Sequence[Path]) -> list[FileData]:
    """Read ``path`` with its cores and the manifests of ``others``; their names are made distinct.

    Raises:
        UsageError, MpocError: as :func:`read_file`.
    """
    contents = [read_file(path), *(read_file(other, with_bonds=False) for other in others)]
    paths = [file.resolve() for file in (path, *others)]
    for parts in (1, 2):
        names = [str(Path(*file.parts[-parts:])) for file in paths]
        if len(set(names)) == len(names):
            return [replace(file, name=name) for file, name in zip(contents, names, strict=True)]
    return [replace(file, name=str(full)) for file, full in zip(contents, paths, strict=True)]


def read_file(path: Path, with_bonds: bool = True) -> FileData:
    """Read a compressed file or directory, the cores of one layer at a time.

    Args:
        path: path of the file.
        with_bonds: compute the spectra of the cores.

    Raises:
        UsageError: no such file.
        MpocError: not compressed by mpoc or damaged, or a core does not fit its manifest or is not finite.
    """
    manifest = read_manifest(path)
    layers: list[LayerData] = []
    if with_bonds:
        stored = open_compressed(path, manifest)
        for place, record in enumerate(manifest.layers, start=1):
            if record.form != "dense":
                layers.append(LayerData(place, record, _bonds(stored, record)))
    return FileData(path.resolve().name, manifest, output_bytes(path), tuple(layers))


def _bonds(stored: Checkpoint, record: LayerRecord) -> tuple[BondSpectra, ...]:
    check_cores(stored, record)
    return tuple(_of_terms(stored, record))


def _of_terms(stored: Checkpoint, record: LayerRecord) -> Iterator[BondSpectra]:
    """The bonds of the first term, then that of an added low-rank part."""
    cores = [stored.read(name) for name in record.core_names]
    for name, core in zip(record.core_names, cores, strict=True):
        if not bool(torch.isfinite(core).all()):
            raise MpocError(f"{stored.path}: core {name!r} holds NaN or infinite values")
    structure = record.structure
    spectra = [values for term in form_of(cores, structure).terms for values in term.spectra()]
    titles = structure.topology.bond_titles(len(structure.site_sizes))
    titles, kept = [*titles, "low-rank part"], (*record.inner_bonds, record.low_rank)
    known = () if structure.parts else record.spectra_of_weight
    originals = known or (None,) * len(spectra)
    for title, bond, values, original in zip(titles, kept, spectra, originals, strict=False):
        points = thinned(values.tolist(), len(values))
        scale = _scale(record) if original else None
        yield BondSpectra(title, bond, points, original, entropy(values), scale)


def _scale(record: LayerRecord) -> float | None:
    """‖Ŵ‖/‖W‖ of a truncated weight: what was discarded is orthogonal to what is kept."""
    error = record.relative_error
    return math.sqrt(1 - error**2) if error is not None and error < 1 else None
