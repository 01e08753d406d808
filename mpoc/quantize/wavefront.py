"""Round a matrix with feedback on both sides, as many codes at a time as do not depend on each other.

With G = V Vᵀ and H = U Uᵀ, V and U upper triangular, and D = T − (values of codes), f = tr(G D H Dᵀ) is

    f = Σ_ik V_ii² U_kk² e_ik²,    e_ik = w_ik + Σ_{j<i} y_jk V_ji / V_ii − v_ik,
    w_ik = t_ik + Σ_{l<k} d_il U_lk / U_kk,    y_jk = w_jk − v_jk

so an error moves onto later columns and later rows (YAQA, arXiv 2505.22988).  A code needs those before it in
its row and its column: codes of one antidiagonal are rounded together, in blocks of 32 × 32, and so are the
blocks of one antidiagonal.  Inside a block, row s of an array holds the codes (k, i) with k + i = s, at k.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

_SIDE = 32  # of a block
_STEPS = 2 * _SIDE - 1  # antidiagonals of a block
_Array = npt.NDArray[np.float32]


def round_two_sided(
    target: Tensor,
    steps: Tensor,
    column_shares: Tensor,
    row_shares: Tensor,
    dead_zone: float,
    limits: tuple[float, float] | None = None,
) -> Tensor:
    """Codes of a target, as floats: target ≈ code · step.

    Args:
        target: T, (columns, rows), both in the order of rounding, float32.
        steps: likewise; 0 where a code is to be 0.
        column_shares: U_jk / U_kk above the diagonal, (columns, columns), else 0.
        row_shares: V_ji / V_ii likewise, (rows, rows).
        dead_zone: by how much of a step a code is nearer to 0 than the nearest one.
        limits: of the codes; None: there are none.
    """
    columns, rows = target.shape
    field = _Field(target, steps, column_shares, row_shares)
    for diagonal in range(sum(field.blocks) - 1):
        _round_blocks(field, diagonal, 0.5 - dead_zone, limits)
    return torch.from_numpy(field.codes)[:columns, :rows].contiguous()


class _Field:
    """A target in whole blocks, its codes, and D and y as far as they are known."""

    def __init__(self, target: Tensor, steps: Tensor, column_shares: Tensor, row_shares: Tensor) -> None:
        self.blocks = tuple(-(-side // _SIDE) for side in target.shape)
        size = tuple(count * _SIDE for count in self.blocks)
        self.target, self.steps = _padded(target, size), _padded(steps, size)
        self.inverse = np.divide(1, self.steps, out=np.zeros_like(self.steps), where=self.steps > 0)
        self.codes, self.errors, self.moved = (np.zeros(size, np.float32) for _ in range(3))
        self.column_shares = _padded(column_shares, (size[0], size[0]))
        self.row_shares = _padded(row_shares, (size[1], size[1]))
        self.onto_columns = _onto_columns(self.column_shares)
        self.onto_rows = _onto_rows(self.row_shares)
        self._products = [
            torch.from_numpy(array)
            for array in (self.target, self.column_shares, self.errors, self.moved, self.row_shares)
        ]

    def places(self, diagonal: int) -> list[tuple[slice, slice]]:
        """The blocks of an antidiagonal, by their first rows."""
        columns, rows = self.blocks
        first, last = max(0, diagonal - columns + 1), min(rows, diagonal + 1)
        return [(_block(diagonal - row), _block(row)) for row in range(first, last)]

    def wanted(self, columns: slice, rows: slice) -> tuple[_Array, _Array]:
        """w of a block, and what the errors of rows before it add to z, both from the blocks before."""
        target, column_shares, errors, moved, row_shares = self._products
        before = slice(columns.start), slice(rows.start)
        own = torch.addmm(target[columns, rows], column_shares[before[0], columns].T, errors[before[0], rows])
        return own.numpy(), torch.mm(moved[columns, before[1]], row_shares[before[1], rows]).numpy()


def _round_blocks(field: _Field, diagonal: int, half: float, limits: tuple[float, float] | None) -> None:
    """Round the blocks of one antidiagonal; the last axis of all arrays counts them."""
    places = field.places(diagonal)
    wanted = [field.wanted(*place) for place in places]
    own, from_rows = (_skewed([pair[part] for pair in wanted]) for part in (0, 1))
    target, steps, inverse = (
        _skewed([array[place] for place in places]) for array in (field.target, field.steps, field.inverse)
    )
    codes, errors, moved = np.zeros_like(steps), np.zeros_like(steps), np.zeros_like(steps)
    first = places[0][1].start // _SIDE
    last_column = field.blocks[0] - 1 - places[0][0].start // _SIDE
    count = len(places)
    onto_columns = np.ascontiguousarray(field.onto_columns[:, :, last_column : last_column + count])
    onto_rows = np.ascontiguousarray(field.onto_rows[:, :, first : first + count])
    history = np.zeros((_STEPS, count), np.float32)  # the errors of a step, behind zeros
    shifted = _shifted(history)
    product = np.empty((_SIDE - 1, _SIDE, count), np.float32)
    for s in range(_STEPS):
        w = own[s]
        z = (w + from_rows[s]) * inverse[s]
        z += np.copysign(np.float32(half), z)
        code = np.trunc(z, out=codes[s])
        if limits is not None:
            np.clip(code, *limits, out=code)
        value = code * steps[s]
        np.subtract(w, value, out=moved[s])
        history[_SIDE - 1 :] = np.subtract(target[s], value, out=errors[s])
        left = min(_SIDE - 1, _STEPS - 1 - s)  # antidiagonals that this one moves errors onto
        later, onto = slice(s + 1, s + 1 + left), slice(1, left + 1)
        own[later] += np.multiply(shifted[onto], onto_columns[onto], out=product[:left])
        at = 2 * _SIDE - 1 - s
        from_rows[later] += np.multiply(onto_rows[onto, at : at + _SIDE], moved[s], out=product[:left])
    for array, found in ((field.codes, codes), (field.errors, errors), (field.moved, moved)):
        for place, block in zip(places, _diagonals(found), strict=True):
            array[place] = block


def _block(index: int) -> slice:
    return slice(index * _SIDE, (index + 1) * _SIDE)


def _padded(matrix: Tensor, size: tuple[int, ...]) -> _Array:
    padded = np.zeros(size, np.float32)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix.numpy()
    return padded


def _skewed(blocks: list[_Array]) -> _Array:
    """Blocks (k, i) as (k + i, k, block); zeros elsewhere."""
    skewed = np.zeros((_STEPS, _SIDE, len(blocks)), np.float32)
    for view, block in zip(_diagonals(skewed), blocks, strict=True):
        view[:] = block
    return skewed


def _diagonals(skewed: _Array) -> _Array:
    """The blocks (block, k, i) of a skewed array, as a view."""
    step, place, block = skewed.strides
    return as_strided(skewed, (skewed.shape[2], _SIDE, _SIDE), (block, step + place, step))


def _shifted(history: _Array) -> _Array:
    """A view (d, k, block) of the errors at k − d of a step; ``history`` holds zeros before them."""
    place, block = history.strides
    return as_strided(history[_SIDE - 1 :], (_SIDE, _SIDE, history.shape[1]), (-place, place, block))


def _onto_columns(shares: _Array) -> _Array:
    """What column k takes of an error d columns before it: (d, k, block), the last block first."""
    blocks = np.stack([shares[place, place] for place in map(_block, range(len(shares) // _SIDE))][::-1], 2)
    onto = np.zeros_like(blocks)
    for d in range(1, _SIDE):
        onto[d, d:] = blocks[np.arange(_SIDE - d), np.arange(d, _SIDE)]
    return onto


def _onto_rows(shares: _Array) -> _Array:
    """What row j + e takes of y in row j: (e, place, block), j at place 2 · _SIDE − 1 − j, else 0."""
    blocks = np.stack([shares[place, place] for place in map(_block, range(len(shares) // _SIDE))], 2)
    onto = np.zeros((_SIDE, 3 * _SIDE, blocks.shape[2]), np.float32)
    for e in range(1, _SIDE):
        j = np.arange(_SIDE - e)
        onto[e, 2 * _SIDE - 1 - j] = blocks[j, j + e]
    return onto
