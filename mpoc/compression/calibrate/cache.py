"""Keep the moments of a dense pass, so that compressing the same network on the same data skips the pass.

They are an item of the keyed store (io/keyed_store) whose fingerprint covers all that the pass depends on.
Moments that layers share are stored once, and symmetric matrices as their upper triangle, row by row.  Values
are stored in float64 as they were measured, so that a compression from the file gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mpoc
from mpoc.compression.calibrate.calibration_data import Pooling, output_of_interest
from mpoc.compression.calibrate.layer_inputs import (
    ConvInputs,
    EmbeddingInputs,
    ObservedLayer,
    device_of,
    eval_mode,
)
from mpoc.compression.calibrate.moments import DensePass, Moments
from mpoc.compression.calibrate.trace import EXAMPLES, Trace
from mpoc.errors import MpocError
from mpoc.io.keyed_store import Item, Scratch, damaged, digest, open_item, put_item
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
    scratch: Scratch | None = None,
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
        scratch: that holds what is read; None: memory.

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
                read.append(_load(item, network, trace, scratch))
            return changed
        except MpocError:
            if not own:
                raise
            return None

    changed = group.on_main(lambda: look() if path.exists() else None)
    if changed == []:
        with group.all_or_raise():
            return read[0] if read else _load(open_item(path), network, trace, scratch), f"read from {path}"
    dense = measure()
    with group.all_or_raise():
        if group.is_main:
            _save(path, parts, dense, network, trace)
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


def _save(path: Path, parts: Mapping[str, str], dense: DensePass, network: nn.Module, trace: Trace) -> None:
    shapes = {name: _Shapes.of(network, layer) for name, layer in trace.layers.items()}
    put_item(path, _KIND, parts, list(_entries(dense, trace, shapes)))


def _entries(dense: DensePass, trace: Trace, shapes: Mapping[str, _Shapes]) -> Iterator[Entry]:
    """The moments by their names in the file; each is read when it is written."""

    def entry(name: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> Entry:
        return Entry(TensorInfo(name, "float64", _packed_shape(shape)), lambda: _packed(read()))

    for name in dense.gradients:
        yield entry(
            f"gradient {name}", (shapes[name].outputs,) * 2, partial(dense.gradients.__getitem__, name)
        )
    for path in dense.blocks:
        yield entry(f"block {path}", tuple(dense.blocks[path].shape), partial(dense.blocks.__getitem__, path))
    for name in dict.fromkeys(trace.same_rows.values()):
        if name not in dense.moments:
            continue
        yield Entry.of(f"rows {name}", torch.tensor(dense.moments[name].rows))
        yield entry(f"mean {name}", shapes[name].mean, lambda name=name: dense.moments[name].mean)  # type: ignore[misc]
        if shapes[name].second != shapes[name].mean:
            second = lambda name=name: dense.moments[name].second  # noqa: E731
            yield entry(f"second {name}", shapes[name].second, second)


def _load(item: Item, network: nn.Module, trace: Trace, scratch: Scratch | None = None) -> DensePass:
    """The pass of this network that :func:`_save` wrote."""
    file, dense = _Tensors(item), DensePass(scratch)
    shapes = {name: _Shapes.of(network, layer) for name, layer in trace.layers.items()}
    for name in dict.fromkeys(trace.same_rows.values()):
        shape = shapes[name]
        if f"rows {name}" not in file.left:
            continue
        rows = int(file.take(f"rows {name}", (), torch.int64))
        mean = file.take(f"mean {name}", shape.mean)
        second = mean if shape.second == shape.mean else file.take(f"second {name}", shape.second)
        names = [other for other, first in trace.same_rows.items() if first == name]
        dense.moments.put(names, Moments(rows, mean, second, mean, second, second))
    for name in trace.same_rows:
        if f"gradient {name}" in file.left:
            dense.gradients.put(name, file.take(f"gradient {name}", (shapes[name].outputs,) * 2))
    for path in (block.module for chain in trace.chains for block in chain):
        if f"block {path}" in file.left:
            dense.blocks.put(path, file.take_square(f"block {path}"))
    if file.left:
        raise damaged(item.path, f"{next(iter(file.left))!r} is not of this network")
    return dense


class _Tensors:
    """The tensors of a file, read one by one; none is a view of it."""

    def __init__(self, item: Item) -> None:
        if not item.is_whole():
            raise damaged(item.path, "its contents are not those that were written")
        self._item = item
        self.left = dict.fromkeys(item.tensors.infos)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        """A tensor as it was measured."""
        found = self._item.tensors.read(name).clone() if name in self.left else None
        if found is None or found.dtype != dtype or tuple(found.shape) != _packed_shape(shape):
            raise damaged(self._item.path, f"{name!r} is not there, or of another shape or dtype")
        if not bool(found.isfinite().all()):
            raise damaged(self._item.path, f"{name!r} holds values that are not finite")
        del self.left[name]
        return _unpacked(found, shape)

    def take_square(self, name: str) -> Tensor:
        """A symmetric matrix whose width follows from the number of its values."""
        width = int((2 * self._item.tensors.infos[name].numel) ** 0.5)
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
