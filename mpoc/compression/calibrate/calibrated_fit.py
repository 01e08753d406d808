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
from mpoc.tensor_networks.fit.tt_svd import tt_svd
from mpoc.tensor_networks.fit.weighted import Problem, matrix_of
from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.forms.stored import form_of
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
        found["plain mpo"] = matrix_of([tt_svd(weight, chain, bond, seed=seed).form])
    return {name: evidence.felt.relative(matrix, other) for name, other in found.items()}


@dataclass(frozen=True)
class Storage:
    """A way to store a layer."""

    structure: Structure
    bond: int  # cap on every bond
    low_rank: int = 0  # of the matrix that is added to an MPO; 0: none

    @property
    def num_parameters(self) -> int:
        """Of the cores, at these bonds."""
        return self.structure.num_parameters(self.bond, self.low_rank)


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

    terms: tuple[Form, ...]  # the form, and what is added to it
    gamma: float
    judged: Judgement
    same_size: dict[str, float]  # felt errors, of "this" and of other methods

    @property
    def cores(self) -> list[Tensor]:
        """Of all terms."""
        return [core for term in self.terms for core in term.cores]


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
        for gamma in (evidence.gammas if storage.structure.form == "svd" else (evidence.mpo_gamma,))
    ]

    def attempt(trial: tuple[Storage, float]) -> tuple[float, tuple[Form, ...]]:
        storage, gamma = trial
        terms = _rounded(_fit(evidence.metric(matrix, gamma), storage, STRETCHES, seed), dtype)
        return evidence.felt.squared(matrix, matrix_of(terms)), on_device(terms, "cpu")

    tried = group.map(trials, attempt, [_costs(storage) for storage, _ in trials])
    best = min(range(len(trials)), key=lambda k: tried[k][0])
    terms = on_device(tried[best][1], weight.device)
    size = sum(core.numel() for term in terms for core in term.cores)
    (last, judged), others = group.parallel(
        lambda: _finished(weight, terms, None if apart else trials[best], evidence, dtype, seed),
        lambda: baselines(weight, first, size, evidence, seed),
    )
    return CalibratedFit(last, trials[best][1], judged, {"this": judged.felt_error} | others)


def _finished(
    weight: Tensor,
    terms: tuple[Form, ...],
    trial: tuple[Storage, float] | None,
    evidence: Objective,
    dtype: torch.dtype,
    seed: int,
) -> tuple[tuple[Form, ...], Judgement]:
    """The chosen trial, fitted on all inputs unless it is None; on the CPU."""
    judged = judge(weight, terms, evidence)
    if trial is not None:
        storage, gamma = trial
        everything = evidence.together()
        matrix = one_matrix(weight, storage.structure.kind, storage.structure.transposed)
        terms = _rounded(_fit(everything.metric(matrix, gamma), storage, LAST, seed, terms), dtype)
        found = judge(weight, terms, everything)
        judged = replace(found, held_out_error=judged.held_out_error, felt_error=judged.felt_error)
    return on_device(terms, "cpu"), judged.on_cpu()


def _costs(storage: Storage) -> float:
    """Of a fit, beside a closed form."""
    return 1.0 if storage.structure.form == "svd" else 4.0


def judge(weight: Tensor, terms: Sequence[Form], evidence: Objective) -> Judgement:
    """What cores do, however they were found."""
    first = terms[0].structure
    matrix = one_matrix(weight, first.kind, first.transposed)
    found = matrix_of(terms)
    norm = float(torch.linalg.vector_norm(matrix))
    return Judgement(
        evidence.shift(matrix, found),
        float(torch.linalg.vector_norm(matrix - found)) / norm if norm else 0.0,
        evidence.seen.relative(matrix, found),
        evidence.unseen.relative(matrix, found),
        evidence.felt.relative(matrix, found),
    )


def _fit(
    metric: Metric, storage: Storage, stretches: int, seed: int, start: tuple[Form, ...] | None = None
) -> tuple[Form, ...]:
    """A closed form needs no start and no stretches."""
    structure = storage.structure
    if structure.form == "svd":
        left, right = weighted_svd(metric).factors(storage.bond)
        return (MPO([left[None, :, None, :], right[:, None, :, None]], structure),)
    problem, rank = Problem(metric, structure), storage.low_rank
    return problem.fit(storage.bond, rank=rank, start=start, max_stretches=stretches, seed=seed).terms


def _rounded(terms: tuple[Form, ...], dtype: torch.dtype) -> tuple[Form, ...]:
    return tuple(
        form_of([core.to(dtype).contiguous() for core in term.cores], term.structure) for term in terms
    )


def on_device(terms: tuple[Form, ...], device: torch.device | str) -> tuple[Form, ...]:
    """With their cores there."""
    return tuple(form_of([core.to(device) for core in term.cores], term.structure) for term in terms)
