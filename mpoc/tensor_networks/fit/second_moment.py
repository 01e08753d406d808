"""Second moments E[x yᵀ] that are multiplied by and not formed: of rows, or about means.

What multiplies a matrix from the right, ``matrix @ moment``, may be any of these or a matrix itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

_PANEL = 256  # rows that are worked with in float64 at a time
# Of one product: rows, and columns that are formed at a time of a symmetric one
_ROWS, _COLUMNS = 8192, 128


@dataclass(frozen=True)
class CentredRows:
    """Rows x_k − c, c the same for all.

    Products are formed in the dtype of the values, and have that of the other matrix.
    """

    values: Tensor  # (n, N) float32 or float64
    centre: Tensor  # c (N,) float64

    def along(self, matrix: Tensor) -> Tensor:
        """Products with all rows: (m, N) → (m, n)."""
        products = (matrix.to(self.values.dtype) @ self.values.T).to(matrix.dtype)
        return products - matrix @ self.centre.to(matrix.dtype)[:, None]

    def back(self, weights: Tensor) -> Tensor:
        """Weighted sums of all rows: (m, n) → (m, N)."""
        sums = (weights.to(self.values.dtype) @ self.values).to(weights.dtype)
        return sums - torch.outer(weights.sum(1), self.centre.to(weights.dtype))

    def about(self, mean: Tensor) -> CentredRows:
        """The same rows less ``mean`` (N,)."""
        return replace(self, centre=self.centre + mean)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Some of the rows at a time (m, N), in float64, and which."""
        for k in range(0, len(self.values), _PANEL):
            part = slice(k, k + _PANEL)
            yield part, self.values[part].double() - self.centre


@dataclass(frozen=True)
class RowMoment:
    """A second moment (N, N) as the rows that it is made of, fewer than N: S (Σ_k w_k a_k b_kᵀ + diag d) S.

    It is multiplied by and never formed.  S is a symmetric matrix that is given as what it does to rows.
    """

    left: CentredRows  # a
    right: CentredRows  # b; the same object where the moment is symmetric
    weights: Tensor  # w (n,) float64
    ridge: Tensor | None = None  # d (N,) float64; None: zero
    outer: Callable[[Tensor], Tensor] | None = None  # (m, N) → (m, N) @ S; None: S is the identity

    @property
    def shape(self) -> tuple[int, int]:
        """(N, N)."""
        return len(self.left.centre), len(self.left.centre)

    @property
    def T(self) -> RowMoment:  # noqa: N802
        """The transpose."""
        return replace(self, left=self.right, right=self.left)

    def __rmatmul__(self, matrix: Tensor) -> Tensor:
        """``matrix`` (m, N) times the moment, in the dtype of ``matrix``."""
        given = matrix if self.outer is None else self.outer(matrix)
        result = self.right.back(self.left.along(given) * self.weights.to(given.dtype))
        if self.ridge is not None:
            result.addcmul_(given, self.ridge.to(given.dtype))
        return result if self.outer is None else self.outer(result)

    def __sub__(self, other: RowMoment) -> RowMoment:
        """The difference to a moment of the same rows on the right: that of the rows on the left."""
        assert self.right.values is other.right.values, "moments of the same rows"
        rest = self.left.values - other.left.values
        return replace(self, left=CentredRows(rest, self.left.centre - other.left.centre))

    def about(self, left: Tensor, right: Tensor) -> RowMoment:
        """The moment of rows less these means (N,)."""
        first = self.left.about(left)
        return replace(self, left=first, right=first if self.right is self.left else self.right.about(right))

    def diagonal(self) -> Tensor:
        """(N,) float64, where S is the identity."""
        total = torch.zeros_like(self.left.centre) if self.ridge is None else self.ridge.clone()
        for (part, a), (_, b) in zip(self.left.blocks(), self.right.blocks(), strict=True):
            total += self.weights[part] @ (a * b)
        return total

    def divided(self, matrix: Tensor, moment: RowMoment) -> Tensor:
        """``matrix`` (m, N) times this moment and the inverse of another, Σ_k v_k b_k b_kᵀ + diag d.

        By the identity (Aᵀ B)(Bᵀ B + D)⁻¹ = Aᵀ (1 + B D⁻¹ Bᵀ)⁻¹ B D⁻¹, where nothing cancels.
        """
        assert moment.ridge is not None
        inverse = 1 / moment.ridge.clamp(min=torch.finfo(torch.float64).tiny ** 0.5)
        roots = moment.weights.sqrt()
        gram = torch.eye(len(roots), dtype=torch.float64, device=roots.device)
        for here, rows in self.right.blocks():
            scaled = rows * inverse
            for there, others in self.right.blocks():
                if there.start <= here.start:
                    gram[here, there] += roots[here, None] * (scaled @ others.T) * roots[there]
        seen = self.left.along(matrix) * (self.weights / roots)
        return self.right.back(torch.cholesky_solve(seen.T, torch.linalg.cholesky(gram)).T * roots) * inverse

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> RowMoment:
        """The moment of rows changed by a linear map, (…, N) → (…, N'), that a diagonal goes through too."""
        first = CentredRows(change(self.left.values), change(self.left.centre))
        ridge = None if self.ridge is None else change(self.ridge)
        return replace(self, left=first, right=first, ridge=ridge)

    def formed(self) -> Tensor:
        """The moment as a matrix (N, N) float64, where S is the identity."""
        # What rows are given in is exact enough for sums of centred ones, and of no others
        a, b = (one.values - one.centre.to(one.values.dtype) for one in (self.left, self.right))
        weighted, symmetric = b * self.weights.to(b.dtype)[:, None], self.left is self.right
        total = a.new_empty(self.shape, dtype=torch.float64)
        for k in range(0, len(total), _PANEL):
            panel = slice(k, k + _PANEL)
            there = slice(k if symmetric else 0, None)
            total[panel, there] = a[:, panel].T @ weighted[:, there]
        if symmetric:
            mirror(total)
        if self.ridge is not None:
            total.diagonal().add_(self.ridge)
        return total


@dataclass(frozen=True)
class MixedMoment:
    """(1 − w) A + w B, of a matrix A and a moment of rows B."""

    matrix: Tensor  # A (N, N) float64
    rows: RowMoment  # B
    weight: float  # w

    def __rmatmul__(self, matrix: Tensor) -> Tensor:
        """``matrix`` (m, N) times the moment."""
        return (matrix @ self.matrix).mul_(1 - self.weight).add_(matrix @ self.rows, alpha=self.weight)

    def diagonal(self) -> Tensor:
        """(N,)."""
        return torch.lerp(self.matrix.diagonal(), self.rows.diagonal(), self.weight)

    def double(self) -> MixedMoment:
        """The same."""
        return self

    def formed(self) -> Tensor:
        """The moment as a matrix (N, N)."""
        return self.rows.formed().mul_(self.weight).add_(self.matrix, alpha=1 - self.weight)


@dataclass(frozen=True)
class OutputMoment:
    """E[(W x) yᵀ] of one weight W, in the place of E[x yᵀ], than which it is smaller where outputs are few.

    It is multiplied by W from the left, and by nothing else.
    """

    weight: Tensor  # W (N_y, N_x) float64
    matrix: Tensor  # E[(W x) yᵀ] (N_y, N_x) float64

    def __rmatmul__(self, matrix: Tensor) -> Tensor:
        """W times E[x yᵀ].

        Raises:
            ValueError: ``matrix`` is not W.
        """
        if matrix is not self.weight and not torch.equal(matrix.to(self.weight), self.weight):
            raise ValueError("the moment is that of the outputs of another weight")
        return self.matrix.to(matrix, copy=True)

    def numel(self) -> int:
        """The number of entries that are kept."""
        return self.matrix.numel()

    def double(self) -> OutputMoment:
        """The same."""
        return self

    def to(self, device: torch.device) -> OutputMoment:
        """The same on a device."""
        return OutputMoment(self.weight.to(device), self.matrix.to(device))


@dataclass(frozen=True)
class ShiftedMoment:
    """The second moment (N, N) of rows less fixed ones, E[(x − a)(y − b)ᵀ], without a copy of E[x yᵀ]."""

    second: Tensor | MixedMoment | OutputMoment  # E[x yᵀ] (N, N)
    columns: Tensor  # (N, 2), which times
    rows: Tensor  # (2, N) is the difference
    varies: Tensor | None = None  # (N,) 0 for features that are constant, 1 for others; None: all vary

    @classmethod
    def about(
        cls, second: Tensor | MixedMoment | OutputMoment, left: Tensor, right: Tensor, a: Tensor, b: Tensor
    ) -> ShiftedMoment:
        """From E[x yᵀ], E[x], E[y], and a and b (N,)."""
        like = second if isinstance(second, Tensor) else second.matrix
        columns, rows = torch.stack([left, a], 1), torch.stack([b, right - b])
        return cls(second, columns.to(like), rows.to(like))

    def __rmatmul__(self, matrix: Tensor) -> Tensor:
        """``matrix`` (m, N) times the moment."""
        given = matrix if self.varies is None else matrix * self.varies
        result = (given @ self.second).addmm_(given @ self.columns, self.rows, alpha=-1)
        return result if self.varies is None else result.mul_(self.varies)

    def diagonal(self) -> Tensor:
        """(N,), where E[x yᵀ] itself is known."""
        assert not isinstance(self.second, OutputMoment)
        diagonal = self.second.diagonal() - (self.columns * self.rows.mT).sum(1)
        return diagonal if self.varies is None else diagonal * self.varies

    def scaled(self, factor: float) -> Tensor:
        """``factor`` times the moment as a matrix (N, N)."""
        assert not isinstance(self.second, OutputMoment), "E[x yᵀ] is known"
        formed = self.second if isinstance(self.second, Tensor) else self.second.formed()
        formed = torch.addmm(formed, self.columns, self.rows, beta=factor, alpha=-factor)
        return formed if self.varies is None else formed.mul_(self.varies[:, None]).mul_(self.varies)


def has_exact_products(tensor: Tensor) -> bool:
    """Whether a matrix in 16 bits is multiplied exactly, and the products summed in float32.

    GPUs do so, from torch 2.8 on; on the CPU torch rounds the product of two such matrices to 16 bits again.
    """
    known = hasattr(torch.ops.aten.mm, "dtype") and torch.version.hip is None
    return known and tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16) and tensor.dim() == 2


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, in float32 if :func:`has_exact_products`."""
    exact = has_exact_products(left)
    return torch.mm(left, right, out_dtype=torch.float32) if exact else left @ right


class ProductSum:
    """Σ over rows of left rightᵀ, as rows come; float64.

    Where both sides are the same rows, the products below the diagonal are not formed.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None  # (…, A, B)
        self._symmetric = False  # then only the panels from the diagonal on are right

    @torch.no_grad()
    def add(self, left: Tensor, right: Tensor) -> None:
        """Add rows; products are formed in float64 if the left ones have that dtype, else in float32.

        Args:
            left: (…, n, A).
            right: (…, n, B); always or never the same tensor.
        """
        self._symmetric = left is right
        if self._total is None:
            shape = *left.shape[:-2], left.shape[-1], right.shape[-1]
            self._total = left.new_zeros(shape, dtype=torch.float64)
        kept = left.dtype == torch.float64 or has_exact_products(left)
        dtype = left.dtype if kept else torch.float32
        width = _COLUMNS if self._symmetric else left.shape[-1]
        for a, b in zip(left.to(dtype).split(_ROWS, -2), right.to(dtype).split(_ROWS, -2), strict=True):
            for k in range(0, left.shape[-1], width):
                there = k if self._symmetric else 0
                self._total[..., k : k + width, there:] += exact_product(
                    a[..., k : k + width].mT, b[..., there:]
                )

    @property
    def shape(self) -> torch.Size | None:
        """Of the sum; None: nothing was added."""
        return None if self._total is None else self._total.shape

    def total(self) -> Tensor:
        """The sum (…, A, B).

        Raises:
            ValueError: no rows were added.
        """
        if self._total is None:
            raise ValueError("no rows were added")
        if self._symmetric:
            mirror(self._total)
        return self._total


def mirror(matrix: Tensor) -> None:
    """Make (…, N, N) symmetric, in place: what is below the diagonal becomes what is above it."""
    for k in range(0, matrix.shape[-1], _PANEL):
        panel, behind = slice(k, k + _PANEL), slice(k + _PANEL, None)
        square = matrix[..., panel, panel].triu()
        matrix[..., panel, panel] = square + square.triu(1).mT
        matrix[..., behind, panel] = matrix[..., panel, behind].mT


# A matrix (N, N), the diagonal (N,) of one, or one of the above; what works with some of them alone says so.
Second: TypeAlias = Any
