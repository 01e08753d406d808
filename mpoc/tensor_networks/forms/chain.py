"""Compute y = Ŵx through the cores of a chain, in the cheapest way for the batch.

The chain is contracted from its last site to its first. With the batch in front, x viewed as
(batch, I_1…I_{k-1}, I_k, D_k, J_{k+1}…J_n) and core k as a matrix (D_{k-1} J_k, I_k D_k), each step is one
product, and no axis moves:

    t[(batch I_1…I_{k-1}), (D_{k-1} J_k), (J_{k+1}…J_n)] = core_k @ t[…, (I_k D_k), (J_{k+1}…J_n)]

Neighbouring cores may be merged first (four sites of (8, 8) into two of (64, 64)), for fewer and larger
products with smaller intermediates, at the price of more parameters. Or Ŵ itself is rebuilt, block of rows by
block. A cost model (operations, bytes moved, products started) chooses; its choice is plain data, made once
for each batch size. Large batches go through in chunks whose intermediates stay in the cache.

A low-rank part of a sum takes two more products, or is added to the blocks of a rebuilt Ŵ.

The trade-off: at large batches and bonds, intermediates outweigh what the cores save, and rebuilding the
dense weight is fastest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mpoc.tensor_networks.forms.contraction import is_autocast, is_traced, planned_batch, traced_once
from mpoc.tensor_networks.forms.cost import Site, cheapest, cheapest_gather, split_batch

_plan, _split, _gather_plan = map(traced_once, (cheapest, split_batch, cheapest_gather))
_AT_ONCE = 1 << 18  # numbers of core slices gathered at a time


def contract(x: Tensor, cores: Sequence[Tensor], added: Sequence[Tensor] = ()) -> Tensor:
    """Ŵx for every vector of a batch.

    Args:
        x: (batch, I_1·…·I_n).
        cores: (D_{k-1}, J_k, I_k, D_k), e.g. (4, 8, 16, 4).
        added: (1, J_1·…·J_n, 1, r) and (r, 1, I_1·…·I_n, 1) of a low-rank part; none: empty.

    Returns:
        (batch, J_1·…·J_n).
    """
    plan = _plan(sites_of(cores), planned_batch(x), x.is_cuda, added[1].shape[0] if added else 0)
    merged = [merge_cores(cores[first:last]) for first, last in pairwise(plan.cuts)]
    if plan.rebuild:
        parts = [x @ block.T for block in _blocks(merged, added, plan.rows)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]  # of one, cat makes a copy
    y = _through(x, merged, plan.rows)
    if not added:
        return y
    left, right = _matrices(added)
    return torch.addmm(y, x @ right.T, left.T)


def _blocks(merged: Sequence[Tensor], added: Sequence[Tensor], rows: int) -> Iterator[Tensor]:
    """Blocks (rows·J_2, ΠI) of Ŵ from one core or two, with ``rows`` outputs of the first core each."""
    first, *other = merged
    blocks = (merge_cores((block, *other))[0, :, :, 0] for block in first.split(rows, dim=1))
    if not added:
        yield from blocks
        return
    left, right = _matrices(added)
    lefts = left.unflatten(0, (first.shape[1], -1)).split(rows)
    for block, low in zip(blocks, lefts, strict=True):
        yield torch.addmm(block, low.flatten(0, 1), right)


def _matrices(added: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The factors (ΠJ, r) and (r, ΠI) of a low-rank part."""
    left, right = added
    return left[0, :, 0], right[:, 0, :, 0]


def _through(x: Tensor, merged: Sequence[Tensor], rows: int) -> Tensor:
    """Contract the chain with ``rows`` vectors at a time."""
    trained = torch.is_grad_enabled() and any(core.requires_grad for core in merged)
    chain = _chain if _pieces_are_cheap(x, merged, trained) else _chain_of_rows
    at_once = max(min(8, rows), rows // 4) if trained else rows  # gradients hold several
    if is_traced() or x.shape[0] <= at_once:
        return chain(x, merged)
    return torch.cat([chain(part, merged) for part in x.split(at_once)])


def _chain(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """The equation of the module, as one batched product per core with a shared factor."""
    t, done = x, 1
    for core in reversed(cores):
        matrix = core.flatten(0, 1).flatten(1)  # (D_left J, I D_right)
        if done == 1:
            t = t.reshape(-1, matrix.shape[1]) @ matrix.T
        else:
            t = t.reshape(-1, matrix.shape[1], done)
            t = torch.bmm(matrix.expand(t.shape[0], -1, -1), t)
        done *= core.shape[1]
    return t.reshape(-1, done)


def _chain_of_rows(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """The same by one product of matrices per core, whose gradients are as cheap; an axis moves before each.

    Each step takes t from ((batch I_1…I_{k-1} J_{k+1}…J_n), (I_k D_k)) to ((…), (D_{k-1} J_k)).
    """
    t, done, newest = x, 1, 1  # newest: J_{k+1}, in the last axis
    for core in reversed(cores):
        matrix = core.flatten(0, 1).flatten(1)
        inputs, right = core.shape[2:]
        if done > 1:
            t = t.view(-1, inputs, done // newest, right, newest).permute(0, 4, 2, 1, 3)
        t = t.reshape(-1, inputs * right) @ matrix.T
        done, newest = done * core.shape[1], core.shape[1]
    return t.view(-1, done // newest, newest).transpose(1, 2).reshape(-1, done)


def _pieces_are_cheap(x: Tensor, cores: Sequence[Tensor], trained: bool) -> bool:
    """Whether ``_chain`` is cheap: its gradient makes a matrix (m, k) for every piece, autocast copies it."""
    if is_autocast(x.device):
        return False
    if not trained:
        return True
    n = 1
    for a, j, i, b in reversed(sites_of(cores)):
        m, k = a * j, i * b
        if n > 1 and m * k > (m + k) * n:
            return False
        n *= j
    return True


def merge_cores(cores: Sequence[Tensor]) -> Tensor:
    """Multiply neighbouring cores in the cheapest order to one core (D_left, J…, I…, D_right)."""
    if len(cores) == 1:
        return cores[0]
    cut = _split(sites_of(cores)) if len(cores) > 2 else 1
    left, right = merge_cores(cores[:cut]), merge_cores(cores[cut:])
    (a, j, i, b), (_, p, q, c) = left.shape, right.shape
    product = left.reshape(-1, b) @ right.reshape(b, -1)
    return product.view(a, j, i, p, q, c).transpose(2, 3).reshape(a, j * p, i * q, c)


def sites_of(cores: Sequence[Tensor]) -> tuple[Site, ...]:
    """The shapes of the cores, from which plans are made."""
    return tuple([tuple(core.shape) for core in cores])  # type: ignore[misc]


def gather_rows(indices: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Rows of Ŵ, (n,) → (n, ΠI): for v = (j_1 … j_n) in mixed radix the product of core slices.

        row[i_1 … i_n] = w⁽¹⁾[j_1, i_1] w⁽²⁾[j_2, i_2] … w⁽ⁿ⁾[j_n, i_n]

    Neighbouring cores may be merged first, so that fewer and larger slices are gathered. For very many
    indices all cores are merged, which rebuilds the table for the time of the call.
    """
    cuts = _gather_plan(sites_of(cores), planned_batch(indices), indices.is_cuda)
    groups = [merge_cores(cores[first:last]) for first, last in pairwise(cuts)]
    at_once = max(1, _AT_ONCE // max([core.numel() // core.shape[1] for core in groups]))
    if is_traced() or indices.shape[0] <= at_once:
        return _gather(indices, groups)
    return torch.cat([_gather(part, groups) for part in indices.split(at_once)])


def _gather(indices: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """The equation above."""
    rows = cores[0].new_ones(1, 1, 1)  # (n, I so far, D)
    after = math.prod([core.shape[1] for core in cores])
    for core in cores:
        after //= core.shape[1]
        if core.shape[1] == 1:  # the same for every row
            rows = (rows @ core[:, 0].flatten(1)).unflatten(2, core.shape[2:]).flatten(1, 2)
            continue
        digit = indices // after % core.shape[1]
        sliced = core.transpose(0, 1)[digit]  # (n, D_left, I, D_right)
        rows = (rows @ sliced.flatten(2)).unflatten(2, sliced.shape[2:]).flatten(1, 2)
    return rows.flatten(1).expand(indices.shape[0], -1)  # a table of one row has met no index yet
