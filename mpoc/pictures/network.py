"""A layer's tensor network as plain data: nodes on a grid, their legs, the bonds between them.

What hangs together is told by :mod:`mpoc.wiring`; ``PLACES`` says for each kind of network where its cores
stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mpoc.manifest import LayerRecord
from mpoc.structure import Structure
from mpoc.wiring import Core

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
# Of a tree's sites, below which outputs and inputs hang side by side.
_WIDE = 1.3


@dataclass(frozen=True)
class Node:
    """A tensor; x to the right, y downwards, in steps of the grid."""

    name: str
    x: float
    y: float = 0.0


@dataclass(frozen=True)
class Leg:
    """An open index of a node."""

    node: int
    label: str  # "J₂"
    size: int
    up: bool
    side: int = 0  # -1 slants to the left, 1 to the right


@dataclass(frozen=True)
class Bond:
    """An index, or several as one, that two nodes share."""

    first: int
    second: int
    size: int


@dataclass(frozen=True)
class Network:
    """One term of the sum that stands for the weight."""

    nodes: tuple[Node, ...]
    legs: tuple[Leg, ...]
    bonds: tuple[Bond, ...]


def networks_of(record: LayerRecord) -> tuple[Network, ...]:
    """The terms whose sum is the weight; none where the layer is dense or its network has no places."""
    if record.form == "dense" or record.structure.network not in PLACES:
        return ()
    structure = record.structure
    first = _network(structure, record.bonds)
    if not record.low_rank:
        return (first,)
    return first, _network(structure.as_low_rank(), (1, record.low_rank, 1))


def _network(structure: Structure, bonds: tuple[int, ...]) -> Network:
    cores = structure.wiring(bonds)
    places = PLACES[structure.network](cores)
    nodes = tuple(Node(str(k + 1), x, y) for k, (x, y) in enumerate(places))
    joined = tuple(_bonds(cores))
    legs = [leg for k, core in enumerate(cores) for leg in _legs(k, core, nodes, joined, structure.network)]
    if structure.lead_sites:
        lead = "experts" if structure.kind == "experts" else "taps"
        legs = [replace(leg, label=lead) if leg.label[1:] == "₁" else leg for leg in legs]
    return Network(nodes, tuple(legs), joined)


def _is_open(leg: str) -> bool:
    """``j3`` is an output, ``i3`` an input; any other is a bond."""
    return leg[0] in "ij"


def _legs(k: int, core: Core, nodes: Sequence[Node], bonds: Sequence[Bond], network: str) -> list[Leg]:
    """Outputs up and inputs down, but at a tree's sites both down.  An index of size 1 is none."""
    pairs = [pair for pair in zip(core.legs, core.shape, strict=True) if _is_open(pair[0])]
    found: list[Leg] = []
    for leg, size in [pair for pair in pairs if pair[1] > 1] or pairs:
        label = leg[0].upper() + leg[1:].translate(_SUBSCRIPTS)
        found.append(Leg(k, label, size, leg[0] == "j" and network != "tree"))
    around = {one.first + one.second - k for one in bonds if k in (one.first, one.second)}
    return [replace(leg, side=_side(leg, found, nodes, around)) for leg in found]


def _side(leg: Leg, found: list[Leg], nodes: Sequence[Node], around: set[int]) -> int:
    """Away from another leg in the same direction, or from the bonds in it."""
    same = [one for one in found if one.up == leg.up]
    if len(same) > 1:
        return 1 if same.index(leg) else -1
    here = nodes[leg.node]
    others = [nodes[k].x for k in around if (nodes[k].y < here.y if leg.up else nodes[k].y > here.y)]
    if not others:
        return 0
    return 1 if max(others) <= here.x else -1


def _bonds(cores: Sequence[Core]) -> list[Bond]:
    """Indices that two cores share; several between the same two are one of their joint size."""
    holders: dict[str, int] = {}
    sizes: dict[tuple[int, int], int] = {}
    for k, core in enumerate(cores):
        for leg, size in zip(core.legs, core.shape, strict=True):
            if leg in holders and not _is_open(leg):
                pair = holders[leg], k
                sizes[pair] = sizes.get(pair, 1) * size
            holders[leg] = k
    return [Bond(*pair, size) for pair, size in sizes.items()]


def _in_a_row(cores: Sequence[Core]) -> list[tuple[float, float]]:
    return [(float(k), 0.0) for k in range(len(cores))]


def _above_children(cores: Sequence[Core]) -> list[tuple[float, float]]:
    """A tree's sites in the lowest row, every other core above the middle of its two branches."""
    at: dict[str, tuple[float, float]] = {}
    found: list[tuple[float, float]] = []
    for core in cores:
        below = [at[leg] for leg in core.legs[:2] if not _is_open(leg)]
        if below:
            place = sum(x for x, _ in below) / 2, min(y for _, y in below) - 1
        else:
            place = _WIDE * int(core.legs[0][1:]), 0.0
        at[core.legs[-1]] = place
        found.append(place)
    return found


def _level_by_level(cores: Sequence[Core]) -> list[tuple[float, float]]:
    """A MERA's inputs below; every core between its two lower legs, above whatever they come from."""
    at: dict[str, tuple[float, float]] = {}
    found: list[tuple[float, float]] = []
    for core in cores:
        upper, lower = core.legs[: len(core.legs) // 2], core.legs[len(core.legs) // 2 :]
        below = [at.get(leg, (float(leg[1:]) if _is_open(leg) else 0.0, 1.0)) for leg in lower]
        place = sum(x for x, _ in below) / len(below), min(y for _, y in below) - 1
        kept = [leg for leg in upper if not _is_open(leg)]
        # A disentangler's legs go up where they came from, an isometry's from its middle.
        xs = [x for x, _ in below] if len(kept) == len(below) else [place[0]] * len(kept)
        at |= {leg: (x, place[1]) for leg, x in zip(kept, xs, strict=True)}
        found.append(place)
    return found


PLACES: dict[str, Callable[[Sequence[Core]], list[tuple[float, float]]]] = {
    "chain": _in_a_row,
    "tree": _above_children,
    "mera": _level_by_level,
}
