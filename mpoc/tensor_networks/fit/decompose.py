"""Fit a weight by the form of its structure, and learn an order of its inputs.

A learned order is a permutation of a layer's inputs in which truncation loses less. Two steps alternate, as
in k-means: the MPO of the weight in the present order (TT-SVD at the cap), and the order of the weight's
columns that fits this MPO's dense weight Ŵ best, by exchanging pairs while Σ_p ⟨W[:, order[p]], Ŵ[:, p]⟩
grows. Neither step makes ‖W − Ŵ‖ larger, except where TT-SVD is not the best MPO.

The cap starts at a quarter, then half, then all of the bond, so that a few strong directions sort the columns
coarsely first. The trade-off: an order is learned for one bond, and can be worse than the weight's own order
at others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mpoc.tensor_networks.fit.conv_map import exact_map
from mpoc.tensor_networks.fit.truncation import DEFAULT_TARGET, Target, Truncation
from mpoc.tensor_networks.fit.tt_svd import Fit, error_of_form, tt_svd
from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.forms.layout import to_matrix, working_dtype
from mpoc.tensor_networks.forms.mpo import MPO, subtract
from mpoc.tensor_networks.structure import Structure

_TURNS = 10
_ROUNDS = 10
# The alternation ends when a turn lowers the error by less than this share.
_LEAST_GAIN = 1e-4
# An exchange that gains less than this share of the largest inner product is rounding noise.
_LEAST_EXCHANGE = 1e-6


def decompose(
    weight: Tensor,
    structure: Structure,
    truncation: Truncation,
    target: Target = DEFAULT_TARGET,
) -> Fit:
    """Fit the form that ``structure`` names; see :func:`mpoc.tensor_networks.fit.tt_svd.tt_svd`."""
    fit: Fit = structure.info.fit_function(weight, structure, truncation, target)
    return fit


def with_cores(fit: Fit, weight: Tensor, cores: Sequence[Tensor]) -> Fit:
    """The fit of a weight with other cores of the same shapes, its error and entropies measured on these."""
    form = fit.form.with_cores(cores)
    error = _relative_error(weight, form)
    return replace(fit, form=form, relative_error=error, entropies=form.double().entropies())


def _relative_error(weight: Tensor, form: Form) -> float:
    if not form.structure.is_large_map:
        return error_of_form(weight, form)
    exact = exact_map(weight, form.structure)
    norm = exact.norm()
    return subtract(exact, MPO(form.cores, form.structure)).norm() / norm if norm else 0.0


def learn_order(weight: Tensor, structure: Structure, max_bond: int) -> tuple[int, ...]:
    """Learn an order for bonds up to ``max_bond``; the weight's own order if none is better.

    Args:
        weight: a linear map of shape ``structure.shape``.
        structure: a structure of any form; the order is learned for a chain of its sites.
        max_bond: the cap that the order is learned for.
    """
    chain = replace(structure, form="mpo", order="")
    columns = to_matrix(weight, chain)[0].to(working_dtype(weight.dtype))
    order = torch.arange(structure.inputs, device=weight.device)
    best, least = order, _fit(columns, chain, max_bond, order)[1]
    for bond in (max(1, max_bond // 4), max(1, max_bond // 2), max_bond):
        order = _alternate(columns, chain, bond, order)
    return tuple((order if _fit(columns, chain, max_bond, order)[1] < least else best).tolist())


def _alternate(columns: Tensor, structure: Structure, bond: int, order: Tensor) -> Tensor:
    """Alternate fit and exchange until the error at ``bond`` stops falling; return the best order."""
    approximation, least = _fit(columns, structure, bond, order)
    best = order
    for _ in range(_TURNS):
        order = exchange(columns.T @ approximation, order)
        approximation, error = _fit(columns, structure, bond, order)
        if error >= least * (1 - _LEAST_GAIN):
            break
        best, least = order, error
    return best


def _fit(columns: Tensor, structure: Structure, bond: int, order: Tensor) -> tuple[Tensor, float]:
    """The MPO's dense matrix (N_y, N_x) for columns in this order, and its relative error."""
    plain = Structure(
        "linear", tuple(columns.shape), False, structure.output_factors, structure.input_factors
    )
    fit = tt_svd(columns[:, order], plain, Truncation(bond))
    return fit.form.to_matrix()[0], fit.relative_error


def exchange(products: Tensor, order: Tensor) -> Tensor:
    """Exchange pairs of positions while Σ_p products[order[p], p] grows.

    Args:
        products: inner product of each column with each position's, (N, N).
        order: the column at each position, (N,).
    """
    for _ in range(_ROUNDS):
        placed = products[order]  # [p, q]: the column at p, were it at q
        now = placed.diagonal()
        gains, partners = (placed + placed.T - now[:, None] - now[None, :]).max(dim=1)
        least = _LEAST_EXCHANGE * float(now.abs().max())
        candidates = sorted(zip((-gains).tolist(), range(len(gains)), partners.tolist(), strict=True))
        columns, taken = order.tolist(), set()
        for loss, p, q in candidates:
            if -loss > least and p not in taken and q not in taken:
                columns[p], columns[q] = columns[q], columns[p]
                taken |= {p, q}
        if not taken:
            break
        order = order.new_tensor(columns)
    return order
