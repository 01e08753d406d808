"""Truncate one matrix to low rank, the step that every TT-SVD repeats, and say how far bonds are truncated.

A TT-SVD spends its time in truncated SVDs of wide unfoldings, and a full SVD makes it slow. There are three
routes:

- ``kept``: the bond may be as large as the smaller side, so nothing is discarded and at most one QR is
  computed.
- ``krylov``: the bond is far below the smaller side. A block Krylov basis from a random start grows until the
  error has stopped falling: by Golub-Kahan bidiagonalisation (Golub, Luk, Overton 1981; Musco, Musco 2015),
  or where one side is much longer by a Lanczos iteration (Golub, Underwood 1977) on the Gram matrix of the
  other, formed once. If the basis would get too wide, or the matrix has no further directions (few non-zero
  rows), ``exact`` takes over.
- ``exact``: everything else, and every truncation to a tolerance. For float32 data it computes the
  eigenvectors of the Gram matrix of the smaller side, formed in float64 if the error is small, since squaring
  the condition number costs digits that float32 does not have. For float64 data it computes an SVD.

The trade-off: the error of ``krylov`` is within a factor 1.001 of the optimum, at a few per cent of the cost.

Weights are first scaled to about 1 by a power of two, since float32 can square neither 1e-40 nor 1e38.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpoc.tensor_networks.fit.second_moment import ProductSum, has_exact_products
from mpoc.tensor_networks.forms.mpo import rank_within


@dataclass(frozen=True)
class Truncation:
    """How far bonds are truncated.

    The bond dimension is D_k = min {D : Σ_{r>D} s_r² ≤ ε Σ s_r²}, at most ``max_bond``, where ε is
    ``discard`` and s are the singular values of the unfolding of what the earlier bonds have kept.
    """

    max_bond: int  # cap on every bond
    # Errors that may be made to get below the cap: the weight's relative Frobenius error, and ε, the share of
    # its squared Schmidt values that each bond may lose.
    tolerance: float = 0.0
    discard: float = 0.0
    rank: int = 0  # rank of the low-rank part of a sum

    @property
    def is_open(self) -> bool:
        """Whether the weight's spectrum decides how far bonds are below the cap."""
        return bool(self.tolerance or self.discard)


@dataclass(frozen=True)
class Target:
    """The dtype of the cores that a fit returns, and its random seed."""

    dtype: torch.dtype | None = None  # dtype of the stored cores; None: that of the weight
    seed: int = 0  # seed of the randomised range finder and of random starts


DEFAULT_TARGET = Target()


# Between 2⁻⁴⁰ and 2⁴⁰, squares and sums of squares keep all their digits.
_PLAIN = 40

# The Krylov basis grows until the expected gain is below this share of the error, or a tenth of it while the
# basis is less than four times the bond, where the gain is hard to estimate.
_KRYLOV_GAIN = 8e-4
# Above this share of the smaller side the exact route is as cheap.
_KRYLOV_WIDEST = 0.5
# Small Gram matrices cost nothing. On a flat spectrum the basis grows to about five times the bond.
_KRYLOV_SMALLEST = 512
# The longer side is so many times the smaller one where the Gram matrix is worth forming, up to this width.
_LANCZOS_ASPECT, _LANCZOS_WIDEST = 4, 1536
# A new direction with less than this share outside the basis is rounding noise.
_LEAST_NEW = 0.1
# If less than this share of the largest squared singular value is lost, a Gram matrix of float32 products is
# too coarse. One of float64 products resolves singular values down to 1e-8 of the largest.
_SINGLE_FLOOR = 0.02
_GRAM_CHUNK = 4096


def largest(tensor: Tensor) -> float:
    """max |x| in one pass; NaN or infinite if an entry is, 0 for an empty tensor."""
    ends = torch.aminmax(tensor) if tensor.numel() else ()
    return max((abs(float(end)) for end in ends), default=0.0)


def exponent_of(tensor: Tensor) -> int:
    """e such that 2ᵉ⁻¹ ≤ max |x| < 2ᵉ; 0 if no scaling is needed."""
    most = largest(tensor)
    exponent = math.frexp(most)[1] if math.isfinite(most) else 0
    return exponent if abs(exponent) > _PLAIN else 0


def scaled(tensor: Tensor, exponent: int) -> Tensor:
    """2ᵉ · tensor, in two steps, since 2ᵉ itself may overflow float32."""
    half = exponent // 2
    return tensor * 2.0**half * 2.0 ** (exponent - half) if exponent else tensor


def spread(cores: Sequence[Tensor], exponent: int) -> list[Tensor]:
    """Cores of 2ᵉ times the weight; each core takes an equal part of e."""
    share, rest = divmod(exponent, len(cores))
    return [scaled(core, share + (k < rest)) for k, core in enumerate(cores)]


@dataclass(frozen=True)
class TruncatedSVD:
    """``matrix ≈ left @ right`` with orthonormal columns in ``left``."""

    left: Tensor  # (m, D), leftᵀ left = 1
    right: Tensor  # (D, n)
    discarded: float  # ‖matrix − left @ right‖², in the matrix's units squared
    route: str  # "kept", "krylov" or "exact"
    singular_values: Tensor | None  # all min(m, n), float64, descending; exact route only


def truncate(
    matrix: Tensor,
    max_bond: int,
    discard: float = 0.0,
    generator: torch.Generator | None = None,
    weight: float | None = None,
    stored: torch.dtype | None = None,
) -> TruncatedSVD:
    """Approximate ``matrix`` (m, n) by rank at most ``max_bond``.

    Args:
        matrix: float32 or float64, (m, n).
        max_bond: largest rank, at least 1.
        discard: squared Frobenius error that may be made to get a smaller rank.
        generator: CPU generator of the random start; None: torch's default.
        weight: ‖matrix‖², if it is already known.
        stored: a dtype that holds every entry exactly; Gram matrices are formed in it where products of that
            dtype are exact (:func:`mpoc.tensor_networks.fit.second_moment.has_exact_products`).
    """
    narrow = torch.float32
    if stored is not None and has_exact_products(matrix.new_empty(1, 1, dtype=stored)):
        narrow = stored
    smaller = min(matrix.shape)
    if max_bond >= smaller and discard == 0.0:
        return _keep(matrix)
    if discard == 0.0 and smaller > _KRYLOV_SMALLEST and 5 * max_bond <= _KRYLOV_WIDEST * smaller:
        weight = squared_norm(matrix) if weight is None else weight
        result = _lanczos(matrix, max_bond, generator, weight, narrow)
        if result is None:
            result = _krylov(matrix, max_bond, generator, weight)
        if result is not None:
            return result
    return _exact(matrix, max_bond, discard, narrow)


def squared_norm(tensor: Tensor) -> float:
    """‖tensor‖², summed in float64 without a float64 copy of the whole tensor."""
    flat = tensor.reshape(-1)
    return math.fsum(part.double().square().sum().item() for part in flat.split(1 << 16))


def _keep(matrix: Tensor) -> TruncatedSVD:
    rows, columns = matrix.shape
    if rows <= columns:
        identity = torch.eye(rows, dtype=matrix.dtype, device=matrix.device)
        return TruncatedSVD(identity, matrix, 0.0, "kept", None)
    left, right = torch.linalg.qr(matrix)
    return TruncatedSVD(left, right, 0.0, "kept", None)


def _exact(matrix: Tensor, max_bond: int, discard: float, narrow: torch.dtype) -> TruncatedSVD:
    if matrix.dtype == torch.float64:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        rank, lost = rank_within(values, max_bond, discard)
        return TruncatedSVD(left[:, :rank], values[:rank, None] * right[:rank], lost, "exact", values)
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    values, vectors = _left_singular(wide, narrow)
    rank, lost = rank_within(values, max_bond, discard)
    if lost < _SINGLE_FLOOR * float(values[0]) ** 2:
        values, vectors = _left_singular(wide, torch.float64)
        rank, lost = rank_within(values, max_bond, discard)
    basis = vectors[:, :rank].to(matrix.dtype)
    if not tall:
        return TruncatedSVD(basis, basis.T @ matrix, lost, "exact", values)
    left, triangle = torch.linalg.qr(matrix @ basis)
    return TruncatedSVD(left, triangle @ basis.T, lost, "exact", values)


def _left_singular(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Singular values (m,), float64, descending, and left singular vectors (m, m), from wide @ wideᵀ."""
    squares, vectors = torch.linalg.eigh(gram(wide, dtype))
    return squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)


def gram(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """wide @ wideᵀ, (m, m), float64.

    The products are formed in ``dtype``, or in float32 where that has 16 bits, one block of columns at a
    time, and summed in float64.
    """
    products = ProductSum()
    for block in wide.split(_GRAM_CHUNK, dim=1):
        rows = block.to(dtype).T
        products.add(rows, rows)
    return products.total()


def _krylov_block(max_bond: int) -> int:
    """Block width: half the bond. Narrower blocks give a higher polynomial degree, but slower products."""
    return min(max(max_bond // 2, 16), 128)


def _lanczos(
    matrix: Tensor, max_bond: int, generator: torch.Generator | None, weight: float, narrow: torch.dtype
) -> TruncatedSVD | None:
    """Block Lanczos with full reorthogonalisation on the Gram matrix of the smaller side.

    None where forming that costs more than it saves, where float32 products are too coarse, or where the
    basis would get too wide.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    rows, columns = wide.shape
    if matrix.dtype != torch.float32 or rows > _LANCZOS_WIDEST or columns < _LANCZOS_ASPECT * rows:
        return None
    square, block = gram(wide, narrow), _krylov_block(max_bond)
    start = torch.randn(rows, block, generator=generator, dtype=torch.float64).to(square.device)
    basis = torch.linalg.qr(start)[0]
    moved = square @ basis
    errors: list[float] = []
    while basis.shape[1] <= _KRYLOV_WIDEST * rows:
        extended = _extend(moved[:, -block:], basis)
        if extended is None:
            return None
        basis = torch.cat([basis, extended[0]], 1)
        moved = torch.cat([moved, square @ extended[0]], 1)
        width = basis.shape[1]
        if width < max_bond:
            continue
        values, vectors = torch.linalg.eigh(basis.T @ moved)
        errors.append(weight - float(values[-max_bond:].sum()))
        gain = _gain_to_come(errors) * (1 if width >= 4 * max_bond else 10)
        if errors[-1] < _SINGLE_FLOOR * float(values[-1]):
            return None
        if gain <= 2 * _KRYLOV_GAIN * errors[-1]:
            return _along(matrix, (basis @ vectors[:, -max_bond:]).to(matrix.dtype), weight)
    return None


def _along(matrix: Tensor, basis: Tensor, weight: float) -> TruncatedSVD:
    """The truncation within an orthonormal basis (s, D) of the smaller side, of ‖matrix‖² = ``weight``."""
    if matrix.shape[0] <= matrix.shape[1]:
        left, kept = basis, basis.T @ matrix
    else:
        left, triangle = torch.linalg.qr(matrix @ basis)
        kept = triangle @ basis.T
    return TruncatedSVD(left, kept, max(weight - squared_norm(kept), 0.0), "krylov", None)


def _krylov(
    matrix: Tensor, max_bond: int, generator: torch.Generator | None, weight: float
) -> TruncatedSVD | None:
    """Block Golub-Kahan with full reorthogonalisation; None if the basis would get too wide."""
    rows, columns = matrix.shape
    block = _krylov_block(max_bond)
    widest = int(_KRYLOV_WIDEST * min(rows, columns)) // block * block
    left = matrix.new_empty(rows, widest)
    right = matrix.new_empty(columns, widest + block)
    projected = matrix.new_zeros(widest, widest + block)  # leftᵀ matrix right
    start = torch.randn(columns, block, generator=generator, dtype=matrix.dtype).to(matrix.device)
    right[:, :block] = torch.linalg.qr(start)[0]
    errors: list[float] = []
    for width in range(block, widest + 1, block):
        new, grown = slice(width - block, width), slice(width, width + block)
        extended = _extend(matrix @ right[:, new], left[:, : width - block])
        if extended is None:
            return None
        left[:, new] = extended[0]
        extended = _extend(matrix.T @ left[:, new], right[:, :width])
        if extended is None:
            return None
        right[:, grown], inside, outside = extended
        projected[new, :width] = inside.T
        projected[new, grown] = outside.T
        if width < max_bond:
            continue
        small = projected[:width, : width + block].double()
        squares = small @ small.T
        captured = float(torch.linalg.eigvalsh(squares)[-max_bond:].sum())
        errors.append(weight - captured)
        gain = _gain_to_come(errors) * (1 if width >= 4 * max_bond else 10)
        result = _converged(matrix, left[:, :width], squares, max_bond, weight, errors[-1], gain)
        if result is not None:
            return result
    return None


def _converged(
    matrix: Tensor, left: Tensor, squares: Tensor, max_bond: int, weight: float, error: float, gain: float
) -> TruncatedSVD | None:
    """The truncation within a Krylov basis; None while a wider basis would still lower the error.

    Args:
        matrix: (m, n).
        left: orthonormal basis, (m, w).
        squares: Gram matrix of ``matrix`` projected on ``left``, (w, w), float64.
        max_bond: the rank.
        weight: ‖matrix‖².
        error: squared error of the truncation, as a difference of squared norms.
        gain: by how much a wider basis is expected to lower it.
    """
    rounding = torch.finfo(matrix.dtype).eps
    resolved = error > 100 * rounding * weight  # else lost in the difference of two norms
    if resolved and gain > 2 * _KRYLOV_GAIN * error:
        return None
    vectors = torch.linalg.eigh(squares)[1][:, -max_bond:]
    basis = left @ vectors.to(matrix.dtype)
    kept = basis.T @ matrix
    if resolved:
        return TruncatedSVD(basis, kept, max(weight - squared_norm(kept), 0.0), "krylov", None)
    lost = squared_norm(torch.addmm(matrix, basis, kept, alpha=-1))
    gain = max(gain, 1e-15 * weight)  # what float64 sums resolve
    if gain <= 2 * _KRYLOV_GAIN * lost or lost <= (16 * rounding) ** 2 * weight:
        return TruncatedSVD(basis, kept, lost, "krylov", None)
    return None


def _extend(block: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """``block = basis @ inside + new @ outside`` with ``new`` orthonormal and orthogonal to ``basis``.

    Columns of ``block`` may lie in ``basis`` up to rounding, so the QR's result is orthogonalised against
    ``basis`` once more. None if nothing is left: the matrix has no further directions.
    """
    inside = basis.T @ block
    rest = block - basis @ inside
    new = torch.linalg.qr(rest)[0]
    new, triangle = torch.linalg.qr(new - basis @ (basis.T @ new))
    if float(triangle.diagonal().abs().min()) < _LEAST_NEW:
        return None
    return new, inside, new.T @ rest


def _gain_to_come(errors: list[float]) -> float:
    """Expected further decrease of the squared error, if the last gains continue geometrically."""
    if len(errors) < 2:
        return math.inf
    last = errors[-2] - errors[-1]
    before = errors[-3] - errors[-2] if len(errors) > 2 else 0.0
    shrinking = min(max(last / before, 0.0), 0.95) if before > 0 else 0.7
    return last * shrinking / (1 - shrinking)
