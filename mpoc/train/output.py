"""Write a trained network as a file of the same kind: same names, same stored dtypes.

The file records its training as plain data, from which ``mpoc eval`` restores preprocessing, tokenizer and
classes.  Errors against the original weights no longer hold and are dropped.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.io import hub_directory
from mpoc.io.atomic import staged
from mpoc.io.coded_parts import (
    coded_entries,
    fits_half,
    halved_entry,
    matrix_of,
    tensor_of,
    values_of_all,
    with_codes,
)
from mpoc.io.manifest import HALF, CodedPart, LayerRecord, Manifest
from mpoc.io.open_checkpoint import CompressedCheckpoint
from mpoc.io.safetensors_header import TensorInfo
from mpoc.io.safetensors_writer import Entry, plan_shards, write_safetensors
from mpoc.io.training_history import metadata, write_history
from mpoc.models.loading import Model
from mpoc.models.saving import changed_manifest, changed_record
from mpoc.quantize.codes import GridTensor, QuantizedTensor
from mpoc.runtime.formatting import rounded
from mpoc.train.monitor import Outcome
from mpoc.train.settings import Settings
from mpoc.train.tasks import Task
from mpoc.train.training_data import TrainingData, monitored_split

# Multiples of steps beyond this are no whole numbers in float32.
_MOST_MULTIPLE = 2.0**24


def data_record(training_data: TrainingData) -> dict[str, Any]:
    """Identifies the data set, in the history and when a training resumes."""
    data = training_data.data
    held_out = {"held_out": training_data.held_out} if training_data.held_out else {}
    return {
        "name": data.path.resolve().name,
        "format": data.format,
        "splits": {name: len(split) for name, split in data.splits.items()},
        "fingerprint": training_data.fingerprint,
    } | held_out


def make_history(
    settings: Settings,
    training_data: TrainingData,
    task: Task,
    outcome: Outcome,
    results: list[dict[str, Any]],
) -> dict[str, Any]:
    """The training history that the file stores; without times, so that equal trainings give equal bytes.

    Args:
        settings: settings of the training.
        training_data: the data set.
        task: what was trained.
        outcome: outcome of the run that is written.
        results: scores of every run, with its ``seed``; the last is that of ``outcome``.
    """
    data, monitored = training_data.data, monitored_split(training_data.data)
    history: dict[str, Any] = {
        "data": data_record(training_data),
        "task": task.name,
        "metric": task.metric,
        "split": monitored or "",
        "steps": outcome.steps,
        "settings": {**asdict(settings), "lr": settings.peak},
        "evaluations": outcome.evaluations,
    }
    if monitored:
        history |= {"start": outcome.evaluations[0], "final": outcome.chosen}
    if "test" in data.splits and monitored != "test":
        history["test"] = {name: value for name, value in results[-1].items() if name != "seed"}
    if data.kind == "images":
        history["images"] = training_data.images.as_dict()
    if training_data.classes and task.name == "classification":
        history["classes"] = training_data.classes
    if data.tokenizer is not None:
        history["tokenizer"] = data.tokenizer.state()
    return history | (_statistics(task, results) if len(results) > 1 else {})


def _statistics(task: Task, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The results of all runs, with mean and deviation of the metric (Gao et al. 2020, Eqs. 10 and 11)."""
    name = task.metric if task.metric in results[0] else "train_loss"
    values = [result[name] for result in results]
    mean, sigma = statistics.fmean(values), statistics.stdev(values)
    return {"runs": results, "mean": rounded(mean), "sigma": rounded(sigma)}


def write_tuned(
    model: Model, weights: dict[str, Tensor], training: dict[str, Any], output: Path, max_shard_size: int
) -> Manifest | None:
    """Write the file of ``model`` with other weights.

    Args:
        model: that was trained.
        weights: trained tensors by their names in the network.
        training: the training history; that of ``model`` is appended as ``earlier``.
        output: a directory where the source is one, else a file; appears complete or not at all.
        max_shard_size: in bytes; directories only.

    Returns:
        The manifest; None for a dense model.
    """
    entries = tuned_entries(model, weights)
    history = {**training, **({"earlier": model.history} if model.history else {})}
    manifest = None if model.manifest is None else _tuned_manifest(model, entries, history)
    with staged(output) as target:
        if not model.stored.is_directory:
            recorded = {"mpoc": manifest.to_json()} if manifest else metadata(history)
            write_safetensors(target, entries, model.stored.own_metadata | recorded)
            return manifest
        target.mkdir()
        hub_directory.copy_other_files(model.path, target, model.stored.weight_files)
        shards = plan_shards(entries, max_shard_size, model.stored.stem)
        hub_directory.write_shards(target, shards, model.stored)
        if manifest is not None:
            hub_directory.unmark(target)  # the model card describes the cores before the training
            hub_directory.mark_compressed(target, manifest)
        else:
            write_history(target, history)
    return manifest


@dataclass(frozen=True)
class CodePrices:
    """What entropy-coded integers cost, by their frequencies before a training.

    Codes whose prices sum up to no more than before can be coded in as many bits: their own frequencies code
    them in no more than any others do (Gibbs' inequality).
    """

    start: Tensor  # the integers before the training
    bits: Tensor  # price of each integer from ``first``; the two ends are those that did not occur
    first: int

    @classmethod
    def of(cls, codes: Tensor) -> CodePrices:
        """Those of integers of any shape."""
        first = int(codes.min()) - 1
        counts = torch.bincount((codes.long() - first).flatten(), minlength=int(codes.max()) - first + 2)
        return cls(codes, math.log2(codes.numel() + 1) - counts.clamp(min=0.5).log2(), first)

    def of_each(self, codes: Tensor) -> Tensor:
        """The price of each code, in bits."""
        return self.bits[(codes.long() - self.first).clamp(0, len(self.bits) - 1)]

    def hold(self, exact: Tensor, found: Tensor, less: float = 0.0) -> Tensor:
        """``found`` without its dearer changes of least movement, in as many bits as before.

        Args:
            exact: the numbers in steps.
            found: the integers nearest to them, of the same shape.
            less: take this many bits less than that and than ``found``, as far as undoing changes does it.
        """
        start = self.start.to(found.dtype)
        places = torch.nonzero((found != start).flatten()).flatten()
        before, after = start.flatten()[places], found.flatten()[places]
        growth = self.of_each(after) - self.of_each(before)
        excess = min(max(float(growth.sum()), 0.0) + less, float(growth.clamp(min=0).sum()))
        if excess <= 0:
            return found
        moved = torch.where(growth > 0, (exact.flatten()[places] - before).abs(), torch.inf)
        order = moved.argsort(stable=True)
        undone = order[: int((growth[order].clamp(min=0).cumsum(0) < excess).sum()) + 1]
        held = found.flatten().index_copy(0, places[undone], before[undone])
        return held.view(found.shape)


@dataclass(frozen=True)
class StoredSteps:
    """The numbers that a parameter in few bits can be: multiples of its steps.

    On a grid they lie between limits; where they are entropy-coded, they cost no more bits than before.
    """

    steps: Tensor  # of the shape of the parameter
    inverse: Tensor  # 1 / steps; 0 where a step is 0
    lowest: Tensor | None = None  # multiple on a grid, of the same shape
    levels: int = 0  # multiples on a grid
    prices: CodePrices | None = None  # of entropy-coded multiples

    @classmethod
    def of(cls, part: CodedPart, codes: QuantizedTensor, device: torch.device | str = "cpu") -> StoredSteps:
        """Those of stored codes."""
        steps = tensor_of(part, codes.steps()).to(device)
        inverse = torch.where(steps > 0, 1 / steps, 0)
        if not isinstance(codes, GridTensor):
            return cls(steps, inverse, prices=CodePrices.of(tensor_of(part, codes.codes).to(device)))
        return cls(steps, inverse, tensor_of(part, codes.lowest()).to(device), codes.spec.levels)

    def multiples(self, numbers: Tensor) -> Tensor:
        """The nearest multiples that can be stored."""
        exact = numbers * self.inverse
        found = torch.round(exact)
        if self.lowest is not None:
            return torch.minimum(torch.maximum(found, self.lowest), self.lowest + (self.levels - 1))
        found.clamp_(-_MOST_MULTIPLE, _MOST_MULTIPLE)
        return found if self.prices is None else self.prices.hold(exact, found)

    def nearest(self, numbers: Tensor) -> Tensor:
        """The nearest numbers that can be stored."""
        return self.multiples(numbers) * self.steps


def hold_to_steps(model: Model, device: torch.device) -> None:
    """Have training on a device compute with what the file can hold: parameters get ``stored_steps``."""
    for layer in model.manifest.changed if model.manifest is not None else ():
        for part in layer.coded_parts:
            assert isinstance(model.stored, CompressedCheckpoint)
            parameter: Any = model.network.get_parameter(model.places[part.name])
            parameter.stored_steps = StoredSteps.of(part, model.stored.codes(part.name), device)


@torch.no_grad()
def round_to_stored(model: Model, weights: dict[str, Tensor]) -> bool:
    """Round the network to what its file can hold, and keep its codes; whether that changed anything.

    Args:
        model: that was trained; keeps the codes that a file holds of its rounded layers.
        weights: trained tensors by their names in the network, of which they are a part unless it is sharded.
    """
    tensors = {**dict(model.network.named_parameters()), **dict(model.network.named_buffers())}
    narrowed = False
    for name, parameter in model.places.items():
        info, tensor = model.stored.infos.get(name), tensors.get(parameter)
        if info is None or tensor is None:
            continue
        dtype = getattr(torch, _written_dtype(model, info, tensor))
        if dtype.itemsize < tensor.dtype.itemsize:
            tensor.copy_(tensor.to(dtype))
            narrowed = True
    layers = model.manifest.changed if model.manifest is not None else []
    changed = [_rounded(model, layer, weights) for layer in layers if layer.storage]
    return narrowed or any(changed)


def _written_dtype(model: Model, info: TensorInfo, tensor: Tensor) -> str:
    """The dtype that a trained tensor is written in: float16 still holds a vector where that is harmless."""
    halved = isinstance(model.stored, CompressedCheckpoint) and model.stored.is_halved(info.name)
    return HALF if halved and fits_half(info.name, tensor) else info.dtype


def _rounded(model: Model, layer: LayerRecord, weights: dict[str, Tensor]) -> bool:
    """Round a trained layer to the nearest codes with its steps; False: it is as it was."""
    parts, stored = layer.coded_parts, model.stored
    trained = [weights.get(model.places[part.name]) for part in parts]
    own = [tensor.detach() for tensor in trained if tensor is not None]
    if len(own) < len(parts) or not isinstance(stored, CompressedCheckpoint):
        return False  # another process has them
    dtype = getattr(torch, layer.stored_dtype)
    pairs = list(zip(parts, own, strict=True))
    if all(torch.equal(tensor.cpu().to(dtype), stored.read(part.name)) for part, tensor in pairs):
        return False
    codes = [_codes(part, tensor, stored.codes(part.name)) for part, tensor in pairs]
    record = with_codes(layer, codes)
    values = values_of_all(record, codes)
    for tensor, value in zip(own, values, strict=True):
        tensor.copy_(value)
    changed = changed_record(record, values)
    model.rounded[layer.name] = changed, coded_entries(record, codes)
    return True


def _codes(part: CodedPart, tensor: Tensor, stored: QuantizedTensor) -> QuantizedTensor:
    """The nearest codes of a trained tensor, with the steps of the stored ones and in no more bytes."""
    steps = StoredSteps.of(part, stored)
    multiples = steps.multiples(tensor.cpu().float())
    codes = stored.of_multiples(matrix_of(part, multiples))
    spared = 0
    while steps.prices is not None and codes.nbytes > stored.nbytes:
        spared += 16 * (codes.nbytes - stored.nbytes)  # prices are those of one table, the stream has several
        held = steps.prices.hold(multiples, multiples, spared)
        if torch.equal(held, multiples):
            return stored
        multiples = held
        codes = stored.of_multiples(matrix_of(part, multiples))
    return codes


def tuned_entries(model: Model, weights: dict[str, Tensor]) -> list[Entry]:
    """Every tensor of the file, in order; those of the network as trained, in their stored dtypes."""
    stored = model.stored
    coded: dict[str, list[Entry]] = {}
    for layer in model.manifest.changed if model.manifest is not None else ():
        if isinstance(stored, CompressedCheckpoint) and layer.storage:
            names = layer.core_names or [layer.name]
            _, entries = model.rounded.get(layer.name) or (layer, _kept_codes(stored, layer))
            coded |= {name: [] for name in names} | {names[0]: entries}
    infos = list(stored.infos.values())
    if model.manifest is None:
        infos += [replace(stored.infos[first], name=alias) for alias, first in stored.tied.items()]
    trained = {name for name, _ in model.network.named_parameters(remove_duplicate=False)}
    entries = []
    for info in infos:
        own = coded.get(info.name)
        entries += [_entry(model, info, weights, trained)] if own is None else own
    return entries


def _kept_codes(stored: CompressedCheckpoint, layer: LayerRecord) -> list[Entry]:
    return [Entry.of(*item) for item in stored.coded_tensors(layer).items()]


def _entry(model: Model, info: TensorInfo, weights: dict[str, Tensor], trained: set[str]) -> Entry:
    name = model.places.get(info.name)
    if name is None or name not in weights:
        source, stored = model.stored.tied.get(info.name, info.name), model.stored
        if isinstance(stored, CompressedCheckpoint) and stored.is_halved(info.name):
            return halved_entry(Entry(info, lambda: stored.read(source)))
        return Entry(info, lambda: stored.read(source))
    info = replace(info, dtype=_written_dtype(model, info, weights[name]))

    def read() -> Tensor:
        tensor = weights[name].detach().to("cpu", getattr(torch, info.dtype))
        if name in trained and not bool(torch.isfinite(tensor).all()):
            raise MpocError(
                f"{model.path}: tensor {info.name!r} is not finite after the training", "a smaller --lr"
            )
        return tensor

    return Entry(info, read)


def _tuned_manifest(model: Model, entries: list[Entry], history: dict[str, Any]) -> Manifest:
    """The manifest with this history, without what was measured before the training."""
    assert model.manifest is not None
    tensors = {entry.info.name: entry for entry in entries}

    def tuned(layer: LayerRecord) -> LayerRecord:
        if layer.storage:
            return model.rounded.get(layer.name, (layer,))[0]
        if layer.form == "dense":
            return layer
        return changed_record(layer, [tensors[name].read() for name in layer.core_names])

    layers = tuple(map(tuned, model.manifest.layers))
    return replace(changed_manifest(model.manifest), layers=layers, training=history)
