"""Allocate bytes to layers that stay dense and are rounded, and say what other methods reach in these bytes.

A squared step costs κ: how far the network's held-out outputs move when the layer alone is rounded with it.
The best bits of N numbers are b + ½ log₂ κ/N up to a constant.  Layers are rounded in order, each to the
inputs that the rounded layers before it give, and so mend a part of what those lose; κ of the dense network
says nothing of that, nor of errors as large as few bits make them.  So only the share ``_TRUST`` of what it
asks for is done, and each layer keeps the share ``_LEAST`` of the bits that all have together.

Beside the result stand rounding to nearest, each layer in the bytes that it takes, and GPTQ, whose layers
share all these bytes by κ.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mpoc.compression.budget import UnreachableSizeError, allocate, fewest_bits
from mpoc.compression.calibrate.calibrated_rounding import feedback_of, gptq_weight, rows_of
from mpoc.compression.calibrate.candidates import costs_of
from mpoc.compression.calibrate.objective import Objective, one_matrix
from mpoc.compression.calibrate.output_distance import OutputDistance, Replacement
from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.compression.plan import LayerPlan
from mpoc.compression.recipe import Recipe
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.coded_parts import Rounding, values_of_all, with_codes
from mpoc.io.manifest import LayerRecord
from mpoc.io.open_checkpoint import read_finite
from mpoc.quantize.codes import HALF_OCTAVES, QuantizedTensor
from mpoc.quantize.feedback import best_exponents, typical_error, weights_of
from mpoc.quantize.storage import GRID_BITS
from mpoc.tensor_networks.fit.metric import Metric
from mpoc.tensor_networks.forms.layout import from_matrix
from mpoc.tensor_networks.structure import low_rank_structure

_TRUST, _LEAST = 0.75, 0.4
_PROBE_BITS = 3.0  # at which movements are measured
_FEWEST_BITS = 0.25
_MANY_BITS = 7.0  # with which a layer gives what it gave, as far as the layers behind it can tell
_ATTEMPTS = 3  # at a share of bits whose whole file is within the size
_GAUSSIAN = 2.047  # entropy in bits of a normal variable, in units of its standard deviation


def bits_by_movement(
    plans: Sequence[LayerPlan],
    statistics: CalibrationStatistics,
    checkpoint: Checkpoint,
    recipe: Recipe,
    distance: OutputDistance,
    predict_size: Callable[[list[LayerPlan]], int],
) -> list[LayerPlan]:
    """The plans with the bytes of rounded dense layers shared out by how far each moves the outputs.

    Args:
        plans: with the same bits in all layers that have none of their own.
        statistics: of the dense network.
        checkpoint: to read weights from.
        recipe: its options.
        distance: of held-out outputs.
        predict_size: bytes of the weight files under a plan, an upper bound.

    Raises:
        UnreachableSizeError: no bits are within the size.
    """
    size = int(recipe.size or 0)
    sharing = [p for p in plans if p.rounding and p.is_dense and recipe.rule_for(p.map.name).bits is None]
    movements = _movements(sharing, statistics, checkpoint, distance, recipe.seed)
    spare = size - predict_size(list(plans))
    for _ in range(_ATTEMPTS):  # what the manifest says of other bits may be longer
        allotted = allocate_bits(sharing, movements, spare) if sharing else []
        new = {plan.map.name: plan for plan in allotted}
        shared = [new.get(plan.map.name, plan) for plan in plans]
        excess = predict_size(shared) - size
        if excess <= 0:
            return shared
        spare = _taken(allotted) - _taken(sharing) - excess
    fewest = {p.map.name: p.rounded_to(fewest_bits(_storage([p]))) for p in sharing}
    raise too_small(size, predict_size([fewest.get(plan.map.name, plan) for plan in plans]))


def are_nearly_exact(plans: Sequence[LayerPlan]) -> bool:
    """Whether layers keep so many bits that inputs in the compressed network are the dense ones."""
    return all(plan.is_dense and (plan.is_unchanged or _bits(plan) >= _MANY_BITS) for plan in plans)


def too_small(size: int, least: int) -> UnreachableSizeError:
    """The error of a budget of bytes that not even what a calibration records fits into.

    Args:
        size: asked for.
        least: bytes that can be had.
    """
    problem = f"--size {size}: with what calibration records of each layer the output has {least} bytes"
    return UnreachableSizeError(problem, f"--size {least}")


def _movements(
    plans: Sequence[LayerPlan],
    statistics: CalibrationStatistics,
    checkpoint: Checkpoint,
    distance: OutputDistance,
    seed: int,
) -> dict[str, float]:
    """The least :func:`movement` of each layer whose inputs are known, measured once for every budget."""
    known = {name for group in statistics.groups for name in group}
    context = replace(statistics.context, later=statistics.workload.fits(statistics.pass_seconds))
    measured = [plan for plan in plans if plan.map.name in known]
    kept = _kept(statistics)
    new = [plan for plan in measured if plan.map.name not in kept]
    places = {plan.map.name: place for place, plan in enumerate(new, start=1)}

    def measure(plan: LayerPlan) -> tuple[float, float]:
        context.log("what rounding would cost: layer", places[plan.map.name], len(new))
        return _both_movements(plan, statistics, checkpoint, distance, seed)

    kept.update(zip(places, context.group.map(new, measure, costs_of(new)), strict=True))
    return {plan.map.name: min(kept[plan.map.name]) for plan in measured}


def errors_move_between_rows(
    plan: LayerPlan,
    statistics: CalibrationStatistics,
    checkpoint: Checkpoint,
    distance: OutputDistance,
    seed: int,
) -> bool:
    """Whether held-out outputs move less where errors of a layer may move between its rows.

    The metric of the outputs may be known too badly for that: from few examples, most of them without
    gradients.
    """
    kept, name = _kept(statistics), plan.map.name
    if name not in kept:
        kept[name] = _both_movements(plan, statistics, checkpoint, distance, seed)
    alone, between = kept[name]
    return between < alone


def _kept(statistics: CalibrationStatistics) -> dict[str, tuple[float, float]]:
    """Movements by the weight's name: where errors stay in their rows, and where they move between them."""
    kept: dict[str, tuple[float, float]] = statistics.kept.setdefault("movements", {})
    return kept


def _both_movements(
    plan: LayerPlan,
    statistics: CalibrationStatistics,
    checkpoint: Checkpoint,
    distance: OutputDistance,
    seed: int,
) -> tuple[float, float]:
    weight = read_finite(checkpoint, plan.map.name).to(statistics.context.device)
    objective = statistics.dense_objective(plan.map.name)
    matrix = one_matrix(weight, plan.map.kind, plan.map.transposed)
    metric = objective.metric(matrix, objective.usual_gamma)
    distance = distance.of_some
    alone = movement(plan, matrix, metric, objective, distance, seed)
    if metric.outputs is None or metric.outputs.dim() == 1:
        return alone, alone
    return alone, movement(plan, matrix, metric, objective, distance, seed, True)


def movement(
    plan: LayerPlan,
    matrix: Tensor,
    metric: Metric,
    objective: Objective,
    distance: OutputDistance,
    seed: int,
    between_rows: bool = False,
) -> float:
    """How far held-out outputs move when a layer alone is rounded to about ``_PROBE_BITS``.

    Args:
        plan: of the layer.
        matrix: its weight, as :func:`mpoc.compression.calibrate.objective.one_matrix` makes it.
        metric: of its inputs and outputs.
        objective: on the dense network's inputs.
        distance: of outputs.
        seed: of the errors, which have the size and the shape of those of rounding with feedback.
        between_rows: whether feedback moves errors between rows too.
    """
    feedback, rows = feedback_of(metric.inputs), rows_of(metric.outputs, between_rows)
    weights = metric.inputs.diagonal() if feedback is None else feedback.weights
    sides = best_exponents(weights_of(rows), len(matrix)), best_exponents(weights, matrix.shape[1])
    by_row, by_column = (HALF_OCTAVES[exponents.long()].to(matrix) for exponents in sides)
    steps = by_row[:, None] * by_column
    spread = float((matrix / steps).square().mean().sqrt())
    steps = steps * spread * 2 ** (_GAUSSIAN - _PROBE_BITS)
    generator = torch.Generator().manual_seed(zlib.crc32(plan.map.name.encode()) ^ seed)
    made = matrix - typical_error(steps, feedback, generator, rows).to(matrix)
    shift = objective.shift(matrix, made)
    structure = low_rank_structure(plan.map.kind, plan.map.shape, plan.map.transposed)
    replacement = Replacement(from_matrix(made[None].float(), structure), shift)
    return distance.of({plan.map.name: replacement})


def allocate_bits(
    plans: Sequence[LayerPlan], movements: Mapping[str, float], spare: int = 0, trust: float = _TRUST
) -> list[LayerPlan]:
    """The plans with the same bits in all, shared out by what rounding of each layer moves.

    Args:
        plans: dense layers, rounded to the same storage.
        movements: :func:`movement` by weight; layers without one count as the mean of the others.
        spare: bytes to be added to those of all layers together.
        trust: share of what the movements ask for.
    """
    wanted = _wanted(plans, movements)
    sizes = {plan.map.name: plan.structure.num_original for plan in plans}
    if _storage(plans) == "grid":
        return _on_grids(plans, {name: trust * more for name, more in wanted.items()}, spare)
    given = {plan.map.name: _bits(plan) for plan in plans}
    more = {name: given[name] + trust * wanted[name] for name in sizes}
    rounded_up = len(sizes)  # bytes
    total = sum(given[name] * sizes[name] for name in sizes) + 8 * (spare - rounded_up)
    return _of_bits(plans, _within(more, sizes, total))


def _wanted(plans: Sequence[LayerPlan], movements: Mapping[str, float]) -> dict[str, float]:
    """½ log₂ κ/N of each layer less its mean; 0 where it is not known."""
    sizes = {plan.map.name: plan.structure.num_original for plan in plans}
    wanted = {
        name: 0.5 * math.log2(moved / sizes[name])
        for name, moved in movements.items()
        if name in sizes and 0 < moved < math.inf
    }
    known = sum(sizes[name] for name in wanted)
    mean = sum(sizes[name] * more for name, more in wanted.items()) / known if known else 0.0
    return {name: wanted.get(name, mean) - mean for name in sizes}


def _within(bits: Mapping[str, float], sizes: Mapping[str, int], total: float) -> dict[str, float]:
    """The bits moved alike until they take ``total``, none below the fewest."""
    mean = total / sum(sizes.values())
    least = max(_FEWEST_BITS, _LEAST * mean)
    low, high = -max(bits.values()), mean + max(abs(b) for b in bits.values())
    for _ in range(60):
        middle = (low + high) / 2
        used = sum(sizes[name] * max(least, b + middle) for name, b in bits.items())
        low, high = (low, middle) if used > total else (middle, high)
    return {name: max(least, b + low) for name, b in bits.items()}


def _on_grids(plans: Sequence[LayerPlan], more: Mapping[str, float], spare: int) -> list[LayerPlan]:
    """Widths of grids by equal marginal gain: an error falls by four with each bit."""
    widths = _grid_widths(plans, more, spare + _taken(plans))
    return list(plans) if widths is None else _of_bits(plans, widths)


def _grid_widths(plans: Sequence[LayerPlan], more: Mapping[str, float], budget: int) -> dict[str, int] | None:
    """The bits of each layer; None where even the fewest are above the budget."""
    curves: list[list[tuple[int, float]]] = []
    for plan in plans:
        size, gain = plan.structure.num_original, 4.0 ** more[plan.map.name]
        grids = [replace(plan, rounding=Rounding("grid", bits)) for bits in GRID_BITS]
        stored = [grid.record().stored_bytes for grid in grids]
        curves.append(list(zip(stored, (size * gain * 4.0**-bits for bits in GRID_BITS), strict=True)))
    taken = allocate(curves, budget)
    if taken is None:
        return None
    return {plan.map.name: GRID_BITS[k] for plan, k in zip(plans, taken, strict=True)}


def _of_bits(plans: Sequence[LayerPlan], bits: Mapping[str, float]) -> list[LayerPlan]:
    return [plan.rounded_to(bits[plan.map.name]) for plan in plans]


def _taken(plans: Sequence[LayerPlan]) -> int:
    return sum(plan.record().stored_bytes for plan in plans)


def _bits(plan: LayerPlan) -> float:
    assert plan.rounding is not None
    return plan.rounding.bits


def _storage(plans: Sequence[LayerPlan]) -> str:
    assert plans[0].rounding is not None
    return plans[0].rounding.storage


class SameSize:
    """What other methods reach in the bytes of a compression all of whose layers are rounded.

    Args:
        statistics: of the dense network.
        checkpoint: to read weights from.
        plans: of all layers.
    """

    def __init__(
        self, statistics: CalibrationStatistics, checkpoint: Checkpoint, plans: Sequence[LayerPlan]
    ) -> None:
        self._statistics, self._checkpoint = statistics, checkpoint
        self._plans = [plan for plan in plans if plan.rounding is not None]
        self._kept: dict[str, tuple[LayerRecord, Sequence[QuantizedTensor]]] = {}

    def keep(self, record: LayerRecord, nearest: Sequence[QuantizedTensor] = ()) -> None:
        """Keep a layer's record as written and, unless memory is to be spared, its codes without feedback."""
        self._kept[record.name] = record, () if self._statistics.scratch.is_required else nearest

    def likeness(self, distance: OutputDistance, gptq: bool) -> dict[str, dict[str, float]]:
        """The likeness of ``rounded to nearest`` and, where two bits are not too many, of ``GPTQ``."""
        nearest = {plan.map.name: self._nearest(plan) for plan in self._plans}
        found = {"rounded to nearest": distance.likeness_of(nearest)}
        if gptq and (widths := self._widths()):
            found["GPTQ"] = distance.likeness_of(dict(map(self._by_gptq, widths.items())))
        return found

    def _nearest(self, plan: LayerPlan) -> Replacement:
        record, codes = plan.record(), self._kept[plan.map.name][1]
        if not codes:
            assert plan.rounding is not None
            codes = plan.rounding.codes(record, [read_finite(self._checkpoint, plan.map.name)])
        (made,) = values_of_all(with_codes(record, codes), codes)
        return Replacement(self._statistics.scratch.mapped(made), None)

    def _widths(self) -> dict[str, int] | None:
        """The bits of each layer that share the bytes written by what rounding of each moves."""
        budget = sum(record.stored_bytes for record, _ in self._kept.values())
        movements = {name: min(both) for name, both in _kept(self._statistics).items()}
        return _grid_widths(self._plans, _wanted(self._plans, movements), budget)

    def _by_gptq(self, width: tuple[str, int]) -> tuple[str, Replacement]:
        name, bits = width
        known = any(name in group for group in self._statistics.groups)
        objective = self._statistics.dense_objective(name) if known else None
        weight = read_finite(self._checkpoint, name)
        made = gptq_weight(weight, self._kept[name][0], objective, bits)
        return name, Replacement(self._statistics.scratch.mapped(made), None)
