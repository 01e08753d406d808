"""Cores for what a layer does: f of :mod:`mpoc.tensor_networks.fit.metric` minimised over all forms with
given bonds.

Or over sums of an MPO and a matrix of given rank; measured, at equal size a sum errs less than either alone.

    start     the fit to a plain norm in coordinates where the metric is nearly that, or in the layer's own,
              the better one; of a MERA, some steps of its descent to the weight in the plain norm: measured,
              a start far from the weight ends in directions that the metric hardly sees, and the target T is
              far from it there
    descent   over all cores together, in float32; of a sum over the MPO's alone, with the best matrix beside
              it at every step, which takes a quarter of the steps
    history   f in float64, from the metric as it was given; a stretch that does not lower it is taken back

At full bond the start of a chain or a tree is exact and there is nothing to do.  Padded rows and columns are
free, and a kernel's taps are a site like the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from mpoc.tensor_networks.fit.decompose import decompose
from mpoc.tensor_networks.fit.lbfgs import LBFGS
from mpoc.tensor_networks.fit.mera import short_descent
from mpoc.tensor_networks.fit.metric import Metric
from mpoc.tensor_networks.fit.second_moment import RowMoment
from mpoc.tensor_networks.fit.truncation import Target, Truncation
from mpoc.tensor_networks.fit.whitening import (
    BesideLowRank,
    WhitenedCoordinates,
    weighted_svd,
    whitened_coordinates,
)
from mpoc.tensor_networks.forms.form import Form, form_of
from mpoc.tensor_networks.forms.layout import interleave
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import Structure, make_structure

# Steps of the descent between two looks at f in float64.
STRETCH = 10
# Of a sum, of which each look takes a closed form.
_SUM_STRETCH = 15
# A network with loops has no preconditioner, and takes so many times the steps, and so many before.
_LOOPED, _PLAIN_STEPS = 3, 100
# Relative to f of a zero weight: what float64 leaves of zero.
_EXACT = 1e-24
_FLOAT64 = Target(torch.float64)


@dataclass(frozen=True)
class WeightedFit:
    """A fitted form, and how f fell on the way to it."""

    form: Form
    history: tuple[float, ...]  # f of the start, then after every stretch; it never rises


class Problem:
    """f over all forms of one structure.

    Args:
        metric: of the layer as one matrix: a kernel's taps are the slower part of the inputs.
        structure: form, factors, padding, taps site.
        weight: W (N_y, N_x), from which the target has moved with the inputs, to start a MERA from; None: it
            is the target.

    Raises:
        ValueError: experts.
    """

    def __init__(self, metric: Metric, structure: Structure, weight: Tensor | None = None) -> None:
        self.structure = structure
        self._working = _working_structure(structure)
        self._whole = _padded_metric(metric, structure)
        self._weight = self._whole.target if weight is None else _padded(weight, structure)

    @cached_property
    def _coordinates(self) -> WhitenedCoordinates:
        factors = self._working.output_factors, self._working.input_factors
        return whitened_coordinates(self._whole, *factors)

    @cached_property
    def _white(self) -> Metric:
        return self._coordinates.whiten(_single(self._whole))

    def fit(
        self,
        truncation: Truncation,
        *,
        start: Form | None = None,
        max_stretches: int = 8,
        tolerance: float = 0.01,
        target: Target = _FLOAT64,
    ) -> WeightedFit:
        """Cores that make f small, from a start that is never made worse.

        Args:
            truncation: the cap on every bond and, for a sum, the rank of its low-rank part.
            start: to begin with; None for the better of two fits to plain norms, of what the closed form of
                the low-rank part leaves.
            max_stretches: of ``STRETCH`` steps each, of a MERA three times as many, of a sum 15; 0 gives the
                start.
            tolerance: the relative fall of f over a stretch below which the fit ends.
            target: dtype of the cores, and seed of the start.

        Raises:
            ValueError: a start with another structure or larger bonds.

        Returns:
            Cores in the balanced gauge; bonds that carry nothing are cut.  The history is that of float64
            cores.
        """
        if start is None:
            best = self._best_start(truncation, target.seed)
        else:
            terms = self._given_start(start, truncation).terms
            best = self._completed(terms[0], truncation.rank)
        best, history = self._descend(best, truncation.rank, max_stretches, tolerance)
        cores = self._cropped(best.balanced()[0])
        form = form_of([core.to(target.dtype) for core in cores], self.structure)
        return WeightedFit(form, tuple(history))

    def _descend(
        self, best: Form, rank: int, max_stretches: int, tolerance: float
    ) -> tuple[Form, list[float]]:
        """The end of the descent; of a sum over the network alone, beside it always the best matrix."""
        whole = self._whole
        history = [_value(whole, best)]
        if max_stretches < 1 or history[0] <= _EXACT * whole.value(torch.zeros_like(whole.target)):
            return best, history
        coordinates = self._coordinates
        if self._working.parts:
            descent = LBFGS(BesideLowRank(self._white, rank), coordinates.whiten_form(best.terms[0]))
        else:
            descent = LBFGS(self._white, coordinates.whiten_form(best))
        steps = STRETCH * (_LOOPED if self._working.topology.has_loops else 1)
        steps = _SUM_STRETCH if self._working.parts else steps
        going = True
        while going and len(history) <= max_stretches:
            going = descent.run(steps)
            candidate = self._completed(coordinates.restore_form(descent.form), rank)
            value = _value(whole, candidate)
            going = going and value < (1 - tolerance) * history[-1]
            if value < history[-1]:
                best = candidate
                history.append(value)
        return best, history

    def _completed(self, network: Form, rank: int) -> Form:
        """The network, of a sum with the best matrix of this rank beside it."""
        if not self._working.parts:
            return network
        added = _low_rank(_less(self._whole, network), rank, self._working.parts[1])
        return form_of([*network.cores, *added.cores], self._working)

    def _best_start(self, truncation: Truncation, seed: int) -> Form:
        """The better of the plain fit and that in white coordinates; of a sum's MPO the latter.

        That is fitted to what the closed form of the low-rank part leaves.
        """
        whole, white = self._whole, self._white
        if not self._working.parts:
            return self._network_start(whole, white, self._working, truncation.max_bond, seed)
        chain, pair = self._working.parts
        added = _low_rank(whole, truncation.rank, pair)
        rest = _less(whole, added), _less(white, self._coordinates.whiten_form(added))
        first = self._network_start(*rest, chain, truncation.max_bond, seed)
        return self._completed(first, truncation.rank)

    def _network_start(
        self, whole: Metric, white: Metric, working: Structure, max_bond: int, seed: int
    ) -> Form:
        if working.topology.has_loops:
            tensor = interleave(self._weight.float(), working)
            return short_descent(tensor, working, max_bond, seed, _PLAIN_STEPS).double()
        if max_bond >= working.full_bond:
            return _plain(whole.target, working, max_bond, seed)
        other = self._coordinates.restore_form(_plain(white.target.float(), working, max_bond, seed))
        if self._working.parts:  # measured: f of either start is within a few per cent of the other's
            return other
        plain = _plain(whole.target.float(), working, max_bond, seed)
        return min((plain, other), key=lambda form: _value(whole, form))

    def _given_start(self, start: Form, truncation: Truncation) -> Form:
        """The start in float64, as a form of the padded linear map.

        Raises:
            ValueError: it has another structure, or larger bonds.
        """
        caps = truncation.max_bond, truncation.rank
        too_wide = any(max(term.bonds, default=1) > cap for term, cap in zip(start.terms, caps, strict=False))
        if start.structure != self.structure or too_wide:
            raise ValueError(
                f"a start with bonds {start.bonds} and {start.structure} for {caps}, {self.structure}"
            )
        cores = [core.double() for core in start.cores]
        if self.structure.parts:
            rows, columns = self.structure.padding
            left, right = cores[-2:]
            right = pad(right.reshape(len(right), self.structure.lead, self.structure.inputs), (0, columns))
            cores[-2:] = pad(left, (0, 0, 0, 0, 0, rows)), right.reshape(len(right), 1, -1, 1)
        return form_of(cores, self._working)

    def _cropped(self, form: Form) -> list[Tensor]:
        """Cores for the weight itself: those of a low-rank part without padded rows and columns."""
        if not self.structure.parts:
            return form.cores
        *cores, left, right = form.cores
        right = right.reshape(len(right), self.structure.lead, -1)[..., : self.structure.inputs]
        return [*cores, left[:, : self.structure.outputs], right.reshape(len(right), 1, -1, 1)]


def matrix_of(form: Form) -> Tensor:
    """The one matrix that a metric is about: (N_y, N_x), or (C_out, taps · C_in); float64."""
    return form.double().to_matrix().transpose(0, 1).flatten(1)


def _low_rank(metric: Metric, rank: int, structure: Structure) -> Form:
    """The closed form of the low-rank part of a sum."""
    left, right = weighted_svd(metric).factors(rank)
    return MPO([left[None, :, None], right[:, None, :, None]], structure)


def _less(metric: Metric, form: Form) -> Metric:
    """The same for what ``form`` leaves of the target."""
    return replace(metric, target=metric.target - form.to_matrix()[0])


def _value(whole: Metric, form: Form) -> float:
    return whole.value(form.to_matrix()[0])


def _plain(target: Tensor, working: Structure, max_bond: int, seed: int) -> Form:
    """The form nearest to ``target`` in the plain norm, in float64."""
    return decompose(target, working, Truncation(max_bond), Target(seed=seed)).form.double()


def _single(metric: Metric) -> Metric:
    outputs = None if metric.outputs is None else metric.outputs.float()
    inputs = metric.inputs if isinstance(metric.inputs, RowMoment) else metric.inputs.float()
    return Metric(metric.target.float(), inputs, outputs)


def _working_structure(structure: Structure) -> Structure:
    """The same sites as those of one linear map, padding included."""
    if structure.kind == "experts" and structure.lead > 1:
        raise ValueError("experts are several matrices: a metric is about one")
    rows, columns = structure.padded
    factors = structure.output_factors, structure.input_factors
    shape = rows, structure.lead * columns
    return make_structure("linear", shape, factors=factors, form=structure.form)


def _padded_metric(metric: Metric, structure: Structure) -> Metric:
    """Zero rows and columns for the padding, which therefore costs nothing."""
    rows, columns = structure.padding
    if not rows and not columns:
        return metric

    def wider(matrix: Tensor) -> Tensor:
        return _with_padded_columns(matrix, structure)

    target, moment = _padded(metric.target, structure), metric.inputs
    moment = moment.map_rows(wider) if isinstance(moment, RowMoment) else wider(wider(moment).T)
    outputs = metric.outputs
    if rows:
        outputs = target.new_ones(structure.outputs) if outputs is None else outputs
        outputs = pad(outputs, (0, rows) * outputs.dim())
    return replace(metric, target=target, inputs=moment, outputs=outputs, factor=None, output_factor=None)


def _padded(matrix: Tensor, structure: Structure) -> Tensor:
    """(N_y, N_x) with zero rows and columns for the padding."""
    if not any(structure.padding):
        return matrix
    return pad(_with_padded_columns(matrix, structure), (0, 0, 0, structure.padding[0]))


def _with_padded_columns(matrix: Tensor, structure: Structure) -> Tensor:
    taps = pad(matrix.unflatten(-1, (structure.lead, structure.inputs)), (0, structure.padding[1]))
    return taps.flatten(-2)
