"""How far the outputs of a network move when layers are replaced, measured on held-out inputs.

Errors of layers, weighted by gradients at single positions, leave out that errors at many positions of one
example add up, and more so in front of a mean over positions.  What the network gives in the end does not.

What each way to store a layer would cost, in error over parameters.

The closed form of ``svd`` at every rank, fitted networks and sums, and the weight as it is.  The error is f
on held-out inputs: on those of the fit, forms with more freedom look better than they are.  The error of a
network, as a share of what ``svd`` leaves at the same size, varies little: it is measured at one size, of an
embedding at two.

What the layers of a network offer; several processes share the layers, and each answers for its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mpoc.compression.budget import largest_bond
from mpoc.compression.calibrate.calibrated_fit import Storage
from mpoc.compression.calibrate.calibration_data import output_of_interest
from mpoc.compression.calibrate.layer_inputs import eval_mode
from mpoc.compression.calibrate.objective import Objective
from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.compression.plan import LayerPlan
from mpoc.models.call import to_device
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from mpoc.tensor_networks.fit.metric import weighted_svd
from mpoc.tensor_networks.fit.weighted import Problem, matrix_of
from mpoc.tensor_networks.forms.layout import from_matrix
from mpoc.tensor_networks.forms.sum import Sum
from mpoc.tensor_networks.structure import Structure
from mpoc.train.distillation import kl_of_rows

_STRETCHES = 3
_SIZES = 32  # at which they are offered
_MPO_SHARE = 0.4  # of a sum's parameters

_TELLING = 1e-3  # of a layer's largest error: smaller ones say nothing of how far outputs move
_FAR = 1e12  # in the place of an infinite distance: a network that gives no numbers


@dataclass(frozen=True)
class Replacement:
    """A layer as it would be: its weight in its own shape, and the shift of its outputs' mean."""

    weight: Tensor
    shift: Tensor | None  # (N_y,)


class OutputDistance:
    """Distance of a network with layers replaced from the dense one.

    Args:
        study: of the dense network; its held-out inputs are used.
    """

    def __init__(self, study: CalibrationStatistics) -> None:
        self._study = study
        self._dense = list(self._outputs(study.network))

    @property
    def _state(self) -> dict[str, Tensor]:
        network = self._study.network
        return {**dict(network.named_parameters()), **dict(network.named_buffers())}

    @torch.no_grad()
    def of(self, layers: Mapping[str, Replacement]) -> float:
        """Mean KL divergence in nats where outputs are logits, else half the mean squared distance.

        Args:
            layers: by the weight's name in the checkpoint; all others stay dense.
        """
        state = self._state  # of the dense network itself, which is as it was afterwards
        changed = self._changed(layers, state)
        before = {name: state[name].clone() for name in changed}
        try:
            for name, tensor in changed.items():
                state[name].copy_(tensor)
            return self.of_network(self._study.network)
        finally:
            for name, tensor in before.items():
                state[name].copy_(tensor)

    def _changed(self, layers: Mapping[str, Replacement], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        places, means = self._study.places, self._study.means
        found = {places[name]: layer.weight for name, layer in layers.items()}
        for name, layer in layers.items():
            if layer.shift is not None:
                taken_up = means[name]
                place = places[taken_up.name]
                found[place] = state[place] + taken_up.sign * layer.shift.to(self._study.context.device)
        return found

    @torch.no_grad()
    def of_network(self, network: nn.Module) -> float:
        """Likewise, of a network of the same kind in evaluation mode; inf in the place of NaN."""
        total, rows = 0.0, 0
        for (ours, are_logits), (theirs, _) in zip(self._outputs(network), self._dense, strict=True):
            far = kl_of_rows(ours, theirs) if are_logits else (ours - theirs).square().sum(-1) / 2
            total, rows = total + float(far.sum()), rows + len(ours)
        return math.inf if math.isnan(total) else max(0.0, total) / rows

    @torch.no_grad()
    def _outputs(self, network: nn.Module) -> Iterator[tuple[Tensor, bool]]:
        data, device = self._study.data, self._study.context.device
        with eval_mode(network):
            for batch in data.held_out:
                part = to_device(batch, device)
                yield output_of_interest(data.call(network, part), part, data.pooling)


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer."""

    storage: Storage | None  # None: dense
    parameters: int
    error: float

    def taken_by(self, plan: LayerPlan) -> LayerPlan:
        """The plan of the layer, with this for its storage."""
        storage = self.storage
        if storage is None:
            return plan.left_dense("the budget keeps it dense")
        return replace(plan, structure=storage.structure, goal=storage.truncation)


class Candidates:
    """The ways to store one layer, with f on held-out inputs.

    Args:
        matrix: W as one matrix (N_y, N_x), float64.
        structure: of the layer's MPO, or of its tree.
        evidence: of the dense network's inputs.
        forms: names of those among ``svd``, that of ``structure`` and ``svd+mpo`` that may be chosen.
        others: further structures that may be chosen.
    """

    def __init__(
        self,
        matrix: Tensor,
        structure: Structure,
        evidence: Objective,
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
        self.every = [Candidate(None, structure.num_original, 0.0)]
        if self._low_rank.form in forms or structure.one_matrix:
            self.every += self._of_svd()
        if not structure.one_matrix:
            for form in (structure.form, Sum.name):
                self.every += self._of_network(structure.as_form(form)) if form in forms else []
        for other in others:
            self.every += self._of_network(other)
        self._let_go()

    def error(self, storage: Storage) -> float:
        """f on held-out inputs."""
        if storage.structure.one_matrix:
            return self._errors[min(storage.bond, len(self._errors)) - 1]
        return self._evidence.felt.squared(self._matrix.double(), self.matrix(storage).double())

    def matrix(self, storage: Storage) -> Tensor:
        """Ŵ (N_y, N_x) of this choice in float32, fitted to the dense network's inputs."""
        if storage.structure.one_matrix:
            return self._left[:, : storage.bond] @ self._right[: storage.bond]
        if storage not in self._found:
            if self._problem is None or self._problem.structure != storage.structure:
                metric = self._evidence.metric(self._matrix.double(), self._evidence.mpo_gamma)
                self._problem = Problem(metric, storage.structure)
            fit = self._problem.fit(storage.truncation, max_stretches=_STRETCHES)
            self._found[storage] = matrix_of(fit.form).float()
        return self._found[storage]

    def replaced(self, plan: LayerPlan) -> Replacement:
        """The layer as the plan has it, were it compressed alone; on the CPU."""
        found = self.matrix(storage_of(plan))
        shift = self._evidence.shift(self._matrix.double(), found.double())
        self._let_go()
        weight = from_matrix(found[None], self._low_rank).cpu()
        return Replacement(weight, None if shift is None else shift.cpu())

    def _let_go(self) -> None:
        """Of all that can be had again: layers offer at the same time, and are fitted one by one."""
        self._problem, self._matrix, self._evidence = None, self._matrix.float(), replace(self._evidence)

    def _of_svd(self) -> Iterator[Candidate]:
        for rank, error in enumerate(self._errors, start=1):
            storage = Storage(self._low_rank, rank)
            if storage.num_parameters < self._low_rank.num_original:
                yield Candidate(storage, storage.num_parameters, error)

    def _of_network(self, structure: Structure) -> Iterator[Candidate]:
        """At sizes in a geometric row, with errors told from those that are measured."""
        original = structure.num_original
        measured = [int(share * original) for share in self._evidence.measured]
        known = dict(self._shares_of_svd(structure, measured))
        sizes = [int(original ** (k / _SIZES)) for k in range(1, _SIZES)]
        offered = (largest_within(structure, found) for found in (*sizes, *measured, original - 1))
        for storage in dict.fromkeys(offered):
            if storage is not None and known:
                size = storage.num_parameters
                yield Candidate(storage, size, _share_at(known, size) * self._svd_error(size))

    def _shares_of_svd(self, structure: Structure, sizes: Sequence[int]) -> Iterator[tuple[int, float]]:
        """At each size that is met: parameters, and the error over that of ``svd`` of as many."""
        for size in sizes:
            storage = largest_within(structure, size)
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


def largest_within(structure: Structure, parameters: int) -> Storage | None:
    """The largest network of at most so many parameters; of a sum, a share of them goes to its MPO."""
    share = _MPO_SHARE if structure.parts else 1
    network = structure.parts[0] if structure.parts else structure
    bond = largest_bond(network, share * parameters / structure.num_original)
    if bond is None or network.num_parameters(bond) > share * parameters:
        return None
    if not structure.parts:
        return Storage(structure, bond)
    rank = (parameters - network.num_parameters(bond)) // structure.parts[1].num_parameters(1)
    return Storage(structure, bond, rank) if rank else None


def storage_of(plan: LayerPlan) -> Storage:
    """How a plan that is not dense stores its layer."""
    return Storage(plan.structure, plan.truncation.max_bond, plan.truncation.rank)


class CandidateTable:
    """Of the layers that take part in a budget; the same in all processes.

    Args:
        plans: of these layers.
        offers: of one of them.
        group: the processes.
    """

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        offers: Callable[[LayerPlan], Candidates],
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self._group = group
        self._names = [plan.map.name for plan in plans]
        self._costs = costs_of(plans)
        self._own: dict[str, Candidates] = {}
        self._moved: dict[tuple[str, Storage], float] = {}  # how far outputs move, of one layer alone

        def measure(plan: LayerPlan) -> list[Candidate]:
            self._own[plan.map.name] = offers(plan)
            return self._own[plan.map.name].every

        self.every = dict(zip(self._names, group.map(plans, measure, self._costs), strict=True))

    def scales(self, told_at: Mapping[str, LayerPlan], distance: OutputDistance) -> dict[str, float]:
        """By weight: from errors to those that the outputs feel, told at a plan of each layer.

        Where that is dense, or errs so little that rounding drowns it, at the offer that errs most.
        """

        def scale(name: str) -> float:
            return self._scale(self._own[name], told_at[name], distance)

        return dict(zip(self._names, self._group.map(self._names, scale, self._costs), strict=True))

    def distance(self, plans: Iterable[LayerPlan], distance: OutputDistance) -> float:
        """Of the network's outputs, where the layers that take part are as these plans have them."""
        planned = {plan.map.name: plan for plan in plans if not plan.is_dense}

        def replace(name: str) -> Replacement | None:
            return self._own[name].replaced(planned[name]) if name in planned else None

        found = list(self._group.map_to_main(self._names, replace, self._costs))
        layers = {name: one for name, one in zip(self._names, found, strict=True) if one is not None}
        return self._group.on_main(lambda: distance.of(layers))

    def _scale(self, offers: Candidates, plan: LayerPlan, distance: OutputDistance) -> float:
        smaller = [offer for offer in offers.every if offer.storage is not None]
        most = max(smaller, key=lambda offer: offer.error, default=None)
        if most is None:
            return 1.0
        if plan.is_dense or offers.error(storage_of(plan)) < _TELLING * most.error:
            plan = most.taken_by(plan)
        error = offers.error(storage_of(plan))
        if error == 0:
            return 1.0
        told = plan.map.name, storage_of(plan)
        if told not in self._moved:
            self._moved[told] = distance.of({plan.map.name: offers.replaced(plan)})
        return min(_FAR, self._moved[told]) / error


def costs_of(plans: Sequence[LayerPlan]) -> list[float]:
    """By which processes share layers; the same for every budget."""
    return [float(plan.structure.num_original) for plan in plans]
