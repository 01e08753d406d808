"""Read the manifest of a compressed file or directory, and check it.  No torch here.

Types and bounds follow from the annotations (io/validation); here the fields are compared with each other:
shapes with counts, factors with bonds and geometry.  A directory that transformers saved again
(``save_pretrained`` after ``import mpoc.hf``) has no ``mpoc.json``; its config.json and the headers of its
weights still tell factors and bonds, but not errors and what was selected.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError, UsageError, shortened
from mpoc.io.manifest import (
    CONFIG_FORMAT,
    DENSE,
    MANIFEST_FILE,
    MOST_POINTS,
    ORDERED_FORMAT,
    READABLE_FORMATS,
    STORED_FORMAT,
    LayerRecord,
    Manifest,
    Source,
    Spectrum,
    compact,
    core_prefix,
    form_names,
)
from mpoc.io.safetensors_header import TensorInfo, count_parameters, read_header
from mpoc.io.training_history import check_calibration, check_history
from mpoc.io.validation import build_dataclass, parse_strictly, read_bounded
from mpoc.io.weight_files import check_inside, read_json, stored_tensors
from mpoc.quantize.storage import Grid
from mpoc.runtime.packages import unreadable
from mpoc.tensor_networks.factors import MOST_ORDERED
from mpoc.tensor_networks.forms import FORMS
from mpoc.tensor_networks.geometry import Geometry
from mpoc.tensor_networks.structure import KINDS, MOST_SITES, Structure, low_rank_factors

_AXES = {"linear": (2,), "embedding": (2,), "experts": (3,), "convmap": (3, 4, 5)}
_AXES |= {f"conv{axes}d": (axes + 2,) for axes in (1, 2, 3)}
_MOST_AXES = 6
_LONGEST_LIST = 1000
_DTYPES = ("float64", "float32", "bfloat16", "float16")

CONFIG_FORMATS = (CONFIG_FORMAT, ORDERED_FORMAT, STORED_FORMAT)
_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
# In the metadata of weights that transformers saved: an ``mpoc.json`` beside them is an older one.
SAVED_AGAIN = "mpoc_saved_again"
# config.json does not tell which mpoc wrote it.
MAYBE_LATER = "pip install --upgrade mpoc, where a later one wrote it"


def check_manifest(manifest: Manifest) -> None:
    """Compare the parts of a manifest, and the fields of each layer, with each other.

    Raises:
        TypeError, ValueError: they contradict each other, or themselves.
    """
    for layer in manifest.layers:
        check_record(layer)
    check_names(manifest.layers)
    knots = manifest.tied.keys() & {*manifest.tied.values(), *(layer.name for layer in manifest.layers)}
    if knots:
        raise ValueError(f"{min(knots)!r} is tied to another tensor, and one itself")
    source, selected = manifest.source, sum(layer.num_original for layer in manifest.layers)
    if source.num_parameters < selected:
        raise ValueError(f"{source}, {selected} parameters in layers")
    check_history(manifest.training)
    check_calibration(manifest.calibration)


def check_names(layers: Sequence[LayerRecord]) -> None:
    """Check that no two layers share a name, or the names of their cores.

    Raises:
        ValueError: two share one.
    """
    cores = Counter(layer.core_name(0) for layer in layers)
    if len(cores) < len(layers):
        raise ValueError(f"{cores.most_common(1)[0][0]!r} belongs to two layers")


def check_record(layer: LayerRecord) -> None:
    """Compare a record's fields, of a known kind and form, with each other.

    Raises:
        ValueError: they contradict each other.
    """
    check_made(layer)
    _check_storage(layer)
    stored, padding = layer.num_original, (0, 0)
    if layer.form != DENSE:
        stored, padding = sum(map(math.prod, layer.core_shapes)), layer.structure.padding
    if (layer.num_stored, layer.padding) != (stored, padding):
        raise ValueError(f"layer {layer.name!r}: {layer.num_stored} stored, padded by {layer.padding}")


def check_made(layer: LayerRecord) -> None:
    """Check a record like :func:`check_record`, except the fields that follow from others.

    Raises:
        ValueError: the fields contradict each other.
    """
    _check_sizes(layer)
    if layer.dtype not in _DTYPES or layer.stored_dtype not in _DTYPES:
        raise ValueError(f"layer {layer.name!r}: dtypes {layer.dtype!r} and {layer.stored_dtype!r}")
    if layer.same_size is not None and "this" not in layer.same_size:
        raise ValueError(f"layer {layer.name!r}: same_size = {layer.same_size!r}")
    is_sum = layer.form != DENSE and bool(FORMS[layer.form].parts)
    if is_sum != (layer.low_rank != 0):
        raise ValueError(f"layer {layer.name!r}: form {layer.form!r}, low_rank = {layer.low_rank}")
    if layer.form != DENSE:
        _check_factors(layer)


def _check_storage(layer: LayerRecord) -> None:
    """Check that each stored tensor can be stored as the record says, in so many bytes.

    Raises:
        ValueError: it cannot.
    """
    try:
        parts = layer.coded_parts
        fixed = [part.storage.stored_bytes(*part.sides) for part in parts if isinstance(part.storage, Grid)]
    except UsageError as error:
        raise ValueError(f"layer {layer.name!r}: {error}") from error
    known = sum(fixed) == layer.nbytes if len(fixed) == len(parts) else sum(fixed) < (layer.nbytes or 0)
    if (parts and not known) or (not parts and layer.nbytes is not None):
        raise ValueError(f"layer {layer.name!r}: {layer.nbytes} bytes of storage {layer.storage}")


def _check_sizes(layer: LayerRecord) -> None:
    """Check the lengths and numbers of all lists, by which later checks take time.

    Raises:
        ValueError: a list is too long, or of numbers below 1; or shape, kind and count do not agree.
    """
    lists = [value for key, value in vars(layer).items() if isinstance(value, tuple) and key != "order"]
    numbers = (*layer.shape, *layer.output_factors, *layer.input_factors, *layer.bonds)
    if max(map(len, lists)) > MOST_SITES + 2 or min(numbers, default=0) < 1:
        raise ValueError(f"layer {layer.name!r}: lists too long, or of numbers below 1")
    if len(layer.shape) not in _AXES[layer.kind] or math.prod(layer.shape) != layer.num_original:
        raise ValueError(f"layer {layer.name!r}: shape {layer.shape}, {layer.num_original} parameters")


def _check_factors(layer: LayerRecord) -> None:
    """Check that factors and bonds form a tensor network, and that it makes the weight.

    Raises:
        ValueError: they do not.
    """
    structure = layer.structure
    _check_spectra(layer)
    joined = are_joined(structure, layer.bonds)
    if layer.geometry is None:
        whole = structure.lead * structure.outputs * structure.inputs == layer.num_original
    else:
        whole = structure.num_original == layer.num_original
    whole = whole and (layer.kind == "convmap") == (layer.geometry is not None)
    if structure.one_matrix:
        factors = structure.output_factors, structure.input_factors
        whole = whole and factors == low_rank_factors((structure.outputs, structure.inputs))
    front = structure.site_sizes[0] if joined and structure.lead_sites else 1
    if not (joined and whole and front == structure.lead and _modest(structure)):
        raise ValueError(f"layer {layer.name!r}: its factors and bonds do not make its weight")
    check_low_rank(structure, layer.low_rank)
    check_order(structure)


def check_order(structure: Structure) -> None:
    """Check that a weight of ``structure`` can have its order of inputs.

    Raises:
        ValueError: it is no permutation of them, or not of a linear map that is one network of sites.
    """
    one_network = structure.kind == "linear" and not structure.one_matrix and not structure.parts
    if structure.permutation is not None and not one_network:
        raise ValueError(
            f"an order of the inputs of a weight of kind {structure.kind}, form {structure.form}"
        )


def are_joined(structure: Structure, bonds: tuple[int, ...]) -> bool:
    """Whether outputs, inputs and bonds are of one number of sites, in a form that the kind can have."""
    sites = len(structure.output_factors)
    if sites != len(structure.input_factors) or sites < 1:
        return False
    if structure.geometry is not None and not structure.info.takes_whole_maps:
        return False
    return structure.topology.fits(bonds, sites)


def _check_spectra(layer: LayerRecord) -> None:
    """Check that each inner bond has one spectrum, or none.

    Raises:
        ValueError: there are more or fewer, or one that cannot be.
    """
    if len(layer.spectra_of_weight) not in (0, len(layer.inner_bonds)):
        raise ValueError(f"layer {layer.name!r}: {len(layer.spectra_of_weight)} spectra of its weight")
    for spectrum in layer.spectra_of_weight:
        if spectrum is not None:
            check_spectrum(spectrum, math.prod(layer.structure.site_sizes))


def check_spectrum(spectrum: Spectrum, longest: int) -> None:
    """Check that these can be points of a bond's spectrum of at most ``longest`` values.

    Raises:
        ValueError: they cannot be.
    """
    indices, values = [index for index, _ in spectrum], [value for _, value in spectrum]
    rising = all(before < after for before, after in itertools.pairwise(indices))
    falling = all(before >= after for before, after in itertools.pairwise(values))
    within = 0 < len(spectrum) <= MOST_POINTS and indices[0] == 1 and indices[-1] <= longest
    if not (within and rising and falling and values[0] <= 1.0 and values[-1] >= 0.0):
        raise ValueError(f"a spectrum of {len(spectrum)} points, from {spectrum[:1]} to {spectrum[-1:]}")


def check_low_rank(structure: Structure, low_rank: int) -> None:
    """Whether a part of rank ``low_rank`` can be added to an MPO of ``structure``; 0: none is.

    Raises:
        ValueError: it is negative or above a side of the weight's matrix, or the weight is a whole map.
    """
    if low_rank and not 0 < low_rank <= min(structure.as_low_rank().site_sizes):
        raise ValueError(f"a part of rank {low_rank} added to a weight of shape {structure.shape}")


def _modest(structure: Structure) -> bool:
    """No more padding than factors are ever chosen with: a small file must not ask for a huge matrix."""
    sides = zip(structure.padding, (structure.outputs, structure.inputs), strict=True)
    return all(0 <= padding <= 0.1 * side for padding, side in sides)


def parse_geometry(value: dict[str, Any], shape: tuple[int, ...]) -> Geometry:
    """The geometry of a kernel of ``shape`` from JSON, checked.

    Raises:
        TypeError, ValueError: it is damaged.
    """
    geometry = build_dataclass(Geometry, with_tuples(value))
    geometry.check(shape)
    return geometry


def with_tuples(value: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as tuples, nested ones too.

    Raises:
        ValueError: a list is longer than any that mpoc writes.
    """
    for key, item in value.items():
        if isinstance(item, list) and len(item) > (MOST_ORDERED if key == "order" else _LONGEST_LIST):
            raise ValueError(f"{key}: a list of {len(item)}")
    return {key: _as_tuple(item) for key, item in value.items()}


def _as_tuple(item: Any) -> Any:
    return tuple(map(_as_tuple, item)) if isinstance(item, list) else item


def record_to_json(layer: LayerRecord) -> str:
    """A single record as JSON text."""
    return json.dumps(compact(layer), ensure_ascii=False)


def record_from_json(text: str) -> LayerRecord:
    """:func:`record_to_json` undone.

    Raises:
        ValueError, TypeError, LookupError: damaged.
    """
    layer = _layer(parse_strictly(text))
    check_record(layer)
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
    """The manifest that config.json and the headers tell, with the names and dtypes that transformers saved.

    Raises:
        MpocError: another format, or damaged.
    """
    check_format(quantization.get("format"), path, CONFIG_FORMATS)
    try:
        entries = quantization["layers"].items()
        layers = tuple(layer_of_entry(name, entry, tensors) for name, entry in entries)
        check_names(layers)
    except _DAMAGED as error:
        message = f"{path}: config.json: damaged quantization_config ({shortened(error)})"
        raise MpocError(message, MAYBE_LATER) from error
    cores = {name for layer in layers for name in layer.file_names}
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
        left_alone=dict.fromkeys(matrices, "dense, reason not recorded"),
        vectors=len(dense) - len(matrices),
    )


def layer_of_entry(name: str, entry: dict[str, Any], tensors: dict[str, TensorInfo]) -> LayerRecord:
    """A layer of ``quantization_config``, checked.

    Raises:
        TypeError, ValueError, LookupError, AttributeError: it is damaged.
    """
    first = tensors.get(f"{core_prefix(name)}.0")
    dtype = first.dtype if first else entry["dtype"]
    layer = _layer({**entry, "name": name, "dtype": dtype, "stored_dtype": dtype})
    check_made(layer)
    layer = replace(layer, nbytes=_stored_bytes(layer, tensors))
    _check_storage(layer)
    if layer.form == DENSE:
        return layer
    stored = sum(map(math.prod, layer.core_shapes))
    return replace(layer, num_stored=stored, padding=layer.structure.padding)


def _stored_bytes(layer: LayerRecord, tensors: dict[str, TensorInfo]) -> int | None:
    """Bytes of a layer's codes in the file, or without ``tensors`` at least; None: it has no codes."""
    try:
        infos = [info for part in layer.coded_parts for info in part.file_infos(1)]
    except UsageError as error:
        raise ValueError(f"layer {layer.name!r}: {error}") from error
    return sum(tensors.get(info.name, info).nbytes for info in infos) if layer.storage else None


def check_format(format: Any, path: Path, known: tuple[int, ...]) -> None:
    """Check that a manifest, or a ``quantization_config``, has a format that this mpoc reads.

    Raises:
        MpocError: it has another.
    """
    if format not in known:
        formats = " or ".join(map(str, known))
        raise MpocError(
            f"{path}: manifest format {format}, this mpoc reads format {formats}",
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
        check_format(value.pop("format"), path, READABLE_FORMATS)
        common = value.pop("common", {})
        layers = tuple(_layer({**common, **layer}) for layer in value.pop("layers"))
        source = build_dataclass(Source, value.pop("source"))
        manifest = build_dataclass(Manifest, {**value, "source": source, "layers": layers})
        check_manifest(manifest)
        return manifest
    except _DAMAGED as error:
        raise unreadable(path, value.get("tool") if isinstance(value, dict) else None, error) from error


def _layer(value: dict[str, Any]) -> LayerRecord:
    if value.get("geometry") is not None:
        value["geometry"] = parse_geometry(value["geometry"], tuple(value["shape"]))
    for what, known in (("kind", KINDS), ("form", form_names())):
        if what in value and value[what] not in known:
            raise ValueError(f"layer {value.get('name')!r}: {what} {value[what]!r} is not known")
    counted = "num_original" in value or "num_stored" in value
    counts = {} if counted else {"num_original": 1, "num_stored": 1}  # until the shape is known to be one
    layer = build_dataclass(LayerRecord, with_tuples(value | counts))
    count = math.prod(layer.shape[:_MOST_AXES])
    return layer if counted else replace(layer, num_original=count, num_stored=count)
