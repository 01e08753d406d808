"""The best low-rank weight in a weighted norm, in closed form (as whitened SVD: SVD-LLM, Wang et al. 2024).

With M = F Fᵀ and G = H Hᵀ, f(Ŵ) = ‖Hᵀ (T − Ŵ) F‖², and by Eckart and Young the best Hᵀ Ŵ F of rank r is
the truncated SVD U_r S_r V_rᵀ of Hᵀ T F.  Nothing needs to be divided by F or H to come back from there:

    Ŵ = (T F V_r) S_r⁻¹ (U_rᵀ Hᵀ T).

Where M and G are regular this is the only minimiser.  Where they are not, it keeps what T does in directions
that cost nothing, as far as the rank allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpoc.fit.metric import Metric, weighed

# Singular values below this share of the largest are zero up to rounding.
_FLOOR = 1e-13


@dataclass(frozen=True)
class WeightedSVD:
    """The best weight of any rank r is ``left[:, :r] @ right[:r]``, and its f is Σ_{k≥r} values[k]²."""

    left: Tensor  # (N_y, K) float64
    values: Tensor  # (K,) float64, descending
    right: Tensor  # (K, N_x) float64; row k has the norm of left's column k

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best weight of this rank as (N_y, r) and (r, N_x) with equal, diagonal Gram matrices."""
        left, upper = torch.linalg.qr(self.left[:, :rank])
        right, lower = torch.linalg.qr(self.right[:rank].T)
        u, values, v = torch.linalg.svd(upper @ lower.T)
        root = values.sqrt()
        return left @ (u * root), (root[:, None] * v) @ right.T


def weighted_svd(metric: Metric) -> WeightedSVD:
    """The minimisers of f over all weights of rank 1, 2, … K ≤ min(N_y, N_x).

    K is the rank of the target as the metric sees it, at least 1; f at rank K is zero.
    """
    seen_inputs = metric.target @ metric.input_root  # T F
    root = metric.output_root
    root = None if root is None else root.mT if root.dim() == 2 else root
    seen_outputs = weighed(root, metric.target)  # Hᵀ T
    whitened = weighed(root, seen_inputs)
    u, values, v = torch.linalg.svd(whitened, full_matrices=False)
    count = max(1, int((values > _FLOOR * values[0]).sum()))
    u, values, v = u[:, :count], values[:count], v[:count]
    inverse = torch.where(values > 0, 1 / values, 0)
    left = u * values if root is None else seen_inputs @ v.T
    right = inverse[:, None] * (u.T @ seen_outputs)
    tiny = torch.finfo(values.dtype).tiny  # keeps 0/0 of a zero target 0
    balance = (right.norm(dim=1).clamp(min=tiny) / left.norm(dim=0).clamp(min=tiny)).sqrt()
    return WeightedSVD(left * balance, values, right / balance[:, None])
