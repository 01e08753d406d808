"""One layer fitted to what it does: its cores, the shift that its bias takes up, and errors of its outputs.

How far the second moment M is trusted, γ, is chosen on held-out inputs; the fit is then made on all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mpoc.calibrate.moments import Moments, merge
from mpoc.fit.metric import Metric, make_metric
from mpoc.fit.weighted_mpo import matrix_of, weighted_fit
from mpoc.fit.weighted_svd import weighted_svd
from mpoc.forms.layout import to_matrix
from mpoc.forms.mpo import MPO
from mpoc.structure import Structure, low_rank_structure

GAMMAS = (0.0, 0.02, 0.1, 0.3)
MPO_GAMMAS = (0.1, 0.3)  # their fit takes longer, and follows chance in M more
RIDGE = 1e-6
STRETCHES = 3  # of the descent of an MPO; more lower f on the inputs of the fit alone


@dataclass(frozen=True)
class Second:
    """Second moments of inputs less the means that the fit takes up."""

    mine: Tensor  # E[x̃ x̃ᵀ] (N_x, N_x)
    cross: Tensor  # E[x x̃ᵀ]
    dense: Tensor  # E[x xᵀ]


@dataclass(frozen=True)
class Evidence:
    """What is known of a layer's inputs and outputs."""

    moments: Moments  # of the inputs of the fit
    held_out: Moments  # of others
    outputs: Tensor | None  # G (N_y, N_y) float64
    centred: bool  # whether a bias, or a norm behind the layer, takes up the mean

    @cached_property
    def seen(self) -> Second:
        """Of the inputs of the fit."""
        return self._less_means(self.moments)

    @cached_property
    def unseen(self) -> Second:
        """Of the others, less the means of the fit: those are what a bias takes up."""
        return self._less_means(self.held_out)

    def together(self) -> Evidence:
        """With nothing held out."""
        return replace(self, moments=merge(self.moments, self.held_out))

    def _less_means(self, m: Moments) -> Second:
        if not self.centred:
            return Second(m.second, m.cross, m.dense_second)
        mean, dense = self.moments.mean, self.moments.dense_mean
        return Second(
            _about(m.second, m.mean, m.mean, mean, mean),
            _about(m.cross, m.dense_mean, m.mean, dense, mean),
            _about(m.dense_second, m.dense_mean, m.dense_mean, dense, dense),
        )


def _about(second: Tensor, left: Tensor, right: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """E[(x − a)(y − b)ᵀ] from E[x yᵀ], E[x] and E[y]."""
    return second - torch.outer(left, b) - torch.outer(a, right) + torch.outer(a, b)


@dataclass(frozen=True)
class CalibratedFit:
    """A layer's cores in the stored dtype, with what they do."""

    form: MPO
    shift: Tensor | None  # (N_y,) float64 to be added to the layer's outputs: W μ − Ŵ μ̃; None: nothing can be
    gamma: float
    relative_error: float  # ‖W − Ŵ‖_F / ‖W‖_F of the stored cores
    output_error: float  # of the outputs about their mean, on all inputs that were seen
    held_out_error: float  # of the same fit without the held-out ones, on those


def one_matrix(weight: Tensor, kind: str, transposed: bool) -> Tensor:
    """A weight as the one matrix (N_y, N_x) that moments are of: of a kernel (C_out, taps·C_in)."""
    structure = low_rank_structure(kind, tuple(weight.shape), transposed)
    return to_matrix(weight, structure)[0].double()


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
    tried = []
    for gamma in GAMMAS if structure.form == "svd" else MPO_GAMMAS:
        form = _rounded(_fit(metric_of(matrix, evidence, gamma), structure, bond, seed), dtype)
        error = squared_error(matrix, matrix_of(form), evidence.unseen, evidence.outputs)
        tried.append((error, gamma, form))
    _, gamma, form = min(tried, key=lambda one: one[0])
    held_out_error = output_error(matrix, matrix_of(form), evidence.unseen)
    everything = evidence.together()
    form = _fit(metric_of(matrix, everything, gamma), structure, bond, seed, form)
    return _judged(matrix, _rounded(form, dtype), everything, gamma, held_out_error)


def _fit(metric: Metric, structure: Structure, bond: int, seed: int, start: MPO | None = None) -> MPO:
    if structure.form == "svd":
        left, right = weighted_svd(metric).factors(bond)
        return MPO([left[None, :, None, :], right[:, None, :, None]], structure)
    stretches = STRETCHES if start is None else 1
    return weighted_fit(metric, structure, bond, start=start, max_stretches=stretches, seed=seed).form


def metric_of(matrix: Tensor, evidence: Evidence, gamma: float) -> Metric:
    """What a fit minimises; of both second moments the share γ is replaced by its diagonal.

    Both get a ridge, so that at full bond the weight is met in every direction.
    """
    m, outputs = evidence.moments, evidence.outputs
    if outputs is not None:
        diagonal = outputs.diagonal()
        outputs = (1 - gamma) * outputs + torch.diag(gamma * diagonal + RIDGE * diagonal.mean())
    return make_metric(
        matrix, m.second, m.mean, m.cross, m.dense_mean,
        centred=evidence.centred, gamma=gamma, ridge=RIDGE, outputs=outputs,
    )  # fmt: skip


def _rounded(form: MPO, dtype: torch.dtype) -> MPO:
    return MPO([core.to(dtype).contiguous() for core in form.cores], form.structure)


def _judged(
    matrix: Tensor, form: MPO, evidence: Evidence, gamma: float, held_out_error: float
) -> CalibratedFit:
    found, moments = matrix_of(form), evidence.moments
    shift = matrix @ moments.dense_mean - found @ moments.mean if evidence.centred else None
    norm = float(torch.linalg.vector_norm(matrix))
    return CalibratedFit(
        form,
        shift,
        gamma,
        float(torch.linalg.vector_norm(matrix - found)) / norm if norm else 0.0,
        output_error(matrix, found, evidence.seen),
        held_out_error,
    )


def output_error(matrix: Tensor, found: Tensor, second: Second) -> float:
    """√(E‖Wx − Ŵx̃‖² / E‖Wx‖²) about the means; 0 for 0/0.

    Args:
        matrix: W (N_y, N_x).
        found: Ŵ.
        second: moments of x̃ and x.
    """
    whole = squared_error(matrix, torch.zeros_like(matrix), second, None)
    error = squared_error(matrix, found, second, None)
    return math.sqrt(error / whole) if whole > 0 else 0.0


def squared_error(matrix: Tensor, found: Tensor, second: Second, outputs: Tensor | None) -> float:
    """E of (Wx − Ŵx̃)ᵀ G (Wx − Ŵx̃) about the means; G = ``outputs``, None for the identity."""
    left, middle = matrix @ second.dense - found @ second.cross.T, matrix @ second.cross
    error = left @ matrix.T - (middle - found @ second.mine) @ found.T
    found_error = float(error.trace() if outputs is None else (error * outputs).sum())
    return math.inf if math.isnan(found_error) else max(0.0, found_error)
