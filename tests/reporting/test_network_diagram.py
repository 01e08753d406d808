"""Drawings of networks: what they show multiplies out to what is stored."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import pytest

from mpoc.io.manifest import LayerRecord
from mpoc.reporting.network_diagram import (
    RADIUS,
    Diagram,
    DiagramBond,
    DiagramLeg,
    DiagramNode,
    diagrams_of,
    network_svg,
    place_terms,
)
from mpoc.tensor_networks.structure import Structure, low_rank_structure, make_structure
from tests.support.weights import EVERY_KIND, shape_id

MORE = [
    low_rank_structure("linear", (12, 8)),
    make_structure("linear", (7, 5), sites=1),
    make_structure("linear", (4096, 4096), sites=12),
]
TREES = [make_structure("linear", (2**n, 2**n), sites=n, form="tree") for n in (2, 3, 5, 8)]
MERAS = [make_structure("linear", (2**n, 2**n), sites=n, form="mera") for n in (2, 3, 6, 12)]


def record_of(structure: Structure, bond: int = 3, low_rank: int = 0) -> LayerRecord:
    bonds = structure.bonds(bond)
    structure = structure.as_form("svd+mpo") if low_rank else structure
    return LayerRecord(
        "a.weight", structure.kind, structure.shape, "float32", structure.form, structure.num_original,
        structure.num_parameters(bond, low_rank), "float32", "", structure.transposed,
        structure.output_factors, structure.input_factors, bonds, low_rank, structure.padding,
    )  # fmt: skip


def numbers(network: Diagram) -> int:
    """Of all its tensors: the product of each one's legs and bonds."""
    total = 0
    for k in range(len(network.nodes)):
        sizes = [leg.size for leg in network.legs if leg.node == k]
        sizes += [bond.size for bond in network.bonds if k in (bond.first, bond.second)]
        total += math.prod(sizes)
    return total


@pytest.mark.parametrize("structure", [*EVERY_KIND, *MORE, *TREES, *MERAS], ids=shape_id)
def test_diagram_has_the_bonds_and_sides_of_its_layer(structure: Structure) -> None:
    record = record_of(structure)
    (network,) = diagrams_of(record)
    assert numbers(network) == record.num_stored
    sides = [math.prod(leg.size for leg in network.legs if leg.label[0] == letter) for letter in "JI"]
    named = [leg.size for leg in network.legs if leg.label in ("taps", "experts")]
    assert math.prod(sides + named) == math.prod(record.output_factors) * math.prod(record.input_factors)


@pytest.mark.parametrize("structure", [*EVERY_KIND, *MORE], ids=shape_id)
def test_chain_has_the_bonds_and_sides_of_its_layer(structure: Structure) -> None:
    record = record_of(structure)
    (network,) = diagrams_of(record)
    assert numbers(network) == record.num_stored
    ups = math.prod(leg.size for leg in network.legs if leg.up)
    downs = math.prod(leg.size for leg in network.legs if not leg.up)
    assert (ups, downs) == (math.prod(record.output_factors), math.prod(record.input_factors))
    assert [bond.size for bond in network.bonds] == list(record.bonds[1:-1])


def test_sum_has_two_terms() -> None:
    record = record_of(make_structure("conv2d", (16, 12, 3, 3)), low_rank=5)
    first, added = diagrams_of(record)
    assert numbers(first) + numbers(added) == record.num_stored
    assert [bond.size for bond in added.bonds] == [5]


@pytest.mark.parametrize(
    ("kind", "shape", "label"), [("conv2d", (16, 12, 3, 3), "taps"), ("experts", (3, 16, 8), "experts")]
)
def test_labels_the_lead_site(kind: str, shape: tuple[int, ...], label: str) -> None:
    (network,) = diagrams_of(record_of(make_structure(kind, shape)))
    assert [leg.label for leg in network.legs if leg.node == 0] == [label]


@pytest.mark.parametrize("structure", [*EVERY_KIND, *MORE, *TREES, *MERAS], ids=shape_id)
def test_labels_do_not_overlap(structure: Structure) -> None:
    sums = [record_of(structure)]
    if structure.form == "mpo":
        sums.append(record_of(structure, low_rank=1))
    for record in sums:
        root = ElementTree.fromstring(network_svg(diagrams_of(record), "a network"))
        boxes = [box(text) for text in root.iter("text")]
        width, height = float(root.get("width", "")), float(root.get("height", ""))
        assert all(
            left >= 0 and top >= 0 and right <= width and bottom <= height
            for left, top, right, bottom in boxes
        )
        for (l1, t1, r1, b1), (l2, t2, r2, b2) in combinations(boxes, 2):
            assert min(r1, r2) <= max(l1, l2) or min(b1, b2) <= max(t1, t2)


def box(text: ElementTree.Element) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a label of 12 px."""
    x, y = float(text.get("x", "")), float(text.get("y", ""))
    half = 3.6 * len("".join(text.itertext()))
    return x - half, y - 9, x + half, y + 2


def test_other_forms_have_no_diagram() -> None:
    record = record_of(make_structure("linear", (12, 8)))
    assert diagrams_of(replace(record, form="dense")) == ()


def test_draws_any_list_of_nodes() -> None:
    """As of a tree: nodes on several levels, legs at some."""
    nodes = (DiagramNode("top", 0.5), DiagramNode("a", 0.0, 1.0), DiagramNode("b", 1.0, 1.0))
    legs = (DiagramLeg(0, "J", 9, True), DiagramLeg(1, "I₁", 30522, False), DiagramLeg(2, "I₂", 4, False))
    network = Diagram(nodes, legs, (DiagramBond(0, 1, 8), DiagramBond(0, 2, 1)))
    root = ElementTree.fromstring(network_svg((network, network), "a tree"))
    assert len(list(root.iter("circle"))) == 6
    assert "".join(root.itertext()).count("30522") == 2
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    discs = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in root.iter("circle")]
    assert all(RADIUS < x < width - RADIUS and RADIUS < y < height - RADIUS for x, y in discs)
    assert all(math.dist(*pair) > 2 * RADIUS for pair in combinations(discs, 2))
    top, lower = place_terms((network, network))
    assert top.top + top.height < lower.top + 1e-9 or lower.top >= top.height
