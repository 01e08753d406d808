"""Round a matrix to a grid: integer codes of so many bits, in groups that share a scale.

Ranges are searched, codes are made with feedback (:mod:`mpoc.quantize.rounding`), then scales are refitted in
closed form and codes by coordinate descent, in turns, none of which raises f where rows do not interact.
Where they do, codes are made once more at these scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.quantize.codes import GridTensor
from mpoc.quantize.feedback import Feedback, Rows
from mpoc.quantize.rounding import checked, descend, ordered, restored, round_codes
from mpoc.quantize.storage import Grid

_SWEEPS = 2  # rounds of refitted scales and coordinate descent
# Shares of a group's range that the search of scales tries.
_SHRINK = tuple(1.0 - 0.05 * step for step in range(13))


def round_grid(target: Tensor, feedback: Feedback | None, spec: Grid, rows: Rows = None) -> GridTensor:
    """Round to a grid.

    The range of each group is searched for the least error in the weights U_kk², its scale rounded to float16
    before the codes are made and refitted after them.

    Args:
        target: T, (rows, columns).
        feedback: the metric of the columns; None is the identity.
        spec: the grid.
        rows: G; its diagonal, or the identity, changes nothing.

    Raises:
        MpocError: the target is not finite, or too large for scales in float16.
        UsageError: the group does not divide the columns.
    """
    columns = target.shape[1]
    groups = spec.groups(columns)
    target = checked(target)
    scale, zero = _search_ranges(target.reshape(len(target), groups, -1), feedback, spec)
    if not bool(scale.isfinite().all()):
        raise MpocError(f"weights of {float(target.abs().max()):.3g} are too large for a grid")
    wanted = ordered(target, feedback)
    steps, zeros = (ordered(each.repeat_interleave(columns // groups, 1), feedback) for each in (scale, zero))
    order = torch.arange(columns) if feedback is None else feedback.order
    members = [torch.nonzero(order // (columns // groups) == group)[:, 0] for group in range(groups)]
    limits = 0.0, spec.levels - 1.0
    codes = round_codes(wanted + zeros * steps, steps, feedback, limits=limits)
    for _ in range(_SWEEPS):
        steps = _refitted_steps(wanted, codes - zeros, steps, feedback, members)
        codes = descend(wanted + zeros * steps, codes, steps, feedback, limits)
    if isinstance(rows, Feedback):
        places = rows.order
        shifted = (wanted + zeros * steps)[:, places].contiguous()
        codes[:, places] = round_codes(shifted, steps[:, places].contiguous(), feedback, rows, limits=limits)
    scale = torch.stack([steps[own[0]] for own in members], 1).half()
    zero_point = None if spec.symmetric else zero.to(torch.uint8)
    return GridTensor(restored(codes, feedback).to(torch.uint8), scale, zero_point, spec)


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
    left = checked(target).clone()
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
