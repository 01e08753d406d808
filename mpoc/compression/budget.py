"""Allocate a budget of parameters or bytes to layers, uniformly or by equal marginal gain.  No tensors here.

Uniformly: the largest common ρ at which the sum stays within the budget is found by bisection.  What
granularity leaves over goes, one step of the bond at a time, to the layers with the smallest ρ.

By gain: each layer has candidates, a number of parameters and an error for each; errors must be comparable
between layers.  Only candidates on the lower convex hull can be worth their parameters.  Taking the steps of
all hulls in the order of their gain is optimal for every budget that it meets exactly (Everett 1963; Shoham
and Gersho 1988); what is left over goes to the largest steps that still fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mpoc.tensor_networks.structure import Structure


@dataclass(frozen=True)
class LayerShare:
    """A layer that takes part in a budget."""

    structure: Structure
    stored_cost: int  # of one number in a core (1, or its bytes)
    dense_cost: int  # of one number of the layer left dense


def uniform_bonds(shares: list[LayerShare], budget: int) -> list[int | None] | None:
    """A bond cap for each layer, None for a layer better left dense; None where even bond 1 costs more.

    All stay dense where the budget covers that.

    The sum of the layers' costs never exceeds ``budget``.
    """
    dense: list[int | None] = [None] * len(shares)
    if _cost(shares, dense) <= budget:
        return dense
    low, high = 0.0, 1.0
    if _cost(shares, _at(shares, low)) > budget:
        return None
    if _cost(shares, _at(shares, high)) <= budget:
        low = high
    for _ in range(40):
        middle = (low + high) / 2
        if _cost(shares, _at(shares, middle)) <= budget:
            low = middle
        else:
            high = middle
    return _spend_rest(shares, _at(shares, low), budget)


def _at(shares: list[LayerShare], ratio: float) -> list[int | None]:
    return [largest_bond(share.structure, ratio) for share in shares]


def largest_bond(structure: Structure, ratio: float) -> int | None:
    """The largest bond that keeps the layer within ``ratio``; 1 if none does; None: it never shrinks."""
    original = structure.num_original
    if structure.num_parameters(1) >= original:
        return None
    low, high = 1, structure.full_bond
    while low < high:
        middle = (low + high + 1) // 2
        count = structure.num_parameters(middle)
        if count <= ratio * original and count < original:
            low = middle
        else:
            high = middle - 1
    return low


def _layer_cost(share: LayerShare, bond: int | None) -> int:
    if bond is None:
        return share.structure.num_original * share.dense_cost
    return share.structure.num_parameters(bond) * share.stored_cost


def _cost(shares: list[LayerShare], bonds: list[int | None]) -> int:
    return sum(_layer_cost(share, bond) for share, bond in zip(shares, bonds, strict=True))


def _spend_rest(shares: list[LayerShare], bonds: list[int | None], budget: int) -> list[int | None]:
    """Raise bonds by one, lowest ρ first, while the sum stays within the budget."""
    rest = budget - _cost(shares, bonds)
    open_layers = {k for k, bond in enumerate(bonds) if bond is not None}
    while open_layers:
        k = min(open_layers, key=lambda k: (_ratio(shares[k], bonds[k]), k))
        bond = (bonds[k] or 0) + 1
        structure = shares[k].structure
        step = _layer_cost(shares[k], bond) - _layer_cost(shares[k], bonds[k])
        shrinks = structure.num_parameters(bond) < structure.num_original
        if bond > structure.full_bond or step > rest or not shrinks:
            open_layers.remove(k)
        else:
            bonds[k] = bond
            rest -= step
    return bonds


def _ratio(share: LayerShare, bond: int | None) -> float:
    return share.structure.num_parameters(bond or 1) / share.structure.num_original


CurvePoint = tuple[int, float]  # parameters, error


def allocate(curves: Sequence[Sequence[CurvePoint]], budget: int) -> list[int] | None:
    """Choose one candidate per layer: the sum of errors is small, that of parameters within the budget.

    Args:
        curves: the candidates of each layer in any order, at least one.
        budget: parameters of all layers together.

    Returns:
        The index of each layer's candidate in its curve; None if even the smallest candidates take more.
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


def _hull(curve: Sequence[CurvePoint]) -> list[int]:
    """Indices of the candidates on the lower convex hull, by parameters, errors falling."""
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


def _gain(curve: Sequence[CurvePoint], before: int, after: int) -> float:
    """The error saved by each additional parameter."""
    return (curve[before][1] - curve[after][1]) / (curve[after][0] - curve[before][0])


def _spend(curves: Sequence[Sequence[CurvePoint]], taken: list[int], rest: int) -> list[int]:
    """Spend what is left, as long as something fits, where it saves most of a layer's error."""
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
