"""Share a budget among layers by equal marginal gain: error taken off by one number more.

Each layer offers choices, a number of parameters and an error for each; errors must be comparable between
layers.  Only choices on the lower convex hull can be worth their numbers.  Taking the steps of all hulls in
the order of their gain is optimal for every budget that it meets exactly (Everett 1963; Shoham and Gersho
1988); what is left over then goes to the largest steps that still fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Choice = tuple[int, float]  # parameters, error


def share_out(curves: Sequence[Sequence[Choice]], budget: int) -> list[int] | None:
    """One choice for each layer, so that the errors sum to little and the parameters to at most ``budget``.

    Args:
        curves: of each layer its choices in any order, at least one.
        budget: parameters of all together.

    Returns:
        The place of each layer's choice in its curve; None where even the smallest choices take more.
    """
    hulls = [_hull(curve) for curve in curves]
    taken = [hull[0] for hull in hulls]
    rest = budget - sum(curve[k][0] for curve, k in zip(curves, taken, strict=True))
    if rest < 0:
        return None
    steps = sorted(
        (-_gain(curve, before, after), layer, place)
        for layer, (curve, hull) in enumerate(zip(curves, hulls, strict=True))
        for place, (before, after) in enumerate(pairwise(hull))
    )
    ended: set[int] = set()
    for _, layer, place in steps:
        before, after = hulls[layer][place : place + 2]
        cost = curves[layer][after][0] - curves[layer][before][0]
        if layer in ended or cost > rest:
            ended.add(layer)
            continue
        taken[layer], rest = after, rest - cost
    return _spend(curves, taken, rest)


def _hull(curve: Sequence[Choice]) -> list[int]:
    """Places of the choices on the lower convex hull, from the fewest parameters on, errors falling."""
    hull: list[int] = []
    for k in sorted(range(len(curve)), key=lambda k: curve[k]):
        if hull and curve[k][1] >= curve[hull[-1]][1]:
            continue
        while hull and curve[k][0] == curve[hull[-1]][0]:
            hull.pop()
        while len(hull) > 1 and _gain(curve, hull[-2], hull[-1]) < _gain(curve, hull[-1], k):
            hull.pop()
        hull.append(k)
    return hull


def _gain(curve: Sequence[Choice], before: int, after: int) -> float:
    """Error taken off by each number more."""
    return (curve[before][1] - curve[after][1]) / (curve[after][0] - curve[before][0])


def _spend(curves: Sequence[Sequence[Choice]], taken: list[int], rest: int) -> list[int]:
    """What is left goes, as long as something fits, to the choice that takes most off a layer's error."""
    while True:
        best: tuple[float, int, int] | None = None
        for layer, curve in enumerate(curves):
            size, error = curve[taken[layer]]
            for k, (more, less) in enumerate(curve):
                if size <= more <= size + rest and less < error and (best is None or error - less > best[0]):
                    best = (error - less, layer, k)
        if best is None:
            return taken
        _, layer, k = best
        rest -= curves[layer][k][0] - curves[layer][taken[layer]][0]
        taken[layer] = k
