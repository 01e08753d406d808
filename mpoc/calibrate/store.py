"""A dense pass on disk, so that compressing the same network on the same data again need not repeat it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mpoc.calibrate.dense import DensePass
from mpoc.calibrate.moments import Moments
from mpoc.errors import MpocError
from mpoc.header import TensorInfo, read_header
from mpoc.train.call import Batch
from mpoc.writer import Entry, staged, write_safetensors

_FORMAT = "mpoc.moments/1"


def fingerprint(network: nn.Module, batches: Iterable[Batch], **options: Any) -> str:
    """Another one for other weights, other data, or other options.

    Args:
        network: all of its parameters and buffers count.
        batches: every number of them counts.
        options: whatever else the moments depend on; their ``repr`` counts.
    """
    digest = hashlib.blake2b(
        repr((_FORMAT, torch.__version__, sorted(options.items()))).encode(), digest_size=16
    )
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, Tensor):
            _add(digest, name, tensor)
    for index, batch in enumerate(batches):
        for name, tensor in sorted(batch.items()):
            _add(digest, f"{index} {name}", tensor)
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
    if tensor.numel():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def save_moments(path: Path, key: str, found: DensePass) -> None:
    """Write a dense pass, whole or not at all; what was at ``path`` is replaced.

    Args:
        path: of a safetensors file.
        key: its :func:`fingerprint`.
        found: of the dense network alone.

    Raises:
        OSError: of writing.
    """
    firsts = {id(moments): name for name, moments in reversed(found.moments.items())}
    entries = [_entry(f"{name}.gradient", tensor) for name, tensor in found.gradients.items()]
    for name in firsts.values():
        entries += [_entry(f"{name}.mean", found.moments[name].mean)]
        entries += [_entry(f"{name}.second", found.moments[name].second)]
    record = {
        "key": key,
        "moments": {name: firsts[id(moments)] for name, moments in found.moments.items()},
        "rows": {name: found.moments[name].rows for name in firsts.values()},
        "gradients": list(found.gradients),
        "reasons": found.reasons,
    }
    with staged(path) as target:
        write_safetensors(target, entries, {_FORMAT: json.dumps(record)})


def load_moments(path: Path, key: str) -> DensePass | None:
    """The dense pass at ``path``; None where there is none, or one of another fingerprint.

    Raises:
        MpocError: the file is damaged, or is something else.
    """
    if not path.is_file():
        return None
    metadata = read_header(path).metadata
    if _FORMAT not in metadata:
        raise MpocError(
            f"{path}: holds no moments of this version of mpoc", f"rm {path}, or name another file"
        )
    record = json.loads(metadata[_FORMAT])
    if record["key"] != key:
        return None
    with safe_open(path, "pt") as tensors:
        firsts: dict[str, Moments] = {}
        for name, rows in record["rows"].items():
            mean, second = tensors.get_tensor(f"{name}.mean"), tensors.get_tensor(f"{name}.second")
            firsts[name] = Moments(rows, mean, second, mean, second, second)
        gradients = {name: tensors.get_tensor(f"{name}.gradient") for name in record["gradients"]}
    moments = {name: firsts[first] for name, first in record["moments"].items()}
    return DensePass(moments, gradients, record["reasons"])


def _entry(name: str, tensor: Tensor) -> Entry:
    info = TensorInfo(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    return Entry(info, lambda: tensor)
