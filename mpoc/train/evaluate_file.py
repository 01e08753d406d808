"""``mpoc eval``: open a network and a data set from files, check them, and score the network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpoc.errors import MpocError, UsageError
from mpoc.io.training_history import recorded
from mpoc.models.architecture import make_network
from mpoc.models.call import Call, to_device
from mpoc.models.loading import Model, open_beside, open_model
from mpoc.nn.weight import use_weights
from mpoc.runtime.device import choose_device
from mpoc.runtime.formatting import rounded
from mpoc.train.evaluate import Evaluation, evaluate, fidelity, latency, probe, repeated, try_call
from mpoc.train.loader import BatchLoader
from mpoc.train.settings import EvaluationRequest
from mpoc.train.task_choice import has_task, infer_task
from mpoc.train.training_data import TrainingData, choose_split, open_training_data

SCHEMA = "mpoc.eval/1"


@dataclass(frozen=True)
class FileEvaluation:
    """The scores of a network on a split, with all that tells what was measured."""

    model: Path
    data: str  # its name
    split: str
    scores: dict[str, float]
    examples: int
    rate: float  # examples per second, reading included
    device: str
    metric: str  # the main score
    higher_is_better: bool
    reference: Path | None = None
    latencies: list[dict[str, Any]] = field(default_factory=list)  # batch, ms and, where compressed, dense_ms

    def as_dict(self) -> dict[str, Any]:
        """The JSON report, documented in the guide (file-format-and-json)."""
        answer: dict[str, Any] = {
            "schema": SCHEMA,
            "model": str(self.model),
            "data": self.data,
            "split": self.split,
            "examples": self.examples,
            "device": self.device,
            "metric": self.metric,
            "scores": self.scores,
            "examples_per_second": rounded(self.rate),
        }
        if self.reference is not None:
            answer["reference"] = str(self.reference)
        if self.latencies:
            answer["latency"] = self.latencies
        return answer

    def drop_from(self, before: FileEvaluation) -> float:
        """The loss of the metric against an earlier evaluation, in its unit, to six significant digits."""
        change = before.scores[self.metric] - self.scores[self.metric]
        return float(f"{change if self.higher_is_better else -change:.6g}")


@dataclass(frozen=True)
class _Scored:
    """An evaluation, its main score, and the reference it was made against."""

    evaluation: Evaluation
    metric: str
    higher_is_better: bool
    reference: Path | None = None


def evaluate_file(
    request: EvaluationRequest, say: Callable[[str], None] = lambda text: None
) -> FileEvaluation:
    """Open a network and a data set, and score the network on a split.

    Args:
        request: what is evaluated, and on which data.
        say: called with messages.

    Raises:
        UsageError: an unknown architecture, no such split, or network and data do not fit.
        MpocError: bad data or checkpoint.
    """
    if request.batch < 1:
        raise UsageError(f"--batch {request.batch}: must be at least 1")
    if request.data.path is None and request.reference is None:
        raise UsageError("there is nothing to measure with", "--data PATH, or --reference MODEL2, or both")
    model = open_model(request.source, request.arch)
    reference = open_beside(request.reference, model.architecture) if request.reference else None
    training_data = open_training_data(request.data, model, seed=None, original=reference)
    split = choose_split(training_data.data, request.split)
    device = choose_device(request.device)
    for line in (training_data.data.announce(), *training_data.data.notes, *model.notes):
        say(line)
    say(f"device {device}")
    loader, network = training_data.loader(split), model.network.to(device)
    use_weights(network)
    scored = _scores(request, model, reference, training_data, loader, device)
    latencies = _latencies(model, network, loader, request, device) if request.latency else []
    return FileEvaluation(
        request.source, training_data.data.path.resolve().name, split, scored.evaluation.rounded(),
        scored.evaluation.examples, scored.evaluation.rate, str(device), scored.metric,
        scored.higher_is_better, scored.reference, latencies,
    )  # fmt: skip


def _scores(
    request: EvaluationRequest,
    model: Model,
    reference: Model | None,
    training_data: TrainingData,
    loader: BatchLoader,
    device: torch.device,
) -> _Scored:
    if request.reference is not None and request.task is not None:
        raise UsageError("--task and --reference cannot be used together")
    stand_in = None if reference else _stand_in(request, model, training_data, loader, device)
    if stand_in is not None:
        reference = open_beside(stand_in, model.architecture)
    if reference is not None:
        other = reference.network.to(device)
        use_weights(other)
        similarity = fidelity(model.network, other, loader, request.batch, device)
        metric = "agreement" if "agreement" in similarity.scores else "cosine"
        return _Scored(similarity, metric, True, reference.path)
    if request.task == "distillation":
        hint = "--reference MODEL2 compares outputs"
        raise UsageError("--task distillation applies to mpoc finetune", hint)
    task = infer_task(request.task, training_data, model.network)
    if task.name == "classification" and training_data.renumbered:
        known = recorded(model.history, "classes")
        unknown = next(name for name in training_data.data.classes if name not in known)
        raise MpocError(
            f"{training_data.data.path}: class {unknown!r} is none of the {len(known)} of the network's "
            "training",
            f"name the classes as in training: {', '.join(sorted(known, key=known.__getitem__)[:10])}",
        )
    probe(model.network, task, loader, device)
    evaluation = evaluate(model.network, task, loader, request.batch, device)
    return _Scored(evaluation, task.metric, task.higher_is_better)


@torch.no_grad()
def _stand_in(
    request: EvaluationRequest,
    model: Model,
    training_data: TrainingData,
    loader: BatchLoader,
    device: torch.device,
) -> Path | None:
    """The reference to use where data and network give no task; None where they give one."""
    if request.stand_in is None:
        return None
    batch = to_device(loader.read(torch.arange(min(2, len(loader)))), device)
    outputs = try_call(Call.of(model.network), model.network, batch)
    return None if has_task(training_data, outputs) else request.stand_in


def _latencies(
    model: Model, network: nn.Module, loader: BatchLoader, request: EvaluationRequest, device: torch.device
) -> list[dict[str, Any]]:
    """Median milliseconds of a call for one example and for a batch, of the network and of the dense one."""
    part = loader.read(torch.arange(min(request.batch, len(loader))))
    dense = None if model.manifest is None else _dense(model, device)
    lines = []
    for count in sorted({1, request.batch}):
        batch = repeated(part, count)
        line: dict[str, Any] = {"batch": count, "ms": rounded(1e3 * latency(network, batch, device))}
        if dense is not None:
            line["dense_ms"] = rounded(1e3 * latency(dense, batch, device))
        lines.append(line)
    return lines


def _dense(model: Model, device: torch.device) -> nn.Module:
    """The dense network with random weights, which do not change its latency."""
    with torch.random.fork_rng(devices=[]):
        if model.architecture is not None:
            return make_network(model.architecture).to(device)
        network: Any = model.network
        config = copy.deepcopy(network.config)  # only networks of transformers record no architecture
        del config.quantization_config
        dense: nn.Module = type(network)(config)
        return dense.to(device)
