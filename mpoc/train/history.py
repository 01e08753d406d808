"""What a trained network's file says of its training: plain data, which ``mpoc eval`` reads again."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from mpoc.train.material import Material, monitored_split
from mpoc.train.settings import Settings
from mpoc.train.tasks import Task
from mpoc.train.watch import Outcome, short


def data_record(material: Material) -> dict[str, Any]:
    """Which data: the same in a training that goes on."""
    data = material.data
    held_out = {"held_out": material.held_out} if material.held_out else {}
    return {
        "name": data.path.resolve().name,
        "format": data.format,
        "splits": {name: len(split) for name, split in data.splits.items()},
        "fingerprint": material.fingerprint,
    } | held_out


def make_history(
    settings: Settings,
    runs: int,
    material: Material,
    task: Task,
    outcome: Outcome,
    results: list[dict[str, Any]],
) -> dict[str, Any]:
    """What the manifest keeps: no times, so that the same training gives the same bytes.

    Args:
        settings: of the training.
        runs: how often it was run.
        material: the data.
        task: what was learnt.
        outcome: of the run that is written.
        results: the scores of every run, with its ``seed``; the last is that of ``outcome``.
    """
    monitor = monitored_split(material.data)
    history: dict[str, Any] = {
        "data": data_record(material),
        "task": task.name,
        "metric": task.metric,
        "split": monitor or "",
        "steps": outcome.steps,
        "settings": {**asdict(settings), "lr": settings.peak},
        "evaluations": outcome.evaluations,
    }
    if monitor:
        history |= {"start": outcome.evaluations[0], "final": outcome.chosen}
    if "test" in material.data.splits and monitor != "test":
        history["test"] = {name: value for name, value in results[-1].items() if name != "seed"}
    if material.data.kind == "images":
        history["images"] = material.images.as_dict()
    if material.classes and task.name == "classification":
        history["classes"] = material.classes
    if material.data.tokenizer is not None:
        history["tokenizer"] = material.data.tokenizer.state()
    if runs > 1:
        name = task.metric if task.metric in results[0] else "train_loss"
        values = [result[name] for result in results]
        mean, sigma = statistics.fmean(values), statistics.stdev(values)  # Eqs. (10) and (11)
        history |= {"runs": results, "mean": short(mean), "sigma": short(sigma)}
    return history
