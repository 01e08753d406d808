"""Coordinates, one matrix a site, in which a weighted norm is nearly the plain one.

A moment M over all sites together is likened to a product X_1 ⊗ X_2 ⊗ … : each X_k is the mean of M's blocks
once all other sites are white (the flip-flop algorithm for matrix normal distributions: Dutilleul 1999).
In the coordinates H = ⊗ Y_k^½ of the outputs, whose moment is G, and F = ⊗ X_k^½ of the inputs,

    T → H T F,    Ŵ → H Ŵ F,    M → F⁻¹ M F⁻¹,    G → H⁻¹ G H⁻¹,

f is the same number, Ŵ a form with the same bonds, and the new M and G are the identity on average.  TT-SVD
is then a good start, and gradients point the right way.  The X_k that are nearest to M in Frobenius norm look
at its large eigenvalues alone: measured, a worse start and a slower way from there.

Also the best low-rank weight in a weighted norm, in closed form (whitened SVD: SVD-LLM, Wang et al. 2024).

With M = F Fᵀ and G = H Hᵀ, f(Ŵ) = ‖Hᵀ (T − Ŵ) F‖², and by Eckart and Young the best Hᵀ Ŵ F of rank r is
the truncated SVD U_r S_r V_rᵀ of Hᵀ T F.  Nothing needs to be divided by F or H to come back from there:

    Ŵ = (T F V_r) S_r⁻¹ (U_rᵀ Hᵀ T).

Where M and G are regular this is the only minimiser.  Where they are not, it keeps what T does in directions
that cost nothing, as far as the rank allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mpoc.tensor_networks.fit.metric import Metric, weighed
from mpoc.tensor_networks.fit.second_moment import RowMoment
from mpoc.tensor_networks.forms.form import Form

_ROUNDS = 4
# Added to each X_k, of mean eigenvalue 1: sites with features that never occur stay invertible.
_FLOOR = 1e-6
_SAMPLE = 1 << 20  # numbers of a moment's rows, about


@dataclass(frozen=True)
class WhitenedCoordinates:
    """Y_k^½ and X_k^½ and their inverses, each symmetric."""

    outputs: list[Tensor]  # (J_k, J_k) float64 each, or (J_k,) where G is diagonal
    inputs: list[Tensor]  # (I_k, I_k)
    outputs_inverse: list[Tensor]
    inputs_inverse: list[Tensor]

    def whiten(self, metric: Metric) -> Metric:
        """The same f for H Ŵ F, in the metric's dtype."""
        target = _columns(metric.target, self.inputs)
        target = _columns(target.T, self.outputs).T
        outputs = None if metric.outputs is None else _both_sides(metric.outputs, self.outputs_inverse)
        inputs = metric.inputs
        if isinstance(inputs, RowMoment):
            return Metric(
                target, replace(inputs, outer=partial(_columns, factors=self.inputs_inverse)), outputs
            )
        return Metric(target, _both_sides(inputs, self.inputs_inverse), outputs)

    def whiten_form(self, form: Form) -> Form:
        """Ŵ → H Ŵ F, in float64."""
        return _transform(form, self.outputs, self.inputs)

    def restore_form(self, form: Form) -> Form:
        """H Ŵ F → Ŵ, in float64."""
        return _transform(form, self.outputs_inverse, self.inputs_inverse)


def whitened_coordinates(
    metric: Metric, output_factors: Sequence[int], input_factors: Sequence[int]
) -> WhitenedCoordinates:
    """Coordinates for sites with these factors, whose products are the metric's sides."""
    inputs = _roots(kronecker_factors(metric.inputs, input_factors))
    if metric.outputs is None:
        ones = [metric.target.new_ones(size) for size in output_factors]
        return WhitenedCoordinates(ones, inputs[0], ones, inputs[1])
    if metric.outputs.dim() == 1:
        diagonals = diagonal_factors(metric.outputs, output_factors)
        roots = [diagonal.sqrt() for diagonal in diagonals]
        return WhitenedCoordinates(roots, inputs[0], [1 / root for root in roots], inputs[1])
    outputs = _roots(kronecker_factors(metric.outputs, output_factors))
    return WhitenedCoordinates(outputs[0], inputs[0], outputs[1], inputs[1])


def kronecker_factors(moment: Tensor | RowMoment, sizes: Sequence[int]) -> list[Tensor]:
    """X_1, X_2, … of trace equal to their size, positive definite, with ⊗ X_k ∝ ``moment`` roughly.

    Of a moment that is given as rows, some of them are enough.
    """
    block = partial(_block, moment, sizes) if isinstance(moment, Tensor) else _row_block(moment, sizes)
    diagonal = moment.diagonal()
    factors = [torch.eye(size, dtype=diagonal.dtype, device=diagonal.device) for size in sizes]
    if float(diagonal.sum()) <= 0.0:
        return factors
    inverses = list(factors)
    for _ in range(_ROUNDS):
        for k, size in enumerate(sizes):
            mean = block(inverses, k)
            mean = (mean + mean.T) / (2 * float(mean.trace()) / size)
            mean.diagonal().add_(_FLOOR)
            factors[k] = mean
            inverses[k] = torch.cholesky_inverse(torch.linalg.cholesky(mean))
    return factors


def _block(moment: Tensor, sizes: Sequence[int], inverses: Sequence[Tensor], k: int) -> Tensor:
    """The sum of M's blocks (I_k, I_k), all other sites multiplied by their inverses."""
    count = len(sizes)
    operands: list[Tensor | list[int]] = [moment.reshape(*sizes, *sizes), list(range(2 * count))]
    for other in range(count):
        if other != k:
            operands += [inverses[other], [other, count + other]]
    return torch.einsum(*operands, [k, count + k])


def _row_block(moment: RowMoment, sizes: Sequence[int]) -> Callable[[Sequence[Tensor], int], Tensor]:
    """The same of a moment's rows and ridge."""
    step = -(-moment.left.values.numel() // _SAMPLE)
    rows = moment.left.values[::step] - moment.left.centre.to(moment.left.values.dtype)
    rows *= (step * moment.weights[::step]).sqrt().to(rows.dtype)[:, None]
    ridge = moment.ridge if moment.ridge is not None else torch.zeros_like(moment.left.centre)

    def block(inverses: Sequence[Tensor], k: int) -> Tensor:
        others = [torch.ones_like(x.diagonal()) if j == k else x for j, x in enumerate(inverses)]
        diagonals = [x if x.dim() == 1 else x.diagonal() for x in others]

        def at_site(matrix: Tensor) -> Tensor:
            return matrix.reshape(-1, *sizes).movedim(k + 1, 0).flatten(1)

        spread = at_site(_columns(ridge[None], diagonals)).sum(1)
        products = at_site(rows) @ at_site(_columns(rows, others)).T
        return products.double() + torch.diag(spread)

    return block


def diagonal_factors(moment: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The same of a diagonal ``moment`` (N,): factors (size,) each, the mean of their entries 1."""
    factors = [moment.new_ones(size) for size in sizes]
    if float(moment.sum()) <= 0.0:
        return factors
    for _ in range(_ROUNDS):
        for k in range(len(sizes)):
            inverses = [1 / other if j != k else torch.ones_like(other) for j, other in enumerate(factors)]
            mean = _columns(moment[None], inverses).reshape(sizes).movedim(k, 0).flatten(1).sum(1)
            factors[k] = mean / mean.mean() + _FLOOR
    return factors


def _roots(factors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """X_k^½ and X_k^-½."""
    roots: list[Tensor] = []
    inverses: list[Tensor] = []
    for factor in factors:
        values, vectors = torch.linalg.eigh(factor)
        root = values.sqrt()
        roots.append((vectors * root) @ vectors.T)
        inverses.append((vectors / root) @ vectors.T)
    return roots, inverses


def _columns(matrix: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``matrix`` (m, N) @ ⊗ factors, each symmetric or a diagonal, in the dtype of ``matrix``."""
    tensor = matrix.reshape(-1, *(len(factor) for factor in factors))
    for factor in factors:  # each contraction moves its axis to the end, so all come back in order
        tensor = _times(tensor, factor.to(matrix), 1).movedim(1, -1)
    return tensor.reshape(matrix.shape)


def _times(tensor: Tensor, factor: Tensor, axis: int) -> Tensor:
    """One axis of ``tensor`` multiplied by a symmetric factor, or by a diagonal (size,)."""
    last = tensor.movedim(axis, -1)
    if factor.dim() == 1:
        return (last * factor).movedim(-1, axis)
    product = last.reshape(-1, len(factor)) @ factor  # one product: of strided batches there would be many
    return product.view(last.shape).movedim(-1, axis)


def _both_sides(moment: Tensor, factors: list[Tensor]) -> Tensor:
    if moment.dim() == 1:
        return _columns(_columns(moment[None], factors), factors)[0]
    product = _columns(_columns(moment, factors).T, factors)
    return (product + product.T) / 2


def _transform(form: Form, outputs: list[Tensor], inputs: list[Tensor]) -> Form:
    return form.with_cores([core for term in form.terms for core in _transformed(term, outputs, inputs)])


def _transformed(term: Form, outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The cores of one network, each open leg multiplied by its site's matrix."""
    cores = [core.double() for core in term.cores]
    if term.structure.one_matrix:  # its two legs are those of all sites
        left, right = cores[0][0, :, 0], cores[1][:, 0, :, 0]
        left, right = _columns(left.T, outputs).T, _columns(right, inputs)
        return [left[None, :, None], right[:, None, :, None]]
    factors = {f"{side}{k}": x for side, xs in (("j", outputs), ("i", inputs)) for k, x in enumerate(xs, 1)}
    for k, legs in enumerate(term.legs):
        for axis, leg in enumerate(legs):
            if leg in factors:
                cores[k] = _times(cores[k], factors[leg], axis)
    return cores


# Singular values below this share of the largest are zero up to rounding.
_SVD_FLOOR = 1e-13
_GRAM_FLOOR = 1e-6  # those found as roots of eigenvalues are not told from zero below this share


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
    outputs, inputs = metric.target.shape
    found = _svd_of_outputs(metric) if outputs <= inputs else _svd_of_inputs(metric)
    if found is not None:
        return found
    seen_inputs = metric.target @ metric.input_root  # T F
    root = _transposed(metric.output_root)
    u, values, v = torch.linalg.svd(weighed(root, seen_inputs), full_matrices=False)
    count = max(1, int((values > _SVD_FLOOR * values[0]).sum()))
    u, values, v = u[:, :count], values[:count], v[:count]
    left = u * values if root is None else seen_inputs @ v.T
    return _balanced(left, _inverse_of(values)[:, None] * (u.T @ weighed(root, metric.target)), values)


def _svd_of_outputs(metric: Metric) -> WeightedSVD | None:
    """As :func:`weighted_svd`, from the moment of the outputs, Hᵀ T (M + R) Tᵀ H = U S² Uᵀ.

    None where squares are too small to tell; of a moment that is given as rows, they are left out.
    """
    root = _transposed(metric.output_root)
    outputs: Tensor = metric.target @ metric.inputs @ metric.target.T
    values, u = _singular(weighed(root, weighed(root, outputs).T))
    count = max(1, int((values > _GRAM_FLOOR * values[0]).sum()))
    regular = root is None or root.dim() == 1 or metric.output_lower is not None
    if isinstance(metric.inputs, Tensor) and (count < len(values) or not regular):
        return None
    u, values = u[:, :count], values[:count]
    if root is None:
        left = u * values
    elif root.dim() == 2 and regular:
        left = torch.linalg.solve_triangular(root, u * values, upper=True)
    else:
        left = outputs @ weighed(metric.output_root, u) * _inverse_of(values)
    return _balanced(left, _inverse_of(values)[:, None] * (u.T @ weighed(root, metric.target)), values)


def _svd_of_inputs(metric: Metric) -> WeightedSVD | None:
    """As :func:`weighted_svd`, from the other side, Fᵀ Tᵀ G T F = V S² Vᵀ and Ŵ = T F V Vᵀ F⁻¹.

    None where squares are too small to tell, or where F is not known as a triangle.
    """
    lower = metric.input_lower
    if lower is None:
        return None
    values, v = _singular(lower.T @ (metric.target.T @ weighed(metric.outputs, metric.target)) @ lower)
    if float(values[-1]) <= _GRAM_FLOOR * float(values[0]):
        return None
    right = torch.linalg.solve_triangular(lower, v.T, upper=False, left=False)
    return _balanced(metric.target @ (lower @ v), right, values)


def _singular(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending, from the Gram matrix of one side, and the vectors of that side."""
    squares, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def _transposed(root: Tensor | None) -> Tensor | None:
    return root.mT if root is not None and root.dim() == 2 else root


def _inverse_of(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1 / values, 0)


def _balanced(left: Tensor, right: Tensor, values: Tensor) -> WeightedSVD:
    """The factors with columns and rows of equal norms."""
    tiny = torch.finfo(values.dtype).tiny  # keeps 0/0 of a zero target 0
    balance = (right.norm(dim=1).clamp(min=tiny) / left.norm(dim=0).clamp(min=tiny)).sqrt()
    return WeightedSVD(left * balance, values, right / balance[:, None])


class BesideLowRank:
    """f of what the best weight of a given rank leaves of an error: its part in a sum is no variable then.

    With E = T − Ŵ, and U the leading eigenvectors of Hᵀ E M Eᵀ H, the best weight of rank r beside Ŵ leaves
    K (E M) of the gradient G E M, K = H (1 − U Uᵀ) Hᵀ, and the other eigenvalues of f; from the side of the
    inputs likewise, where that is the smaller one.

    Args:
        metric: in whitened coordinates; the arithmetic has its dtype.
        rank: r.
    """

    def __init__(self, metric: Metric, rank: int) -> None:
        self.target, self._rank, self._metric = metric.target, rank, metric
        outputs, inputs = metric.target.shape
        self._of_inputs = inputs < outputs and isinstance(metric.inputs, Tensor)
        root = metric.input_root if self._of_inputs else metric.output_root
        if root is None:
            root = metric.target.new_ones(outputs)
        self._root = torch.diag(root) if root.dim() == 1 else root

    def weighed_error(self, error: Tensor) -> tuple[float, Tensor]:
        """f beside the best weight of the rank, and its G E M."""
        if self._of_inputs:
            half = weighed(self._metric.outputs, error)  # G E
            left = half @ self._rest(error.T @ half)
        else:
            half = error @ self._metric.inputs  # E M
            left = self._rest(half @ error.T) @ half
        return float((error * left).sum(dtype=torch.float64)), left

    def _rest(self, gram: Tensor) -> Tensor:
        """R P Rᵀ, P the projector on the eigenvectors of Rᵀ ``gram`` R but the r leading ones."""
        gram = self._root.T @ gram @ self._root
        vectors = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors
        seen = self._root @ vectors[:, : max(0, len(vectors) - self._rank)]
        return seen @ seen.T
