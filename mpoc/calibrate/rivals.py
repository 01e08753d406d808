"""What other methods would have made of a layer at the same size, on the same held-out inputs.

Errors are weighed by how much the network's output feels them, as the fit weighs them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpoc.budget import largest_bond
from mpoc.calibrate.evidence import RIDGE, Evidence, one_matrix, squared_error
from mpoc.fit.metric import Metric, make_metric
from mpoc.fit.ttsvd import tt_svd
from mpoc.fit.weighted_mpo import matrix_of
from mpoc.fit.weighted_svd import weighted_svd
from mpoc.structure import Structure, low_rank_structure, make_structure


def rivals(
    weight: Tensor, structure: Structure, parameters: int, evidence: Evidence, seed: int = 0
) -> dict[str, float]:
    """Errors of the same layer by other methods, all before it as it is, by :func:`felt_error`.

    ``plain svd`` and ``plain mpo`` (TT-SVD at the default factors) are nearest to the weight,
    ``whitened svd`` to what the layer does in the dense network (SVD-LLM, Wang et al. 2024).

    Args:
        weight: of shape ``structure.shape``.
        structure: of a linear map or of a convolution without groups.
        parameters: that are stored; a method that cannot be so small is left out.
        evidence: as of the layer's own fit.
        seed: of the range finder in TT-SVD.
    """
    kind, shape, transposed = structure.kind, structure.shape, structure.transposed
    matrix = one_matrix(weight, kind, transposed)
    found: dict[str, Tensor] = {}
    rank = parameters // low_rank_structure(kind, shape, transposed).num_parameters(1)
    if rank:
        left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
        found["plain svd"] = (left[:, :rank] * values[:rank] @ right[:rank]).double()
        white = weighted_svd(_dense_metric(matrix, evidence))
        found["whitened svd"] = white.left[:, :rank] @ white.right[:rank]
    chain = make_structure(kind, shape, transposed)
    bond = largest_bond(chain, parameters / chain.num_original)
    if bond is not None and chain.num_parameters(bond) <= parameters:
        found["plain mpo"] = matrix_of([tt_svd(weight, chain, bond, seed=seed).form])
    return {name: felt_error(matrix, other, evidence) for name, other in found.items()}


def _dense_metric(matrix: Tensor, evidence: Evidence) -> Metric:
    m = evidence.moments
    return make_metric(
        matrix, m.dense_second, m.dense_mean, m.dense_second, m.dense_mean,
        centred=evidence.centred, gamma=0.0, ridge=RIDGE, outputs=None,
    )  # fmt: skip


def felt_error(matrix: Tensor, found: Tensor, evidence: Evidence) -> float:
    """√(E‖Wx − Ŵx̃‖² / E‖Wx‖²) of held-out inputs about the means, outputs weighed by G; 0 for 0/0."""
    whole = squared_error(matrix, torch.zeros_like(matrix), evidence.unseen, evidence.outputs)
    error = squared_error(matrix, found, evidence.unseen, evidence.outputs)
    return math.sqrt(error / whole) if whole > 0 else 0.0
