"""Weighted norms for the tests, well conditioned and singular ones, and moments of real samples."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mpoc.tensor_networks.fit.metric import Metric
from mpoc.tensor_networks.fit.second_moment import CentredRows, RowMoment


def random_moment(size: int, rank: int | None = None, seed: int = 0) -> Tensor:
    """(size, size) float64 of this rank, eigenvalues spread over three decades."""
    generator = torch.Generator().manual_seed(seed)
    rank = size if rank is None else rank
    draws = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(draws)[0]
    return (basis * torch.logspace(0, -3, rank, dtype=torch.float64)) @ basis.T


def random_metric(
    outputs: int,
    inputs: int,
    weighted_outputs: bool = True,
    ranks: tuple[int | None, int | None] = (None, None),
    seed: int = 0,
) -> Metric:
    """A Gaussian target in a random metric; ``ranks`` those of M and G."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return Metric(
        target,
        random_moment(inputs, ranks[0], seed + 1),
        random_moment(outputs, ranks[1], seed + 2) if weighted_outputs else None,
    )


def diagonal_metric(outputs: int, inputs: int, seed: int = 0) -> tuple[Metric, Metric]:
    """A metric whose G is diagonal and spread over three decades, and the same with G formed."""
    metric = random_metric(outputs, inputs, weighted_outputs=False, seed=seed)
    generator = torch.Generator().manual_seed(seed + 3)
    diagonal = 10 ** (-3 * torch.rand(outputs, generator=generator, dtype=torch.float64))
    return replace(metric, outputs=diagonal), replace(metric, outputs=torch.diag(diagonal))


def moments(samples: Tensor, dense: Tensor | None = None) -> dict[str, Any]:
    """The moments that :func:`make_metric` takes, of rows (n, N_x), by default of the dense network."""
    dense = samples if dense is None else dense
    count = len(samples)
    return {
        "second": samples.T @ samples / count,
        "mean": samples.mean(0),
        "cross": dense.T @ samples / count,
        "dense_mean": dense.mean(0),
    }


def row_moments(samples: Tensor, dense: Tensor | None = None) -> dict[str, Any]:
    """The same, kept as rows about zero."""
    weights = torch.full((len(samples),), 1 / len(samples), dtype=torch.float64)
    seen = CentredRows(samples - 1, -torch.ones(samples.shape[1], dtype=torch.float64))
    other = seen if dense is None else CentredRows(dense, torch.zeros(dense.shape[1], dtype=torch.float64))
    joint = RowMoment(seen, seen, weights), RowMoment(other, seen, weights)
    return moments(samples, dense) | {"second": joint[0], "cross": joint[0] if dense is None else joint[1]}
