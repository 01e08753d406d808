"""Open a checkpoint of any supported format, or say why it cannot be used and what to do.

Torch files, safetensors files and Hugging Face directories (one weight file, or shards with an index) become
a :class:`mpoc.io.checkpoint.Checkpoint`.  Tensors are memory-mapped, so their bytes are read from disk, or
over a network, when they are first used; :func:`one_ahead` reads the next tensor in a thread meanwhile.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpoc.errors import MpocError, UsageError, command_line, excluding
from mpoc.io.checkpoint import Checkpoint, changed_names, open_safetensors, strip_wrappers, wrapper_notes
from mpoc.io.coded_parts import codes_from_file, tensor_of
from mpoc.io.foreign import adapter, foreign_file, refuse_layout, refuse_quantised, refuse_stub
from mpoc.io.manifest import MANIFEST_FILE, CodedPart, LayerRecord, Manifest
from mpoc.io.safetensors_header import TensorInfo, read_header
from mpoc.io.torch_file import open_torch_file
from mpoc.io.training_history import read_history
from mpoc.io.weight_files import check_index, index_notes, read_json, shard_notes, weight_files_of
from mpoc.quantize.codes import QuantizedTensor
from mpoc.quantize.storage import Coded
from mpoc.tensor_networks.fit.truncation import largest

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt")
_PAGE = 4096
_PIECE = 1 << 24  # bytes looked at in one step


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
    if (path / "adapter_config.json").is_file():
        raise adapter(path, read_json(path / "adapter_config.json"))
    method = ((config or {}).get("quantization_config") or {}) if config else {}
    if (path / MANIFEST_FILE).exists() or (isinstance(method, dict) and method.get("quant_method") == "mpo"):
        raise already_compressed(path)
    refuse_quantised(path, config or {})


def already_compressed(path: Path) -> MpocError:
    """The error for mpoc's own output."""
    return MpocError(
        f"{path}: already compressed by mpoc",
        "for other bonds compress the original, or expand first: " + command_line("mpoc", "expand", path),
    )


def _join(parts: list[Checkpoint], path: Path, wanted: dict[str, Path] | None) -> Checkpoint:
    """Several torch shards as one checkpoint, wrapper prefixes taken off over all names together."""
    by_file = {part.path: part for part in parts}
    owners = check_index(path, {part.path: [*part.infos, *part.tied] for part in parts}, wanted)
    clean = strip_wrappers(list(owners))
    origin: dict[str, tuple[str, Checkpoint]] = {}
    tied: dict[str, str] = {}
    for name, file in owners.items():
        part = by_file[file]
        first = part.tied.get(name, name)
        if first != name and owners[first] == file:
            tied[clean[name]] = clean[first]
        else:
            origin[clean[name]] = first, part
    notes = {note for part in parts for note in part.notes}
    return Checkpoint(
        path,
        {short: replace(part.infos[name], name=short) for short, (name, part) in origin.items()},
        tied,
        lambda short: origin[short][1].read(origin[short][0]),
        {short: part.files[name] for short, (name, part) in origin.items()},
        notes=[*sorted(notes), *wrapper_notes(clean), *index_notes(owners, wanted)],
        wrapped=changed_names(clean),
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
        raise _unknown(path)
    _refuse_by_names(checkpoint)
    checkpoint.history = read_history(path)
    checkpoint.notes += [] if path.is_dir() else shard_notes(path)
    return checkpoint


def _unknown(path: Path) -> MpocError:
    if re.search(r"\.index(\.[\w-]+)?\.json$", path.name):
        whole = command_line("mpoc", "compress", path.parent, "--bond", 8)
        return MpocError(f"{path}: an index of shards; give its directory", whole)
    known = " ".join((*TORCH_SUFFIXES, ".safetensors"))
    foreign, what = foreign_file(path), f"not a kind of checkpoint known here ({known}, or a directory)"
    return MpocError(f"{foreign}, {what}", foreign.hint) if foreign else MpocError(f"{path}: {what}")


def _missing(path: Path) -> UsageError:
    file_name = path.suffix in (*TORCH_SUFFIXES, ".safetensors")
    if re.fullmatch(r"([\w.-]+/)?[\w.-]+", str(path)) and not file_name:
        return UsageError(
            f"{path}: no such file or directory; if this is a Hugging Face hub id, mpoc does not download",
            command_line("hf", "download", path, "--local-dir", path.name)
            + ", then give mpoc that directory",
        )
    return UsageError(f"{path}: no such file or directory")


def _refuse_by_names(checkpoint: Checkpoint) -> None:
    path = checkpoint.path
    if not checkpoint.infos:
        raise MpocError(f"{path}: holds no tensors")
    for name in checkpoint.infos:
        if not name.isprintable():
            raise MpocError(f"{path}: a tensor is named {name!r}, with characters that cannot be printed")
    refuse_layout(path, checkpoint.infos)
    refuse_stub(path, checkpoint.infos)


def one_ahead(checkpoint: Checkpoint, names: Iterable[str]) -> Generator[str, None, None]:
    """Yield names; while the caller works on one, the tensor of the next is read into memory.

    Args:
        checkpoint: the checkpoint that holds them.
        names: in the order in which they will be read.
    """
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        for name, following in pairwise(chain(names, [None])):
            if following is not None:
                thread.submit(look_at, checkpoint, following)  # an error is raised again when it is read
            assert name is not None
            yield name


def look_at(checkpoint: Checkpoint, name: str) -> None:
    """Touch a byte of every page of a tensor; numpy releases the GIL."""
    tensor = checkpoint.read(name)
    if tensor.is_contiguous():
        for piece in tensor.detach().view(-1).view(torch.uint8).split(_PIECE):
            piece.numpy()[::_PAGE].sum()


@dataclass
class CompressedCheckpoint(Checkpoint):
    """The tensors of a compressed file: cores, and all that was left as it was, under their own names.

    What is stored as codes is decoded when it is read: ``infos`` and :meth:`read` know floats alone.
    """

    parts: Mapping[str, CodedPart] = field(default_factory=dict)  # by the name of what they stand for
    in_file: Checkpoint | None = None  # the tensors as the file holds them

    def is_halved(self, name: str) -> bool:
        """Whether the file holds this vector as float16, and readers get it in the dtype of the source."""
        assert self.in_file is not None
        return name not in self.parts and self.in_file.infos[name].dtype != self.infos[name].dtype

    def coded_tensors(self, layer: LayerRecord) -> dict[str, Tensor]:
        """The tensors of the file that hold the codes of a layer, by their names there."""
        assert self.in_file is not None
        return {name: self.in_file.read(name) for name in layer.file_names}

    def codes(self, name: str) -> QuantizedTensor:
        """The codes of a part.

        Raises:
            MpocError: they are damaged.
        """
        assert self.in_file is not None
        tensors = {own: self.in_file.read(own) for own in self.parts[name].file_names}
        try:
            return codes_from_file(self.parts[name], tensors)
        except MpocError as error:
            raise MpocError(f"{self.files[name]}: {error}") from error


def open_compressed(path: Path, manifest: Manifest) -> CompressedCheckpoint:
    """Open a compressed file or directory with its manifest.

    Raises:
        MpocError: tensors that hold codes are missing, or not of the shapes that the manifest says.
    """
    files, wanted = weight_files_of(path) if path.is_dir() else ([path], None)
    in_file = open_safetensors(path, files, wanted, strip=False)
    parts: dict[str, CodedPart] = {}
    infos = {name: manifest.as_read(info) for name, info in in_file.infos.items()}
    owners = dict(in_file.files)
    for layer in manifest.layers:
        _check_codes(in_file, layer)
        for part in layer.coded_parts:
            parts[part.name] = part
            owners[part.name] = owners[part.file_names[0]]
            infos[part.file_names[0]] = TensorInfo(part.name, layer.stored_dtype, part.shape)
            for name in part.file_names[1:]:
                del infos[name]

    def read(name: str) -> Tensor:
        coded = name in parts
        tensor = tensor_of(parts[name], stored.codes(name).values()) if coded else in_file.read(name)
        return tensor.to(getattr(torch, stored.infos[name].dtype))

    stored = CompressedCheckpoint(
        **vars(in_file)
        | {"infos": {info.name: info for info in infos.values()}, "reader": read, "files": owners},
        parts=parts,
        in_file=in_file,
    )
    return stored


def _check_codes(in_file: Checkpoint, layer: LayerRecord) -> None:
    """Compare the tensors that hold a layer's codes with the manifest, before any is read.

    Raises:
        MpocError: one is missing or differs, or they have more or fewer bytes than the manifest says.
    """
    nbytes = 0
    for part in layer.coded_parts:
        if part.name in in_file.infos:
            raise MpocError(f"{in_file.path}: tensor {part.name!r} is stored twice, as floats and as codes")
        for expected in part.file_infos(0):
            info = in_file.infos.get(expected.name)
            is_stream = isinstance(part.storage, Coded) and info is not None and len(info.shape) == 1
            if info is None or info.dtype != expected.dtype or not (is_stream or info == expected):
                actual = f"{info.shape} {info.dtype}" if info else "missing"
                shape = "one axis of" if isinstance(part.storage, Coded) else expected.shape
                raise MpocError(
                    f"{in_file.path}: tensor {expected.name!r} is {actual}; "
                    f"the manifest says {shape} {expected.dtype}"
                )
            nbytes += info.nbytes
    if layer.storage and nbytes != layer.nbytes:
        raise MpocError(
            f"{in_file.path}: the codes of tensor {layer.name!r} have {nbytes} bytes; "
            f"the manifest says {layer.nbytes}"
        )


def check_cores(stored: Checkpoint, layer: LayerRecord) -> None:
    """Compare names, shapes and dtypes of a replaced layer's cores with the manifest.

    Raises:
        MpocError: a core is missing or differs.
    """
    for name, expected in zip(layer.core_names, layer.core_shapes, strict=True):
        info = stored.infos.get(name)
        if info is None or info.shape != expected or info.dtype != layer.stored_dtype:
            actual = f"{info.shape} {info.dtype}" if info else "missing"
            raise MpocError(
                f"{stored.path}: core {name!r} is {actual}; the manifest says {expected} {layer.stored_dtype}"
            )


def read_finite(checkpoint: Checkpoint, name: str) -> Tensor:
    """A weight of the checkpoint, on the CPU.

    Raises:
        MpocError: it holds NaN or infinite values.
    """
    weight = checkpoint.read(name)
    most = largest(weight)
    if not math.isfinite(most):
        kind = "NaN" if math.isnan(most) else "infinite values"
        raise MpocError(
            f"{checkpoint.files[name]}: tensor {name!r} holds {kind}",
            f"repair the checkpoint, or leave the layer alone: {excluding(name)}",
        )
    return weight


@contextmanager
def naming(checkpoint: Checkpoint, name: str) -> Iterator[None]:
    """Name a tensor and its file in errors of what is done with it."""
    try:
        yield
    except MpocError as error:
        hint = error.hint or f"leave the layer alone: {excluding(name)}"
        raise type(error)(f"{checkpoint.files[name]}: tensor {name!r}: {error}", hint) from error


def is_compressed(path: Path) -> bool:
    """Whether ``mpoc compress`` wrote this file or directory; reads names and a header only."""
    if path.is_dir():
        return (path / MANIFEST_FILE).is_file()
    return path.is_file() and path.suffix == ".safetensors" and "mpoc" in read_header(path).metadata
