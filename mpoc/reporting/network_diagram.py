"""Diagrams of tensor networks: a disc per tensor, a line per index, thicker for larger indices.

:mod:`mpoc.tensor_networks.topology` tells which cores are joined and where each of them stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mpoc.io.manifest import DENSE, LayerRecord
from mpoc.reporting.svg import Markup, join, tag
from mpoc.tensor_networks.structure import Structure
from mpoc.tensor_networks.topology import Core, Topology, is_open

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
# Steps of the grid, in units of the viewBox; a label of five digits fits between two discs.
STEP_X, STEP_Y = 84, 78
RADIUS = 15
_LEG = 20
_EDGE = 52  # from the edge to the middle of the first disc, with room for the label of its leg
_TEXT = 14
_SLANT = 25  # of a leg beside another one, so that their labels do not touch
_BETWEEN = 16  # space between the terms of a sum


@dataclass(frozen=True)
class DiagramNode:
    """A tensor at a point of the grid: x to the right, y downwards."""

    name: str
    x: float
    y: float = 0.0


@dataclass(frozen=True)
class DiagramLeg:
    """An open index of a node."""

    node: int
    label: str  # "J₂"
    size: int
    up: bool
    side: int = 0  # -1 slants to the left, 1 to the right


@dataclass(frozen=True)
class DiagramBond:
    """An index, or several as one, that two nodes share."""

    first: int
    second: int
    size: int


@dataclass(frozen=True)
class Diagram:
    """The network of one term of the sum that is the weight."""

    nodes: tuple[DiagramNode, ...]
    legs: tuple[DiagramLeg, ...]
    bonds: tuple[DiagramBond, ...]


def diagrams_of(record: LayerRecord) -> tuple[Diagram, ...]:
    """Diagrams of the terms whose sum is the weight; () where the layer is dense."""
    if record.form == DENSE:
        return ()
    structure = record.structure
    bonds = structure.split_bonds(record.all_bonds)
    return tuple(
        _network(part, own) for part, own in zip(structure.parts or (structure,), bonds, strict=True)
    )


def _network(structure: Structure, bonds: tuple[int, ...]) -> Diagram:
    cores, topology = structure.cores(bonds), structure.topology
    places = topology.places(cores)
    nodes = tuple(DiagramNode(str(k + 1), x, y) for k, (x, y) in enumerate(places))
    joined = tuple(_bonds(cores))
    legs = [leg for k, core in enumerate(cores) for leg in _legs(k, core, nodes, joined, topology)]
    if structure.lead_sites:
        lead = "experts" if structure.kind == "experts" else "taps"
        legs = [replace(leg, label=lead) if leg.label[1:] == "₁" else leg for leg in legs]
    return Diagram(nodes, tuple(legs), joined)


def _legs(
    k: int, core: Core, nodes: Sequence[DiagramNode], bonds: Sequence[DiagramBond], topology: Topology
) -> list[DiagramLeg]:
    """Legs of a core: outputs up, inputs down, at a tree's sites both down.  Size 1 is omitted."""
    pairs = [pair for pair in zip(core.legs, core.shape, strict=True) if is_open(pair[0])]
    legs: list[DiagramLeg] = []
    for leg, size in [pair for pair in pairs if pair[1] > 1] or pairs:
        label = leg[0].upper() + leg[1:].translate(_SUBSCRIPTS)
        legs.append(DiagramLeg(k, label, size, leg[0] == "j" and topology.outputs_up))
    around = {bond.first + bond.second - k for bond in bonds if k in (bond.first, bond.second)}
    return [replace(leg, side=_side(leg, legs, nodes, around)) for leg in legs]


def _side(leg: DiagramLeg, legs: list[DiagramLeg], nodes: Sequence[DiagramNode], around: set[int]) -> int:
    """The slant of a leg, away from another leg or a bond in the same direction."""
    same = [other for other in legs if other.up == leg.up]
    if len(same) > 1:
        return 1 if same.index(leg) else -1
    here = nodes[leg.node]
    others = [nodes[k].x for k in around if (nodes[k].y < here.y if leg.up else nodes[k].y > here.y)]
    if not others:
        return 0
    return 1 if max(others) <= here.x else -1


def _bonds(cores: Sequence[Core]) -> list[DiagramBond]:
    """Indices that two cores share; several between the same two cores become one of their product."""
    holders: dict[str, int] = {}
    sizes: dict[tuple[int, int], int] = {}
    for k, core in enumerate(cores):
        for leg, size in zip(core.legs, core.shape, strict=True):
            if leg in holders and not is_open(leg):
                pair = holders[leg], k
                sizes[pair] = sizes.get(pair, 1) * size
            holders[leg] = k
    return [DiagramBond(*pair, size) for pair, size in sizes.items()]


def stroke(size: int) -> float:
    """Line width of an index."""
    return 1.2 + 0.45 * math.log2(max(size, 1)) if size > 1 else 1.0


@dataclass(frozen=True)
class Placed:
    """A diagram placed on the canvas."""

    network: Diagram
    left: float
    top: float

    @property
    def width(self) -> float:
        """Width, with the labels of the legs."""
        return 2 * _EDGE + STEP_X * self._span(0)

    @property
    def height(self) -> float:
        """Height, with the legs and their labels."""
        return 2 * (RADIUS + _LEG + _TEXT + 4) + STEP_Y * self._span(1)

    def _span(self, side: int) -> float:
        values = [(node.x, node.y)[side] for node in self.network.nodes]
        return max(values) - min(values)

    def at(self, node: int | DiagramNode) -> tuple[float, float]:
        """The centre of a disc."""
        disc = self.network.nodes[node] if isinstance(node, int) else node
        first = min(n.x for n in self.network.nodes), min(n.y for n in self.network.nodes)
        top = self.top + RADIUS + _LEG + _TEXT + 4
        return self.left + _EDGE + STEP_X * (disc.x - first[0]), top + STEP_Y * (disc.y - first[1])

    def end(self, leg: DiagramLeg) -> tuple[float, float]:
        """The end of a leg, above or below its node."""
        x, y = self.at(leg.node)
        return x + _SLANT * leg.side, y + (-1 if leg.up else 1) * (RADIUS + _LEG)


def place_terms(networks: tuple[Diagram, ...]) -> list[Placed]:
    """Place the terms of a sum below each other."""
    left = 24.0 if len(networks) > 1 else 0.0
    placed: list[Placed] = []
    top = 0.0
    for network in networks:
        placed.append(Placed(network, left, top))
        top += placed[-1].height + _BETWEEN
    return placed


def network_svg(networks: tuple[Diagram, ...], label: str) -> Markup:
    """The sum of ``networks`` as SVG; ``label`` is its text for screen readers."""
    placed = place_terms(networks)
    width = max(term.left + term.width for term in placed)
    height = placed[-1].top + placed[-1].height
    plus = [tag("text", "+", x=12, y=term.at(0)[1] + 6, class_="m plus") for term in placed[1:]]
    return tag(
        "svg",
        *(_term(term) for term in placed),
        *plus,
        class_="network",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=width,
        height=height,
        style=f"--w:{width:.0f}px",
        role="img",
        aria_label=label,
    )


def _term(placed: Placed) -> Markup:
    bonds = [_bond(placed, bond) for bond in placed.network.bonds]
    legs = [_leg(placed, leg) for leg in placed.network.legs]
    discs = [_disc(placed, node) for node in placed.network.nodes]
    sizes = [_size(placed, bond) for bond in placed.network.bonds]
    return join(*bonds, *legs, *discs, *sizes)


def _bond(placed: Placed, bond: DiagramBond) -> Markup:
    (x1, y1), (x2, y2) = placed.at(bond.first), placed.at(bond.second)
    width = f"{stroke(bond.size):.1f}"
    return tag(
        "line", x1=x1, y1=y1, x2=x2, y2=y2, stroke_width=width, class_="bond" if bond.size > 1 else "bond one"
    )


def _size(placed: Placed, bond: DiagramBond) -> Markup:
    """The size of a bond, above the middle of its line."""
    (x1, y1), (x2, y2) = placed.at(bond.first), placed.at(bond.second)
    return tag(
        "text", str(bond.size), x=(x1 + x2) / 2, y=(y1 + y2) / 2 - 3 - stroke(bond.size) / 2, class_="m d"
    )


def _leg(placed: Placed, leg: DiagramLeg) -> Markup:
    (x, y), (x_end, end) = placed.at(leg.node), placed.end(leg)
    text = end - 5 if leg.up else end + _TEXT
    label = tag("text", tag("tspan", f"{leg.label} ", class_="k"), str(leg.size), x=x_end, y=text, class_="m")
    line = tag("line", x1=x, y1=y, x2=x_end, y2=end, stroke_width=f"{stroke(leg.size):.1f}", class_="leg")
    return join(line, label)


def _disc(placed: Placed, node: DiagramNode) -> Markup:
    x, y = placed.at(node)
    return join(tag("circle", cx=x, cy=y, r=RADIUS), tag("text", node.name, x=x, y=y + 4, class_="m n"))
