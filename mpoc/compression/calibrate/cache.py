"""A dense pass in a file, so that compressing the same network on the same data again need not repeat it.

A safetensors file.  Its metadata are digests: of what is in it, and of all that the pass depends on, part by
part.  Rows that layers share are there once, and of symmetric matrices the upper triangle, row by row; all
numbers as they were measured, so that what is compressed from them is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import mpoc
from mpoc.compression.calibrate.calibration_data import Pooling, output_of_interest
from mpoc.compression.calibrate.dense_pass import DensePass
from mpoc.compression.calibrate.layer_inputs import (
    ConvInputs,
    EmbeddingInputs,
    ObservedLayer,
    device_of,
    eval_mode,
)
from mpoc.compression.calibrate.moments import Moments
from mpoc.compression.calibrate.trace import EXAMPLES, Trace
from mpoc.errors import MpocError
from mpoc.io.atomic import digest, staged
from mpoc.io.safetensors_header import TensorInfo, read_header
from mpoc.io.safetensors_writer import Entry, write_safetensors
from mpoc.models.call import Batch, Call, to_device
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup

_CONTENT = "mpoc.moments/1"  # the metadata's key for the digest of all tensors


def calibration_fingerprint(
    network: nn.Module, call: Call, batches: Sequence[Batch], pooling: Pooling | None, **options: Any
) -> dict[str, str]:
    """All that a dense pass depends on: a digest of each part, by the word for it.

    Args:
        network: in evaluation mode.  All of its parameters and buffers count and, so that its code does too,
            what it gives on a few examples.
        call: how it is called.
        batches: of calibration data; every number of them counts.
        pooling: as of :func:`output_of_interest`.
        options: whatever else the moments depend on; their ``repr`` counts.
    """
    device = device_of(network)
    first = to_device({name: values[:EXAMPLES] for name, values in batches[0].items()}, device)
    with eval_mode(network), torch.no_grad():
        values, _ = output_of_interest(call(network, first), first, pooling)
    kind = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    machine = mpoc.__version__, torch.__version__, device.type, kind, torch.get_num_threads()
    weights = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    data = {f"{k} {name}": batch[name] for k, batch in enumerate(batches) for name in sorted(batch)}
    return {
        "weights": digest(weights.items()),
        "network": digest([(repr(network), values)]),
        "data": digest(data.items()),
        "options": digest([(repr((pooling, sorted(options.items()))), torch.empty(0))]),
        "software or machine": digest([(repr(machine), torch.empty(0))]),
    }


def cached_or_measured(
    path: Path,
    parts: Mapping[str, str],
    network: nn.Module,
    trace: Trace,
    measure: Callable[[], DensePass],
    group: ProcessGroup = SINGLE_PROCESS,
    own: bool = False,
) -> tuple[DensePass, str]:
    """The dense pass at ``path`` where there is one of these parts; else it is measured and kept there.

    Args:
        path: of a safetensors file; replaced where it is of other parts.
        parts: of :func:`fingerprint`.
        network: whose weights they are.
        trace: of this network.
        measure: runs the pass.
        group: the processes that do this together.
        own: nobody named the file: a damaged one is replaced.

    Returns:
        The pass, and whether it was read.

    Raises:
        MpocError: what is at ``path`` is damaged, or holds no moments, and is not our own.
        OSError: of reading or writing.
    """
    read: list[DensePass] = []

    def look() -> list[str] | None:
        try:
            others = _others(path, parts)
            if not others:
                read.append(_load(path, network, trace))
            return others
        except MpocError:
            if not own:
                raise
            return None

    others = group.on_main(lambda: look() if path.exists() else None)
    if others == []:
        with group.all_or_raise():
            return read[0] if read else _load(path, network, trace), f"read from {path}"
    found = measure()
    with group.all_or_raise():
        if group.is_main:
            _save(path, parts, found, trace)
    said = f"kept in {path}"
    return found, f"{said}, which was of other {', other '.join(others)}: measured again" if others else said


def _others(path: Path, parts: Mapping[str, str]) -> list[str]:
    """The words for what the file differs in."""
    metadata = read_header(path).metadata
    if _CONTENT not in metadata:
        raise MpocError(f"{path}: holds no moments that --moments of this mpoc kept", "name another FILE")
    found = [part for part, digest in parts.items() if metadata.get(part) != digest]
    return [part for part in found if part != "network"] or found  # what it gives follows from the others


@dataclass(frozen=True)
class _Shapes:
    """Of what is known of one layer, as measured."""

    mean: tuple[int, ...]
    second: tuple[int, ...]
    outputs: int

    @classmethod
    def of(cls, network: nn.Module, layer: ObservedLayer) -> _Shapes:
        inputs, weight = layer.inputs, network.get_parameter(layer.name)
        groups = (inputs.groups,) if isinstance(inputs, ConvInputs) and inputs.groups > 1 else ()
        mean = (*groups, inputs.features)
        second = mean if isinstance(inputs, EmbeddingInputs) else (*mean, inputs.features)
        return cls(mean, second, weight.numel() // inputs.features)


def _save(path: Path, parts: Mapping[str, str], found: DensePass, trace: Trace) -> None:
    """Whole or not at all."""
    tensors = _tensors(found, trace)
    content = digest((name, _packed(tensor)) for name, tensor in tensors.items())
    entries = [
        Entry(
            TensorInfo(name, str(tensor.dtype).removeprefix("torch."), _packed_shape(tuple(tensor.shape))),
            lambda tensor=tensor: _packed(tensor),  # type: ignore[misc]
        )
        for name, tensor in tensors.items()
    ]
    with staged(path) as target:
        write_safetensors(target, entries, {_CONTENT: content, **parts})


def _tensors(found: DensePass, trace: Trace) -> dict[str, Tensor]:
    """By their names in the file."""
    tensors = {f"gradient {name}": tensor for name, tensor in found.gradients.items()}
    tensors |= {f"block {path}": tensor for path, tensor in found.blocks.items()}
    for name in dict.fromkeys(trace.same_rows.values()):
        moments = found.moments[name]
        tensors[f"rows {name}"] = torch.tensor(moments.rows)
        tensors[f"mean {name}"] = moments.mean
        if moments.second is not moments.mean:
            tensors[f"second {name}"] = moments.second
    return tensors


def _load(path: Path, network: nn.Module, trace: Trace) -> DensePass:
    """What :func:`_save` wrote of this network."""
    file = _File(path)
    shapes = {name: _Shapes.of(network, layer) for name, layer in trace.layers.items()}
    firsts: dict[str, Moments] = {}
    for name in dict.fromkeys(trace.same_rows.values()):
        shape = shapes[name]
        rows = int(file.take(f"rows {name}", (), torch.int64))
        mean = file.take(f"mean {name}", shape.mean)
        second = mean if shape.second == shape.mean else file.take(f"second {name}", shape.second)
        firsts[name] = Moments(rows, mean, second, mean, second, second)
    gradients = {
        name: file.take(f"gradient {name}", (shapes[name].outputs,) * 2)
        for name in trace.same_rows
        if f"gradient {name}" in file.packed
    }
    paths = [block.module for chain in trace.chains for block in chain]
    blocks = {path: file.take_square(f"block {path}") for path in paths if f"block {path}" in file.packed}
    if file.packed:
        raise file.damaged(f"{next(iter(file.packed))!r} is not of this network")
    return DensePass({name: firsts[first] for name, first in trace.same_rows.items()}, gradients, blocks)


class _File:
    """The tensors of a file, to be taken one by one; none is a view of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, "pt") as file:
                self.packed = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
                is_whole = digest(self.packed.items()) == file.metadata()[_CONTENT]
        except SafetensorError as error:
            raise self.damaged(str(error)) from error
        if not is_whole:
            raise self.damaged("its numbers are not those that were written")

    def damaged(self, why: str) -> MpocError:
        """The error."""
        return MpocError(f"{self._path}: damaged: {why}", f"remove {self._path}; it is measured again")

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        """A tensor as it was measured."""
        tensor = self.packed.pop(name, None)
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != _packed_shape(shape):
            raise self.damaged(f"{name!r} is not there, or of another shape or dtype")
        if not bool(tensor.isfinite().all()):
            raise self.damaged(f"{name!r} holds values that are not finite")
        return _unpacked(tensor, shape)

    def take_square(self, name: str) -> Tensor:
        """A matrix whose size the file alone tells."""
        width = int((2 * self.packed[name].numel()) ** 0.5)
        return self.take(name, (width, width))


def _is_square(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and shape[-1] == shape[-2]


def _upper(width: int) -> Tensor:
    return torch.ones(width, width, dtype=torch.bool).triu()


def _packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1] * (shape[-1] + 1) // 2) if _is_square(shape) else shape


def _packed(tensor: Tensor) -> Tensor:
    """(…, n, n) symmetric → (…, n (n + 1) / 2); others as they are."""
    return tensor[..., _upper(tensor.shape[-1])] if _is_square(tuple(tensor.shape)) else tensor


def _unpacked(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not _is_square(shape):
        return packed
    upper = _upper(shape[-1])
    found = packed.new_zeros(shape)
    found[..., upper] = packed
    return torch.where(upper, found, found.mT).contiguous()
