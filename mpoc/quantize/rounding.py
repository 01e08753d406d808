"""Round a matrix to codes so that the error counts least where the layer feels it least.

The error of values V for a target T is the quadratic f = tr(G (T − V) H (T − V)ᵀ), with the metric H of the
columns (inputs) and weights G of the rows (outputs).  With H = U Uᵀ, U upper triangular, and columns in
order,

    f = Σ_k U_kk² Σ_i G_ii e_ik²,    e_k = z_k − v_k,    z_k = t_k + Σ_{j<k} (t_j − v_j) U_jk / U_kk

so rounding z_k, not t_k, to the nearest code moves the error of a column onto the columns that follow
(GPTQ, arXiv 2210.17323; LDLQ, arXiv 2307.13304).  Where G = V Vᵀ is more than a diagonal, errors move onto
the rows that follow too (:mod:`mpoc.quantize.wavefront`), and V_ii² takes the place of G_ii.  The price of a
step δ is known before rounding, as e² is δ²/12 on average, and the best steps are δ_k ∝ 1/U_kk (WaterSIC,
arXiv 2603.04956) and δ_i ∝ 1/V_ii.

Codes that are entropy-coded have a dead zone: they are nearer to 0 than the nearest one, which costs less f
than the bits that it saves would.  Codes of grids are refined (:mod:`mpoc.quantize.grid_rounding`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from operator import attrgetter

import torch
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.quantize.codes import HALF_OCTAVES, CodedTensor, narrowed
from mpoc.quantize.coding import entropy_bits
from mpoc.quantize.feedback import Feedback, Rows
from mpoc.quantize.packing import chunk_bits
from mpoc.quantize.wavefront import round_two_sided

_BLOCK = 128  # columns whose feedback is one matrix product; within them, one column after the other
_FINEST = 20  # octaves from the largest weight to the finest scale
_MOST_TRIES = 12  # at a scale
_PREDICTABLE = 8.0  # bits a code; larger codes lie outside the histograms that predict
_LARGEST = 1 << 24  # codes are made in float32, which holds the integers up to here
# The best dead zone of normal codes is about this over their bits, as a share of a step.
_DEAD_ZONE, _WIDEST_DEAD_ZONE = 0.17, 0.25
# Exponents of the largest and of the smallest scale, and of the largest weight: products stay in float32.
_SCALES, _MOST_OCTAVES = (-120.0, 100.0), 110.0
_nbytes = attrgetter("nbytes")
# What may stay unused, half of it on average: a share of the bits, what streams of so many codes vary by from
# one step to the next, and a few bits of however small a stream.
_UNUSED, _FEW = 0.004, 64.0
_ROUGHLY = 0.01  # share of the bits by which a prediction may miss


# Rounding.  Matrices are (columns, rows) here, columns in the order of rounding, so that each is contiguous.


def round_codes(
    target: Tensor,
    steps: Tensor,
    feedback: Feedback | None,
    rows: Rows = None,
    dead_zone: float = 0.0,
    limits: tuple[float, float] | None = None,
) -> Tensor:
    """Codes of a target, as floats: target ≈ code · step, within the limits."""
    if isinstance(rows, Feedback):
        if feedback is None:  # rows in the place of columns
            turned = target.T.contiguous(), steps.T.contiguous()
            return round_codes(*turned, rows, None, dead_zone, limits).T.contiguous()
        return round_two_sided(target, steps, feedback.shares, rows.shares, dead_zone, limits)
    inverse = _inverse(steps)
    if feedback is None:
        return codes_nearest(target * inverse, dead_zone, limits)
    codes, error = torch.empty_like(target), torch.empty_like(target)
    for block in _blocks(len(target)):
        a = block.start
        wanted = torch.addmm(target[block], feedback.shares[:a, block].T, error[:a])
        shares = feedback.shares[block, block].T.contiguous()
        for k in range(a, block.stop):
            moved = torch.addmv(wanted[k - a], error[a:k].T, shares[k - a, : k - a])
            codes[k] = code = codes_nearest(moved.mul_(inverse[k]), dead_zone, limits)
            torch.addcmul(target[k], code, steps[k], value=-1, out=error[k])
    return codes


def codes_nearest(wanted: Tensor, dead_zone: float, limits: tuple[float, float] | None) -> Tensor:
    """The codes of numbers in units of their steps, in their place."""
    wanted.add_(wanted.sign(), alpha=0.5 - dead_zone).trunc_()
    return wanted if limits is None else wanted.clamp_(*limits)


def descend(
    target: Tensor, codes: Tensor, steps: Tensor, feedback: Feedback | None, limits: tuple[float, float]
) -> Tensor:
    """Codes after one sweep of coordinate descent: each the best while the others stay."""
    if feedback is None:
        return round_codes(target, steps, None, limits=limits)
    codes, metric = codes.clone(), feedback.metric
    error = target - codes * steps
    inverse = _inverse(steps)
    weight = _inverse(metric.diagonal()).tolist()  # zero where a column is dead
    for block in _blocks(len(target)):
        a = block.start
        slopes, moves = metric[block] @ error, torch.empty_like(error[block])
        local = metric[block, block].contiguous()
        for k in range(a, block.stop):
            slope = torch.addmv(slopes[k - a], moves[: k - a].T, local[k - a, : k - a], alpha=-1)
            best = torch.addcmul(slope.mul_(weight[k]), codes[k], steps[k])
            code = codes_nearest(best.mul_(inverse[k]), 0.0, limits)
            torch.mul(code - codes[k], steps[k], out=moves[k - a])
            codes[k] = code
        error[block] -= moves
    return codes


def _inverse(steps: Tensor) -> Tensor:
    """1 / step, and 0 for a step of 0."""
    return torch.where(steps > 0, 1.0 / steps, 0.0)


def _blocks(columns: int) -> Iterator[slice]:
    return (slice(a, min(a + _BLOCK, columns)) for a in range(0, columns, _BLOCK))


def ordered(matrix: Tensor, feedback: Feedback | None, rows: Rows = None) -> Tensor:
    """(rows, columns) → (columns, rows), both in the order of rounding."""
    if isinstance(rows, Feedback):
        matrix = matrix[rows.order]
    columns = matrix.T
    return (columns if feedback is None else columns[feedback.order]).contiguous()


def restored(columns: Tensor, feedback: Feedback | None, rows: Rows = None) -> Tensor:
    """Undo :func:`ordered`."""
    if feedback is not None:
        columns = torch.empty_like(columns).index_copy_(0, feedback.order, columns)
    matrix = columns.T
    if isinstance(rows, Feedback):
        matrix = torch.empty_like(matrix).index_copy_(0, rows.order, matrix)
    return matrix.contiguous()


def checked(target: Tensor) -> Tensor:
    """The target in float32 on the CPU, where column after column is fastest."""
    target = target.float().cpu()
    if not bool(target.isfinite().all()):
        raise MpocError("numbers are not finite, or too large for float32")
    return target


# Coded.


def round_coded(
    target: Tensor,
    feedback: Feedback | None,
    row_exponents: Tensor,
    column_exponents: Tensor,
    scale: float,
    rows: Rows = None,
    dead_zone: float = 0.0,
) -> CodedTensor:
    """Round to codes without limits; the scale is refitted, the exponents stay.

    Args:
        target: T, (rows, columns).
        feedback: the metric of the columns; None is the identity.
        row_exponents: (rows,) of int8, from 0 to 15.
        column_exponents: (columns,) of int8, from 0 to 15.
        scale: the step at exponents of zero, to begin with.
        rows: G, or its diagonal (rows,); None is the identity.
        dead_zone: by how much of a step a code is nearer to 0 than the nearest one.

    Raises:
        MpocError: the target is not finite, or the steps are so small that codes exceed 2^24.
    """
    target = checked(target)
    unit = 2.0 ** min(max(_octaves(target), _SCALES[0]), _SCALES[1])  # squares stay in float32 too
    wanted, scale = ordered(target / unit, feedback, rows), scale / unit
    sides = HALF_OCTAVES[row_exponents.long()], HALF_OCTAVES[column_exponents.long()]
    relative = ordered(sides[0][:, None] * sides[1], feedback, rows)
    codes = round_codes(wanted, relative * scale, feedback, rows, dead_zone)
    fitted = _best_factor(wanted, codes * relative, feedback, rows) or scale
    if float(codes.abs().max()) > _LARGEST:
        steps, most = scale * unit, float(target.abs().max())
        raise MpocError(f"steps of {steps:.3g} are too small for weights of {most:.3g}")
    codes = narrowed(restored(codes, feedback, rows).int())
    return CodedTensor(codes, row_exponents, column_exponents, fitted * unit)


def _octaves(target: Tensor) -> float:
    """log₂ of the largest number, rounded down; 0 of zeros."""
    most = float(target.abs().max())
    return math.floor(math.log2(most)) if most else 0.0


def _best_factor(target: Tensor, values: Tensor, feedback: Feedback | None, rows: Rows) -> float:
    """The factor of all values that makes f smallest; 0 if they are zeros."""
    right = values if feedback is None else feedback.metric @ values
    if isinstance(rows, Feedback):
        right = right @ rows.metric
    elif rows is not None:
        right = right * rows.float().cpu()
    below = float((values * right).sum(dtype=torch.float64))
    factor = float((target * right).sum(dtype=torch.float64)) / below if below > 0 else 0.0
    return torch.tensor(factor, dtype=torch.float32).item()


def coded_in_bytes(
    target: Tensor,
    feedback: Feedback | None,
    row_exponents: Tensor,
    column_exponents: Tensor,
    nbytes: float,
    rows: Rows = None,
) -> CodedTensor:
    """Round with the smallest scale whose stream has at most ``nbytes``; the other arguments as above.

    The scale is predicted from the entropy of codes without feedback and corrected by streams that were made;
    the last 0.4 per cent, of small matrices more, may stay unused.  Exponents of a side that take more bits
    than they save are zeros, and all are where no scale gives so few bytes.  Where none does even so, the
    smallest stream found.

    Raises:
        MpocError: the target is not finite, or too large.
    """
    target = checked(target)
    if _octaves(target) >= _MOST_OCTAVES:
        raise MpocError(f"weights of {float(target.abs().max()):.3g} are too large to be coded")
    flat, count = (torch.zeros_like(row_exponents), torch.zeros_like(column_exponents)), target.numel()
    by_row = row_exponents if _saves_bits(row_exponents, count) else flat[0]
    by_column = column_exponents if _saves_bits(column_exponents, count) else flat[1]
    found = _coded_within(target, feedback, (by_row, by_column), nbytes, rows)
    if found.nbytes > nbytes:
        found = min(found, _coded_within(target, feedback, flat, nbytes, rows), key=_nbytes)
    return found


def _saves_bits(exponents: Tensor, count: int) -> bool:
    """Whether the steps of a side save more bits than they take, again as levels of the codes.

    At a high rate the best steps save ½ log₂ of the arithmetic over the geometric mean of what errors cost.
    """
    octaves = exponents.double()
    saved = 0.5 * (math.log2(float((2.0**-octaves).mean())) + float(octaves.mean()))
    return count * saved > 2.0 * chunk_bits(exponents.numpy())


def _coded_within(
    target: Tensor,
    feedback: Feedback | None,
    exponents: tuple[Tensor, Tensor],
    nbytes: float,
    rows: Rows,
) -> CodedTensor:
    """:func:`coded_in_bytes` with these exponents of rows and columns."""
    sides, tried = [HALF_OCTAVES[side.long()] for side in exponents], list[CodedTensor]()
    units = target / (sides[0][:, None] * sides[1])
    slack = max(_UNUSED * 8.0 * nbytes, 2.0 * target.numel() ** 0.5, _FEW) / 2
    wanted = 8.0 * nbytes - slack
    dead_zone = min(_DEAD_ZONE * target.numel() / max(wanted, 1.0), _WIDEST_DEAD_ZONE)

    def predicted(octave: float) -> float:
        return entropy_bits(codes_nearest(units / 2.0**octave, dead_zone, None).int(), *exponents)

    def real(octave: float) -> float:
        tried.append(round_coded(target, feedback, *exponents, 2.0**octave, rows, dead_zone))
        return 8.0 * tried[-1].nbytes

    spread = float(torch.linalg.vector_norm(units, dtype=torch.float64)) / target.numel() ** 0.5 or 1.0
    octave, slope = math.log2(spread) + 2.0 - wanted / target.numel(), -float(target.numel())
    finest = max(_octaves(units) - _FINEST, _SCALES[0])
    start = octave, slope
    if wanted < _PREDICTABLE * target.numel():  # outliers may lie outside the histograms even so
        start = _solve(predicted, wanted, start, finest, max(slack, _ROUGHLY * wanted)) or start
    _solve(real, wanted, start, finest, slack)
    fitting = [coded for coded in tried if coded.nbytes <= nbytes]
    return max(fitting, key=_nbytes, default=min(tried, key=_nbytes))


def _solve(
    bits: Callable[[float], float],
    wanted: float,
    start: tuple[float, float],
    least: float,
    slack: float,
) -> tuple[float, float] | None:
    """Where falling ``bits`` are as wanted, and their slope: secants, or else halves of the bracket.

    None where ``_MOST_TRIES`` do not find it.
    """
    octave, slope = start
    low, high, before = -math.inf, math.inf, (octave, math.nan)
    for _ in range(_MOST_TRIES):
        octave = max(octave, least)
        found = bits(octave)
        if abs(found - wanted) <= slack:
            return octave, slope
        low, high = (octave, high) if found > wanted else (low, octave)
        if (octave - before[0]) * (found - before[1]) < 0:  # streams of few codes also rise
            slope = (found - before[1]) / (octave - before[0])
        before = octave, found
        octave += min(max((wanted - found) / slope, -2.0), 2.0)
        if not low < octave < high:
            octave = (low + high) / 2
    return None
