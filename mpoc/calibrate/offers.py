"""What each way to store a layer would cost, in error over parameters.

The closed form of ``svd`` at every rank, fitted networks and sums, and the weight as it is.  The error is f
on held-out inputs: on those of the fit, forms with more freedom look better than they are.  The error of a
network, as a share of what ``svd`` leaves at the same size, varies little: it is measured at one size, of an
embedding at two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mpoc.budget import largest_bond
from mpoc.calibrate.evidence import Evidence
from mpoc.calibrate.fit import Storage
from mpoc.calibrate.outputs import Replaced
from mpoc.fit.weighted import Problem, matrix_of
from mpoc.fit.weighted_svd import weighted_svd
from mpoc.forms.layout import from_matrix
from mpoc.plan import LayerPlan
from mpoc.structure import Structure

_STRETCHES = 3
_SIZES = 32  # at which they are offered
_MPO_SHARE = 0.4  # of a sum's parameters


@dataclass(frozen=True)
class Offer:
    """One way to store a layer."""

    storage: Storage | None  # None: dense
    parameters: int
    error: float

    def taken_by(self, plan: LayerPlan) -> LayerPlan:
        """The plan of the layer, with this for its storage."""
        storage = self.storage
        if storage is None:
            return replace(plan, max_bond=None, low_rank=0, reason="worth its parameters as it is")
        found = replace(plan, structure=storage.structure, max_bond=storage.bond, low_rank=storage.low_rank)
        return replace(found, reason="")


class Offers:
    """The ways to store one layer, with f on held-out inputs.

    Args:
        matrix: W as one matrix (N_y, N_x), float64.
        structure: of the layer's MPO, or of its tree.
        evidence: of the dense network's inputs.
        forms: of ``svd``, that of ``structure`` and ``svd+mpo``, which may be chosen.
        others: further structures that may be chosen.
    """

    def __init__(
        self,
        matrix: Tensor,
        structure: Structure,
        evidence: Evidence,
        forms: Sequence[str],
        others: Sequence[Structure] = (),
    ) -> None:
        self._matrix, self._evidence = matrix, evidence
        self._low_rank = structure.as_low_rank()
        svd = weighted_svd(evidence.metric(matrix, evidence.usual_gamma))
        self._left, self._right = svd.left.float(), svd.right.float()
        self._errors = evidence.felt.of_ranks(matrix, svd.left, svd.right).tolist()
        self._problem: Problem | None = None
        self._found: dict[Storage, Tensor] = {}  # float32 matrices fitted so far
        self.every = [Offer(None, structure.num_original, 0.0)]
        if "svd" in forms or structure.form == "svd":
            self.every += self._of_svd()
        if structure.form != "svd":
            for form in (structure.form, "svd+mpo"):
                self.every += self._of_network(structure, form == "svd+mpo") if form in forms else []
        for other in others:
            self.every += self._of_network(other, False)
        self._let_go()

    def error(self, storage: Storage) -> float:
        """f on held-out inputs."""
        if storage.structure.form == "svd":
            return self._errors[min(storage.bond, len(self._errors)) - 1]
        return self._evidence.felt.squared(self._matrix.double(), self.matrix(storage).double())

    def matrix(self, storage: Storage) -> Tensor:
        """Ŵ (N_y, N_x) of this choice in float32, fitted to the dense network's inputs."""
        if storage.structure.form == "svd":
            return self._left[:, : storage.bond] @ self._right[: storage.bond]
        if storage not in self._found:
            if self._problem is None or self._problem.structure != storage.structure:
                metric = self._evidence.metric(self._matrix.double(), self._evidence.mpo_gamma)
                self._problem = Problem(metric, storage.structure)
            fit = self._problem.fit(storage.bond, rank=storage.low_rank, max_stretches=_STRETCHES)
            self._found[storage] = matrix_of(fit.terms).float()
        return self._found[storage]

    def replaced(self, plan: LayerPlan) -> Replaced:
        """The layer as the plan has it, were it compressed alone; on the CPU."""
        found = self.matrix(storage_of(plan))
        shift = self._evidence.shift(self._matrix.double(), found.double())
        self._let_go()
        weight = from_matrix(found[None], self._low_rank).cpu()
        return Replaced(weight, None if shift is None else shift.cpu())

    def _let_go(self) -> None:
        """Of all that can be had again: layers offer at the same time, and are fitted one by one."""
        self._problem, self._matrix, self._evidence = None, self._matrix.float(), replace(self._evidence)

    def _of_svd(self) -> Iterator[Offer]:
        for rank, error in enumerate(self._errors, start=1):
            storage = Storage(self._low_rank, rank)
            if storage.num_parameters < self._low_rank.num_original:
                yield Offer(storage, storage.num_parameters, error)

    def _of_network(self, structure: Structure, is_sum: bool) -> Iterator[Offer]:
        """At sizes in a geometric row, with errors told from those that are measured."""
        original = structure.num_original
        measured = [int(share * original) for share in self._evidence.measured]
        known = dict(self._shares_of_svd(structure, measured, is_sum))
        sizes = [int(original ** (k / _SIZES)) for k in range(1, _SIZES)]
        offered = (largest_within(structure, found, is_sum) for found in (*sizes, *measured, original - 1))
        for storage in dict.fromkeys(offered):
            if storage is not None and known:
                size = storage.num_parameters
                yield Offer(storage, size, _share_at(known, size) * self._svd_error(size))

    def _shares_of_svd(
        self, structure: Structure, sizes: Sequence[int], is_sum: bool
    ) -> Iterator[tuple[int, float]]:
        """At each size that is met: parameters, and the error over that of ``svd`` of as many."""
        for size in sizes:
            storage = largest_within(structure, size, is_sum)
            known = 0.0 if storage is None else self._svd_error(storage.num_parameters)
            if storage is not None and known > 0.0:
                yield storage.num_parameters, self.error(storage) / known

    def _svd_error(self, parameters: int) -> float:
        """That of the rank that takes so many parameters, between two of them in proportion."""
        rank = parameters / self._low_rank.num_parameters(1)
        below = max(1, min(len(self._errors), int(rank)))
        above = min(len(self._errors), below + 1)
        weight = min(1.0, max(0.0, rank - below))
        return (1 - weight) * self._errors[below - 1] + weight * self._errors[above - 1]


def _share_at(known: Mapping[int, float], size: int) -> float:
    """A straight line in log(size) through the smallest and the largest known size; flat below them."""
    small, large = min(known), max(known)
    if size <= small or small == large:
        return known[small]
    line = known[small] + (known[large] - known[small]) * math.log(size / small) / math.log(large / small)
    return max(line, min(known.values()))


def largest_within(structure: Structure, parameters: int, is_sum: bool) -> Storage | None:
    """The largest network, or sum of a matrix of low rank and one, of at most so many parameters."""
    share = _MPO_SHARE if is_sum else 1
    bond = largest_bond(structure, share * parameters / structure.num_original)
    if bond is None or structure.num_parameters(bond) > share * parameters:
        return None
    storage = Storage(structure, bond)
    if not is_sum:
        return storage
    one_rank = Storage(structure, bond, 1).num_parameters - storage.num_parameters
    rank = (parameters - storage.num_parameters) // one_rank
    return replace(storage, low_rank=rank) if rank else None


def storage_of(plan: LayerPlan) -> Storage:
    """How a plan that is not dense stores its layer."""
    assert plan.max_bond is not None
    return Storage(plan.structure, plan.max_bond, plan.low_rank)
