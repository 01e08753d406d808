"""Open anything, or say why not and what to do instead."""

from __future__ import annotations

import re
from pathlib import Path

from mpoc.checkpoint.base import Checkpoint
from mpoc.checkpoint.directory import already_compressed, open_directory
from mpoc.checkpoint.safetensors_file import open_safetensors
from mpoc.checkpoint.torch_file import open_torch_file
from mpoc.errors import MpocError, UsageError
from mpoc.header import read_header
from mpoc.history import read_history

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|absmax|quant_map|SCB|weight_scale|weight_packed)$|\.quant_state\."
)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a torch file, a safetensors file or a Hugging Face directory.

    Raises:
        UsageError: nothing at ``path``.
        MpocError: something there that cannot be compressed, with the reason and the way out.
    """
    if not path.exists():
        raise _missing(path)
    if path.is_dir():
        checkpoint = open_directory(path)
    elif path.suffix == ".safetensors":
        if "mpoc" in read_header(path).metadata:
            raise already_compressed(path)
        checkpoint = open_safetensors(path, [path], None)
    elif path.suffix in TORCH_SUFFIXES:
        checkpoint = open_torch_file(path)
    else:
        known = " ".join((*TORCH_SUFFIXES, ".safetensors"))
        raise MpocError(f"{path}: not a kind of checkpoint known here ({known}, or a directory)")
    _refuse_by_names(checkpoint)
    checkpoint.history = read_history(path)
    return checkpoint


def _missing(path: Path) -> UsageError:
    file_name = path.suffix in (*TORCH_SUFFIXES, ".safetensors")
    if re.fullmatch(r"([\w.-]+/)?[\w.-]+", str(path)) and not file_name:
        return UsageError(
            f"{path}: no such file or directory; if this is a Hugging Face hub id, mpoc does not download",
            f"hf download {path} --local-dir {path.name}, then give mpoc that directory",
        )
    return UsageError(f"{path}: no such file or directory")


def _refuse_by_names(checkpoint: Checkpoint) -> None:
    path = checkpoint.path
    if not checkpoint.infos:
        raise MpocError(f"{path}: holds no tensors")
    for name in checkpoint.infos:
        if not name.isprintable():
            raise MpocError(f"{path}: a tensor is named {name!r}, with characters that cannot be printed")
        if ".lora_A." in name or ".lora_B." in name or name.endswith((".lora_A", ".lora_B")):
            raise MpocError(
                f"{path}: a LoRA adapter (tensor {name!r}), not a whole model",
                "merge it into its base first: peft's merge_and_unload(), then save the model",
            )
        if _QUANTISED.search(name):
            raise MpocError(
                f"{path}: already quantised (tensor {name!r}); MPOs need the weights themselves",
                "compress the unquantised checkpoint",
            )
