"""Fit one layer to what it does: its cores, the correction of its bias, and the errors of its outputs.

γ, the share of the moments that gives way to their diagonal, is chosen on held-out inputs; the fit is then
made on all of them.  Beside it stand baselines: the errors of other methods at the same size, on the same
held-out inputs and in the same norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpoc.compression.budget import largest_bond
from mpoc.compression.calibrate.objective import Objective, one_matrix
from mpoc.io.manifest import LayerRecord
from mpoc.runtime.device import freed_at_once
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from mpoc.runtime.formatting import rounded
from mpoc.tensor_networks.fit.truncation import Target, Truncation, truncate
from mpoc.tensor_networks.fit.tt_svd import tt_svd
from mpoc.tensor_networks.fit.weighted import Problem, matrix_of
from mpoc.tensor_networks.fit.whitening import weighted_svd
from mpoc.tensor_networks.forms.form import Form, form_of
from mpoc.tensor_networks.structure import Structure, make_structure

# Stretches of a descent: to choose γ, then on all inputs.  Of a sum only its matrix is fitted again on those.
STRETCHES, STRETCHES_OF_SUMS, LAST = 4, 1, 1
_WIDE = 2048  # inputs from which on a fit's temporary matrices count


def baselines(
    weight: Tensor, matrix: Tensor, form: Form, objective: Objective, seed: int = 0
) -> dict[str, float]:
    """Relative output-weighted errors of other methods on the same layer, at the same size.

    ``plain svd`` and ``plain mpo`` (TT-SVD at the default factors) are nearest to the weight,
    ``whitened svd`` to what the layer does in the dense network (SVD-LLM, Wang et al. 2024).

    Args:
        weight: of a linear map, of a convolution without groups or of an embedding.
        matrix: the same as one matrix (N_y, N_x), float64.
        form: fitted to it; a method that cannot be so small is left out.
        objective: that of the layer's own fit.
        seed: of the range finder in TT-SVD.
    """
    structure, parameters = form.structure, form.num_parameters
    approximations: dict[str, Tensor] = {}
    rank = parameters // structure.as_low_rank().num_parameters(1)
    if rank:
        plain = truncate(matrix.float(), rank, generator=torch.Generator().manual_seed(seed))
        approximations["plain svd"] = (plain.left @ plain.right).double()
        white = weighted_svd(objective.whitened(matrix))
        approximations["whitened svd"] = white.left[:, :rank] @ white.right[:rank]
    chain = make_structure(structure.kind, structure.shape, structure.transposed)
    bond = largest_bond(chain, parameters / chain.num_original)
    if bond is not None and chain.num_parameters(bond) <= parameters:
        approximations["plain mpo"] = matrix_of(
            tt_svd(weight, chain, Truncation(bond), Target(seed=seed)).form
        )
    error = objective.output_weighted_error
    return {name: error.relative(matrix, other) for name, other in approximations.items()}


@dataclass(frozen=True)
class Storage:
    """A way to store a layer."""

    structure: Structure
    bond: int  # cap on every bond
    rank: int = 0  # of the low-rank part of a sum

    @property
    def truncation(self) -> Truncation:
        """What a fit truncates to."""
        return Truncation(self.bond, rank=self.rank)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the cores at these bonds."""
        return self.structure.num_parameters(self.bond, self.rank)


@dataclass(frozen=True)
class Judgement:
    """The errors of a layer's cores in the dtype that they are stored in, and the correction of the mean."""

    shift: (
        Tensor | None
    )  # (N_y,) float64 W μ − Ŵ μ̃, to be added to the outputs; None: nothing can correct them
    relative_error: float  # ‖W − Ŵ‖_F / ‖W‖_F
    output_error: float  # of the outputs about their mean, on the inputs of the fit
    held_out_error: float  # on held-out inputs, of the same fit without them
    output_weighted_error: float  # likewise, outputs weighted by G

    def on_cpu(self) -> Judgement:
        """The same with its tensor on the CPU."""
        return self if self.shift is None else replace(self, shift=self.shift.cpu())


def with_figures(
    record: LayerRecord, form: Form | None, judged: Judgement, same_size: dict[str, float]
) -> LayerRecord:
    """The record of a layer with its errors and, of cores, their entanglement entropies."""
    return replace(
        record,
        relative_error=rounded(judged.relative_error),
        output_error=rounded(judged.output_error),
        held_out_error=rounded(judged.held_out_error),
        same_size={name: rounded(error) for name, error in same_size.items()},
        entropies=() if form is None else tuple(map(rounded, form.entropies())),
    )


@dataclass(frozen=True)
class CalibratedFit:
    """A layer's cores in the stored dtype, on the CPU, with their errors."""

    form: Form
    gamma: float
    judged: Judgement
    same_size: dict[str, float]  # output-weighted errors of "this" fit and of the baselines, if there are any


@dataclass(frozen=True)
class FitSettings:
    """How a layer is fitted."""

    dtype: torch.dtype  # of the stored cores
    seed: int = 0  # of the fit's start
    apart: bool = False  # keep held-out inputs out of the fit, for the refinement after it
    fast: bool = False  # try one γ, and leave the baselines out


def fit_calibrated(
    weight: Tensor,
    storages: Sequence[Storage],
    objective: Objective,
    settings: FitSettings,
    group: ProcessGroup = SINGLE_PROCESS,
) -> CalibratedFit:
    """Fit the cores of a layer so that the errors of its outputs are small.

    Args:
        weight: of shape ``structure.shape``.
        storages: ways to store the layer; the one that does best on held-out inputs is taken.
        objective: of this layer.
        settings: how it is fitted.
        group: the processes that share the trials, with the same arguments.
    """
    dtype, seed = settings.dtype, settings.seed
    first = storages[0].structure
    matrix = one_matrix(weight, first.kind, first.transposed)
    trials = [
        (storage, gamma)
        for storage in storages
        for gamma in _gammas(storage, objective, settings.fast, len(storages))
    ]

    def attempt(trial: tuple[Storage, float]) -> tuple[float, Form]:
        stretches = STRETCHES_OF_SUMS if trial[0].structure.parts else STRETCHES
        form = _rounded(_fit(matrix, objective, trial, stretches, seed), dtype)
        rivals = len(trials) > 1
        error = objective.output_weighted_error.squared(matrix, matrix_of(form)) if rivals else 0.0
        return error, on_device(form, "cpu")

    with freed_at_once(matrix.shape[1] > _WIDE):
        tried = group.map(trials, attempt, [_costs(storage) for storage, _ in trials])
        best = min(range(len(trials)), key=lambda k: tried[k][0])
        form = on_device(tried[best][1], weight.device)
        others, (last, judged) = group.parallel(
            lambda: {} if settings.fast else baselines(weight, matrix, form, objective, seed),
            lambda: _final_fit(matrix, form, None if settings.apart else trials[best], objective, settings),
        )
    return CalibratedFit(last, trials[best][1], judged, {"this": judged.output_weighted_error} | others)


def _final_fit(
    matrix: Tensor,
    form: Form,
    trial: tuple[Storage, float] | None,
    objective: Objective,
    settings: FitSettings,
) -> tuple[Form, Judgement]:
    """The cores on the CPU: as they are, or fitted again on all inputs where a trial is given."""
    made = matrix_of(form)
    if trial is None:
        return on_device(form, "cpu"), judge_matrix(matrix, made, objective).on_cpu()
    held_out = _held_out_errors(matrix, made, objective)
    all_inputs = objective.together()
    _forget_products(objective)
    stretches = 0 if trial[0].structure.parts else LAST
    form = _rounded(_fit(matrix, all_inputs, trial, stretches, settings.seed, form), settings.dtype)
    return on_device(form, "cpu"), judge_matrix(matrix, matrix_of(form), all_inputs, held_out).on_cpu()


def _forget_products(objective: Objective) -> None:
    """Free what was computed from the moments; where it is asked for again, it is computed again."""
    for name in objective.__dict__.keys() - objective.__dataclass_fields__.keys():
        del objective.__dict__[name]


def _gammas(storage: Storage, objective: Objective, fast: bool, rivals: int) -> tuple[float, ...]:
    """The γ to try: all where two factors are the only storage and there is time, else the usual one."""
    if storage.structure.one_matrix:
        return (objective.usual_gamma,) if fast or rivals > 1 else objective.gammas
    return (objective.mpo_gamma,)


def _costs(storage: Storage) -> float:
    """Time of a fit, relative to a closed form."""
    return 1.0 if storage.structure.one_matrix else 4.0


def judge(weight: Tensor, form: Form, objective: Objective) -> Judgement:
    """The errors of cores, however they were found."""
    matrix = one_matrix(weight, form.structure.kind, form.structure.transposed)
    return judge_matrix(matrix, matrix_of(form), objective)


def judge_matrix(
    matrix: Tensor, made: Tensor, objective: Objective, held_out: tuple[float, float] | None = None
) -> Judgement:
    """The errors of an approximation ``made`` of W = ``matrix``, both (N_y, N_x).

    Args:
        matrix: W.
        made: its approximation.
        objective: of the layer.
        held_out: both errors on held-out inputs, where they are those of another approximation.
    """
    norm = float(torch.linalg.vector_norm(matrix))
    return Judgement(
        objective.shift(matrix, made),
        float(torch.linalg.vector_norm(matrix - made)) / norm if norm else 0.0,
        objective.fit_error.relative(matrix, made),
        *(held_out or _held_out_errors(matrix, made, objective)),
    )


def _held_out_errors(matrix: Tensor, made: Tensor, objective: Objective) -> tuple[float, float]:
    """All outputs of one weight, and outputs weighted by G."""
    errors = objective.held_out_error, objective.output_weighted_error
    first, second = (error.relative(matrix, made) for error in errors)
    return first, second


def _fit(
    matrix: Tensor,
    objective: Objective,
    trial: tuple[Storage, float],
    stretches: int,
    seed: int,
    start: Form | None = None,
) -> Form:
    """Fit at a storage and a γ; the closed form of a single matrix needs no start and no stretches."""
    storage, gamma = trial
    structure, metric = storage.structure, objective.metric(matrix, gamma)
    if structure.one_matrix:
        left, right = weighted_svd(metric).factors(storage.bond)
        return form_of([left[None, :, None, :], right[:, None, :, None]], structure)
    target = Target(torch.float64, seed)
    problem = Problem(metric, structure, matrix)
    return problem.fit(storage.truncation, start=start, max_stretches=stretches, target=target).form


def _rounded(form: Form, dtype: torch.dtype) -> Form:
    return form.with_cores([core.to(dtype).contiguous() for core in form.cores])


def on_device(form: Form, device: torch.device | str) -> Form:
    """The same form with its cores on ``device``."""
    return form.with_cores([core.to(device) for core in form.cores])
