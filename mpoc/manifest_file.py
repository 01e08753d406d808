"""The manifest read back from a compressed file or directory, checked.  No torch here.

A directory that transformers saved again (``save_pretrained`` after ``import mpoc.hf``) has no ``mpoc.json``.
Its config.json and the headers of its weights still tell factors and bonds, but not what was lost.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpoc import record_check
from mpoc.errors import MpocError, UsageError, shortened
from mpoc.header import TensorInfo, count_parameters, read_header
from mpoc.manifest import (
    FORMAT,
    FORMS,
    MANIFEST_FILE,
    ORDERED_FORMAT,
    LayerRecord,
    Manifest,
    Source,
    core_prefix,
)
from mpoc.strict_json import parse_strictly, read_bounded
from mpoc.structure import KINDS
from mpoc.typed import made
from mpoc.versions import unreadable
from mpoc.weight_files import check_inside, read_json, stored_tensors

_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
# In the metadata of weights that transformers saved: an ``mpoc.json`` beside them is an older one.
SAVED_AGAIN = "mpoc_saved_again"
# config.json does not tell which mpoc wrote it.
MAYBE_LATER = "pip install --upgrade mpoc, where a later one wrote it"


def record_from_json(text: str) -> LayerRecord:
    """:func:`mpoc.manifest.record_to_json` undone.

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
    check_format(quantization.get("format"), path, (FORMAT, ORDERED_FORMAT))
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
    first = tensors.get(f"{core_prefix(name)}.0")
    dtype = first.dtype if first else entry["dtype"]
    counts = {"num_original": 0, "num_stored": 0}
    layer = _layer({**entry, **counts, "name": name, "dtype": dtype, "stored_dtype": dtype})
    layer = replace(layer, num_original=math.prod(layer.shape[:6]))  # of whole numbers, once that is sure
    record_check.check_made(layer)
    stored = sum(map(math.prod, layer.core_shapes))
    return replace(layer, num_stored=stored, padding=layer.structure.padding)


def check_format(found: Any, path: Path, known: tuple[int, ...]) -> None:
    """Whether a manifest, or a ``quantization_config``, has a format that is read here.

    Raises:
        MpocError: it has another.
    """
    if found not in known:
        formats = " or ".join(map(str, known))
        raise MpocError(
            f"{path}: manifest format {found}, this mpoc reads format {formats}", "pip install --upgrade mpoc"
        )


def parse_manifest(text: str | bytes, path: Path) -> Manifest:
    """``Manifest.to_json`` undone; ``path`` is for messages.

    Raises:
        MpocError: of a later format, or with what this mpoc does not know, or damaged.
    """
    value: Any = None
    try:
        value = parse_strictly(text)
        check_format(value.pop("format"), path, (FORMAT,))
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
