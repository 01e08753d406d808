"""What other methods would have made of a layer at the same size, on the same held-out inputs.

Errors are weighed by how much the network's output feels them, as the fit weighs them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpoc.budget import largest_bond
from mpoc.calibrate.evidence import Evidence, one_matrix
from mpoc.fit.ttsvd import tt_svd
from mpoc.fit.weighted import matrix_of
from mpoc.fit.weighted_svd import weighted_svd
from mpoc.structure import Structure, make_structure


def rivals(
    weight: Tensor, structure: Structure, parameters: int, evidence: Evidence, seed: int = 0
) -> dict[str, float]:
    """Errors of the same layer by other methods, all before it as it is: ``evidence.felt``, relative.

    ``plain svd`` and ``plain mpo`` (TT-SVD at the default factors) are nearest to the weight,
    ``whitened svd`` to what the layer does in the dense network (SVD-LLM, Wang et al. 2024).

    Args:
        weight: of shape ``structure.shape``.
        structure: of a linear map, of a convolution without groups or of an embedding.
        parameters: that are stored; a method that cannot be so small is left out.
        evidence: as of the layer's own fit.
        seed: of the range finder in TT-SVD.
    """
    kind, shape, transposed = structure.kind, structure.shape, structure.transposed
    matrix = one_matrix(weight, kind, transposed)
    found: dict[str, Tensor] = {}
    rank = parameters // structure.as_low_rank().num_parameters(1)
    if rank:
        left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
        found["plain svd"] = (left[:, :rank] * values[:rank] @ right[:rank]).double()
        white = weighted_svd(evidence.whitened(matrix))
        found["whitened svd"] = white.left[:, :rank] @ white.right[:rank]
    chain = make_structure(kind, shape, transposed)
    bond = largest_bond(chain, parameters / chain.num_original)
    if bond is not None and chain.num_parameters(bond) <= parameters:
        found["plain mpo"] = matrix_of([tt_svd(weight, chain, bond, seed=seed).form])
    return {name: evidence.felt.relative(matrix, other) for name, other in found.items()}
