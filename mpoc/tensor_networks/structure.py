"""The structure of a factorised weight: how it becomes a matrix, and the factors of that matrix's two sides.

A weight of any kind is first read as ``(lead, outputs, inputs)``: ``lead`` is 1 for a linear map, the number
of taps for a convolution kernel (Garipov et al. 2016), the number of experts for a fused expert weight. Then
outputs and inputs are factored, J = (J_1..J_n) and I = (I_1..I_n) (Eq. 4 of Gao et al. 2020), and the factors
are interleaved, (J_1 I_1)(J_2 I_2)…, one pair per site. A lead above 1 is a site of its own in front: J = 1
and I = taps, or J = experts and I = 1.

Two sites with the factors (N_y, 1) and (1, N_x) are a plain low-rank factorisation (form ``svd``). It has no
site for the lead: taps belong to the inputs, experts to the outputs. The form ``svd+mpo`` adds such a
low-rank part to an MPO, whose factors it has.

A convolution can also be read as one linear map at a given input size (kind ``convmap``; Gao et al. 2020),
with H'·W'·C_out outputs, H·W·C_in inputs, channel last, and no lead. ρ still counts the kernel's parameters.

If a side has no good factors (a prime, a vocabulary of 30522), it is padded with zeros. Errors and ρ are
always those of the cropped weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from mpoc.errors import UsageError
from mpoc.tensor_networks.factors import (
    InputOrder,
    choose_map_factors,
    mera_sites,
    order_fits,
    ordered_factors,
    permutation,
)
from mpoc.tensor_networks.forms import FORMS, FormInfo
from mpoc.tensor_networks.geometry import Geometry, factors_by_axis
from mpoc.tensor_networks.topology import Core, Topology

KINDS = ("linear", "conv1d", "conv2d", "conv3d", "convmap", "embedding", "experts")
# Limit on the number of sites, far above that of any weight.
MOST_SITES = 128
# A whole map with more entries is never formed, and its factors must align with height, width and channels.
DENSE_LIMIT = 1 << 26


@dataclass(frozen=True)
class Structure:
    """Plain data that says how a weight splits into cores and how the cores make the weight."""

    kind: str  # one of KINDS
    shape: tuple[int, ...]  # shape of the weight in the checkpoint, e.g. (64, 32, 3, 3)
    transposed: bool  # the checkpoint stores (inputs, outputs), as GPT-2's Conv1D does
    output_factors: tuple[int, ...]  # J, one per site, the lead site included
    input_factors: tuple[int, ...]  # I
    geometry: Geometry | None = None  # a whole map has one, nothing else does
    form: str = "mpo"  # a name in mpoc.tensor_networks.forms.FORMS
    order: InputOrder = ""  # order of the inputs (mpoc.tensor_networks.factors); "": their own

    # Derived from the above.
    lead: int = field(init=False, compare=False, repr=False)  # taps or experts; 1 if they have no own site
    outputs: int = field(init=False, compare=False, repr=False)  # N_y of one tap or expert
    inputs: int = field(init=False, compare=False, repr=False)  # N_x of one tap or expert
    parts: tuple[Structure, ...] = field(default=(), init=False, compare=False, repr=False)  # parts of a sum

    def __post_init__(self) -> None:
        if self.one_matrix:
            lead, (outputs, inputs) = 1, low_rank_sides(self.kind, self.shape, self.transposed)
        else:
            lead, outputs, inputs = lead_outputs_inputs(self.kind, self.shape, self.transposed, self.geometry)
        parts = tuple(map(self.as_form, self.info.parts))
        vars(self).update(lead=lead, outputs=outputs, inputs=inputs, parts=parts)

    @property
    def info(self) -> FormInfo:
        """The entry of the form in ``FORMS``.

        Raises:
            KeyError: there is no such form.
        """
        return FORMS[self.form]

    @property
    def topology(self) -> Topology:
        """How the cores are joined; for a sum, those of its first part."""
        return self.info.topology

    @property
    def one_matrix(self) -> bool:
        """Whether taps belong to the inputs, and experts to the outputs, instead of having their own site."""
        return self.info.one_matrix

    def as_form(self, form: str) -> Structure:
        """The same weight as another form, with the same factors unless that is ``svd``."""
        return self.as_low_rank() if FORMS[form].one_matrix else replace(self, form=form)

    @property
    def permutation(self) -> tuple[int, ...] | None:
        """The input at each column of the factorised matrix; None: the inputs keep their own order.

        Raises:
            ValueError: the order does not fit these inputs.
        """
        return permutation(self.order, self.inputs, self.input_factors)

    @property
    def lead_sites(self) -> int:
        """1 if taps or experts have a site of their own, else 0."""
        return int(self.lead > 1)

    @property
    def padded(self) -> tuple[int, int]:
        """Numbers of outputs and inputs with padding: the products of their factors without the lead site."""
        skip = self.lead_sites
        return math.prod(self.output_factors[skip:]), math.prod(self.input_factors[skip:])

    @property
    def padding(self) -> tuple[int, int]:
        """Numbers of zero rows and columns that are added."""
        outputs, inputs = self.padded
        return outputs - self.outputs, inputs - self.inputs

    @property
    def site_sizes(self) -> tuple[int, ...]:
        """J_k · I_k at each site."""
        return tuple(j * i for j, i in zip(self.output_factors, self.input_factors, strict=True))

    @property
    def num_original(self) -> int:
        """N_ori: the weight's own parameters; for a whole map the kernel's."""
        return math.prod(self.shape)

    @property
    def is_large_map(self) -> bool:
        """Whether this is a whole map too large to be formed."""
        return self.geometry is not None and math.prod(self.site_sizes) > DENSE_LIMIT

    @property
    def axis_factors(self) -> tuple[tuple[tuple[int, int], ...], ...] | None:
        """For a whole map, (J, I) of each axis at each site, channels last; None if they do not align."""
        if self.geometry is None or any(self.padding):
            return None
        outputs = (*self.geometry.output_size, self.shape[0])
        inputs = (*self.geometry.size, self.shape[1] * self.geometry.groups)
        by_output = factors_by_axis(self.output_factors, outputs)
        by_input = factors_by_axis(self.input_factors, inputs)
        if by_output is None or by_input is None:
            return None
        return tuple(tuple(zip(j, i, strict=True)) for j, i in zip(by_output, by_input, strict=True))

    def bonds(self, max_bond: int, rank: int = 0) -> tuple[int, ...]:
        """The bond dimensions as :class:`mpoc.tensor_networks.topology.Topology` orders them.

        Args:
            max_bond: cap on each bond.
            rank: rank r of the low-rank part of a sum, whose bonds (1, r, 1) come last.
        """
        if not self.parts:
            return self.topology.bonds(self.site_sizes, max_bond)
        first, _ = self.parts
        return (*first.bonds(max_bond), 1, rank, 1)

    def split_bonds(self, bonds: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The bonds of each part of a sum; for any other form, all of them as one part."""
        return (bonds[:-3], bonds[-3:]) if self.parts else (bonds,)

    def num_parameters(self, max_bond: int, rank: int = 0) -> int:
        """N_mpo (Eq. 6) at these bonds, with the r·(N_y + N_x) numbers of the low-rank part of a sum."""
        return self.count(self.bonds(max_bond, rank))

    def count(self, bonds: tuple[int, ...]) -> int:
        """Number of entries in the cores at exactly these bonds."""
        return sum(map(math.prod, self.core_shapes(bonds)))

    def as_low_rank(self) -> Structure:
        """The same weight as the form ``svd``.

        Raises:
            ValueError: this is a whole map, which has no low-rank form.
        """
        if self.geometry is not None:
            raise ValueError("a whole map has no low-rank part")
        return low_rank_structure(self.kind, self.shape, self.transposed)

    def cores(self, bonds: tuple[int, ...]) -> tuple[Core, ...]:
        """The cores and their legs; for a sum, those of its parts one after another."""
        if not self.parts:
            return self.topology.cores(self.output_factors, self.input_factors, bonds)
        pairs = zip(self.parts, self.split_bonds(bonds), strict=True)
        return tuple(core for part, own in pairs for core in part.cores(own))

    def core_shapes(self, bonds: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shape of each core as stored, (D_left, J, I, D_right) in a chain."""
        return [core.shape for core in self.cores(bonds)]

    @property
    def full_bond(self) -> int:
        """The smallest cap at which nothing is discarded; for a MERA, a cap at which nothing is discarded."""
        return self.topology.full_bond(self.site_sizes)


def lead_outputs_inputs(
    kind: str, shape: tuple[int, ...], transposed: bool, geometry: Geometry | None = None
) -> tuple[int, int, int]:
    """(lead, outputs, inputs) of a weight of this kind and shape."""
    if geometry is not None:
        outputs, inputs = geometry.positions
        return 1, outputs * shape[0], inputs * shape[1] * geometry.groups
    if kind.startswith("conv"):
        return math.prod(shape[2:]), shape[0], shape[1]
    lead = shape[0] if kind == "experts" else 1
    first, second = shape[-2:]
    return (lead, second, first) if transposed else (lead, first, second)


def low_rank_sides(kind: str, shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    """(outputs, inputs) of the matrix that a low-rank factorisation makes of a weight."""
    lead, outputs, inputs = lead_outputs_inputs(kind, shape, transposed)
    return (lead * outputs, inputs) if kind == "experts" else (outputs, lead * inputs)


def low_rank_factors(sides: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """((N_y, 1), (1, N_x)): output and input factors of the form ``svd``."""
    return (sides[0], 1), (1, sides[1])


def low_rank_structure(kind: str, shape: tuple[int, ...], transposed: bool = False) -> Structure:
    """The structure of the form ``svd``: sites of (N_y, 1) and (1, N_x)."""
    factors = low_rank_factors(low_rank_sides(kind, shape, transposed))
    return Structure(kind, tuple(shape), transposed, *factors, form="svd")


def make_structure(
    kind: str,
    shape: tuple[int, ...],
    transposed: bool = False,
    sites: int | None = None,
    factors: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    geometry: Geometry | None = None,
    form: str = "mpo",
    order: str = "",
) -> Structure:
    """Make the structure of a weight: choose its factors, or check the given ones.

    Args:
        kind: one of ``KINDS``.
        shape: shape of the weight.
        transposed: whether the weight is stored as (inputs, outputs).
        sites: number of sites, not counting the taps or experts site. None: the papers' number, or for a
            MERA :func:`mpoc.tensor_networks.factors.mera_sites`.
        factors: (output factors, input factors) to use, with or without the lead site.
        geometry: geometry of a convolution that becomes a whole map; ``kind`` is then ``convmap``.
        form: any form but ``svd``, which :func:`low_rank_structure` makes; ``mpo`` for a whole map. An MPO
            with the factors of a low-rank factorisation becomes an ``svd``.
        order: order of the inputs of a linear map.

    Raises:
        UsageError: the order does not fit the inputs, the factors do not multiply out to the weight's sides,
            or they do not align with the axes of a whole map that is too large to be formed.
    """
    lead, outputs, inputs = lead_outputs_inputs(kind, shape, transposed, geometry)
    front = (lead, 1) if kind == "experts" else (1, lead)
    if order and (kind != "linear" or not order_fits(order, inputs)):
        raise UsageError(f"--order {order}: is not of a {kind} weight with {inputs} inputs")
    if factors is not None:
        factors = _check_factors(front, outputs, inputs, factors)
    elif geometry is not None:
        factors = choose_map_factors(geometry, (shape[0], shape[1] * geometry.groups), sites)
    else:
        if FORMS[form].topology.has_loops and sites is None:
            sites = mera_sites(outputs, inputs)
        factors = ordered_factors(order, outputs, inputs, sites)
    if lead > 1:
        factors = (front[0], *factors[0]), (front[1], *factors[1])
    if form == "mpo" and geometry is None:
        sides = low_rank_sides(kind, tuple(shape), transposed)
        form = "svd" if factors == low_rank_factors(sides) else form
    structure = Structure(kind, tuple(shape), transposed, *factors, geometry, form, order)
    _check_alignment(structure)
    return structure


def _check_alignment(structure: Structure) -> None:
    """Refuse factors of a large whole map from which its shifts cannot be built."""
    if structure.is_large_map and structure.axis_factors is None:
        raise UsageError(
            f"a map of {structure.outputs} × {structure.inputs} numbers is built from shifts, so each factor "
            f"must divide an axis or span whole ones: outputs {_times(structure.output_factors)}, inputs "
            f"{_times(structure.input_factors)} do not"
        )


def _check_factors(
    front: tuple[int, int],
    outputs: int,
    inputs: int,
    factors: tuple[tuple[int, ...], tuple[int, ...]],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check the given factors, and leave out their lead site if they have one."""
    output_factors, input_factors = factors
    if len(output_factors) > MOST_SITES:
        raise UsageError(f"{len(output_factors)} factors: at most {MOST_SITES} sites")
    if len(output_factors) != len(input_factors):
        raise UsageError(
            f"{len(input_factors)} input factors and {len(output_factors)} output factors: "
            "a site has one of each (1 is allowed)"
        )
    if (output_factors[0], input_factors[0]) == front != (1, 1) and len(output_factors) > 1:
        rest = output_factors[1:], input_factors[1:]
        if (math.prod(rest[0]), math.prod(rest[1])) == (outputs, inputs):
            return rest
    if (math.prod(output_factors), math.prod(input_factors)) == (outputs, inputs):
        return output_factors, input_factors
    raise UsageError(
        f"{_times(input_factors)} = {math.prod(input_factors)} inputs and {_times(output_factors)} = "
        f"{math.prod(output_factors)} outputs, but the layer has {inputs} and {outputs}"
    )


def _times(factors: tuple[int, ...]) -> str:
    return "×".join(map(str, factors))
