"""In what order layers are fitted, which of them together, and how long that takes beside the others."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from itertools import groupby

from mpoc.calibrate.blocks import Place
from mpoc.plan import LayerPlan
from mpoc.structure import lead_outputs_inputs

# Time of a fit by the weight alone, in the unit of a calibrated one's.
_ALONE = 0.025

Step = tuple[Place | None, list[list[str]]]


class Steps:
    """The steps of a calibrated fit; layers go by their names.

    Args:
        groups: of layers whose inputs are known, those of one input together, in the order of the network.
        place: the block that a group is refined with; None: it is fitted by itself.
    """

    def __init__(
        self, groups: Sequence[Sequence[str]], place: Callable[[Sequence[str]], Place | None]
    ) -> None:
        self._groups, self._place = groups, place
        self.seen = {name for group in groups for name in group}  # fitted to their inputs

    def of(self, names: Container[str]) -> Iterator[Step]:
        """Blocks, and groups of layers, with those of these names; a block is refined as a whole."""
        present = [[name for name in group if name in names] for group in self._groups]
        for place, part in groupby(filter(None, present), self._place):
            groups = list(part)
            yield from [(place, groups)] if place is not None else [(None, [group]) for group in groups]

    def units(self, plans: Sequence[LayerPlan]) -> list[list[str]]:
        """Layers that are fitted together, in order: first those, one by one, whose inputs are not known."""
        names = [plan.map.name for plan in plans]
        alone = [[name] for name in names if name not in self.seen]
        return alone + [[name for group in groups for name in group] for _, groups in self.of(names)]

    def costs(self, plans: Sequence[LayerPlan]) -> dict[str, float]:
        """Of the fits, in proportion to their time; the first layer of a unit has that of all."""
        known = {p.map.name: _cost(p) if p.map.name in self.seen else p.cost * _ALONE for p in plans}
        found = dict.fromkeys(known, 0.0)
        for unit in self.units(plans):
            found[unit[0]] = sum(known[name] for name in unit)
        return found


def _cost(plan: LayerPlan) -> float:
    """Of a calibrated fit: applications of the metric, and eigendecompositions of moments of the inputs."""
    if plan.max_bond is None:
        return 0.0
    one = plan.structure
    _, outputs, inputs = lead_outputs_inputs(one.kind, one.shape, one.transposed)
    sides = inputs if one.kind == "embedding" else outputs + inputs  # a table's rows do not depend on others
    return outputs * inputs * sides + inputs**3 / 4
