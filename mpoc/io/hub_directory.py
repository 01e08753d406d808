"""Write a Hugging Face directory around its tensors: other files, config.json, the index, the model card.

``config.json`` gains ``quantization_config``, from which a loader builds the layers, and a guard: a loader
that does not know mpoc looks for the weights under a file name that says what to import, and stops instead of
continuing with random weights.  ``mpoc expand`` removes both.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpoc.errors import MpocError, shortened
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import (
    CONFIG_FORMAT,
    MANIFEST_FILE,
    ORDERED_FORMAT,
    STORED_FORMAT,
    LayerRecord,
    Manifest,
)
from mpoc.io.manifest_reader import MAYBE_LATER, layer_of_entry
from mpoc.io.safetensors_header import TensorInfo, encode_header, storage_order
from mpoc.io.safetensors_writer import Shard, write_safetensors
from mpoc.io.validation import parse_strictly, read_bounded
from mpoc.io.weight_files import check_inside, index_metadata, index_name, read_json, shortlist

GUARD_KEY = "transformers_weights"
GUARD = "import-mpoc.hf-before-loading.safetensors"
_CARD = "README.md"
_CARD_BEGIN, _CARD_END = "<!-- mpoc: begin -->", "<!-- mpoc: end -->"
# Files of weights, and those of them that only other runtimes read.
_OTHER_RUNTIMES = (".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf", ".tflite", ".mlmodel")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt", *_OTHER_RUNTIMES)
# What libraries call a whole model, and what a trainer keeps beside it.
_WHOLE_MODEL = re.compile(
    r"(pytorch_|tf_|flax_|rust_|open_clip_(pytorch_)?|diffusion_(pytorch_|flax_)?)?model\b|consolidated\b"
)
_TRAINER = re.compile(r"(optimizer|scheduler|scaler|rng_state|random_states)[\w.-]*$")
# Folders that hold the whole model again: for other runtimes, as first published, of a trainer.
_COPY_FOLDERS = ("onnx", "openvino", "original", "metal", "coreml", "tflite", "gguf")
_TRAINER_FOLDERS = re.compile(r"checkpoint-\d+|global_step\d+|pytorch_model_fsdp_\d+|optimizer_\d+")
_NO_WEIGHTS = ("training_args.bin",)
_SKIP_FOLDERS = (".git", ".cache", "__pycache__")


def other_files(source: Path, weight_files: list[Path]) -> list[Path]:
    """The relative paths of all files of the directory except its weights and second copies of them.

    Weights of further modules (a pooling or dense head, a projector) are kept.

    Raises:
        MpocError: one is a link out of the directory, which must not be copied unseen.
    """
    return _divide(source, weight_files)[0]


def notes_on_files(source: Path, weight_files: list[Path]) -> list[str]:
    """Notes that name further weights of the directory: those that are not copied, and those that are."""
    kept, copies, links = _divide(source, weight_files)
    dropped = [str(name) for name in copies if not _is_index(name)]
    further = [str(name) for name in kept if name.suffix in _WEIGHTS and name.name not in _NO_WEIGHTS]
    said = {
        "not copied, other copies of weights": dropped,
        "not copied, links to folders": [str(name) for name in links],
        "copied as they are": further,
    }
    return [f"{what}: {shortlist(names)}" for what, names in said.items() if names]


def _divide(source: Path, weight_files: list[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """The relative paths of files to be copied, of second copies of the weights, and of links to folders."""
    weights = {Path(os.path.realpath(file)) for file in weight_files}
    # In mpoc's own directories the weights are small, and second copies were left behind.
    is_compressed = (source / MANIFEST_FILE).is_file()
    half = math.inf if is_compressed else sum(file.stat().st_size for file in weight_files) / 2
    modules = _modules(source)
    kept: list[Path] = []
    copies: list[Path] = []
    links: list[Path] = []
    for folder, folders, names in os.walk(source, followlinks=False):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if name not in _SKIP_FOLDERS)
        links += [(here / name).relative_to(source) for name in folders if (here / name).is_symlink()]
        files = [here / name for name in sorted(names) if Path(os.path.realpath(here / name)) not in weights]
        within = here.relative_to(source)
        is_copy = _is_copy_folder(within) or (
            within not in modules and _holds_model_again(source, here, files, half)
        )
        for file in files:
            dropped = _is_copy(file, within, is_copy, half)
            (copies if dropped else kept).append(file.relative_to(source))
    for name in (*kept, *links):
        check_inside(source, source / name)
    return kept, copies, links


def _is_copy(file: Path, within: Path, folder_is_copy: bool, half: float) -> bool:
    if _is_copy_folder(within) or file.suffix in _OTHER_RUNTIMES:
        return True
    if within != Path():
        return folder_is_copy and (file.suffix in _WEIGHTS or _is_index(file))
    if _is_index(file):
        return True
    if file.suffix not in _WEIGHTS or file.name in _NO_WEIGHTS:
        return False
    whole = _WHOLE_MODEL.match(file.name) or _TRAINER.match(file.stem)
    return whole is not None or file.stat().st_size >= half


def _is_index(file: Path) -> bool:
    return re.search(r"\.(safetensors|bin)\.index(\.\w+)?\.json$", file.name) is not None


def _is_copy_folder(within: Path) -> bool:
    return any(part in _COPY_FOLDERS or _TRAINER_FOLDERS.fullmatch(part) for part in within.parts)


def _modules(source: Path) -> set[Path]:
    """The folders of the modules of a sentence-transformers directory."""
    file = source / "modules.json"
    try:
        listed = parse_strictly(read_bounded(file)) if file.is_file() else []
        return {Path(module["path"]) for module in listed if module.get("path")}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MpocError):
        return set()


def _holds_model_again(source: Path, folder: Path, files: list[Path], half: float) -> bool:
    """Whether a subfolder holds the directory's network once more, by its config.json or its size."""
    if folder == source:
        return False
    own, root = _class_of(folder), _class_of(source)
    if own and root:
        return own == root
    return half > 0 and sum(file.stat().st_size for file in files if file.suffix in _WEIGHTS) >= half


def _class_of(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says of the class of its network; {} where it says nothing."""
    file = folder / "config.json"
    try:
        config = read_json(file) if file.is_file() else {}
    except MpocError:
        return {}
    named = {key: config.get(key) for key in ("model_type", "architectures", "_class_name")}
    return named if any(named.values()) else {}


def size_of_other_files(source: Path, weight_files: list[Path]) -> int:
    """Bytes of these files."""
    return sum((source / name).stat().st_size for name in other_files(source, weight_files))


def copy_other_files(source: Path, target: Path, weight_files: list[Path]) -> None:
    """Copy these files, links as the files that they point to."""
    for name in other_files(source, weight_files):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def write_shards(target: Path, shards: list[Shard], like: Checkpoint) -> None:
    """Write all weight files, and the index if there are several, with the metadata of ``like``."""
    for shard in shards:
        write_shard(target, shard, like)
    write_index(target, shards, like)


def write_shard(target: Path, shard: Shard, like: Checkpoint) -> None:
    """Write one weight file."""
    write_safetensors(target / shard.name, shard.entries, like.own_metadata)


def write_index(target: Path, shards: list[Shard], like: Checkpoint) -> None:
    """Write the index of several weight files: tensor → file."""
    if len(shards) > 1:
        (target / index_name(like.stem)).write_text(_index_text(shards, like), "utf-8")


def _index_text(shards: list[Shard], like: Checkpoint) -> str:
    entries = [(entry.info, shard.name) for shard in shards for entry in shard.entries]
    said = index_metadata(like.path)
    if "total_parameters" in said:
        said["total_parameters"] = sum(info.numel for info, _ in entries)
    index = {
        "metadata": {**said, "total_size": sum(info.nbytes for info, _ in entries)},
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


def overhead(source: Checkpoint, shards: list[Shard], manifest: Manifest) -> int:
    """Bytes of a compressed directory besides tensor data."""
    marked = _marked(source.path, manifest)
    kept = other_files(source.path, source.weight_files)
    total = sum((source.path / name).stat().st_size for name in kept if str(name) not in marked)
    total += sum(len(_encode(text)) for text in marked.values())
    for shard in shards:
        infos = storage_order([entry.info for entry in shard.entries])
        total += len(encode_header(infos, source.own_metadata))
    return total + (len(_index_text(shards, source).encode()) if len(shards) > 1 else 0)


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
        | ({"storage": layer.storage} if layer.storage else {})
        for layer in manifest.changed
    }
    return {"quant_method": "mpo", "format": config_format(layers), "layers": layers}


def config_format(layers: Mapping[str, Mapping[str, Any]]) -> int:
    """The earliest format that expresses all these entries of a :func:`quantization_config`."""
    if any("storage" in entry for entry in layers.values()):
        return STORED_FORMAT
    return ORDERED_FORMAT if any("order" in entry for entry in layers.values()) else CONFIG_FORMAT


def configured_layer(name: str, entry: Any) -> LayerRecord:
    """One layer of :func:`quantization_config`, read back; what it does not tell has its default.

    Raises:
        MpocError: the entry is damaged.
    """
    try:
        layer = layer_of_entry(name, entry, {})
        if not layer.is_changed:
            raise ValueError(layer.form)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        message = f"config.json: damaged quantization_config of {name!r} ({shortened(error)})"
        raise MpocError(message, MAYBE_LATER) from error
    return layer


def _card_with_section(card: str, manifest: Manifest) -> str:
    """The model card with a section on the compression at its end."""
    rows = [
        f"| {layer.layer.replace('|', '¦')} | {'×'.join(map(str, layer.shape))} | "
        f"{layer.bonds_text(', ')} | "
        f"{layer.num_original:,} → {layer.num_stored:,} | {layer.rho:.4f} | "
        f"{layer.storage_text} | {layer.bits_per_weight:.2f} | "
        f"{'' if layer.relative_error is None else f'{layer.relative_error:.4f}'} |"
        for layer in manifest.changed
    ]
    section = [
        _CARD_BEGIN,
        "## Compressed with mpoc",
        "",
        f"{len(manifest.replaced)} layers are tensor networks; ρ = {manifest.rho:.4f} over "
        f"them, {manifest.source.num_parameters:,} → {manifest.num_parameters:,} parameters in all; "
        f"{manifest.bits_per_weight:.2f} bits a weight in the selected layers. Dense weights: `mpoc expand`.",
        "",
        "| layer | shape | bonds | parameters | ρ | stored as | bits | relative error |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        _CARD_END,
    ]
    return (card + "\n\n" if card else "") + "\n".join(section) + "\n"
