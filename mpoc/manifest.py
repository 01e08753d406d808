"""The manifest: what a compressed file says of itself, as plain data.  No torch here.

In a single file it is one JSON text under the key ``mpoc`` of the safetensors header's metadata; in a
directory it is ``mpoc.json``.  It holds no times and no dates, so that the same input gives the same bytes.

A directory that transformers saved again (``save_pretrained`` after ``import mpoc.hf``) has no ``mpoc.json``.
Its config.json and the headers of its weights still tell factors and bonds, but not what was lost.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mpoc import record_check
from mpoc.errors import MpocError, UsageError, shortened
from mpoc.geometry import Geometry
from mpoc.header import TensorInfo, count_parameters, read_header
from mpoc.orders import Order
from mpoc.spectrum import Spectrum
from mpoc.strict_json import parse_strictly, read_bounded, written
from mpoc.structure import KINDS, Structure
from mpoc.typed import made
from mpoc.versions import unreadable
from mpoc.weight_files import check_inside, read_json, stored_tensors
from mpoc.wiring import network_of

FORMAT = 1
FORMS = ("mpo", "svd", "tree", "mera", "svd+mpo", "dense")
MANIFEST_FILE = "mpoc.json"
_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
# In the metadata of weights that transformers saved: an ``mpoc.json`` beside them is an older one.
SAVED_AGAIN = "mpoc_saved_again"
# config.json does not tell which mpoc wrote it.
MAYBE_LATER = "pip install --upgrade mpoc, where a later one wrote it"


@dataclass(frozen=True)
class LayerRecord:
    """One selected layer: what it was and what is stored."""

    name: str  # of the weight in the source, e.g. "layer1.0.conv1.weight"
    kind: str
    shape: tuple[int, ...]  # of the weight in the source
    dtype: str  # of the weight in the source
    form: str  # one of FORMS
    num_original: int  # N_ori
    num_stored: int  # N_mpo, or N_ori where dense
    stored_dtype: str
    reason: str = ""  # why dense
    transposed: bool = False
    output_factors: tuple[int, ...] = ()
    input_factors: tuple[int, ...] = ()
    bonds: tuple[int, ...] = ()
    low_rank: int = 0  # rank of the part that is added to the MPO (form "svd+mpo")
    padding: tuple[int, int] = (0, 0)
    relative_error: float | None = None  # None in a plan, and for a dense layer
    entropies: tuple[float, ...] = ()  # of the stored weight; of a sum, which is no chain, none
    entropies_of_weight: tuple[float | None, ...] = ()  # of the source's, where computed exactly
    # The same bonds: some of the Schmidt values, where they are known and some were cut off.
    spectra_of_weight: tuple[Spectrum | None, ...] = ()
    geometry: Geometry | None = None  # of a whole map (kind "convmap")
    order: Order = ""  # of the inputs (mpoc.orders): by its name, or the permutation; in a plan "learned" too
    # ‖Wx − Ŵx̃‖ / ‖Wx‖ about the mean, x̃ the inputs that the compressed network gives; None: not calibrated.
    output_error: float | None = None  # on the inputs of the fit
    held_out_error: float | None = None  # on others
    # The latter as the network's output feels it, of "this" and of other methods at the same size.
    same_size: dict[str, float] | None = None

    @property
    def layer(self) -> str:
        """The name without ``.weight``."""
        return self.name.removesuffix(".weight")

    @property
    def rho(self) -> float:
        """N_stored / N_ori."""
        return self.num_stored / self.num_original

    @property
    def structure(self) -> Structure:
        """How the cores make the weight; not for dense layers."""
        factors = self.output_factors, self.input_factors
        return Structure(
            self.kind, self.shape, self.transposed, *factors, self.geometry, network_of(self.form), self.order
        )

    @property
    def num_cores(self) -> int:
        """Of the form, and two more of an added low-rank part; 0 where dense."""
        return len(self.core_shapes) if self.form != "dense" else 0

    @property
    def core_names(self) -> list[str]:
        """The tensor names of all cores, in order."""
        return [self.core_name(k) for k in range(self.num_cores)]

    @property
    def core_shapes(self) -> list[tuple[int, ...]]:
        """Their shapes; not for dense layers."""
        return self.structure.core_shapes(self.bonds, self.low_rank)

    @property
    def inner_bonds(self) -> tuple[int, ...]:
        """Of a chain without D_0 and D_n."""
        return self.bonds[1:-1] if network_of(self.form) == "chain" else self.bonds

    def bonds_text(self, between: str = " ") -> str:
        """The inner bonds for people, as ``4 8 4``, or ``48 + r 12`` with an added part of rank 12."""
        added = f"r {self.low_rank}" if self.low_rank else ""
        return " + ".join(filter(None, [between.join(map(str, self.inner_bonds)), added]))

    def core_name(self, site: int) -> str:
        """The tensor name of core ``site`` (from 0)."""
        return f"{core_prefix(self.name)}.{site}"


def core_prefix(name: str) -> str:
    """``fc.weight`` → ``fc.cores``; any other parameter ``m.weight_ih`` → ``m.weight_ih_cores``."""
    if name == "weight" or name.endswith(".weight"):
        return name.removesuffix("weight") + "cores"
    return name + "_cores"


@dataclass(frozen=True)
class Source:
    """The checkpoint that was compressed; None: not recorded."""

    name: str | None
    nbytes: int | None  # of its weight files and, in a directory, of the other files kept
    num_parameters: int
    fingerprint: str | None  # SHA-256 over its names, dtypes and shapes


@dataclass(frozen=True)
class Manifest:
    """All that a report needs, and all that loading needs beside the tensors."""

    source: Source
    layers: tuple[LayerRecord, ...]  # every selected layer, in the source's order
    options: dict[str, Any]
    kinds_from: str  # "config.json (bert)" or "names and shapes"
    left_alone: dict[str, str] = field(default_factory=dict)  # tensors of two or more axes → reason
    vectors: int = 0  # other tensors left alone
    tied: dict[str, str] = field(default_factory=dict)
    tool: str = ""
    # The dense network: {"zoo": "resnet:depth=56"}, {"factory": "net.py:net"}, or {} where none was named.
    architecture: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)  # what ``mpoc finetune`` did; {}: nothing
    calibration: dict[str, Any] = field(default_factory=dict)  # on what the fit was made; {}: weights alone

    @property
    def is_complete(self) -> bool:
        """False where transformers saved the directory again: errors and what was selected are not known."""
        return self.source.fingerprint is not None

    @property
    def replaced(self) -> list[LayerRecord]:
        """The layers stored in a compressed form."""
        return [layer for layer in self.layers if layer.form != "dense"]

    @property
    def rho(self) -> float:
        """Eq. (9): Σ N_mpo / Σ N_ori over the replaced layers; 1 where there are none."""
        return _ratio(self.replaced)

    @property
    def rho_selected(self) -> float:
        """The same sum over all selected layers, those left dense included (of no use if not complete)."""
        return _ratio(self.layers)

    @property
    def num_parameters(self) -> int:
        """Whole model, as stored."""
        saved = sum(layer.num_original - layer.num_stored for layer in self.layers)
        return self.source.num_parameters - saved

    def to_json(self, indent: int | None = None) -> str:
        """The text that is stored."""
        value = {"format": FORMAT, **asdict(self)}
        value["layers"] = [_compact(layer) for layer in self.layers]
        for name in ("architecture", "training", "calibration"):
            if not value[name]:
                del value[name]
        return written(value, indent)


def _ratio(layers: tuple[LayerRecord, ...] | list[LayerRecord]) -> float:
    original = sum(layer.num_original for layer in layers)
    return sum(layer.num_stored for layer in layers) / original if original else 1.0


def _compact(layer: LayerRecord) -> dict[str, Any]:
    """A record without the fields that have their default value."""
    defaults = {f.name: f.default for f in fields(layer)}
    return {key: value for key, value in asdict(layer).items() if value != defaults[key]}


def record_to_json(layer: LayerRecord) -> str:
    """A record alone as text."""
    return json.dumps(_compact(layer), ensure_ascii=False)


def record_from_json(text: str) -> LayerRecord:
    """:func:`record_to_json` undone.

    Raises:
        ValueError, TypeError, LookupError: damaged.
    """
    layer = _layer(parse_strictly(text))
    record_check.check_record(layer)
    return layer


def read_manifest(path: Path) -> Manifest:
    """The manifest of a compressed file or directory, checked.

    Raises:
        MpocError: nothing there, not made by mpoc, of a later format, or damaged.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory")
    if (path / MANIFEST_FILE).is_file() and not _is_saved_again(path):
        check_inside(path, path / MANIFEST_FILE)
        return parse_manifest(read_bounded(path / MANIFEST_FILE), path)
    if (path / "config.json").is_file():
        quantization = read_json(path / "config.json").get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == "mpo":
            return _from_config(quantization, stored_tensors(path), path)
    elif path.is_file() and path.suffix == ".safetensors":
        text = read_header(path).metadata.get("mpoc")
        if text is not None:
            return parse_manifest(text, path)
    raise MpocError(f"{path}: not compressed by mpoc (no manifest)", "mpoc compress MODEL makes one that is")


def _is_saved_again(directory: Path) -> bool:
    return any(
        SAVED_AGAIN in read_header(file).metadata for file in sorted(directory.glob("*.safetensors"))[:1]
    )


def _from_config(quantization: dict[str, Any], tensors: dict[str, TensorInfo], path: Path) -> Manifest:
    """What config.json and the headers tell; names and dtypes are those that transformers saved.

    Raises:
        MpocError: another format, or damaged.
    """
    _check_format(quantization.get("format"), path)
    try:
        entries = quantization["layers"].items()
        layers = tuple(layer_of_entry(name, entry, tensors) for name, entry in entries)
        record_check.check_names(layers)
    except _DAMAGED as error:
        said = f"{path}: config.json: damaged quantization_config ({shortened(error)})"
        raise MpocError(said, MAYBE_LATER) from error
    cores = {name for layer in layers for name in layer.core_names}
    if cores - tensors.keys():
        raise MpocError(
            f"{path}: {min(cores - tensors.keys())!r} is not among the weights that config.json describes",
            "after import mpoc.hf, from_pretrained and save_pretrained put a part saved alone in order",
        )
    dense = [info for name, info in tensors.items() if name not in cores]
    matrices = [info.name for info in dense if len(info.shape) > 1]
    num_parameters = count_parameters(dense) + sum(layer.num_original for layer in layers)
    return Manifest(
        source=Source(None, None, num_parameters, None),
        layers=layers,
        options={},
        kinds_from="config.json's quantization_config",
        left_alone=dict.fromkeys(matrices, "dense, for a reason that is not recorded"),
        vectors=len(dense) - len(matrices),
    )


def layer_of_entry(name: str, entry: dict[str, Any], tensors: dict[str, TensorInfo]) -> LayerRecord:
    """A layer of ``quantization_config``, checked.

    Raises:
        TypeError, ValueError, LookupError, AttributeError: it is damaged.
    """
    first, shape = tensors.get(f"{core_prefix(name)}.0"), entry["shape"]
    dtype = first.dtype if first else entry["dtype"]
    counts = {"num_original": math.prod(shape[:6]), "num_stored": 0}
    layer = _layer({**entry, **counts, "name": name, "dtype": dtype, "stored_dtype": dtype})
    record_check.check_made(layer)
    stored = sum(map(math.prod, layer.core_shapes))
    return replace(layer, num_stored=stored, padding=layer.structure.padding)


def _check_format(found: Any, path: Path) -> None:
    if found != FORMAT:
        raise MpocError(
            f"{path}: manifest format {found}, this mpoc reads format {FORMAT}",
            "pip install --upgrade mpoc",
        )


def parse_manifest(text: str | bytes, path: Path) -> Manifest:
    """``Manifest.to_json`` undone; ``path`` is for messages.

    Raises:
        MpocError: of a later format, or with what this mpoc does not know, or damaged.
    """
    value: Any = None
    try:
        value = parse_strictly(text)
        _check_format(value.pop("format"), path)
        layers = tuple(map(_layer, value.pop("layers")))
        source = made(Source, value.pop("source"))
        manifest = made(Manifest, {**value, "source": source, "layers": layers})
        if list(manifest.architecture) not in ([], ["zoo"], ["factory"]):
            raise ValueError(f"architecture = {manifest.architecture!r}")
        record_check.check_manifest(manifest)
        return manifest
    except _DAMAGED as error:
        raise unreadable(path, value.get("tool") if isinstance(value, dict) else None, error) from error


def _layer(value: dict[str, Any]) -> LayerRecord:
    if value.get("geometry") is not None:
        value["geometry"] = record_check.parse_geometry(value["geometry"], tuple(value["shape"]))
    layer = made(LayerRecord, record_check.with_tuples(value))
    for what, found, known in (("kind", layer.kind, KINDS), ("form", layer.form, FORMS)):
        if found not in known:
            raise ValueError(f"layer {layer.name!r}: {what} {found!r} is not known")
    return layer
