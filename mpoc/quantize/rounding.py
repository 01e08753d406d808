"""Round a matrix to codes so that the error counts least where the layer feels it least.

The error of values V for a target T is the quadratic f = tr(G (T − V) H (T − V)ᵀ), with the metric H of the
columns (inputs) and weights G of the rows (outputs).  With H = U Uᵀ, U upper triangular, and columns in
order,

    f = Σ_k U_kk² Σ_i G_ii e_ik²,    e_k = z_k − v_k,    z_k = t_k + Σ_{j<k} (t_j − v_j) U_jk / U_kk

so rounding z_k, not t_k, to the nearest code moves the error of a column onto the columns that follow
(GPTQ, arXiv 2210.17323; LDLQ, arXiv 2307.13304).  The price of a step δ is known before rounding, as e² is
δ²/12 on average, and the best steps are δ_k ∝ 1/U_kk (WaterSIC, arXiv 2603.04956) and δ_i ∝ 1/√G_ii.

Afterwards scales are refitted in closed form and codes by coordinate descent, in turns.  On a grid no turn
raises f; coded matrices weigh f against the bits of larger codes.  Rows do not interact, so G moves steps and
the one scale of a coded matrix, not single codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from operator import attrgetter

import torch
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.quantize.codes import HALF_OCTAVES, CodedTensor, GridTensor, narrowed
from mpoc.quantize.coding import entropy_bits
from mpoc.quantize.feedback import Feedback
from mpoc.quantize.packing import chunk_bits
from mpoc.quantize.storage import Grid

_BLOCK = 128  # columns whose feedback is one matrix product; within them, one column after the other
_SWEEPS = 2  # rounds of refitted scales and coordinate descent
# Shares of a group's range that the search of a grid's scales tries.
_SHRINK = tuple(1.0 - 0.05 * step for step in range(13))
_FINEST = 20  # octaves from the largest weight to the finest scale
_MOST_TRIES = 12  # at a scale
_PREDICTABLE = 8.0  # bits a code; larger codes lie outside the histograms that predict
_LARGEST = 1 << 24  # codes are made in float32, which holds the integers up to here
# Exponents of the largest and of the smallest scale, and of the largest weight: products stay in float32.
_SCALES, _MOST_OCTAVES = (-120.0, 100.0), 110.0
_NO_LIMITS = -math.inf, math.inf
_nbytes = attrgetter("nbytes")
_UNUSED = 0.001  # share of the bytes asked for that may stay unused, half of it on average
_FEW = 64.0  # bits that may stay unused of however small a stream


# Rounding.  Matrices are (columns, rows) here, columns in the order of rounding, so that each is contiguous.


def _round(
    target: Tensor, steps: Tensor, feedback: Feedback | None, limits: tuple[float, float] = _NO_LIMITS
) -> Tensor:
    """Codes of a target, as floats: target ≈ code · step, within the limits."""
    inverse = _inverse(steps)
    if feedback is None:
        return (target * inverse).round_().clamp_(*limits)
    codes, error = torch.empty_like(target), torch.empty_like(target)
    for block in _blocks(len(target)):
        a = block.start
        wanted = torch.addmm(target[block], feedback.shares[:a, block].T, error[:a])
        shares = feedback.shares[block, block].T.contiguous()
        for k in range(a, block.stop):
            moved = torch.addmv(wanted[k - a], error[a:k].T, shares[k - a, : k - a])
            codes[k] = code = moved.mul_(inverse[k]).round_().clamp_(*limits)
            torch.addcmul(target[k], code, steps[k], value=-1, out=error[k])
    return codes


def _descend(
    target: Tensor,
    codes: Tensor,
    steps: Tensor,
    feedback: Feedback | None,
    limits: tuple[float, float] = _NO_LIMITS,
    coarser: float = 1.0,
) -> Tensor:
    """Codes after one sweep of coordinate descent: each the best while the others stay.

    Codes are those nearest on a lattice that is ``coarser`` by this factor than the values: the best of f and
    a price on the squares of codes.
    """
    if feedback is None:
        return _round(target, steps * coarser, None, limits)
    codes, metric = codes.clone(), feedback.metric
    error = target - codes * steps
    inverse = _inverse(steps * coarser)
    weight = _inverse(metric.diagonal()).tolist()  # zero where a column is dead
    for block in _blocks(len(target)):
        a = block.start
        slopes, moves = metric[block] @ error, torch.empty_like(error[block])
        local = metric[block, block].contiguous()
        for k in range(a, block.stop):
            slope = torch.addmv(slopes[k - a], moves[: k - a].T, local[k - a, : k - a], alpha=-1)
            best = torch.addcmul(slope.mul_(weight[k]), codes[k], steps[k])
            code = best.mul_(inverse[k]).round_().clamp_(*limits)
            torch.mul(code - codes[k], steps[k], out=moves[k - a])
            codes[k] = code
        error[block] -= moves
    return codes


def _inverse(steps: Tensor) -> Tensor:
    """1 / step, and 0 for a step of 0."""
    return torch.where(steps > 0, 1.0 / steps, 0.0)


def _blocks(columns: int) -> Iterator[slice]:
    return (slice(a, min(a + _BLOCK, columns)) for a in range(0, columns, _BLOCK))


def _ordered(matrix: Tensor, feedback: Feedback | None) -> Tensor:
    """(rows, columns) → (columns, rows), columns in the order of rounding."""
    columns = matrix.T
    return (columns if feedback is None else columns[feedback.order]).contiguous()


def _restored(columns: Tensor, feedback: Feedback | None) -> Tensor:
    """Undo :func:`_ordered`."""
    if feedback is not None:
        columns = torch.empty_like(columns).index_copy_(0, feedback.order, columns)
    return columns.T.contiguous()


def _checked(target: Tensor) -> Tensor:
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
    row_weights: Tensor | None = None,
) -> CodedTensor:
    """Round to codes without limits; the scale is refitted, the exponents stay.

    Args:
        target: T, (rows, columns).
        feedback: the metric of the columns; None is the identity.
        row_exponents: (rows,) of int8, from 0 to 15.
        column_exponents: (columns,) of int8, from 0 to 15.
        scale: the step at exponents of zero, to begin with.
        row_weights: diagonal of G, (rows,); None is ones.

    Raises:
        MpocError: the target is not finite, or the steps are so small that codes exceed 2^24.
    """
    target = _checked(target)
    unit = 2.0 ** min(max(_octaves(target), _SCALES[0]), _SCALES[1])  # squares stay in float32 too
    wanted, scale = _ordered(target / unit, feedback), scale / unit
    sides = HALF_OCTAVES[row_exponents.long()], HALF_OCTAVES[column_exponents.long()]
    relative = _ordered(sides[0][:, None] * sides[1], feedback)
    codes, fitted = _round(wanted, relative * scale, feedback), scale
    for sweep in range(_SWEEPS + 1):
        if sweep > 0:
            codes = _descend(wanted, codes, relative * fitted, feedback, coarser=scale / fitted)
        fitted = _best_factor(wanted, codes * relative, feedback, row_weights) or scale
    if float(codes.abs().max()) > _LARGEST:
        steps, most = scale * unit, float(target.abs().max())
        raise MpocError(f"steps of {steps:.3g} are too small for weights of {most:.3g}")
    codes = narrowed(_restored(codes, feedback).int())
    return CodedTensor(codes, row_exponents, column_exponents, fitted * unit)


def _octaves(target: Tensor) -> float:
    """log₂ of the largest number, rounded down; 0 of zeros."""
    most = float(target.abs().max())
    return math.floor(math.log2(most)) if most else 0.0


def _best_factor(
    target: Tensor, values: Tensor, feedback: Feedback | None, row_weights: Tensor | None
) -> float:
    """The factor of all values that makes f smallest; 0 if they are zeros."""
    right = values if feedback is None else feedback.metric @ values
    if row_weights is not None:
        right = right * row_weights.float().cpu()
    below = float((values * right).sum(dtype=torch.float64))
    factor = float((target * right).sum(dtype=torch.float64)) / below if below > 0 else 0.0
    return torch.tensor(factor, dtype=torch.float32).item()


def coded_in_bytes(
    target: Tensor,
    feedback: Feedback | None,
    row_exponents: Tensor,
    column_exponents: Tensor,
    nbytes: float,
    row_weights: Tensor | None = None,
) -> CodedTensor:
    """Round with the smallest scale whose stream has at most ``nbytes``; the other arguments as above.

    The scale is predicted from the entropy of codes without feedback and corrected by streams that were made;
    the last 0.2 per cent may stay unused.  Exponents of a side that take more bits than they save are zeros,
    and all are where no scale gives so few bytes.  Where none does even so, the smallest stream found.

    Raises:
        MpocError: the target is not finite, or too large.
    """
    target = _checked(target)
    if _octaves(target) >= _MOST_OCTAVES:
        raise MpocError(f"weights of {float(target.abs().max()):.3g} are too large to be coded")
    flat, count = (torch.zeros_like(row_exponents), torch.zeros_like(column_exponents)), target.numel()
    rows = row_exponents if _saves_bits(row_exponents, count) else flat[0]
    columns = column_exponents if _saves_bits(column_exponents, count) else flat[1]
    found = _coded_within(target, feedback, (rows, columns), nbytes, row_weights)
    if found.nbytes > nbytes:
        found = min(found, _coded_within(target, feedback, flat, nbytes, row_weights), key=_nbytes)
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
    row_weights: Tensor | None,
) -> CodedTensor:
    """:func:`coded_in_bytes` with these exponents of rows and columns."""
    sides, tried = [HALF_OCTAVES[side.long()] for side in exponents], list[CodedTensor]()
    units = target / (sides[0][:, None] * sides[1])

    def predicted(octave: float) -> float:
        return entropy_bits((units / 2.0**octave).round_().int(), *exponents)

    def real(octave: float) -> float:
        tried.append(round_coded(target, feedback, *exponents, 2.0**octave, row_weights))
        return 8.0 * tried[-1].nbytes

    wanted = 8.0 * nbytes * (1.0 - _UNUSED)
    spread = float(torch.linalg.vector_norm(units, dtype=torch.float64)) / target.numel() ** 0.5 or 1.0
    octave, slope = math.log2(spread) + 2.0 - wanted / target.numel(), -float(target.numel())
    finest = max(_octaves(units) - _FINEST, _SCALES[0])
    slack, start = max(_UNUSED * wanted, _FEW), (octave, slope)
    if wanted < _PREDICTABLE * target.numel():  # outliers may lie outside the histograms even so
        start = _solve(predicted, wanted, start, finest, slack) or start
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
        if -slack <= found - wanted <= _UNUSED * wanted:
            return octave, slope
        low, high = (octave, high) if found > wanted else (low, octave)
        if (octave - before[0]) * (found - before[1]) < 0:  # streams of few codes also rise
            slope = (found - before[1]) / (octave - before[0])
        before = octave, found
        octave += min(max((wanted - found) / slope, -2.0), 2.0)
        if not low < octave < high:
            octave = (low + high) / 2
    return None


# Grids.


def round_grid(target: Tensor, feedback: Feedback | None, spec: Grid) -> GridTensor:
    """Round to a grid.

    The range of each group is searched for the least error in the weights U_kk², its scale rounded to float16
    before the codes are made and refitted after them.

    Args:
        target: T, (rows, columns).
        feedback: the metric of the columns; None is the identity.
        spec: the grid.

    Raises:
        MpocError: the target is not finite, or too large for scales in float16.
        UsageError: the group does not divide the columns.
    """
    rows, columns = target.shape
    groups = spec.groups(columns)
    target = _checked(target)
    scale, zero = _search_ranges(target.reshape(rows, groups, -1), feedback, spec)
    if not bool(scale.isfinite().all()):
        raise MpocError(f"weights of {float(target.abs().max()):.3g} are too large for a grid")
    wanted = _ordered(target, feedback)
    steps, zeros = (
        _ordered(each.repeat_interleave(columns // groups, 1), feedback) for each in (scale, zero)
    )
    order = torch.arange(columns) if feedback is None else feedback.order
    members = [torch.nonzero(order // (columns // groups) == group)[:, 0] for group in range(groups)]
    limits = 0.0, spec.levels - 1.0
    codes = _round(wanted + zeros * steps, steps, feedback, limits)
    for _ in range(_SWEEPS):
        steps = _refitted_steps(wanted, codes - zeros, steps, feedback, members)
        codes = _descend(wanted + zeros * steps, codes, steps, feedback, limits)
    scale = torch.stack([steps[places[0]] for places in members], 1).half()
    zero_point = None if spec.symmetric else zero.to(torch.uint8)
    return GridTensor(_restored(codes, feedback).to(torch.uint8), scale, zero_point, spec)


def _search_ranges(grouped: Tensor, feedback: Feedback | None, spec: Grid) -> tuple[Tensor, Tensor]:
    """Scales, as float16 holds them, and zero points (rows, groups) of a target (rows, groups, group)."""
    weights = 1.0 if feedback is None else feedback.weights.view(grouped.shape[1:])
    low, high = grouped.amin(2).clamp_(max=0.0), grouped.amax(2).clamp_(min=0.0)
    least = torch.full_like(low, float("inf"))
    best_scale, best_zero = _range(low, high, spec)
    for share in _SHRINK:
        scale, zero = _range(share * low, share * high, spec)
        codes = (grouped / scale[:, :, None] + zero[:, :, None]).round_().clamp_(0.0, spec.levels - 1.0)
        values = codes.sub_(zero[:, :, None]).mul_(scale[:, :, None])
        error = (values.sub_(grouped).square_() * weights).sum(2)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _range(low: Tensor, high: Tensor, spec: Grid) -> tuple[Tensor, Tensor]:
    """The scale, rounded to float16, and the zero point of a range that includes zero."""
    width = 2.0 * torch.maximum(-low, high) if spec.symmetric else high - low
    scale = (width / (spec.levels - 1)).clamp_(min=2.0**-24).half().float()
    if spec.symmetric:
        return scale, torch.full_like(scale, spec.levels / 2)
    return scale, (-low / scale).round_().clamp_(0.0, spec.levels - 1.0)


def _refitted_steps(
    target: Tensor, units: Tensor, steps: Tensor, feedback: Feedback | None, members: list[Tensor]
) -> Tensor:
    """Steps with each scale in turn the best of its row and group, in float16, where that lowers f."""
    steps = steps.clone()
    error = target - units * steps
    for places in members:
        unit, old = units[places], steps[places[0]]
        slope, curve = error[places], unit
        if feedback is not None:
            metric = feedback.metric[places]
            slope, curve = metric @ error, metric[:, places] @ unit
        above, below = (unit * slope).sum(0), (unit * curve).sum(0)
        new = torch.where(below > 0, old + above / below, old).half().float()
        change = torch.where(new.isfinite() & (new > 0), new - old, 0.0)
        change = torch.where(change * (2.0 * above - change * below) > 0, change, 0.0)
        error[places] -= unit * change
        steps[places] += change
    return steps


# GPTQ as published, to compare with.


def gptq(target: Tensor, metric: Tensor | None, bits: int, group: int) -> Tensor:
    """Values (rows, columns) of GPTQ: columns in their own order, ranges of groups from minimum to maximum.

    Scales are in float16, zero points whole; 1 % of the metric's mean diagonal is added to it.  Frantar et
    al., arXiv 2210.17323.

    Args:
        target: W, (rows, columns).
        metric: H of the columns, not damped; None: each number goes to the nearest code of its group.
        bits: of a code.
        group: columns that share a scale; the last group may have fewer.
    """
    left = _checked(target).clone()
    spec, factor = Grid(bits), None if metric is None else _inverse_factor(metric.cpu())
    if metric is not None:
        left[:, metric.cpu().diagonal() <= 0] = 0.0
    values = torch.empty_like(left)
    for part in (slice(a, min(a + group, left.shape[1])) for a in range(0, left.shape[1], group)):
        own = left[:, part]
        scale, zero = _range(own.amin(1).clamp_(max=0.0), own.amax(1).clamp_(min=0.0), spec)
        if factor is None:
            codes = (own / scale[:, None] + zero[:, None]).round_().clamp_(0.0, spec.levels - 1.0)
            values[:, part] = (codes - zero[:, None]) * scale[:, None]
            continue
        errors = torch.empty_like(own)
        for k in range(part.start, part.stop):
            code = (left[:, k] / scale + zero).round_().clamp_(0.0, spec.levels - 1.0)
            values[:, k] = (code - zero) * scale
            errors[:, k - part.start] = error = (left[:, k] - values[:, k]) / factor[k, k]
            left[:, k + 1 : part.stop].addr_(error, factor[k, k + 1 : part.stop], alpha=-1)
        left[:, part.stop :].addmm_(errors, factor[part, part.stop :], alpha=-1)
    return values


def _inverse_factor(metric: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped metric; dead columns count as 1."""
    metric, diagonal = metric.double(), metric.diagonal().double()
    metric = metric + torch.diag(0.01 * diagonal.mean() + (diagonal <= 0).double())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(metric))
    return torch.linalg.cholesky(inverse, upper=True).float()
