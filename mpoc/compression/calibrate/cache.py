"""Keep the moments of a dense pass, so that compressing the same network on the same data skips the pass.

They are an item of the keyed store (io/keyed_store) whose fingerprint covers all that the pass depends on.
Moments that layers share are stored once, and symmetric matrices as their upper triangle, row by row.  Values
are stored in float64 as they were measured, so that a compression from the file gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
from mpoc.io.keyed_store import Item, damaged, digest, open_item, put_item
from mpoc.io.safetensors_header import TensorInfo
from mpoc.io.safetensors_writer import Entry
from mpoc.models.call import Batch, Call, to_device
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup

_KIND = "moments/2"


def calibration_fingerprint(
    network: nn.Module, call: Call, batches: Sequence[Batch], pooling: Pooling | None, **options: Any
) -> dict[str, str]:
    """A digest of each part that a dense pass depends on, by the part's name for people.

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
        "options": digest([], repr((pooling, sorted(options.items())))),
        "software or machine": digest([], repr(machine)),
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
    """The dense pass at ``path`` if it has this fingerprint; else measure it and keep it there.

    Args:
        path: of a safetensors file; replaced where its fingerprint differs.
        parts: of :func:`calibration_fingerprint`.
        network: whose weights they are.
        trace: of this network.
        measure: runs the pass.
        group: the processes that call this together.
        own: the user did not name the file, so a damaged one is replaced.

    Returns:
        The pass, and a note for the user: read from the file or kept in it.

    Raises:
        MpocError: the file at ``path`` is damaged or holds no moments, and the user named it.
        OSError: of reading or writing.
    """
    read: list[DensePass] = []

    def look() -> list[str] | None:
        try:
            item = open_item(path)
            changed = _changed_parts(item, parts)
            if not changed:
                read.append(_load(item, network, trace))
            return changed
        except MpocError:
            if not own:
                raise
            return None

    changed = group.on_main(lambda: look() if path.exists() else None)
    if changed == []:
        with group.all_or_raise():
            return read[0] if read else _load(open_item(path), network, trace), f"read from {path}"
    dense = measure()
    with group.all_or_raise():
        if group.is_main:
            _save(path, parts, dense, trace)
    replaced = f", which was of other {', other '.join(changed)}: measured again" if changed else ""
    return dense, f"kept in {path}{replaced}"


def _changed_parts(item: Item, parts: Mapping[str, str]) -> list[str]:
    """The parts in which the file's fingerprint differs; of the network's only where no other does."""
    if item.record != _KIND:
        said = f"{item.path}: holds no moments that --moments of this mpoc kept"
        raise MpocError(said, "name another FILE")
    changed = [part for part, digest in parts.items() if item.fingerprint.get(part) != digest]
    return [part for part in changed if part != "network"] or changed  # its outputs follow from the others


@dataclass(frozen=True)
class _Shapes:
    """The shapes of one layer's moments, and its number of outputs."""

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


def _save(path: Path, parts: Mapping[str, str], dense: DensePass, trace: Trace) -> None:
    entries = [
        Entry(
            TensorInfo(name, str(tensor.dtype).removeprefix("torch."), _packed_shape(tuple(tensor.shape))),
            lambda tensor=tensor: _packed(tensor),  # type: ignore[misc]
        )
        for name, tensor in _tensors(dense, trace).items()
    ]
    put_item(path, _KIND, parts, entries)


def _tensors(dense: DensePass, trace: Trace) -> dict[str, Tensor]:
    """The moments by their names in the file."""
    tensors = {f"gradient {name}": tensor for name, tensor in dense.gradients.items()}
    tensors |= {f"block {path}": tensor for path, tensor in dense.blocks.items()}
    for name in dict.fromkeys(trace.same_rows.values()):
        moments = dense.moments[name]
        tensors[f"rows {name}"] = torch.tensor(moments.rows)
        tensors[f"mean {name}"] = moments.mean
        if moments.second is not moments.mean:
            tensors[f"second {name}"] = moments.second
    return tensors


def _load(item: Item, network: nn.Module, trace: Trace) -> DensePass:
    """The pass of this network that :func:`_save` wrote."""
    file = _Tensors(item)
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
        raise damaged(item.path, f"{next(iter(file.packed))!r} is not of this network")
    return DensePass({name: firsts[first] for name, first in trace.same_rows.items()}, gradients, blocks)


class _Tensors:
    """The tensors of a file, taken one by one; none is a view of it."""

    def __init__(self, item: Item) -> None:
        self._path = item.path
        self.packed = item.read_all()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        """A tensor as it was measured."""
        tensor = self.packed.pop(name, None)
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != _packed_shape(shape):
            raise damaged(self._path, f"{name!r} is not there, or of another shape or dtype")
        if not bool(tensor.isfinite().all()):
            raise damaged(self._path, f"{name!r} holds values that are not finite")
        return _unpacked(tensor, shape)

    def take_square(self, name: str) -> Tensor:
        """A symmetric matrix whose width follows from the number of its values."""
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
