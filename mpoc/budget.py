"""Share a budget among layers uniformly, the same ρ for every layer (by gain: :mod:`mpoc.curves`).

The largest common ρ at which the sum stays within the budget is found by bisection; what granularity
leaves over goes, a step of the bond at a time, to the layers that are furthest below.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpoc.structure import Structure


@dataclass(frozen=True)
class Share:
    """A layer that takes part in the sharing."""

    structure: Structure
    stored_cost: int  # of one number in a core (1, or its bytes)
    dense_cost: int  # of one number of the layer left dense


def uniform_bonds(shares: list[Share], budget: int) -> list[int | None] | None:
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


def _at(shares: list[Share], ratio: float) -> list[int | None]:
    return [largest_bond(share.structure, ratio) for share in shares]


def largest_bond(structure: Structure, ratio: float) -> int | None:
    """The largest cap that keeps the layer within ``ratio``; 1 where none does; None: never shrinks."""
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


def _layer_cost(share: Share, bond: int | None) -> int:
    if bond is None:
        return share.structure.num_original * share.dense_cost
    return share.structure.num_parameters(bond) * share.stored_cost


def _cost(shares: list[Share], bonds: list[int | None]) -> int:
    return sum(_layer_cost(share, bond) for share, bond in zip(shares, bonds, strict=True))


def _spend_rest(shares: list[Share], bonds: list[int | None], budget: int) -> list[int | None]:
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


def _ratio(share: Share, bond: int | None) -> float:
    return share.structure.num_parameters(bond or 1) / share.structure.num_original
