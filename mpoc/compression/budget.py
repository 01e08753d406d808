"""Allocate a budget of parameters or bytes to layers, uniformly or by equal marginal gain.  No tensors here.

Uniformly: the largest common ρ at which the sum stays within the budget is found by bisection.  What
granularity leaves over goes, one step of the bond at a time, to the layers with the smallest ρ.  The bytes of
a whole output (``--size``) are the layers' and all else, so that budget is lowered until the output fits.

By gain: each layer has candidates, a number of parameters and an error for each; errors must be comparable
between layers.  Only candidates on the lower convex hull can be worth their parameters.  Taking the steps of
all hulls in the order of their gain is optimal for every budget that it meets exactly (Everett 1963; Shoham
and Gersho 1988); what is left over goes to the largest steps that still fit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mpoc.errors import UsageError
from mpoc.quantize.storage import GRID_BITS
from mpoc.tensor_networks.structure import Structure

_CODED_BITS = tuple(steps / 64 for steps in range(16, 641))  # from ¼ to 10
Bonds = list[int | None]  # the cap on each layer's bonds; None: the layer stays dense


class UnreachableSizeError(UsageError):
    """No output is as small as ``--size`` asks for; the hint names the smallest."""


@dataclass(frozen=True)
class LayerShare:
    """A layer that takes part in a budget."""

    structure: Structure
    stored_cost: float  # cost of one number in a core: 1, or its bytes
    dense_cost: float  # cost of one number of the layer left dense


def smallest_bonds(shares: list[LayerShare]) -> Bonds:
    """Bond 1 for each layer, or None where the layer would not shrink even so."""
    return [
        1 if share.structure.num_parameters(1) < share.structure.num_original else None for share in shares
    ]


def bonds_within_size(shares: list[LayerShare], size: int, predict: Callable[[Bonds], int]) -> Bonds:
    """Choose bonds such that the predicted output has at most ``size`` bytes.

    Everything but the layers (other tensors, header, manifest) is taken from the prediction at bond 1. The
    manifest's digits may grow with the bonds, so the budget is lowered until the prediction fits.

    Args:
        shares: the layers, with costs in bytes.
        size: bytes of the weight files.
        predict: the bytes of the weight files with these bonds, an upper bound.

    Raises:
        UnreachableSizeError: the output is larger even with every bond at 1.
    """
    smallest = smallest_bonds(shares)
    least = predict(smallest)
    budget = size - (least - _cost(shares, smallest))
    while (bonds := uniform_bonds(shares, budget)) is not None:
        excess = predict(bonds) - size
        if excess <= 0:
            return bonds
        budget -= excess
    raise UnreachableSizeError(
        f"--size {size}: with every bond at 1 the output has {least} bytes",
        f"--size {least}, or compress more: --embeddings, --dtype bfloat16",
    )


def fewest_bits(storage: str) -> float:
    """The fewest bits a number that a budget gives to a layer in this storage."""
    return _steps(storage)[0]


def _steps(storage: str) -> tuple[float, ...]:
    return GRID_BITS if storage == "grid" else _CODED_BITS


def bits_within_size(storage: str, size: int, predict: Callable[[float], int]) -> float:
    """Choose the most bits a number with which the predicted output has at most ``size`` bytes.

    Args:
        storage: ``"grid"``, of the widths that grids have, or ``"coded"``, of any number of bits to 1/64.
        size: bytes of the weight files.
        predict: their bytes with so many bits, an upper bound.

    Raises:
        UsageError: the output is larger even with the fewest bits.
    """
    steps = _steps(storage)
    fitting = bisect_right(steps, size, key=predict)
    if fitting == 0:
        least = predict(steps[0])
        raise UnreachableSizeError(
            f"--size {size}: at {steps[0]:g} bits a weight, the fewest, the output has {least} bytes",
            f"--size {least}, or compress more: --embeddings",
        )
    return steps[fitting - 1]


def uniform_bonds(shares: list[LayerShare], budget: float) -> Bonds | None:
    """Choose bonds at the largest common ρ within ``budget``, or None if even bond 1 costs more.

    All layers stay dense if the budget covers that. The sum of their costs never exceeds ``budget``.
    """
    dense: Bonds = [None] * len(shares)
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


def _at(shares: list[LayerShare], ratio: float) -> Bonds:
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


def _layer_cost(share: LayerShare, bond: int | None) -> float:
    if bond is None:
        return share.structure.num_original * share.dense_cost
    return share.structure.num_parameters(bond) * share.stored_cost


def _cost(shares: list[LayerShare], bonds: Bonds) -> float:
    return sum(_layer_cost(share, bond) for share, bond in zip(shares, bonds, strict=True))


def _spend_rest(shares: list[LayerShare], bonds: Bonds, budget: float) -> Bonds:
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
