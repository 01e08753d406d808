"""The optimiser, and the learning rate of each step as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mpoc.train.settings import Settings


def make_optimizer(parameters: Iterable[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """SGD, AdamW, or Adam where the L2 of Eq. (7) is asked for: torch's Adam has it coupled.

    Every parameter is in one group: Eq. (7) sums over all of them, biases and norms too.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            trained,
            lr=settings.peak,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.l2,
        )
    if settings.l2:
        return torch.optim.Adam(trained, lr=settings.peak, betas=settings.betas, weight_decay=settings.l2)
    return torch.optim.AdamW(
        trained, lr=settings.peak, betas=settings.betas, weight_decay=settings.weight_decay
    )


def learning_rate(settings: Settings, step: int, steps: int, steps_per_epoch: int) -> float:
    """Of step ``step`` (from 0) of ``steps``.

    Warm-up is linear and reaches the peak in its last step.  Cosine falls from there and is 0 only behind the
    last step (Loshchilov and Hutter 2017); exponential multiplies by gamma every ``decay_every`` epochs.
    """
    warmup = settings.warmup * steps if settings.warmup < 1 else settings.warmup
    if step + 1 < warmup:
        return settings.peak * (step + 1) / warmup
    if settings.schedule == "cosine":
        done = (step - warmup) / max(1.0, steps - warmup)
        return settings.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
    if settings.schedule == "exponential":
        return settings.peak * settings.gamma ** (step // steps_per_epoch // settings.decay_every)
    return settings.peak


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """For the step that comes."""
    for group in optimizer.param_groups:
        group["lr"] = lr
