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
from mpoc.compression.calibrate.calibration_data import WATCHED
from mpoc.compression.calibrate.layer_inputs import (
    ConvInputs,
    EmbeddingInputs,
    ObservedLayer,
    device_of,
    eval_mode,
)
from mpoc.compression.calibrate.moments import Moments
from mpoc.compression.calibrate.output_of_interest import Pooling, output_of_interest
from mpoc.compression.calibrate.trace import Trace
from mpoc.errors import MpocError
from mpoc.io.keyed_store import Item, Scratch, damaged, digest, open_item, put_item
from mpoc.io.safetensors_header import TensorInfo
from mpoc.io.safetensors_writer import Entry
from mpoc.models.call import Batch, Call, to_device
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from mpoc.tensor_networks.fit.second_moment import CentredRows, RowMoment

_KIND = "moments/3"
_PANEL = 64  # rows of a symmetric matrix in memory that are kept from the first one's diagonal entry on


class DensePass:
    """Moments and gradients of the dense network, by weight; none of a weight that the data give no rows.

    ``gradients`` are G, (N_y, N_y) float64 on the CPU: E[g gᵀ] over rows and directions, g the gradient of an
    example's Σ at the layer's output.  An example's change by an error δ there is about rows / examples times
    E[δᵀ G δ], so ``Moments.rows`` times tr[G (W − Ŵ) M (W − Ŵ)ᵀ] can be compared between layers.

    Args:
        scratch: that holds the tensors.
    """

    def __init__(self, scratch: Scratch | None = None) -> None:
        scratch = scratch or Scratch()
        self.moments = KeptMoments(scratch)
        self.gradients = KeptTensors(scratch)
        self.blocks = KeptTensors(scratch)  # by module Σ g gᵀ over rows and directions, at what blocks give


class KeptTensors(Mapping[str, Tensor]):
    """Symmetric matrices in a scratch, each read when it is asked for."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch, self._names = scratch, dict[str, None]()

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a matrix."""
        self._scratch.put((id(self), name), _halved(tensor))
        self._names[name] = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return _mirrored(self._scratch.get((id(self), name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class KeptMoments(Mapping[str, Moments]):
    """Moments of the dense network in a scratch; weights that take the same rows share them."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        # Weight → the first of its rows, how many there are, and whether the moment is a matrix
        self._known: dict[str, tuple[str, int, bool]] = {}

    def put(self, names: Sequence[str], moments: Moments) -> None:
        """Keep the moments of these weights."""
        parts, second = [moments.mean], moments.second
        if isinstance(second, RowMoment):
            parts += [second.left.values, second.left.centre, second.weights]
        is_matrix = isinstance(second, Tensor) and second is not moments.mean
        parts += _halved(second) if is_matrix else []
        self._scratch.put((id(self), names[0]), parts)
        self._known |= dict.fromkeys(names, (names[0], moments.rows, is_matrix))

    def __getitem__(self, name: str) -> Moments:
        first, rows, is_matrix = self._known[name]
        mean, *seconds = self._scratch.get((id(self), first))
        if seconds and not is_matrix:
            values, centre, weights = seconds
            return Moments.of_rows(rows, [mean], [CentredRows(values, centre)], weights)
        second = _mirrored(seconds) if is_matrix else mean
        return Moments(rows, mean, second, mean, second, second)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def _halved(matrix: Tensor) -> list[Tensor]:
    """A symmetric matrix (…, N, N) as panels of rows, each from the diagonal on."""
    panels = (matrix[..., k : k + _PANEL, k:] for k in range(0, matrix.shape[-1], _PANEL))
    return [panel.clone(memory_format=torch.contiguous_format) for panel in panels]


def _mirrored(panels: Sequence[Tensor]) -> Tensor:
    """The matrix that :func:`_halved` took apart."""
    width = panels[0].shape[-1]
    matrix = panels[0].new_empty(*panels[0].shape[:-2], width, width)
    for k, panel in zip(range(0, width, _PANEL), panels, strict=True):
        matrix[..., k : k + _PANEL, k:] = panel
        matrix[..., k + _PANEL :, k : k + _PANEL] = panel[..., _PANEL:].mT
    return matrix


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
    first = to_device({name: values[:WATCHED] for name, values in batches[0].items()}, device)
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
        if isinstance(dense.moments[name].second, RowMoment):
            yield from _row_entries(dense, name)
        elif shapes[name].second != shapes[name].mean:
            second = lambda name=name: dense.moments[name].second  # noqa: E731
            yield entry(f"second {name}", shapes[name].second, second)


def _row_entries(dense: DensePass, name: str) -> Iterator[Entry]:
    """A second moment that is kept as rows: these one after another, their centre and their weights."""
    reads: dict[str, Callable[[], Tensor]] = {
        "values": lambda: dense.moments[name].second.left.values.flatten(),
        "centre": lambda: dense.moments[name].second.left.centre,
        "weights": lambda: dense.moments[name].second.weights,
    }
    for part, read in reads.items():
        info = Entry.of(f"{part} {name}", read()).info
        yield Entry(info, read)


def _rows_of(file: _Tensors, name: str, mean: Tensor, rows: int) -> Moments:
    """The moments that :func:`_row_entries` wrote."""
    weights = file.take_all(f"weights {name}")
    values = file.take_all(f"values {name}", len(weights) * len(mean))
    centre = file.take(f"centre {name}", (len(mean),))
    return Moments.of_rows(rows, [mean], [CentredRows(values.view(-1, len(mean)), centre)], weights)


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
        names = [other for other, first in trace.same_rows.items() if first == name]
        if f"values {name}" in file.left:
            dense.moments.put(names, _rows_of(file, name, mean, rows))
            continue
        second = mean if shape.second == shape.mean else file.take(f"second {name}", shape.second)
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

    def take_all(self, name: str, count: int | None = None) -> Tensor:
        """A vector in float64 or, where its length is known, in float32 too."""
        info = self._item.tensors.infos.get(name)
        known = info is not None and count is not None and info.dtype == "float32"
        length = info.numel if count is None and info is not None else count or 0
        return self.take(name, (length,), torch.float32 if known else torch.float64)

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
