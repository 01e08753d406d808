"""One layer fitted to what it does: its cores, the shift that its bias takes up, and errors of its outputs.

How far the second moment M is trusted, γ, is chosen on held-out inputs; the fit is then made on all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpoc.calibrate.moments import Moments, merge
from mpoc.fit.metric import Metric, make_metric
from mpoc.fit.weighted_mpo import weighted_fit
from mpoc.fit.weighted_svd import weighted_svd
from mpoc.forms.layout import to_matrix
from mpoc.forms.mpo import MPO
from mpoc.structure import Structure, low_rank_structure

GAMMAS = (0.0, 0.02, 0.1, 0.3)
RIDGE = 1e-6


@dataclass(frozen=True)
class Evidence:
    """What is known of a layer's inputs and outputs."""

    moments: Moments  # of the inputs of the fit
    held_out: Moments  # of others
    outputs: Tensor | None  # G (N_y, N_y) float64
    centred: bool  # whether a bias, or a norm behind the layer, takes up the mean


@dataclass(frozen=True)
class CalibratedFit:
    """A layer's cores in the stored dtype, with what they do."""

    form: MPO
    shift: Tensor | None  # (N_y,) float64 to be added to the layer's outputs: W μ − Ŵ μ̃; None: nothing can be
    gamma: float
    relative_error: float  # ‖W − Ŵ‖_F / ‖W‖_F of the stored cores
    output_error: float  # of the outputs about their mean, on all inputs that were seen
    held_out_error: float  # of a low-rank fit of that size without the held-out ones, on those


def one_matrix(weight: Tensor, kind: str, transposed: bool) -> Tensor:
    """A weight as the one matrix (N_y, N_x) that moments are of: of a kernel (C_out, taps·C_in)."""
    structure = low_rank_structure(kind, tuple(weight.shape), transposed)
    return to_matrix(weight, structure)[0].double()


def matrix_of(form: MPO) -> Tensor:
    """The same of a form, (N_y, N_x) float64."""
    return MPO([core.double() for core in form.cores], form.structure).to_matrix().transpose(0, 1).flatten(1)


def fit_calibrated(
    weight: Tensor, structure: Structure, bond: int, evidence: Evidence, dtype: torch.dtype, seed: int
) -> CalibratedFit:
    """Cores with bonds up to ``bond`` that make small errors of the layer's outputs.

    Args:
        weight: of shape ``structure.shape``.
        structure: of a linear map or of a convolution without groups.
        bond: cap on every D_k.
        evidence: with moments (N_x, N_x).
        dtype: of the stored cores.
        seed: of the sweeps' start.
    """
    matrix = one_matrix(weight, structure.kind, structure.transposed)
    rank = bond
    if structure.form != "svd":
        rank = max(1, round(structure.num_parameters(bond) / sum(matrix.shape)))
    tried = []
    for gamma in GAMMAS:
        form = _rounded(_low_rank(metric_of(matrix, evidence, gamma), structure, rank), dtype)
        shift = shift_of(matrix, matrix_of(form), evidence)
        error = squared_error(matrix, matrix_of(form), evidence.held_out, shift, evidence.outputs)
        tried.append((error, gamma, form, shift))
    _, gamma, form, shift = min(tried, key=lambda one: one[0])
    held_out_error = output_error(matrix, matrix_of(form), evidence.held_out, shift)
    everything = replace(evidence, moments=merge(evidence.moments, evidence.held_out))
    metric = metric_of(matrix, everything, gamma)
    if structure.form == "svd":
        form = _low_rank(metric, structure, bond)
    else:
        form = weighted_fit(metric, structure, bond, seed=seed).form
    return _judged(matrix, _rounded(form, dtype), everything, gamma, held_out_error)


def metric_of(matrix: Tensor, evidence: Evidence, gamma: float) -> Metric:
    """What a fit minimises, with the second moment trusted as far as γ says."""
    m = evidence.moments
    return make_metric(
        matrix, m.second, m.mean, m.cross, m.dense_mean,
        centred=evidence.centred, gamma=gamma, ridge=RIDGE, outputs=evidence.outputs,
    )  # fmt: skip


def _low_rank(metric: Metric, structure: Structure, rank: int) -> MPO:
    left, right = weighted_svd(metric).factors(rank)
    structure = low_rank_structure(structure.kind, structure.shape, structure.transposed)
    return MPO([left[None, :, None, :], right[:, None, :, None]], structure)


def _rounded(form: MPO, dtype: torch.dtype) -> MPO:
    return MPO([core.to(dtype).contiguous() for core in form.cores], form.structure)


def shift_of(matrix: Tensor, found: Tensor, evidence: Evidence) -> Tensor | None:
    """(N_y,) W μ − Ŵ μ̃; None where nothing can take it up."""
    if not evidence.centred:
        return None
    return matrix @ evidence.moments.dense_mean - found @ evidence.moments.mean


def _judged(
    matrix: Tensor, form: MPO, evidence: Evidence, gamma: float, held_out_error: float
) -> CalibratedFit:
    found = matrix_of(form)
    shift = shift_of(matrix, found, evidence)
    norm = float(torch.linalg.vector_norm(matrix))
    return CalibratedFit(
        form,
        shift,
        gamma,
        float(torch.linalg.vector_norm(matrix - found)) / norm if norm else 0.0,
        output_error(matrix, found, evidence.moments, shift),
        held_out_error,
    )


def output_error(matrix: Tensor, found: Tensor, moments: Moments, shift: Tensor | None) -> float:
    """√(E‖Wx − Ŵx̃ − s‖² / E‖Wx − E[Wx]‖²), 0 for 0/0.

    Args:
        matrix: W (N_y, N_x).
        found: Ŵ.
        moments: of x̃ and x.
        shift: s (N_y,); None: zero.
    """
    centred = moments.dense_second - torch.outer(moments.dense_mean, moments.dense_mean)
    whole = float((matrix @ centred * matrix).sum())
    error = squared_error(matrix, found, moments, shift, None)
    return math.sqrt(error / whole) if whole > 0 else 0.0


def squared_error(
    matrix: Tensor, found: Tensor, moments: Moments, shift: Tensor | None, outputs: Tensor | None
) -> float:
    """E of (Wx − Ŵx̃ − s)ᵀ G (Wx − Ŵx̃ − s); G = ``outputs``, None for the identity."""
    left, middle = matrix @ moments.dense_second - found @ moments.cross.T, matrix @ moments.cross
    second = left @ matrix.T - (middle - found @ moments.second) @ found.T
    if shift is not None:
        mean = matrix @ moments.dense_mean - found @ moments.mean
        second += torch.outer(shift, shift) - torch.outer(mean, shift) - torch.outer(shift, mean)
    return max(0.0, float(second.trace() if outputs is None else (second * outputs).sum()))
