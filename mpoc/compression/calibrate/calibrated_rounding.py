"""Round what is stored of a layer so that its outputs stay near, and correct its bias for what is lost.

Codes are chosen with feedback in the metric of the layer's inputs: the error of a column moves onto the
columns that follow (GPTQ, arXiv 2210.17323).  The target is that of every calibrated fit, the weight that
does best on the inputs that the compressed network gives (for rounding: GPTAQ, arXiv 2504.02692).  γ, the
share of the moments that gives way to their diagonal, follows from the numbers of rows and inputs.  Where
rounding to nearest does better on held-out inputs, which no codes are made from, it stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mpoc.compression.calibrate.calibrated_fit import Judgement, judge_matrix
from mpoc.compression.calibrate.objective import LayerObjective, Objective, one_matrix
from mpoc.compression.plan import LayerPlan
from mpoc.io.coded_parts import Rounding, tensor_of
from mpoc.io.manifest import CodedPart, LayerRecord
from mpoc.quantize.codes import QuantizedTensor
from mpoc.quantize.feedback import Feedback, Rows, best_exponents, weights_of
from mpoc.quantize.grid_rounding import gptq, round_grid
from mpoc.quantize.rounding import coded_in_bytes
from mpoc.quantize.storage import Grid, default_grid
from mpoc.tensor_networks.fit.metric import Metric, weighed
from mpoc.tensor_networks.fit.second_moment import RowMoment, Second
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.fit.weighted import matrix_of
from mpoc.tensor_networks.fit.whitening import weighted_svd
from mpoc.tensor_networks.forms.form import Form, form_of
from mpoc.tensor_networks.forms.layout import from_matrix, to_matrix
from mpoc.tensor_networks.structure import low_rank_structure

# Added to the metrics of inputs and of outputs, as shares of their diagonals: gradients of the dense network
# say less of outputs that carry the errors of all layers before.
_DAMPING, _ROW_DAMPING = 1e-2, 0.5
_GAMMAS = 0.02, 0.1, 0.3
_WIDEST = 8192  # columns of a metric that is formed
# Two factors of a coded weight are tried below so many bits a weight, at the best of these bits a number.
_LOW_RANK_BELOW, _FACTOR_BITS = 1.5, (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)
_NOISE, _RANKS = 0.7, 2  # the share that stands before 4^−b, until it is measured; ranks that are tried


@dataclass(frozen=True)
class CalibratedRounding:
    """The codes of a layer, with their errors."""

    record: LayerRecord  # dense, or with the bonds of the cores
    form: Form | None  # the cores; None: dense
    codes: list[QuantizedTensor]
    judged: Judgement
    same_size: dict[str, float]  # output-weighted errors: "this", and rounding without feedback


def round_calibrated(
    weight: Tensor,
    record: LayerRecord,
    rounding: Rounding,
    objective: Objective,
    nearest: list[QuantizedTensor],
    form: Form | None = None,
    between_rows: bool = True,
) -> CalibratedRounding:
    """Round the weight of a layer that stays dense, or the cores that were fitted to it.

    Args:
        weight: of shape ``record.shape``.
        record: of the layer as planned, or with the bonds that its fit ended with.
        rounding: to what.
        objective: of this layer.
        nearest: codes without feedback, as :meth:`mpoc.io.coded_parts.Rounding.codes` makes them.
        form: the fitted cores; None: the layer stays dense.
        between_rows: whether feedback moves errors between rows too.

    Raises:
        MpocError: a number is too large for the storage.
    """
    parts = rounding.planned(record).coded_parts
    matrix = one_matrix(weight, record.kind, record.transposed)
    if form is None:
        trial = partial(_round_weight, parts[0], rounding, between_rows)
    else:
        trial = partial(_round_cores, form, parts, rounding, between_rows)

    def values(codes: Sequence[QuantizedTensor]) -> Tensor:
        made = codes[0].values() if form is None else matrix_of(_rounded_form(record, codes))
        return made.to(matrix)

    error = objective.output_weighted_error
    tried = trial(objective.metric(matrix, _gamma(objective, matrix.shape[1]))), nearest
    best = min(tried, key=lambda codes: error.squared(matrix, values(codes)))
    judged = judge_matrix(matrix, values(best), objective)
    same_size = {
        "this": judged.output_weighted_error,
        "rounded to nearest": error.relative(matrix, values(nearest)),
    }
    return CalibratedRounding(record, form, best, judged.on_cpu(), same_size)


def low_rank_if_better(
    found: CalibratedRounding,
    plan: LayerPlan,
    weight: Tensor,
    objective: Objective,
    between_rows: bool,
    in_directory: bool,
) -> CalibratedRounding:
    """Two factors in the bytes of a coded dense weight, where held-out outputs are nearer; or as it was.

    Args:
        found: the dense weight, rounded.
        plan: of the layer, dense.
        weight: of shape ``plan.map.shape``.
        objective: of this layer.
        between_rows: whether feedback moves errors between rows too.
        in_directory: whether a directory is written.
    """
    rounding = plan.rounding
    if rounding is None or rounding.storage != "coded" or rounding.bits > _LOW_RANK_BELOW:
        return found
    if type(objective) is not LayerObjective:
        return found
    matrix = one_matrix(weight, plan.map.kind, plan.map.transposed)
    metric = objective.metric(matrix, _gamma(objective, matrix.shape[1]))
    longer = longer_record(plan.map.name, in_directory)
    nbytes = plan.record().stored_bytes - longer
    rounded = _factors_within(nbytes, plan, metric, between_rows) if nbytes > 2 * longer else None
    if rounded is None:
        return found
    record, codes = rounded
    form = _rounded_form(record, codes)
    judged = judge_matrix(matrix, matrix_of(form).to(matrix), objective)
    if judged.output_weighted_error >= found.judged.output_weighted_error:
        return found
    same_size = found.same_size | {"this": judged.output_weighted_error}
    return CalibratedRounding(record, form, codes, judged.on_cpu(), same_size)


def _factors_within(
    nbytes: int, plan: LayerPlan, metric: Metric, between_rows: bool
) -> tuple[LayerRecord, list[QuantizedTensor]] | None:
    """Codes of two factors in so many bytes, of the rank that leaves least of the metric; None: no rank fits.

    What rounding leaves differs by a factor of twenty between layers, so the first rank tried measures it for
    the second.
    """
    assert plan.rounding is not None
    sides, one = sum(metric.target.shape), plan.structure
    structure = low_rank_structure(one.kind, one.shape, one.transposed)
    best = weighted_svd(metric)
    tried: dict[int, tuple[float, LayerRecord, list[QuantizedTensor]]] = {}
    noise = _NOISE
    for _ in range(_RANKS):
        rank = _best_rank(best.values, nbytes / sides, noise)
        if rank == 0 or rank in tried:
            break
        rounding = plan.rounding.of_bytes(nbytes, rank * sides, 2)
        record = replace(plan, structure=structure, goal=Truncation(rank), rounding=rounding).record()
        codes = _round_factors(best.factors(rank), record.coded_parts, rounding, between_rows, metric)
        error = metric.value(matrix_of(_rounded_form(record, codes)).to(metric.target))
        tried[rank] = error, record, codes
        noise = _noise(error, best.values, rank, rounding.bits)
    return min(tried.values(), key=lambda trial: trial[0])[1:] if tried else None


def longer_record(name: str, in_directory: bool) -> int:
    """The most bytes that two factors take more than a dense weight beside their streams.

    Their record is longer, and the header of a file names two streams; so does the index of a directory.
    """
    return 610 + 2 * len(name) if in_directory else 390 + len(name)


def _best_rank(values: Tensor, nbytes: float, noise: float) -> int:
    """The rank that, at so many bytes for one row and column of each rank, leaves least; 0: there is none.

    What truncation leaves is known, what rounding to b bits leaves is about the share ``noise`` · 4^−b.
    """
    squares = values.square()
    ranks = {int(8 * nbytes / bits): bits for bits in _FACTOR_BITS}
    left = {
        rank: float(squares[rank:].sum() / squares.sum()) + noise * 4**-bits
        for rank, bits in ranks.items()
        if 1 <= rank <= len(values)
    }
    return min(left, key=left.__getitem__, default=0)


def _noise(error: float, values: Tensor, rank: int, bits: float) -> float:
    """What rounding two factors to so many bits left, as the share that stands before 4^−b."""
    squares = values.square()
    share = (error - squares[rank:].sum()) / squares.sum()
    return float(share.clamp(min=0)) * 4**bits


def _rounded_form(record: LayerRecord, codes: Sequence[QuantizedTensor]) -> Form:
    """The cores that codes stand for, in float64."""
    pairs = zip(record.coded_parts, codes, strict=True)
    return form_of([tensor_of(part, own.values()).double() for part, own in pairs], record.structure)


def _gamma(objective: Objective, columns: int) -> float:
    """The strength of shrinkage: a third of the inputs over the rows, or the next one above.

    Where rows are hardly more than inputs, weaker ones fit their noise: held-out examples of the same data
    show that less than other data do.
    """
    if not isinstance(objective, LayerObjective):
        return objective.gammas[1]
    least = columns / (3 * objective.moments.rows)
    return next((gamma for gamma in _GAMMAS if gamma >= least), _GAMMAS[-1])


def _round_weight(
    part: CodedPart, rounding: Rounding, between_rows: bool, metric: Metric
) -> list[QuantizedTensor]:
    return [_round(metric.target, metric.inputs, rows_of(metric.outputs, between_rows), part, rounding)]


def _round_cores(
    form: Form, parts: Sequence[CodedPart], rounding: Rounding, between_rows: bool, metric: Metric
) -> list[QuantizedTensor]:
    """The two factors of ``svd`` with feedback, each for the other; other cores to their nearest codes."""
    if form.structure.form != "svd":
        tensors = [core.float() for core in form.cores]
        return [rounding.nearest(part, core) for part, core in zip(parts, tensors, strict=True)]
    return _round_factors(weighted_svd(metric).factors(form.bonds[1]), parts, rounding, between_rows, metric)


def _round_factors(
    factors: tuple[Tensor, Tensor],
    parts: Sequence[CodedPart],
    rounding: Rounding,
    between_rows: bool,
    metric: Metric,
) -> list[QuantizedTensor]:
    """Round A B: B with feedback in M, then A, refitted to the rounded B, with feedback in B M Bᵀ.

    The bond is rotated first, so that no row of B and no column of A stands out: the gauge is free.
    """
    left, right = factors
    rotation = _rotation(left.shape[1]).to(left)
    left, right = left @ rotation.T, rotation @ right
    bond = left.T @ weighed(metric.outputs, left)
    second = _round(right, metric.inputs, Feedback(_damped(bond, _DAMPING)), parts[1], rounding)
    rounded = second.values().to(right)
    seen = rounded * metric.inputs if _is_diagonal(metric.inputs) else rounded @ metric.inputs
    gram = seen @ rounded.T
    gram.diagonal().add_(1e-9 * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)  # all may be 0
    left = torch.linalg.solve(gram, seen @ metric.target.T).T
    return [_round(left, gram, rows_of(metric.outputs, between_rows), parts[0], rounding), second]


def _round(
    target: Tensor, inputs: Second, rows: Rows, part: CodedPart, rounding: Rounding
) -> QuantizedTensor:
    """Codes of ``target`` (rows, columns) in the metric of its columns and of its rows."""
    feedback = feedback_of(inputs)
    if isinstance(part.storage, Grid):
        return round_grid(target, feedback, part.storage, rows)
    weights = inputs.diagonal() if feedback is None else feedback.weights
    steps = best_exponents(weights_of(rows), len(target)), best_exponents(weights, target.shape[1])
    return coded_in_bytes(target, feedback, *steps, rounding.most_bytes(target.numel()), rows)


def feedback_of(inputs: Second) -> Feedback | None:
    """The metric of inputs, damped, as rounding takes it; None where it is too wide to be formed."""
    if isinstance(inputs, Tensor):
        return Feedback(_damped(torch.diag(inputs) if inputs.dim() == 1 else inputs, _DAMPING))
    return Feedback(_damped(inputs.formed(), _DAMPING)) if len(inputs.left.centre) <= _WIDEST else None


def rows_of(outputs: Tensor | None, between_rows: bool = True) -> Rows:
    """The metric of outputs, damped, as rounding takes it; its diagonal where it is too wide, or as asked."""
    if outputs is None or outputs.dim() == 1:
        return outputs
    if between_rows and len(outputs) <= _WIDEST:
        return Feedback(_damped(outputs, _ROW_DAMPING))
    return outputs.diagonal()


def _damped(moment: Tensor, share: float) -> Tensor:
    return moment + torch.diag(share * moment.diagonal())


def gptq_weight(weight: Tensor, record: LayerRecord, objective: Objective | None, bits: int) -> Tensor:
    """A weight as GPTQ on the dense network's inputs rounds it, to the default grid of so many bits.

    Args:
        weight: of shape ``record.shape``.
        record: of the layer.
        objective: on the dense network's inputs; None, or of another kind than a linear map's or a
            convolution's: each number goes to its nearest code.
        bits: of a code.
    """
    structure = low_rank_structure(record.kind, record.shape, record.transposed)
    matrix = to_matrix(weight, structure)[0]
    second = objective.moments.dense_second if isinstance(objective, LayerObjective) else None
    if isinstance(second, RowMoment):
        second = second.formed() if len(second.left.centre) <= _WIDEST else None
    columns = matrix.shape[1]
    values = gptq(matrix, second, bits, default_grid(bits, columns).group or columns)
    return from_matrix(values[None], structure)


def _rotation(size: int) -> Tensor:
    """An orthogonal matrix that spreads every axis over all: that of the discrete cosine transform."""
    index = torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(torch.pi / size * (index[None] + 0.5) * index[:, None]) * (2 / size) ** 0.5
    cosines[0] /= 2**0.5
    return cosines


def _is_diagonal(inputs: Second) -> bool:
    return isinstance(inputs, Tensor) and inputs.dim() == 1
