"""Write a Hugging Face directory around its tensors: other files, config.json, the index, the model card.

``config.json`` gains ``quantization_config``, from which a loader builds the layers, and a guard: a loader
that does not know mpoc looks for the weights under a file name that says what to import, and stops instead of
continuing with random weights.  ``mpoc expand`` removes both.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError, shortened
from mpoc.io.manifest import FORMAT, MANIFEST_FILE, ORDERED_FORMAT, Manifest
from mpoc.io.manifest_reader import MAYBE_LATER, layer_of_entry
from mpoc.io.safetensors_header import TensorInfo, encode_header, storage_order
from mpoc.io.safetensors_writer import Shard, write_safetensors
from mpoc.io.weight_files import check_inside, read_json
from mpoc.tensor_networks.structure import Structure

GUARD_KEY = "transformers_weights"
GUARD = "import-mpoc.hf-before-loading.safetensors"
_INDEX = "model.safetensors.index.json"
_CARD = "README.md"
_CARD_BEGIN, _CARD_END = "<!-- mpoc: begin -->", "<!-- mpoc: end -->"
# The same weights in other formats; they would belie the compressed ones beside them.
_OTHER_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".onnx", ".gguf")
_OTHER_RUNTIMES = (".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf", ".tflite", ".mlmodel")
_KEEP = ("training_args.bin",)
# Folders that hold the whole model again: other runtimes, and a trainer's checkpoints (checkpoint-500).
_COPY_FOLDERS = ("onnx", "openvino")
_SKIP_FOLDERS = (".git", ".cache", "__pycache__")


def other_files(source: Path, weight_files: list[Path]) -> list[Path]:
    """The relative paths of all files of the directory except its weights, in any format.

    Weights of further modules in folders of their own (a pooling or dense head) are kept.

    Raises:
        MpocError: one is a link to a file outside the directory, which must not be copied unseen.
    """
    weights = {Path(os.path.realpath(file)) for file in weight_files}
    others: list[Path] = []
    for folder, folders, files in os.walk(source, followlinks=False):
        folders[:] = sorted(name for name in folders if not _is_skipped(name))
        for name in sorted(files):
            file = Path(folder) / name
            top = Path(folder) == source
            copies = _OTHER_FORMATS if top else _OTHER_RUNTIMES
            dropped = file.suffix in copies and name not in _KEEP
            index = top and name.endswith((".safetensors.index.json", ".bin.index.json"))
            if not (dropped or index or Path(os.path.realpath(file)) in weights):
                check_inside(source, file)
                others.append(file.relative_to(source))
    return others


def _is_skipped(folder: str) -> bool:
    return folder in (*_SKIP_FOLDERS, *_COPY_FOLDERS) or re.fullmatch(r"checkpoint-\d+", folder) is not None


def left_behind(source: Path, weight_files: list[Path]) -> list[str]:
    """A note that names the files of the directory that are not copied; none if there are none."""
    weights = {file.resolve() for file in weight_files}
    kept = set(other_files(source, weight_files))
    every = (file.relative_to(source) for file in sorted(source.rglob("*")) if file.resolve() not in weights)
    dropped = [str(name) for name in every if (source / name).is_file() and name not in kept]
    dropped = [
        name for name in dropped if not name.startswith(_SKIP_FOLDERS) and not name.endswith(".index.json")
    ]
    if not dropped:
        return []
    more = f" and {len(dropped) - 4} more" if len(dropped) > 4 else ""
    return [f"not copied, other copies of weights: {', '.join(dropped[:4])}{more}"]


def size_of_other_files(source: Path, weight_files: list[Path]) -> int:
    """Bytes of these files."""
    return sum((source / name).stat().st_size for name in other_files(source, weight_files))


def copy_other_files(source: Path, target: Path, weight_files: list[Path]) -> None:
    """Copy these files, links as the files that they point to."""
    for name in other_files(source, weight_files):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def write_shards(target: Path, shards: list[Shard]) -> None:
    """Write all weight files, and the index if there are several."""
    for shard in shards:
        write_shard(target, shard)
    write_index(target, shards)


def write_shard(target: Path, shard: Shard) -> None:
    """Write one weight file."""
    write_safetensors(target / shard.name, shard.entries, {"format": "pt"})


def write_index(target: Path, shards: list[Shard]) -> None:
    """Write the index of several weight files: tensor → file."""
    if len(shards) > 1:
        (target / _INDEX).write_text(_index_text(shards), "utf-8")


def _index_text(shards: list[Shard]) -> str:
    entries = [(entry.info, shard.name) for shard in shards for entry in shard.entries]
    index = {
        "metadata": {"total_size": sum(info.nbytes for info, _ in entries)},
        "weight_map": {info.name: name for info, name in sorted(entries, key=_by_name)},
    }
    return json.dumps(index, indent=2) + "\n"


def _by_name(entry: tuple[TensorInfo, str]) -> str:
    return entry[0].name


def mark_compressed(target: Path, manifest: Manifest) -> None:
    """Write manifest, config.json and model card into ``target``, where the originals were copied."""
    for name, text in _marked(target, manifest).items():
        (target / name).write_bytes(_encode(text))


def unmark(target: Path) -> None:
    """Undo :func:`mark_compressed`: a plain directory again."""
    (target / MANIFEST_FILE).unlink(missing_ok=True)
    config_file, card_file = target / "config.json", target / _CARD
    if config_file.is_file():
        config = read_json(config_file)
        config.pop("quantization_config", None)
        config.pop(GUARD_KEY, None)
        if config:
            config_file.write_text(_config_text(config), "utf-8")
        else:
            config_file.unlink()  # there was none
    if card_file.is_file():
        before, marker, after = _read(card_file).partition(_CARD_BEGIN)
        rest = before.removesuffix("\n\n") + after.partition(_CARD_END)[2].removeprefix("\n")
        if marker and rest.strip():
            card_file.write_bytes(_encode(rest))
        elif marker:
            card_file.unlink()


def overhead(source: Path, weight_files: list[Path], shards: list[Shard], manifest: Manifest) -> int:
    """Bytes of a compressed directory besides tensor data."""
    marked = _marked(source, manifest)
    kept = other_files(source, weight_files)
    total = sum((source / name).stat().st_size for name in kept if str(name) not in marked)
    total += sum(len(_encode(text)) for text in marked.values())
    for shard in shards:
        infos = storage_order([entry.info for entry in shard.entries])
        total += len(encode_header(infos, {"format": "pt"}))
    return total + (len(_index_text(shards).encode()) if len(shards) > 1 else 0)


def _marked(directory: Path, manifest: Manifest) -> dict[str, str]:
    """The files that say "compressed by mpoc", by name, made from those in ``directory``."""
    texts = {MANIFEST_FILE: manifest.to_json(indent=1) + "\n"}
    config_file, card_file = directory / "config.json", directory / _CARD
    config = read_json(config_file) if config_file.is_file() else {}
    config["quantization_config"] = quantization_config(manifest)
    config[GUARD_KEY] = GUARD
    texts["config.json"] = _config_text(config)
    card = _read(card_file) if card_file.is_file() else ""
    texts[_CARD] = _card_with_section(card, manifest)
    return texts


def _read(file: Path) -> str:
    """Text with every newline and byte preserved."""
    return file.read_bytes().decode("utf-8", errors="surrogateescape")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


def _config_text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def quantization_config(manifest: Manifest) -> dict[str, Any]:
    """The part of config.json from which a loader builds the layers before it reads a tensor."""
    layers = {
        layer.name: {
            "form": layer.form,
            "kind": layer.kind,
            "shape": layer.shape,
            "transposed": layer.transposed,
            "output_factors": layer.output_factors,
            "input_factors": layer.input_factors,
            "bonds": layer.bonds,
            "dtype": layer.stored_dtype,
        }
        | ({"low_rank": layer.low_rank} if layer.low_rank else {})
        | ({"order": layer.order} if layer.order else {})
        | ({"geometry": asdict(layer.geometry)} if layer.geometry else {})
        for layer in manifest.replaced
    }
    return {"quant_method": "mpo", "format": config_format(layers), "layers": layers}


def config_format(layers: Mapping[str, Mapping[str, Any]]) -> int:
    """The earliest format that expresses all these entries of a :func:`quantization_config`."""
    return ORDERED_FORMAT if any("order" in entry for entry in layers.values()) else FORMAT


def cores_of(name: str, entry: Any) -> tuple[Structure, list[tuple[int, ...]]]:
    """One layer of :func:`quantization_config`, read back: its structure and the shapes of its cores.

    Raises:
        MpocError: the entry is damaged.
    """
    try:
        layer = layer_of_entry(name, entry, {})
        if layer.form == "dense":
            raise ValueError(layer.form)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        message = f"config.json: damaged quantization_config of {name!r} ({shortened(error)})"
        raise MpocError(message, MAYBE_LATER) from error
    return layer.structure, layer.core_shapes


def _card_with_section(card: str, manifest: Manifest) -> str:
    """The model card with a section on the compression at its end."""
    rows = [
        f"| {layer.layer.replace('|', '¦')} | {'×'.join(map(str, layer.shape))} | "
        f"{layer.bonds_text(', ')} | "
        f"{layer.num_original:,} → {layer.num_stored:,} | {layer.rho:.4f} | "
        f"{'' if layer.relative_error is None else f'{layer.relative_error:.4f}'} |"
        for layer in manifest.replaced
    ]
    section = [
        _CARD_BEGIN,
        "## Compressed with mpoc",
        "",
        f"{len(manifest.replaced)} layers are tensor networks; ρ = {manifest.rho:.4f} over "
        f"them, {manifest.source.num_parameters:,} → {manifest.num_parameters:,} parameters in all. "
        "Dense weights: `mpoc expand`.",
        "",
        "| layer | shape | bonds | parameters | ρ | relative error |",
        "|---|---|---|---|---|---|",
        *rows,
        _CARD_END,
    ]
    return (card + "\n\n" if card else "") + "\n".join(section) + "\n"
