"""What other methods would have made of a layer at the same size, on the same held-out inputs.

Errors are weighed by how much the network's output feels them, as the fit weighs them.

One layer fitted to what it does: its cores, the shift that its bias takes up, and errors of its outputs.

How far moments are trusted, γ, is chosen on held-out inputs; the fit is then made on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpoc.compression.budget import largest_bond
from mpoc.compression.calibrate.objective import Objective, one_matrix
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from mpoc.tensor_networks.fit.metric import Metric, weighted_svd
from mpoc.tensor_networks.fit.truncation import Target, Truncation
from mpoc.tensor_networks.fit.tt_svd import tt_svd
from mpoc.tensor_networks.fit.weighted import Problem, matrix_of
from mpoc.tensor_networks.forms.form import Form, form_of
from mpoc.tensor_networks.structure import Structure, make_structure

STRETCHES, LAST = 6, 1  # of a descent; then on all inputs


def baselines(
    weight: Tensor, structure: Structure, parameters: int, evidence: Objective, seed: int = 0
) -> dict[str, float]:
    """Errors of the same layer by other methods, all before it as it is: ``evidence.felt``, relative.

    ``plain svd`` and ``plain mpo`` (TT-SVD at the default factors) are nearest to the weight,
    ``whitened svd`` to what the layer does in the dense network (SVD-LLM, Wang et al. 2024).

    Args:
        weight: of shape ``structure.shape``.
        structure: of a linear map, of a convolution without groups or of an embedding.
        parameters: that are stored; a method that cannot be so small is left out.
        evidence: as of the layer's own fit.
        seed: of the range finder in TT-SVD.
    """
    kind, shape, transposed = structure.kind, structure.shape, structure.transposed
    matrix = one_matrix(weight, kind, transposed)
    found: dict[str, Tensor] = {}
    rank = parameters // structure.as_low_rank().num_parameters(1)
    if rank:
        left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
        found["plain svd"] = (left[:, :rank] * values[:rank] @ right[:rank]).double()
        white = weighted_svd(evidence.whitened(matrix))
        found["whitened svd"] = white.left[:, :rank] @ white.right[:rank]
    chain = make_structure(kind, shape, transposed)
    bond = largest_bond(chain, parameters / chain.num_original)
    if bond is not None and chain.num_parameters(bond) <= parameters:
        found["plain mpo"] = matrix_of(tt_svd(weight, chain, Truncation(bond), Target(seed=seed)).form)
    return {name: evidence.felt.relative(matrix, other) for name, other in found.items()}


@dataclass(frozen=True)
class Storage:
    """A way to store a layer."""

    structure: Structure
    bond: int  # cap on every bond
    rank: int = 0  # of the low-rank part of a sum

    @property
    def truncation(self) -> Truncation:
        """As a fit takes it."""
        return Truncation(self.bond, rank=self.rank)

    @property
    def num_parameters(self) -> int:
        """Of the cores, at these bonds."""
        return self.structure.num_parameters(self.bond, self.rank)


@dataclass(frozen=True)
class Judgement:
    """What the cores of a layer do, in the dtype they are stored in."""

    shift: Tensor | None  # (N_y,) float64 to be added to the layer's outputs: W μ − Ŵ μ̃; None: nothing can be
    relative_error: float  # ‖W − Ŵ‖_F / ‖W‖_F
    output_error: float  # of the outputs about their mean, on the inputs of the fit
    held_out_error: float  # on held-out inputs, of the same fit without them
    felt_error: float  # likewise, as the network's output feels it

    def on_cpu(self) -> Judgement:
        """With its tensor there."""
        return self if self.shift is None else replace(self, shift=self.shift.cpu())


@dataclass(frozen=True)
class CalibratedFit:
    """A layer's cores in the stored dtype, on the CPU, with what they do."""

    form: Form
    gamma: float
    judged: Judgement
    same_size: dict[str, float]  # felt errors, of "this" and of other methods


def fit_calibrated(
    weight: Tensor,
    storages: Sequence[Storage],
    evidence: Objective,
    dtype: torch.dtype,
    seed: int,
    apart: bool = False,
    group: ProcessGroup = SINGLE_PROCESS,
) -> CalibratedFit:
    """Cores that make small errors of the layer's outputs.

    Args:
        weight: of shape ``structure.shape``.
        storages: of a linear map, a convolution without groups or an embedding; what does best on held-out
            inputs is kept.
        evidence: of this layer.
        dtype: of the stored cores.
        seed: of the sweeps' start.
        apart: keep held-out inputs out of the fit, for what comes after it.
        group: the processes that share the trials, with the same arguments.
    """
    first = storages[0].structure
    matrix = one_matrix(weight, first.kind, first.transposed)
    trials = [
        (storage, gamma)
        for storage in storages
        for gamma in (evidence.gammas if storage.structure.one_matrix else (evidence.mpo_gamma,))
    ]

    def attempt(trial: tuple[Storage, float]) -> tuple[float, Form]:
        storage, gamma = trial
        form = _rounded(_fit(evidence.metric(matrix, gamma), storage, STRETCHES, seed), dtype)
        return evidence.felt.squared(matrix, matrix_of(form)), on_device(form, "cpu")

    tried = group.map(trials, attempt, [_costs(storage) for storage, _ in trials])
    best = min(range(len(trials)), key=lambda k: tried[k][0])
    form = on_device(tried[best][1], weight.device)
    (last, judged), others = group.parallel(
        lambda: _finished(weight, form, None if apart else trials[best], evidence, dtype, seed),
        lambda: baselines(weight, first, form.num_parameters, evidence, seed),
    )
    return CalibratedFit(last, trials[best][1], judged, {"this": judged.felt_error} | others)


def _finished(
    weight: Tensor,
    form: Form,
    trial: tuple[Storage, float] | None,
    evidence: Objective,
    dtype: torch.dtype,
    seed: int,
) -> tuple[Form, Judgement]:
    """The chosen trial, fitted on all inputs unless it is None; on the CPU."""
    judged = judge(weight, form, evidence)
    if trial is not None:
        storage, gamma = trial
        everything = evidence.together()
        matrix = one_matrix(weight, storage.structure.kind, storage.structure.transposed)
        form = _rounded(_fit(everything.metric(matrix, gamma), storage, LAST, seed, form), dtype)
        found = judge(weight, form, everything)
        judged = replace(found, held_out_error=judged.held_out_error, felt_error=judged.felt_error)
    return on_device(form, "cpu"), judged.on_cpu()


def _costs(storage: Storage) -> float:
    """Of a fit, beside a closed form."""
    return 1.0 if storage.structure.one_matrix else 4.0


def judge(weight: Tensor, form: Form, evidence: Objective) -> Judgement:
    """What cores do, however they were found."""
    matrix = one_matrix(weight, form.structure.kind, form.structure.transposed)
    found = matrix_of(form)
    norm = float(torch.linalg.vector_norm(matrix))
    return Judgement(
        evidence.shift(matrix, found),
        float(torch.linalg.vector_norm(matrix - found)) / norm if norm else 0.0,
        evidence.seen.relative(matrix, found),
        evidence.unseen.relative(matrix, found),
        evidence.felt.relative(matrix, found),
    )


def _fit(metric: Metric, storage: Storage, stretches: int, seed: int, start: Form | None = None) -> Form:
    """The closed form of a single matrix needs no start and no stretches."""
    structure = storage.structure
    if structure.one_matrix:
        left, right = weighted_svd(metric).factors(storage.bond)
        return form_of([left[None, :, None, :], right[:, None, :, None]], structure)
    target = Target(torch.float64, seed)
    problem = Problem(metric, structure)
    return problem.fit(storage.truncation, start=start, max_stretches=stretches, target=target).form


def _rounded(form: Form, dtype: torch.dtype) -> Form:
    return form.with_cores([core.to(dtype).contiguous() for core in form.cores])


def on_device(form: Form, device: torch.device | str) -> Form:
    """With its cores there."""
    return form.with_cores([core.to(device) for core in form.cores])
