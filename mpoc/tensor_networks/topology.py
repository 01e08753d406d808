"""How the cores of a form are joined, by the names of their legs. Plain data, without torch.

Site k has an output leg j_k and an input leg i_k.  Every other leg is a bond between two cores.

    chain   an MPO: core k has the legs (b_{k-1}, j_k, i_k, b_k)
    tree    a binary tree over the sites (Hackbusch & Kühn 2009): a core for each site, and cores that join
            three bonds
    MERA    a binary MERA (Hallam et al. 2017, Fig. 1): inputs enter at the bottom, outputs leave on the way
            up

Cores are listed in an order in which they can be applied to an input: every input of a core is made by the
cores before it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

Factors = tuple[int, ...]
Place = tuple[float, float]  # in a drawing: x to the right, y downwards, in steps of a grid

# Distance between the sites of a tree, whose output and input legs hang side by side.
_TREE_STEP = 1.3


@dataclass(frozen=True)
class Core:
    """A tensor of a network: the names and the dimensions of its axes."""

    legs: tuple[str, ...]  # "j3" is an output, "i3" an input, any other a bond
    shape: tuple[int, ...]


def is_open(leg: str) -> bool:
    """Whether a leg is an output or an input, and not a bond."""
    return leg[0] in "ij"


class Topology(ABC):
    """A way to join the cores of any number of sites."""

    has_loops: ClassVar[bool] = False  # True: no bond cuts the network in two, so there are no Schmidt values
    in_line: ClassVar[bool] = False  # True: the bonds follow each other from the first site to the last
    outputs_up: ClassVar[bool] = True  # whether output legs point up in a drawing
    bond_name: ClassVar[str] = "bond"
    bond_place: ClassVar[str] = "bond"  # title of the axis of bonds in a chart

    @abstractmethod
    def cores(self, outputs: Factors, inputs: Factors, bonds: tuple[int, ...]) -> tuple[Core, ...]:
        """The cores of a network.

        Args:
            outputs: J, one per site.
            inputs: I, one per site.
            bonds: as :meth:`bonds` returns them.
        """

    @abstractmethod
    def bonds(self, sizes: tuple[int, ...], max_bond: int) -> tuple[int, ...]:
        """The bond dimensions for sites of these sizes J_k · I_k, at most ``max_bond`` each."""

    @abstractmethod
    def num_bonds(self, sites: int) -> int:
        """The length of the tuple that :meth:`bonds` returns."""

    @abstractmethod
    def places(self, cores: Sequence[Core]) -> list[Place]:
        """The position of each core in a drawing."""

    def full_bond(self, sizes: tuple[int, ...]) -> int:
        """The smallest cap at which nothing is discarded."""
        return max(self.bonds(sizes, math.prod(sizes)), default=1)

    def inner_bonds(self, bonds: tuple[int, ...]) -> tuple[int, ...]:
        """The bonds that join two cores."""
        return bonds

    def fits(self, bonds: tuple[int, ...], sites: int) -> bool:
        """Whether these can be the bonds of this number of sites."""
        return len(bonds) == self.num_bonds(sites)

    def bond_titles(self, sites: int) -> list[str]:
        """A title for each bond that has Schmidt values."""
        return []


class ChainTopology(Topology):
    """The chain of an MPO.  Its bonds are (D_0..D_n), with D_0 = D_n = 1."""

    in_line = True
    bond_place = "bond along the chain"

    def cores(self, outputs: Factors, inputs: Factors, bonds: tuple[int, ...]) -> tuple[Core, ...]:
        """(D_{k-1}, J_k, I_k, D_k) for every site k."""
        return _chain(outputs, inputs, bonds)

    def bonds(self, sizes: tuple[int, ...], max_bond: int) -> tuple[int, ...]:
        """Each is capped at both sizes of the cut that it makes."""
        total = math.prod(sizes)
        left, bonds = 1, [1]
        for size in sizes[:-1]:
            left *= size
            bonds.append(min(max_bond, left, total // left))
        return (*bonds, 1)

    def num_bonds(self, sites: int) -> int:
        """With the two outer bonds."""
        return sites + 1

    def inner_bonds(self, bonds: tuple[int, ...]) -> tuple[int, ...]:
        """Without D_0 and D_n."""
        return bonds[1:-1]

    def fits(self, bonds: tuple[int, ...], sites: int) -> bool:
        """The outer bonds are 1."""
        return super().fits(bonds, sites) and (bonds[0], bonds[-1]) == (1, 1)

    def bond_titles(self, sites: int) -> list[str]:
        """``bond 1``, ``bond 2``, …"""
        return [f"bond {k}" for k in range(1, sites)]

    def places(self, cores: Sequence[Core]) -> list[Place]:
        """All cores in a row."""
        return [(float(k), 0.0) for k in range(len(cores))]


class TreeTopology(Topology):
    """A binary tree over the sites.  It has one bond for every branch, as :func:`branches` orders them."""

    outputs_up = False
    bond_name = "branch"
    bond_place = "branch of the tree, above the core of its number"

    def cores(self, outputs: Factors, inputs: Factors, bonds: tuple[int, ...]) -> tuple[Core, ...]:
        """(J, I, D) for every site, and (D_left, D_right, D_above) for every pair of branches."""
        return _tree(outputs, inputs, bonds)

    def bonds(self, sizes: tuple[int, ...], max_bond: int) -> tuple[int, ...]:
        """Each is capped at both sizes of the cut that it makes."""
        total = math.prod(sizes)
        spans = (math.prod(sizes[span.start : span.stop]) for span in branches(len(sizes)))
        return tuple(min(max_bond, inside, total // inside) for inside in spans)

    def num_bonds(self, sites: int) -> int:
        """The number of branches."""
        return len(branches(sites))

    def bond_titles(self, sites: int) -> list[str]:
        """``branch 3: sites 1–2``: a branch has the number of the core at its lower end."""
        return [f"branch {k}: {_sites(span)}" for k, span in enumerate(branches(sites), start=1)]

    def places(self, cores: Sequence[Core]) -> list[Place]:
        """Sites in the lowest row, every other core above the middle of its two branches."""
        bond_places: dict[str, Place] = {}
        places: list[Place] = []
        for core in cores:
            below = [bond_places[leg] for leg in core.legs[:2] if not is_open(leg)]
            if below:
                place = sum(x for x, _ in below) / 2, min(y for _, y in below) - 1
            else:
                place = _TREE_STEP * int(core.legs[0][1:]), 0.0
            bond_places[core.legs[-1]] = place
            places.append(place)
        return places


class MeraTopology(Topology):
    """A binary MERA.  Its only entry in ``bonds`` is D, the dimension of every bond."""

    has_loops = True

    def cores(self, outputs: Factors, inputs: Factors, bonds: tuple[int, ...]) -> tuple[Core, ...]:
        """(two upper legs, two lower legs) each: see :func:`mera`."""
        return mera(outputs, inputs, bonds[0])

    def bonds(self, sizes: tuple[int, ...], max_bond: int) -> tuple[int, ...]:
        """(D,)."""
        return (max_bond,)

    def num_bonds(self, sites: int) -> int:
        """Always 1."""
        return 1

    def full_bond(self, sizes: tuple[int, ...]) -> int:
        """A cap at which nothing is discarded; not the smallest one."""
        cuts = (math.prod(sizes[:k]) for k in range(len(sizes) + 1))
        return max(min(left, math.prod(sizes) // left) for left in cuts)

    def places(self, cores: Sequence[Core]) -> list[Place]:
        """Inputs at the bottom, every core between its two lower legs and above the cores they come from."""
        bond_places: dict[str, Place] = {}
        places: list[Place] = []
        for core in cores:
            upper, lower = core.legs[: len(core.legs) // 2], core.legs[len(core.legs) // 2 :]
            below = [bond_places.get(leg, (float(leg[1:]) if is_open(leg) else 0.0, 1.0)) for leg in lower]
            place = sum(x for x, _ in below) / len(below), min(y for _, y in below) - 1
            kept = [leg for leg in upper if not is_open(leg)]
            # A disentangler's legs leave above where they entered, an isometry's from its middle.
            xs = [x for x, _ in below] if len(kept) == len(below) else [place[0]] * len(kept)
            bond_places |= {leg: (x, place[1]) for leg, x in zip(kept, xs, strict=True)}
            places.append(place)
        return places


CHAIN, TREE, MERA = ChainTopology(), TreeTopology(), MeraTopology()


@cache
def _chain(outputs: Factors, inputs: Factors, bonds: tuple[int, ...]) -> tuple[Core, ...]:
    return tuple(
        Core((f"b{k}", f"j{k + 1}", f"i{k + 1}", f"b{k + 1}"), (bonds[k], j, i, bonds[k + 1]))
        for k, (j, i) in enumerate(zip(outputs, inputs, strict=True))
    )


@cache
def branches(sites: int) -> tuple[range, ...]:
    """The sites (from 0) below each branch of a tree: children before their parents, left before right.

    A run of sites is halved repeatedly, with the larger half on the left. The two halves of the whole share
    one branch, which is listed as the left half.
    """

    def below(span: range) -> Iterator[range]:
        if len(span) > 1:
            for half in halves(span):
                yield from below(half)
        yield span

    return tuple(span for span in below(range(sites)) if span not in (range(sites), _right(sites)))


def halves(span: range) -> tuple[range, range]:
    """A run of sites cut in two, the left half larger by one if their number is odd."""
    middle = span.start + (len(span) + 1) // 2
    return range(span.start, middle), range(middle, span.stop)


def _right(sites: int) -> range:
    return halves(range(sites))[1]


@cache
def _tree(outputs: Factors, inputs: Factors, bonds: tuple[int, ...]) -> tuple[Core, ...]:
    sites = len(outputs)
    if sites == 1:
        return (Core(("j1", "i1"), (outputs[0], inputs[0])),)
    spans = branches(sites)
    sizes = dict(zip(spans, bonds, strict=True))
    names = {span: _name(span) for span in spans}
    left, right = halves(range(sites))
    sizes[right], names[right] = sizes[left], names[left]
    return tuple(_tree_core(span, outputs, inputs, sizes, names) for span in (*spans, right))


def _tree_core(
    span: range,
    outputs: Factors,
    inputs: Factors,
    sizes: dict[range, int],
    names: dict[range, str],
) -> Core:
    if len(span) == 1:
        k = span.start
        return Core((f"j{k + 1}", f"i{k + 1}", names[span]), (outputs[k], inputs[k], sizes[span]))
    around = (*halves(span), span)
    return Core(tuple(names[part] for part in around), tuple(sizes[part] for part in around))


def _name(span: range) -> str:
    """``b3`` for the branch of a site, ``b3-6`` for one above several sites."""
    return f"b{span.start + 1}" + (f"-{span.stop}" if len(span) > 1 else "")


def _sites(span: range) -> str:
    return f"site {span.stop}" if len(span) == 1 else f"sites {span.start + 1}–{span.stop}"


@dataclass(frozen=True)
class _OpenLeg:
    """A leg of a MERA under construction."""

    leg: str
    size: int
    output: int  # the site whose output leaves later


@cache
def mera(outputs: Factors, inputs: Factors, bond: int) -> tuple[Core, ...]:
    """A binary MERA with open boundaries, all of whose bonds have the dimension ``bond``.

    On each level, disentanglers act between neighbouring pairs, (a, b) → (D, D). Each pair then goes through
    an isometry, (a, b) → (J, D), at which one output leaves. A site without a partner moves up unchanged. The
    last two legs end in a core (a, b) → (J, J). If the layer has fewer outputs than inputs, some J are 1.

    For 12 sites of J = I = 2 there are 19 cores with 3 D⁴ + 16 D³ + 32 D² numbers. They are ordered such that
    intermediates grow least: each isometry follows its disentanglers as soon as possible.
    """
    if len(inputs) == 1:
        return (Core(("j1", "i1"), (outputs[0], inputs[0])),)
    level = [_OpenLeg(f"i{k + 1}", size, k) for k, size in enumerate(inputs)]
    cores: list[Core] = []
    height = 0
    while len(level) > 2:
        height += 1
        for k in range(1, len(level) - 1, 2):
            cores.append(_disentangler(level, k, bond, height))
        pairs = []
        for k in range(0, len(level) - 1, 2):
            core, above = _isometry(level[k], level[k + 1], outputs, bond, height)
            cores.append(core)
            pairs.append(above)
        level = [*pairs, *level[2 * len(pairs) :]]
    a, b = level
    legs = (f"j{a.output + 1}", f"j{b.output + 1}", a.leg, b.leg)
    cores.append(Core(legs, (outputs[a.output], outputs[b.output], a.size, b.size)))
    return tuple(_in_order(cores, inputs))


def _disentangler(level: list[_OpenLeg], k: int, bond: int, height: int) -> Core:
    """(D, D, a, b) on legs k and k + 1 of ``level``, which are replaced by its upper legs."""
    a, b = level[k : k + 2]
    names = f"d{height}.{k + 1}", f"d{height}.{k + 2}"
    level[k : k + 2] = (_OpenLeg(name, bond, old.output) for name, old in zip(names, (a, b), strict=True))
    return Core((*names, a.leg, b.leg), (bond, bond, a.size, b.size))


def _isometry(a: _OpenLeg, b: _OpenLeg, outputs: Factors, bond: int, height: int) -> tuple[Core, _OpenLeg]:
    """The core (J, D, a, b), and the leg that goes up from it."""
    above = _OpenLeg(f"u{height}.{b.output + 1}", bond, b.output)
    legs = (f"j{a.output + 1}", above.leg, a.leg, b.leg)
    return Core(legs, (outputs[a.output], bond, a.size, b.size)), above


def _in_order(cores: Sequence[Core], inputs: Factors) -> Iterator[Core]:
    """Order the cores; the next one is that after which least is held, among those whose lower legs exist."""
    waiting, ready = list(cores), {f"i{k + 1}" for k in range(len(inputs))}
    while waiting:
        core = min((core for core in waiting if ready.issuperset(core.legs[2:])), key=_growth)
        waiting.remove(core)
        ready = ready - set(core.legs[2:]) | set(core.legs[:2])
        yield core


def _growth(core: Core) -> float:
    return math.prod(core.shape[:2]) / math.prod(core.shape[2:])
