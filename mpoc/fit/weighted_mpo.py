"""MPO cores for what a layer does: f of :mod:`mpoc.fit.metric` minimised over all MPOs with given bonds.

    start     TT-SVD in coordinates where the metric is nearly the identity, or plain TT-SVD, the better one
    descent   over all cores together, in float32
    history   f in float64, from the metric as it was given; a stretch that does not lower it is taken back

At full bond TT-SVD is exact and there is nothing to do.  Padded rows and columns are free, and a kernel's
taps are a site like the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mpoc.fit.descent import Descent
from mpoc.fit.metric import Metric
from mpoc.fit.site_whitening import Coordinates, site_coordinates
from mpoc.fit.ttsvd import tt_svd
from mpoc.forms.mpo import MPO
from mpoc.structure import Structure, make_structure

# Steps of the descent between two looks at f in float64.
STRETCH = 10
# Relative to f of a zero weight: what float64 leaves of zero.
_EXACT = 1e-24


@dataclass(frozen=True)
class WeightedFit:
    """A fitted MPO and how f fell."""

    form: MPO
    history: tuple[float, ...]  # f of the start, then after every stretch; never rising


def weighted_fit(
    metric: Metric,
    structure: Structure,
    max_bond: int,
    *,
    start: MPO | None = None,
    max_stretches: int = 8,
    tolerance: float = 0.01,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> WeightedFit:
    """The MPO with every bond at most ``max_bond`` that makes f small, from a start that is never made worse.

    Args:
        metric: of the layer as one matrix: a kernel's taps are the slower part of the inputs.
        structure: factors, padding, taps site; no experts.
        max_bond: cap on every D_k.
        start: where to begin; None for the better of two TT-SVDs.
        max_stretches: of ``STRETCH`` steps each; 0 gives the start.
        tolerance: the relative fall of f over a stretch below which the fit ends.
        dtype: of the cores returned.
        seed: of the range finder in TT-SVD.

    Raises:
        ValueError: experts, or a start with another structure or larger bonds.

    Returns:
        Cores in the balanced gauge; bonds that carry nothing are cut.  The history is of cores in float64.
    """
    whole = _padded_metric(metric, structure)
    working = _working_structure(structure)
    coordinates = site_coordinates(whole, working.output_factors, working.input_factors)
    white = coordinates.whiten(whole)
    if start is None:
        best = _best_start(whole, white, coordinates, working, max_bond, seed)
    else:
        best = _given_start(start, structure, working, max_bond)
    best, history = _descend(best, whole, white, coordinates, max_stretches, tolerance)
    balanced = best.balanced()[0]
    return WeightedFit(MPO([core.to(dtype) for core in balanced.cores], structure), tuple(history))


def _descend(
    best: MPO, whole: Metric, white: Metric, coordinates: Coordinates, max_stretches: int, tolerance: float
) -> tuple[MPO, list[float]]:
    history = [_value(whole, best)]
    if history[0] <= _EXACT * whole.value(torch.zeros_like(whole.target)):
        return best, history
    descent = Descent(_single(white), best.structure, coordinates.whiten_cores(best.cores))
    going = True
    while going and len(history) <= max_stretches:
        going = descent.run(STRETCH)
        candidate = MPO(coordinates.restore_cores(descent.cores), best.structure)
        value = _value(whole, candidate)
        going = going and value < (1 - tolerance) * history[-1]
        if value < history[-1]:
            best = candidate
            history.append(value)
    return best, history


def matrix_of(form: MPO) -> Tensor:
    """A weight as the one matrix that a metric is about: (N_y, N_x), or (C_out, taps · C_in); float64."""
    exact = MPO([core.double() for core in form.cores], form.structure)
    return exact.to_matrix().transpose(0, 1).flatten(1)


def _best_start(
    whole: Metric, white: Metric, coordinates: Coordinates, working: Structure, max_bond: int, seed: int
) -> MPO:
    """The better of plain TT-SVD and TT-SVD in white coordinates."""
    if max_bond >= working.full_bond:
        return MPO(_tt_svd(whole.target, working, max_bond, seed), working)
    plain = MPO(_tt_svd(whole.target.float(), working, max_bond, seed), working)
    cores = _tt_svd(white.target.float(), working, max_bond, seed)
    return min(plain, MPO(coordinates.restore_cores(cores), working), key=lambda form: _value(whole, form))


def _given_start(start: MPO, structure: Structure, working: Structure, max_bond: int) -> MPO:
    if start.structure != structure or max(start.bonds) > max_bond:
        raise ValueError(
            f"a start with bonds {start.bonds} and {start.structure} for {max_bond}, {structure}"
        )
    return MPO([core.double() for core in start.cores], working)


def _value(whole: Metric, form: MPO) -> float:
    return whole.value(form.to_matrix()[0])


def _tt_svd(target: Tensor, working: Structure, max_bond: int, seed: int) -> list[Tensor]:
    return [core.double() for core in tt_svd(target, working, max_bond, seed=seed).form.cores]


def _single(metric: Metric) -> Metric:
    outputs = None if metric.outputs is None else metric.outputs.float()
    return Metric(metric.target.float(), metric.inputs.float(), outputs)


def _working_structure(structure: Structure) -> Structure:
    """The same sites as those of one linear map, padding included."""
    if structure.kind == "experts" and structure.lead > 1:
        raise ValueError("experts are several matrices: a metric is about one")
    rows, columns = structure.padded
    factors = structure.output_factors, structure.input_factors
    return make_structure("linear", (rows, structure.lead * columns), factors=factors)


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
        identity = torch.eye(structure.outputs, dtype=moment.dtype, device=moment.device)
        outputs = pad(identity if outputs is None else outputs, (0, rows, 0, rows))
    return replace(metric, target=target, inputs=moment, outputs=outputs)
