"""The manifest: what a compressed file says of itself, as plain data.  No torch here.

In a single file it is one JSON text under the key ``mpoc`` of the safetensors header's metadata; in a
directory it is ``mpoc.json``.  It holds no times and no dates, so that the same input gives the same bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mpoc.errors import MpocError, UsageError
from mpoc.geometry import Geometry
from mpoc.header import ITEMSIZE, read_header
from mpoc.structure import KINDS, Structure

FORMAT = 1
MANIFEST_FILE = "mpoc.json"


@dataclass(frozen=True)
class LayerRecord:
    """One selected layer: what it was and what is stored."""

    name: str  # of the weight in the source, e.g. "layer1.0.conv1.weight"
    kind: str
    shape: tuple[int, ...]  # of the weight in the source
    dtype: str  # of the weight in the source
    form: str  # "mpo" or "dense"
    num_original: int  # N_ori
    num_stored: int  # N_mpo, or N_ori where dense
    stored_dtype: str
    reason: str = ""  # why dense
    transposed: bool = False
    output_factors: tuple[int, ...] = ()
    input_factors: tuple[int, ...] = ()
    bonds: tuple[int, ...] = ()
    padding: tuple[int, int] = (0, 0)
    relative_error: float | None = None  # None in a plan, and for a dense layer
    entropies: tuple[float, ...] = ()  # of the stored weight
    entropies_of_weight: tuple[float | None, ...] = ()  # of the source's, where computed exactly
    geometry: Geometry | None = None  # of a whole map (kind "convmap")

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
        return Structure(
            self.kind, self.shape, self.transposed, self.output_factors, self.input_factors, self.geometry
        )

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
    """The checkpoint that was compressed."""

    name: str
    nbytes: int  # of its weight files and, in a directory, of the other files kept
    num_parameters: int
    fingerprint: str  # SHA-256 over its names, dtypes and shapes


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
        """The same sum over all selected layers, those left dense included."""
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
        for name in ("architecture", "training"):
            if not value[name]:
                del value[name]
        separators = (",", ":") if indent is None else None
        return json.dumps(value, indent=indent, separators=separators, ensure_ascii=False)


def _ratio(layers: tuple[LayerRecord, ...] | list[LayerRecord]) -> float:
    original = sum(layer.num_original for layer in layers)
    return sum(layer.num_stored for layer in layers) / original if original else 1.0


def _compact(layer: LayerRecord) -> dict[str, Any]:
    """A record without the fields that have their default value."""
    defaults = {f.name: f.default for f in fields(layer)}
    return {key: value for key, value in asdict(layer).items() if value != defaults[key]}


def read_manifest(path: Path) -> Manifest:
    """The manifest of a compressed file or directory, checked.

    Raises:
        MpocError: nothing there, not made by mpoc, of a later format, or damaged.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory")
    text: str | bytes | None
    if path.is_dir():
        file = path / MANIFEST_FILE
        text = file.read_bytes() if file.is_file() else None
    elif path.suffix == ".safetensors":
        text = read_header(path).metadata.get("mpoc")
    else:
        text = None
    if text is None:
        raise MpocError(
            f"{path}: not compressed by mpoc (no manifest)", "mpoc compress MODEL makes one that is"
        )
    return parse_manifest(text, path)


def parse_manifest(text: str | bytes, path: Path) -> Manifest:
    """``Manifest.to_json`` undone; ``path`` is for messages."""
    try:
        value = json.loads(text)
        found = value.pop("format")
        if found != FORMAT:
            raise MpocError(
                f"{path}: manifest format {found}, this mpoc reads format {FORMAT}",
                "pip install --upgrade mpoc",
            )
        layers = tuple(_layer(layer) for layer in value.pop("layers"))
        source = Source(**value.pop("source"))
        manifest: Manifest = _typed(Manifest(source=_typed(source), layers=layers, **value))
        if list(manifest.architecture) not in ([], ["zoo"], ["factory"]):
            raise ValueError(f"architecture = {manifest.architecture!r}")
        return manifest
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise MpocError(f"{path}: damaged manifest ({error!r})") from error


def _layer(value: dict[str, Any]) -> LayerRecord:
    if value.get("geometry") is not None:
        value["geometry"] = parse_geometry(value["geometry"], tuple(value["shape"]))
    layer = _typed(LayerRecord(**_with_tuples(value)))
    if layer.kind not in KINDS or layer.form not in ("mpo", "dense"):
        raise ValueError(f"layer {layer.name!r}: kind {layer.kind!r}, form {layer.form!r}")
    if math.prod(layer.shape) != layer.num_original or min(layer.shape, default=0) < 1:
        raise ValueError(f"layer {layer.name!r}: shape {layer.shape}, {layer.num_original} parameters")
    if layer.dtype not in ITEMSIZE or layer.stored_dtype not in ITEMSIZE:
        raise ValueError(f"layer {layer.name!r}: dtypes {layer.dtype!r} and {layer.stored_dtype!r}")
    if layer.form != "dense":
        _check_factors(layer)
    return layer


def _modest(structure: Structure) -> bool:
    """No more padding than factors are ever chosen with: a small file must not ask for a huge matrix."""
    sides = zip(structure.padding, (structure.outputs, structure.inputs), strict=True)
    return all(0 <= padding <= 0.1 * side for padding, side in sides)


def parse_geometry(value: dict[str, Any], shape: tuple[int, ...]) -> Geometry:
    """The geometry of a kernel of ``shape`` from JSON, checked.

    Raises:
        TypeError, ValueError: it is damaged.
    """
    geometry: Geometry = _typed(Geometry(**_with_tuples(value)))
    geometry.check(shape)
    return geometry


def _with_tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}


def _check_factors(layer: LayerRecord) -> None:
    """Factors and bonds must make a chain, and the chain a matrix no smaller than the weight's.

    Raises:
        ValueError: they do not.
    """
    structure = layer.structure
    chain = len(layer.output_factors) == len(layer.input_factors) == len(layer.bonds) - 1 > 0
    if layer.geometry is None:
        whole = structure.lead * structure.outputs * structure.inputs == layer.num_original
    else:
        whole = structure.num_original == layer.num_original
    whole = whole and (layer.kind == "convmap") == (layer.geometry is not None)
    front = structure.site_sizes[0] if chain and structure.lead_sites else 1
    if not (chain and whole and front == structure.lead and _modest(structure)):
        raise ValueError(f"layer {layer.name!r}: its factors and bonds do not make its weight")


def _typed(record: Any) -> Any:
    """``record``, whose fields hold what their annotations say.

    Raises:
        TypeError: one does not.
    """
    for name, expected in _hints(record.__class__).items():
        if not _is_a(getattr(record, name), expected):
            raise TypeError(f"{name} = {getattr(record, name)!r}")
    return record


@cache
def _hints(record: Any) -> dict[str, Any]:
    return get_type_hints(record)


def _is_a(value: Any, expected: Any) -> bool:
    """``isinstance`` for the annotations used here: plain classes, unions, tuples and dictionaries."""
    kind, inner = get_origin(expected), get_args(expected)
    if kind is tuple:
        each = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_is_a, value, each))
    if kind is dict:
        return isinstance(value, dict) and all(_is_a(item, inner[1]) for item in value.values())
    if inner:
        return any(_is_a(value, one) for one in inner)
    if expected in (int, float):
        return isinstance(value, int | expected) and not isinstance(value, bool)
    return expected is Any or isinstance(value, expected)
