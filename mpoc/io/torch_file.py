"""Read ``torch.save`` files (.pt .pth .th .bin .ckpt), of the zip and the older format, safely.

``torch.load`` with ``weights_only=True`` runs no code of the file, but a small file can still exhaust the
reader: a compressed archive grows a thousandfold in memory; a pickle of a kilobyte can hold a tuple of tuples
that takes years to hash, or one nested so deeply that hashing it ends the process.  Archive and pickles are
therefore checked for what ``torch.save`` never writes before they are loaded.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.io.checkpoint import Checkpoint, changed_names, strip_wrappers, wrapper_notes
from mpoc.io.foreign import foreign_file, format_of_class, in_python, refuse_layout, refuse_payload
from mpoc.io.safetensors_header import ITEMSIZE, LONGEST_NAME, TensorInfo

# A state dict's own tuples are a tensor's shape, strides and storage.
_LARGEST_TUPLE = 100_000
_DEEPEST_TUPLE = 100
_KEEPS = ("PUT", "BINPUT", "LONG_BINPUT")
_GETS = ("GET", "BINGET", "LONG_BINGET")

_Size = tuple[int, int]  # of a value: how many tuples and members it has when written out, how deep they go

# Where training scripts put the state dict, most telling first.
_NESTS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "params",
    "weights",
    "ema_state_dict",
    "state_dict_ema",
)
_OF_TRAINING = re.compile("optim|sched")
_DEEPEST_NEST = 3  # mappings within mappings
# How many times a file's bytes its tensors may have: views that repeat one storage take no room in it.
_MOST_REPEATED = 16


# Plain data that checkpoints carry beside tensors (a best accuracy as a numpy scalar, arguments).
_multiarray = np._core.multiarray  # type: ignore[attr-defined]
# What torch's reader raises on bytes that are not what they should be.
_BROKEN = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)


def check_archive(path: Path) -> None:
    """Check a zip archive and the pickles in it.

    Raises:
        ValueError: it would expand when read.
        zipfile.BadZipFile: it is cut off.
    """
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise ValueError("it is packed, as torch.save packs none")
        if sum(info.file_size for info in infos) > path.stat().st_size:
            raise ValueError("it claims to hold more bytes than it has")
        if len(set(names)) < len(names) or archive.comment:
            raise ValueError("it can be read in two ways")
        for info in infos:
            if info.filename.endswith(".pkl"):
                with archive.open(info) as file:
                    check_pickle(file)


def check_pickle(file: IO[bytes]) -> None:
    """Follow the next pickle of a file without building the objects that it describes.

    Raises:
        ValueError: it holds a tuple too large or too deep to be hashed, or is broken.
    """
    stack: list[_Size | None] = []  # None: a mark
    memo: dict[Any, _Size | None] = {}
    for opcode, argument, _ in pickletools.genops(file):
        try:
            _follow(opcode, argument, stack, memo)
        except LookupError as error:
            raise ValueError("its pickle breaks off") from error


def _follow(
    opcode: pickletools.OpcodeInfo, argument: Any, stack: list[_Size | None], memo: dict[Any, _Size | None]
) -> None:
    if opcode.name in _KEEPS:
        memo[argument] = stack[-1]
    elif opcode.name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif opcode.name in _GETS:
        stack.append(memo[argument])
    elif opcode.name == "DUP":
        stack.append(stack[-1])
    else:
        taken = _take(opcode, stack)
        size = (1, 0)
        if opcode.name.startswith("TUPLE"):
            size = (1 + sum(count for count, _ in taken), 1 + max((depth for _, depth in taken), default=0))
            if size[0] > _LARGEST_TUPLE or size[1] > _DEEPEST_TUPLE:
                raise ValueError("it holds a tuple that expands without end")
        mark = opcode.name == "MARK"
        stack += [None if mark else size] * len(opcode.stack_after)


def _take(opcode: pickletools.OpcodeInfo, stack: list[_Size | None]) -> list[_Size]:
    """The items that an operation takes from the stack, without marks."""
    before = opcode.stack_before
    count = len(before)
    if pickletools.markobject in before:
        count = before.index(pickletools.markobject)
        members: list[_Size | None] = []
        while (member := stack.pop()) is not None:
            members.append(member)
    else:
        members = []
    if count > len(stack):
        raise IndexError("an empty stack")
    if count:
        members = [*stack[-count:], *members]
        del stack[-count:]
    return [member for member in members if member is not None]


def _plain_dtype(code: str, *_: Any) -> np.dtype[Any]:
    """Whether a tuple holds numbers only; others can nest without end."""
    if not isinstance(code, str) or len(code) > 4:
        raise TypeError(f"a dtype {str(code)[:40]!r}")
    return np.dtype(code)


_HARMLESS = [
    (_plain_dtype, "numpy.dtype"),
    np.ndarray,
    _multiarray.scalar,
    _multiarray._reconstruct,
    (_multiarray.scalar, "numpy.core.multiarray.scalar"),  # as numpy 1 named them
    (_multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
    argparse.Namespace,
]


def open_torch_file(path: Path, strip: bool = True) -> Checkpoint:
    """Open a ``torch.save`` file; memory-mapped, unless it is in the format from before torch 1.6.

    ``strip`` takes wrapper prefixes off the names.

    Raises:
        MpocError: truncated, TorchScript, needs code to load, or holds no state dict.
    """
    payload = load_plain(path)
    nest, state = find_state_dict(path, payload)
    notes = [f"state dict taken from {nest!r}"] if nest else []
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    others = [name for name in state if name not in tensors]
    nested = [name for name in others if _has_tensors(state[name])]
    if nested:
        notes.append(f"left out, mappings of tensors beside the state dict: {', '.join(nested[:5])}")
    if ignored := [name for name in others if name not in nested]:
        notes.append(f"ignored, not tensors: {', '.join(ignored[:5])}")
    longest = max(tensors, key=len)
    if len(longest) > LONGEST_NAME:
        raise MpocError(f"{path}: tensor {longest[:40]!r}… has a name of {len(longest)} characters")
    names = strip_wrappers(list(tensors)) if strip else {name: name for name in tensors}
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_at: dict[Any, str] = {}
    for original, name in names.items():
        tensor = tensors[original].detach()
        _check_tensor(path, name, tensor)
        first = first_at.setdefault(_place(tensor, name), name)
        if first == name:
            kept[name] = tensor
        else:
            tied[name] = first
    infos = {n: TensorInfo(n, _dtype(t), tuple(t.shape)) for n, t in kept.items()}
    refuse_layout(path, infos, tuple(others))
    _refuse_repeated(path, infos)
    notes += wrapper_notes(names)
    files, wrapped = dict.fromkeys(infos, path), changed_names(names)
    return Checkpoint(path, infos, tied, kept.__getitem__, files, None, notes, wrapped=wrapped)


def _refuse_repeated(path: Path, infos: dict[str, TensorInfo]) -> None:
    """Refuse a view that repeats a few bytes as a tensor of any size."""
    room = _MOST_REPEATED * path.stat().st_size
    for info in infos.values():
        room -= info.nbytes
        if room < 0:
            raise MpocError(
                f"{path}: tensor {info.name!r} {info.shape} repeats the same few bytes: with it the tensors "
                f"have more than {_MOST_REPEATED} times the bytes of the file",
                "save it whole: tensor.clone()",
            )


def load_plain(path: Path) -> Any:
    """Call ``torch.load`` with ``weights_only=True``; errors say how to convert the file."""
    if foreign := foreign_file(path):
        raise foreign
    zipped = _starts_like_zip(path)
    try:
        if zipped:
            _refuse_other_archives(path)
            check_archive(path)
        else:
            _check_pickles(path)
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # said below, where it fails
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise _needs_code(path, error) from error
    except _BROKEN as error:
        readable = isinstance(error, (RuntimeError, ValueError, MemoryError, zipfile.BadZipFile))
        lines = str(error).strip().splitlines() if readable and "weights_only" not in str(error) else []
        raise _damaged(path, lines[0] if lines else "its pickle ends too early") from error


def _damaged(path: Path, reason: str) -> MpocError:
    return MpocError(
        f"{path}: not a torch file, or a truncated or damaged one ({reason.rstrip('.')})",
        "download or copy it again",
    )


def _starts_like_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_pickles(path: Path) -> None:
    """Check that the pickles at the start of a file without a zip directory are complete; none is run."""
    with path.open("rb") as file:
        for _ in range(4):  # magic number, protocol, system, payload: the format before torch 1.6
            check_pickle(file)
            if not file.peek(1):
                break


# Keeps mappings, their tensors, and the tensors of modules; nothing that needs code to load.
_TO_PLAIN = (
    "f = lambda x: x if torch.is_tensor(x) else f(x.state_dict()) if hasattr(x, 'state_dict') else "
    "{{k: f(v) for k, v in x.items() if isinstance(k, (str, int))}} if hasattr(x, 'items') else None; "
    "torch.save(f(torch.load({source!r}, 'cpu', weights_only=False)), {target!r})"
)


def _needs_code(path: Path, error: pickle.UnpicklingError) -> MpocError:
    text = str(error)
    name = text.split("GLOBAL ")[-1].split()[0].rstrip(",.") if "GLOBAL " in text else "a class"
    what = f"loading it would run code ({name})"
    if "Unsupported operand" in text:
        what = "pickled with protocol 4 or later (or damaged), which torch reads only by running code"
    if known := format_of_class(name):
        what = f"{known}; {what}"
    code = _TO_PLAIN.format(source=str(path), target=f"{path.stem}-state.pt")
    return MpocError(f"{path}: {what}, so it was not loaded", f"if you trust the file, {in_python(code)}")


def _refuse_other_archives(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:  # raises where the archive is cut off
        names = archive.namelist()
    target = f"{path.stem}-state.pt"
    if any(name.endswith("/constants.pkl") for name in names):
        code = f"torch.save(torch.jit.load({str(path)!r}, 'cpu').state_dict(), {target!r})"
        raise MpocError(
            f"{path}: a TorchScript archive, which is a program, not a state dict", in_python(code)
        )
    if any(name.endswith("/archive_format") for name in names):
        code = f"torch.save(dict(torch.export.load({str(path)!r}).state_dict), {target!r})"
        raise MpocError(f"{path}: a torch.export program, not a state dict", in_python(code))
    if not any(name.endswith("data.pkl") for name in names):
        held = ", ".join(sorted(names)[:4])
        raise MpocError(f"{path}: a zip archive, not of torch (it holds {held})", "unpack it first")


def find_state_dict(path: Path, payload: Any) -> tuple[str, Mapping[str, Any]]:
    """The state dict within a training script's file, and its key there ("" if it is the file itself).

    Raises:
        MpocError: there is none, or several without a usual name.
    """
    if not isinstance(payload, Mapping):
        raise MpocError(
            f"{path}: holds a {type(payload).__name__}, not a state dict",
            "save model.state_dict()",
        )
    if "string_to_param" in payload:
        refuse_payload(path, payload)
    place = _place_of(path, payload, ())
    state = payload
    for key in place:
        state = state[key]
    return ".".join(place), state


def _place_of(path: Path, payload: Mapping[str, Any], within: tuple[str, ...]) -> tuple[str, ...]:
    """The keys that lead to the state dict; it is looked for level by level."""
    usual = [nest for nest in _NESTS if _is_state_dict(payload.get(nest))]
    if _is_state_dict(payload):
        own = next(
            (name for name, value in payload.items() if isinstance(value, Tensor) and "." in name), None
        )
        if usual and own is not None:
            raise _several(path, within, usual, f" beside tensors of its own ({own!r}, …)")
        if not usual:
            return within
    if usual:
        return (*within, usual[0])
    nests = {key: payload[key] for key in payload if isinstance(key, str) and not _OF_TRAINING.search(key)}
    found = [key for key, value in nests.items() if _is_state_dict(value)]
    if len(found) > 1:
        raise _several(path, within, found)
    if found:
        return (*within, found[0])
    refuse_payload(path, payload)
    inner = [
        key
        for key, value in nests.items()
        if isinstance(value, Mapping) and any(map(_is_mapping, value.values()))
    ]
    if len(inner) != 1 or len(within) == _DEEPEST_NEST:
        keys = ", ".join(map(str, list(payload)[:6])) or "nothing"
        raise MpocError(f"{path}: holds no state dict ({keys})", "save model.state_dict()")
    return _place_of(path, nests[inner[0]], (*within, inner[0]))


def _several(path: Path, within: tuple[str, ...], found: list[str], beside: str = "") -> MpocError:
    keys = "".join(f"[{key!r}]" for key in (*within, found[0]))
    code = f"torch.save(torch.load({str(path)!r}, 'cpu'){keys}, {path.stem + '-state.pt'!r})"
    said = f"{path}: holds several state dicts: {', '.join(found)}{beside}"
    return MpocError(said, f"choose one: {in_python(code)}")


def _is_state_dict(value: Any) -> bool:
    """Whether it maps strings to values of which some are tensors.

    Where others are mappings of tensors, the tensors must be those of a network: with dots in their names, or
    of two axes.
    """
    if not _has_tensors(value) or not all(isinstance(key, str) for key in value):
        return False
    if not any(_has_tensors(item) for item in value.values()):
        return True
    tensors = {name: item for name, item in value.items() if isinstance(item, Tensor)}
    return any("." in name or (item.ndim > 1 and item.is_floating_point()) for name, item in tensors.items())


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise MpocError(f"{path}: tensor {name!r} has a shape but no data (device 'meta')")
    if tensor.is_quantized or tensor.layout != torch.strided:
        kind = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise MpocError(f"{path}: tensor {name!r} is {kind}; only plain dense tensors are handled")
    if _dtype(tensor).startswith(("float4", "float8")) and _dtype(tensor) not in ITEMSIZE:
        said = f"{path}: already quantised: blocks of {_dtype(tensor)} (tensor {name!r})"
        raise MpocError(said, "compress the unquantised checkpoint that it was made from")
    if _dtype(tensor) not in ITEMSIZE:
        raise MpocError(f"{path}: tensor {name!r} has dtype {_dtype(tensor)}, which safetensors lacks")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _place(tensor: Tensor, name: str) -> tuple[Any, ...]:
    """A key that two tensors share if they are the same values in the same memory."""
    if tensor.numel() == 0:
        return (name,)
    storage = tensor.untyped_storage().data_ptr()
    return (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
