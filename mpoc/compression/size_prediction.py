"""Predict an output without its data: its manifest, tensor names and shapes, and size in bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

import mpoc
from mpoc.compression.plan import LayerPlan
from mpoc.compression.recipe import GOALS, Recipe
from mpoc.compression.selection import Selection
from mpoc.io import hub_directory
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import HALF, LayerRecord, Manifest, Source, Spectrum, longest
from mpoc.io.safetensors_header import ITEMSIZE, TensorInfo, encode_header, storage_order
from mpoc.io.safetensors_writer import Entry, plan_shards
from mpoc.io.training_history import before_compression
from mpoc.tensor_networks.factors import LEARNED

# The most digits that a figure of the manifest can take.
LONGEST_FIGURE = 1.23456e-104
_MOST_OF_A_CODE = 10  # bytes


def make_manifest(
    checkpoint: Checkpoint, selection: Selection, recipe: Recipe, records: list[LayerRecord]
) -> Manifest:
    """The manifest of an output with these layer records."""
    goals = {g: getattr(recipe, g) for g in (*GOALS, "bits", "storage", "dtype")}
    options: dict[str, Any] = {key: value for key, value in goals.items() if value is not None}
    infos = checkpoint.infos
    left = {
        name: why
        for name, why in selection.left.items()
        if name in infos and (len(infos[name].shape) > 1 or name in checkpoint.left)
    }
    halved = halved_beside(selection, recipe, records)
    return Manifest(
        source=Source(
            checkpoint.path.resolve().name,
            _size_of_source(checkpoint),
            checkpoint.num_parameters,
            checkpoint.fingerprint(),
        ),
        layers=tuple(records),
        options=options | {"seed": recipe.seed},
        kinds_from=selection.source,
        left_alone=left,
        vectors=len(infos) - len(records) - len(left),
        tied=checkpoint.tied,
        tool=f"mpoc {mpoc.__version__}",
        architecture=checkpoint.architecture,
        training=before_compression(checkpoint.history),
        measured=checkpoint.measured,
        halved="float32" if halved else "",
    )


def halved_beside(selection: Selection, recipe: Recipe, records: Sequence[LayerRecord]) -> frozenset[str]:
    """The vectors that an output with these layers holds as float16; none without codes, or with a dtype."""
    has_codes = any(record.storage for record in records)
    return selection.halved if has_codes and recipe.dtype is None else frozenset()


def _size_of_source(checkpoint: Checkpoint) -> int:
    """Bytes of the source: its weight files and, in a directory, the other files that are copied."""
    return checkpoint.nbytes_on_disk + _copied(checkpoint)


def _copied(checkpoint: Checkpoint) -> int:
    """Bytes of what is copied beside the weights of a directory: tokenizer, config, card."""
    if not checkpoint.is_directory:
        return 0
    return hub_directory.size_of_other_files(checkpoint.path, checkpoint.weight_files)


def predict_weight_bytes(
    checkpoint: Checkpoint,
    selection: Selection,
    recipe: Recipe,
    plans: list[LayerPlan],
    calibration: dict[str, Any] | None = None,
    records: list[LayerRecord] | None = None,
) -> int:
    """What ``--size`` limits: weight files with headers, the manifest, and what other files grow by."""
    return predict_size(checkpoint, selection, recipe, plans, records, calibration) - _copied(checkpoint)


def predict_size(
    checkpoint: Checkpoint,
    selection: Selection,
    recipe: Recipe,
    plans: list[LayerPlan],
    records: list[LayerRecord] | None = None,
    calibration: dict[str, Any] | None = None,
) -> int:
    """Bytes of the whole output, an upper bound: figures still unknown are given their most digits.

    With ``calibration``, the facts at their longest, layers are taken to have the figures of a fit to data.
    """
    undecided: list[LayerPlan] = []
    if records is None:
        undecided = [plan for plan in plans if plan.is_open and not recipe.allow_growth]
        records = [_with_longest_figures(plan.record(), plan.is_open) for plan in plans]
    if calibration is not None:
        alone = calibration.get("reasons", {})  # layers fitted by their weights
        records = [r if r.name in alone else _with_calibrated_figures(r) for r in records]
    manifest = make_manifest(checkpoint, selection, recipe, records)
    manifest = replace(manifest, calibration=calibration or {})
    changed = {record.name: record for record in manifest.changed}
    halved = halved_beside(selection, recipe, records)
    infos: list[TensorInfo] = []
    for name, info in checkpoint.infos.items():
        own = replace(info, dtype=HALF) if name in halved else info
        infos += stored_infos(changed[name]) if name in changed else [own]
    data = sum(info.nbytes for info in infos)
    data += sum(_more_than_planned(plan) for plan in undecided)
    if not checkpoint.is_directory:
        metadata = checkpoint.own_metadata | {"mpoc": manifest.to_json()}
        return data + len(encode_header(storage_order(infos), metadata))
    entries = [Entry(info, lambda: torch.empty(0)) for info in infos]
    shards = plan_shards(entries, recipe.max_shard_size, checkpoint.stem)
    return data + hub_directory.overhead(checkpoint, shards, manifest)


def _more_than_planned(plan: LayerPlan) -> int:
    """Bytes, perhaps negative, that a layer of open bonds can take beyond its largest cores.

    Such a layer ends with fewer parameters than the weight has, or dense.
    """
    record = plan.record()
    widest = max(ITEMSIZE[record.dtype], ITEMSIZE[record.stored_dtype])
    if plan.rounding is not None:  # a short row takes a word and its scale
        widest = _MOST_OF_A_CODE
    return record.num_original * widest - record.stored_bytes


def _with_longest_figures(record: LayerRecord, in_tolerance: bool) -> LayerRecord:
    if not record.is_changed:
        return record
    if record.form == "dense":
        return replace(record, relative_error=LONGEST_FIGURE)
    if record.order == LEARNED:  # any permutation takes as many digits
        record = replace(record, order=tuple(range(prod(record.input_factors))))
    figures = (LONGEST_FIGURE,) * (0 if record.structure.parts else len(record.inner_bonds))
    return replace(
        record,
        relative_error=LONGEST_FIGURE,
        entropies=figures,
        entropies_of_weight=figures,
        spectra_of_weight=_longest_spectra(record, in_tolerance),
    )


def _longest_spectra(record: LayerRecord, in_tolerance: bool) -> tuple[Spectrum | None, ...]:
    """The longest spectra that a chain records: of one bond, the first that is cut or one before it.

    A whole map that is too large to be formed records every bond.
    """
    structure, sizes = record.structure, record.structure.site_sizes
    if not structure.topology.in_line or structure.parts or len(sizes) < 2:
        return ()
    lefts = [math.prod(sizes[:k]) for k in range(1, len(sizes))]
    smaller = [min(left, math.prod(sizes) // left) for left in lefts]
    spectra = [longest(size, LONGEST_FIGURE) for size in smaller]
    if structure.is_large_map:
        return tuple(spectra)
    cuts = [k for k, size in enumerate(smaller) if record.bonds[k + 1] < size]
    if not cuts and not in_tolerance:
        return ()
    last = cuts[0] if cuts else len(smaller) - 1
    return (*[None] * (len(smaller) - 1), max(spectra[: last + 1], key=len))


def _with_calibrated_figures(record: LayerRecord) -> LayerRecord:
    if not record.is_changed or record.output_error is not None:  # they are known
        return record
    longest = LONGEST_FIGURE
    others = ("rounded to nearest",) if record.storage else ("plain svd", "whitened svd", "plain mpo")
    same_size = dict.fromkeys(("this", *others), longest)
    calibrated = replace(record, output_error=longest, held_out_error=longest, same_size=same_size)
    return replace(calibrated, entropies_of_weight=(), spectra_of_weight=())


def stored_infos(record: LayerRecord) -> list[TensorInfo]:
    """The tensors that stand for the weight of a planned layer; coded streams at their longest."""
    if record.storage:
        parts = record.coded_parts
        each = -(-(record.nbytes or 0) // len(parts))
        return [info for part in parts for info in part.file_infos(each)]
    cores = zip(record.core_names, record.core_shapes, strict=True)
    return [TensorInfo(name, record.stored_dtype, shape) for name, shape in cores]
