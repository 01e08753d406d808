"""Cores for what a layer does: f of :mod:`mpoc.tensor_networks.fit.metric` minimised over all forms with
given bonds.

Or over sums of an MPO and a matrix of given rank; measured, at equal size a sum errs less than either alone.

    start     the fit to a plain norm in coordinates where the metric is nearly that, or in the layer's own,
              the better one
    descent   over all cores together, in float32
    history   f in float64, from the metric as it was given; a stretch that does not lower it is taken back

At full bond the start of a chain or a tree is exact and there is nothing to do.  Padded rows and columns are
free, and a kernel's taps are a site like the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mpoc.tensor_networks.fit.decompose import decompose
from mpoc.tensor_networks.fit.lbfgs import LBFGS, total
from mpoc.tensor_networks.fit.metric import Metric, weighted_svd
from mpoc.tensor_networks.fit.whitening import whitened_coordinates
from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.forms.stored import form_of
from mpoc.tensor_networks.structure import Structure, make_structure

# Steps of the descent between two looks at f in float64.
STRETCH = 10
# Relative to f of a zero weight: what float64 leaves of zero.
_EXACT = 1e-24


@dataclass(frozen=True)
class WeightedFit:
    """What was fitted and how f fell."""

    terms: tuple[Form, ...]  # the form, and the low-rank part of a sum
    history: tuple[float, ...]  # f of the start, then after every stretch; never rising

    @property
    def form(self) -> Form:
        """The first."""
        return self.terms[0]


class Problem:
    """f over all forms with these factors, and over sums of an MPO and two factors of given rank.

    Args:
        metric: of the layer as one matrix: a kernel's taps are the slower part of the inputs.
        structure: factors, padding, taps site.

    Raises:
        ValueError: experts.
    """

    def __init__(self, metric: Metric, structure: Structure) -> None:
        self.structure = structure
        self._working = _working_structure(structure)
        self._whole = _padded_metric(metric, structure)
        factors = self._working.output_factors, self._working.input_factors
        self._coordinates = whitened_coordinates(self._whole, *factors)
        self._white = self._coordinates.whiten(self._whole)

    def fit(
        self,
        max_bond: int,
        *,
        rank: int = 0,
        start: Sequence[Form] | None = None,
        max_stretches: int = 8,
        tolerance: float = 0.01,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> WeightedFit:
        """Cores that make f small, from a start that is never made worse.

        Args:
            max_bond: cap on every bond.
            rank: of the low-rank part; 0: there is none.
            start: terms to begin with; None for the better of two fits to plain norms, of what the closed
                form of the low-rank part leaves.
            max_stretches: of ``STRETCH`` steps each; 0 gives the start.
            tolerance: the relative fall of f over a stretch below which the fit ends.
            dtype: of the cores returned.
            seed: of the start.

        Raises:
            ValueError: a start with another structure or larger bonds.

        Returns:
            Cores in the balanced gauge; bonds that carry nothing are cut.  The history is of float64 cores.
        """
        if start is None:
            best = self._best_start(max_bond, rank, seed)
        else:
            best = _given_start(start, self.structure, self._working, max_bond, rank)
        best, history = self._descend(best, max_stretches, tolerance)
        one = self.structure
        cores = [best[0].balanced()[0].cores, *(_cropped(t.balanced()[0].cores, one) for t in best[1:])]
        own = [one, one.as_low_rank()][: len(cores)]
        terms = (form_of([c.to(dtype) for c in term], whose) for term, whose in zip(cores, own, strict=True))
        return WeightedFit(tuple(terms), tuple(history))

    def _descend(
        self, best: list[Form], max_stretches: int, tolerance: float
    ) -> tuple[list[Form], list[float]]:
        whole, coordinates = self._whole, self._coordinates
        history = [_value(whole, best)]
        if max_stretches < 1 or history[0] <= _EXACT * whole.value(torch.zeros_like(whole.target)):
            return best, history
        descent = LBFGS(_single(self._white), [coordinates.whiten_term(term) for term in best])
        going = True
        while going and len(history) <= max_stretches:
            going = descent.run(STRETCH)
            candidate = [coordinates.restore_term(term) for term in descent.terms]
            value = _value(whole, candidate)
            going = going and value < (1 - tolerance) * history[-1]
            if value < history[-1]:
                best = candidate
                history.append(value)
        return best, history

    def _best_start(self, max_bond: int, rank: int, seed: int) -> list[Form]:
        """The better of the plain fit and that in white coordinates, of what the low-rank part leaves."""
        whole, white, working = self._whole, self._white, self._working
        parts: list[Form] = []
        if rank:
            left, right = weighted_svd(whole).factors(rank)
            parts = [MPO([left[None, :, None], right[:, None, :, None]], working.as_low_rank())]
            rest = [(whole, parts), (white, [self._coordinates.whiten_term(parts[0])])]
            whole, white = (replace(metric, target=metric.target - total(part)) for metric, part in rest)
        if max_bond >= working.full_bond:
            return [_plain(whole.target, working, max_bond, seed), *parts]
        plain = _plain(whole.target.float(), working, max_bond, seed)
        other = _plain(white.target.float(), working, max_bond, seed)
        candidates = (plain, self._coordinates.restore_term(other))
        return [min(candidates, key=lambda form: _value(whole, [form])), *parts]


def matrix_of(terms: Sequence[Form]) -> Tensor:
    """A sum as the one matrix that a metric is about: (N_y, N_x), or (C_out, taps · C_in); float64."""
    exact = (form_of([core.double() for core in term.cores], term.structure).to_matrix() for term in terms)
    return torch.stack([matrix.transpose(0, 1).flatten(1) for matrix in exact]).sum(0)


def _given_start(
    start: Sequence[Form], structure: Structure, working: Structure, max_bond: int, rank: int
) -> list[Form]:
    form = start[0]
    ranks = [term.bonds[1] for term in start[1:]]
    fits = len(ranks) == bool(rank) and all(found <= rank for found in ranks)
    if form.structure != structure or max(form.bonds, default=1) > max_bond or not fits:
        raise ValueError(
            f"a start with bonds {form.bonds}, ranks {ranks} and {form.structure} for {max_bond}, {rank}, "
            f"{structure}"
        )
    terms = [form_of([core.double() for core in form.cores], working)]
    if rank:
        rows, columns = structure.padding
        left, right = (core.double() for core in start[1].cores)
        right = pad(right.reshape(len(right), structure.lead, structure.inputs), (0, columns))
        cores = [pad(left, (0, 0, 0, 0, 0, rows)), right.reshape(len(right), 1, -1, 1)]
        terms.append(MPO(cores, working.as_low_rank()))
    return terms


def _cropped(cores: list[Tensor], structure: Structure) -> list[Tensor]:
    """Two factors without the padded rows and columns."""
    left, right = cores
    right = right.reshape(len(right), structure.lead, -1)[..., : structure.inputs]
    return [left[:, : structure.outputs], right.reshape(len(right), 1, -1, 1)]


def _value(whole: Metric, terms: Sequence[Form]) -> float:
    return whole.value(total(terms))


def _plain(target: Tensor, working: Structure, max_bond: int, seed: int) -> Form:
    """Nearest to ``target`` in the plain norm, in float64."""
    found = decompose(target, working, max_bond, seed=seed).form
    return form_of([core.double() for core in found.cores], working)


def _single(metric: Metric) -> Metric:
    outputs = None if metric.outputs is None else metric.outputs.float()
    return Metric(metric.target.float(), metric.inputs.float(), outputs)


def _working_structure(structure: Structure) -> Structure:
    """The same sites as those of one linear map, padding included."""
    if structure.kind == "experts" and structure.lead > 1:
        raise ValueError("experts are several matrices: a metric is about one")
    rows, columns = structure.padded
    factors = structure.output_factors, structure.input_factors
    shape = rows, structure.lead * columns
    return make_structure("linear", shape, factors=factors, network=structure.network)


def _padded_metric(metric: Metric, structure: Structure) -> Metric:
    """Zero rows and columns for the padding, which therefore costs nothing."""
    rows, columns = structure.padding
    if not rows and not columns:
        return metric
    lead, inputs = structure.lead, structure.inputs
    count = lead * (inputs + columns)
    target = metric.target.reshape(-1, lead, inputs)
    target = pad(target, (0, columns, 0, 0, 0, rows)).reshape(-1, count)
    moment = metric.inputs.reshape(lead, inputs, lead, inputs)
    moment = pad(moment, (0, columns, 0, 0, 0, columns)).reshape(count, count)
    outputs = metric.outputs
    if rows:
        outputs = moment.new_ones(structure.outputs) if outputs is None else outputs
        outputs = pad(outputs, (0, rows) * outputs.dim())
    return replace(metric, target=target, inputs=moment, outputs=outputs)
