"""The metric of a matrix's columns, or rows, as rounding sees it: what a squared step costs, where errors go.

With H = U Uᵀ, U upper triangular, f = Σ_k U_kk² Σ_i G_ii e_ik²: :mod:`mpoc.quantize.rounding` says how.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.quantize.coding import MOST_EXPONENT

_DOUBLE = 4096  # metrics up to this size are factored in float64
# Added to the diagonal, as shares of its mean, until a metric that is singular in rounding has a factor.
_JITTER = (0.0, 1e-9, 1e-7, 1e-5)


class Feedback:
    """A metric of the columns, with the order of rounding and its triangular factor; of rows likewise.

    Columns are rounded in falling order of the metric's diagonal.  Dead columns (a diagonal of zero) come
    last, take no feedback and cost nothing.

    Args:
        metric: H, (columns, columns), symmetric and positive semi-definite; damped by the caller.

    Raises:
        MpocError: the metric is not finite, or not positive semi-definite.
    """

    def __init__(self, metric: Tensor) -> None:
        metric = metric.cpu()
        diagonal = metric.diagonal()
        self.order = diagonal.argsort(descending=True, stable=True)
        self.metric = metric[self.order][:, self.order].float()
        upper = _upper_factor(metric[self.order][:, self.order])
        # U_jk / U_kk: how much of the error of column j goes to column k.
        self.shares = (upper / upper.diagonal()).float().triu_(1)
        # U_kk², by column: what a squared error costs once feedback has taken the rest.
        self.weights = torch.empty(len(metric))
        self.weights[self.order] = upper.diagonal().square().float()
        self.weights[diagonal <= 0] = 0.0


# G of the rows: with feedback, its diagonal alone, or the identity.
Rows = Feedback | Tensor | None


def weights_of(rows: Rows) -> Tensor | None:
    """What a squared error of each row costs, once feedback has taken the rest; None: 1."""
    return rows.weights if isinstance(rows, Feedback) else rows


def _upper_factor(metric: Tensor) -> Tensor:
    """U of H = U Uᵀ: the Cholesky factor of the reversed matrix, reversed.  Dead columns get U_kk = 1."""
    if not bool(metric.isfinite().all()):
        raise MpocError("the metric of the inputs is not finite")
    matrix = metric.to(torch.float64 if len(metric) <= _DOUBLE else torch.float32).flip(0, 1)
    diagonal = matrix.diagonal()
    dead = (diagonal <= 0).to(matrix.dtype)
    for jitter in _JITTER:
        lower, failed = torch.linalg.cholesky_ex(matrix + torch.diag(dead + jitter * diagonal.mean()))
        if not failed:
            return lower.flip(0, 1)
    raise MpocError("the metric of the inputs is not positive semi-definite")


def best_exponents(weights: Tensor | None, count: int) -> Tensor:
    """The best steps δ ∝ 1/√weight of rows or columns, as exponents of √2 from 0 to 15.

    The finest step is exact to half an octave; those above 2^7.5 times it are that.

    Args:
        weights: what a squared error costs, (count,): ``feedback.weights`` of the columns, the diagonal of G
            of the rows.  None is ones.  Where it is 0, the step is the largest of the others.
        count: number of rows or columns.

    Returns:
        (count,) of int8.
    """
    if weights is None or not bool((weights > 0).any()):
        return torch.zeros(count, dtype=torch.int8)
    octaves = -weights.cpu().double().log2().round()
    finite = octaves[octaves.isfinite()]
    return (octaves.clamp(max=float(finite.max())) - finite.min()).clamp_(max=MOST_EXPONENT).to(torch.int8)


def typical_error(
    steps: Tensor, feedback: Feedback | None, generator: torch.Generator, rows: Rows = None
) -> Tensor:
    """An error D = T − V such as rounding with these steps makes, uniform once feedback has been undone.

    Args:
        steps: δ, (rows, columns).
        feedback: the metric of the columns; None is the identity.
        generator: of e, on the CPU.
        rows: G, or its diagonal (rows,); None is the identity.

    Returns:
        (rows, columns) of float32.
    """
    error = (torch.rand(steps.shape, generator=generator) - 0.5) * steps.float().cpu()
    if feedback is not None:
        error = _undone(error, feedback)
    return _undone(error.T, rows).T if isinstance(rows, Feedback) else error


def _undone(error: Tensor, feedback: Feedback) -> Tensor:
    """e (I + shares)⁻¹, columns in their own order before and after."""
    unit = feedback.shares + torch.eye(len(feedback.shares))
    ordered = error[:, feedback.order]
    solved = torch.linalg.solve_triangular(unit, ordered, upper=True, left=False, unitriangular=True)
    return solved[:, feedback.order.argsort()]
