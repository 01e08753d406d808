"""How the cores of a form hang together: every tensor with named legs.  Plain data, no torch.

Site k has an output leg j_k and an input leg i_k.  Every other leg is a bond between two cores.  Cores stand
in an order in which they can be applied to an input: each finds what it takes when it is its turn.

    chain   an MPO: core k takes i_k and the bond to its right, and gives j_k and the bond to its left
    tree    a binary tree over the sites (Hackbusch & Kühn 2009): each site's core, then cores of three bonds
    mera    a binary MERA (Hallam et al. 2017, Fig. 1): inputs enter below, outputs leave on the way up
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

TOPOLOGIES = ("chain", "tree", "mera")


def topology_of(form: str) -> str:
    """What joins the sites of a form: ``chain`` of all forms but ``tree`` and ``mera``."""
    return form if form in TOPOLOGIES else "chain"


@dataclass(frozen=True)
class Core:
    """A tensor of a network: its legs, in the order of its axes, and their dimensions."""

    legs: tuple[str, ...]  # "j3" an output, "i3" an input, any other a bond
    shape: tuple[int, ...]


@cache
def core_layout(
    network: str, output_factors: tuple[int, ...], input_factors: tuple[int, ...], bonds: tuple[int, ...]
) -> tuple[Core, ...]:
    """The cores of a network.

    Args:
        network: one of ``NETWORKS``.
        output_factors: J, one a site.
        input_factors: I.
        bonds: (D_0..D_n) of a chain; D of every branch of a tree, as :func:`branches` orders them; the index
            dimension D of a MERA alone.
    """
    if network == "chain":
        return _chain(output_factors, input_factors, bonds)
    if network == "tree":
        return _tree(output_factors, input_factors, bonds)
    return mera(output_factors, input_factors, bonds[0])


def num_bonds(network: str, sites: int) -> int:
    """How many numbers ``bonds`` has."""
    if network == "chain":
        return sites + 1
    return len(branches(sites)) if network == "tree" else 1


def count_core_parameters(
    network: str, output_factors: tuple[int, ...], input_factors: tuple[int, ...], bonds: tuple[int, ...]
) -> int:
    """Numbers in all cores: Σ D_{k-1} J_k I_k D_k of a chain."""
    return sum(math.prod(core.shape) for core in core_layout(network, output_factors, input_factors, bonds))


def _chain(outputs: Sequence[int], inputs: Sequence[int], bonds: Sequence[int]) -> tuple[Core, ...]:
    return tuple(
        Core((f"b{k}", f"j{k + 1}", f"i{k + 1}", f"b{k + 1}"), (bonds[k], j, i, bonds[k + 1]))
        for k, (j, i) in enumerate(zip(outputs, inputs, strict=True))
    )


@cache
def branches(sites: int) -> tuple[range, ...]:
    """The sites (from 0) below each branch of a tree: parents after their children, left before right.

    The two halves of the whole share one branch; it is named after the left half.  Sites are halved again and
    again, the left half being the larger.
    """

    def below(span: range) -> Iterator[range]:
        if len(span) > 1:
            for half in halves(span):
                yield from below(half)
        yield span

    return tuple(span for span in below(range(sites)) if span not in (range(sites), _right(sites)))


def halves(span: range) -> tuple[range, range]:
    """A run of sites cut in two, the left one larger by one where they are odd in number."""
    middle = span.start + (len(span) + 1) // 2
    return range(span.start, middle), range(middle, span.stop)


def _right(sites: int) -> range:
    return halves(range(sites))[1]


def _tree(outputs: Sequence[int], inputs: Sequence[int], bonds: Sequence[int]) -> tuple[Core, ...]:
    """One core of (J, I, D) a site, and one of (D_left, D_right, D_above) a pair of branches."""
    sites = len(outputs)
    if sites == 1:
        return (Core(("j1", "i1"), (outputs[0], inputs[0])),)
    found = branches(sites)
    sizes = dict(zip(found, bonds, strict=True))
    names = {span: _name(span) for span in found}
    left, right = halves(range(sites))
    sizes[right], names[right] = sizes[left], names[left]
    return tuple(_tree_core(span, outputs, inputs, sizes, names) for span in (*found, right))


def _tree_core(
    span: range,
    outputs: Sequence[int],
    inputs: Sequence[int],
    sizes: dict[range, int],
    names: dict[range, str],
) -> Core:
    if len(span) == 1:
        k = span.start
        return Core((f"j{k + 1}", f"i{k + 1}", names[span]), (outputs[k], inputs[k], sizes[span]))
    around = (*halves(span), span)
    return Core(tuple(names[one] for one in around), tuple(sizes[one] for one in around))


def _name(span: range) -> str:
    """``b3`` of a site's branch, ``b3-6`` of one above several."""
    return f"b{span.start + 1}" + (f"-{span.stop}" if len(span) > 1 else "")


@dataclass(frozen=True)
class _Open:
    """A leg of a MERA under construction."""

    leg: str
    size: int
    output: int  # the site whose output has yet to leave


def mera(outputs: Sequence[int], inputs: Sequence[int], bond: int) -> tuple[Core, ...]:
    """A binary MERA with open boundaries, whose bonds all have the dimension ``bond``.

    On each level disentanglers act between neighbouring pairs, (a, b) → (D, D); then each pair goes through
    an isometry, (a, b) → (J, D), that lets one output leave; a site without a partner goes up as it is.  The
    last two legs end in (a, b) → (J, J).  An output that is fixed, where a layer narrows, has J = 1.

    At 12 sites of J = I = 2 these are 19 cores of 3 D⁴ + 16 D³ + 32 D² numbers.  They stand in an order in
    which intermediates grow least: each isometry as soon as its disentanglers were applied.
    """
    level = [_Open(f"i{k + 1}", size, k) for k, size in enumerate(inputs)]
    found: list[Core] = []
    if len(level) == 1:
        return (Core(("j1", "i1"), (outputs[0], inputs[0])),)
    height = 0
    while len(level) > 2:
        height += 1
        for k in range(1, len(level) - 1, 2):
            found.append(_disentangler(level, k, bond, height))
        pairs = []
        for k in range(0, len(level) - 1, 2):
            pairs.append(_isometry(level[k], level[k + 1], outputs, bond, height, found))
        level = [*pairs, *level[2 * len(pairs) :]]
    a, b = level
    legs = (f"j{a.output + 1}", f"j{b.output + 1}", a.leg, b.leg)
    found.append(Core(legs, (outputs[a.output], outputs[b.output], a.size, b.size)))
    return tuple(_in_order(found, inputs))


def _disentangler(level: list[_Open], k: int, bond: int, height: int) -> Core:
    """(D, D, a, b) on legs k and k + 1 of ``level``, which become its upper ones."""
    a, b = level[k : k + 2]
    names = f"d{height}.{k + 1}", f"d{height}.{k + 2}"
    level[k : k + 2] = (_Open(name, bond, one.output) for name, one in zip(names, (a, b), strict=True))
    return Core((*names, a.leg, b.leg), (bond, bond, a.size, b.size))


def _isometry(a: _Open, b: _Open, outputs: Sequence[int], bond: int, height: int, found: list[Core]) -> _Open:
    """(J, D, a, b) is added to ``found``; the leg that goes up."""
    above = _Open(f"u{height}.{b.output + 1}", bond, b.output)
    legs = (f"j{a.output + 1}", above.leg, a.leg, b.leg)
    found.append(Core(legs, (outputs[a.output], bond, a.size, b.size)))
    return above


def _in_order(cores: Sequence[Core], inputs: Sequence[int]) -> Iterator[Core]:
    """Of the cores whose lower two legs are there, always the one after which least is held."""
    waiting, ready = list(cores), {f"i{k + 1}" for k in range(len(inputs))}
    while waiting:
        core = min((one for one in waiting if ready.issuperset(one.legs[2:])), key=_growth)
        waiting.remove(core)
        ready = ready - set(core.legs[2:]) | set(core.legs[:2])
        yield core


def _growth(core: Core) -> float:
    return math.prod(core.shape[:2]) / math.prod(core.shape[2:])
