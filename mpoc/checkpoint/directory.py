"""Hugging Face directories: config.json, and weights in one file or in shards with an index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mpoc.checkpoint.base import Checkpoint, strip_wrappers
from mpoc.checkpoint.safetensors_file import open_safetensors
from mpoc.checkpoint.torch_file import open_torch_file
from mpoc.errors import MpocError
from mpoc.weight_files import read_json, weight_files_of


def open_directory(path: Path) -> Checkpoint:
    """Open a directory as ``save_pretrained`` writes it.

    Raises:
        MpocError: an adapter, quantised, already compressed, no or several sets of weights, or an index
            that names a missing file or one outside the directory.
    """
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    _refuse_by_config(path, config)
    files, wanted = weight_files_of(path)
    if files[0].suffix == ".safetensors":
        checkpoint = open_safetensors(path, files, wanted)
    else:
        checkpoint = _join([open_torch_file(file, strip=False) for file in files], path, wanted)
    checkpoint.config = config
    return checkpoint


def _refuse_by_config(path: Path, config: dict[str, Any] | None) -> None:
    if (path / "adapter_config.json").exists():
        raise MpocError(
            f"{path}: a LoRA (PEFT) adapter, not a whole model",
            "merge it into its base first: peft's merge_and_unload(), then save_pretrained()",
        )
    if (path / "mpoc.json").exists():
        raise already_compressed(path)
    quantization = (config or {}).get("quantization_config")
    if quantization:
        known = isinstance(quantization, dict)
        method = quantization.get("quant_method", "unknown method") if known else quantization
        if method == "mpo":
            raise already_compressed(path)
        raise MpocError(
            f"{path}: already quantised ({method}); MPOs need the weights themselves",
            "compress the unquantised checkpoint",
        )


def already_compressed(path: Path) -> MpocError:
    """The refusal for mpoc's own output."""
    return MpocError(
        f"{path}: already compressed by mpoc",
        f"for other bonds compress the original, or expand first: mpoc expand {path}",
    )


def _join(parts: list[Checkpoint], path: Path, wanted: dict[str, Path] | None) -> Checkpoint:
    """Several torch shards as one checkpoint, wrapper prefixes taken off over all names together."""
    owner = {name: part for part in parts for name in part.infos}
    tied = {alias: name for part in parts for alias, name in part.tied.items()}
    for name, file in (wanted or {}).items():
        if name not in owner and name not in tied:
            raise MpocError(f"{path}: the index puts tensor {name!r} into {file.name}, which lacks it")
    clean = strip_wrappers([*owner, *tied])
    origin = {clean[name]: (name, part) for name, part in owner.items()}
    return Checkpoint(
        path,
        {short: replace(part.infos[name], name=short) for short, (name, part) in origin.items()},
        {clean[alias]: clean[name] for alias, name in tied.items()},
        lambda short: origin[short][1].read(origin[short][0]),
        {short: part.files[name] for short, (name, part) in origin.items()},
        notes=sorted({note for part in parts for note in part.notes}),
    )
