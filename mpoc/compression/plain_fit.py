"""One layer's part of the work: read and check its weight, factorise it within its goal, record it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from mpoc.compression.plan import LayerPlan, leave_dense_unless_smaller
from mpoc.compression.recipe import Recipe
from mpoc.errors import MpocError, excluding
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.coded_parts import coded_entries, values_of_all, with_codes
from mpoc.io.manifest import DENSE, LayerRecord, Spectrum, bond_fields, thinned
from mpoc.io.open_checkpoint import naming, read_finite
from mpoc.io.safetensors_writer import Entry
from mpoc.quantize.codes import QuantizedTensor
from mpoc.runtime.device import release_freed_memory
from mpoc.runtime.formatting import rounded
from mpoc.tensor_networks.fit.decompose import decompose, learn_order, with_cores
from mpoc.tensor_networks.fit.truncation import Target, Truncation, largest
from mpoc.tensor_networks.fit.tt_svd import Fit
from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.forms.layout import working_dtype

_LARGE = 1 << 26  # numbers of a layer whose fit makes the peak of memory
# Trial factorisations of a layer under a tolerance.
_TRIALS = 6
# An approximation whose norm is this many times the weight's is none: its error is larger than of nothing.
_FAR = 4


_Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Fitted:
    """A layer as it is to be stored.

    Where it is rounded, ``codes`` go into the file, and ``cores`` are the values that they stand for. The
    weight of a layer that stays dense then stands in ``changed``.
    """

    record: LayerRecord
    cores: Sequence[Tensor] = ()  # in the stored dtype; none where the layer stays dense
    changed: _Tensors = field(default_factory=dict)  # other tensors that go with it: a bias
    losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of a block refined with it
    codes: Sequence[QuantizedTensor] = ()  # of each core, or of the dense weight

    @classmethod
    def rounded(
        cls,
        record: LayerRecord,
        codes: Sequence[QuantizedTensor],
        changed: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """A layer of these codes, with their storage, their bytes and the values that they stand for.

        Args:
            record: all but the storage and its bytes; ``num_stored``, bonds and errors are taken over.
            codes: of each core in order, or of the weight where the form is ``dense``.
            changed: other tensors that go with it.
        """
        record = with_codes(record, codes)
        values = values_of_all(record, codes)
        if record.form != DENSE:
            return cls(record, values, changed or {}, codes=codes)
        return cls(record, (), {record.name: values[0], **(changed or {})}, codes=codes)

    @property
    def entries(self) -> list[Entry]:
        """What the file holds in the weight's place."""
        if self.codes:
            return coded_entries(self.record, self.codes)
        cores = zip(self.record.core_names, self.cores, strict=True) if self.cores else ()
        return [Entry.of(name, core) for name, core in cores]


def have_changed(new: Sequence[Fitted], old: Sequence[Fitted]) -> bool:
    """Whether any tensor of the layers differs; processes do not share tensors, so values are compared."""
    return not all(_is_same(one, other) for one, other in zip(new, old, strict=True))


def _is_same(one: Fitted, other: Fitted) -> bool:
    if one.changed.keys() != other.changed.keys():
        return False
    pairs = [*zip(one.cores, other.cores, strict=True)]
    pairs += [(tensor, other.changed[name]) for name, tensor in one.changed.items()]
    return all(torch.equal(a, b) for a, b in pairs)


def fit_layer(checkpoint: Checkpoint, plan: LayerPlan, recipe: Recipe, device: torch.device) -> Fitted:
    """Carry out a layer's plan.

    Args:
        checkpoint: to read the weight from.
        plan: plan of the layer.
        recipe: for the seed, and whether a layer may grow.
        device: to compute on.

    Returns:
        The record of what is to be stored, and the cores or codes.

    Raises:
        MpocError: a weight that is not finite, cores that overflow, a tolerance that cannot be kept.
    """
    if plan.is_unchanged:
        return Fitted(plan.record())
    if plan.structure.num_original > _LARGE:
        release_freed_memory()  # of the layers before
    weight = read_finite(checkpoint, plan.map.name).to(device)
    fit: Fit | None = None
    if not plan.is_dense:
        with naming(checkpoint, plan.map.name):
            plan, fit, codes = _fit_ordered(weight, plan, zlib.crc32(plan.map.name.encode()) ^ recipe.seed)
        check_finite_cores(fit.form, weight, checkpoint, plan)
        if not recipe.allow_growth:
            plan = leave_dense_unless_smaller(plan, fit.form.num_parameters)
    if fit is None or plan.is_dense:
        with naming(checkpoint, plan.map.name):
            return Fitted(plan.record()) if plan.rounding is None else round_weight(plan, weight)
    if not math.isfinite(fit.relative_error):
        raise MpocError(
            f"{checkpoint.files[plan.map.name]}: tensor {plan.map.name!r}: "
            "its numbers are too large to be factorised"
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
    return Fitted.rounded(record, codes) if codes else Fitted(record, fit.form.cores)


def round_weight(plan: LayerPlan, weight: Tensor) -> Fitted:
    """A layer that stays dense, rounded to its nearest codes, with its error.

    Raises:
        MpocError: numbers are too large for the storage, or for the weight's dtype once rounded.
    """
    assert plan.rounding is not None
    record = plan.record()
    fitted = Fitted.rounded(record, plan.rounding.codes(record, [weight]))
    exact, stored = weight.double(), fitted.changed[record.name].to(weight.device).double()
    norm = float(exact.norm())
    error = float((exact - stored).norm()) / norm if norm else 0.0
    if not math.isfinite(error):
        raise MpocError(f"its numbers are too large to be rounded in {record.dtype}")
    return replace(fitted, record=replace(fitted.record, relative_error=rounded(error)))


_Coded = tuple[Fit, list[QuantizedTensor]]


def _fit_ordered(weight: Tensor, plan: LayerPlan, seed: int) -> tuple[LayerPlan, Fit, list[QuantizedTensor]]:
    """The fit; with an order that is to be learnt, and is then in the plan, where it serves."""
    fit, codes = _fit_within(weight, plan, seed)
    if not plan.learns_order:
        return plan, fit, codes
    plan = replace(plan, learns_order=False)
    order = learn_order(weight, plan.structure, max(fit.form.bonds, default=1))
    ordered = replace(plan, structure=replace(plan.structure, order=order))
    reordered, other = _fit_within(weight, ordered, seed)
    better = _goodness(reordered) < _goodness(fit)
    return (ordered, reordered, other) if better else (plan, fit, codes)


def _goodness(fit: Fit) -> tuple[int, float]:
    return fit.form.num_parameters, fit.relative_error


def _fit_within(weight: Tensor, plan: LayerPlan, seed: int) -> _Coded:
    """Factorised once; under a tolerance, the smallest of several that keep it.

    Where the spectra end early, bonds cannot use up their share of the error, and rounding to the stored
    dtype adds some.  So what may be spent is found by bisection on the error that comes out.
    """
    tolerance = plan.truncation.tolerance
    if not tolerance:
        return _fit_once(weight, plan, plan.truncation, seed)
    best: _Coded | None = None
    low, high = 0.0, tolerance * math.sqrt(len(plan.structure.site_sizes))
    spend = tolerance
    for _ in range(_TRIALS):
        fit, codes = _fit_once(weight, plan, replace(plan.truncation, tolerance=spend), seed)
        if fit.relative_error <= tolerance:
            low = spend
            if best is None or fit.form.num_parameters < best[0].form.num_parameters:
                best = fit, codes
        else:
            high = spend
        spend = (low + high) / 2
    if best is not None:
        return best
    raise MpocError(
        f"relative error {tolerance:g} cannot be kept in {_stored_as(plan)}: "
        f"rounding the cores takes it to {fit.relative_error:.2g}",
        f"{'--dtype float32' if plan.rounding is None else 'more --bits'}, or a larger --max-error",
    )


def _fit_once(weight: Tensor, plan: LayerPlan, truncation: Truncation, seed: int) -> _Coded:
    """The fit with the cores as they are stored, and their codes where they are rounded."""
    if plan.rounding is None:
        target = Target(getattr(torch, plan.stored_dtype), seed)
        return decompose(weight, plan.structure, truncation, target), []
    fit = decompose(weight, plan.structure, truncation, Target(working_dtype(weight.dtype), seed))
    record = replace(plan.record(), **bond_fields(plan.structure, fit.form.bonds))
    codes = plan.rounding.codes(record, fit.form.cores)
    return with_cores(fit, weight, values_of_all(with_codes(record, codes), codes)), codes


def _stored_as(plan: LayerPlan) -> str:
    if plan.rounding is None:
        return plan.stored_dtype
    return f"{plan.rounding.storage} of {plan.rounding.bits:g} bits"


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
