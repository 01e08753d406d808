"""One layer's part of the work: read and check its weight, factorise it within its goal, record it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mpoc.compression.plan import LayerPlan, leave_dense_unless_smaller
from mpoc.compression.recipe import Recipe
from mpoc.errors import MpocError, excluding
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import LayerRecord, Spectrum, bond_fields, thinned
from mpoc.io.open_checkpoint import read_finite
from mpoc.runtime.formatting import rounded
from mpoc.tensor_networks.fit.decompose import decompose, learn_order
from mpoc.tensor_networks.fit.truncation import Target, largest
from mpoc.tensor_networks.fit.tt_svd import Fit
from mpoc.tensor_networks.forms.form import Form

# Trial factorisations of a layer under a tolerance.
_TRIALS = 6
# An approximation whose norm is this many times the weight's is none: its error is larger than of nothing.
_FAR = 4


@dataclass(frozen=True)
class Fitted:
    """A layer as it is to be stored."""

    record: LayerRecord
    cores: Sequence[Tensor] = ()  # in the stored dtype; none where the layer stays dense
    changed: Mapping[str, Tensor] = field(default_factory=dict)  # other tensors that go with it: a bias
    losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of a block refined with it


def fit_layer(checkpoint: Checkpoint, plan: LayerPlan, recipe: Recipe, device: torch.device) -> Fitted:
    """Carry out a layer's plan.

    Args:
        checkpoint: to read the weight from.
        plan: plan of the layer.
        recipe: for the seed, and whether a layer may grow.
        device: to compute on.

    Returns:
        The record of what is to be stored, and the cores.

    Raises:
        MpocError: a weight that is not finite, cores that overflow, a tolerance that cannot be kept.
    """
    if plan.is_dense:
        return Fitted(plan.record())
    name = plan.map.name
    weight = read_finite(checkpoint, name).to(device)
    plan, fit = _fit_ordered(weight, plan, zlib.crc32(name.encode()) ^ recipe.seed)
    check_finite_cores(fit.form, weight, checkpoint, plan)
    if not recipe.allow_growth:
        plan = leave_dense_unless_smaller(plan, fit.form.num_parameters)
    if plan.is_dense:
        return Fitted(plan.record())
    if not math.isfinite(fit.relative_error):
        raise MpocError(
            f"{checkpoint.files[name]}: tensor {name!r}: its numbers are too large to be factorised"
        )
    record = replace(
        plan.record(),
        num_stored=fit.form.num_parameters,
        **bond_fields(plan.structure, fit.form.bonds),
        relative_error=rounded(fit.relative_error),
        entropies=tuple(map(rounded, fit.entropies)),
        entropies_of_weight=_known(fit.entropies_of_weight),
        spectra_of_weight=_spectra(fit),
    )
    return Fitted(record, fit.form.cores)


def _fit_ordered(weight: Tensor, plan: LayerPlan, seed: int) -> tuple[LayerPlan, Fit]:
    """The fit; with an order that is to be learnt, and is then in the plan, where it serves."""
    fit = _fit_within(weight, plan, seed)
    if not plan.learns_order:
        return plan, fit
    plan = replace(plan, learns_order=False)
    order = learn_order(weight, plan.structure, max(fit.form.bonds, default=1))
    ordered = replace(plan, structure=replace(plan.structure, order=order))
    reordered = _fit_within(weight, ordered, seed)
    return (ordered, reordered) if _goodness(reordered) < _goodness(fit) else (plan, fit)


def _goodness(fit: Fit) -> tuple[int, float]:
    return fit.form.num_parameters, fit.relative_error


def _fit_within(weight: Tensor, plan: LayerPlan, seed: int) -> Fit:
    """Factorised once; under a tolerance, the smallest of several that keep it.

    Where the spectra end early, bonds cannot use up their share of the error, and rounding to the stored
    dtype adds some.  So what may be spent is found by bisection on the error that comes out.
    """
    target = Target(getattr(torch, plan.stored_dtype), seed)
    tolerance = plan.truncation.tolerance
    if not tolerance:
        return decompose(weight, plan.structure, plan.truncation, target)
    best: Fit | None = None
    low, high = 0.0, tolerance * math.sqrt(len(plan.structure.site_sizes))
    spend = tolerance
    for _ in range(_TRIALS):
        fit = decompose(weight, plan.structure, replace(plan.truncation, tolerance=spend), target)
        if fit.relative_error <= tolerance:
            low = spend
            if best is None or fit.form.num_parameters < best.form.num_parameters:
                best = fit
        else:
            high = spend
        spend = (low + high) / 2
    if best is not None:
        return best
    raise MpocError(
        f"layer {plan.map.layer}: relative error {tolerance:g} cannot be kept in "
        f"{plan.stored_dtype}: rounding the cores takes it to {fit.relative_error:.2g}",
        "--dtype float32, or a larger --max-error",
    )


def check_finite_cores(form: Form, weight: Tensor, checkpoint: Checkpoint, plan: LayerPlan) -> None:
    """Whether cores survived the rounding to their stored dtype, and what they make that to the weight's.

    Raises:
        MpocError: a number overflows.
    """
    named = f"{checkpoint.files[plan.map.name]}: tensor {plan.map.name!r}"
    if not all(bool(torch.isfinite(core).all()) for core in form.cores):
        raise MpocError(f"{named}: its cores overflow {plan.stored_dtype}", "--dtype bfloat16 or float32")
    most = torch.finfo(weight.dtype).max
    if largest(weight) * math.sqrt(weight.numel()) < most / _FAR:  # above ‖W‖: an approximation is not near
        return
    if not bool((form.double().to_weight().abs() <= most).all()):
        raise MpocError(
            f"{named}: its approximation overflows {plan.map.dtype}",
            f"leave the layer alone: {excluding(plan.map.layer)}",
        )


def _known(values: list[float | None]) -> tuple[float | None, ...]:
    """Rounded, and nothing at all where none is known."""
    if all(value is None for value in values):
        return ()
    return tuple(None if value is None else rounded(value) for value in values)


def _spectra(fit: Fit) -> tuple[Spectrum | None, ...]:
    """Some points of each that is known; nothing at all where none is, or where bonds are not in line."""
    structure = fit.form.structure
    if not structure.topology.in_line or structure.parts:
        return ()
    pairs = zip(fit.spectra_of_weight, structure.topology.inner_bonds(fit.form.bonds), strict=True)
    spectra = [None if values is None else thinned(values.tolist(), kept) or None for values, kept in pairs]
    return tuple(spectra) if any(spectra) else ()
