"""A layer's tensor network as plain data: nodes on a grid, their legs, the bonds between them.

A form is drawn by one function that lists its nodes; ``DRAWN`` names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from mpoc.manifest import LayerRecord

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass(frozen=True)
class Node:
    """A tensor; x to the right, y downwards, in steps of the grid."""

    name: str
    x: float
    y: float = 0.0


@dataclass(frozen=True)
class Leg:
    """An open index of a node: outputs point up, inputs down."""

    node: int
    label: str  # "J₂"
    size: int
    up: bool


@dataclass(frozen=True)
class Bond:
    """An index that two nodes share."""

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
    """The terms whose sum is the weight; none where the layer is dense or its form has no drawing."""
    draw = DRAWN.get(record.form)
    return draw(record) if draw else ()


def chain(factors: tuple[tuple[int, int], ...], bonds: tuple[int, ...], lead: str | None = None) -> Network:
    """A row of sites.

    Args:
        factors: (J_k, I_k) of each.
        bonds: (D_0..D_n).
        lead: what the first site holds besides outputs and inputs, "taps" or "experts".
    """
    legs: list[Leg] = []
    for k, (output, input) in enumerate(factors):
        site = str(k + 1).translate(_SUBSCRIPTS)
        special = lead if k == 0 else None
        pairs = ((special or f"J{site}", output, True), (special or f"I{site}", input, False))
        # An index of size 1 is none; a site without any shows both.
        legs += [Leg(k, *pair) for pair in pairs if pair[1] > 1 or output == input == 1]
    nodes = tuple(Node(str(k + 1), float(k)) for k in range(len(factors)))
    inner = tuple(
        Bond(*pair, size) for pair, size in zip(pairwise(range(len(factors))), bonds[1:-1], strict=True)
    )
    return Network(nodes, tuple(legs), inner)


def _chains(record: LayerRecord) -> tuple[Network, ...]:
    """The MPO, and the low-rank part that is added to it."""
    structure = record.structure
    lead = "experts" if record.kind == "experts" else "taps"
    factors = tuple(zip(record.output_factors, record.input_factors, strict=True))
    found = chain(factors, record.bonds, lead if structure.lead_sites else None)
    if not record.low_rank:
        return (found,)
    low = structure.as_low_rank()
    added = tuple(zip(low.output_factors, low.input_factors, strict=True))
    return found, chain(added, (1, record.low_rank, 1))


DRAWN: dict[str, Callable[[LayerRecord], tuple[Network, ...]]] = {
    "mpo": _chains,
    "svd": _chains,
    "svd+mpo": _chains,
}
