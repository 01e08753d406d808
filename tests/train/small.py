"""A small set and a small network, and mpoc's loop on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpoc.data.arrays import Arrays
from mpoc.train.engine import make_accelerator
from mpoc.train.loader import BatchLoader
from mpoc.train.loop import train
from mpoc.train.monitor import Outcome, TrainingMonitor
from mpoc.train.settings import Settings
from mpoc.train.tasks import Classification

CLASSES = 3
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "schedule": "constant", "momentum": 0.9}


def blobs(count: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x (count, 12), y (count,): which of three directions is strongest."""
    x = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :CLASSES].argmax(1)


def loader(count: int = 96, seed: int = 0) -> BatchLoader:
    x, y = blobs(count, seed)
    return BatchLoader(Arrays([x], y))


def perceptron(dropout: float = 0.0) -> nn.Sequential:
    """12 → 24 → 3, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, CLASSES))


def run(
    network: nn.Module,
    data: BatchLoader | None = None,
    monitor: TrainingMonitor | None = None,
    **settings: Any,
) -> Outcome:
    """Train by classification on the CPU; without more said, SGD with a constant rate."""
    values = {**SGD, "batch": 16, "epochs": 2, **settings}
    validation = loader(48, seed=1)
    return train(
        network, Classification(CLASSES), data or loader(), Settings(**values), validation, monitor,
        make_accelerator("cpu"),
    )  # fmt: skip


def weights(network: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]
