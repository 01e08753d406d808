"""Infer the task from the data and the network, or check the one that was asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from mpoc.data import check_fits
from mpoc.errors import UsageError, nearest
from mpoc.models.call import has_logits
from mpoc.train.tasks import CausalLM, Classification, Distillation, MaskedLM, Regression, Task
from mpoc.train.training_data import TrainingData

TASKS = ("classification", "regression", "causal-lm", "masked-lm", "distillation")


def infer_task(
    wanted: str | None,
    training_data: TrainingData,
    network: nn.Module,
    teacher: nn.Module | None = None,
    temperature: float = 2.0,
    hidden_weight: float = 1.0,
) -> Task:
    """Infer the task from data and network, or check the one that is wanted.

    Args:
        wanted: one of TASKS; None to infer it.
        training_data: the data.
        network: the network.
        teacher: teacher of a distillation, which is then the task.
        temperature: temperature of the distillation.
        hidden_weight: weight of the hidden states in the distillation.

    Raises:
        UsageError: the task is unknown, or does not fit the data or the network.
    """
    if wanted is not None and wanted not in TASKS:
        raise UsageError(f"--task {wanted}: unknown{nearest(wanted, TASKS)}", ", ".join(TASKS))
    if wanted == "distillation" if teacher is None else wanted not in (None, "distillation"):
        raise UsageError("--task distillation and --teacher go together", "--teacher DENSE alone is enough")
    if teacher is not None:
        return Distillation(teacher, temperature, hidden_weight)
    name = wanted or _fitting(training_data, network)
    if name == "masked-lm":
        return _masked(training_data)
    if name == "causal-lm":
        if training_data.data.kind != "text":
            raise UsageError(f"--task {name}: {training_data.data.path} is not text")
        return CausalLM()
    return _supervised(name, training_data)


def _supervised(name: str, training_data: TrainingData) -> Task:
    """Regression or classification.

    Raises:
        UsageError: the data have no labels, or targets of a regression.
    """
    y = _labels(training_data)
    if y is None:
        raise UsageError(
            f"{training_data.data.path}: has no labels",
            "finetune --teacher DENSE or eval --reference DENSE uses the original network instead",
        )
    if name == "regression":
        return Regression()
    if y.is_floating_point():
        raise UsageError(f"--task classification: the targets of {training_data.data.path} are not classes")
    return Classification(len(training_data.data.classes), partial(check_fits, training_data.data))


def has_task(training_data: TrainingData, outputs: Any) -> bool:
    """Whether there is something to score: text or labels, and a network with a head.

    Args:
        training_data: the data.
        outputs: output of the network for a batch of them.
    """
    return (training_data.data.kind == "text" or _labels(training_data) is not None) and has_logits(outputs)


def _fitting(training_data: TrainingData, network: nn.Module) -> str:
    y = _labels(training_data)
    if training_data.data.kind == "text" and y is None:
        return "masked-lm" if type(network).__name__.endswith("MaskedLM") else "causal-lm"
    return "regression" if y is not None and y.is_floating_point() else "classification"


def _labels(training_data: TrainingData) -> torch.Tensor | None:
    return next(iter(training_data.data.splits.values())).y


def _masked(training_data: TrainingData) -> MaskedLM:
    tokenizer = training_data.data.tokenizer
    if tokenizer is None or tokenizer.mask_id is None:
        raise UsageError(
            "--task masked-lm needs a tokenizer with a mask token", "--tokenizer names a directory"
        )
    return MaskedLM(tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids)
